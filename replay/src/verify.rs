//! Comparing a tree with the log: every name, attribute, and piece of content.
//!
//! The tree is only read, and what differs is named. Content is compared by the hashes that the log
//! has of it, so no segment's data is read; a hole of the log must read as zeros. A stub is neither read
//! nor opened (which would make the daemon fetch it): its mark is compared, and it counts as released.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::sys::stat::FileStat;
use tierfs::FileId;
use tierfs::catalog::{Child, InodeRow, Queries};
use tierfs::ids::{Hash, LogId};
use tierfs::record::Kind;
use tierfs::stub::{DiskMark, StubMark};

use crate::dirs::{Dir, DirFds, DirNames};
use crate::error::Error;
use crate::report::{Collector, Lost, Stage};
use crate::scope::Scope;
use crate::state::State;
use crate::stubs;
use crate::sys::{self, Inode};
use crate::tree::{self, Met};

/// What was compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verified {
    /// Entries.
    pub entries: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Stubs with the right mark: their content is in the log only.
    pub released: u64,
    /// Bytes of their sizes.
    pub released_bytes: u64,
}

/// Compares the tree below `to` with the wanted part of what the catalog holds.
pub fn verify(
    to: &Path,
    queries: Queries<'_>,
    scope: &Scope,
    found: &Collector<'_>,
) -> Result<Verified, Error> {
    let root =
        sys::open_root(to).map_err(|error| Error::target(to, "opening the directory", error))?;
    let dirs = DirNames::new(scope);
    let mut work = Work {
        log_id: queries.log_id()?,
        queries,
        scope,
        found,
        fds: DirFds::new(root, 256),
        done: Verified::default(),
        to,
        buf: vec![0; 64 * 1024],
    };
    let watch = found.watch();
    watch.begin(Stage::Verify, Some(queries.counts()?.dentries));
    tree::walk(queries, scope, &dirs, |met| {
        if watch.stop() {
            return Err(Error::Interrupted);
        }
        match met {
            Met::Enter(dir) => {
                watch.advance(1);
                work.directory(dir)
            }
            Met::Leave(_) => Ok(true),
            Met::Entry(dir, child) => {
                watch.advance(1);
                work.entry(dir, child).map(|()| true)
            }
        }
    })?;
    Ok(work.done)
}

struct Work<'v> {
    log_id: LogId,
    queries: Queries<'v>,
    scope: &'v Scope,
    found: &'v Collector<'v>,
    fds: DirFds,
    done: Verified,
    to: &'v Path,
    buf: Vec<u8>,
}

impl Work<'_> {
    fn differs(&self, path: Vec<u8>, how: impl Into<String>) {
        self.found.loss(path, Lost::Differs { how: how.into() });
    }

    fn failed(&self, path: &[u8], doing: &str, error: std::io::Error) -> Error {
        use std::os::unix::ffi::OsStrExt;
        Error::target(
            self.to.join(std::ffi::OsStr::from_bytes(path)),
            doing,
            error,
        )
    }

    /// Compares a directory itself and its list of names; false where it is not there.
    fn directory(&mut self, dir: &Arc<Dir>) -> Result<bool, Error> {
        self.done.entries += 1;
        let fd = match self.fds.get(dir) {
            Ok(fd) => fd,
            Err(error) if is_gone(&error) => {
                self.differs(dir.path(), "is missing, or no directory");
                return Ok(false);
            }
            Err(error) => return Err(self.failed(&dir.path(), "opening", error)),
        };
        let path = dir.path();
        let stat = sys::stat(&*fd).map_err(|error| self.failed(&path, "examining", error))?;
        if let Some(inode) = self.queries.inode(dir.file)? {
            self.attributes(&path, &inode, &stat);
            let mark = self.xattrs(&path, dir.file, &Inode::Open(fd.as_fd()))?;
            // The root directory's is that of the disk.
            let of_disk =
                |mark: &Vec<u8>| dir.file == FileId::ROOT && DiskMark::from_bytes(mark).is_ok();
            if mark.is_some_and(|mark| !of_disk(&mark)) {
                self.differs(path.clone(), "has a stub mark, and is no regular file");
            }
            self.flags(&path, &inode, &fd)?;
        }
        let names = sys::names(&*fd).map_err(|error| self.failed(&path, "listing", error))?;
        self.surplus(dir, names)?;
        Ok(true)
    }

    /// Names that are there and not in the log.
    fn surplus(&mut self, dir: &Arc<Dir>, names: Vec<Vec<u8>>) -> Result<(), Error> {
        let is_root = dir.file == FileId::ROOT;
        for name in names {
            let known = self.queries.lookup(dir.file, &name)?.is_some();
            let wanted = self.scope.wants(dir, &name) || self.scope.way_from(dir) == Some(&name);
            let local = is_root && (name == b"lost+found" || State::is_name(&name));
            if !(known && wanted || local) {
                self.differs(dir.path_of(&name), "is not in the log at that moment");
            }
        }
        Ok(())
    }

    fn entry(&mut self, dir: &Arc<Dir>, child: &Child) -> Result<(), Error> {
        self.done.entries += 1;
        let path = dir.path_of(&child.name);
        let Some(inode) = self.queries.inode(child.file)? else {
            return Ok(());
        };
        let fd = self
            .fds
            .get(dir)
            .map_err(|error| self.failed(&path, "opening", error))?;
        let node = match sys::open_path(&*fd, &child.name) {
            Ok(node) => node,
            Err(error) if is_gone(&error) => {
                self.differs(path, "is missing");
                return Ok(());
            }
            Err(error) => return Err(self.failed(&path, "opening", error)),
        };
        let stat = sys::stat(&node).map_err(|error| self.failed(&path, "examining", error))?;
        if sys::kind_of(&stat) != Some(inode.kind) {
            self.differs(path, format!("is no {:?}", inode.kind));
            return Ok(());
        }
        self.attributes(&path, &inode, &stat);
        let mark = self.xattrs(&path, child.file, &Inode::Named(node.as_fd()))?;
        self.links(&path, child.file, &stat)?;
        if mark.is_some() && inode.kind != Kind::Regular {
            self.differs(path.clone(), "has a stub mark, and is no regular file");
        }
        match inode.kind {
            Kind::Regular => match mark {
                Some(mark) => self.stub(path, &inode, &node, &stat, &mark),
                None => self.regular(&path, &inode, &fd, &child.name, &stat),
            },
            Kind::Symlink => {
                let target = sys::read_link(&*fd, &child.name)
                    .map_err(|error| self.failed(&path, "reading the link", error))?;
                if inode.target.as_ref() != Some(&target) {
                    self.differs(path, "points elsewhere");
                }
                Ok(())
            }
            Kind::CharDevice | Kind::BlockDevice => {
                let logged = inode.rdev.map(|rdev| libc::makedev(rdev.major, rdev.minor));
                if logged != Some(stat.st_rdev) {
                    self.differs(path, "is another device");
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn attributes(&self, path: &[u8], inode: &InodeRow, stat: &FileStat) {
        let mode = stat.st_mode & 0o7777;
        if inode.kind != Kind::Symlink && mode != inode.mode {
            self.differs(
                path.to_vec(),
                format!("mode is {mode:04o}, logged {:04o}", inode.mode),
            );
        }
        if (stat.st_uid, stat.st_gid) != (inode.uid, inode.gid) {
            let how = format!(
                "owner is {}:{}, logged {}:{}",
                stat.st_uid, stat.st_gid, inode.uid, inode.gid
            );
            self.differs(path.to_vec(), how);
        }
        if (stat.st_mtime, stat.st_mtime_nsec) != (inode.mtime.seconds, inode.mtime.nanos.into()) {
            let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
            let there = tierfs::Time {
                seconds: stat.st_mtime,
                nanos,
            };
            let how = format!(
                "mtime is {}, logged {}",
                crate::moment::rfc3339(there),
                crate::moment::rfc3339(inode.mtime)
            );
            self.differs(path.to_vec(), how);
        }
    }

    /// Compares the extended attributes; gives the stub mark, which is none of the log's.
    fn xattrs(
        &self,
        path: &[u8],
        file: FileId,
        node: &Inode<'_>,
    ) -> Result<Option<Vec<u8>>, Error> {
        let (there, mark) = node
            .xattrs_and_mark()
            .map_err(|error| self.failed(path, "reading extended attributes of", error))?;
        let logged = self.queries.xattrs(file)?;
        for (name, value) in &logged {
            match there.iter().find(|(found, _)| found == name) {
                Some((_, found)) if found == value => {}
                Some(_) => {
                    let how = format!("extended attribute {} differs", name.escape_ascii());
                    self.differs(path.to_vec(), how);
                }
                None => {
                    let how = format!("extended attribute {} is missing", name.escape_ascii());
                    self.differs(path.to_vec(), how);
                }
            }
        }
        for (name, _) in &there {
            if !logged.iter().any(|(known, _)| known == name) {
                let how = format!(
                    "extended attribute {} is not in the log",
                    name.escape_ascii()
                );
                self.differs(path.to_vec(), how);
            }
        }
        Ok(mark)
    }

    fn flags(&self, path: &[u8], inode: &InodeRow, fd: &OwnedFd) -> Result<(), Error> {
        let there = sys::flags(fd).map_err(|error| self.failed(path, "reading flags of", error))?;
        self.compare_flags(path, there.unwrap_or(0) & sys::FLAGS_LOGGED, inode.flags.0);
        Ok(())
    }

    fn compare_flags(&self, path: &[u8], there: u32, logged: u32) {
        if there != logged {
            let how = format!(
                "chattr flags are {:?}, logged {:?}",
                sys::flag_letters(there),
                sys::flag_letters(logged)
            );
            self.differs(path.to_vec(), how);
        }
    }

    /// A file whose content the log keeps: what can be known of it without opening it.
    fn stub(
        &mut self,
        path: Vec<u8>,
        inode: &InodeRow,
        node: &OwnedFd,
        stat: &FileStat,
        mark: &[u8],
    ) -> Result<(), Error> {
        let attributes =
            sys::attributes(node).map_err(|error| self.failed(&path, "examining", error))?;
        let known = attributes.known & sys::FLAGS_LOGGED;
        self.compare_flags(&path, attributes.flags & known, inode.flags.0 & known);
        let handle = sys::handle(node)
            .map_err(|error| self.failed(&path, "asking for the handle of", error))?;
        let mut wrong = wrong_mark(self.log_id, inode, handle, mark);
        if u64::try_from(stat.st_size).ok() != Some(inode.size) {
            wrong.push(format!(
                "it is {} bytes long, logged {}",
                stat.st_size, inode.size
            ));
        }
        if wrong.is_empty() {
            self.done.released += 1;
            self.done.released_bytes += inode.size;
        } else {
            let how = format!(
                "is a stub that does not match the log: {}",
                wrong.join("; ")
            );
            self.differs(path, how);
        }
        Ok(())
    }

    /// The names of a file in the wanted part must be names of one inode.
    fn links(&mut self, path: &[u8], file: FileId, stat: &FileStat) -> Result<(), Error> {
        let names = self.queries.names_of(file)?;
        if names.len() < 2 {
            return Ok(());
        }
        let mut inodes = BTreeSet::from([(stat.st_dev, stat.st_ino)]);
        let mut dirs = DirNames::new(self.scope);
        for (parent, name) in names {
            if let Some(dir) = dirs.find(self.queries, self.scope, parent)?
                && self.scope.wants(&dir, &name)
                && let Ok(fd) = self.fds.get(&dir)
                && let Ok(other) = sys::stat_at(&*fd, &name)
            {
                inodes.insert((other.st_dev, other.st_ino));
            }
        }
        if inodes.len() > 1 {
            self.differs(path.to_vec(), "is not the same file as its other names");
        }
        Ok(())
    }

    fn regular(
        &mut self,
        path: &[u8],
        inode: &InodeRow,
        dir: &OwnedFd,
        name: &[u8],
        stat: &FileStat,
    ) -> Result<(), Error> {
        let file = sys::open_file(dir, name, OFlag::O_RDONLY | OFlag::O_NOATIME)
            .or_else(|_| sys::open_file(dir, name, OFlag::O_RDONLY))
            .map_err(|error| self.failed(path, "opening", error))?;
        self.flags(path, inode, &file)?;
        if u64::try_from(stat.st_size).ok() != Some(inode.size) {
            let how = format!("is {} bytes long, logged {}", stat.st_size, inode.size);
            self.differs(path.to_vec(), how);
            return Ok(());
        }
        let mut at = 0;
        for piece in self.queries.pieces(inode.file, 0) {
            let (range, hash) = piece?;
            if !self.zeros(path, &file, at, range.offset)?
                || !self.piece(path, &file, range, hash)?
            {
                return Ok(());
            }
            at = range.end();
        }
        self.zeros(path, &file, at, inode.size)?;
        Ok(())
    }

    fn piece(
        &mut self,
        path: &[u8],
        file: &OwnedFd,
        range: tierfs::layout::Range,
        hash: Hash,
    ) -> Result<bool, Error> {
        let len = usize::try_from(range.len).unwrap_or(0).min(self.buf.len());
        let read = sys::read_at(file, &mut self.buf[..len], range.offset)
            .map_err(|error| self.failed(path, "reading", error))?;
        self.done.bytes += range.len;
        if read as u64 == range.len && Hash::of(&self.buf[..len]) == hash {
            return Ok(true);
        }
        self.differs(
            path.to_vec(),
            format!("content differs at byte {}", range.offset),
        );
        Ok(false)
    }

    /// A hole of the log: there is a hole, or zeros.
    fn zeros(&mut self, path: &[u8], file: &OwnedFd, start: u64, end: u64) -> Result<bool, Error> {
        let mut at = start;
        while at < end {
            let data = sys::seek_data(file, at);
            match data.map_err(|error| self.failed(path, "looking for data in", error))? {
                Some(data) if data < end => at = data,
                _ => return Ok(true),
            }
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let len = left.min(self.buf.len());
            let read = sys::read_at(file, &mut self.buf[..len], at)
                .map_err(|error| self.failed(path, "reading", error))?;
            if read == 0 {
                return Ok(true);
            }
            if let Some(first) = self.buf[..read].iter().position(|byte| *byte != 0) {
                let how = format!("has data at byte {}, logged is a hole", at + first as u64);
                self.differs(path.to_vec(), how);
                return Ok(false);
            }
            at += read as u64;
        }
        Ok(true)
    }
}

/// What of a stub mark is not as it must be on this inode.
fn wrong_mark(log_id: LogId, inode: &InodeRow, handle: Vec<u8>, bytes: &[u8]) -> Vec<String> {
    let found = match StubMark::from_bytes(bytes) {
        Ok(found) => found,
        Err(error) => return vec![format!("its mark cannot be read: {error}")],
    };
    let Some(expected) = stubs::mark(log_id, inode, handle) else {
        return vec!["the log has no content of it".to_owned()];
    };
    let mut wrong = Vec::new();
    let mut tell = |differs: bool, what: String| {
        if differs {
            wrong.push(what);
        }
    };
    tell(
        found.log_id != expected.log_id,
        format!("its mark is of log {}", found.log_id),
    );
    tell(
        found.file != expected.file,
        format!("its mark is of file {}, not {}", found.file, expected.file),
    );
    tell(
        found.handle != expected.handle,
        "its mark belongs to another inode".to_owned(),
    );
    tell(
        found.version != expected.version,
        format!(
            "its mark is of the version of transaction {}, not {}",
            found.version, expected.version
        ),
    );
    tell(
        found.size != expected.size,
        format!(
            "its mark says {} bytes, the log {}",
            found.size, expected.size
        ),
    );
    let time = crate::moment::rfc3339;
    tell(
        found.mtime != expected.mtime,
        format!(
            "its mark says mtime {}, the log {}",
            time(found.mtime),
            time(expected.mtime)
        ),
    );
    wrong
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
    )
}
