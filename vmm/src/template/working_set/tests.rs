#![forbid(unsafe_code)]

use std::os::unix::fs::{FileExt, PermissionsExt};

use pando_pager::PageIndex;
use pando_pager::image::BackendIndex;
use pando_pager::working_set::Touch;

use super::*;

/// 64 pages of data.
fn index() -> Index {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 64 * 4096], 0).unwrap();
    let backend = BackendIndex::scan(&file, 64 * 4096, &mut |_, _| ()).unwrap();
    Index::new(vec![("ram0".to_owned(), backend)])
}

fn trace(pages: &[u64]) -> Trace {
    let touches = pages.iter().map(|&page| Touch {
        image: 0,
        page: PageIndex::new(page),
        write: page % 2 == 1,
        at: Duration::ZERO,
    });
    Trace {
        client: 0,
        touches: touches.collect(),
        is_complete: true,
        ..Trace::default()
    }
}

fn file<'a>(dir: &'a Path, index: &'a Index) -> WorkingSetFile<'a> {
    WorkingSetFile {
        dir,
        template_mark: 7,
        index,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn learn(file: &WorkingSetFile<'_>, pages: &[u64]) -> Learned {
    file.learn(&[trace(pages)], &MergeRules::default()).unwrap()
}

#[test]
fn what_was_learned_is_found_again_in_a_read_only_file() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    let file = file(dir.path(), &index);
    assert_eq!(file.read(), Found::Absent);
    let none = file.learn(&[trace(&[])], &MergeRules::default()).unwrap();
    assert_eq!((none.set.runs(), names(dir.path()).len()), (0, 0));
    let first = learn(&file, &[3, 4]);
    assert_eq!(file.read().set(), Some(&first.set));
    let second = learn(&file, &[4, 5]);
    assert_eq!((second.merged[0].known, second.merged[0].new), (1, 1));
    assert_eq!(file.read(), Found::Known(second.set.clone()));
    assert_eq!((second.set.runs(), second.replaced), (2, None));
    assert_eq!(names(dir.path()), [WORKING_SET_FILE]);
    let mode = fs::metadata(file.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
}

#[test]
fn of_two_that_learn_at_once_neither_loses_a_run() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    let (threads, rounds) = (4_u64, 10);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let file = file(dir.path(), &index);
            scope.spawn(move || {
                for _ in 0..rounds {
                    learn(&file, &[thread, 60]);
                }
            });
        }
    });
    let found = file(dir.path(), &index).read();
    let set = found.set().unwrap();
    assert_eq!(set.runs(), threads * rounds);
    let pages: Vec<u64> = set.backends()[0]
        .pages()
        .iter()
        .map(|p| p.page.get())
        .collect();
    assert_eq!(pages.last(), Some(&60));
    assert_eq!(names(dir.path()), [WORKING_SET_FILE]);
}

#[test]
fn a_file_that_is_of_no_use_is_ignored_with_a_reason_and_replaced() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    let file = file(dir.path(), &index);
    learn(&file, &[1]);
    let good = fs::read(file.path()).unwrap();
    let put = |bytes: &[u8]| {
        fs::remove_file(file.path()).unwrap();
        fs::write(file.path(), bytes).unwrap();
    };
    let ignored = || match file.read() {
        Found::Ignored { reason } => reason,
        other => panic!("{other:?}"),
    };
    for (bytes, reason) in [
        (&b""[..], "less than its header"),
        (b"#!/bin/sh", "does not begin with the mark"),
        (&good[..good.len() - 1], "promises"),
    ] {
        put(bytes);
        assert!(ignored().contains(reason), "{}", ignored());
    }
    let mut flipped = good.clone();
    flipped[50] ^= 1;
    put(&flipped);
    assert!(ignored().contains("checksum"), "{}", ignored());
    let learned = learn(&file, &[2]);
    assert!(learned.replaced.unwrap().contains("checksum"));
    assert_eq!((learned.set.runs(), file.read().set().is_some()), (1, true));

    fs::remove_file(file.path()).unwrap();
    fs::create_dir(file.path()).unwrap();
    assert!(ignored().contains("it is a directory"), "{}", ignored());
    fs::remove_dir(file.path()).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, file.path(), rustix::fs::Mode::RUSR).unwrap();
    assert!(ignored().contains("it is a FIFO"), "{}", ignored());
    assert_eq!(learn(&file, &[2]).set.runs(), 1);
}

#[test]
fn that_of_another_template_is_ignored() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    learn(&file(dir.path(), &index), &[1]);
    let other = WorkingSetFile {
        template_mark: 8,
        ..file(dir.path(), &index)
    };
    let Found::Ignored { reason } = other.read() else {
        panic!("it was taken");
    };
    assert!(reason.contains("another template"), "{reason}");
}

#[test]
fn a_held_directory_is_waited_for_and_named() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    let file = file(dir.path(), &index);
    let held = File::open(dir.path()).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let error = file.learn(&[trace(&[1])], &MergeRules::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("another process held the lock"), "{error}");
    let error = file.learn_run_now(&trace(&[1])).unwrap_err();
    assert!(
        matches!(error, LearnError::Locked { tries: 1, .. }),
        "{error}"
    );
    drop(held);
    learn(&file, &[1]);
}

#[test]
fn a_place_that_cannot_be_written_is_an_error_with_the_remedy() {
    let index = index();
    let file = file(Path::new("/proc/self/net"), &index);
    let error = file.learn(&[trace(&[1])], &MergeRules::default());
    let error = error.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("let this user write the directory"),
        "{error}"
    );
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn whether_it_can_be_written_is_told_before() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    file(dir.path(), &index).check_writable().unwrap();
    let gone = dir.path().join("gone");
    let error = file(&gone, &index)
        .check_writable()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("gone was not updated; let this user write"),
        "{error}"
    );
    // Root may write anything.
    if !rustix::process::geteuid().is_root() {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
        let error = file(dir.path(), &index).check_writable().unwrap_err();
        assert!(one_line(&error).contains("denied"), "{error}");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let (dir, index) = (tempfile::tempdir().unwrap(), index());
    let left = dir
        .path()
        .join(format!("{WORKING_SET_FILE}.new-{}", std::process::id()));
    fs::write(&left, b"x").unwrap();
    fs::write(dir.path().join("manifest.json.new-1"), b"x").unwrap();
    learn(&file(dir.path(), &index), &[1]);
    assert_eq!(names(dir.path()), ["manifest.json.new-1", WORKING_SET_FILE]);
}
