//! Release and recall inside the daemon: the threads, and what the rest of the daemon asks of them.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tierfs::catalog::{self, Readers};
use tierfs::residency::{self, Residency as StubList};
use tierfs::{FileId, LogId};

use super::fill::FillError;
use super::mark::{self, Marked};
use super::recall::{self, Outcome, Queued, Recall};
use super::refill::{Daemons, Refill};
use super::release::{self, Refused, Release, Released};
use super::residents::{Residents, ResidentsError};
use super::suspects::{self, Suspects};
use super::unclean;
use super::{Busy, Recalled, Vouched};
use crate::board::Board;
use crate::capture::hints::{Beside, Key, Look};
use crate::config::Config;
use crate::control::model::RefillStatus;
use crate::doubts::Doubts;
use crate::fetch::{self, Fetcher};
use crate::policy::space::Space;
use crate::shared::{Shared, lock};
use crate::sys::Error;
use crate::sys::fanotify::Group;
use crate::sys::handle::Handle;
use crate::sys::link::{self, Told};
use crate::sys::mount::PrivateMount;
use crate::sys::permission::{Answer, Asked, PermissionGroup};

/// How long marks that could not be settled wait.
const SETTLE_AGAIN: Duration = Duration::from_secs(2);
/// Decompressed frames that recall keeps while it has work, about a megabyte each: a frame has hundreds of
/// small files, and takes longer to decompress than all the rest of the recall of one.
const FRAMES_KEPT: usize = 64;

/// What the guard gives a worker.
#[derive(Debug)]
pub struct Inherited {
    /// The permission group.
    pub group: OwnedFd,
    /// The notification group. The keeper has it too: closing the last descriptor of it would wait for
    /// all accesses that wait, and a worker that dies must not.
    pub events: OwnedFd,
    /// To the guard.
    pub link: OwnedFd,
    /// Every access is asked about.
    pub pre_access: bool,
}

/// The rest of [`Inherited`], when the notification group is taken out of it.
#[derive(Debug)]
pub struct Ends {
    group: OwnedFd,
    link: OwnedFd,
    pre_access: bool,
}

impl Inherited {
    /// The notification group, and the rest.
    pub fn split(self) -> (OwnedFd, Ends) {
        let ends = Ends {
            group: self.group,
            link: self.link,
            pre_access: self.pre_access,
        };
        (self.events, ends)
    }
}

/// What the daemon is made of, as far as this needs it.
pub struct Parts<'p> {
    /// The configuration.
    pub config: &'p Config,
    /// Hints, notices.
    pub shared: Arc<Shared>,
    /// Which segment is on which copy.
    pub board: Arc<Board>,
    /// The filesystem.
    pub mount: Arc<PrivateMount>,
    /// The group that tells of changes: what is done through `mount` is no news to it.
    pub events: &'p Group,
    /// The log.
    pub log_id: LogId,
    /// The filesystem's UUID.
    pub fs_uuid: [u8; 16],
    /// Its type.
    pub fs_type: &'p str,
    /// Who makes room for recalls.
    pub space: Arc<Space>,
    /// Who hears of damaged copies.
    pub doubts: Arc<Doubts>,
}

/// Why release and recall cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// The kernel.
    #[error(transparent)]
    Sys(#[from] Error),
    /// The list of stubs.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
}

/// A thread's name and what it does.
pub type Body = (&'static str, Box<dyn FnOnce() + Send>);

/// Release and recall of one filesystem.
pub struct Tier {
    shared: Arc<Shared>,
    recall: Arc<Recall>,
    release: Release,
    residents: Arc<Residents>,
    residency: Arc<Mutex<StubList>>,
    suspects: Arc<Suspects>,
    vouched: Arc<Vouched>,
    recalled: Arc<Recalled>,
    /// `None`: the configuration says that nothing is to flow back.
    refill: Option<Arc<Refill>>,
    link: Arc<OwnedFd>,
    catalog: PathBuf,
    log_id: LogId,
    fs_uuid: [u8; 16],
    mount_now: String,
    threads: usize,
    settled: AtomicBool,
}

/// Where the content is.
fn looks_at(config: &Config, log_id: LogId) -> fetch::Look {
    let volumes: Vec<PathBuf> = config.volumes().map(ToOwned::to_owned).collect();
    let spool = config.spool.clone();
    Box::new(move || {
        let sources = fetch::sources(&spool, &volumes, log_id);
        sources.map(Arc::new).map_err(|error| error.to_string())
    })
}

/// Every file is asked about from here on, if it was not before.
fn set_marks(
    group: OwnedFd,
    pre_access: bool,
    config: &Config,
    mount: &Arc<PrivateMount>,
    fs_type: &str,
) -> Result<Arc<Residents>, Error> {
    let residents = Residents::new(
        PermissionGroup::from_fd(group),
        Asked { pre_access },
        mount.clone(),
        config.stub_marks_max,
        fs_type == "btrfs",
    )?;
    Ok(Arc::new(residents))
}

/// The list of stubs of this disk.
fn open_list(
    catalog: &Path,
    fs_uuid: &[u8; 16],
    mount: &PrivateMount,
) -> Result<StubList, TierError> {
    let mut list = StubList::open(&residency::path_beside(catalog))?;
    list.keep_for(fs_uuid)?;
    if !list.is_complete(fs_uuid, mark::of_disk(mount.root())?.as_ref())? {
        // Disk or list was set back. What is released or recalled from here on gives the disk a generation that the
        // list knows.
        list.set_incomplete()?;
    }
    Ok(list)
}

fn fetcher(config: &Config, log_id: LogId, doubts: Arc<Doubts>) -> Fetcher {
    let look = looks_at(config, log_id);
    Fetcher::new(config.spool.clone(), look, doubts, FRAMES_KEPT)
}

/// Where recall's answers go.
fn answers_to(guard: Arc<OwnedFd>) -> recall::AnswerTo {
    Box::new(move |id: u64, answer: Answer| {
        if let Err(error) = link::tell(guard.as_fd(), Told::Answer(id, answer)) {
            tracing::error!(%error, "the guard does not hear");
        }
    })
}

impl Tier {
    /// Sets the marks; the threads are for [`Self::bodies`].
    pub fn new(inherited: Ends, parts: Parts<'_>) -> Result<Self, TierError> {
        let Parts {
            config,
            shared,
            board,
            mount,
            events,
            log_id,
            fs_uuid,
            fs_type,
            space,
            doubts,
        } = parts;
        let residents = set_marks(
            inherited.group,
            inherited.pre_access,
            config,
            &mount,
            fs_type,
        )?;
        events.ignore_mount(mount.root())?;
        let mut list = open_list(&config.catalog, &fs_uuid, &mount)?;
        let mount_now = unclean::mount_now(&config.mount);
        let unclean_since = list.begin_mount(&mount_now, tierfs::Time::now().seconds)?;
        let list = Arc::new(Mutex::new(list));
        let busy = Arc::new(Busy::default());
        let vouched = Arc::new(Vouched::default());
        let recalled = Arc::new(Recalled::default());
        let link = Arc::new(inherited.link);
        let suspects = Arc::new(Suspects::new(suspects::Parts {
            shared: shared.clone(),
            mount: mount.clone(),
            residents: residents.clone(),
            residency: list.clone(),
            busy: busy.clone(),
            catalog: Readers::new(config.catalog.clone()),
            log_id,
        }));
        let recall = Recall::new(
            recall::Parts {
                shared: shared.clone(),
                mount: mount.clone(),
                residents: residents.clone(),
                catalog: Readers::new(config.catalog.clone()),
                log_id,
                fetcher: fetcher(config, log_id, doubts),
                residency: list.clone(),
                suspects: suspects.clone(),
                busy: busy.clone(),
                vouched: vouched.clone(),
                recalled: recalled.clone(),
                space: space.clone(),
                wait: config.recall_wait,
                threads: config.recall_threads,
            },
            answers_to(link.clone()),
        )?;
        recall.settle_seals();
        suspects.tell();
        let recall = Arc::new(recall);
        let world = Daemons {
            recall: recall.clone(),
            catalog: config.catalog.clone(),
            mount: mount.clone(),
            space,
        };
        let refill = Refill::wanted(config, shared.clone(), list.clone(), world);
        let release = Release {
            shared: shared.clone(),
            board,
            mount,
            residents: residents.clone(),
            residency: list.clone(),
            busy,
            vouched: vouched.clone(),
            interrupted: Mutex::default(),
            catalog: config.catalog.clone(),
            log_id,
            unclean_since,
        };
        Ok(Self {
            shared,
            recall,
            refill,
            release,
            residents,
            residency: list,
            suspects,
            vouched,
            recalled,
            link,
            catalog: config.catalog.clone(),
            log_id,
            fs_uuid,
            mount_now,
            threads: config.recall_threads,
            settled: AtomicBool::new(false),
        })
    }

    /// The threads' names and bodies; they end after [`Self::close`].
    pub fn bodies(self: &Arc<Self>) -> Vec<Body> {
        let mut bodies: Vec<Body> = Vec::new();
        for _ in 0..self.threads {
            let recall = self.recall.clone();
            bodies.push(("recall", Box::new(move || recall.work())));
        }
        let recall = self.recall.clone();
        bodies.push(("finish", Box::new(move || recall.finish())));
        let recall = self.recall.clone();
        bodies.push(("waits", Box::new(move || recall.tend())));
        let tier = self.clone();
        bodies.push(("marks", Box::new(move || tier.settle())));
        if let Some(refill) = self.refill.clone() {
            let tier = self.clone();
            let ready = move || tier.settled.load(Ordering::Relaxed) && tier.shared.is_examined();
            bodies.push(("refill", Box::new(move || refill.run(&ready))));
        }
        bodies
    }

    /// Takes accesses from the guard until it is gone; the daemon does not wait for this thread.
    pub fn take_accesses(&self) {
        loop {
            match link::take(self.link.as_fd()) {
                Ok(Some(handed)) => self.recall.access(handed),
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "an access cannot be taken from the guard, the worker stops: another is given all of them");
                    return self.shared.stop();
                }
            }
        }
        if !self.shared.stopping() {
            tracing::error!("the guard is gone, the worker stops: the next guard starts another");
            self.shared.stop();
        }
    }

    /// From here on the guard may hand over accesses.
    pub fn ready(&self) -> Result<(), Error> {
        let (everything, _) = self.residents.mode();
        link::tell(self.link.as_fd(), Told::Everything(everything))?;
        link::tell(self.link.as_fd(), Told::Ready)
    }

    /// Gives each stub its own mark once all files are known.
    fn settle(&self) {
        while !self.shared.stopping() {
            // A complete list needs no examination.
            let complete = self.residents.is_complete(&self.residency, &self.fs_uuid);
            if complete.unwrap_or(false) || self.all_is_known() {
                let mut interrupted = Vec::new();
                let settled = self.residents.settle(
                    &self.shared,
                    &self.residency,
                    &self.catalog,
                    self.log_id,
                    &self.fs_uuid,
                    &mut interrupted,
                );
                for handle in interrupted {
                    self.recall.resume(&handle);
                }
                match settled {
                    Ok(()) => {
                        self.shared.well("marks");
                        self.settled.store(true, Ordering::Relaxed);
                        let (everything, _) = self.residents.mode();
                        let _ = link::tell(self.link.as_fd(), Told::Everything(everything));
                        return;
                    }
                    Err(ResidentsError::Stopping) => return,
                    Err(ResidentsError::NotYet) => {}
                    Err(error) => self.shared.trouble(
                        "marks",
                        false,
                        "every file is asked about when it is opened, which is slow",
                        error.to_string(),
                        "it is tried again every 10 s",
                    ),
                }
                self.rest(SETTLE_AGAIN);
            }
            self.shared.wait_for_progress(Duration::from_millis(200));
        }
    }

    /// Whether everything on the disk is examined, and the catalog's readers see that.
    fn all_is_known(&self) -> bool {
        if !self.shared.is_examined() {
            return false;
        }
        let progress = self.shared.progress();
        progress.folded >= progress.written
    }

    fn rest(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.shared.stopping() && Instant::now() < end {
            self.shared.wait_for_progress(Duration::from_millis(200));
        }
    }

    /// What is to flow back still; `None` where nothing is.
    pub fn refill(&self) -> Option<RefillStatus> {
        self.refill.as_ref().and_then(|refill| refill.status())
    }

    /// Everything that was changed is in the log. Where nobody can change more, the disk is left well.
    pub fn end(&self, place: &Path) {
        if unclean::mount_now(place) != self.mount_now
            && let Err(error) = lock(&self.residency).end_mount()
        {
            tracing::warn!(%error, "files will be compared with the log before they are released");
        }
    }

    /// Ends the threads of [`Self::bodies`].
    pub fn close(&self) {
        self.recall.close();
    }

    /// Releases files, [`release::BATCH`] at a time.
    pub fn release(
        &self,
        files: &[FileId],
        each: &mut dyn FnMut(FileId, Result<Released, Refused>),
    ) -> Result<(), catalog::Error> {
        for batch in files.chunks(release::BATCH) {
            let (before, _) = self.residents.mode();
            let done = self.release.batch(batch, each);
            // There may be more stubs than can have marks now; the guard has whole files ignored then.
            let (everything, _) = self.residents.mode();
            if everything != before {
                let _ = link::tell(self.link.as_fd(), Told::Everything(everything));
            }
            done?;
            for handle in lock(&self.release.interrupted).drain(..) {
                self.recall.resume(&handle);
            }
        }
        Ok(())
    }

    /// Recalls a file; `tell` hears what came of it.
    pub fn recall(
        &self,
        handle: &Handle,
        uid: u32,
        place: u64,
        tell: impl FnOnce(Outcome) + Send + 'static,
    ) {
        self.recall.ask(handle, uid, place, tell);
    }

    /// What recall has to do; of one user only what he waits for.
    pub fn queued(&self, uid: Option<u32>) -> Vec<Queued> {
        self.recall.list(uid)
    }

    /// Cancels recalls, see [`Recall::cancel`].
    pub fn cancel(
        &self,
        files: Option<&HashSet<Handle>>,
        uid: Option<u32>,
        by: u32,
    ) -> recall::Cancelled {
        self.recall.cancel(files, uid, by)
    }

    /// Bytes that are there of those of these files that are being filled now.
    pub fn filled(&self, files: &HashSet<Handle>) -> u64 {
        self.recall.filled(files)
    }

    /// Whether a file that has this change time is known to be as it was logged.
    pub fn vouches(&self, handle: &Handle, ctime: crate::sys::stat::Time) -> bool {
        self.vouched.knows(handle, ctime)
    }

    /// The log says that these are deleted: those of them that are stubs leave the list.
    pub fn note_deleted(&self, files: impl Iterator<Item = FileId>) {
        self.recall.note_deleted(files);
    }

    /// When a file was recalled, if that is not long ago.
    pub fn recalled(&self, file: FileId) -> Option<Instant> {
        self.recalled.when(file)
    }

    /// Whether a file could be released as far as the log says; gives its size.
    pub fn could_release(&self, file: FileId) -> Result<u64, Refused> {
        self.release.could(file)
    }

    /// Where in the log a stub's data lies; `None` of a file that is whole.
    pub fn place_of_stub(&self, handle: &Handle) -> Result<Option<u64>, Error> {
        Ok(match self.look(handle)? {
            Some((_, Marked::Stub(mark) | Marked::Snapshot(mark))) => Some(mark.version.get()),
            // To be told why not.
            Some((_, Marked::Suspect(_))) => Some(0),
            _ => None,
        })
    }

    /// What of a file is on the disk.
    pub fn residency_of(&self, handle: &Handle) -> Result<Residency, Error> {
        Ok(match self.look(handle)? {
            Some((_, Marked::Suspect(why))) => Residency::Suspect(why),
            Some((_, Marked::Stub(mark))) if mark.stage.is_filled() => Residency::Filled,
            Some((fd, Marked::Stub(_) | Marked::Snapshot(_))) if mark::has_data(fd.as_fd())? => {
                Residency::Partial
            }
            Some((_, Marked::Stub(_) | Marked::Snapshot(_))) => Residency::Stub,
            _ => Residency::Resident,
        })
    }

    fn look(&self, handle: &Handle) -> Result<Option<(OwnedFd, Marked)>, Error> {
        mark::find(self.release.mount.root(), handle, self.log_id)
    }

    /// A file was examined; `unreadable`: it is perhaps suspect.
    pub fn examined(&self, handle: &Handle, file: Option<FileId>, unreadable: bool) {
        if self.suspects.examined(handle, file, unreadable) {
            self.recall.something_leaves();
        }
    }

    /// A stub is not what the log says of it (it was cut, or is of another version): it is made whole,
    /// and then examined like any file.
    pub fn make_whole(&self, handle: &Handle) {
        let (shared, key) = (self.shared.clone(), Key::Inode(handle.clone()));
        self.recall.ask(handle, 0, 0, move |outcome| match outcome {
            Outcome::Whole { .. } => shared.note([(key, Look::Content, Beside::Nothing)]),
            Outcome::Failed(..) | Outcome::Cancelled(_) => {
                let why = outcome.to_string();
                tracing::warn!(why, "a stub that differs from the log cannot be recalled");
            }
        });
    }

    /// Before the content of a file is read: a stub that has lost its mark gets it again. False: it is being
    /// worked on.
    pub fn regain_mark(&self, handle: &Handle) -> Result<bool, FillError> {
        self.recall.regain_mark(handle)
    }

    /// Stubs on the list, files that are wanted, programs that wait, whether all files are asked about.
    pub fn counts(&self) -> Counts {
        let (wanted, waiting) = self.recall.depth();
        Counts {
            stubs: lock(&self.residency).count_stubs().unwrap_or(0),
            wanted: wanted as u64,
            waiting: waiting as u64,
            everything: self.residents.mode().0,
        }
    }
}

/// What of a file is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All.
    Resident,
    /// All, by a recall that is not finished: as long as the file has its mark nobody writes to it.
    Filled,
    /// Some.
    Partial,
    /// Nothing.
    Stub,
    /// Nothing, and what there should be is not known; why.
    Suspect(String),
}

/// Numbers for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Released files.
    pub stubs: u64,
    /// Files that are to be recalled.
    pub wanted: u64,
    /// Programs that wait for them.
    pub waiting: u64,
    /// Every file is asked about when it is opened.
    pub everything: bool,
}
