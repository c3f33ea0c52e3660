//! Extended attributes and flags.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;

use crate::sys::flags::{self, Flags, LOGGED};
use crate::sys::io::{HOLD, open_at};
use crate::sys::testfs::{KINDS, TestFs, open_dir, run};
use crate::sys::xattr::{Xattr, read_all, read_one};

fn get<'a>(all: &'a [Xattr], name: &str) -> Option<&'a [u8]> {
    all.iter()
        .find(|(n, _)| n == name.as_bytes())
        .map(|(_, v)| &v[..])
}

#[test]
fn every_attribute_of_every_kind_of_inode() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let file = fs.at("file");
        let text = file.to_str().unwrap();
        fs::write(&file, "x").unwrap();
        run("setfacl", &["-m", "u:4242:rw,g:77:r", text]);
        run("setcap", &["cap_net_raw+ep", text]);
        run("setfattr", &["-n", "user.zzz", "-v", "0x00ff00", text]);
        run("setfattr", &["-n", "user.empty", text]);
        run("setfattr", &["-n", "trusted.hsm", "-v", "mark", text]);
        let large = format!("0x{}", "ab".repeat(3000));
        run("setfattr", &["-n", "user.large", "-v", &large, text]);
        let root = open_dir(fs.root());
        let held = open_at(root.as_fd(), "file", HOLD).unwrap().unwrap();
        let all = read_all(File::open(&file).unwrap().as_fd()).unwrap();
        assert_eq!(
            read_all(held.as_fd()).unwrap(),
            all,
            "{kind}: O_PATH sees the same"
        );
        assert!(all.is_sorted());
        let names: Vec<_> = all
            .iter()
            .map(|(name, _)| String::from_utf8_lossy(name))
            .collect();
        assert_eq!(all.len(), 5, "{kind} {names:?}");
        assert_eq!(get(&all, "user.zzz"), Some(&[0, 0xff, 0][..]));
        assert_eq!(get(&all, "user.empty"), Some(&[][..]));
        assert_eq!(get(&all, "user.large"), Some(&[0xab; 3000][..]));
        // Version 2, then entries of 8 bytes: owner, user, group, group, mask, other.
        let acl = get(&all, "system.posix_acl_access").unwrap();
        assert_eq!(
            (&acl[..4], acl.len()),
            (&[2, 0, 0, 0][..], 4 + 6 * 8),
            "{kind}"
        );
        assert!(get(&all, "security.capability").is_some());
        assert_eq!(
            read_one(held.as_fd(), c"trusted.hsm").unwrap().unwrap(),
            b"mark"
        );
        assert_eq!(read_one(held.as_fd(), c"user.absent").unwrap(), None);

        symlink("nowhere", fs.at("link")).unwrap();
        run(
            "setfattr",
            &[
                "-h",
                "-n",
                "trusted.t",
                "-v",
                "v",
                fs.at("link").to_str().unwrap(),
            ],
        );
        run("mkfifo", &[fs.at("fifo").to_str().unwrap()]);
        run(
            "setfattr",
            &[
                "-n",
                "trusted.t",
                "-v",
                "v",
                fs.at("fifo").to_str().unwrap(),
            ],
        );
        for name in ["link", "fifo"] {
            let held = open_at(root.as_fd(), name, HOLD).unwrap().unwrap();
            let all = read_all(held.as_fd()).unwrap();
            assert_eq!(
                all,
                [(b"trusted.t".to_vec(), b"v".to_vec())],
                "{kind} {name}"
            );
        }
        run(
            "setfacl",
            &["-d", "-m", "u:1:rwx", fs.root().to_str().unwrap()],
        );
        let all = read_all(root.as_fd()).unwrap();
        assert!(get(&all, "system.posix_acl_default").is_some(), "{kind}");
    }
}

#[test]
fn many_attributes_outgrow_the_first_buffer() {
    let fs = TestFs::new("xfs");
    let file = fs.at("file");
    fs::write(&file, "x").unwrap();
    let mut restore = format!(
        "# file: {}\n",
        file.to_str().unwrap().trim_start_matches('/')
    );
    for i in 0..300 {
        writeln!(restore, "user.{}{i:03}=\"{i}\"", "n".repeat(100)).unwrap();
    }
    let list = fs.outside().join("list");
    fs::write(&list, restore).unwrap();
    run(
        "sh",
        &[
            "-c",
            &format!("cd / && setfattr --restore={}", list.display()),
        ],
    );
    let all = read_all(File::open(&file).unwrap().as_fd()).unwrap();
    assert_eq!(all.len(), 300);
    assert_eq!(all[299].1, b"299");
}

#[test]
fn flags_are_read_and_written_without_touching_others() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let path = fs.at("file");
        fs::write(&path, "").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(
            flags::read(file.as_fd()).unwrap(),
            Some(Flags::default()),
            "{kind}"
        );
        let wanted = Flags::from_bits(0x40 | 0x80 | 0x10); // d A i
        assert_eq!(wanted.to_string(), "idA");
        flags::write(file.as_fd(), wanted).unwrap();
        assert_eq!(flags::read(file.as_fd()).unwrap(), Some(wanted));
        let listed = run("lsattr", &[path.to_str().unwrap()]);
        for letter in ["i", "d", "A"] {
            assert!(
                listed.split(' ').next().unwrap().contains(letter),
                "{kind} {listed}"
            );
        }
        flags::write(file.as_fd(), Flags::default()).unwrap();
        assert_eq!(flags::read(file.as_fd()).unwrap(), Some(Flags::default()));
        let extents = run("lsattr", &[path.to_str().unwrap()]);
        let extents = extents.split(' ').next().unwrap();
        assert_eq!(
            extents.contains('e'),
            kind == "ext4",
            "the extent flag stays: {extents}"
        );
        // j of ext4 would need CAP_SYS_RESOURCE.
        let own: u32 = if kind == "btrfs" { 0x80_0000 } else { 0x8 }; // C or S
        flags::write(file.as_fd(), Flags::from_bits(own)).unwrap();
        assert_eq!(
            flags::read(file.as_fd()).unwrap().unwrap().bits(),
            own,
            "{kind}"
        );
    }
    let fifo_like = File::open("/dev/null").unwrap();
    assert_eq!(flags::read(fifo_like.as_fd()).unwrap(), None);
    assert!(flags::write(fifo_like.as_fd(), Flags::from_bits(8)).is_err());
}

#[test]
fn the_list_of_flags_has_no_letter_or_bit_twice() {
    let mut bits = 0;
    for flag in LOGGED {
        assert_eq!(flag.bit.count_ones(), 1);
        assert_eq!(bits & flag.bit, 0);
        bits |= flag.bit;
    }
    assert_eq!(bits, Flags::ALL.bits());
    let letters: std::collections::BTreeSet<_> = LOGGED.iter().map(|f| f.letter).collect();
    assert_eq!(letters.len(), LOGGED.len());
}
