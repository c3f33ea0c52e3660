//! Events of real changes: the right names and handles, on every filesystem.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::sys::fanotify::{BUFFER_BYTES_MIN, Group, Mask};
use crate::sys::handle::{Handle, HandleRef, handle_at};
use crate::sys::testfs::{KINDS, TestFs, open_dir};

/// An event that owns what it names.
#[derive(Debug, Clone)]
struct Seen {
    mask: Mask,
    pid: i32,
    target: Option<Handle>,
    object: Option<Handle>,
    entry: Option<(Handle, Option<Vec<u8>>)>,
    old: Option<(Handle, Option<Vec<u8>>)>,
    new: Option<(Handle, Option<Vec<u8>>)>,
}

fn drain(group: &Group) -> Vec<Seen> {
    let mut buf = vec![0; BUFFER_BYTES_MIN];
    let mut all = Vec::new();
    while let Some(events) = group.read(&mut buf).unwrap() {
        for event in events {
            let event = event.unwrap();
            let own = |entry: Option<crate::sys::fanotify::EntryRef<'_>>| {
                entry.map(|e| (e.dir.to_handle(), e.name.map(|n| n.as_bytes().to_vec())))
            };
            all.push(Seen {
                mask: event.mask,
                pid: event.pid,
                target: event.target.map(HandleRef::to_handle),
                object: event.object().map(HandleRef::to_handle),
                entry: own(event.entry),
                old: own(event.old_entry),
                new: own(event.new_entry),
            });
        }
    }
    all
}

fn handle(dir: &Path, name: &[u8]) -> Handle {
    let dir = open_dir(dir);
    handle_at(dir.as_fd(), OsStr::from_bytes(name))
        .unwrap()
        .unwrap()
}

fn own(path: &Path) -> Handle {
    handle(path.parent().unwrap(), path.file_name().unwrap().as_bytes())
}

/// The one event with all bits of `mask` (and for that name, where one is given).
fn one(seen: &[Seen], mask: Mask, name: &[u8]) -> Seen {
    let named = |s: &Seen| {
        [&s.entry, &s.old]
            .into_iter()
            .flatten()
            .any(|(_, n)| n.as_deref() == Some(name))
    };
    let found: Vec<_> = seen
        .iter()
        .filter(|s| s.mask.contains(mask) && named(s))
        .collect();
    assert_eq!(
        found.len(),
        1,
        "{mask:?} of {}: {seen:#?}",
        name.escape_ascii()
    );
    found[0].clone()
}

fn watched(kind: &'static str) -> (TestFs, Group) {
    let fs = TestFs::new(kind);
    let group = Group::new_notification().unwrap();
    group.mark_filesystem(fs.private().root()).unwrap();
    (fs, group)
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags).unwrap();
}

#[test]
fn create_write_and_attributes() {
    for kind in KINDS {
        let (fs, group) = watched(kind);
        let dir = fs.at("dir");
        fs::create_dir(&dir).unwrap();
        let seen = drain(&group);
        let made = one(&seen, Mask::CREATE.union(Mask::ONDIR), b"dir");
        assert_eq!(made.target, Some(own(&dir)), "{kind}");
        assert_eq!(made.entry.unwrap().0, handle(&dir, b".."), "{kind}");
        assert_eq!(u32::try_from(made.pid).unwrap(), std::process::id());

        let long = [b'\xc4'; 255];
        for name in [&b"file"[..], b"not \xff\xfe UTF-8\n", &long] {
            let path = dir.join(OsStr::from_bytes(name));
            let mut file = File::create(&path).unwrap();
            let seen = drain(&group);
            let made = one(&seen, Mask::CREATE, name);
            assert_eq!(made.target, Some(own(&path)), "{kind}");
            assert_eq!(made.entry.unwrap().0, own(&dir), "{kind}");
            file.write_all(b"content").unwrap();
            assert_eq!(
                one(&drain(&group), Mask::MODIFY, name).target,
                Some(own(&path))
            );
            drop(file);
            assert_eq!(
                one(&drain(&group), Mask::CLOSE_WRITE, name).target,
                Some(own(&path))
            );
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
            fs::set_permissions(&path, mode).unwrap();
            assert_eq!(
                one(&drain(&group), Mask::ATTRIB, name).target,
                Some(own(&path))
            );
        }
        symlink("anywhere", dir.join("link")).unwrap();
        let made = one(&drain(&group), Mask::CREATE, b"link");
        assert_eq!(made.target, Some(handle(&dir, b"link")));

        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o750);
        fs::set_permissions(&dir, mode).unwrap();
        let seen = drain(&group);
        let changed = seen
            .iter()
            .find(|s| s.mask.contains(Mask::ATTRIB.union(Mask::ONDIR)));
        assert_eq!(changed.unwrap().object, Some(own(&dir)), "{kind} {seen:?}");
    }
}

#[test]
fn renames_name_both_places() {
    for kind in KINDS {
        let (fs, group) = watched(kind);
        let (a, b) = (fs.at("a"), fs.at("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        fs::write(a.join("f"), "one").unwrap();
        fs::write(b.join("victim"), "two").unwrap();
        fs::write(b.join("g"), "three").unwrap();
        let (file, victim) = (own(&a.join("f")), own(&b.join("victim")));
        drain(&group);

        fs::rename(a.join("f"), b.join("victim")).unwrap();
        let seen = drain(&group);
        let moved = one(&seen, Mask::RENAME, b"f");
        assert_eq!(moved.target, Some(file.clone()), "{kind}");
        assert_eq!(moved.old, Some((own(&a), Some(b"f".to_vec()))), "{kind}");
        assert_eq!(
            moved.new,
            Some((own(&b), Some(b"victim".to_vec()))),
            "{kind}"
        );
        let died = seen.iter().find(|s| s.mask.intersects(Mask::DELETE_SELF));
        assert_eq!(died.unwrap().target, Some(victim), "{kind} {seen:?}");

        let g = own(&b.join("g"));
        rename_with(
            &b.join("victim"),
            &b.join("g"),
            RenameFlags::RENAME_EXCHANGE,
        );
        let seen = drain(&group);
        let renames: Vec<_> = seen
            .iter()
            .filter(|s| s.mask.intersects(Mask::RENAME))
            .collect();
        assert_eq!(renames.len(), 2, "{kind} {seen:?}");
        for (from, to, target) in [("victim", "g", &file), ("g", "victim", &g)] {
            let found = renames.iter().any(|s| {
                s.target.as_ref() == Some(target)
                    && s.old == Some((own(&b), Some(from.into())))
                    && s.new == Some((own(&b), Some(to.into())))
            });
            assert!(found, "{kind} {from} to {to}: {seen:?}");
        }

        fs::rename(&a, b.join("moved")).unwrap();
        let moved = one(&drain(&group), Mask::RENAME.union(Mask::ONDIR), b"a");
        assert_eq!(moved.target, Some(own(&b.join("moved"))), "{kind}");
    }
}

#[test]
fn links_and_deletions() {
    for kind in KINDS {
        let (fs, group) = watched(kind);
        let (first, second) = (fs.at("first"), fs.at("second"));
        fs::write(&first, "content").unwrap();
        drain(&group);
        let file = own(&first);
        fs::hard_link(&first, &second).unwrap();
        assert_eq!(
            one(&drain(&group), Mask::CREATE, b"second").target,
            Some(file.clone())
        );
        fs::remove_file(&first).unwrap();
        let seen = drain(&group);
        assert_eq!(
            one(&seen, Mask::DELETE, b"first").target,
            Some(file.clone()),
            "{kind}"
        );
        assert!(
            !seen.iter().any(|s| s.mask.intersects(Mask::DELETE_SELF)),
            "{kind}"
        );
        fs::remove_file(&second).unwrap();
        let seen = drain(&group);
        one(&seen, Mask::DELETE, b"second");
        let died = seen.iter().find(|s| s.mask.intersects(Mask::DELETE_SELF));
        assert_eq!(died.unwrap().target, Some(file), "{kind} {seen:?}");
        let dir = fs.at("dir");
        fs::create_dir(&dir).unwrap();
        let handle = own(&dir);
        drain(&group);
        fs::remove_dir(&dir).unwrap();
        let seen = drain(&group);
        let gone = one(&seen, Mask::DELETE.union(Mask::ONDIR), b"dir");
        assert_eq!(gone.target, Some(handle), "{kind}");
    }
}

#[test]
fn many_events_through_a_small_buffer_are_all_counted() {
    let (fs, group) = watched("ext4");
    let mut buf = vec![0; BUFFER_BYTES_MIN];
    assert!(group.read(&mut buf).unwrap().is_none());
    assert_eq!(group.pending_events().unwrap(), 0);
    for i in 0..2000 {
        fs::create_dir(fs.at(i.to_string())).unwrap();
    }
    assert_eq!(group.pending_events().unwrap(), 2000);
    assert_eq!(drain(&group).len(), 2000);
    assert_eq!(group.pending_events().unwrap(), 0);
}

#[test]
fn what_cannot_be_watched_says_why() {
    let group = Group::new_notification().unwrap();
    let proc = open_dir(Path::new("/proc"));
    let message = group.mark_filesystem(proc.as_fd()).unwrap_err().to_string();
    assert!(
        message.contains("/proc") && message.contains("use ext4"),
        "{message}"
    );
    let fs = TestFs::new("btrfs");
    let sub = fs.at("sub");
    crate::sys::testfs::run("btrfs", &["subvolume", "create", sub.to_str().unwrap()]);
    let message = group
        .mark_filesystem(open_dir(&sub).as_fd())
        .unwrap_err()
        .to_string();
    assert!(message.contains("subvolid=5"), "{message}");
}
