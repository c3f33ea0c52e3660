//! What differs between two trees, in words.

use std::collections::BTreeMap;

use super::{BLOCK, Difference, Entry, Tree};

/// All differences, in the order of paths.
pub fn differences(expected: &Tree, found: &Tree) -> Vec<Difference> {
    let mut all = Vec::new();
    for (path, left) in &expected.entries {
        match found.entries.get(path) {
            Some(right) => of_entries(path, left, right, &mut all),
            None => all.push(difference(path, format!("{}, is missing", kind(left.kind)))),
        }
    }
    for (path, right) in &found.entries {
        if !expected.entries.contains_key(path) {
            all.push(difference(
                path,
                format!("{}, should not be there", kind(right.kind)),
            ));
        }
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

fn difference(path: &[u8], what: String) -> Difference {
    let path = if path.is_empty() {
        ".".to_owned()
    } else {
        path.escape_ascii().to_string()
    };
    Difference { path, what }
}

fn kind(bits: u32) -> &'static str {
    match bits {
        libc::S_IFREG => "file",
        libc::S_IFDIR => "directory",
        libc::S_IFLNK => "symlink",
        libc::S_IFIFO => "fifo",
        libc::S_IFSOCK => "socket",
        libc::S_IFCHR => "character device",
        libc::S_IFBLK => "block device",
        _ => "thing of unknown type",
    }
}

fn of_entries(path: &[u8], left: &Entry, right: &Entry, all: &mut Vec<Difference>) {
    if left.kind != right.kind {
        let what = format!("type {} / {}", kind(left.kind), kind(right.kind));
        all.push(difference(path, what));
        return;
    }
    let mut note = |what: String| all.push(difference(path, what));
    if left.mode != right.mode {
        note(format!("mode {:04o} / {:04o}", left.mode, right.mode));
    }
    if (left.uid, left.gid) != (right.uid, right.gid) {
        note(format!(
            "owner {}:{} / {}:{}",
            left.uid, left.gid, right.uid, right.gid
        ));
    }
    if left.mtime != right.mtime {
        note(format!(
            "mtime {}.{:09} / {}.{:09}",
            left.mtime.0, left.mtime.1, right.mtime.0, right.mtime.1
        ));
    }
    if left.flags != right.flags {
        note(format!(
            "chattr flags {:#x} / {:#x}",
            left.flags, right.flags
        ));
    }
    if left.target != right.target {
        note(format!(
            "link target {} / {}",
            left.target.escape_ascii(),
            right.target.escape_ascii()
        ));
    }
    if left.rdev != right.rdev {
        note(format!(
            "device number {:#x} / {:#x}",
            left.rdev, right.rdev
        ));
    }
    if left.group != right.group {
        note(format!(
            "hard link of {} / {}",
            left.group.escape_ascii(),
            right.group.escape_ascii()
        ));
    }
    of_xattrs(left, right, &mut note);
    of_content(left, right, &mut note);
}

fn of_xattrs(left: &Entry, right: &Entry, note: &mut impl FnMut(String)) {
    let expected: BTreeMap<_, _> = left.xattrs.iter().cloned().collect();
    let found: BTreeMap<_, _> = right.xattrs.iter().cloned().collect();
    for (name, value) in &expected {
        let name_text = name.escape_ascii();
        match found.get(name) {
            None => note(format!("xattr {name_text} is missing")),
            Some(other) if other != value => note(format!(
                "xattr {name_text}: {} / {}",
                short(value),
                short(other)
            )),
            Some(_) => {}
        }
    }
    for name in found.keys().filter(|name| !expected.contains_key(*name)) {
        note(format!("xattr {} should not be there", name.escape_ascii()));
    }
}

fn short(value: &[u8]) -> String {
    let cut = &value[..value.len().min(32)];
    format!("{} bytes \"{}\"", value.len(), cut.escape_ascii())
}

fn of_content(left: &Entry, right: &Entry, note: &mut impl FnMut(String)) {
    if left.size != right.size {
        note(format!("size {} / {}", left.size, right.size));
    }
    if left.unreadable != right.unreadable {
        note(format!(
            "unreadable: {:?} / {:?}",
            left.unreadable, right.unreadable
        ));
    }
    let expected: BTreeMap<_, _> = left.blocks.iter().copied().collect();
    let found: BTreeMap<_, _> = right.blocks.iter().copied().collect();
    let mut differing: Vec<u64> = expected
        .iter()
        .filter(|(number, hash)| found.get(*number) != Some(hash))
        .map(|(number, _)| *number)
        .chain(found.keys().copied().filter(|n| !expected.contains_key(n)))
        .collect();
    differing.sort_unstable();
    if let Some(first) = differing.first() {
        note(format!(
            "bytes differ in {} blocks of 64 KiB, the first at {} ({} / {})",
            differing.len(),
            first * BLOCK,
            block(expected.get(first)),
            block(found.get(first))
        ));
    }
    if left.data != right.data {
        note(format!(
            "data (not holes) at {} / {}",
            ranges(&left.data, &right.data),
            ranges(&right.data, &left.data)
        ));
    }
}

fn block(hash: Option<&[u8; 32]>) -> String {
    hash.map_or_else(
        || "zeros".to_owned(),
        |hash| blake3::Hash::from_bytes(*hash).to_hex()[..8].to_owned(),
    )
}

/// The first ranges that the other side has not.
fn ranges(mine: &[(u64, u64)], other: &[(u64, u64)]) -> String {
    let only: Vec<String> = mine
        .iter()
        .filter(|range| !other.contains(range))
        .take(4)
        .map(|(start, end)| format!("[{start}, {end})"))
        .collect();
    if only.is_empty() {
        "-".to_owned()
    } else {
        format!("{} of {}", only.join(" "), mine.len())
    }
}
