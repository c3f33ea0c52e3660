//! The filesystem that is written: entries made, filled and finished below its root.
//!
//! A file gets its attributes when its content is complete, in the order in which they survive:
//! further names, owner, mode, extended attributes (capabilities go with a change of owner), mtime,
//! chattr flags. What the target refuses is a loss, reported by name; a full or failing disk ends
//! the replay, which can be continued.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;
use tierfs::FileId;
use tierfs::Time;
use tierfs::catalog::{self, InodeRow, Queries};
use tierfs::ids::LogId;
use tierfs::record::{Kind, UNRESTORABLE_FSCRYPT, UNRESTORABLE_UNREADABLE, UNRESTORABLE_VERITY};
use tierfs::stub::XATTR;

use crate::dirs::{Dir, DirFds, DirNames};
use crate::error::Error;
use crate::report::{Collector, Lost};
use crate::scope::Scope;
use crate::stubs;
use crate::sys::{self, Inode};

/// Everything about a file but its content.
pub struct Head {
    /// Attributes.
    pub inode: InodeRow,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The wanted names, at least one.
    pub names: Vec<(Arc<Dir>, Vec<u8>)>,
}

impl Head {
    /// Reads it from the catalog; `None` for a file without a wanted name.
    pub fn load(
        queries: Queries<'_>,
        dirs: &mut DirNames,
        scope: &Scope,
        file: FileId,
    ) -> Result<Option<Self>, catalog::Error> {
        let mut names = Vec::new();
        for (parent, name) in queries.names_of(file)? {
            if let Some(dir) = dirs.find(queries, scope, parent)?
                && scope.wants(&dir, &name)
            {
                names.push((dir, name));
            }
        }
        let Some(inode) = queries.inode(file)?.filter(|_| !names.is_empty()) else {
            return Ok(None);
        };
        Ok(Some(Self {
            inode,
            xattrs: queries.xattrs(file)?,
            names,
        }))
    }

    /// The path of its first name.
    pub fn path(&self) -> Vec<u8> {
        let first = self.names.first();
        first.map_or_else(Vec::new, |(dir, name)| dir.path_of(name))
    }
}

/// The filesystem that is written.
pub struct Target<'f> {
    path: PathBuf,
    /// Descriptors of its directories.
    pub dirs: DirFds,
    found: &'f Collector<'f>,
    /// An earlier run has written here: what is there is replaced.
    resumed: bool,
    /// Who owns what is made here.
    owner: (u32, u32),
}

impl<'f> Target<'f> {
    /// `root` is open, empty or an unfinished replay, and closed to others.
    pub fn new(path: &Path, root: OwnedFd, resumed: bool, found: &'f Collector<'f>) -> Self {
        let max = usize::try_from(sys::raise_open_files() / 4).unwrap_or(64);
        Self {
            path: path.to_owned(),
            dirs: DirFds::new(root, max.clamp(16, 1024)),
            found,
            resumed,
            owner: (
                nix::unistd::geteuid().as_raw(),
                nix::unistd::getegid().as_raw(),
            ),
        }
    }

    /// Who hears of losses.
    pub fn found(&self) -> &'f Collector<'f> {
        self.found
    }

    /// A path on the target, for messages.
    pub fn at(&self, path: &[u8]) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        self.path.join(std::ffi::OsStr::from_bytes(path))
    }

    /// Ends the replay where the disk is full or fails; anything else is noted as `lost`.
    fn fault(
        &self,
        path: Vec<u8>,
        doing: &str,
        error: io::Error,
        lost: impl FnOnce(String) -> Lost,
    ) -> Result<(), Error> {
        const FATAL: [i32; 7] = [
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EIO,
            libc::EROFS,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
        ];
        if error
            .raw_os_error()
            .is_some_and(|errno| FATAL.contains(&errno))
        {
            return Err(Error::target(self.at(&path), doing, error));
        }
        self.found
            .loss(path, lost(format!("{doing}: {}", explain(&error))));
        Ok(())
    }

    fn entry_lost(&self, head: &Head, doing: &str, error: io::Error) -> Result<(), Error> {
        self.fault(head.path(), doing, error, |why| Lost::Entry { why })
    }

    fn attribute_lost(&self, head: &Head, what: &str, error: io::Error) -> Result<(), Error> {
        self.fault(head.path(), "setting it", error, |why| Lost::Attribute {
            what: what.to_owned(),
            why,
        })
    }

    /// Runs `make`; what an earlier run left in the way is removed first.
    fn make<T>(
        &self,
        dir: &OwnedFd,
        name: &[u8],
        make: impl Fn() -> io::Result<T>,
    ) -> io::Result<T> {
        match make() {
            Err(error) if self.resumed && error.kind() == io::ErrorKind::AlreadyExists => {
                remove(dir, name)?;
                make()
            }
            other => other,
        }
    }

    /// Makes the directory, or takes the one that is there from an earlier run (or `lost+found`).
    pub fn make_dir(&self, parent: &Arc<Dir>, name: &[u8]) -> Result<bool, Error> {
        let made = self
            .dirs
            .get(parent)
            .and_then(|fd| match sys::make_dir(&*fd, name) {
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists
                        && (self.resumed || is_lost_and_found(parent, name)) =>
                {
                    close_dir(&sys::open_dir(&*fd, name)?)
                }
                other => other,
            });
        let lost = |why| Lost::Entry { why };
        match made {
            Ok(()) => Ok(true),
            Err(error) => self
                .fault(parent.path_of(name), "making the directory", error, lost)
                .map(|()| false),
        }
    }

    /// Makes the regular file, empty, under its first name. `None` where that is a loss.
    pub fn create(&self, head: &Head) -> Result<Option<OwnedFd>, Error> {
        let Some((dir, name)) = head.names.first() else {
            return Ok(None);
        };
        let created = self
            .dirs
            .get(dir)
            .and_then(|dir| self.make(&dir, name, || sys::create_file(&*dir, name, 0o600)));
        let fd = match created {
            Ok(fd) => fd,
            Err(error) => {
                return self.entry_lost(head, "creating it", error).map(|()| None);
            }
        };
        let storage = head.inode.flags.0 & sys::FLAGS_STORAGE;
        if storage != 0 {
            self.set_flags(head, &fd, storage, sys::FLAGS_STORAGE)?;
        }
        Ok(Some(fd))
    }

    /// Opens the regular file that an earlier run, or an earlier frame of this one, created.
    pub fn reopen(&self, head: &Head) -> Result<Option<OwnedFd>, Error> {
        let Some((dir, name)) = head.names.first() else {
            return Ok(None);
        };
        let opened =
            self.dirs
                .get(dir)
                .and_then(|dir| match sys::open_file(&*dir, name, OFlag::O_RDWR) {
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                        thaw(&sys::open_file(&*dir, name, OFlag::O_RDONLY)?)?;
                        sys::open_file(&*dir, name, OFlag::O_RDWR)
                    }
                    other => other,
                });
        match opened {
            Ok(fd) => Ok(Some(fd)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Vanished {
                path: self.at(&head.path()),
            }),
            Err(error) => self.entry_lost(head, "opening it", error).map(|()| None),
        }
    }

    /// Sets the size of a file that is to be filled; false where the target cannot hold it.
    pub fn resize(&self, head: &Head, fd: &OwnedFd) -> Result<bool, Error> {
        match sys::truncate(fd, head.inode.size) {
            Ok(()) => Ok(true),
            Err(error) => {
                let doing = format!("giving it its size of {} bytes", head.inode.size);
                self.entry_lost(head, &doing, error).map(|()| false)
            }
        }
    }

    /// Writes content; false where that is a loss.
    pub fn write(
        &self,
        head: &Head,
        fd: &OwnedFd,
        bytes: &[u8],
        offset: u64,
    ) -> Result<bool, Error> {
        let Err(error) = sys::write_at(fd, bytes, offset) else {
            return Ok(true);
        };
        let len = bytes.len() as u64;
        self.fault(head.path(), "writing them", error, |why| Lost::Bytes {
            offset,
            len,
            why,
        })?;
        Ok(false)
    }

    /// Makes what is neither a regular file nor a directory, with all its attributes.
    pub fn make_special(&self, head: &Head) -> Result<(), Error> {
        let Some((dir, name)) = head.names.first() else {
            return Ok(());
        };
        let inode = &head.inode;
        let made = self.dirs.get(dir).and_then(|dir| {
            self.make(&dir, name, || match inode.kind {
                Kind::Symlink => {
                    sys::make_symlink(&*dir, name, inode.target.as_deref().unwrap_or_default())
                }
                kind => sys::make_node(&*dir, name, kind, inode.rdev),
            })?;
            Ok((sys::open_path(&*dir, name)?, dir))
        });
        let (node, dir) = match made {
            Ok(made) => made,
            Err(error) => return self.entry_lost(head, making(inode.kind), error),
        };
        self.link_names(head)?;
        if (inode.uid, inode.gid) != self.owner
            && let Err(error) =
                checked_owner(inode).and_then(|()| sys::chown_at(&*dir, name, inode.uid, inode.gid))
        {
            self.attribute_lost(head, "owner", error)?;
        }
        if inode.kind != Kind::Symlink
            && let Err(error) = sys::chmod_at(&*dir, name, inode.mode)
        {
            self.attribute_lost(head, "mode", error)?;
        }
        self.set_xattrs(head, &Inode::Named(node.as_fd()))?;
        if let Err(error) =
            checked_time(inode.mtime).and_then(|mtime| sys::set_mtime_at(&*dir, name, mtime))
        {
            self.attribute_lost(head, "mtime", error)?;
        }
        self.note(head);
        Ok(())
    }

    /// Makes a regular file whose content stays in the log, with all its attributes; false where that is
    /// a loss.
    pub fn make_stub(&self, head: &Head, log_id: LogId) -> Result<bool, Error> {
        let Some(fd) = self.create(head)? else {
            return Ok(false);
        };
        // Before the size: there is no moment in which it is a file of zeros that nothing tells.
        stubs::set_mark(log_id, &head.inode, &fd).map_err(|error| {
            Error::target(self.at(&head.path()), "setting the stub mark of", error)
        })?;
        if !self.resize(head, &fd)? {
            return Ok(false);
        }
        self.finish(head, &fd)?;
        Ok(true)
    }

    /// Gives a regular file that has its content everything else.
    pub fn finish(&self, head: &Head, fd: &OwnedFd) -> Result<(), Error> {
        self.link_names(head)?;
        self.set_attributes(head, fd)?;
        let rest = sys::FLAGS_LOGGED & !sys::FLAGS_STORAGE;
        if head.inode.flags.0 & rest != 0 {
            self.set_flags(head, fd, head.inode.flags.0, rest)?;
        }
        self.note(head);
        Ok(())
    }

    /// Gives a directory, in which nothing is made any more, its attributes.
    pub fn finish_dir(&self, head: &Head, fd: &OwnedFd) -> Result<(), Error> {
        self.thaw_resumed(head, fd)?;
        self.set_attributes(head, fd)?;
        self.freeze_dir(head, fd)
    }

    /// Gives the root its attributes, and lets `remove` take away what makes the replay unfinished. Who
    /// is killed in between leaves a root that lacks its modification time and chattr flags only.
    pub fn finish_root(
        &self,
        head: &Head,
        fd: &OwnedFd,
        remove: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.thaw_resumed(head, fd)?;
        self.set_attributes(head, fd)?;
        remove()?;
        if let Err(error) =
            checked_time(head.inode.mtime).and_then(|mtime| sys::set_mtime(fd, mtime))
        {
            self.attribute_lost(head, "mtime", error)?;
        }
        self.freeze_dir(head, fd)
    }

    /// An earlier run may have frozen it.
    fn thaw_resumed(&self, head: &Head, fd: &OwnedFd) -> Result<(), Error> {
        if self.resumed
            && let Err(error) = thaw(fd)
        {
            self.attribute_lost(head, "chattr flags", error)?;
        }
        Ok(())
    }

    fn freeze_dir(&self, head: &Head, fd: &OwnedFd) -> Result<(), Error> {
        if head.inode.flags.0 != 0 {
            self.set_flags(head, fd, head.inode.flags.0, sys::FLAGS_LOGGED)?;
        }
        self.note(head);
        Ok(())
    }

    fn set_attributes(&self, head: &Head, fd: &OwnedFd) -> Result<(), Error> {
        let inode = &head.inode;
        if (inode.uid, inode.gid) != self.owner
            && let Err(error) =
                checked_owner(inode).and_then(|()| sys::chown(fd, inode.uid, inode.gid))
        {
            self.attribute_lost(head, "owner", error)?;
        }
        if let Err(error) = sys::chmod(fd, inode.mode) {
            self.attribute_lost(head, "mode", error)?;
        }
        self.set_xattrs(head, &Inode::Open(fd.as_fd()))?;
        if let Err(error) = checked_time(inode.mtime).and_then(|mtime| sys::set_mtime(fd, mtime)) {
            self.attribute_lost(head, "mtime", error)?;
        }
        Ok(())
    }

    fn set_xattrs(&self, head: &Head, inode: &Inode<'_>) -> Result<(), Error> {
        for (name, value) in &head.xattrs {
            // It is local, never part of the tree, and dangerous where it does not belong.
            let set = if name == XATTR.as_bytes() {
                Err(io::Error::other("a stub mark never belongs into a log"))
            } else {
                inode.set_xattr(name, value)
            };
            if let Err(error) = set {
                let what = format!("extended attribute {}", name.escape_ascii());
                self.attribute_lost(head, &what, error)?;
            }
        }
        Ok(())
    }

    /// Sets flags together, and one by one where the target refuses some of them.
    fn set_flags(&self, head: &Head, fd: &OwnedFd, bits: u32, mask: u32) -> Result<(), Error> {
        if sys::set_flags(fd, bits, mask).is_ok() {
            return Ok(());
        }
        // The freezing ones last: they forbid setting others.
        let single = (0..32)
            .map(|shift| 1_u32 << shift)
            .filter(|bit| bits & mask & bit != 0);
        let (last, first): (Vec<u32>, Vec<u32>) =
            single.partition(|bit| bit & sys::FLAGS_FREEZING != 0);
        for bit in first.into_iter().chain(last) {
            if let Err(error) = sys::set_flags(fd, bit, bit) {
                let what = format!("chattr flag {}", sys::flag_letters(bit));
                self.attribute_lost(head, &what, error)?;
            }
        }
        Ok(())
    }

    fn link_names(&self, head: &Head) -> Result<(), Error> {
        let Some(((first_dir, first), others)) = head.names.split_first() else {
            return Ok(());
        };
        for (dir, name) in others {
            let linked = self.dirs.get(first_dir).and_then(|old_dir| {
                let new_dir = self.dirs.get(dir)?;
                self.make(&new_dir, name, || {
                    sys::link(&*old_dir, first, &*new_dir, name)
                })
            });
            if let Err(error) = linked {
                self.fault(dir.path_of(name), "linking it", error, |why| Lost::Name {
                    why,
                })?;
            }
        }
        Ok(())
    }

    /// Notes what the log says of a file that is not as one would like it.
    fn note(&self, head: &Head) {
        const UNRESTORABLE: [(u32, &str); 3] = [
            (
                UNRESTORABLE_FSCRYPT,
                "it was encrypted by fscrypt, which is not set up again",
            ),
            (
                UNRESTORABLE_VERITY,
                "it was sealed by fs-verity, which is not set up again",
            ),
            (
                UNRESTORABLE_UNREADABLE,
                "it could not be read when it was logged: its content is an older one, or empty",
            ),
        ];
        for (bit, what) in UNRESTORABLE {
            if head.inode.unrestorable.0 & bit != 0 {
                let what = what.to_owned();
                self.found.loss(head.path(), Lost::Unrestorable { what });
            }
        }
        if head.inode.fuzzy {
            self.found.fuzzy(head.path());
        }
    }
}

fn making(kind: Kind) -> &'static str {
    match kind {
        Kind::Symlink => "making the symbolic link",
        Kind::Fifo => "making the FIFO",
        Kind::Socket => "making the socket",
        Kind::CharDevice | Kind::BlockDevice => "making the device",
        Kind::Regular | Kind::Directory => "making it",
    }
}

/// What a person can do about an error, beside its text.
fn explain(error: &io::Error) -> String {
    let advice = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => " (run replay as root)",
        Some(libc::EOPNOTSUPP | libc::ENOTTY) => " (this filesystem has no such thing)",
        Some(libc::EEXIST) => " (the filesystem takes two names of the log for one)",
        Some(libc::EFBIG) => " (files on this filesystem cannot be so large)",
        Some(libc::E2BIG | libc::ERANGE) => " (this filesystem cannot hold so much)",
        _ => "",
    };
    format!("{error}{advice}")
}

fn is_lost_and_found(parent: &Arc<Dir>, name: &[u8]) -> bool {
    parent.file == FileId::ROOT && name == b"lost+found"
}

/// The kernel takes the largest number for "leave it".
fn checked_owner(inode: &InodeRow) -> io::Result<()> {
    if inode.uid == u32::MAX || inode.gid == u32::MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(())
}

/// The kernel takes some numbers of nanoseconds for "now" and "leave it".
fn checked_time(time: Time) -> io::Result<Time> {
    if time.nanos >= 1_000_000_000 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(time)
}

/// Makes a directory its owner's alone, and takes away what forbids changes and what new entries would
/// inherit: an earlier run may have finished it, or whoever made the filesystem's root.
pub fn close_dir(dir: &OwnedFd) -> io::Result<()> {
    if let Some(flags) = sys::flags(dir)?
        && flags & sys::FLAGS_LOGGED != 0
    {
        sys::set_flags(dir, 0, sys::FLAGS_LOGGED)?;
    }
    Inode::Open(dir.as_fd()).remove_xattr(b"system.posix_acl_default")?;
    sys::chmod(dir, 0o700)
}

/// Takes away what forbids changes.
fn thaw(fd: &OwnedFd) -> io::Result<()> {
    match sys::flags(fd)? {
        Some(flags) if flags & sys::FLAGS_FREEZING != 0 => {
            sys::set_flags(fd, 0, sys::FLAGS_FREEZING)
        }
        _ => Ok(()),
    }
}

/// Removes an entry of an earlier run.
fn remove(dir: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match sys::unlink(dir, name) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            thaw(&sys::open_file(dir, name, OFlag::O_RDONLY)?)?;
            sys::unlink(dir, name)
        }
        other => other,
    }
}
