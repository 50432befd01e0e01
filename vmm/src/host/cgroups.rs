#![forbid(unsafe_code)]
//! Which cgroups this process is in, and what they allow.

use std::fs;
use std::path::{Path, PathBuf};

/// A cgroup of one hierarchy, and where that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The directory of the cgroup.
    pub dir: PathBuf,
    /// The directory of the topmost cgroup that can be seen from here.
    pub mount: PathBuf,
}

impl Place {
    /// The cgroup and those above it, innermost first.
    pub fn up(&self) -> impl Iterator<Item = &Path> {
        self.dir
            .ancestors()
            .take_while(|dir| dir.starts_with(&self.mount))
    }
}

/// The cgroups of this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// In the one hierarchy of version 2.
    pub unified: Option<Place>,
    /// In the hierarchy of version 1 that has the controller `pids`.
    pub pids: Option<Place>,
}

impl Membership {
    /// Asks the kernel.
    pub fn of_self() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self::parse(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
    }

    fn parse(cgroup: &str, mounts: &str) -> Self {
        let path_of = |is_it: &dyn Fn(&str, &str) -> bool| {
            cgroup.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':');
                let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
                is_it(number, controllers).then(|| path.to_owned())
            })
        };
        let unified = path_of(&|number, controllers| number == "0" && controllers.is_empty())
            .and_then(|path| place(mounts, &path, &|kind, _| kind == "cgroup2"));
        let has_pids = |list: &str| list.split(',').any(|name| name == "pids");
        let pids = path_of(&|_, controllers| has_pids(controllers)).and_then(|path| {
            place(mounts, &path, &|kind, options| {
                kind == "cgroup" && has_pids(options)
            })
        });
        Self { unified, pids }
    }

    /// Every limit of processes on the way up: the cgroup's directory, the limit, how many there are.
    pub fn process_limits(&self) -> Vec<(PathBuf, u64, u64)> {
        let places = [&self.unified, &self.pids].into_iter().flatten();
        places
            .flat_map(Place::up)
            .filter_map(|dir| {
                let limit = number(&dir.join("pids.max"))?;
                let current = number(&dir.join("pids.current"))?;
                Some((dir.to_path_buf(), limit, current))
            })
            .collect()
    }

    /// The cgroup of version 2 whose limit of memory is nearest, with what it has left. Pages of files
    /// that nobody uses count as left.
    pub fn memory_left(&self) -> Option<(PathBuf, u64)> {
        self.unified
            .iter()
            .flat_map(Place::up)
            .filter_map(|dir| {
                let limit = number(&dir.join("memory.max"))?;
                let current = number(&dir.join("memory.current"))?;
                let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
                let reclaimable = stat
                    .lines()
                    .find_map(|line| line.strip_prefix("inactive_file "))
                    .and_then(|bytes| bytes.trim().parse::<u64>().ok())
                    .unwrap_or(0);
                let used = current.saturating_sub(reclaimable);
                Some((dir.to_path_buf(), limit.saturating_sub(used)))
            })
            .min_by_key(|(_, left)| *left)
    }
}

/// The number in a file; `None` for none, and for `max`.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Where a cgroup's directory is, going by the mounts.
fn place(mounts: &str, path: &str, is_it: &dyn Fn(&str, &str) -> bool) -> Option<Place> {
    mounts.lines().find_map(|line| {
        let (fields, more) = line.split_once(" - ")?;
        let mut more = more.split(' ');
        let (kind, options) = (more.next()?, more.nth(1)?);
        if !is_it(kind, options) {
            return None;
        }
        let mut fields = fields.split(' ').skip(3);
        let (root, mount) = (fields.next()?, fields.next()?);
        // In a container the mount shows a part of the hierarchy.
        let below = path.strip_prefix(root.trim_end_matches('/'))?;
        let mount = PathBuf::from(mount);
        let dir = mount.join(below.trim_start_matches('/'));
        Some(Place { dir, mount })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:22 / /proc rw - proc proc rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
31 24 0:27 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
";

    #[test]
    fn cgroups_are_found_by_their_mounts() {
        let membership = Membership::parse("8:pids:/a\n0::/user.slice/x.scope\n", MOUNTS);
        let unified = membership.unified.unwrap();
        assert_eq!(unified.dir, Path::new("/sys/fs/cgroup/user.slice/x.scope"));
        let up: Vec<_> = unified.up().map(Path::to_path_buf).collect();
        let expected = [
            "/sys/fs/cgroup/user.slice/x.scope",
            "/sys/fs/cgroup/user.slice",
            "/sys/fs/cgroup",
        ];
        assert_eq!(up, expected.map(PathBuf::from));
        assert_eq!(
            membership.pids.unwrap().dir,
            Path::new("/sys/fs/cgroup/pids/a")
        );
    }

    #[test]
    fn a_container_sees_a_part() {
        let mounts = "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let membership = Membership::parse("0::/docker/abc/in\n", mounts);
        assert_eq!(
            membership.unified.unwrap().dir,
            Path::new("/sys/fs/cgroup/in")
        );
        assert_eq!(
            Membership::parse("0::/else\n", mounts),
            Membership::default()
        );
        assert_eq!(
            Membership::parse("garbage\n", "more\n - \n"),
            Membership::default()
        );
    }

    #[test]
    fn this_process_can_be_asked() {
        let membership = Membership::of_self();
        for (dir, _, _) in membership.process_limits() {
            assert!(dir.is_dir());
        }
        let _ = membership.memory_left();
    }
}
