//! Stubs: a tree of all names whose content stays in the log.
//!
//! Each regular file that has data becomes a sparse file of its size with the mark of
//! [`tierfs::stub`]. Without the daemon such a file reads as zeros, so it may lie only on a filesystem of
//! its own, which nobody uses before the daemon exposes it ([`check_target`]).
//!
//! Nothing but transactions is read for it. One thread asks the catalog, in the order of the tree; the
//! workers make files, a batch of one directory at a time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};
use tierfs::catalog::{InodeRow, Listed, Queries};
use tierfs::ids::{FileId, LogId};
use tierfs::record::{Bits, Kind};
use tierfs::stub::{self, DiskMark, StubMark, XATTR};

use crate::dirs::{Dir, DirNames};
use crate::error::Error;
use crate::materialise::make_without_data;
use crate::report::Stage;
use crate::scope::Scope;
use crate::sys::{self, Inode};
use crate::target::{Head, Target};

/// Entries that are asked for, and made, at once.
const BATCH: usize = 512;
/// Batches that wait for a worker.
const QUEUE: usize = 8;
/// What the daemon can watch.
const FILESYSTEMS: [&str; 3] = ["ext4", "xfs", "btrfs"];

/// The mark of a file whose inode has this handle. `None` for one that never had content.
pub fn mark(log_id: LogId, inode: &InodeRow, handle: Vec<u8>) -> Option<StubMark> {
    Some(StubMark {
        log_id,
        file: inode.file,
        version: inode.content_lsn?,
        size: inode.size,
        mtime: inode.mtime,
        handle,
        stage: stub::Stage::Rests,
        seals: Bits(0),
        capability: None,
    })
}

/// Says of a file that its content lies in the log only.
pub fn set_mark(log_id: LogId, inode: &InodeRow, fd: &OwnedFd) -> io::Result<()> {
    let mark = mark(log_id, inode, sys::handle(fd)?)
        .ok_or_else(|| io::Error::other("the log does not say which version it is"))?;
    Inode::Open(fd.as_fd()).set_xattr(XATTR.as_bytes(), &mark.to_bytes())
}

/// Says of a disk that stubs lie on it: a daemon that cannot guard them refuses it. No list of stubs has
/// this generation.
fn mark_disk(log_id: LogId, root: &OwnedFd) -> io::Result<()> {
    let mark = DiskMark {
        generation: log_id.0,
    };
    Inode::Open(root.as_fd()).set_xattr(XATTR.as_bytes(), &mark.to_bytes())
}

/// No stubs are left of an earlier run, or of what was there before.
pub fn unmark_disk(root: &OwnedFd) -> io::Result<()> {
    let root = Inode::Open(root.as_fd());
    match root.xattrs_and_mark()? {
        (_, Some(_)) => root.remove_xattr(XATTR.as_bytes()),
        _ => Ok(()),
    }
}

/// Whether stubs may be made below `path`: the root of a filesystem that the daemon can take over whole.
/// Nothing is changed.
pub fn check_target(path: &Path) -> Result<(), Error> {
    let refuse = |why: String| Error::NoStubs {
        path: path.to_owned(),
        why,
    };
    let own = "make an ext4, xfs or btrfs filesystem on a disk of its own, mount it, and name its mount point";
    let root = match sys::open_root(path) {
        Ok(root) => root,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(refuse(format!("there is no such directory: {own}")));
        }
        Err(error) => return Err(Error::target(path, "opening the directory", error)),
    };
    let examining = |error| Error::target(path, "examining", error);
    let attributes = sys::attributes(&root).map_err(examining)?;
    if !attributes.is_mount_root {
        return Err(refuse(format!(
            "it is a directory of a filesystem and not its root. Stubs read as zeros until hsmd exposes the filesystem, so it must be one that nobody uses: {own}"
        )));
    }
    let mount = sys::mount(attributes.mount_id).map_err(examining)?;
    if let Some(mount) = mount {
        if !FILESYSTEMS.contains(&mount.fs_type.as_str()) {
            return Err(refuse(format!(
                "it is {}, which hsmd cannot watch: {own}",
                mount.fs_type
            )));
        }
        if mount.root != "/" {
            return Err(refuse(format!(
                "only {} of that filesystem is mounted there, and hsmd takes over whole ones: mount all of it (btrfs: with -o subvolid=5)",
                mount.root
            )));
        }
    }
    try_to_mark(&root).map_err(refuse)
}

/// Tries on a file without a name what a stub needs.
fn try_to_mark(root: &OwnedFd) -> Result<(), String> {
    const TRIED: tierfs::Time = tierfs::Time {
        seconds: 1_000_000_000,
        nanos: 123_456_789,
    };
    let told = |doing: &str| {
        let doing = doing.to_owned();
        move |error: io::Error| {
            let advice = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => " (run replay as root)",
                Some(libc::EROFS) => " (mount it writable)",
                Some(libc::EOPNOTSUPP) => " (this filesystem has no such thing)",
                _ => "",
            };
            format!("{doing}: {error}{advice}")
        }
    };
    let file = sys::create_unnamed(root).map_err(told("making a file there"))?;
    let handle = sys::handle(&file).map_err(told("asking for the handle of a file there"))?;
    Inode::Open(file.as_fd())
        .set_xattr(XATTR.as_bytes(), &handle)
        .map_err(told("setting the extended attribute trusted.hsm there"))?;
    sys::set_mtime(&file, TRIED).map_err(told("setting the time of a file there"))?;
    let stat = sys::stat(&file).map_err(told("examining a file there"))?;
    if (stat.st_mtime, stat.st_mtime_nsec) == (TRIED.seconds, i64::from(TRIED.nanos)) {
        return Ok(());
    }
    Err("it does not keep the nanoseconds of times (ext4 with inodes of 128 bytes), which hsmd refuses: make the filesystem with larger inodes (mkfs.ext4 -I 256)".to_owned())
}

/// What was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Made {
    /// Files of all kinds, each counted once whatever its names; directories are not among them.
    pub files: u64,
    /// Those of them that are stubs.
    pub stubs: u64,
    /// Bytes of their sizes.
    pub bytes: u64,
}

/// The work of making all names.
pub struct Names<'a, 'f> {
    /// The catalog, folded to the target moment.
    pub queries: Queries<'a>,
    /// All of the tree.
    pub scope: &'a Scope,
    /// Where it goes.
    pub target: &'a Target<'f>,
    /// The log that keeps the content.
    pub log_id: LogId,
    /// How many workers.
    pub workers: usize,
}

/// A file to be made, and whether it has data.
type Job = (Head, bool);

/// What all threads share.
struct Shared<'a, 'f> {
    target: &'a Target<'f>,
    log_id: LogId,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    files: AtomicU64,
    stubs: AtomicU64,
    bytes: AtomicU64,
}

impl Names<'_, '_> {
    /// Makes all directories and every file.
    pub fn run(&self, dirs: &mut DirNames) -> Result<Made, Error> {
        let watch = self.target.found().watch();
        watch.begin(Stage::Names, Some(self.queries.counts()?.dentries));
        mark_disk(self.log_id, self.target.dirs.root())
            .map_err(|error| Error::target(".", "marking the root directory", error))?;
        let shared = Shared {
            target: self.target,
            log_id: self.log_id,
            failed: AtomicBool::new(false),
            failure: Mutex::default(),
            files: AtomicU64::new(0),
            stubs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        let asked = std::thread::scope(|threads| {
            let (to_make, jobs) = bounded::<Vec<Job>>(QUEUE);
            let workers: Vec<_> = (0..self.workers.max(1))
                .map(|_| {
                    let (shared, jobs) = (&shared, jobs.clone());
                    threads.spawn(move || shared.work(&jobs))
                })
                .collect();
            drop(jobs);
            let asked = self.ask(dirs, &shared, &to_make);
            drop(to_make);
            let worked = workers.into_iter().all(|worker| worker.join().is_ok());
            asked.and(if worked { Ok(()) } else { Err(Error::Worker) })
        });
        // What a worker says is the cause of what the asking thread met.
        let failure = shared.failure.into_inner();
        if let Some(error) = failure.unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        asked?;
        Ok(Made {
            files: shared.files.into_inner(),
            stubs: shared.stubs.into_inner(),
            bytes: shared.bytes.into_inner(),
        })
    }

    /// Walks the tree, depth first; makes directories, and hands everything else to the workers.
    fn ask(
        &self,
        dirs: &mut DirNames,
        shared: &Shared<'_, '_>,
        to_make: &Sender<Vec<Job>>,
    ) -> Result<(), Error> {
        // Files with several names wait until all directories are there.
        let mut later: Vec<FileId> = Vec::new();
        // Directories that are made, and the last name of each that was asked for.
        let mut open: Vec<(Arc<Dir>, Vec<u8>)> = vec![(dirs.root().clone(), Vec::new())];
        while let Some((dir, after)) = open.pop() {
            let rows = self.queries.listing(dir.file, Some(&after), BATCH)?;
            if rows.len() == BATCH
                && let Some(last) = rows.last()
            {
                open.push((dir.clone(), last.name.clone()));
            }
            let mut jobs = Vec::with_capacity(rows.len());
            for row in rows {
                if row.inode.kind == Kind::Directory {
                    self.target.found().watch().advance(1);
                    if self.target.make_dir(&dir, &row.name)? {
                        let below = dir.child(row.inode.file, row.name, self.scope);
                        open.push((below, Vec::new()));
                    }
                } else if row.has_others {
                    later.push(row.inode.file);
                } else {
                    jobs.push(alone(&dir, row));
                }
            }
            shared.send(to_make, jobs)?;
        }
        // Each of them was met once for each of its names.
        later.sort_unstable();
        later.dedup();
        for files in later.chunks(BATCH) {
            let mut jobs = Vec::with_capacity(files.len());
            for file in files {
                let head = Head::load(self.queries, dirs, self.scope, *file)?;
                let has_data = self.queries.content_bytes(*file)? > 0;
                jobs.extend(head.map(|head| (head, has_data)));
            }
            shared.send(to_make, jobs)?;
        }
        Ok(())
    }
}

/// A file with one name.
fn alone(dir: &Arc<Dir>, row: Listed) -> Job {
    let head = Head {
        inode: row.inode,
        xattrs: row.xattrs,
        names: vec![(dir.clone(), row.name)],
    };
    (head, row.has_data)
}

impl Shared<'_, '_> {
    fn send(&self, to_make: &Sender<Vec<Job>>, jobs: Vec<Job>) -> Result<(), Error> {
        if self.target.found().watch().stop() {
            return Err(Error::Interrupted);
        }
        if self.failed.load(Ordering::Relaxed) {
            return Err(Error::Worker);
        }
        if jobs.is_empty() {
            return Ok(());
        }
        to_make.send(jobs).map_err(|_| Error::Worker)
    }

    fn work(&self, jobs: &Receiver<Vec<Job>>) {
        for batch in jobs {
            // After a failure the queue is emptied, so that nobody waits.
            if self.failed.load(Ordering::Relaxed) {
                continue;
            }
            if let Err(error) = self.make(&batch) {
                self.failed.store(true, Ordering::Relaxed);
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
            }
        }
    }

    fn make(&self, batch: &[Job]) -> Result<(), Error> {
        let (mut stubs, mut bytes, mut names) = (0, 0, 0);
        for (head, has_data) in batch {
            names += head.names.len() as u64;
            if *has_data && head.inode.kind == Kind::Regular {
                if self.target.make_stub(head, self.log_id)? {
                    stubs += 1;
                    bytes += head.inode.size;
                }
            } else {
                make_without_data(self.target, head)?;
            }
        }
        self.files.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.stubs.fetch_add(stubs, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.target.found().watch().advance(names);
        Ok(())
    }
}
