//! One thread's view: its random numbers, the names it chooses from, what it holds open.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, RngExt};

use crate::sys::SharedMap;

const FILE_NAMES: u64 = 24;
const DIRECTORY_NAMES: u64 = 6;
const DEPTH: usize = 5;
/// Where files end, most of them.
pub(super) const FILE_BYTES: u64 = 700_000;

pub(super) struct Worker {
    pub(super) root: PathBuf,
    pub(super) number: u64,
    random: StdRng,
    /// Open files that are written to now and then.
    pub(super) open: VecDeque<File>,
    /// Mapped files with their lengths. Only this thread knows their names, or a truncation by
    /// another would kill the process.
    pub(super) maps: VecDeque<(SharedMap, usize)>,
}

impl Worker {
    pub(super) fn new(root: PathBuf, number: u64, random: StdRng) -> Self {
        Self {
            root,
            number,
            random,
            open: VecDeque::new(),
            maps: VecDeque::new(),
        }
    }

    /// A number from 0 to `end - 1`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.random.random_range(0..end)
    }

    /// A length from 1 to `max`, the small ones as likely as the large ones.
    pub(super) fn length(&mut self, max: u64) -> u64 {
        let bits = u64::from(max.ilog2()) + 1;
        let bound = 1u64 << self.below(bits);
        1 + self.below(bound).min(max - 1)
    }

    /// Whether the filesystem has much space left. Where it has not, stores to a mapped hole would
    /// kill the process.
    pub(super) fn has_room(&self) -> bool {
        nix::sys::statvfs::statvfs(&self.root)
            .is_ok_and(|fs| fs.blocks_available() > fs.blocks() / 3)
    }

    pub(super) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).expect("a small number")];
        // Half of them compress.
        if self.below(2) == 0 {
            self.random.fill_bytes(&mut bytes);
        } else {
            let byte = self.below(256).to_le_bytes()[0];
            bytes.fill(byte);
        }
        bytes
    }

    /// A directory that exists, often a deep one.
    pub(super) fn directory(&mut self) -> PathBuf {
        let mut at = self.root.clone();
        for _ in 0..DEPTH {
            if self.below(3) == 0 {
                break;
            }
            let below = at.join(self.directory_name());
            if below.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                at = below;
            }
        }
        at
    }

    /// Mostly a file's; exchanges give files the names of directories.
    pub(super) fn file_name(&mut self) -> String {
        self.name(9)
    }

    /// Mostly a directory's.
    pub(super) fn directory_name(&mut self) -> String {
        self.name(2)
    }

    fn name(&mut self, tenths_of_files: u64) -> String {
        if self.below(10) < tenths_of_files {
            format!("f{}", self.below(FILE_NAMES))
        } else {
            format!("d{}", self.below(DIRECTORY_NAMES))
        }
    }

    /// Where a file is or could be.
    pub(super) fn file_place(&mut self) -> PathBuf {
        let directory = self.directory();
        directory.join(self.file_name())
    }

    pub(super) fn directory_place(&mut self) -> PathBuf {
        let directory = self.directory();
        directory.join(self.directory_name())
    }

    /// The path of something that exists, of the kind that `wanted` says.
    fn existing(
        &mut self,
        place: fn(&mut Self) -> PathBuf,
        wanted: fn(&fs::Metadata) -> bool,
    ) -> io::Result<PathBuf> {
        for _ in 0..12 {
            let path = place(self);
            if path.symlink_metadata().is_ok_and(|meta| wanted(&meta)) {
                return Ok(path);
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    }

    pub(super) fn regular(&mut self) -> io::Result<PathBuf> {
        self.existing(Self::file_place, fs::Metadata::is_file)
    }

    /// Anything but a directory.
    pub(super) fn leaf(&mut self) -> io::Result<PathBuf> {
        self.existing(Self::file_place, |_| true)
    }

    pub(super) fn some_directory(&mut self) -> io::Result<PathBuf> {
        self.existing(Self::directory_place, fs::Metadata::is_dir)
    }

    /// A file or a directory.
    pub(super) fn something(&mut self) -> io::Result<PathBuf> {
        if self.below(4) == 0 {
            self.some_directory()
        } else {
            self.leaf()
        }
    }
}

/// Opens for reading and writing what is not a symlink, without waiting (for a fifo's other end).
pub(super) fn open(path: &Path) -> io::Result<File> {
    options().open(path)
}

pub(super) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}
