//! A replay from the catalog onto an empty directory, in four steps: names, content, directories'
//! attributes, sync. It can be interrupted at any moment and run again.
//!
//! The target's root is closed to others until the end, so nobody sees a half-made tree, and nobody
//! can put a link where a directory is expected.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tierfs::FileId;
use tierfs::catalog::Queries;
use tierfs::ids::LogId;
use tierfs::record::Kind;

use crate::content::Content;
use crate::dirs::{Dir, DirNames};
use crate::error::Error;
use crate::report::{Collector, Stage};
use crate::scope::Scope;
use crate::sources::Sources;
use crate::state::{Identity, Mode, Progress, State};
use crate::stubs;
use crate::sys;
use crate::target::{self, Head, Target};
use crate::tree::{self, Met};

/// How a replay works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads that decompress, check and write.
    pub workers: usize,
    /// How often what is written is synced and recorded.
    pub sync_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            workers: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
            sync_interval: crate::sync::SYNC_INTERVAL,
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Made {
    /// Directories, the root among them.
    pub directories: u64,
    /// Other files that this run finished, each counted once whatever its names.
    pub files: u64,
    /// Frames fetched by this run.
    pub frames: u64,
    /// Bytes of content written by this run.
    pub bytes: u64,
    /// Files of this run whose content stays in the log.
    pub stubs: u64,
    /// The sum of their sizes.
    pub stub_bytes: u64,
    /// An earlier run was continued.
    pub resumed: bool,
}

/// A target directory that may be written.
pub struct Opened {
    path: PathBuf,
    root: OwnedFd,
    state: Option<State>,
}

/// Opens the target: it must be empty (but for `lost+found`), or hold an unfinished replay of the
/// same moment. A directory that does not exist is made, but for stubs. Nothing else is changed.
pub fn open(path: &Path, mode: Mode, identity: Option<&Identity>) -> Result<Opened, Error> {
    let fail = |doing: &str, error: std::io::Error| Error::target(path, doing, error);
    if mode == Mode::Stubs {
        stubs::check_target(path)?;
    }
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(fail("making the directory", error));
        }
        _ => {}
    }
    let root = sys::open_root(path).map_err(|error| fail("opening the directory", error))?;
    let names = sys::names(&root).map_err(|error| fail("listing", error))?;
    let state = State::find(&root, &names).map_err(|error| fail("reading the state in", error))?;
    let opened = |root, state| Opened {
        path: path.to_owned(),
        root,
        state,
    };
    match (&state, identity) {
        (Some(state), Some(asked)) if state.identity != *asked => Err(Error::OtherReplay {
            path: path.to_owned(),
            found: state.identity.to_string(),
            asked: asked.to_string(),
        }),
        (Some(_), _) => Ok(opened(root, state)),
        (None, _) => match names.iter().find(|name| !allowed(&root, name)) {
            Some(name) => Err(Error::NotEmpty {
                path: path.to_owned(),
                found: crate::report::printable(name),
            }),
            None => Ok(opened(root, state)),
        },
    }
}

/// What an empty filesystem may hold: its `lost+found`, and an empty state directory.
fn allowed(root: &OwnedFd, name: &[u8]) -> bool {
    name == b"lost+found"
        || (State::is_name(name)
            && sys::open_dir(root, name)
                .and_then(|dir| sys::names(&dir))
                .is_ok_and(|names| names.iter().all(|name| name.starts_with(b"state.json"))))
}

/// What is written: a folded log.
#[derive(Clone, Copy)]
pub struct Log<'l> {
    /// Where its frames are.
    pub sources: &'l Sources,
    /// The catalog, folded to the moment.
    pub queries: Queries<'l>,
    /// The part that is wanted; all of it for stubs.
    pub scope: &'l Scope,
    /// As what.
    pub mode: Mode,
}

/// Writes the wanted part of the tree that the catalog holds.
pub fn materialise(
    opened: Opened,
    identity: Identity,
    log: Log<'_>,
    options: Options,
    found: &Collector<'_>,
) -> Result<Made, Error> {
    let Log {
        sources,
        queries,
        scope,
        mode,
    } = log;
    let path = &opened.path;
    let fail = |doing: &str, error: std::io::Error| Error::target(path, doing, error);
    target::close_dir(&opened.root).map_err(|error| fail("closing to others", error))?;
    let resumed = opened.state.is_some();
    let mut state = match opened.state {
        Some(mut state) => {
            if state.mode != mode {
                let restarted = state.restart(mode);
                restarted.map_err(|error| fail("recording the replay in", error))?;
                found.warning(begun_otherwise(mode));
            }
            let earlier = state.found();
            found.carry(earlier.map_err(|error| fail("reading the state in", error))?);
            state
        }
        None => State::create(&opened.root, identity, mode, |name| {
            queries
                .lookup(FileId::ROOT, name)
                .is_ok_and(|file| file.is_some())
        })
        .map_err(|error| fail("recording the replay in", error))?,
    };
    let target = Target::new(path, opened.root, resumed, found);
    let mut work = Work {
        queries,
        scope,
        target: &target,
        dirs: DirNames::new(scope),
        made: Made {
            resumed,
            ..Made::default()
        },
    };
    if state.progress < Progress::Directories {
        match mode {
            Mode::Stubs => work.stubs(sources.log_id(), options.workers)?,
            Mode::Whole => work.names()?,
        }
        tracing::debug!(files = work.made.files, "names are made");
    }
    if state.progress < Progress::Directories && mode == Mode::Whole {
        let content = Content {
            sources,
            queries,
            scope,
            target: &target,
            workers: options.workers,
            sync_interval: options.sync_interval,
        };
        let written = content.run(&mut work.dirs, &mut state)?;
        work.made.frames = written.frames;
        work.made.files += written.files;
        work.made.bytes = written.bytes;
        tracing::debug!(written.frames, written.bytes, "content is written");
    }
    if state.progress < Progress::Directories {
        work.sync()?;
        tracing::debug!("content is synced");
        state
            .save_found(&found.so_far())
            .and_then(|()| state.save(Progress::Directories))
            .map_err(|error| fail("recording the replay in", error))?;
    }
    work.finish(state)
}

/// What a run says that does not go on as the one before it began.
fn begun_otherwise(mode: Mode) -> &'static str {
    match mode {
        Mode::Whole => {
            "an earlier run with --stubs has begun here: its stubs are replaced by files with their content"
        }
        Mode::Stubs => {
            "an earlier run without --stubs has begun here: the content that it has restored is replaced by stubs"
        }
    }
}

struct Work<'w, 'f> {
    queries: Queries<'w>,
    scope: &'w Scope,
    target: &'w Target<'f>,
    dirs: DirNames,
    made: Made,
}

impl Work<'_, '_> {
    /// Makes all directories, and every file that has no data.
    fn names(&mut self) -> Result<(), Error> {
        let watch = self.target.found().watch();
        watch.begin(Stage::Names, Some(self.queries.counts()?.dentries));
        // Files with several names wait until all directories are there.
        let mut later = Vec::new();
        let (queries, scope, target) = (self.queries, self.scope, self.target);
        let mut names = DirNames::new(scope);
        let mut others = 0;
        tree::walk(queries, scope, &self.dirs, |met| {
            if watch.stop() {
                return Err(Error::Interrupted);
            }
            match met {
                Met::Enter(dir) => return enter(target, dir, watch),
                Met::Leave(_) => {}
                Met::Entry(_, child) if child.kind == Kind::Regular && child.size > 0 => {
                    watch.advance(1);
                }
                Met::Entry(dir, child) => {
                    watch.advance(1);
                    if let Some(head) = Head::load(queries, &mut names, scope, child.file)? {
                        let first = head.names.first();
                        let is_first = first
                            .is_some_and(|(at, name)| at.file == dir.file && *name == child.name);
                        if head.names.len() == 1 {
                            others += 1;
                            make_without_data(target, &head)?;
                        } else if is_first {
                            later.push(child.file);
                        }
                    }
                }
            }
            Ok(true)
        })?;
        self.made.files += others;
        for file in later {
            self.make_later(file)?;
        }
        let mut after = None;
        loop {
            let hollow = self.queries.hollow(after, 512)?;
            let Some(last) = hollow.last() else {
                return Ok(());
            };
            after = Some(*last);
            for file in hollow {
                self.make_later(file)?;
            }
        }
    }

    /// Makes all directories and all files, those with data as stubs.
    fn stubs(&mut self, log_id: LogId, workers: usize) -> Result<(), Error> {
        let names = stubs::Names {
            queries: self.queries,
            scope: self.scope,
            target: self.target,
            log_id,
            workers,
        };
        let made = names.run(&mut self.dirs)?;
        self.made.files += made.files;
        self.made.stubs = made.stubs;
        self.made.stub_bytes = made.bytes;
        Ok(())
    }

    fn make_later(&mut self, file: FileId) -> Result<(), Error> {
        let head = Head::load(self.queries, &mut self.dirs, self.scope, file)?;
        head.map_or(Ok(()), |head| {
            self.made.files += 1;
            make_without_data(self.target, &head)
        })
    }

    /// Gives all directories their attributes, the inner ones first; then the replay is complete.
    fn finish(mut self, state: State) -> Result<Made, Error> {
        self.target.found().watch().begin(Stage::Directories, None);
        let (queries, target) = (self.queries, self.target);
        let directories = match state.mode {
            Mode::Whole => self.finish_dirs()?,
            Mode::Stubs => self.finish_listed_dirs()?,
        };
        tracing::debug!(directories, "directories are finished");
        self.sync()?;
        let root = self.target.dirs.root().clone();
        let at_root =
            |doing: &'static str| move |error| Error::target(target.at(b""), doing, error);
        if state.mode == Mode::Whole {
            stubs::unmark_disk(&root).map_err(at_root("taking the mark of stubs off"))?;
        }
        let remove = || {
            let removed = state.remove(&root);
            removed.map_err(at_root("removing the state of the replay from"))
        };
        match dir_head(queries, &self.dirs.root().clone())? {
            Some(head) => target.finish_root(&head, &root, remove)?,
            None => remove()?,
        }
        self.sync()?;
        self.made.directories = directories + 1;
        Ok(self.made)
    }

    /// The inner ones first: who is not root may be unable to pass through a finished one.
    fn finish_dirs(&self) -> Result<u64, Error> {
        let watch = self.target.found().watch();
        let mut directories = 0;
        tree::walk(self.queries, self.scope, &self.dirs, |met| {
            if let Met::Leave(dir) = met
                && dir.file != FileId::ROOT
            {
                directories += 1;
                watch.advance(1);
                finish_dir(self.queries, self.target, dir)?;
            }
            Ok(true)
        })?;
        Ok(directories)
    }

    /// In the order of their numbers: nothing but directories is asked for. Stubs are made by root only,
    /// whom no mode of a directory keeps out.
    fn finish_listed_dirs(&mut self) -> Result<u64, Error> {
        let watch = self.target.found().watch();
        let (mut directories, mut after) = (0, Some(FileId::ROOT));
        loop {
            let files = self.queries.files_of_kind(Kind::Directory, after, 4096)?;
            let Some(last) = files.last() else {
                return Ok(directories);
            };
            after = Some(*last);
            for file in files {
                if let Some(dir) = self.dirs.find(self.queries, self.scope, file)? {
                    directories += 1;
                    watch.advance(1);
                    finish_dir(self.queries, self.target, &dir)?;
                }
            }
        }
    }

    fn sync(&self) -> Result<(), Error> {
        self.target.found().watch().begin(Stage::Sync, None);
        sys::sync_filesystem(&**self.target.dirs.root())
            .map_err(|error| Error::target(self.target.at(b""), "syncing", error))
    }
}

fn enter(
    target: &Target<'_>,
    dir: &Arc<Dir>,
    watch: &dyn crate::report::Watch,
) -> Result<bool, Error> {
    watch.advance(1);
    match dir.place() {
        Some((parent, name)) => target.make_dir(parent, name),
        None => Ok(true),
    }
}

/// Makes a file that has no data: anything but a regular file, or an empty or hollow one.
pub(crate) fn make_without_data(target: &Target<'_>, head: &Head) -> Result<(), Error> {
    if head.inode.kind != Kind::Regular {
        return target.make_special(head);
    }
    if let Some(fd) = target.create(head)?
        && (head.inode.size == 0 || target.resize(head, &fd)?)
    {
        target.finish(head, &fd)?;
    }
    Ok(())
}

/// What the log says of a directory.
fn dir_head(queries: Queries<'_>, dir: &Arc<Dir>) -> Result<Option<Head>, Error> {
    let Some(inode) = queries.inode(dir.file)? else {
        return Ok(None);
    };
    let names = dir
        .place()
        .map(|(parent, name)| (parent.clone(), name.to_vec()));
    Ok(Some(Head {
        xattrs: queries.xattrs(dir.file)?,
        inode,
        names: names.into_iter().collect(),
    }))
}

fn finish_dir(queries: Queries<'_>, target: &Target<'_>, dir: &Arc<Dir>) -> Result<(), Error> {
    let Some(head) = dir_head(queries, dir)? else {
        return Ok(());
    };
    match target.dirs.get(dir) {
        Ok(fd) => target.finish_dir(&head, &fd),
        // It could not be made, which is reported.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::target(target.at(&dir.path()), "opening", error)),
    }
}
