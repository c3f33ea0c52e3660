//! Holes, clones, leases and the page cache.

#![allow(unsafe_code)] // mmap, to be a writer that raises no events; F_SETLEASE

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::clone::clone_file;
use crate::sys::io::{flush_range, read_at, syncfs};
use crate::sys::lease::{WriteLease, ignore_sigio, nobody_writes};
use crate::sys::pagecache::{CacheState, cached_pages, mincore};
use crate::sys::seek::{Content, Range, ranges};
use crate::sys::space::{punch_all, reserve};
use crate::sys::stat::stat_of;
use crate::sys::testfs::{KINDS, TestFs, open_dir};

const MIB: u64 = 1 << 20;

fn list(file: &File, size: u64) -> Vec<Range> {
    let all: Vec<_> = ranges(file.as_fd(), size).map(Result::unwrap).collect();
    let mut at = 0;
    for range in &all {
        assert_eq!(range.offset, at, "without gaps: {all:?}");
        assert!(range.len > 0);
        at += range.len;
    }
    assert_eq!(at, size);
    all
}

#[test]
fn holes_are_found() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(fs.at("f"))
            .unwrap();
        assert!(list(&file, 0).is_empty());
        file.set_len(16 * MIB).unwrap();
        let hole = |offset, len| Range {
            offset,
            len,
            content: Content::Hole,
        };
        let data = |offset, len| Range {
            offset,
            len,
            content: Content::Data,
        };
        assert_eq!(list(&file, 16 * MIB), [hole(0, 16 * MIB)], "{kind}");
        file.write_all_at(&vec![7; 1 << 20], 4 * MIB).unwrap();
        file.write_all_at(&vec![7; 1 << 20], 15 * MIB).unwrap();
        syncfs(file.as_fd()).unwrap();
        let wanted = [
            hole(0, 4 * MIB),
            data(4 * MIB, MIB),
            hole(5 * MIB, 10 * MIB),
            data(15 * MIB, MIB),
        ];
        assert_eq!(list(&file, 16 * MIB), wanted, "{kind}");
        // A caller's size beyond the end is a hole, one before it cuts.
        assert_eq!(list(&file, 17 * MIB)[4], hole(16 * MIB, MIB), "{kind}");
        assert_eq!(
            list(&file, 4 * MIB + 5),
            [hole(0, 4 * MIB), data(4 * MIB, 5)],
            "{kind}"
        );
    }
}

#[test]
fn clones_are_made_where_the_filesystem_can() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let content = vec![3; 300_000];
        fs::write(fs.at("file"), &content).unwrap();
        let source = File::open(fs.at("file")).unwrap();
        let root = open_dir(fs.root());
        let copy = clone_file(source.as_fd(), root.as_fd()).unwrap();
        assert_eq!(copy.is_some(), kind != "ext4", "{kind}");
        if let Some(copy) = copy {
            fs::write(fs.at("file"), b"changed").unwrap();
            let mut found = vec![0; 300_001];
            assert_eq!(read_at(copy.as_fd(), &mut found, 0).unwrap(), 300_000);
            assert_eq!(found[..300_000], content[..]);
        }
        let names = fs::read_dir(fs.root()).unwrap().count();
        assert_eq!(
            names,
            if kind == "ext4" { 2 } else { 1 },
            "nothing is left behind"
        );
        let elsewhere = File::open("/proc/self/exe").unwrap();
        assert!(
            clone_file(elsewhere.as_fd(), root.as_fd())
                .unwrap()
                .is_none()
        );
    }
}

#[test]
fn a_lease_tells_of_writers() {
    ignore_sigio().unwrap();
    for kind in KINDS {
        let fs = TestFs::new(kind);
        fs::write(fs.at("file"), "x").unwrap();
        let reader = File::open(fs.at("file")).unwrap();
        assert!(nobody_writes(reader.as_fd()).unwrap(), "{kind}");
        let writer = OpenOptions::new().write(true).open(fs.at("file")).unwrap();
        assert!(!nobody_writes(reader.as_fd()).unwrap(), "{kind}");
        drop(writer);
        assert!(nobody_writes(reader.as_fd()).unwrap(), "{kind}");
        // Given back: an opener for writing does not wait.
        drop(OpenOptions::new().write(true).open(fs.at("file")).unwrap());
        assert!(nobody_writes(open_dir(fs.root()).as_fd()).is_err());
    }
}

/// Who opens a leased file waits, and from then on the lease says that it holds no more: nothing may be done
/// on the strength of it. The signal that the kernel sends to its holder then would end this process.
#[test]
fn a_lease_that_somebody_waits_for_does_not_hold() {
    ignore_sigio().unwrap();
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let path = fs.at("file");
        fs::write(&path, "x").unwrap();
        let options = OpenOptions::new().read(true).write(true).to_owned();
        let file = options.open(&path).unwrap();
        let other = File::open(&path).unwrap();
        assert!(WriteLease::take(file.as_fd()).unwrap().is_none(), "{kind}");
        drop(other);
        let lease = WriteLease::take(file.as_fd()).unwrap().unwrap();
        assert!(lease.holds(), "{kind}");
        let opener = thread::spawn(move || File::open(path));
        let end = Instant::now() + Duration::from_secs(30);
        while lease.holds() {
            assert!(
                Instant::now() < end,
                "{kind}: it holds though somebody waits"
            );
            thread::sleep(Duration::from_millis(1));
        }
        assert!(!opener.is_finished(), "{kind}: it did not wait");
        assert!(lease.keeps_waiting(), "{kind}");
        drop(lease);
        drop(opener.join().unwrap().unwrap());
        // One that the kernel took away, as it does after a time, does not hold either.
        let lease = WriteLease::take(file.as_fd()).unwrap().unwrap();
        // SAFETY: F_SETLEASE takes an int and no pointer.
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        assert_eq!(taken, 0, "{kind}");
        assert!(!lease.holds() && !lease.keeps_waiting(), "{kind}");
    }
}

/// XFS keeps blocks behind the end of files that were just written, for more to come. (ext4 has nothing there but
/// what somebody reserved, and leaves it.)
#[test]
fn a_punch_gives_back_what_lies_behind_the_end_too() {
    for kind in ["xfs", "btrfs"] {
        let fs = TestFs::new(kind);
        let file = File::create_new(fs.at("file")).unwrap();
        file.write_all_at(&[7; 10_000], 0).unwrap();
        reserve(file.as_fd(), 10_000, 8 * MIB).unwrap();
        syncfs(file.as_fd()).unwrap();
        let before = stat_of(file.as_fd()).unwrap();
        assert!(before.blocks * 512 > 8 * MIB, "{kind}: {before:?}");
        punch_all(file.as_fd(), before.size).unwrap();
        syncfs(file.as_fd()).unwrap();
        let after = stat_of(file.as_fd()).unwrap();
        assert_eq!((after.blocks, after.size), (0, 10_000), "{kind}");
    }
}

/// A shared writable mapping of a file's first page.
struct Mapping(*mut u8);

impl Mapping {
    fn of(file: &File) -> Self {
        // SAFETY: a new mapping of a live descriptor at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at.cast())
    }

    fn store(&self, value: u8) {
        // SAFETY: the page is mapped writable until the drop, and the file is longer than it.
        unsafe { self.0.write_volatile(value) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what `of` mapped.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

#[test]
fn stores_through_a_mapping_show_after_a_flush() {
    ignore_sigio().unwrap();
    for kind in KINDS {
        let fs = TestFs::new(kind);
        fs::write(fs.at("file"), vec![0; 8192]).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(fs.at("file"))
            .unwrap();
        let reader = File::open(fs.at("file")).unwrap();
        let mapping = Mapping::of(&file);
        drop(file);
        let ctime = || stat_of(reader.as_fd()).unwrap().ctime;
        mapping.store(1);
        let first = ctime();
        mapping.store(2);
        assert_eq!(ctime(), first, "{kind}: a store to a dirty page hides");
        flush_range(reader.as_fd(), 0, 0).unwrap();
        let flushed = ctime();
        mapping.store(3);
        assert!(
            ctime() > flushed,
            "{kind}: the first store after a flush shows"
        );
        assert!(
            !nobody_writes(reader.as_fd()).unwrap(),
            "{kind}: mapped, though closed"
        );
        drop(mapping);
        assert!(nobody_writes(reader.as_fd()).unwrap(), "{kind}");
    }
}

#[test]
fn reading_leaves_the_page_cache_as_it_was() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let size = 6 * MIB + 1234;
        fs::write(fs.at("file"), vec![5; usize::try_from(size).unwrap()]).unwrap();
        let mut file = File::open(fs.at("file")).unwrap();
        file.sync_all().unwrap();
        let pages = size.div_ceil(4096);
        let cached = |file: &File| {
            let pages = cached_pages(file.as_fd(), 0, size).unwrap();
            assert_eq!(mincore(file.as_fd(), 0, size).unwrap(), pages, "both ways");
            pages.unwrap()
        };
        let read_all = |file: &mut File| {
            let mut sink = Vec::new();
            std::io::Seek::rewind(file).unwrap();
            file.read_to_end(&mut sink).unwrap();
        };
        read_all(&mut file);
        let warm = CacheState::of(file.as_fd(), size);
        assert_eq!(warm, CacheState::Warm, "{kind}");
        warm.restore(file.as_fd()).unwrap();
        assert_eq!(cached(&file), pages);

        crate::sys::pagecache::drop_cached(file.as_fd(), 0, 0).unwrap();
        let cold = CacheState::of(file.as_fd(), size);
        assert_eq!(cold, CacheState::Cold, "{kind}");
        read_all(&mut file);
        cold.restore(file.as_fd()).unwrap();
        assert_eq!(cached(&file), 0, "{kind}");

        // One piece in the middle is in use.
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM;
        nix::fcntl::posix_fadvise(file.as_fd(), 0, 0, advice).unwrap();
        read_at(file.as_fd(), &mut [0; 4096], 3 * MIB).unwrap();
        let before = cached(&file);
        assert!(before > 0 && before < 256, "{kind} {before}");
        let mixed = CacheState::of(file.as_fd(), size);
        assert_eq!(
            mixed,
            CacheState::Mixed(vec![false, false, false, true, false, false, false]),
            "{kind}"
        );
        read_all(&mut file);
        mixed.restore(file.as_fd()).unwrap();
        assert_eq!(cached(&file), 256, "{kind}: its MiB stays");
    }
}
