//! The parsers of kernel buffers: what they must understand, and that no bytes make them panic.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use proptest::prelude::*;

use crate::sys::Error;
use crate::sys::dir::{self, Entries};
use crate::sys::fanotify::{Events, Mask};
use crate::sys::handle::{Handle, HandleRef};
use crate::sys::mount::parse_mountinfo;
use crate::sys::superblock;

/// An information record.
fn record(kind: u8, handle: Option<(i32, &[u8])>, tail: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    if let Some((handle_kind, bytes)) = handle {
        body.extend([7; 8]); // the filesystem's id
        body.extend(u32::try_from(bytes.len()).unwrap().to_ne_bytes());
        body.extend(handle_kind.to_ne_bytes());
        body.extend(bytes);
    }
    body.extend(tail);
    while body.len() % 4 != 0 {
        body.push(0);
    }
    let mut out = vec![kind, 0];
    out.extend(u16::try_from(body.len() + 4).unwrap().to_ne_bytes());
    out.extend(body);
    out
}

fn event(mask: u64, pid: i32, records: &[Vec<u8>]) -> Vec<u8> {
    let body = records.concat();
    let mut out = Vec::new();
    out.extend(u32::try_from(24 + body.len()).unwrap().to_ne_bytes());
    out.extend([3, 0]);
    out.extend(24_u16.to_ne_bytes());
    out.extend(mask.to_ne_bytes());
    out.extend((-1_i32).to_ne_bytes());
    out.extend(pid.to_ne_bytes());
    out.extend(body);
    out
}

fn first_error(buf: &[u8]) -> Error {
    Events::parse(buf)
        .find_map(Result::err)
        .expect("an error in the buffer")
}

#[test]
fn unknown_records_and_bits_are_kept_apart() {
    let unknown = record(200, None, b"anything at all");
    let fid = record(1, Some((0x81, b"object")), b"");
    let name = record(2, Some((0x81, b"directory")), b"na\xffme\0");
    let mut buf = event(
        0x8000_0000_0000_0100,
        7,
        &[unknown.clone(), name, unknown, fid],
    );
    buf.extend(event(Mask::OVERFLOW.bits(), 0, &[]));
    let events: Vec<_> = Events::parse(&buf).map(Result::unwrap).collect();
    assert_eq!(events.len(), 2);
    let first = events[0];
    assert_eq!(first.mask.bits(), 0x8000_0000_0000_0100);
    assert!(first.mask.contains(Mask::CREATE) && !first.mask.overflow());
    assert_eq!(first.pid, 7);
    assert_eq!(first.target, HandleRef::new(0x81, b"object"));
    let entry = first.entry.unwrap();
    assert_eq!(entry.dir, HandleRef::new(0x81, b"directory").unwrap());
    assert_eq!(entry.name, Some(OsStr::from_bytes(b"na\xffme")));
    assert!(events[1].mask.overflow());
    assert_eq!(events[1].target, None);
}

#[test]
fn a_longer_metadata_header_is_skipped() {
    let fid = record(1, Some((1, b"12345678")), b"");
    let mut buf = event(2, 1, &[vec![0xee; 8], fid]);
    buf[6..8].copy_from_slice(&32_u16.to_ne_bytes());
    let only = Events::parse(&buf).next().unwrap().unwrap();
    assert_eq!(only.target, HandleRef::new(1, b"12345678"));
}

#[test]
fn dot_and_empty_names_are_the_directory_itself() {
    for name in [&b".\0"[..], b"\0"] {
        let buf = event(4, 1, &[record(2, Some((1, b"12345678")), name)]);
        let only = Events::parse(&buf).next().unwrap().unwrap();
        assert_eq!(only.entry.unwrap().name, None);
    }
    let buf = event(4, 1, &[record(3, Some((1, b"12345678")), b"")]);
    let only = Events::parse(&buf).next().unwrap().unwrap();
    assert_eq!(only.entry.unwrap().name, None);
    // An empty handle is none.
    let buf = event(4, 1, &[record(1, Some((0xff, b"")), b"")]);
    assert_eq!(Events::parse(&buf).next().unwrap().unwrap().target, None);
}

#[test]
fn malformed_events_name_the_place() {
    let good = event(0x100, 1, &[record(2, Some((1, b"12345678")), b"name\0")]);
    for cut in 1..good.len() {
        assert!(matches!(first_error(&good[..cut]), Error::Malformed { .. }));
    }
    let mut version = good.clone();
    version[4] = 4;
    assert!(first_error(&version).to_string().contains("version"));
    let mut second = good.clone();
    second.extend([0; 24]);
    let mut events = Events::parse(&second);
    assert!(events.next().unwrap().is_ok());
    match events.next().unwrap().unwrap_err() {
        Error::Malformed { offset, .. } => assert!(offset >= good.len()),
        other => panic!("{other}"),
    }
    assert!(events.next().is_none(), "it ends after an error");
    for bad in [
        record(2, Some((1, b"12345678")), b"no end.."),
        record(2, Some((1, b"12345678")), b"a/b\0"),
        record(2, Some((1, b"12345678")), &[b'x'; 300]),
        record(1, Some((1, &[1; 129])), b""),
        record(1, None, b"1234"),
        vec![1, 0, 0, 0],
        vec![1, 0, 3, 0],
        vec![1, 0, 255, 255],
    ] {
        let message = first_error(&event(0x100, 1, &[bad])).to_string();
        assert!(message.contains("at byte"), "{message}");
    }
    let mut huge = good;
    huge[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert!(matches!(first_error(&huge), Error::Malformed { .. }));
}

fn any_event() -> impl Strategy<Value = Vec<u8>> {
    let handle = (any::<i32>(), prop::collection::vec(any::<u8>(), 0..140));
    let one = (
        any::<u8>(),
        prop::option::of(handle),
        prop::collection::vec(any::<u8>(), 0..300),
    )
        .prop_map(|(kind, handle, tail)| {
            let handle = handle.as_ref().map(|(kind, bytes)| (*kind, &bytes[..]));
            record(kind % 14, handle, &tail)
        });
    (any::<u64>(), any::<i32>(), prop::collection::vec(one, 0..4))
        .prop_map(|(mask, pid, records)| event(mask, pid, &records))
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Events::parse(&bytes).count();
        let _ = Entries::parse(&bytes).count();
        let _ = parse_mountinfo(&bytes);
        let _ = superblock::parse(&bytes);
        let _ = Handle::from_bytes(&bytes);
    }

    #[test]
    fn damaged_events_parse_or_fail(
        events in prop::collection::vec(any_event(), 1..4),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut buf = events.concat();
        for (index, value) in hits {
            let at = index.index(buf.len());
            buf[at] = value;
        }
        let _ = Events::parse(&buf).count();
        let _ = Events::parse(&buf[..cut.index(buf.len())]).count();
    }

    #[test]
    fn written_events_are_read(
        mask in any::<u64>(), pid in any::<i32>(), kind in any::<i32>(),
        target in prop::collection::vec(any::<u8>(), 1..=128),
        dir in prop::collection::vec(any::<u8>(), 1..=128),
        name in prop::collection::vec(1_u8.., 1..=255),
    ) {
        let name: Vec<u8> = name.into_iter().map(|b| if b == b'/' { b'_' } else { b }).collect();
        prop_assume!(name != b".");
        let mut ended = name.clone();
        ended.push(0);
        let buf = event(mask, pid, &[
            record(10, Some((kind, &dir)), &ended),
            record(12, Some((kind, &target)), &ended),
            record(1, Some((kind, &target)), b""),
        ]);
        let only = Events::parse(&buf).next().unwrap().unwrap();
        prop_assert_eq!(only.mask.bits(), mask);
        prop_assert_eq!(only.pid, pid);
        prop_assert_eq!(only.target, HandleRef::new(kind, &target));
        let (old, new) = (only.old_entry.unwrap(), only.new_entry.unwrap());
        prop_assert_eq!(old.dir.bytes(), &dir[..]);
        prop_assert_eq!(new.dir.bytes(), &target[..]);
        prop_assert_eq!(old.name.unwrap().as_bytes(), &name[..]);
        let handle = old.dir.to_handle();
        prop_assert_eq!(&Handle::from_bytes(&handle.to_bytes()).unwrap(), &handle);
        prop_assert_eq!(handle.as_ref(), old.dir);
    }
}

#[test]
fn malformed_directory_lists_are_errors() {
    let mut good = vec![0; 24];
    good[..8].copy_from_slice(&9_u64.to_ne_bytes());
    good[16..18].copy_from_slice(&24_u16.to_ne_bytes());
    good[18] = libc::DT_REG;
    good[19..22].copy_from_slice(b"abc");
    let entry = Entries::parse(&good).next().unwrap().unwrap();
    assert_eq!((entry.name, entry.ino), (OsStr::new("abc"), 9));
    for (at, value) in [(16, 0), (16, 19), (16, 25), (17, 1), (19, 0), (20, b'/')] {
        let mut bad = good.clone();
        bad[at] = value;
        assert!(
            Entries::parse(&bad).next().unwrap().is_err(),
            "{at} {value}"
        );
    }
    let mut unended = good.clone();
    unended[19..].fill(b'x');
    assert!(Entries::parse(&unended).next().unwrap().is_err());
    assert_eq!(dir::NAME_MAX, 255);
}

#[test]
fn mountinfo_escapes_and_optional_fields() {
    let text = b"36 35 98:0 /mnt1 /mnt\\0402\\134\\xyz rw,noatime master:1 shared:7 - ext4 /dev/root rw,errors=continue\n\
                 37 35 0:9 / / ro - btrfs none rw\n";
    let all = parse_mountinfo(text).unwrap();
    assert_eq!(all[0].mount_point.as_os_str(), "/mnt 2\\\\xyz");
    assert_eq!((all[0].id, all[0].dev), (36, (98, 0)));
    assert_eq!(all[0].fs_type, "ext4");
    assert!(!all[0].read_only() && all[1].read_only());
    assert!(parse_mountinfo(b"36 35 98:0 /mnt1 /mnt2 rw\n").is_err());
}
