//! Things that are neither files nor directories nor symlinks, and what only one filesystem has.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::loopfs::Kind;

use super::{BTRFS, Change, noisy, nothing, overwrite, run};

pub(super) const CHANGES: &[Change] = &[
    Change::new("fifo", nothing, |d| {
        run(d, "mkfifo", &["-m", "0640", "fifo"])
    }),
    Change::new("socket", nothing, |d| {
        // The path of a socket is limited to 108 bytes, so it is named relative to a link.
        let short = std::env::temp_dir().join(format!("hsm-s-{}", std::process::id()));
        let _ = fs::remove_file(&short);
        std::os::unix::fs::symlink(d, &short)?;
        let bound = UnixListener::bind(short.join("socket"));
        fs::remove_file(&short)?;
        bound.map(drop)
    }),
    Change::new("devices", nothing, |d| {
        device(d, "null", SFlag::S_IFCHR, 1, 3)?;
        device(d, "disk", SFlag::S_IFBLK, 259, 70_000)?;
        device(d, "large", SFlag::S_IFCHR, 511, 262_143)?;
        device(d, "whiteout", SFlag::S_IFCHR, 0, 0)
    }),
    Change::new("device_largest", nothing, |d| {
        device(d, "dev", SFlag::S_IFCHR, 4095, 1_048_575)
    })
    .only(&[Kind::Ext4, Kind::Btrfs]),
    Change::new(
        "device_replaced",
        |d| device(d, "dev", SFlag::S_IFCHR, 1, 3),
        |d| {
            fs::remove_file(d.join("dev"))?;
            device(d, "dev", SFlag::S_IFCHR, 1, 5)
        },
    ),
    Change::new(
        "special_renamed_and_owned",
        |d| {
            run(d, "mkfifo", &["fifo"])?;
            device(d, "dev", SFlag::S_IFBLK, 7, 1)
        },
        |d| {
            fs::rename(d.join("fifo"), d.join("pipe"))?;
            std::os::unix::fs::chown(d.join("pipe"), Some(3), Some(4))?;
            run(d, "chmod", &["0601", "dev"])
        },
    ),
    Change::new(
        "special_unlinked",
        |d| {
            run(d, "mkfifo", &["fifo"])?;
            device(d, "dev", SFlag::S_IFCHR, 7, 1)
        },
        |d| {
            fs::remove_file(d.join("fifo"))?;
            fs::remove_file(d.join("dev"))
        },
    ),
    Change::new(
        "fifo_becomes_file",
        |d| run(d, "mkfifo", &["x"]),
        |d| {
            fs::remove_file(d.join("x"))?;
            fs::write(d.join("x"), "a file")
        },
    ),
    Change::new("subvolume", nothing, |d| {
        run(d, "btrfs", &["subvolume", "create", "sub"])?;
        noisy(d, "sub/file", 100_000)
    })
    .silent()
    .only(BTRFS),
    Change::new(
        "subvolume_changed_inside",
        |d| {
            run(d, "btrfs", &["subvolume", "create", "sub"])?;
            noisy(d, "sub/file", 100_000)
        },
        |d| {
            overwrite(d, "sub/file", 70_000, b"in a subvolume")?;
            fs::create_dir(d.join("sub/dir"))?;
            fs::rename(d.join("sub/file"), d.join("sub/dir/file"))
        },
    )
    .only(BTRFS),
    Change::new(
        "snapshot",
        |d| {
            run(d, "btrfs", &["subvolume", "create", "sub"])?;
            noisy(d, "sub/file", 100_000)
        },
        |d| {
            run(d, "btrfs", &["subvolume", "snapshot", "sub", "snap"])?;
            overwrite(d, "sub/file", 0, b"only in sub")?;
            overwrite(d, "snap/file", 0, b"only in snap")
        },
    )
    .silent()
    .only(BTRFS),
    Change::new(
        "subvolume_deleted",
        |d| {
            run(d, "btrfs", &["subvolume", "create", "sub"])?;
            noisy(d, "sub/file", 100_000)
        },
        |d| run(d, "btrfs", &["subvolume", "delete", "sub"]),
    )
    .silent()
    .only(BTRFS),
];

fn device(dir: &Path, name: &str, kind: SFlag, major: u64, minor: u64) -> io::Result<()> {
    let mode = Mode::from_bits_truncate(0o640);
    Ok(mknod(&dir.join(name), kind, mode, makedev(major, minor))?)
}
