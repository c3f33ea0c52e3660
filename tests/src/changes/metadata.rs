//! Changes of attributes.

use std::ffi::CStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use super::{
    BTRFS, Change, EXT4, EXT4_XFS, XFS_BTRFS, noise, nothing, one_file, run, small_things,
};
use crate::loopfs::Kind;
use crate::sys::{self, change_flags, remove_xattr, set_xattr};

pub(super) const CHANGES: &[Change] = &[
    Change::new("chmod", small_things, |d| {
        chmod(d, "file", 0o604)?;
        chmod(d, "dir", 0o711)
    }),
    Change::new("chmod_special_bits", small_things, |d| {
        chmod(d, "file", 0o6755)?;
        chmod(d, "dir", 0o3770)
    }),
    Change::new("chmod_to_nothing", small_things, |d| {
        chmod(d, "file", 0)?;
        chmod(d, "dir", 0)
    }),
    Change::new("chown", small_things, |d| {
        chown(d.join("file"), Some(1234), Some(5678))?;
        chown(d.join("dir"), Some(65_534), None)
    }),
    Change::new("chown_large_ids", small_things, |d| {
        chown(d.join("file"), Some(4_000_000_000), Some(3_999_999_999))
    }),
    Change::new(
        "chown_takes_setuid",
        |d| {
            small_things(d)?;
            chmod(d, "file", 0o4755)
        },
        |d| chown(d.join("file"), Some(1), Some(1)),
    ),
    Change::new(
        "chown_symlink",
        |d| symlink("file", d.join("link")),
        |d| lchown(d.join("link"), Some(7), Some(8)),
    ),
    Change::new("setuid_of_foreign_owner", small_things, |d| {
        chown(d.join("file"), Some(77), Some(88))?;
        chmod(d, "file", 0o6711)
    }),
    Change::new("mtime_in_the_past", small_things, |d| {
        mtime(d, "file", 915_148_799, 123_456_789)?;
        mtime(d, "dir", 1, 1)
    }),
    Change::new("mtime_before_1970", small_things, |d| {
        mtime(d, "file", -1_000_000_000, 999_999_999)
    }),
    Change::new("mtime_in_the_future", small_things, |d| {
        mtime(d, "file", 9_000_000_000, 5)
    }),
    Change::new(
        "mtime_of_symlink",
        |d| symlink("x", d.join("link")),
        |d| mtime(d, "link", 1_000_000_000, 42),
    ),
    Change::new("mtime_of_filled_directory", small_things, |d| {
        fs::write(d.join("dir/file"), "x")?;
        mtime(d, "dir", 1_111_111_111, 222_222_222)
    }),
    Change::new("touch", small_things, |d| run(d, "touch", &["file", "dir"])),
    Change::new("xattr_set", small_things, |d| {
        xattr(d, "file", c"user.comment", b"hello")?;
        xattr(d, "dir", c"user.comment", b"directories too")
    }),
    Change::new(
        "xattr_replaced",
        |d| {
            small_things(d)?;
            xattr(d, "file", c"user.comment", b"old")?;
            xattr(d, "file", c"user.other", b"stays")
        },
        |d| xattr(d, "file", c"user.comment", b"new and longer"),
    ),
    Change::new(
        "xattr_removed",
        |d| {
            small_things(d)?;
            xattr(d, "file", c"user.comment", b"old")?;
            xattr(d, "file", c"user.other", b"stays")
        },
        |d| remove_xattr(&d.join("file"), c"user.comment"),
    ),
    Change::new("xattr_empty_and_binary", small_things, |d| {
        xattr(d, "file", c"user.empty", b"")?;
        xattr(d, "file", c"user.\xff\x01odd", b"\0\xff\n")
    }),
    Change::new("xattr_many", small_things, |d| {
        for name in [
            c"user.1", c"user.2", c"user.3", c"user.4", c"user.5", c"user.6", c"user.7",
        ] {
            xattr(d, "file", name, &noise(1, 300))?;
        }
        Ok(())
    }),
    Change::new("xattr_large", small_things, |d| {
        xattr(d, "file", c"user.big", &noise(2, 3500))
    }),
    Change::new("xattr_very_large", small_things, |d| {
        xattr(d, "file", c"user.big", &noise(3, 15_000))?;
        xattr(d, "dir", c"user.big", &noise(4, 15_000))
    })
    .only(XFS_BTRFS),
    Change::new("xattr_sum_beyond_a_frame", small_things, |d| {
        for n in 0..20 {
            let name = std::ffi::CString::new(format!("user.big{n}"))?;
            set_xattr(&d.join("file"), &name, &noise(n, 60_000))?;
        }
        Ok(())
    })
    .only(&[Kind::Xfs]),
    Change::new("xattr_trusted", small_things, |d| {
        xattr(d, "file", c"trusted.overlay.opaque", b"y")
    }),
    Change::new("xattr_security", small_things, |d| {
        xattr(d, "file", c"security.ima", b"\x01abc")
    }),
    Change::new(
        "xattr_of_symlink",
        |d| symlink("x", d.join("link")),
        |d| xattr(d, "link", c"trusted.note", b"on the link itself"),
    ),
    Change::new(
        "xattr_of_fifo",
        |d| run(d, "mkfifo", &["fifo"]),
        |d| xattr(d, "fifo", c"trusted.note", b"fifo"),
    ),
    Change::new(
        "capabilities",
        |d| fs::copy("/bin/true", d.join("tool")).map(drop),
        |d| run(d, "setcap", &["cap_net_raw,cap_net_admin+ep", "tool"]),
    ),
    Change::new(
        "capabilities_of_foreign_owner",
        |d| fs::copy("/bin/true", d.join("tool")).map(drop),
        |d| {
            chown(d.join("tool"), Some(1000), Some(1000))?;
            run(d, "setcap", &["cap_net_raw+ep", "tool"])
        },
    ),
    Change::new(
        "capabilities_lost_by_write",
        |d| {
            fs::copy("/bin/true", d.join("tool"))?;
            run(d, "setcap", &["cap_net_raw+ep", "tool"])
        },
        |d| {
            fs::OpenOptions::new()
                .append(true)
                .open(d.join("tool"))?
                .write_all(b"x")
        },
    ),
    Change::new("acl", small_things, |d| {
        run(d, "setfacl", &["-m", "u:1234:rw,g:99:r,m::rw", "file"])
    }),
    Change::new("acl_default", small_things, |d| {
        run(d, "setfacl", &["-m", "d:u:1234:rwx,u:55:x", "dir"])
    }),
    Change::new(
        "acl_inherited",
        |d| {
            small_things(d)?;
            run(d, "setfacl", &["-d", "-m", "u:1234:rwx", "dir"])
        },
        |d| {
            fs::write(d.join("dir/file"), "x")?;
            fs::create_dir(d.join("dir/sub"))
        },
    ),
    Change::new(
        "acl_removed",
        |d| {
            small_things(d)?;
            run(d, "setfacl", &["-m", "u:1234:rw", "file"])
        },
        |d| run(d, "setfacl", &["-b", "file"]),
    ),
    Change::new(
        "acl_and_chmod",
        |d| {
            small_things(d)?;
            run(d, "setfacl", &["-m", "u:1234:rwx", "file"])
        },
        |d| chmod(d, "file", 0o640),
    ),
    Change::new(
        "group_inherited",
        |d| {
            small_things(d)?;
            chown(d.join("dir"), None, Some(4321))?;
            chmod(d, "dir", 0o2775)
        },
        |d| {
            fs::write(d.join("dir/file"), "x")?;
            fs::create_dir(d.join("dir/sub"))
        },
    ),
    Change::new("flag_immutable", small_things, |d| {
        flag(d, "file", sys::IMMUTABLE_FL)?;
        flag(d, "dir", sys::IMMUTABLE_FL)
    })
    .silent(),
    Change::new(
        "flag_immutable_taken",
        |d| {
            small_things(d)?;
            flag(d, "file", sys::IMMUTABLE_FL)
        },
        |d| {
            change_flags(&File::open(d.join("file"))?, 0, sys::IMMUTABLE_FL)?;
            fs::write(d.join("file"), "changed in between")?;
            flag(d, "file", sys::IMMUTABLE_FL)
        },
    )
    .silent(),
    Change::new(
        "flag_immutable_on_links",
        |d| {
            one_file(d)?;
            fs::hard_link(d.join("file"), d.join("link"))
        },
        |d| flag(d, "file", sys::IMMUTABLE_FL),
    )
    .silent(),
    Change::new(
        "flag_immutable_directory_with_files",
        |d| {
            fs::create_dir(d.join("dir"))?;
            fs::write(d.join("dir/file"), "x")
        },
        |d| flag(d, "dir", sys::IMMUTABLE_FL),
    )
    .silent(),
    Change::new("flag_append_only", small_things, |d| {
        flag(d, "file", sys::APPEND_FL)?;
        flag(d, "dir", sys::APPEND_FL)
    })
    .silent(),
    Change::new(
        "flag_append_only_appended",
        |d| {
            small_things(d)?;
            flag(d, "file", sys::APPEND_FL)
        },
        |d| {
            fs::OpenOptions::new()
                .append(true)
                .open(d.join("file"))?
                .write_all(b"more")
        },
    ),
    Change::new("flag_nodump_noatime", small_things, |d| {
        flag(d, "file", sys::NODUMP_FL | sys::NOATIME_FL)?;
        flag(d, "dir", sys::NODUMP_FL | sys::NOATIME_FL)
    })
    .silent(),
    Change::new("flag_sync", small_things, |d| {
        flag(d, "file", sys::SYNC_FL)?;
        flag(d, "dir", sys::SYNC_FL)
    })
    .silent(),
    Change::new("flag_dirsync", small_things, |d| {
        flag(d, "dir", sys::DIRSYNC_FL)
    })
    .silent()
    .only(&[Kind::Ext4, Kind::Btrfs]),
    Change::new("flag_topdir", small_things, |d| {
        flag(d, "dir", sys::TOPDIR_FL)
    })
    .silent()
    .only(EXT4),
    Change::new("flag_journal_data", small_things, flag_journal_data)
        .silent()
        .only(EXT4),
    Change::new("flag_compress", small_things, |d| {
        flag(d, "file", sys::COMPR_FL)?;
        flag(d, "dir", sys::COMPR_FL)
    })
    .silent()
    .only(BTRFS),
    Change::new("flag_never_compress", small_things, |d| {
        flag(d, "file", sys::NOCOMP_FL)
    })
    .silent()
    .only(BTRFS),
    Change::new("flag_no_copy_on_write", small_things, |d| {
        fs::write(d.join("new"), "")?;
        flag(d, "new", sys::NOCOW_FL)?;
        fs::write(d.join("new"), noise(1, 100_000))?;
        flag(d, "dir", sys::NOCOW_FL)?;
        fs::write(d.join("dir/inherits"), noise(2, 100_000))
    })
    .silent()
    .only(BTRFS),
    Change::new(
        "flags_inherited",
        |d| {
            small_things(d)?;
            flag(d, "dir", sys::NODUMP_FL | sys::NOATIME_FL)
        },
        |d| {
            fs::write(d.join("dir/file"), "x")?;
            fs::create_dir(d.join("dir/sub"))
        },
    )
    .only(EXT4_XFS),
    Change::new("everything_at_once", nothing, |d| {
        small_things(d)?;
        chown(d.join("file"), Some(11), Some(12))?;
        chmod(d, "file", 0o4711)?;
        run(d, "setfacl", &["-m", "u:13:r", "file"])?;
        run(d, "setcap", &["cap_chown+p", "file"])?;
        xattr(d, "file", c"user.x", b"y")?;
        fs::hard_link(d.join("file"), d.join("dir/link"))?;
        mtime(d, "file", 1_234_567_890, 987_654_321)?;
        mtime(d, "dir", 1_234_567_891, 987_654_320)?;
        flag(d, "file", sys::IMMUTABLE_FL | sys::NODUMP_FL)
    }),
];

fn chmod(dir: &Path, name: &str, mode: u32) -> io::Result<()> {
    fs::set_permissions(dir.join(name), Permissions::from_mode(mode))
}

fn mtime(dir: &Path, name: &str, seconds: i64, nanoseconds: i64) -> io::Result<()> {
    Ok(utimensat(
        AT_FDCWD,
        &dir.join(name),
        &TimeSpec::new(0, libc::UTIME_OMIT),
        &TimeSpec::new(seconds, nanoseconds),
        UtimensatFlags::NoFollowSymlink,
    )?)
}

fn xattr(dir: &Path, name: &str, key: &CStr, value: &[u8]) -> io::Result<()> {
    set_xattr(&dir.join(name), key, value)
}

fn flag(dir: &Path, name: &str, flags: u32) -> io::Result<()> {
    change_flags(&File::open(dir.join(name))?, flags, 0)
}

/// Needs `CAP_SYS_RESOURCE`, which root in a container may lack: then nothing is changed.
fn flag_journal_data(dir: &Path) -> io::Result<()> {
    match flag(dir, "file", sys::JOURNAL_DATA_FL) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        done => done,
    }
}
