//! The client: asks the daemon and waits. Used by tierctl, from one thread.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::methods::{
    ContentParameters, Method, PathParameters, ReadParameters, TransactionParameters, VerifyReply,
    VolumeParameters,
};
use super::model::{
    CancelDone, CatalogDigest, Content, DirectoryUsage, Event, Explanation, FileState, Found,
    Moved, Piece, PinsDone, PolicyRun, PoolVolume, QueueList, RecallPart, RecallPlan, Status,
    SyncDone, SyncRequest, Transaction, VerifyDone, VerifyProgress, Versions,
};
use super::policies::{PinParameters, RunParameters};
use super::queue::CancelParameters;
use super::search::{FindParameters, UsageParameters};
use super::tier::{MoveParameters, PlanParameters};
use super::varlink::{self, INTERFACE, REPLY_BYTES_MAX, Reply, Request};

/// A daemon that does not answer a short question for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the daemon gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("hsmd does not answer on {}: {source}", socket.display())]
    Down {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not allowed to connect.
    #[error(
        "{} may not be opened: {source}; run as root or as a member of the configuration's control_group",
        socket.display()
    )]
    Denied {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It listens, but says nothing.
    #[error(
        "hsmd did not answer on {} within {} s: look into its journal (`journalctl -u hsmd`)",
        socket.display(),
        PATIENCE.as_secs()
    )]
    Silent {
        /// The socket.
        socket: PathBuf,
    },
    /// The connection ended in the middle.
    #[error(
        "the connection to hsmd on {} broke: {source}; it was stopped or has failed, see `journalctl -u hsmd`",
        socket.display()
    )]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The answer is none of ours.
    #[error(
        "what answers on {} is no hsmd of this version: {why}; install tierctl and hsmd of the same version",
        socket.display()
    )]
    Strange {
        /// The socket.
        socket: PathBuf,
        /// What is odd.
        why: String,
    },
    /// It answered with an error.
    #[error("{message}")]
    Answered {
        /// The error's last name: `NotFound`, `PermissionDenied` and so on.
        name: String,
        /// What it says.
        message: String,
    },
}

impl ClientError {
    /// Whether the daemon answered that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Answered { name, .. } if name == "NotFound")
    }
}

/// A connection to the daemon.
pub struct Client {
    socket: PathBuf,
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).map_err(|source| {
            let socket = socket.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied => ClientError::Denied { socket, source },
                _ => ClientError::Down { socket, source },
            }
        })?;
        Ok(Self {
            socket: socket.to_owned(),
            stream,
            buffer: Vec::new(),
        })
    }

    /// What the daemon is at.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.ask(Method::GetStatus, &(), "status")
    }

    /// The state of a file.
    pub fn file_state(&mut self, path: &PathParameters) -> Result<FileState, ClientError> {
        self.ask(Method::GetFileState, path, "state")
    }

    /// Waits until everything changed so far is safe. For as long as it takes.
    pub fn sync(&mut self, request: SyncRequest) -> Result<SyncDone, ClientError> {
        self.send(Method::Sync, &request, false)?;
        let (value, _) = self.receive(None)?;
        self.read_value(value)
    }

    /// The versions of a path.
    pub fn versions(&mut self, path: &PathParameters) -> Result<Versions, ClientError> {
        self.ask(Method::ListVersions, path, "versions")
    }

    /// What a transaction did.
    pub fn transaction(&mut self, lsn: u64) -> Result<Transaction, ClientError> {
        self.ask(
            Method::GetTransaction,
            &TransactionParameters { lsn },
            "transaction",
        )
    }

    /// The version that a path had.
    pub fn content(&mut self, asked: &ContentParameters) -> Result<Content, ClientError> {
        self.ask(Method::GetContent, asked, "content")
    }

    /// The bytes of a version at an offset.
    pub fn read(&mut self, asked: ReadParameters) -> Result<Piece, ClientError> {
        self.ask(Method::ReadContent, &asked, "piece")
    }

    /// All volumes.
    pub fn volumes(&mut self) -> Result<Vec<PoolVolume>, ClientError> {
        self.ask(Method::ListVolumes, &(), "volumes")
    }

    /// The catalog's digest.
    pub fn catalog_digest(&mut self) -> Result<CatalogDigest, ClientError> {
        // Every row is read: that may take a while.
        self.send(Method::GetCatalogDigest, &(), false)?;
        let (mut value, _) = self.receive(None)?;
        let digest = value["digest"].take();
        self.read_value(digest)
    }

    /// Reads a volume back, telling `progress` how far it is.
    pub fn verify_volume(
        &mut self,
        volume: &str,
        progress: &mut dyn FnMut(VerifyProgress),
    ) -> Result<VerifyDone, ClientError> {
        let asked = VolumeParameters {
            volume: volume.to_owned(),
        };
        self.send(Method::VerifyVolume, &asked, true)?;
        loop {
            let (value, _) = self.receive(None)?;
            let reply: VerifyReply = self.read_value(value)?;
            match reply {
                VerifyReply {
                    done: Some(done), ..
                } => return Ok(done),
                VerifyReply {
                    progress: Some(now),
                    ..
                } => progress(now),
                VerifyReply { .. } => {}
            }
        }
    }

    /// Searches; `part` gets what is found as it is found.
    pub fn find(
        &mut self,
        asked: &FindParameters,
        part: &mut dyn FnMut(Found) -> io::Result<()>,
    ) -> Result<io::Result<()>, ClientError> {
        self.in_parts(Method::FindFiles, asked, part)
    }

    /// Runs policies; `part` gets what is done as it is done.
    pub fn run_policy(
        &mut self,
        asked: &RunParameters,
        part: &mut dyn FnMut(PolicyRun) -> io::Result<()>,
    ) -> Result<io::Result<()>, ClientError> {
        self.in_parts(Method::RunPolicy, asked, part)
    }

    /// What lies below a path. For as long as it takes.
    pub fn usage(&mut self, asked: &UsageParameters) -> Result<Vec<DirectoryUsage>, ClientError> {
        self.send(Method::GetUsage, asked, false)?;
        let (mut value, _) = self.receive(None)?;
        let usage = value["usage"].take();
        self.read_value(usage)
    }

    /// Pins files or takes that back. For as long as it takes.
    pub fn set_pins(&mut self, asked: &PinParameters) -> Result<PinsDone, ClientError> {
        self.send(Method::SetPins, asked, false)?;
        let (mut value, _) = self.receive(None)?;
        let done = value["done"].take();
        self.read_value(done)
    }

    /// Why which rules are about a file.
    pub fn explain(&mut self, path: &PathParameters) -> Result<Explanation, ClientError> {
        self.ask(Method::ExplainPolicy, path, "explanation")
    }

    /// The inner result is that of `part`, which ends it.
    fn in_parts<P: Serialize, T: DeserializeOwned>(
        &mut self,
        method: Method,
        asked: &P,
        part: &mut dyn FnMut(T) -> io::Result<()>,
    ) -> Result<io::Result<()>, ClientError> {
        self.send(method, asked, true)?;
        loop {
            let (value, more) = self.receive(None)?;
            let next = self.read_value(value)?;
            match part(next) {
                Ok(()) if more => {}
                done => return Ok(done),
            }
        }
    }

    /// Begins to follow what happens; [`Self::next_event`] gives it.
    pub fn subscribe(&mut self) -> Result<(), ClientError> {
        self.send(Method::Subscribe, &(), true)?;
        self.receive(Some(PATIENCE)).map(|_| ())
    }

    /// Waits for the next event; `None` when the daemon ends.
    pub fn next_event(&mut self) -> Result<Option<Event>, ClientError> {
        match self.receive(None) {
            Ok((mut value, true)) => {
                let event = value["event"].take();
                self.read_value(event).map(Some)
            }
            Ok((_, false)) | Err(ClientError::Broken { .. }) => Ok(None),
            Err(ClientError::Answered { name, .. }) if name == "Unavailable" => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Releases files; says what became of each.
    pub fn release(&mut self, asked: &MoveParameters) -> Result<Vec<Moved>, ClientError> {
        self.moved(Method::Release, asked)
    }

    /// Recalls files; `part` gets what became of each, and how far it is. For as long as it takes.
    pub fn recall(
        &mut self,
        asked: &MoveParameters,
        part: &mut dyn FnMut(RecallPart) -> io::Result<()>,
    ) -> Result<io::Result<()>, ClientError> {
        self.in_parts(Method::Recall, asked, part)
    }

    /// What recalling files needs.
    pub fn plan_recall(&mut self, asked: &PlanParameters) -> Result<RecallPlan, ClientError> {
        // Of very large files the catalog is asked a while.
        self.send(Method::PlanRecall, asked, false)?;
        let (mut value, _) = self.receive(None)?;
        let plan = value["plan"].take();
        self.read_value(plan)
    }

    /// What recall has to do.
    pub fn queue(&mut self) -> Result<QueueList, ClientError> {
        // Of many files the catalog is asked one by one.
        self.send(Method::ListRecalls, &(), false)?;
        let (mut value, _) = self.receive(None)?;
        let queue = value["queue"].take();
        self.read_value(queue)
    }

    /// Cancels recalls.
    pub fn cancel(&mut self, asked: &CancelParameters) -> Result<CancelDone, ClientError> {
        self.ask(Method::CancelRecalls, asked, "done")
    }

    fn moved(&mut self, method: Method, asked: &MoveParameters) -> Result<Vec<Moved>, ClientError> {
        self.send(method, asked, false)?;
        let (mut value, _) = self.receive(None)?;
        let results = value["results"].take();
        self.read_value(results)
    }

    /// Tells the daemon to stop.
    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.send(Method::Stop, &(), false)?;
        self.receive(Some(PATIENCE)).map(|_| ())
    }

    fn ask<P: Serialize, T: DeserializeOwned>(
        &mut self,
        method: Method,
        parameters: &P,
        key: &str,
    ) -> Result<T, ClientError> {
        self.send(method, parameters, false)?;
        let (mut value, _) = self.receive(Some(PATIENCE))?;
        let answer = value[key].take();
        self.read_value(answer)
    }

    fn send<P: Serialize>(
        &mut self,
        method: Method,
        parameters: &P,
        more: bool,
    ) -> Result<(), ClientError> {
        let parameters = match serde_json::to_value(parameters) {
            Ok(Value::Object(map)) => map,
            Ok(Value::Null) => Map::new(),
            Ok(_) => return Err(self.strange("parameters are no object")),
            Err(error) => return Err(self.strange(error)),
        };
        let request = Request {
            method: format!("{INTERFACE}.{method:?}"),
            parameters: Some(parameters),
            more,
            oneway: false,
            upgrade: false,
        };
        let bytes = varlink::encode(&request).map_err(|error| self.strange(error))?;
        self.stream
            .write_all(&bytes)
            .map_err(|error| self.broken(error))
    }

    /// The next reply, and whether another follows.
    fn receive(&mut self, patience: Option<Duration>) -> Result<(Value, bool), ClientError> {
        self.stream
            .set_read_timeout(patience)
            .map_err(|error| self.broken(error))?;
        let bytes = self.message()?;
        let reply: Reply = serde_json::from_slice(&bytes).map_err(|error| self.strange(error))?;
        let parameters = reply.parameters.unwrap_or_default();
        let Some(error) = reply.error else {
            return Ok((parameters, reply.continues));
        };
        let name = error.rsplit('.').next().unwrap_or_default().to_owned();
        let message = match parameters["message"].as_str() {
            Some(message) => message.to_owned(),
            None => format!("hsmd answers {error} {parameters}"),
        };
        Err(ClientError::Answered { name, message })
    }

    fn message(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut searched = 0;
        let mut piece = vec![0; 64 * 1024];
        loop {
            let new = self.buffer.get(searched..).unwrap_or_default();
            if let Some(at) = new.iter().position(|&byte| byte == 0) {
                let rest = self.buffer.split_off(searched + at + 1);
                let mut bytes = std::mem::replace(&mut self.buffer, rest);
                bytes.pop();
                return Ok(bytes);
            }
            searched = self.buffer.len();
            if searched > REPLY_BYTES_MAX {
                return Err(self.strange(format!("a reply is longer than {REPLY_BYTES_MAX} bytes")));
            }
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(len) => self.buffer.extend_from_slice(&piece[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(ClientError::Silent {
                        socket: self.socket.clone(),
                    });
                }
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    fn read_value<T: DeserializeOwned>(&self, value: Value) -> Result<T, ClientError> {
        serde_json::from_value(value).map_err(|error| self.strange(error))
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            source,
        }
    }

    fn strange(&self, why: impl std::fmt::Display) -> ClientError {
        ClientError::Strange {
            socket: self.socket.clone(),
            why: why.to_string(),
        }
    }
}
