//! Whether somebody guards the watched filesystem, as the kernel tells it: who has its permission group open,
//! and whether anybody could read stubs unasked.

use std::fs;
use std::path::Path;

/// `FAN_OPEN_PERM`.
const OPEN_PERM: u64 = 0x1_0000;
/// `FAN_CLASS_PRE_CONTENT`.
const PRE_CONTENT: u64 = 0x8;

/// The mounts at `place`, each with its filesystem's number as in fdinfo.
fn mounts_at(place: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
    let number = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let (major, minor) = fields[2].split_once(':')?;
        let (major, minor) = (major.parse::<u64>().ok()?, minor.parse::<u64>().ok()?);
        (Path::new(fields[4]) == place).then(|| format!("{:x}", major << 20 | minor))
    };
    table.lines().filter_map(number).collect()
}

/// Whether anything is mounted at `place`.
pub fn is_exposed(place: &Path) -> bool {
    !mounts_at(place).is_empty()
}

/// The processes that hold a permission group which asks about files of what is mounted at `place`.
pub fn holders(place: &Path) -> Vec<i32> {
    let devices = mounts_at(place);
    let processes = fs::read_dir("/proc").expect("the processes").flatten();
    let pid = |process: fs::DirEntry| process.file_name().to_str()?.parse().ok();
    let holds = |pid: &i32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut fds = fds.into_iter().flatten().flatten();
        fds.any(|fd| {
            let link = fs::read_link(fd.path()).unwrap_or_default();
            let number = fd.file_name();
            let info = format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy());
            link == Path::new("anon_inode:[fanotify]")
                && asks(&fs::read_to_string(info).unwrap_or_default(), &devices)
        })
    };
    processes.filter_map(pid).filter(holds).collect()
}

/// Whether a group's fdinfo says that it asks before files of one of these filesystems are opened.
fn asks(info: &str, devices: &[String]) -> bool {
    let number = |line: &str, key: &str| {
        let of_key = |word: &str| u64::from_str_radix(word.strip_prefix(key)?, 16).ok();
        line.split_whitespace().find_map(of_key)
    };
    let is_permission = info.lines().any(|line| {
        line.starts_with("fanotify flags:")
            && number(line, "flags:").is_some_and(|flags| flags & PRE_CONTENT != 0)
    });
    is_permission
        && info.lines().any(|line| {
            let ours = |device: &String| line.contains(&format!("sdev:{device} "));
            devices.iter().any(ours)
                && number(line, "mask:").is_some_and(|mask| mask & OPEN_PERM != 0)
        })
}

/// Asserts that nobody can reach the filesystem past a guard: it is not there, or somebody holds the group.
pub fn assert_guarded(place: &Path, context: &str) {
    let exposed = is_exposed(place);
    assert!(
        !exposed || !holders(place).is_empty() || !is_exposed(place),
        "{context}: {} is mounted, and nobody holds the permission group",
        place.display()
    );
}
