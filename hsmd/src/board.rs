//! Who has which segment: what there is to copy, what each volume holds, what on it is damaged.
//!
//! A pool has a segment where a volume of its holds a good copy: one that was read back when it was
//! written, or that the volume's own inventory lists, and that no check has found damaged. Of a volume
//! that is not at hand the catalog's local table says so; it counts for its pool as long as its place
//! is one of those configured. So what status says of copies is the same after a restart, a segment
//! that was found damaged or gone is copied again, and a pool that comes late gets the whole log.

mod held;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tierfs::catalog::{self, CopyRow, Queries, Reader, SegmentRow};
use tierfs::writer::SealedSegment;
use tierfs::{Hash, Lsn, SegmentNo, Time};

use self::held::Held;
use crate::config::Config;
use crate::control::model::{VolumeState, WaitingReason};
use crate::shared::{Shared, lock};

/// Rows read from the catalog at a time.
const PAGE: usize = 10_000;
/// Segments named in a message.
const NAMED: usize = 5;
/// The copy was read back and is as it was written.
const VERIFIED: &str = "verified";
/// The volume's inventory lists the copy.
const LISTED: &str = "listed";
/// The copy is not as it was written.
const DAMAGED: &str = "damaged";
/// The copy was there and is not any more.
const LOST: &str = "lost";

/// True where a copy in this state, in the catalog's local table, can be read as far as is known.
pub fn is_good(state: &str) -> bool {
    matches!(state, VERIFIED | LISTED)
}

/// A segment that is in the spool, or that some pool lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Its number.
    pub no: SegmentNo,
    /// BLAKE3 of its file.
    pub hash: Hash,
    /// Its size.
    pub bytes: u64,
    /// The last LSN before it.
    pub before: u64,
    /// The last LSN in it or before it.
    pub lsn: u64,
}

impl Due {
    fn new(no: SegmentNo, hash: Hash, bytes: u64, (first, last): (Lsn, Option<Lsn>)) -> Self {
        let before = first.get() - 1;
        Self {
            no,
            hash,
            bytes,
            before,
            lsn: last.map_or(before, Lsn::get),
        }
    }
}

impl From<&SealedSegment> for Due {
    fn from(segment: &SealedSegment) -> Self {
        let lsns = (segment.first_lsn, segment.last_lsn);
        Self::new(segment.no, segment.hash, segment.bytes, lsns)
    }
}

impl From<&SegmentRow> for Due {
    fn from(row: &SegmentRow) -> Self {
        let lsns = (row.first_lsn, row.last_lsn);
        Self::new(row.segment, row.hash, row.bytes, lsns)
    }
}

/// A volume as status shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeView {
    /// Where the configuration says that it is.
    pub path: PathBuf,
    /// Its serial, once it was seen.
    pub serial: Option<String>,
    /// As seen last.
    pub state: VolumeState,
    /// Why, in words.
    pub why: Option<String>,
    /// Segments on it.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Free bytes.
    pub free: Option<u64>,
    /// All good copies on it were read back at this time or later.
    pub verified: Option<Time>,
    /// Damaged copies on it.
    pub damaged: u64,
}

impl VolumeView {
    fn new(path: PathBuf, serial: Option<String>) -> Self {
        Self {
            path,
            serial,
            state: VolumeState::Absent,
            why: None,
            segments: 0,
            bytes: 0,
            free: None,
            verified: None,
            damaged: 0,
        }
    }
}

/// What a pool waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    /// Why it cannot go on.
    pub reason: WaitingReason,
    /// The volume's serial, where it is known.
    pub serial: Option<String>,
    /// Where the volume is expected.
    pub path: PathBuf,
    /// The error in plain words.
    pub why: String,
}

/// A pool as status shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// All transactions up to this one are on it.
    pub copied_lsn: u64,
    /// What it waits for.
    pub waits: Option<Waits>,
    /// Since when.
    pub since: Option<Time>,
    /// Sealed segments that it lacks, and their bytes.
    pub lacks: (u64, u64),
    /// Its volumes, as configured.
    pub volumes: Vec<VolumeView>,
}

impl PoolView {
    /// It waits for nothing.
    pub fn goes_on(&mut self) {
        self.waits = None;
        self.since = None;
    }
}

#[derive(Default)]
struct PoolState {
    view: PoolView,
    /// By serial.
    held: BTreeMap<String, Held>,
    /// What is due and not on any of its volumes.
    lacking: BTreeSet<SegmentNo>,
}

impl PoolState {
    fn has(&self, no: SegmentNo) -> bool {
        self.held.values().any(|held| held.has(no))
    }

    /// A segment of a volume that need not be at hand.
    fn count_bytes(&mut self, row: &SegmentRow) {
        for view in &mut self.view.volumes {
            let serial = view.serial.as_ref();
            let held = serial.and_then(|serial| self.held.get(serial));
            if held.is_some_and(|held| held.knows(row.segment)) {
                view.bytes += row.bytes;
            }
        }
    }

    fn path_of(&self, serial: &str) -> Option<&Path> {
        let volumes = &self.view.volumes;
        let found = volumes
            .iter()
            .find(|view| view.serial.as_deref() == Some(serial));
        found.map(|view| view.path.as_path())
    }
}

#[derive(Default)]
struct State {
    due: BTreeMap<SegmentNo, Due>,
    /// Those of `due` that are in the spool.
    spooled: BTreeSet<SegmentNo>,
    pools: BTreeMap<String, PoolState>,
    order: Vec<String>,
    /// The last LSN in any sealed segment.
    top: u64,
}

/// See the module.
pub struct Board {
    shared: Arc<Shared>,
    /// Where a segment that left the spool is looked up.
    catalog: Option<PathBuf>,
    state: Mutex<State>,
}

impl Board {
    /// Pools without volumes; nothing is due yet.
    pub fn new(shared: Arc<Shared>, pools: &[String]) -> Self {
        let named = |name: &String| {
            let mut pool = PoolState::default();
            name.clone_into(&mut pool.view.name);
            (name.clone(), pool)
        };
        let state = State {
            pools: pools.iter().map(named).collect(),
            order: pools.to_vec(),
            ..State::default()
        };
        Self {
            shared,
            catalog: None,
            state: Mutex::new(state),
        }
    }

    /// What the catalog knows of volumes, copies and segments, and what is in the spool.
    pub fn open(
        shared: Arc<Shared>,
        config: &Config,
        queries: Queries<'_>,
        spool: &[SealedSegment],
    ) -> Result<Self, catalog::Error> {
        let pools: Vec<String> = config.pools.iter().map(|pool| pool.name.clone()).collect();
        let mut board = Self::new(shared, &pools);
        board.catalog = Some(config.catalog.clone());
        let mut state = lock(&board.state);
        state.know_volumes(config, queries)?;
        state.know_copies(queries)?;
        state.know_segments(queries)?;
        for segment in spool {
            state.add(Due::from(segment));
        }
        state.refresh();
        drop(state);
        board.tell_damage();
        Ok(board)
    }

    /// A segment is sealed and durable in the spool.
    pub fn add(&self, due: Due) {
        let mut state = lock(&self.state);
        let no = due.no;
        state.add(due);
        state.reconsider([no]);
        drop(state);
        self.shared.nudge();
    }

    /// The first segment after `after` that a pool lacks.
    pub fn missing(&self, pool: &str, after: Option<SegmentNo>) -> Option<Due> {
        let state = lock(&self.state);
        let from = after.map_or(SegmentNo::FIRST, SegmentNo::next);
        let no = state.pools.get(pool)?.lacking.range(from..).next()?;
        state.due.get(no).cloned()
    }

    /// Whether every pool has a copy of the segment that was read back; else what is missing.
    pub fn verified_everywhere(&self, no: SegmentNo) -> Result<(), String> {
        let state = lock(&self.state);
        for (name, pool) in &state.pools {
            if pool.held.values().any(|held| held.has_verified(no)) {
                continue;
            }
            let listed = pool.held.iter().find(|(_, held)| held.has(no));
            return Err(match listed {
                Some((serial, _)) => format!(
                    "its copy in pool {name} was not read back yet: run `tierctl volume verify {serial}`"
                ),
                None => format!(
                    "it is not on pool {name} yet: run `tierctl sync --to media`, `tierctl status` says what the pool waits for"
                ),
            });
        }
        Ok(())
    }

    /// A copy was written and read back.
    pub fn has(&self, pool: &str, serial: &str, no: SegmentNo) -> CopyRow {
        let row = copy_row(no, serial, VERIFIED, Some(Time::now()));
        let mut state = lock(&self.state);
        if let Some(pool) = state.pools.get_mut(pool) {
            let held = pool.held.entry(serial.to_owned()).or_default();
            let known = std::mem::replace(&mut held.counts, true);
            held.insert_good(no, row.verified);
            if known {
                state.reconsider([no]);
            } else {
                state.refresh();
            }
        }
        drop(state);
        self.tell_damage();
        self.shared.nudge();
        row
    }

    /// A copy was read back: is it as it was written? Gives what the catalog is to remember.
    pub fn verified(&self, serial: &str, no: SegmentNo, found: Found) -> CopyRow {
        let state = match found {
            Found::Good => VERIFIED,
            Found::Damaged => DAMAGED,
            Found::Gone => LOST,
        };
        let row = copy_row(no, serial, state, Some(Time::now()));
        self.change(serial, [no], |held| match found {
            Found::Good => held.insert_good(no, row.verified),
            Found::Damaged => held.insert_damaged(no),
            Found::Gone => held.remove(no),
        });
        if found != Found::Good {
            self.require([no]);
        }
        self.tell_damage();
        row
    }

    /// A check of a whole volume, which began at `begun`, has ended.
    pub fn checked(&self, serial: &str, begun: Time) {
        self.change(serial, [], |held| held.checked(begun));
    }

    fn change(
        &self,
        serial: &str,
        segments: impl IntoIterator<Item = SegmentNo>,
        change: impl FnOnce(&mut Held),
    ) {
        let mut state = lock(&self.state);
        let of = |pool: &&mut PoolState| pool.held.contains_key(serial);
        if let Some(pool) = state.pools.values_mut().find(of)
            && let Some(held) = pool.held.get_mut(serial)
        {
            change(held);
        }
        state.reconsider(segments);
        drop(state);
        self.shared.nudge();
    }

    /// A volume's inventory was read: it lists `listed`, and says that `faulty` are damaged. What a
    /// check found damaged stays so until a check finds it good. Gives what the catalog is to remember.
    pub fn inventory(
        &self,
        pool: &str,
        serial: &str,
        listed: &BTreeSet<SegmentNo>,
        faulty: &BTreeSet<SegmentNo>,
    ) -> Vec<CopyRow> {
        let (mut rows, mut wanted) = (Vec::new(), Vec::new());
        let mut state = lock(&self.state);
        if let Some(pool) = state.pools.get_mut(pool) {
            let held = pool.held.entry(serial.to_owned()).or_default();
            held.counts = true;
            for no in listed.iter().filter(|no| !held.knows(**no)) {
                rows.push(copy_row(*no, serial, LISTED, None));
            }
            for no in faulty.difference(listed) {
                if !held.is_damaged(*no) {
                    rows.push(copy_row(*no, serial, DAMAGED, None));
                }
            }
            let here = |no: &SegmentNo| listed.contains(no) || faulty.contains(no);
            let known = held.good().iter().chain(held.damaged().iter().copied());
            wanted.extend(known.filter(|no| !here(no)));
            for no in &wanted {
                rows.push(copy_row(*no, serial, LOST, None));
                held.remove(*no);
            }
            for row in &rows {
                match row.state.as_str() {
                    LISTED => held.insert_good(row.segment, None),
                    DAMAGED => held.insert_damaged(row.segment),
                    _ => {}
                }
            }
            wanted.extend(held.damaged());
        }
        state.refresh();
        drop(state);
        self.require(wanted);
        self.tell_damage();
        self.shared.nudge();
        rows
    }

    /// Segments that some pool may lack now, though they left the spool.
    fn require(&self, wanted: impl IntoIterator<Item = SegmentNo>) {
        let Some(catalog) = &self.catalog else { return };
        let look = || -> Result<Vec<Due>, catalog::Error> {
            let (reader, mut found) = (Reader::open(catalog)?, Vec::new());
            for no in wanted {
                let rows = reader.queries().segments(no, 1)?;
                found.extend(rows.iter().filter(|row| row.segment == no).map(Due::from));
            }
            Ok(found)
        };
        match look() {
            Ok(found) => {
                let mut state = lock(&self.state);
                for due in found {
                    let no = due.no;
                    state.due.entry(no).or_insert(due);
                    state.reconsider([no]);
                }
            }
            Err(error) => tracing::error!(%error, "damaged segments cannot be looked up"),
        }
    }

    /// True where a copy of the segment on this volume is damaged: it cannot be written there again.
    pub fn is_damaged(&self, pool: &str, serial: &str, no: SegmentNo) -> bool {
        let state = lock(&self.state);
        let held = state.pools.get(pool).and_then(|pool| pool.held.get(serial));
        held.is_some_and(|held| held.is_damaged(no))
    }

    /// Changes what status shows of a pool.
    pub fn update(&self, pool: &str, change: impl FnOnce(&mut PoolView)) {
        if let Some(pool) = lock(&self.state).pools.get_mut(pool) {
            change(&mut pool.view);
        }
    }

    /// All pools, in the order of the configuration.
    pub fn pools(&self) -> Vec<PoolView> {
        let state = lock(&self.state);
        let pools = state.order.iter().filter_map(|name| state.pools.get(name));
        let view = |pool: &PoolState| {
            let mut view = pool.view.clone();
            for volume in &mut view.volumes {
                let serial = volume.serial.as_ref();
                if let Some(held) = serial.and_then(|serial| pool.held.get(serial)) {
                    volume.verified = held.verified();
                    volume.damaged = held.damaged().len() as u64;
                    volume.segments = held.count();
                }
            }
            view
        };
        pools.map(view).collect()
    }

    /// True where every pool has everything up to `lsn`.
    pub fn copied(&self, lsn: u64) -> bool {
        let state = lock(&self.state);
        state.pools.values().all(|pool| pool.view.copied_lsn >= lsn)
    }

    /// Segments of the spool that every pool has and whose transactions are all at or below `lsn`.
    pub fn dispensable(&self, lsn: u64) -> Vec<SegmentNo> {
        let state = lock(&self.state);
        let everywhere = |no: SegmentNo| state.pools.values().all(|pool| pool.has(no));
        let dues = state.spooled.iter().filter_map(|no| state.due.get(no));
        dues.filter(|due| due.lsn <= lsn && everywhere(due.no))
            .map(|due| due.no)
            .collect()
    }

    /// A segment left the spool.
    pub fn left_spool(&self, no: SegmentNo) {
        let mut state = lock(&self.state);
        state.spooled.remove(&no);
        state.reconsider([no]);
    }

    /// Places of volumes that have a good copy of a segment.
    pub fn places(&self, no: SegmentNo) -> Vec<PathBuf> {
        let state = lock(&self.state);
        let mut places = Vec::new();
        for pool in state.pools.values() {
            let having = pool.held.iter().filter(|(_, held)| held.has(no));
            let paths = having.filter_map(|(serial, _)| pool.path_of(serial));
            places.extend(paths.map(Path::to_owned));
        }
        places
    }

    /// Volumes that have a good copy of a segment as far as is known, at hand or not: how people call each,
    /// and its configured place.
    pub fn holders(&self, no: SegmentNo) -> Vec<(String, PathBuf)> {
        let state = lock(&self.state);
        let mut holders = Vec::new();
        for (name, pool) in &state.pools {
            let having = pool.held.iter().filter(|(_, held)| held.has(no));
            holders.extend(having.map(|(serial, _)| {
                let path = pool.path_of(serial).unwrap_or(Path::new(""));
                let at = if path.as_os_str().is_empty() {
                    String::new()
                } else {
                    format!(" ({})", path.display())
                };
                (
                    format!("volume {serial} of pool {name}{at}"),
                    path.to_owned(),
                )
            }));
        }
        holders
    }

    /// Says which volumes have damaged segments, and what to do.
    fn tell_damage(&self) {
        let mut found = Vec::new();
        let state = lock(&self.state);
        for (name, pool) in &state.pools {
            for (serial, held) in &pool.held {
                let damaged: Vec<SegmentNo> = held.damaged().iter().copied().collect();
                let lacks = damaged.iter().any(|no| !pool.has(*no));
                let path = pool.path_of(serial).map(Path::to_owned);
                found.push((name.clone(), serial.clone(), path, damaged, lacks));
            }
        }
        drop(state);
        for (pool, serial, path, damaged, lacks) in found {
            let key = format!("volume {serial}");
            if damaged.is_empty() {
                self.shared.well(&key);
                continue;
            }
            let at = path.map_or_else(String::new, |path| format!(" at {}", path.display()));
            let what = format!("volume {serial} of pool {pool}{at} is damaged");
            let todo = if lacks {
                format!(
                    "add an empty directory on another disk to the volumes of pool {pool} in the configuration and restart hsmd: \
                     what is damaged is copied there again from the spool or another pool; then replace this disk"
                )
            } else {
                format!(
                    "pool {pool} has good copies of them on its other volumes; replace this disk when you can"
                )
            };
            let why = format!("{} cannot be read back as written", named(&damaged));
            self.shared.trouble(&key, lacks, what, why, todo);
        }
    }
}

/// What reading a copy back has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is as it was written.
    Good,
    /// It is not.
    Damaged,
    /// It is not there any more.
    Gone,
}

fn copy_row(segment: SegmentNo, serial: &str, state: &str, verified: Option<Time>) -> CopyRow {
    CopyRow {
        segment,
        serial: serial.to_owned(),
        state: state.to_owned(),
        verified,
    }
}

/// "segment 3", "segments 3, 4", "7 segments (3, 4, 5, 6, 7 ...)".
fn named(segments: &[SegmentNo]) -> String {
    let list: Vec<String> = segments
        .iter()
        .take(NAMED)
        .map(ToString::to_string)
        .collect();
    let list = list.join(", ");
    match segments.len() {
        1 => format!("segment {list}"),
        count if count > NAMED => format!("{count} segments ({list} ...)"),
        _ => format!("segments {list}"),
    }
}

impl State {
    /// The volumes that the log knows: each counts for its pool while its place is configured.
    fn know_volumes(
        &mut self,
        config: &Config,
        queries: Queries<'_>,
    ) -> Result<(), catalog::Error> {
        let mut rows = queries.volumes()?;
        rows.sort_by_key(|row| row.lsn);
        for pool in &config.pools {
            let Some(state) = self.pools.get_mut(&pool.name) else {
                continue;
            };
            let mut at = BTreeMap::new();
            for row in rows.iter().filter(|row| row.volume.pool == pool.name) {
                let place = row.volume.place.as_deref();
                let place = place.map(|place| Path::new(OsStr::from_bytes(place)));
                let configured = pool
                    .volumes
                    .iter()
                    .find(|path| Some(path.as_path()) == place);
                let held = state.held.entry(row.volume.serial.clone()).or_default();
                held.counts = configured.is_some();
                if let Some(path) = configured {
                    at.insert(path, row.volume.serial.clone());
                }
            }
            let views = pool.volumes.iter();
            let views = views.map(|path| VolumeView::new(path.clone(), at.get(path).cloned()));
            state.view.volumes = views.collect();
        }
        Ok(())
    }

    fn know_copies(&mut self, queries: Queries<'_>) -> Result<(), catalog::Error> {
        queries.for_each_copy(|row| {
            for pool in self.pools.values_mut() {
                if let Some(held) = pool.held.get_mut(&row.serial) {
                    match row.state.as_str() {
                        state if is_good(state) => held.insert_good(row.segment, row.verified),
                        DAMAGED => held.insert_damaged(row.segment),
                        _ => {}
                    }
                }
            }
        })
    }

    /// Every segment of the log that some pool lacks is due, wherever it is now.
    fn know_segments(&mut self, queries: Queries<'_>) -> Result<(), catalog::Error> {
        let mut from = SegmentNo::FIRST;
        loop {
            let page = queries.segments(from, PAGE)?;
            for row in &page {
                let due = Due::from(row);
                self.top = self.top.max(due.lsn);
                if !self.pools.values().all(|pool| pool.has(row.segment)) {
                    self.due.insert(due.no, due);
                }
                for pool in self.pools.values_mut() {
                    pool.count_bytes(row);
                }
            }
            match page.last() {
                Some(last) if page.len() == PAGE => from = last.segment.next(),
                _ => return Ok(()),
            }
        }
    }

    /// A segment in the spool.
    fn add(&mut self, due: Due) {
        self.top = self.top.max(due.lsn);
        self.spooled.insert(due.no);
        self.due.insert(due.no, due);
    }

    /// Everything anew.
    fn refresh(&mut self) {
        let all: Vec<SegmentNo> = self.due.keys().copied().collect();
        self.reconsider(all);
    }

    /// Who lacks these segments; what nobody needs any more goes. Then the watermarks of all pools: how
    /// far each is without a gap.
    fn reconsider(&mut self, segments: impl IntoIterator<Item = SegmentNo>) {
        for no in segments {
            let Some(due) = self.due.get(&no) else {
                continue;
            };
            let mut needed = self.spooled.contains(&no);
            for pool in self.pools.values_mut() {
                let lacks = !pool.has(no);
                needed |= lacks;
                let (count, bytes) = &mut pool.view.lacks;
                if lacks && pool.lacking.insert(no) {
                    (*count, *bytes) = (*count + 1, *bytes + due.bytes);
                } else if !lacks && pool.lacking.remove(&no) {
                    (*count, *bytes) = (*count - 1, *bytes - due.bytes);
                }
            }
            if !needed {
                self.due.remove(&no);
            }
        }
        for pool in self.pools.values_mut() {
            let first = pool.lacking.first().and_then(|no| self.due.get(no));
            pool.view.copied_lsn = first.map_or(self.top, |due| due.before);
        }
    }
}

#[cfg(test)]
mod tests;
