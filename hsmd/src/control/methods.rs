//! The methods: which there are, who may call them, and how each is answered.
//!
//! Answers that need the catalog or the media are made in the modules `files`, `log`, `content` and
//! `volumes` beside this one, on blocking threads.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::RecvTimeoutError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::model::{CatalogDigest, RecallPart, SyncRequest, VerifyDone, VerifyProgress};
use super::path::PathText;
use super::peer::{Peer, Rights};
use super::queue::CancelParameters;
use super::server::Connection;
use super::tier::{self, MoveParameters, PlanParameters};
use super::varlink::{self, Failure, INTERFACE, Reply, Request, SERVICE};
use super::when::When;
use super::{Core, CoreError, content, files, log, policies, queue, search, volumes};

/// Events between the daemon's thread and a client's socket.
const EVENTS_BUFFERED: usize = 64;
/// Parts of an answer between the thread that makes them and a client's socket.
const PARTS_BUFFERED: usize = 4;
/// How often a silent subscription looks whether it is still wanted.
const EVENTS_POLL: Duration = Duration::from_millis(200);

/// The methods of [`INTERFACE`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Method {
    GetStatus,
    GetFileState,
    Sync,
    ListVersions,
    GetTransaction,
    GetContent,
    ReadContent,
    ListVolumes,
    VerifyVolume,
    GetCatalogDigest,
    FindFiles,
    GetUsage,
    SetPins,
    RunPolicy,
    ExplainPolicy,
    Subscribe,
    Release,
    Recall,
    PlanRecall,
    ListRecalls,
    CancelRecalls,
    Stop,
}

impl Method {
    /// All of them with their names.
    pub const ALL: [(&'static str, Self); 22] = [
        ("GetStatus", Self::GetStatus),
        ("GetFileState", Self::GetFileState),
        ("Sync", Self::Sync),
        ("ListVersions", Self::ListVersions),
        ("GetTransaction", Self::GetTransaction),
        ("GetContent", Self::GetContent),
        ("ReadContent", Self::ReadContent),
        ("ListVolumes", Self::ListVolumes),
        ("VerifyVolume", Self::VerifyVolume),
        ("GetCatalogDigest", Self::GetCatalogDigest),
        ("FindFiles", Self::FindFiles),
        ("GetUsage", Self::GetUsage),
        ("SetPins", Self::SetPins),
        ("RunPolicy", Self::RunPolicy),
        ("ExplainPolicy", Self::ExplainPolicy),
        ("Subscribe", Self::Subscribe),
        ("Release", Self::Release),
        ("Recall", Self::Recall),
        ("PlanRecall", Self::PlanRecall),
        ("ListRecalls", Self::ListRecalls),
        ("CancelRecalls", Self::CancelRecalls),
        ("Stop", Self::Stop),
    ];

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, method)| *method)
    }

    /// Whether peers without full rights may call it, about what they may read.
    fn open_to_others(self) -> bool {
        matches!(
            self,
            Self::GetFileState
                | Self::Recall
                | Self::PlanRecall
                | Self::ListRecalls
                | Self::CancelRecalls
        )
    }
}

/// The parameters that name a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PathParameters {
    /// Absolute, on the watched mount.
    #[serde(flatten)]
    pub path: PathText,
}

impl PathParameters {
    pub(super) fn exact(&self) -> Result<PathBuf, Failure> {
        let wrong = |why: &str| Failure::InvalidParameter {
            parameter: "path".to_owned(),
            why: why.to_owned(),
        };
        let path = self
            .path
            .exact()
            .ok_or_else(|| wrong("path_base64 is no base64"))?;
        if !super::peer::is_plain(&path) {
            return Err(wrong(
                "give an absolute path without \"..\", \".\" and needless slashes",
            ));
        }
        Ok(path)
    }
}

/// Of [`Method::GetTransaction`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransactionParameters {
    /// Its number.
    pub lsn: u64,
}

/// Of [`Method::GetContent`]: the path, and as of when (at most one of the two; neither means now).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContentParameters {
    /// The path then.
    #[serde(flatten)]
    pub path: PathParameters,
    /// As of this transaction.
    #[serde(default)]
    pub lsn: Option<u64>,
    /// As of this time.
    #[serde(default)]
    pub time: Option<When>,
}

/// Of [`Method::ReadContent`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ReadParameters {
    /// The file's id.
    pub file: u64,
    /// As of this transaction.
    pub lsn: u64,
    /// From this byte on.
    pub offset: u64,
    /// At most so many bytes of data; holes come whole.
    pub bytes_max: u64,
}

/// Of [`Method::VerifyVolume`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeParameters {
    /// Serial or path.
    pub volume: String,
}

/// What [`Method::VerifyVolume`] answers: progress, and at last the result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VerifyReply {
    /// So far.
    pub progress: Option<VerifyProgress>,
    /// At the end.
    pub done: Option<VerifyDone>,
}

#[derive(Debug, Deserialize)]
struct DescriptionParameters {
    interface: String,
}

/// A connection's standing.
pub struct Session {
    pub(super) core: Arc<dyn Core>,
    pub(super) peer: Peer,
    pub(super) rights: Rights,
    /// The version that is being read piece by piece.
    reading: content::Reading,
}

impl Session {
    /// Of a peer that just connected.
    pub fn new(core: Arc<dyn Core>, peer: Peer, rights: Rights) -> Self {
        Self {
            core,
            peer,
            rights,
            reading: content::Reading::default(),
        }
    }

    /// The peer, where it may not ask everything.
    fn asker(&self) -> Option<Peer> {
        (self.rights == Rights::OwnFiles).then(|| self.peer.clone())
    }

    fn allow(&self, method: Method, name: &str) -> Result<(), Failure> {
        if self.rights == Rights::All || method.open_to_others() {
            return Ok(());
        }
        Err(Failure::PermissionDenied(format!(
            "user {} may not call {name}, only ask for the state of files that they may read, recall them, and cancel that: run tierctl as root or as a member of the configuration's control_group",
            self.peer.uid
        )))
    }
}

/// The answer or why there is none; the outer error is the client's going away.
pub(super) type Answer = io::Result<Result<Value, Failure>>;

/// Answers a request, but for the last reply; what comes before that is sent from here.
pub(super) async fn answer(
    session: &mut Session,
    request: &Request,
    connection: &mut Connection,
) -> Answer {
    let method = match find(session, request) {
        Ok(Found::Control(method)) => method,
        Ok(Found::Answered(value)) => return Ok(Ok(value)),
        Err(failure) => return Ok(Err(failure)),
    };
    match method {
        Method::Sync => sync(session, request, connection).await,
        Method::VerifyVolume => verify(session, request, connection).await,
        Method::Subscribe => subscribe(session, request, connection).await,
        Method::FindFiles => {
            in_parts(
                session,
                request,
                connection,
                |core, asked, cancelled, part| search::find(core, &asked, cancelled, part),
            )
            .await
        }
        Method::RunPolicy => {
            in_parts(
                session,
                request,
                connection,
                |core, asked, cancelled, part| policies::run(core, &asked, cancelled, part),
            )
            .await
        }
        Method::Recall if request.more && !request.oneway => {
            let asker = session.asker();
            let call = move |core: &dyn Core,
                             asked: MoveParameters,
                             cancelled: &Arc<AtomicBool>,
                             part: Part<'_, RecallPart>| {
                tier::recall_in_parts(core, &asked, asker.as_ref(), cancelled, part)
            };
            in_parts(session, request, connection, call).await
        }
        Method::GetUsage => {
            long(session, request, connection, |core, asked, cancelled| {
                value("usage", &search::usage(core, &asked, cancelled)?)
            })
            .await
        }
        Method::SetPins => {
            long(session, request, connection, |core, asked, cancelled| {
                value("done", &policies::set_pins(core, &asked, cancelled)?)
            })
            .await
        }
        Method::ReadContent => match varlink::parameters(request) {
            Ok(parameters) => Ok(session.reading.read(&session.core, parameters).await),
            Err(failure) => Ok(Err(failure)),
        },
        method => Ok(short(session, method, request).await),
    }
}

enum Found {
    Control(Method),
    Answered(Value),
}

fn find(session: &mut Session, request: &Request) -> Result<Found, Failure> {
    let name = request.method.as_str();
    let no_method = || Failure::MethodNotFound(name.to_owned());
    let (interface, method) = name.rsplit_once('.').ok_or_else(no_method)?;
    match (interface, method) {
        (INTERFACE, method) => {
            let method = Method::from_name(method).ok_or_else(no_method)?;
            session.allow(method, name)?;
            Ok(Found::Control(method))
        }
        (SERVICE, "GetInfo") => Ok(Found::Answered(json!({
            "vendor": "hsmd",
            "product": "hsmd",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "",
            "interfaces": [SERVICE, INTERFACE],
        }))),
        (SERVICE, "GetInterfaceDescription") => {
            let asked: DescriptionParameters = varlink::parameters(request)?;
            let text = match asked.interface.as_str() {
                INTERFACE => varlink::INTERFACE_TEXT,
                SERVICE => varlink::SERVICE_TEXT,
                _ => return Err(Failure::InterfaceNotFound(asked.interface)),
            };
            Ok(Found::Answered(json!({ "description": text })))
        }
        (SERVICE, _) => Err(no_method()),
        _ => Err(Failure::InterfaceNotFound(interface.to_owned())),
    }
}

/// The methods that answer soon.
async fn short(session: &mut Session, method: Method, request: &Request) -> Result<Value, Failure> {
    let core = session.core.clone();
    match method {
        Method::GetStatus => blocking(move || value("status", &core.status())).await,
        Method::GetFileState => {
            let asked: PathParameters = varlink::parameters(request)?;
            let asker = session.asker();
            blocking(move || value("state", &files::state(&*core, &asked, asker.as_ref())?)).await
        }
        Method::ListVersions => {
            let asked: PathParameters = varlink::parameters(request)?;
            blocking(move || value("versions", &log::versions(&*core, &asked)?)).await
        }
        Method::GetTransaction => {
            let asked: TransactionParameters = varlink::parameters(request)?;
            blocking(move || value("transaction", &log::transaction(&*core, asked.lsn)?)).await
        }
        Method::GetContent => {
            let asked: ContentParameters = varlink::parameters(request)?;
            blocking(move || value("content", &content::find(&*core, &asked)?)).await
        }
        Method::Release => {
            let asked: MoveParameters = varlink::parameters(request)?;
            blocking(move || value("results", &tier::release(&*core, &asked)?)).await
        }
        Method::Recall => {
            let asked: MoveParameters = varlink::parameters(request)?;
            let asker = session.asker();
            blocking(move || value("results", &tier::recall(&*core, &asked, asker.as_ref())?)).await
        }
        Method::PlanRecall => {
            let asked: PlanParameters = varlink::parameters(request)?;
            let asker = session.asker();
            blocking(move || value("plan", &tier::plan(&*core, &asked, asker.as_ref())?)).await
        }
        Method::ListRecalls => {
            let asker = session.asker();
            blocking(move || value("queue", &queue::list(&*core, asker.as_ref())?)).await
        }
        Method::CancelRecalls => {
            let asked: CancelParameters = varlink::parameters(request)?;
            let (asker, by) = (session.asker(), session.peer.uid);
            blocking(move || {
                let done = queue::cancel(&*core, &asked, asker.as_ref(), by)?;
                value("done", &done)
            })
            .await
        }
        Method::ListVolumes => blocking(move || value("volumes", &volumes::list(&*core))).await,
        Method::GetCatalogDigest => {
            blocking(move || {
                let (lsn, digest) = core.catalog_digest()?;
                value("digest", &CatalogDigest { lsn, digest })
            })
            .await
        }
        Method::Stop => {
            blocking(move || {
                core.stop();
                Ok(json!({}))
            })
            .await
        }
        Method::ExplainPolicy => {
            let asked: PathParameters = varlink::parameters(request)?;
            blocking(move || value("explanation", &policies::explain(&*core, &asked)?)).await
        }
        Method::Sync
        | Method::VerifyVolume
        | Method::Subscribe
        | Method::ReadContent
        | Method::FindFiles
        | Method::RunPolicy
        | Method::GetUsage
        | Method::SetPins => Err(Failure::MethodNotFound(request.method.clone())),
    }
}

/// An answer with one named value.
pub(super) fn value<T: Serialize>(name: &str, value: &T) -> Result<Value, Failure> {
    let value = serde_json::to_value(value)
        .map_err(|error| CoreError::Failed(format!("the answer cannot be written: {error}")))?;
    Ok(json!({ name: value }))
}

/// Runs a call that may block.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(call).await {
        Ok(done) => done,
        Err(_) => Err(CoreError::Failed(
            "hsmd met an error of its own while answering: see its journal".to_owned(),
        )
        .into()),
    }
}

/// Sets the flag when the client goes away or the server ends.
struct CancelOnDrop(Arc<AtomicBool>);

impl CancelOnDrop {
    fn new() -> (Self, Arc<AtomicBool>) {
        let flag = Arc::new(AtomicBool::new(false));
        (Self(flag.clone()), flag)
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn went_away() -> io::Error {
    io::Error::from(io::ErrorKind::BrokenPipe)
}

async fn sync(session: &mut Session, request: &Request, connection: &mut Connection) -> Answer {
    let asked: SyncRequest = match varlink::parameters(request) {
        Ok(asked) => asked,
        Err(failure) => return Ok(Err(failure)),
    };
    let core = session.core.clone();
    let (_guard, cancelled) = CancelOnDrop::new();
    let work = blocking(move || {
        let done = core.sync(asked, &cancelled)?;
        Ok(serde_json::to_value(done).unwrap_or_default())
    });
    tokio::select! {
        done = work => Ok(done),
        () = connection.gone() => Err(went_away()),
    }
}

async fn verify(session: &mut Session, request: &Request, connection: &mut Connection) -> Answer {
    let asked: VolumeParameters = match varlink::parameters(request) {
        Ok(asked) => asked,
        Err(failure) => return Ok(Err(failure)),
    };
    let core = session.core.clone();
    let (_guard, cancelled) = CancelOnDrop::new();
    let (to, mut from) = mpsc::channel(1);
    let more = request.more && !request.oneway;
    let work = blocking(move || {
        let done = core.verify_volume(&asked.volume, &mut |progress| {
            // A client that is slow misses some of it.
            let _ = to.try_send(progress);
            if cancelled.load(Ordering::Acquire) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        Ok(done)
    });
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(done.and_then(|done| reply(VerifyReply { done: Some(done), ..VerifyReply::default() }))),
            Some(progress) = from.recv(), if more => {
                let so_far = VerifyReply { progress: Some(progress), ..VerifyReply::default() };
                if let Ok(so_far) = reply(so_far) {
                    connection.send(&Reply::continued(so_far)).await?;
                }
            }
            () = connection.gone() => return Err(went_away()),
        }
    }
}

/// A call that may take long, and ends when the client goes away.
async fn long<P: DeserializeOwned + Send + 'static>(
    session: &mut Session,
    request: &Request,
    connection: &mut Connection,
    call: impl FnOnce(&dyn Core, P, &AtomicBool) -> Result<Value, Failure> + Send + 'static,
) -> Answer {
    let asked: P = match varlink::parameters(request) {
        Ok(asked) => asked,
        Err(failure) => return Ok(Err(failure)),
    };
    let core = session.core.clone();
    let (_guard, cancelled) = CancelOnDrop::new();
    let work = blocking(move || call(&*core, asked, &cancelled));
    tokio::select! {
        done = work => Ok(done),
        () = connection.gone() => Err(went_away()),
    }
}

/// What a call gives to its client in between.
type Part<'p, T> = &'p mut dyn FnMut(T) -> ControlFlow<()>;

/// A call whose answer comes in parts; a client that is slow makes it wait.
async fn in_parts<P, T>(
    session: &mut Session,
    request: &Request,
    connection: &mut Connection,
    call: impl FnOnce(&dyn Core, P, &Arc<AtomicBool>, Part<'_, T>) -> Result<T, Failure>
    + Send
    + 'static,
) -> Answer
where
    P: DeserializeOwned + Send + 'static,
    T: Serialize + Send + 'static,
{
    if !request.more || request.oneway {
        let name = request.method.rsplit('.').next();
        let mut known = Method::ALL.iter().map(|(known, _)| *known);
        let name = known.find(|known| Some(*known) == name);
        return Ok(Err(Failure::ExpectedMore(name.unwrap_or("the method"))));
    }
    let asked: P = match varlink::parameters(request) {
        Ok(asked) => asked,
        Err(failure) => return Ok(Err(failure)),
    };
    let core = session.core.clone();
    let (_guard, cancelled) = CancelOnDrop::new();
    let (to, mut from) = mpsc::channel::<T>(PARTS_BUFFERED);
    let work = blocking(move || {
        call(
            &*core,
            asked,
            &cancelled,
            &mut |part| match to.blocking_send(part) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            },
        )
    });
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            Some(part) = from.recv() => {
                connection.send(&Reply::continued(serde_json::to_value(part)?)).await?;
            }
            done = &mut work => {
                // What was sent before the end is still there.
                while let Ok(part) = from.try_recv() {
                    connection.send(&Reply::continued(serde_json::to_value(part)?)).await?;
                }
                return Ok(done.and_then(|done| serde_json::to_value(done).map_err(|error| unwritable(&error))));
            }
            () = connection.gone() => return Err(went_away()),
        }
    }
}

fn unwritable(error: &serde_json::Error) -> Failure {
    CoreError::Failed(format!("the answer cannot be written: {error}")).into()
}

fn reply(reply: VerifyReply) -> Result<Value, Failure> {
    serde_json::to_value(reply)
        .map_err(|error| CoreError::Failed(format!("the answer cannot be written: {error}")).into())
}

async fn subscribe(
    session: &mut Session,
    request: &Request,
    connection: &mut Connection,
) -> Answer {
    if !request.more || request.oneway {
        return Ok(Err(Failure::ExpectedMore("Subscribe")));
    }
    let core = session.core.clone();
    let (to, mut from) = mpsc::channel(EVENTS_BUFFERED);
    let (ready, subscribed) = tokio::sync::oneshot::channel();
    tokio::task::spawn_blocking(move || {
        let events = core.subscribe();
        if ready.send(()).is_err() {
            return;
        }
        loop {
            match events.recv_timeout(EVENTS_POLL) {
                // Where the client does not read, this waits, the daemon's queue fills, and the
                // daemon counts what is missed.
                Ok(event) => match to.blocking_send(event) {
                    Ok(()) => {}
                    Err(_) => return,
                },
                Err(RecvTimeoutError::Timeout) if to.is_closed() => return,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    });
    if subscribed.await.is_ok() {
        // The first reply, without an event, says that from now on nothing is missed.
        connection
            .send(&Reply::continued(json!({ "event": null })))
            .await?;
    }
    loop {
        tokio::select! {
            event = from.recv() => match event {
                Some(event) => {
                    let event = serde_json::to_value(event)?;
                    connection.send(&Reply::continued(json!({ "event": event }))).await?;
                }
                None => return Ok(Err(CoreError::Unavailable("hsmd is stopping: no more events come".to_owned()).into())),
            },
            () = connection.gone() => return Err(went_away()),
        }
    }
}
