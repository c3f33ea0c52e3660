//! What a replay remembers on the target, so that it can be interrupted and continued.
//!
//! A directory `.hsm-replay` in the target's root holds one small file, replaced by rename. What it
//! says was synced before it was written: everything up to a place in the log is on the disk. The
//! directory goes when the replay is complete.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use tierfs::ids::{LogId, Lsn, SegmentNo};

use crate::report::Findings;
use crate::sys;

const NAME: &str = ".hsm-replay";
const STATE: &str = "state.json";
const FOUND: &str = "state.json.found";
const NEW: &str = "state.json.new";
const FORMAT: u32 = 1;
/// Longer files are none of ours.
const BYTES_MAX: usize = 64 * 1024;
/// Findings of more bytes are not read back.
const FOUND_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// What is restored here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of this log.
    pub log_id: LogId,
    /// As of this transaction.
    pub at: Lsn,
    /// Only this part of the tree.
    pub path: Option<Vec<u8>>,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "log {} as of transaction {}", self.log_id, self.at)?;
        match &self.path {
            Some(path) => write!(f, ", only {}", crate::report::printable(path)),
            None => Ok(()),
        }
    }
}

/// What regular files are restored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Files with their content.
    #[default]
    Whole,
    /// Stubs: the content stays in the log, and the daemon fetches it when a file is opened.
    Stubs,
}

impl Mode {
    /// States of plain replays are as they were before there were stubs.
    #[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
    fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
}

/// How far the target is synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Progress {
    /// Content up to and with this frame (segment, offset); (0, 0) at the beginning.
    Content(u64, u64),
    /// All content; directories get their attributes.
    Directories,
}

impl Progress {
    /// Before the first frame.
    pub const BEGUN: Self = Self::Content(0, 0);

    /// This frame is synced already.
    pub fn holds(self, segment: SegmentNo, offset: u64) -> bool {
        self >= Self::Content(segment.get(), offset)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    log_id: String,
    at: u64,
    /// Bytes as numbers: a path need not be UTF-8.
    path: Option<Vec<u8>>,
    #[serde(default, skip_serializing_if = "Mode::is_whole")]
    mode: Mode,
    progress: Progress,
}

/// The state directory of a replay that is not finished.
#[derive(Debug)]
pub struct State {
    dir: OwnedFd,
    name: String,
    /// What is restored.
    pub identity: Identity,
    /// As what. An earlier program that knows of no stubs does not take up a replay that makes them.
    pub mode: Mode,
    /// How far it is.
    pub progress: Progress,
}

impl State {
    /// True for names that a state directory can have.
    pub fn is_name(name: &[u8]) -> bool {
        name.starts_with(NAME.as_bytes())
    }

    /// Looks for the state of an earlier run among the names in the root.
    pub fn find(root: &OwnedFd, names: &[Vec<u8>]) -> io::Result<Option<Self>> {
        for name in names.iter().filter(|name| Self::is_name(name)) {
            let Ok(dir) = sys::open_dir(root, name) else {
                continue;
            };
            if let Some((identity, stored)) = read(&dir)? {
                let name = String::from_utf8_lossy(name).into_owned();
                return Ok(Some(Self {
                    dir,
                    name,
                    identity,
                    mode: stored.mode,
                    progress: stored.progress,
                }));
            }
        }
        Ok(None)
    }

    /// Begins: makes the directory, under a name that the tree itself does not use (`taken`).
    pub fn create(
        root: &OwnedFd,
        identity: Identity,
        mode: Mode,
        taken: impl Fn(&[u8]) -> bool,
    ) -> io::Result<Self> {
        let candidates =
            std::iter::once(NAME.to_owned()).chain((1..).map(|k| format!("{NAME}~{k}")));
        let name = candidates
            .into_iter()
            .find(|name| !taken(name.as_bytes()))
            .unwrap_or_else(|| NAME.to_owned());
        match sys::make_dir(root, name.as_bytes()) {
            // Left by a run that ended before its first state was written.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut state = Self {
            dir: sys::open_dir(root, name.as_bytes())?,
            name,
            identity,
            mode,
            progress: Progress::BEGUN,
        };
        state.save(Progress::BEGUN)?;
        Ok(state)
    }

    /// Begins anew in another mode: what an earlier run made is made again. Comes before anything is
    /// changed, so that no run takes the one's work for the other's.
    pub fn restart(&mut self, mode: Mode) -> io::Result<()> {
        self.mode = mode;
        self.save(Progress::BEGUN)?;
        // Killed in between, the next run reports these once more: too much rather than too little.
        match sys::unlink(&self.dir, FOUND.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Records that everything up to `progress` was synced.
    pub fn save(&mut self, progress: Progress) -> io::Result<()> {
        let stored = Stored {
            format: FORMAT,
            log_id: self.identity.log_id.to_string(),
            at: self.identity.at.get(),
            path: self.identity.path.clone(),
            mode: self.mode,
            progress,
        };
        self.replace(STATE, &serde_json::to_vec(&stored)?)?;
        self.progress = progress;
        Ok(())
    }

    /// Records what was found up to now; comes before [`Self::save`].
    pub fn save_found(&self, found: &Findings) -> io::Result<()> {
        if found.losses.is_empty() && found.fuzzy.is_empty() {
            return Ok(());
        }
        self.replace(FOUND, &serde_json::to_vec(found)?)
    }

    /// What earlier runs found.
    pub fn found(&self) -> io::Result<Findings> {
        let file = match sys::open_file(&self.dir, FOUND.as_bytes(), OFlag::O_RDONLY) {
            Ok(file) => File::from(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Findings::default());
            }
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(FOUND_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Writes a file durably and renames it into its place.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let flags = OFlag::O_WRONLY
            | OFlag::O_CREAT
            | OFlag::O_TRUNC
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC;
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        let mut file = File::from(nix::fcntl::openat(&self.dir, NEW, flags, mode)?);
        file.write_all(bytes)?;
        file.sync_all()?;
        nix::fcntl::renameat(&self.dir, NEW, &self.dir, name)?;
        nix::unistd::fsync(&self.dir)?;
        Ok(())
    }

    /// Ends: the directory goes.
    pub fn remove(self, root: &OwnedFd) -> io::Result<()> {
        for name in [NEW, FOUND, STATE] {
            match sys::unlink(&self.dir, name.as_bytes()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sys::remove_dir(root, self.name.as_bytes())
    }
}

/// The state in a directory; `None` where there is none that this program wrote.
fn read(dir: &OwnedFd) -> io::Result<Option<(Identity, Stored)>> {
    let file = match sys::open_file(dir, STATE.as_bytes(), OFlag::O_RDONLY) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; BYTES_MAX];
    let len = sys::read_at(&file, &mut bytes, 0)?;
    let Ok(stored) = serde_json::from_slice::<Stored>(&bytes[..len]) else {
        return Ok(None);
    };
    let parsed = stored.log_id.parse().ok().zip(Lsn::new(stored.at));
    let identity = parsed
        .filter(|_| stored.format == FORMAT)
        .map(|(log_id, at)| Identity {
            log_id,
            at,
            path: stored.path.clone(),
        });
    Ok(identity.map(|identity| (identity, stored)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            log_id: LogId([7; 16]),
            at: Lsn::FIRST,
            path: Some(b"a\xff".to_vec()),
        }
    }

    #[test]
    fn what_was_saved_is_found_and_goes() {
        let temp = tempfile::tempdir().unwrap();
        let root = sys::open_root(temp.path()).unwrap();
        let taken = |name: &[u8]| name == b".hsm-replay";
        let mut state = State::create(&root, identity(), Mode::Whole, taken).unwrap();
        assert_eq!(state.name, ".hsm-replay~1");
        state.save(Progress::Content(3, 17)).unwrap();
        let names = sys::names(&root).unwrap();
        let found = State::find(&root, &names).unwrap().unwrap();
        assert_eq!(found.identity, identity());
        assert_eq!(found.progress, Progress::Content(3, 17));
        found.remove(&root).unwrap();
        assert!(sys::names(&root).unwrap().is_empty());
    }

    #[test]
    fn another_mode_begins_anew_and_forgets_what_was_found() {
        use crate::report::{Collector, Lost, Silent};
        let temp = tempfile::tempdir().unwrap();
        let root = sys::open_root(temp.path()).unwrap();
        let mut state = State::create(&root, identity(), Mode::Whole, |_| false).unwrap();
        let found = Collector::new(&Silent);
        let why = "gone".to_owned();
        found.loss(b"x".to_vec(), Lost::Entry { why });
        state.save_found(&found.finish()).unwrap();
        state.save(Progress::Directories).unwrap();
        let stored =
            || std::fs::read_to_string(temp.path().join(".hsm-replay/state.json")).unwrap();
        assert!(
            !stored().contains("mode"),
            "as before there were stubs: {}",
            stored()
        );
        let find = || {
            let names = sys::names(&root).unwrap();
            State::find(&root, &names).unwrap().unwrap()
        };
        assert_eq!(find().found().unwrap().losses.len(), 1);
        state.restart(Mode::Stubs).unwrap();
        let again = find();
        assert_eq!((again.mode, again.progress), (Mode::Stubs, Progress::BEGUN));
        assert!(again.found().unwrap().losses.is_empty());
    }

    #[test]
    fn foreign_files_are_no_state() {
        let temp = tempfile::tempdir().unwrap();
        let root = sys::open_root(temp.path()).unwrap();
        std::fs::create_dir(temp.path().join(".hsm-replay")).unwrap();
        let names = sys::names(&root).unwrap();
        assert!(State::find(&root, &names).unwrap().is_none());
        for text in ["", "{}", "{\"format\":2}"] {
            std::fs::write(temp.path().join(".hsm-replay/state.json"), text).unwrap();
            assert!(State::find(&root, &names).unwrap().is_none());
        }
    }

    #[test]
    fn progress_is_ordered_as_the_log_is() {
        let at = |segment, offset| Progress::Content(segment, offset);
        let segment = |no| SegmentNo::new(no).unwrap();
        assert!(!Progress::BEGUN.holds(segment(1), 0));
        assert!(at(2, 10).holds(segment(2), 10) && at(2, 10).holds(segment(1), 99));
        assert!(!at(2, 10).holds(segment(2), 11));
        assert!(Progress::Directories.holds(segment(9), 9));
    }
}
