//! Changes of what files hold.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::{
    BTRFS, Change, EXT4_XFS, XFS_BTRFS, edit, hold, noise, noisy, nothing, one_file, overwrite, run,
};
use crate::sys::{self, SharedMap};

const GIB: u64 = 1 << 30;

pub(super) const CHANGES: &[Change] = &[
    Change::new("create_empty", nothing, |d| fs::write(d.join("file"), "")),
    Change::new("create_one_byte", nothing, |d| {
        fs::write(d.join("file"), "x")
    }),
    Change::new("create_sizes_around_blocks", nothing, |d| {
        for size in [
            4095, 4096, 4097, 65535, 65536, 65537, 131_072, 1_048_575, 1_048_576, 1_048_577,
        ] {
            noisy(d, &format!("file{size}"), size)?;
        }
        Ok(())
    }),
    Change::new("create_large", nothing, |d| noisy(d, "file", 9_000_001)),
    Change::new("create_compressible", nothing, |d| {
        fs::write(d.join("file"), "the same words again\n".repeat(200_000))
    }),
    Change::new("create_many", nothing, |d| {
        (0..400).try_for_each(|n| fs::write(d.join(format!("file{n}")), format!("{n}")))
    }),
    Change::new("append", one_file, |d| {
        OpenOptions::new()
            .append(true)
            .open(d.join("file"))?
            .write_all(&noise(1, 100_000))
    }),
    Change::new("append_by_single_bytes", one_file, |d| {
        let mut file = OpenOptions::new().append(true).open(d.join("file"))?;
        (0..100u8).try_for_each(|byte| file.write_all(&[byte]))
    }),
    Change::new("overwrite_start", one_file, |d| {
        overwrite(d, "file", 0, b"new")
    }),
    Change::new("overwrite_middle", one_file, |d| {
        overwrite(d, "file", 65_530, b"across two blocks")
    }),
    Change::new("overwrite_end", one_file, |d| {
        overwrite(d, "file", 299_990, &noise(2, 4000))
    }),
    Change::new("overwrite_all_other_length", one_file, |d| {
        noisy(d, "file", 123_456)
    }),
    Change::new("overwrite_with_the_same", one_file, one_file),
    Change::new("overwrite_keeping_mtime", one_file, |d| {
        let file = edit(d, "file")?;
        let mtime = file.metadata()?.modified()?;
        file.write_all_at(b"restored by a careful tool", 70_000)?;
        file.set_modified(mtime)
    }),
    Change::new(
        "overwrite_scattered",
        |d| noisy(d, "file", 3_000_000),
        |d| {
            let file = edit(d, "file")?;
            (0..20).try_for_each(|n| file.write_all_at(&noise(n, 100), n * 140_001))
        },
    ),
    Change::new("truncate_to_nothing", one_file, |d| {
        edit(d, "file")?.set_len(0)
    }),
    Change::new("truncate_shorter", one_file, |d| {
        edit(d, "file")?.set_len(100_001)
    }),
    Change::new("truncate_longer", one_file, |d| {
        edit(d, "file")?.set_len(1_000_001)
    }),
    Change::new("truncate_shorter_then_longer", one_file, |d| {
        let file = edit(d, "file")?;
        file.set_len(1000)?;
        file.set_len(300_000)
    }),
    Change::new("truncate_at_open", one_file, |d| {
        File::create(d.join("file"))?.write_all(b"short now")
    }),
    Change::new("truncate_in_two_versions", one_file, |d| {
        edit(d, "file")?.set_len(66_000)?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
        edit(d, "file")?.set_len(200_000)
    }),
    Change::new("hole_alone", nothing, |d| {
        File::create(d.join("file"))?.set_len(10 * GIB)
    }),
    Change::new("hole_at_start", nothing, |d| {
        File::create(d.join("file"))?.write_all_at(b"far away", 40 * GIB + 12_345)
    }),
    Change::new("hole_at_end", nothing, |d| {
        let file = File::create(d.join("file"))?;
        file.write_all_at(&noise(3, 10_000), 0)?;
        file.set_len(GIB)
    }),
    Change::new("holes_between", nothing, |d| {
        let file = File::create(d.join("file"))?;
        (0..40).try_for_each(|n| file.write_all_at(b"island", n * 40_960))
    }),
    Change::new("hole_grows_into_data", one_file, |d| {
        edit(d, "file")?.write_all_at(b"further", 5_000_000)
    }),
    Change::new(
        "hole_is_filled",
        |d| File::create(d.join("file"))?.set_len(1_000_000),
        |d| overwrite(d, "file", 500_000, &noise(4, 50_000)),
    ),
    Change::new(
        "hole_filled_with_zeros",
        |d| File::create(d.join("file"))?.set_len(1_000_000),
        |d| overwrite(d, "file", 262_144, &[0; 65_536]),
    ),
    Change::new("punch_middle", one_file, |d| {
        punch(&edit(d, "file")?, 65_536, 65_536)
    }),
    Change::new("punch_odd_offsets", one_file, |d| {
        punch(&edit(d, "file")?, 50_001, 100_000)
    }),
    Change::new("punch_to_end", one_file, |d| {
        punch(&edit(d, "file")?, 131_072, 1_000_000)
    }),
    Change::new("punch_all", one_file, |d| {
        punch(&edit(d, "file")?, 0, 300_000)
    }),
    Change::new("zero_range", one_file, |d| {
        allocate(
            &edit(d, "file")?,
            FallocateFlags::FALLOC_FL_ZERO_RANGE,
            70_000,
            90_000,
        )
    }),
    Change::new("collapse_range", one_file, |d| {
        allocate(
            &edit(d, "file")?,
            FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
            65_536,
            65_536,
        )
    })
    .only(EXT4_XFS),
    Change::new("insert_range", one_file, |d| {
        allocate(
            &edit(d, "file")?,
            FallocateFlags::FALLOC_FL_INSERT_RANGE,
            65_536,
            65_536,
        )
    })
    .only(EXT4_XFS),
    Change::new("preallocate", one_file, |d| {
        allocate(&edit(d, "file")?, FallocateFlags::empty(), 0, 2_000_000)
    }),
    Change::new("preallocate_behind_end", one_file, |d| {
        allocate(
            &edit(d, "file")?,
            FallocateFlags::FALLOC_FL_KEEP_SIZE,
            0,
            2_000_000,
        )
    }),
    Change::new("zeros_written", nothing, |d| {
        fs::write(d.join("file"), vec![0; 200_000])
    }),
    Change::new("zeros_over_data", one_file, |d| {
        overwrite(d, "file", 65_536, &[0; 65_536])
    }),
    Change::new("mmap_synced", one_file, |d| store(d, true, false)),
    Change::new("mmap_not_synced", one_file, |d| store(d, false, false)).silent(),
    Change::new("mmap_still_mapped", one_file, |d| store(d, true, true)).silent(),
    Change::new("mmap_still_mapped_not_synced", one_file, |d| {
        store(d, false, true)
    })
    .silent(),
    Change::new(
        "mmap_of_hole",
        |d| File::create(d.join("file"))?.set_len(300_000),
        |d| store(d, false, false),
    )
    .silent(),
    Change::new("mmap_page_stored_twice", one_file, |d| {
        let file = edit(d, "file")?;
        let mut map = SharedMap::new(&file, 300_000)?;
        map.store(150_000, b'1');
        map.sync()?;
        map.store(150_000, b'2');
        std::thread::sleep(std::time::Duration::from_millis(300));
        map.store(150_001, b'3');
        hold(map);
        Ok(())
    })
    .silent(),
    Change::new("direct_write", nothing, |d| {
        run(
            d,
            "dd",
            &[
                "if=/dev/urandom",
                "of=file",
                "bs=64k",
                "count=5",
                "oflag=direct",
            ],
        )
    }),
    Change::new("still_open", one_file, |d| {
        let file = edit(d, "file")?;
        file.write_all_at(b"never closed", 100_000)?;
        hold(file);
        Ok(())
    }),
    Change::new("new_and_still_open", nothing, |d| {
        let mut file = File::create(d.join("file"))?;
        file.write_all(&noise(5, 80_000))?;
        hold(file);
        Ok(())
    }),
    Change::new(
        "written_after_unlink",
        |d| {
            one_file(d)?;
            noisy(d, "other", 1000)
        },
        |d| {
            let file = edit(d, "file")?;
            fs::remove_file(d.join("file"))?;
            file.write_all_at(b"nobody reads this", 5)?;
            hold(file);
            Ok(())
        },
    ),
    Change::new(
        "written_through_other_link",
        |d| {
            one_file(d)?;
            fs::create_dir(d.join("sub"))?;
            fs::hard_link(d.join("file"), d.join("sub/link"))
        },
        |d| overwrite(d, "sub/link", 200_000, b"seen under both names"),
    ),
    Change::new("written_by_appending_twice", one_file, |d| {
        for byte in [b"1", b"2"] {
            OpenOptions::new()
                .append(true)
                .open(d.join("file"))?
                .write_all(byte)?;
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        Ok(())
    }),
    Change::new("synchronous_write", one_file, |d| {
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open(d.join("file"))?;
        file.write_all_at(b"durable", 10)
    }),
    Change::new("copy_file_range", one_file, |d| {
        // What std makes of two files on Linux.
        io::copy(&mut edit(d, "file")?, &mut File::create(d.join("copy"))?).map(drop)
    }),
    Change::new("reflink", one_file, |d| {
        sys::clone_file(&edit(d, "file")?, &File::create(d.join("clone"))?)
    })
    .only(XFS_BTRFS),
    Change::new(
        "reflink_over_existing",
        |d| {
            one_file(d)?;
            noisy(d, "clone", 250_000)
        },
        |d| sys::clone_file(&edit(d, "file")?, &edit(d, "clone")?),
    )
    .only(XFS_BTRFS),
    Change::new(
        "reflink_then_write",
        |d| {
            one_file(d)?;
            sys::clone_file(&edit(d, "file")?, &File::create(d.join("clone"))?)
        },
        |d| overwrite(d, "clone", 1000, b"only here"),
    )
    .only(XFS_BTRFS),
    Change::new("inline_data", nothing, |d| {
        fs::write(d.join("file"), noise(6, 900))
    })
    .only(BTRFS),
    Change::new(
        "through_loop_device",
        |d| {
            File::create(d.join("image"))?.set_len(8 << 20)?;
            run(d, "mkfs.ext4", &["-q", "-F", "image"])?;
            fs::create_dir(d.join("mnt"))
        },
        |d| {
            run(
                d,
                "sh",
                &[
                    "-c",
                    "mount -o loop image mnt && cp /etc/passwd mnt/ && umount mnt",
                ],
            )
        },
    )
    .silent(),
    Change::new("atomic_save", one_file, |d| {
        let temporary = d.join(".file.tmp");
        fs::write(&temporary, noise(7, 310_000))?;
        File::open(&temporary)?.sync_all()?;
        fs::rename(temporary, d.join("file"))
    }),
    Change::new("save_with_backup", one_file, |d| {
        fs::rename(d.join("file"), d.join("file~"))?;
        fs::write(d.join("file"), noise(8, 300_100))
    }),
    Change::new(
        "log_rotation",
        |d| {
            noisy(d, "log", 200_000)?;
            noisy(d, "log.1", 150_000)
        },
        |d| {
            fs::rename(d.join("log.1"), d.join("log.2"))?;
            fs::rename(d.join("log"), d.join("log.1"))?;
            fs::write(d.join("log"), "fresh\n")
        },
    ),
    Change::new("copy_and_truncate", one_file, |d| {
        fs::copy(d.join("file"), d.join("file.1"))?;
        edit(d, "file")?.set_len(0)?;
        fs::write(d.join("file"), "fresh\n")
    }),
    Change::new(
        "sqlite",
        |d| sqlite(d, "CREATE TABLE t(a, b)"),
        |d| {
            sqlite(
                d,
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 2000)
                   INSERT INTO t SELECT i, hex(randomblob(20)) FROM n",
            )
        },
    ),
];

fn allocate(file: &File, flags: FallocateFlags, offset: i64, len: i64) -> io::Result<()> {
    Ok(fallocate(file, flags, offset, len)?)
}

fn punch(file: &File, offset: i64, len: i64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, flags, offset, len)
}

fn store(dir: &Path, msync: bool, keep: bool) -> io::Result<()> {
    let file = edit(dir, "file")?;
    let mut map = SharedMap::new(&file, 300_000)?;
    for offset in [0, 4096, 65_535, 65_536, 299_999] {
        map.store(offset, b'!');
    }
    if msync {
        map.sync()?;
    }
    if keep {
        hold(map);
    }
    Ok(())
}

fn sqlite(dir: &Path, statement: &str) -> io::Result<()> {
    let open = rusqlite::Connection::open(dir.join("data.db")).map_err(io::Error::other)?;
    open.execute_batch(&format!("PRAGMA journal_mode=WAL; {statement};"))
        .map_err(io::Error::other)
}
