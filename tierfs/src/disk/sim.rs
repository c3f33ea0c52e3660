//! A disk in memory for tests: it fails, stops short, is killed and loses power where it is told to.
//!
//! What was written is visible at once and durable only after a sync of the file (its bytes) or of
//! the directory (its names). [`SimDisk::power_loss`] keeps an arbitrary part of what was not synced:
//! any subset of the sectors of any writes, any subset of the changes of names. A sync of a file that
//! fails drops what it should have written, says so once, and leaves the bytes visible, as Linux does
//! (names are journaled: they stay pending).

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, DiskFile, Locked};
use crate::segment::ReadAt;

const SECTOR: usize = 512;

/// What happens at one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails and does nothing (a sync drops what it should have written).
    Fail(i32),
    /// A write does a part of its work and then fails; others as [`Fault::Fail`].
    Short(i32),
    /// The process is killed in the middle of it: it does a part, and nothing works any more.
    Kill,
    /// The process is killed right after it.
    KillAfter,
}

/// A pseudo-random sequence (splitmix64), the same everywhere for a seed.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end` (which is not 0).
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    fn below_len(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap_or(0)
    }

    fn coin(&mut self) -> bool {
        self.number() & 1 == 1
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

#[derive(Clone, Debug, Default)]
struct Node {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    read_only: bool,
    /// Space up to here is the file's, whatever its size.
    reserved: u64,
}

impl Node {
    fn space(&self) -> u64 {
        self.reserved.max(self.live.len() as u64)
    }

    fn change(&mut self, change: Change) {
        apply(&mut self.live, &change);
        self.pending.push(change);
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, new) => {
            bytes.resize(bytes.len().max(at + new.len()), 0);
            bytes[*at..at + new.len()].copy_from_slice(new);
        }
        Change::Truncate(len) => bytes.truncate(*len),
    }
}

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
}

fn apply_name(names: &mut BTreeMap<String, usize>, change: &NameChange) {
    match change {
        NameChange::Create(name, node) => {
            names.insert(name.clone(), *node);
        }
        NameChange::Rename(from, to) => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    nodes: Vec<Node>,
    live: BTreeMap<String, usize>,
    durable: BTreeMap<String, usize>,
    pending: Vec<NameChange>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    dead: bool,
    capacity: Option<u64>,
    boot: u8,
    locked: bool,
    log: Vec<String>,
}

/// What an operation is to do, after the faults had their say.
enum Go {
    All,
    Part(io::Error),
    None(io::Error),
}

fn killed() -> io::Error {
    io::Error::other("the simulated process was killed")
}

impl State {
    /// Counts an operation that changes something.
    fn operation(&mut self, what: impl FnOnce() -> String) -> Go {
        if self.dead {
            return Go::None(killed());
        }
        let number = self.operations;
        self.operations += 1;
        self.log.push(what());
        match self.fault {
            Some((at, fault)) if at == number => match fault {
                Fault::Fail(errno) => Go::None(io::Error::from_raw_os_error(errno)),
                Fault::Short(errno) => Go::Part(io::Error::from_raw_os_error(errno)),
                Fault::Kill => {
                    self.dead = true;
                    Go::Part(killed())
                }
                Fault::KillAfter => {
                    self.dead = true;
                    Go::All
                }
            },
            _ => Go::All,
        }
    }

    fn alive(&self) -> io::Result<()> {
        if self.dead { Err(killed()) } else { Ok(()) }
    }

    fn used(&self) -> u64 {
        self.live
            .values()
            .map(|&node| self.nodes[node].space())
            .sum()
    }

    fn find(&self, name: &str) -> io::Result<usize> {
        self.alive()?;
        self.live
            .get(name)
            .copied()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change_name(&mut self, what: String, change: NameChange) -> io::Result<()> {
        match self.operation(|| what) {
            Go::All => {}
            Go::Part(error) | Go::None(error) => return Err(error),
        }
        apply_name(&mut self.live, &change);
        self.pending.push(change);
        Ok(())
    }
}

/// A disk in memory. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    /// An empty disk without faults.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many operations that change something there were.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// What they were, for messages and for tests of their order.
    pub fn log(&self) -> Vec<String> {
        self.state().log.clone()
    }

    /// Lets `fault` happen at operation `number` (counted from 0 over the disk's life).
    pub fn fault_at(&self, number: u64, fault: Fault) {
        self.state().fault = Some((number, fault));
    }

    /// Limits the bytes of all files together; `None` for no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Bytes of space that all files together take.
    pub fn capacity_used(&self) -> u64 {
        self.state().used()
    }

    /// True after a kill, until [`Self::restart`] or [`Self::power_loss`].
    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// After a kill: a new process sees what the old one wrote. Returns that disk.
    #[must_use]
    pub fn restart(&self) -> Self {
        let mut state = self.state();
        let mut next = State {
            nodes: state.nodes.clone(),
            live: state.live.clone(),
            durable: state.durable.clone(),
            pending: state.pending.clone(),
            capacity: state.capacity,
            boot: state.boot,
            ..State::default()
        };
        state.dead = true;
        next.log.push("restart".to_owned());
        Self(Arc::new(Mutex::new(next)))
    }

    /// The power fails: of what was not synced, an arbitrary part survives. Returns the disk as the
    /// next boot finds it; the old one is dead.
    #[must_use]
    pub fn power_loss(&self, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let mut state = self.state();
        let mut nodes = state.nodes.clone();
        for node in &mut nodes {
            node.live = survivors(node, &mut rng);
            node.durable.clone_from(&node.live);
            node.pending.clear();
            node.reserved = 0;
        }
        let mut names = state.durable.clone();
        let in_order = rng.coin();
        let keep = rng.below_len(state.pending.len() + 1);
        for (number, change) in state.pending.iter().enumerate() {
            if (in_order && number < keep) || (!in_order && rng.coin()) {
                apply_name(&mut names, change);
            }
        }
        let next = State {
            nodes,
            live: names.clone(),
            durable: names,
            capacity: state.capacity,
            boot: state.boot.wrapping_add(1),
            ..State::default()
        };
        state.dead = true;
        Self(Arc::new(Mutex::new(next)))
    }

    /// The bytes of a file.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        let node = *state.live.get(name)?;
        Some(state.nodes[node].live.clone())
    }

    /// Whether write permission was taken from the file.
    pub fn is_read_only(&self, name: &str) -> bool {
        let state = self.state();
        state
            .live
            .get(name)
            .is_some_and(|&node| state.nodes[node].read_only)
    }

    /// Sets the bytes of a file, durably, behind everybody's back. `None` removes it.
    pub fn tamper(&self, name: &str, bytes: Option<Vec<u8>>) {
        let mut state = self.state();
        let Some(live) = bytes else {
            state.live.remove(name);
            state.durable.remove(name);
            return;
        };
        let number = state.nodes.len();
        state.nodes.push(Node {
            durable: live.clone(),
            live,
            ..Node::default()
        });
        state.live.insert(name.to_owned(), number);
        state.durable.insert(name.to_owned(), number);
    }

    /// The names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.state().live.keys().cloned().collect()
    }
}

/// What a file holds after power failed.
fn survivors(node: &Node, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = node.durable.clone();
    // Half of the time a prefix survives, else any sectors of any writes.
    let in_order = rng.coin();
    let keep = rng.below_len(node.pending.len() + 1);
    for (number, change) in node.pending.iter().enumerate() {
        match change {
            _ if in_order && number < keep => apply(&mut bytes, change),
            Change::Write(at, new) if in_order && number == keep => {
                let part = new[..rng.below_len(new.len() + 1)].to_vec();
                apply(&mut bytes, &Change::Write(*at, part));
            }
            _ if in_order => {}
            Change::Truncate(_) => apply(&mut bytes, change),
            Change::Write(at, new) => {
                let mut start = 0;
                while start < new.len() {
                    let end = ((at + start) / SECTOR * SECTOR + SECTOR - at).min(new.len());
                    if rng.coin() {
                        apply(
                            &mut bytes,
                            &Change::Write(at + start, new[start..end].to_vec()),
                        );
                    }
                    start = end;
                }
            }
        }
    }
    bytes
}

/// A file of a [`SimDisk`].
pub struct SimFile {
    disk: SimDisk,
    node: usize,
    name: String,
}

impl ReadAt for SimFile {
    fn len(&self) -> io::Result<u64> {
        let state = self.disk.state();
        state.alive()?;
        Ok(state.nodes[self.node].live.len() as u64)
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.state();
        state.alive()?;
        state.nodes[self.node].live.read_exact_at(buf, offset)
    }
}

impl DiskFile for SimFile {
    fn write_all_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        let at = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = parts.concat();
        let mut result = Ok(());
        match state.operation(|| format!("write {} at {offset} len {}", self.name, bytes.len())) {
            Go::All => {}
            Go::None(error) => return Err(error),
            Go::Part(error) => {
                bytes.truncate(bytes.len() * 2 / 3);
                result = Err(error);
            }
        }
        if let Some(capacity) = state.capacity {
            let end = (at + bytes.len()) as u64;
            let growth = end.saturating_sub(state.nodes[self.node].space());
            let room = capacity.saturating_sub(state.used());
            if growth > room {
                let missing = usize::try_from(growth - room).unwrap_or(0);
                bytes.truncate(bytes.len().saturating_sub(missing));
                result = Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        state.nodes[self.node].change(Change::Write(at, bytes));
        result
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        match state.operation(|| format!("truncate {} to {len}", self.name)) {
            Go::All => {}
            Go::Part(error) | Go::None(error) => return Err(error),
        }
        state.nodes[self.node].reserved = len;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        state.nodes[self.node].change(Change::Truncate(len));
        Ok(())
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        match state.operation(|| format!("reserve {} to {len}", self.name)) {
            Go::All => {}
            Go::Part(error) | Go::None(error) => return Err(error),
        }
        let growth = len.saturating_sub(state.nodes[self.node].space());
        if state
            .capacity
            .is_some_and(|capacity| state.used() + growth > capacity)
        {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let node = &mut state.nodes[self.node];
        node.reserved = node.reserved.max(len);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        let go = state.operation(|| format!("sync {}", self.name));
        let dead = state.dead;
        let node = &mut state.nodes[self.node];
        match go {
            Go::All => {
                // Not the live bytes: what an earlier failed sync dropped never gets there.
                for change in std::mem::take(&mut node.pending) {
                    apply(&mut node.durable, &change);
                }
                Ok(())
            }
            Go::Part(error) | Go::None(error) => {
                // The pages are clean now, and were never written: only a reboot shows it.
                if !dead {
                    node.pending.clear();
                }
                Err(error)
            }
        }
    }

    fn set_read_only(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        match state.operation(|| format!("chmod {}", self.name)) {
            Go::All => {}
            Go::Part(error) | Go::None(error) => return Err(error),
        }
        state.nodes[self.node].read_only = true;
        Ok(())
    }
}

/// The lock of a [`SimDisk`].
pub struct SimLock(SimDisk);

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.state().locked = false;
    }
}

impl Disk for SimDisk {
    type File = SimFile;
    type Lock = SimLock;

    fn path(&self) -> &Path {
        Path::new("/sim")
    }

    fn lock(&self) -> io::Result<Locked<SimLock>> {
        let mut state = self.state();
        state.alive()?;
        if std::mem::replace(&mut state.locked, true) {
            return Ok(Locked::Other(Some(1)));
        }
        drop(state);
        Ok(Locked::Ours(SimLock(self.clone())))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.state();
        state.alive()?;
        Ok(state.live.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<SimFile> {
        let mut state = self.state();
        if state.live.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = state.nodes.len();
        state.nodes.push(Node::default());
        let change = NameChange::Create(name.to_owned(), node);
        state.change_name(format!("create {name}"), change)?;
        Ok(SimFile {
            disk: self.clone(),
            node,
            name: name.to_owned(),
        })
    }

    fn open(&self, name: &str) -> io::Result<SimFile> {
        let node = self.state().find(name)?;
        Ok(SimFile {
            disk: self.clone(),
            node,
            name: name.to_owned(),
        })
    }

    fn open_write(&self, name: &str) -> io::Result<SimFile> {
        self.open(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.find(from)?;
        if state.live.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        state.change_name(format!("rename {from} to {to}"), change)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.find(name)?;
        state.change_name(
            format!("remove {name}"),
            NameChange::Remove(name.to_owned()),
        )
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        match state.operation(|| "sync the directory".to_owned()) {
            Go::All => {}
            Go::Part(error) | Go::None(error) => return Err(error),
        }
        for change in std::mem::take(&mut state.pending) {
            apply_name(&mut state.durable, &change);
        }
        Ok(())
    }

    fn free(&self) -> io::Result<u64> {
        let state = self.state();
        state.alive()?;
        Ok(state
            .capacity
            .map_or(u64::MAX, |bytes| bytes.saturating_sub(state.used())))
    }

    fn boot(&self) -> Option<[u8; 16]> {
        Some([self.state().boot; 16])
    }
}
