//! The server: one thread with a tokio runtime, a task for each connection.
//!
//! A connection has one request in work at a time, and its replies go out in order. Requests are
//! bounded in size, connections in number (those without full rights also by user), and a client
//! that does not read costs its own task and nothing else. Calls of the daemon run on blocking
//! threads; what takes long is cancelled as soon as the client has gone.
//!
//! A socket of that name is replaced only when nobody answers on it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Core;
use super::methods::{self, Session};
use super::peer::{Peer, Rights};
use super::varlink::{self, Failure, REQUEST_BYTES_MAX, Reply};

/// Connections in all.
const CONNECTIONS_MAX: usize = 256;
/// Connections of peers that may not do everything, so that the others always find room.
const CONNECTIONS_OTHERS_MAX: usize = 128;
/// Connections of one such user.
const CONNECTIONS_USER_MAX: usize = 16;
/// Threads for calls that block: one for each connection, and some for what they leave behind.
const BLOCKING_THREADS_MAX: usize = CONNECTIONS_MAX + 64;
/// How long a peer without full rights may take to send a request or to take a reply.
const OTHERS_PATIENCE: Duration = Duration::from_secs(30);
/// How often a long request looks whether its client is still there.
const GONE_INTERVAL: Duration = Duration::from_millis(50);
/// How long stopping waits for calls in work.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// After accept failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who may connect. What a peer may ask is another question, see [`Rights`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Access {
    /// Mode 0660: root and the control group.
    Group,
    /// Mode 0666: everybody may ask about files that they may read.
    #[default]
    Everyone,
}

/// Where and for whom the server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The socket's path.
    pub socket: PathBuf,
    /// The group whose members may do everything beside root, see [`super::peer::group_id`].
    pub group: Option<u32>,
    /// Who may connect.
    pub access: Access,
}

/// Why the server does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Somebody answers there.
    #[error(
        "another process answers on {}: stop it (`systemctl stop hsmd`), or give this one another socket in its configuration",
        path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is in the way.
    #[error(
        "{} is not a socket: it is left as it is; move it away, or change `socket` in the configuration",
        path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{doing} {}: {source}; check the directory and its permissions", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// The running server. Dropping it leaves it running; [`Server::stop`] ends it.
pub struct Server {
    thread: JoinHandle<()>,
    stop: watch::Sender<bool>,
    socket: PathBuf,
    inode: (u64, u64),
}

impl Server {
    /// Makes the socket and begins to answer.
    pub fn start(options: Options, core: Arc<dyn Core>) -> Result<Self, ServeError> {
        let fail = |doing| {
            let path = options.socket.clone();
            move |source| ServeError::Io {
                path,
                doing,
                source,
            }
        };
        let listener = bind(&options)?;
        let found = fs::metadata(&options.socket).map_err(fail("looking at the new socket"))?;
        listener
            .set_nonblocking(true)
            .map_err(fail("preparing the socket"))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("control-call")
            .build()
            .map_err(fail("starting the runtime for"))?;
        let (stop, stopped) = watch::channel(false);
        let shared = Arc::new(Shared {
            core,
            group: options.group,
            table: Arc::default(),
        });
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                runtime.block_on(listen(listener, &shared, stopped));
                runtime.shutdown_timeout(STOP_PATIENCE);
            })
            .map_err(fail("starting the thread for"))?;
        let inode = (found.dev(), found.ino());
        Ok(Self {
            thread,
            stop,
            socket: options.socket,
            inode,
        })
    }

    /// Cancels what is in work, closes all connections and removes the socket.
    pub fn stop(self) {
        let ours = fs::symlink_metadata(&self.socket)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.socket) {
            tracing::warn!("removing {}: {error}", self.socket.display());
        }
        // It fails only where the thread has ended already.
        let _ = self.stop.send(true);
        if self.thread.join().is_err() {
            tracing::error!("the control thread ended with a panic");
        }
    }
}

/// Makes the socket under another name and moves it into place, so that nobody ever meets it half
/// made, and no living one is replaced.
fn bind(options: &Options) -> Result<StdListener, ServeError> {
    let path = &options.socket;
    let fail = |doing| {
        move |source| ServeError::Io {
            path: path.clone(),
            doing,
            source,
        }
    };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(fail("making the directory of"))?;
    }
    make_room(path)?;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let fresh = PathBuf::from(name);
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(fail("removing what an earlier start left beside")(error));
        }
        _ => {}
    }
    let listener = StdListener::bind(&fresh).map_err(fail("binding"))?;
    let mode = match options.access {
        Access::Group => 0o660,
        Access::Everyone => 0o666,
    };
    if let Some(group) = options.group {
        std::os::unix::fs::chown(&fresh, None, Some(group))
            .map_err(fail("giving to the control group"))?;
    }
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))
        .map_err(fail("setting the mode of"))?;
    fs::rename(&fresh, path).map_err(fail("moving into place"))?;
    Ok(listener)
}

/// Refuses to take the place of a living socket, or of anything else.
fn make_room(path: &Path) -> Result<(), ServeError> {
    let fail = |source| ServeError::Io {
        path: path.to_owned(),
        doing: "looking at",
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ServeError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match StdStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(fail(error)),
        Ok(_) => Err(ServeError::InUse {
            path: path.to_owned(),
        }),
    }
}

/// What all connections share.
struct Shared {
    core: Arc<dyn Core>,
    group: Option<u32>,
    table: Arc<Table>,
}

/// Who is connected.
#[derive(Default)]
struct Table(Mutex<Seats>);

#[derive(Default)]
struct Seats {
    all: usize,
    others: usize,
    by_user: HashMap<u32, usize>,
}

/// A place at the table, free again when it is dropped.
#[derive(Debug)]
struct Seat {
    table: Arc<Table>,
    uid: u32,
    rights: Rights,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} connections", self.seats().all)
    }
}

impl Table {
    fn seats(&self) -> std::sync::MutexGuard<'_, Seats> {
        // Counters are whole whatever a panicking thread did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sit(self: &Arc<Self>, peer: &Peer, rights: Rights) -> Result<Seat, Failure> {
        let mut seats = self.seats();
        let of_user = seats.by_user.get(&peer.uid).copied().unwrap_or(0);
        let full = seats.all >= CONNECTIONS_MAX
            || (rights == Rights::OwnFiles
                && (seats.others >= CONNECTIONS_OTHERS_MAX || of_user >= CONNECTIONS_USER_MAX));
        if full {
            return Err(Failure::Busy(
                "hsmd has too many connections: close some, and try again".to_owned(),
            ));
        }
        seats.all += 1;
        if rights == Rights::OwnFiles {
            seats.others += 1;
            *seats.by_user.entry(peer.uid).or_default() += 1;
        }
        Ok(Seat {
            table: self.clone(),
            uid: peer.uid,
            rights,
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.table.seats();
        seats.all -= 1;
        if self.rights == Rights::OwnFiles {
            seats.others -= 1;
            if let Some(count) = seats.by_user.get_mut(&self.uid) {
                *count -= 1;
                if *count == 0 {
                    seats.by_user.remove(&self.uid);
                }
            }
        }
    }
}

async fn listen(listener: StdListener, shared: &Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("the control socket cannot be watched: {error}"),
    };
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            // What the calls of a dropped connection wait for is cancelled with it.
            _ = stopped.changed() => return connections.shutdown().await,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(welcome(stream, shared.clone()));
            }
            Err(error) => {
                tracing::warn!("accepting a control connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn welcome(stream: UnixStream, shared: Arc<Shared>) {
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => return tracing::warn!("a control connection tells not whose it is: {error}"),
    };
    let mut connection = Connection {
        stream,
        buffer: Vec::new(),
        patience: None,
    };
    match shared.table.sit(&peer, peer.rights(shared.group)) {
        Err(failure) => {
            // Somebody who does not read must not keep even this.
            let _ = tokio::time::timeout(GONE_INTERVAL, connection.fail(&failure)).await;
        }
        Ok(seat) => {
            connection.patience = (seat.rights == Rights::OwnFiles).then_some(OTHERS_PATIENCE);
            let mut session = Session::new(shared.core.clone(), peer, seat.rights);
            // An error here is the client's going away: nobody is left to tell.
            if let Err(error) = connection.run(&mut session).await {
                tracing::debug!("control connection: {error}");
            }
        }
    }
}

/// One client's stream.
pub(super) struct Connection {
    stream: UnixStream,
    /// Bytes that came and were not used yet.
    buffer: Vec<u8>,
    /// How long the client may take; `None`: for ever.
    patience: Option<Duration>,
}

/// What came.
enum Incoming {
    Request(Vec<u8>),
    TooLong,
    End,
}

impl Connection {
    async fn run(&mut self, session: &mut Session) -> io::Result<()> {
        loop {
            let bytes = match self.next().await? {
                Incoming::End => return Ok(()),
                Incoming::Request(bytes) => bytes,
                Incoming::TooLong => {
                    let why = format!("it is longer than {REQUEST_BYTES_MAX} bytes");
                    self.fail(&Failure::Malformed(why)).await?;
                    // Nobody knows where the next request begins.
                    return Ok(());
                }
            };
            match varlink::parse_request(&bytes) {
                Err(failure) => {
                    self.fail(&failure).await?;
                    return Ok(());
                }
                Ok(request) => {
                    let quiet = request.oneway;
                    let reply = match methods::answer(session, &request, self).await? {
                        Ok(parameters) => Reply::last(parameters),
                        Err(failure) => failure.reply(),
                    };
                    if !quiet {
                        self.send(&reply).await?;
                    }
                }
            }
        }
    }

    async fn next(&mut self) -> io::Result<Incoming> {
        match self.patience {
            None => self.next_message().await,
            Some(patience) => tokio::time::timeout(patience, self.next_message()).await?,
        }
    }

    async fn next_message(&mut self) -> io::Result<Incoming> {
        let mut searched = 0;
        loop {
            let new = self.buffer.get(searched..).unwrap_or_default();
            if let Some(at) = new.iter().position(|&byte| byte == 0) {
                let rest = self.buffer.split_off(searched + at + 1);
                let mut bytes = std::mem::replace(&mut self.buffer, rest);
                bytes.pop();
                return Ok(match bytes.len() {
                    0..=REQUEST_BYTES_MAX => Incoming::Request(bytes),
                    _ => Incoming::TooLong,
                });
            }
            searched = self.buffer.len();
            if searched > REQUEST_BYTES_MAX {
                return Ok(Incoming::TooLong);
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(Incoming::End);
            }
        }
    }

    async fn fail(&mut self, failure: &Failure) -> io::Result<()> {
        self.send(&failure.reply()).await
    }

    /// Sends a reply, as fast as the client takes it.
    pub(super) async fn send(&mut self, reply: &Reply) -> io::Result<()> {
        let bytes = varlink::encode(reply)?;
        match self.patience {
            None => self.stream.write_all(&bytes).await,
            Some(patience) => tokio::time::timeout(patience, self.stream.write_all(&bytes)).await?,
        }
    }

    /// Returns when the client has closed its end. Having nothing more to ask is not closing.
    pub(super) async fn gone(&self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        loop {
            tokio::time::sleep(GONE_INTERVAL).await;
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
            let polled = poll(&mut fds, PollTimeout::ZERO);
            let closed = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
            if polled.is_ok()
                && fds[0]
                    .revents()
                    .is_some_and(|found| found.intersects(closed))
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32) -> Peer {
        Peer {
            pid: 1,
            uid,
            gid: uid,
            groups: Vec::new(),
        }
    }

    /// Others cannot take the place of root, nor one user that of another.
    #[test]
    fn connections_are_shared_out() {
        let seats = Arc::new(Table::default());
        let sit = |uid| seats.sit(&peer(uid), peer(uid).rights(None));
        let mut of_one: Vec<_> = (0..CONNECTIONS_USER_MAX)
            .map(|_| sit(1000).unwrap())
            .collect();
        assert!(matches!(sit(1000), Err(Failure::Busy(_))));
        let users = 1001..;
        let others: Vec<_> = users.map_while(|uid| sit(uid).ok()).collect();
        assert_eq!(of_one.len() + others.len(), CONNECTIONS_OTHERS_MAX);
        let roots: Vec<_> = (0..).map_while(|_| sit(0).ok()).collect();
        assert_eq!(roots.len(), CONNECTIONS_MAX - CONNECTIONS_OTHERS_MAX);
        drop((roots, others));
        of_one.pop();
        of_one.push(sit(1000).unwrap());
        drop(of_one);
        let table = seats.seats();
        assert_eq!((table.all, table.others, table.by_user.len()), (0, 0, 0));
    }
}
