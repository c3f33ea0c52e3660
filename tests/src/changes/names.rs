//! Changes of which names there are and what they name.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::unistd::linkat;

use super::{Change, EXT4_XFS, hold, noisy, nothing, one_file, overwrite, small_things};

pub(super) const CHANGES: &[Change] = &[
    Change::new("rename", one_file, |d| rename(d, "file", "other")),
    Change::new("rename_to_other_directory", small_things, |d| {
        rename(d, "file", "dir/file")
    }),
    Change::new("rename_over_existing", two_files, |d| rename(d, "a", "b")),
    Change::new("rename_over_held_open", two_files, |d| {
        hold(File::open(d.join("b"))?);
        rename(d, "a", "b")
    }),
    Change::new(
        "rename_over_a_link_of_another",
        |d| {
            two_files(d)?;
            fs::hard_link(d.join("b"), d.join("c"))
        },
        |d| rename(d, "a", "b"),
    ),
    Change::new("rename_and_write", one_file, |d| {
        rename(d, "file", "other")?;
        overwrite(d, "other", 1000, b"after the rename")
    }),
    Change::new("write_and_rename", one_file, |d| {
        overwrite(d, "file", 1000, b"before the rename")?;
        rename(d, "file", "other")
    }),
    Change::new("rename_there_and_back", two_files, |d| {
        for _ in 0..50 {
            rename(d, "a", "c")?;
            rename(d, "c", "a")?;
        }
        Ok(())
    }),
    Change::new("rename_hidden_by_new_file", one_file, |d| {
        rename(d, "file", "other")?;
        noisy(d, "file", 1234)
    }),
    Change::new(
        "rename_cycle",
        |d| {
            two_files(d)?;
            noisy(d, "c", 3000)
        },
        |d| {
            rename(d, "a", "tmp")?;
            rename(d, "b", "a")?;
            rename(d, "c", "b")?;
            rename(d, "tmp", "c")
        },
    ),
    Change::new("rename_directory", tree, |d| rename(d, "x", "z")),
    Change::new("rename_directory_into_other", tree, |d| {
        rename(d, "x", "y/x")
    }),
    Change::new("rename_directory_out", tree, |d| rename(d, "x/sub", "sub")),
    Change::new(
        "rename_directory_over_empty",
        |d| {
            tree(d)?;
            fs::create_dir(d.join("empty"))
        },
        |d| rename(d, "x", "empty"),
    ),
    Change::new("rename_directory_and_change_below", tree, |d| {
        rename(d, "x", "z")?;
        fs::write(d.join("z/sub/new"), "new")?;
        fs::remove_file(d.join("z/file"))?;
        rename(d, "z/sub", "z/sub2")
    }),
    Change::new(
        "parent_and_child_trade_places",
        |d| {
            fs::create_dir_all(d.join("a/b"))?;
            fs::write(d.join("a/in_a"), "a")?;
            fs::write(d.join("a/b/in_b"), "b")
        },
        |d| {
            rename(d, "a/b", "b")?;
            rename(d, "a", "b/a")
        },
    ),
    Change::new("exchange_files", two_files, |d| exchange(d, "a", "b")),
    Change::new(
        "exchange_file_and_directory",
        |d| {
            small_things(d)?;
            fs::write(d.join("dir/below"), "below")
        },
        |d| exchange(d, "file", "dir"),
    ),
    Change::new("exchange_directories", tree, |d| exchange(d, "x", "y")),
    Change::new("exchange_across_levels", tree, |d| {
        exchange(d, "x/sub", "y")
    }),
    Change::new(
        "exchange_symlink_and_file",
        |d| {
            two_files(d)?;
            symlink("a", d.join("link"))
        },
        |d| exchange(d, "link", "b"),
    ),
    Change::new("rename_leaving_whiteout", one_file, |d| {
        renamed(
            d,
            "file",
            "other",
            RenameFlags::from_bits_retain(libc::RENAME_WHITEOUT),
        )
    })
    .only(EXT4_XFS),
    Change::new("rename_without_replacing", one_file, |d| {
        renamed(d, "file", "other", RenameFlags::RENAME_NOREPLACE)
    }),
    Change::new("link", one_file, |d| link(d, "file", "link")),
    Change::new("link_in_other_directory", small_things, |d| {
        link(d, "file", "dir/link")
    }),
    Change::new("link_many", one_file, |d| {
        (0..120).try_for_each(|n| link(d, "file", &format!("link{n}")))
    }),
    Change::new("link_then_unlink_first", one_file, |d| {
        link(d, "file", "link")?;
        unlink(d, "file")
    }),
    Change::new("link_of_new_file", nothing, |d| {
        one_file(d)?;
        link(d, "file", "link")
    }),
    Change::new(
        "link_of_symlink_and_fifo",
        |d| {
            symlink("nowhere", d.join("symlink"))?;
            super::run(d, "mkfifo", &["fifo"])
        },
        |d| {
            link(d, "symlink", "symlink2")?;
            link(d, "fifo", "fifo2")
        },
    ),
    Change::new("unlink", two_files, |d| unlink(d, "a")),
    Change::new(
        "unlink_one_of_two_links",
        |d| {
            one_file(d)?;
            link(d, "file", "link")
        },
        |d| unlink(d, "file"),
    ),
    Change::new(
        "unlink_all_links",
        |d| {
            two_files(d)?;
            link(d, "a", "c")
        },
        |d| {
            unlink(d, "a")?;
            unlink(d, "c")
        },
    ),
    Change::new("unlink_and_create_again", one_file, |d| {
        unlink(d, "file")?;
        noisy(d, "file", 5000)
    }),
    Change::new("unlink_what_was_just_made", nothing, |d| {
        one_file(d)?;
        unlink(d, "file")
    }),
    Change::new("many_short_lives", nothing, |d| {
        for n in 0..200 {
            fs::write(d.join("file"), format!("{n}"))?;
            if n < 199 {
                unlink(d, "file")?;
            }
        }
        Ok(())
    }),
    Change::new("mkdir", nothing, |d| fs::create_dir(d.join("dir"))),
    Change::new("mkdir_deep", nothing, |d| {
        fs::create_dir_all(d.join("1/2/3/4/5/6/7/8/9"))?;
        fs::write(d.join("1/2/3/4/5/6/7/8/9/file"), "deep")
    }),
    Change::new("mkdir_deeper_than_path_max", nothing, deeper_than_path_max),
    Change::new("rmdir", small_things, |d| fs::remove_dir(d.join("dir"))),
    Change::new("remove_tree", tree, |d| fs::remove_dir_all(d.join("x"))),
    Change::new("remove_tree_and_make_it_again", tree, |d| {
        fs::remove_dir_all(d.join("x"))?;
        fs::create_dir_all(d.join("x/sub"))?;
        fs::write(d.join("x/sub/other"), "other")
    }),
    Change::new("file_becomes_directory", one_file, |d| {
        unlink(d, "file")?;
        fs::create_dir(d.join("file"))
    }),
    Change::new("directory_becomes_file", tree, |d| {
        fs::remove_dir_all(d.join("x"))?;
        fs::write(d.join("x"), "a file now")
    }),
    Change::new("file_becomes_symlink", two_files, |d| {
        unlink(d, "a")?;
        symlink("b", d.join("a"))
    }),
    Change::new("tree_copied", nothing, |d| {
        tree(d)?;
        super::run(d, "cp", &["-a", "x", "copy"])
    }),
    Change::new("tree_unpacked", nothing, |d| {
        super::run(
            d,
            "sh",
            &["-c", "tar -C /etc -cf - init.d pam.d skel | tar -xpf -"],
        )
    }),
    Change::new("symlink", nothing, |d| {
        symlink("../somewhere", d.join("link"))
    }),
    Change::new("symlink_long", nothing, |d| {
        symlink("x/".repeat(500), d.join("link"))
    }),
    Change::new("symlink_longest", nothing, |d| {
        // btrfs and xfs take less than PATH_MAX.
        let fits = |len: usize| symlink("y".repeat(len), d.join("link")).is_ok();
        if [4095, 3900, 1023].into_iter().any(fits) {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }),
    Change::new("symlink_not_utf8", nothing, |d| {
        symlink(OsStr::from_bytes(b"\xff\xfe\n"), d.join("link"))
    }),
    Change::new(
        "symlink_replaced",
        |d| symlink("old", d.join("link")),
        |d| {
            symlink("new", d.join("tmp"))?;
            rename(d, "tmp", "link")
        },
    ),
    Change::new("name_longest", nothing, |d| {
        fs::write(d.join("n".repeat(255)), "x")
    }),
    Change::new("names_odd", nothing, |d| {
        for name in [
            &b"\xff\x01not utf-8"[..],
            b"new\nline",
            b"back\\slash",
            b"-rf",
            b" ",
            b"...",
            b"quote'\"",
            b"tab\t",
            b"%s%n",
            b"#12345",
            b"a:b",
            b"\xc3\xa9",
            b"e\xcc\x81",
            b"CASE",
            b"case",
            b"lost+found",
            b".hsm",
            b"*",
        ] {
            fs::write(d.join(OsStr::from_bytes(name)), name)?;
        }
        Ok(())
    }),
    Change::new("tmpfile_linked", nothing, |d| link_tmpfile(d, "file")),
    Change::new("tmpfile_linked_and_written", nothing, |d| {
        link_tmpfile(d, "file")?;
        overwrite(d, "file", 10_000, b"later")
    }),
    Change::new("tmpfile_never_linked", nothing, hold_tmpfile),
    Change::new("orphan_gets_a_name_again", nothing, |d| {
        one_file(d)?;
        link(d, "file", "second")?;
        let file = File::open(d.join("file"))?;
        unlink(d, "file")?;
        unlink(d, "second")?;
        drop(file);
        Ok(())
    }),
    Change::new(
        "big_directory",
        |d| (0..1500).try_for_each(|n| fs::write(d.join(format!("a-rather-long-name-{n:06}")), "")),
        |d| {
            for n in (0..1500).step_by(3) {
                unlink(d, &format!("a-rather-long-name-{n:06}"))?;
            }
            (0..100).try_for_each(|n| {
                rename(
                    d,
                    &format!("a-rather-long-name-{:06}", 3 * n + 1),
                    &format!("moved-{n}"),
                )
            })
        },
    ),
];

fn two_files(dir: &Path) -> io::Result<()> {
    noisy(dir, "a", 1000)?;
    noisy(dir, "b", 200_000)
}

/// x/sub/deep/file, x/file, y/file
fn tree(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir.join("x/sub/deep"))?;
    fs::create_dir(dir.join("y"))?;
    noisy(dir, "x/sub/deep/file", 70_000)?;
    noisy(dir, "x/file", 10)?;
    noisy(dir, "y/file", 20)
}

fn rename(dir: &Path, from: &str, to: &str) -> io::Result<()> {
    fs::rename(dir.join(from), dir.join(to))
}

fn renamed(dir: &Path, from: &str, to: &str, flags: RenameFlags) -> io::Result<()> {
    Ok(renameat2(
        AT_FDCWD,
        &dir.join(from),
        AT_FDCWD,
        &dir.join(to),
        flags,
    )?)
}

fn exchange(dir: &Path, one: &str, other: &str) -> io::Result<()> {
    renamed(dir, one, other, RenameFlags::RENAME_EXCHANGE)
}

fn link(dir: &Path, from: &str, to: &str) -> io::Result<()> {
    fs::hard_link(dir.join(from), dir.join(to))
}

fn unlink(dir: &Path, name: &str) -> io::Result<()> {
    fs::remove_file(dir.join(name))
}

/// A file without a name in a directory.
fn tmpfile(dir: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o640)
        .open(dir)
}

fn link_tmpfile(dir: &Path, name: &str) -> io::Result<()> {
    let mut file = tmpfile(dir)?;
    file.write_all(&super::noise(9, 90_000))?;
    let at = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(
        AT_FDCWD,
        at.as_str(),
        AT_FDCWD,
        &dir.join(name),
        AtFlags::AT_SYMLINK_FOLLOW,
    )?)
}

fn hold_tmpfile(dir: &Path) -> io::Result<()> {
    let mut file = tmpfile(dir)?;
    file.write_all(b"without a name")?;
    hold(file);
    Ok(())
}

fn deeper_than_path_max(dir: &Path) -> io::Result<()> {
    let name = "d".repeat(200);
    let mut at = File::open(dir)?;
    for _ in 0..25 {
        let below = crate::sys::through(at.as_raw_fd(), OsStr::new(&name));
        fs::create_dir(&below)?;
        at = File::open(&below)?;
    }
    fs::write(
        crate::sys::through(at.as_raw_fd(), OsStr::new("file")),
        "very deep",
    )
}
