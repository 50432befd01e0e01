#![forbid(unsafe_code)]
//! A cgroup for each clone, where the host allows it.
//!
//! ```text
//! the cgroup of this process
//!   pando-PID            one a supervisor
//!     supervisor         itself, where the kernel wants no processes above controllers
//!     1, 2, 3 ..         one a clone, made before its process and removed after it
//! ```
//! A process begins in its cgroup (`sys/spawn.rs`). A supervisor that is killed leaves directories
//! behind, and its clones end with it; the next one in the same cgroup removes what is left.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use crate::host::cgroups::Membership;

/// What the directory of a supervisor begins with; its process number follows.
const PREFIX: &str = "pando-";
const SUPERVISOR: &str = "supervisor";
/// Controllers that clones are to have where they can be had.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// How often a cgroup is tried to be removed whose last process is just going, and the pause between.
const REMOVE_TRIES: u32 = 100;
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// Why clones have no cgroups of their own.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// There is no hierarchy of version 2.
    #[error(
        "clones have no cgroups of their own: cgroup version 2 is not mounted (boot with \
         systemd.unified_cgroup_hierarchy=1)"
    )]
    NotMounted,
    /// The directory may not be made.
    #[error(
        "clones have no cgroups of their own: cannot {action} {path} (start it with systemd-run --user --scope \
         -p Delegate=yes, or as root)"
    )]
    Refused {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn refused(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Refused {
        action,
        path: path.to_owned(),
        source,
    }
}

/// The cgroups of one supervisor's clones; dropping it removes them.
#[derive(Debug)]
pub struct CloneGroups {
    /// That in which this process was.
    above: PathBuf,
    dir: PathBuf,
    next: u64,
    accounting: Result<(), String>,
    has_moved: bool,
    /// Controllers that were enabled above for this supervisor.
    enabled_above: Vec<&'static str>,
    /// Those that could not be removed at once.
    left: Arc<Mutex<Vec<PathBuf>>>,
}

impl CloneGroups {
    /// Makes the directory below the cgroup of this process, after removing those of supervisors that
    /// are no longer.
    pub fn new() -> Result<Self, CgroupError> {
        let place = Membership::of_self().unified;
        Self::below(&place.ok_or(CgroupError::NotMounted)?.dir)
    }

    fn below(above: &Path) -> Result<Self, CgroupError> {
        for dir in abandoned(above) {
            match remove_tree(&dir) {
                Ok(()) => {
                    tracing::info!(dir = %dir.display(), "removed what a killed supervisor left")
                }
                Err(error) => {
                    tracing::warn!(dir = %dir.display(), %error, "cannot remove what a killed supervisor left");
                }
            }
        }
        let dir = above.join(format!("{PREFIX}{}", std::process::id()));
        if dir.is_dir() {
            // Of another that had our number.
            remove_tree(&dir).map_err(refused("remove", &dir))?;
        }
        fs::create_dir(&dir).map_err(refused("make", &dir))?;
        let mut groups = Self {
            above: above.to_owned(),
            dir,
            next: 0,
            accounting: Ok(()),
            has_moved: false,
            enabled_above: Vec::new(),
            left: Arc::default(),
        };
        groups.accounting = groups.enable_controllers();
        Ok(groups)
    }

    /// Whether the kernel's memory of each clone is known, and why not.
    pub fn accounting(&self) -> Result<(), &str> {
        self.accounting.as_ref().copied().map_err(String::as_str)
    }

    /// A cgroup for one more clone.
    pub fn create(&mut self) -> Result<CloneGroup, CgroupError> {
        self.retry_left();
        self.next += 1;
        let path = self.dir.join(self.next.to_string());
        fs::create_dir(&path).map_err(refused("make", &path))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(descriptor) => Ok(CloneGroup {
                path,
                descriptor,
                left: Arc::clone(&self.left),
            }),
            Err(errno) => {
                let _ = fs::remove_dir(&path);
                Err(refused("open", &path)(errno.into()))
            }
        }
    }

    /// Has clones' cgroups count memory and processes.
    fn enable_controllers(&mut self) -> Result<(), String> {
        let offered = words(&self.above.join("cgroup.controllers"));
        let wanted: Vec<&'static str> = CONTROLLERS
            .into_iter()
            .filter(|name| offered.iter().any(|offer| offer == name))
            .collect();
        if wanted.is_empty() {
            return Err("the memory controller is not in the hierarchy of version 2".to_owned());
        }
        let present = words(&self.above.join("cgroup.subtree_control"));
        let missing: Vec<&'static str> = wanted
            .iter()
            .copied()
            .filter(|name| !present.iter().any(|known| known == name))
            .collect();
        if !missing.is_empty() {
            self.enable_above(&missing)?;
            self.enabled_above = missing;
        }
        control(&self.dir, "+", &wanted).map_err(|error| {
            format!(
                "controllers cannot be enabled in {}: {error}",
                self.dir.display()
            )
        })?;
        if wanted.contains(&"memory") {
            Ok(())
        } else {
            Err("the memory controller is not in the hierarchy of version 2".to_owned())
        }
    }

    /// Enables controllers for the cgroups below our own, which then may hold no process itself.
    fn enable_above(&mut self, names: &[&'static str]) -> Result<(), String> {
        let failed = |error: io::Error, above: &Path| {
            format!(
                "controllers cannot be enabled in {}, where other processes are too: {error} (start it alone, \
                 with systemd-run --user --scope -p Delegate=yes)",
                above.display()
            )
        };
        let error = match control(&self.above, "+", names) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => error,
            Err(error) => return Err(failed(error, &self.above)),
        };
        let own = self.dir.join(SUPERVISOR);
        if fs::create_dir(&own).and_then(|()| enter(&own)).is_err() {
            return Err(failed(error, &self.above));
        }
        self.has_moved = true;
        control(&self.above, "+", names).map_err(|error| failed(error, &self.above))
    }

    fn retry_left(&self) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|path| !is_gone(&fs::remove_dir(path)));
    }
}

impl Drop for CloneGroups {
    fn drop(&mut self) {
        if !self.enabled_above.is_empty() {
            let _ = control(&self.dir, "-", &CONTROLLERS);
            let _ = control(&self.above, "-", &self.enabled_above);
        }
        if self.has_moved
            && let Err(error) = enter(&self.above)
        {
            // What is removed is emptied first, by force.
            tracing::warn!(%error, "this process stays in its own cgroup, which the next supervisor removes");
            return;
        }
        if let Err(error) = remove_tree(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "a cgroup cannot be removed; the next supervisor will");
        }
    }
}

/// The cgroup of one clone; dropping it removes it, after its process has ended.
#[derive(Debug)]
pub struct CloneGroup {
    path: PathBuf,
    descriptor: OwnedFd,
    left: Arc<Mutex<Vec<PathBuf>>>,
}

impl CloneGroup {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, open: what a process is started into.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for CloneGroup {
    fn drop(&mut self) {
        if !is_gone(&fs::remove_dir(&self.path)) {
            // A thread of the kernel's is still on its way out.
            let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
            left.push(self.path.clone());
        }
    }
}

fn is_gone(removed: &io::Result<()>) -> bool {
    match removed {
        Ok(()) => true,
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

fn words(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Enables (`+`) or disables (`-`) controllers for the cgroups below `dir`.
fn control(dir: &Path, sign: &str, names: &[&str]) -> io::Result<()> {
    let words: Vec<String> = names.iter().map(|name| format!("{sign}{name}")).collect();
    fs::write(dir.join("cgroup.subtree_control"), words.join(" "))
}

/// Moves this process.
fn enter(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("cgroup.procs"), std::process::id().to_string())
}

/// Directories of supervisors that no longer live.
fn abandoned(above: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(above) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
            let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
            pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        })
        .map(|entry| entry.path())
        .collect()
}

/// Removes a supervisor's directory and what is in it. Processes that are left in it are ended: they
/// are clones without a supervisor. An error when there are some that this process cannot see: then
/// the supervisor may well live, in another namespace of processes.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let children: Vec<PathBuf> = fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    let all = || children.iter().map(PathBuf::as_path).chain([dir]);
    if all().any(|dir| {
        words(&dir.join("cgroup.procs"))
            .iter()
            .any(|pid| pid == "0")
    }) {
        return Err(io::Error::other("it has processes of another namespace"));
    }
    let mut tries = 0;
    loop {
        let failed = all().map(fs::remove_dir).find(|removed| !is_gone(removed));
        let Some(Err(error)) = failed else {
            return Ok(());
        };
        if tries == REMOVE_TRIES {
            return Err(error);
        }
        if tries == 0 {
            // Not there before Linux 5.14: then they must end by themselves.
            let _ = fs::write(dir.join("cgroup.kill"), "1");
        }
        tries += 1;
        std::thread::sleep(REMOVE_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::process::Command;

    /// A cgroup to test in; `None` where none can be made.
    fn playground(name: &str) -> Option<PathBuf> {
        let above = Membership::of_self().unified?.dir;
        let dir = above.join(format!("test-{name}-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        Some(dir)
    }

    #[test]
    fn groups_are_made_and_removed() {
        let Some(dir) = playground("made") else {
            return;
        };
        let mut groups = CloneGroups::below(&dir).unwrap();
        let (one, two) = (groups.create().unwrap(), groups.create().unwrap());
        assert_ne!(one.path(), two.path());
        assert!(one.path().join("cgroup.procs").exists());
        let gone = one.path().to_owned();
        drop(one);
        assert!(!gone.exists());
        if let Err(why) = groups.accounting() {
            assert!(why.contains("controller"), "{why}");
        }
        drop((groups, two));
        fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn a_process_begins_in_its_group_and_a_killed_supervisors_are_removed() {
        let Some(dir) = playground("left") else {
            return;
        };
        // As a supervisor would leave it whose number is no longer in use.
        let mut gone = Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        let abandoned = dir.join(format!("{PREFIX}{}", gone.id()));
        fs::create_dir(&abandoned).unwrap();
        let child = abandoned.join("7");
        fs::create_dir(&child).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let descriptor = rustix::fs::open(&child, flags, Mode::empty()).unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        let (pid, _pidfd) = crate::sys::spawn::spawn_into(
            descriptor.as_fd(),
            Path::new("/bin/sleep"),
            "1000",
            null.as_fd(),
            null.as_fd(),
        )
        .unwrap();
        let raw = pid.as_raw_nonzero().to_string();
        assert_eq!(words(&child.join("cgroup.procs")), [raw]);
        // One that lives is left alone, and so is what is not ours.
        let living = dir.join(format!("{PREFIX}1"));
        let foreign = dir.join("pando-x");
        fs::create_dir(&living).unwrap();
        fs::create_dir(&foreign).unwrap();
        // The process is a child of this test, so somebody must take its exit status.
        let reaper = std::thread::spawn(move || {
            rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())
        });
        drop(CloneGroups::below(&dir).unwrap());
        let (_, status) = reaper.join().unwrap().unwrap().unwrap();
        assert_eq!(status.terminating_signal(), Some(9));
        assert!(!abandoned.exists());
        assert!(living.exists() && foreign.exists());
        fs::remove_dir(living).unwrap();
        fs::remove_dir(foreign).unwrap();
        fs::remove_dir(&dir).unwrap();
    }
}
