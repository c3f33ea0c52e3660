//! `tierctl status`: first the answer to "is my data safe, and if not, what do I do?", then the rest.
//!
//! All of it is a function of what the daemon said, so the same status always reads the same.

use super::format::{Side, Table, add, count, name, percent, size, some, span};
use crate::control::model::{
    LagFile, Notice, PoolStatus, Progress, Severity, State, Status, VolumeState, VolumeStatus,
    Waiting, WaitingReason,
};
use crate::control::when::When;

/// A file that waits longer than so many times the rpo is worth more words than "a moment".
const LAG_RPOS: u64 = 10;
/// And it is never less than this.
const LAG_MIN_MS: u64 = 10_000;
/// A pool that lacks so many sealed segments is not merely copying the newest one.
const BACKLOG_SEGMENTS: u64 = 2;
/// So many waiting files are more than the usual coming and going.
const LAG_FILES: u64 = 1000;
/// Files listed by name.
const WORST_SHOWN: usize = 5;

/// The answer in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Word {
    /// All that was changed until the moment named is on all copies.
    Safe,
    /// Nothing is wrong, and nobody need do anything but wait.
    CatchingUp,
    /// Somebody has to do something.
    NotSafe,
}

/// The answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// In one word.
    pub word: Word,
    /// In one line, the word included.
    pub line: String,
}

impl Verdict {
    fn new(word: Word, text: &str) -> Self {
        let shown = match word {
            Word::Safe => "SAFE",
            Word::CatchingUp => "CATCHING UP",
            Word::NotSafe => "NOT SAFE YET",
        };
        Self {
            word,
            line: format!("{shown}: {text}"),
        }
    }
}

/// Is the data safe?
pub fn verdict(status: &Status) -> Verdict {
    if let Some(text) = trouble(status) {
        return Verdict::new(Word::NotSafe, &text);
    }
    if let Some(text) = catching_up(status) {
        return Verdict::new(Word::CatchingUp, &text);
    }
    Verdict::new(Word::Safe, &safe(status))
}

/// What somebody has to do something about, the worst first.
fn trouble(status: &Status) -> Option<String> {
    let waiting = status.pools.iter().find_map(|pool| {
        pool.waiting
            .as_ref()
            .map(|waiting| waiting_text(pool, waiting, status.now))
    });
    if status.spool.full {
        return Some(spool_text(status, waiting));
    }
    let worst = status
        .notices
        .iter()
        .find(|notice| notice.severity == Severity::Error);
    let worst = worst.map(|notice| match notice.advice.as_str() {
        "" => format!("{}: {}", notice.what, notice.why),
        advice => format!("{}: {}", notice.what, advice),
    });
    let degraded = || {
        (status.state == State::Degraded).then(|| {
            "something does not work: look into the journal (`journalctl -u hsmd`)".to_owned()
        })
    };
    waiting.or(worst).or_else(degraded)
}

fn spool_text(status: &Status, waiting: Option<String>) -> String {
    let spool = &status.spool;
    // Either its own limit is reached or its disk is full.
    let by_limit = spool.bytes_max.saturating_sub(spool.bytes) < spool.free_bytes;
    let (room, more) = if by_limit {
        (
            format!("{} of {}", size(spool.bytes), size(spool.bytes_max)),
            "raise spool_bytes_max in the configuration and restart hsmd".to_owned(),
        )
    } else {
        (
            format!("its disk has {} left", size(spool.free_bytes)),
            format!("make room on the disk of {}", name(&spool.path)),
        )
    };
    let age = span(status.lag.oldest_age_ms.unwrap_or(0).max(status.rpo_ms));
    let todo = match waiting {
        Some(waiting) => format!("{waiting}; or {more}"),
        None => more,
    };
    format!(
        "the spool is full ({room}): what was changed in the last {age} is not logged, only the watched disk has it; {todo}"
    )
}

fn waiting_text(pool: &PoolStatus, waiting: &Waiting, now: When) -> String {
    let volume = waiting.serial.as_ref().map_or_else(
        || "a volume".to_owned(),
        |serial| format!("volume {serial}"),
    );
    let path = name(&waiting.path);
    let lacks = pool.lacks_since.map_or_else(String::new, |since| {
        let since = span(since.millis_until(now));
        format!(" and lacks changes of the last {since}")
    });
    match waiting.reason {
        WaitingReason::Absent => format!(
            "pool {} waits for {volume} (expected at {path}){lacks}: mount it there, copying goes on by itself",
            pool.name
        ),
        WaitingReason::Full => format!(
            "pool {} is full ({volume} at {path} is its last){lacks}: add a directory on another disk to its volumes in the configuration, and restart hsmd",
            pool.name
        ),
        WaitingReason::Failed if waiting.serial.is_none() => format!(
            "pool {} cannot go on{lacks}: {}",
            pool.name,
            name(&waiting.why)
        ),
        WaitingReason::Failed => format!(
            "pool {} cannot use {volume} at {path}{lacks}: {}",
            pool.name,
            name(&waiting.why)
        ),
    }
}

/// What only needs time.
fn catching_up(status: &Status) -> Option<String> {
    match status.state {
        State::Starting => return Some("hsmd is starting, it opens log and catalog".to_owned()),
        State::Stopping => return Some("hsmd is stopping, it logs what still waits".to_owned()),
        State::Examining => {
            let far = status
                .lag
                .examination
                .as_ref()
                .map_or_else(String::new, |progress| {
                    format!(", {}", progress_text(progress, status.now))
                });
            let waiting = match status.lag.pending {
                0 => String::new(),
                pending => format!(
                    ", {} to be logged",
                    some(pending, "file waits", "files wait")
                ),
            };
            return Some(format!(
                "hsmd compares {} with the log{far}{waiting}; what was changed while nobody watched is not safe before that is done",
                name(&status.mount)
            ));
        }
        State::Following | State::Degraded => {}
    }
    let patience = status.rpo_ms.saturating_mul(LAG_RPOS).max(LAG_MIN_MS);
    if status.lag.pending >= LAG_FILES || status.lag.oldest_age_ms.is_some_and(|age| age > patience)
    {
        return Some(lag_text(status));
    }
    if let Some(pool) = status.pools.iter().find(|pool| pool.copied_lsn.is_none()) {
        return Some(format!(
            "pool {} has nothing yet, its first segment is on the way",
            pool.name
        ));
    }
    let behind = status.pools.iter().max_by_key(|pool| pool.lacks_bytes)?;
    (behind.lacks_segments >= BACKLOG_SEGMENTS).then(|| {
        format!(
            "pool {} still gets {} ({}); {}",
            behind.name,
            some(behind.lacks_segments, "segment", "segments"),
            size(behind.lacks_bytes),
            match status.lag.oldest_age_ms {
                Some(age) => format!("everything changed up to {} ago is in the spool", span(age)),
                None => "everything is in the spool".to_owned(),
            }
        )
    })
}

fn lag_text(status: &Status) -> String {
    let files = match status.lag.pending {
        // Examined, and not durable; or not even read from the kernel.
        0 => "changes wait".to_owned(),
        pending => some(pending, "file waits", "files wait"),
    };
    let age = span(status.lag.oldest_age_ms.unwrap_or(0));
    match &status.lag.oldest_path {
        Some(path) => format!(
            "{files} to be logged, the oldest for {age} ({})",
            name(path)
        ),
        None => format!("{files} to be logged, the oldest for {age}"),
    }
}

fn progress_text(progress: &Progress, now: When) -> String {
    let since = span(progress.since.millis_until(now));
    match progress.total {
        Some(total) => format!(
            "{} of about {} files ({}) in {since}",
            count(progress.done),
            count(total.max(progress.done)),
            percent(progress.done, total)
        ),
        None => format!("{} in {since}", some(progress.done, "file", "files")),
    }
}

/// Until when everything is on all copies.
fn safe(status: &Status) -> String {
    until(status, &status.pools.iter().collect::<Vec<_>>())
}

/// Until when everything is on these copies.
fn until(status: &Status, pools: &[&PoolStatus]) -> String {
    let lacked = pools.iter().filter_map(|pool| pool.lacks_since);
    let unlogged = status.lag.oldest_age_ms.unwrap_or(0).max(status.rpo_ms);
    let uncopied = lacked.map(|since| since.millis_until(status.now)).max();
    let all = status.pools.len() as u64;
    let on = format!("on {} of {}", pools.len(), some(all, "pool", "pools"));
    let spool = format!(
        "everything changed up to {} ago is in the spool",
        span(unlogged)
    );
    match uncopied {
        _ if pools.is_empty() => spool,
        Some(uncopied) if uncopied > unlogged => format!(
            "everything changed up to {} ago is {on}, and up to {} ago in the spool",
            span(uncopied),
            span(unlogged)
        ),
        _ => format!("everything changed up to {} ago is {on}", span(unlogged)),
    }
}

/// What is safe all the same while somebody has to do something.
fn meanwhile(status: &Status) -> String {
    let working = status.pools.iter().filter(|pool| pool.waiting.is_none());
    format!(
        "  meanwhile {}\n",
        until(status, &working.collect::<Vec<_>>())
    )
}

/// The whole text.
pub fn render(status: &Status) -> String {
    let verdict = verdict(status);
    let mut text = verdict.line + "\n";
    if verdict.word == Word::NotSafe {
        text += &meanwhile(status);
    }
    for notice in &status.notices {
        text.push_str(&notice_text(notice, status.now));
    }
    text.push_str(&away(status));
    text.push('\n');
    text.push_str(&overview(status));
    text.push_str(&lag(status));
    for pool in &status.pools {
        text.push_str(&pool_text(pool, status));
    }
    text.push_str(&counters(status));
    text
}

/// Volumes that are not here while files are released. Nothing has to be copied to them, or a notice would say
/// so; but what lies on them alone cannot be had.
fn away(status: &Status) -> String {
    let mut text = String::new();
    if status
        .released
        .as_ref()
        .is_none_or(|released| released.files == 0)
    {
        return text;
    }
    for pool in status.pools.iter().filter(|pool| pool.waiting.is_none()) {
        for volume in &pool.volumes {
            if volume.state == VolumeState::Absent && volume.segments > 0 {
                add!(
                    text,
                    "  note: volume {} of pool {} is away: released files whose content is on no other volume that is here wait until it is at {} again\n",
                    volume.serial.as_deref().unwrap_or("-"),
                    pool.name,
                    name(&volume.path)
                );
            }
        }
    }
    text
}

fn notice_text(notice: &Notice, now: When) -> String {
    let severity = match notice.severity {
        Severity::Info => "note",
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    let since = notice.since.map_or_else(String::new, |since| {
        format!(" (for {})", span(since.millis_until(now)))
    });
    let mut text = format!(
        "  {severity}: {}: {}{since}\n",
        name(&notice.what),
        name(&notice.why)
    );
    if !notice.advice.is_empty() {
        add!(text, "    do: {}\n", name(&notice.advice));
    }
    text
}

fn line(label: &str, text: &str) -> String {
    format!("{label:<9} {text}\n")
}

fn lsn(lsn: Option<u64>) -> String {
    lsn.map_or_else(|| "none".to_owned(), |lsn| lsn.to_string())
}

fn overview(status: &Status) -> String {
    let state = match status.state {
        State::Starting => "starting",
        State::Examining => "examining the tree",
        State::Following => "following changes",
        State::Degraded => "degraded",
        State::Stopping => "stopping",
    };
    let mut text = line(
        "watched",
        &format!(
            "{} ({} {})",
            name(&status.mount),
            status.fs_type,
            status.fs_uuid
        ),
    );
    text += &line(
        "daemon",
        &format!(
            "{state}; hsmd {}, process {}, for {}, {} of memory",
            status.version,
            status.pid,
            span(status.uptime_ms),
            size(status.memory_bytes)
        ),
    );
    let time = status
        .durable_time
        .map_or_else(String::new, |time| format!(" of {}", time.to_the_second()));
    text += &line(
        "log",
        &format!(
            "{}: durable up to LSN {}{time}, on every pool up to LSN {}",
            status.log_id,
            lsn(status.durable_lsn),
            lsn(status.copied_lsn)
        ),
    );
    let spool = &status.spool;
    let open = spool.open_segment.map_or_else(String::new, |segment| {
        format!(
            ", segment {segment} open with {}",
            size(spool.open_segment_bytes)
        )
    });
    text += &line(
        "spool",
        &format!(
            "{}: {} of {}, {}{open}; {} free on its disk",
            name(&spool.path),
            size(spool.bytes),
            size(spool.bytes_max),
            some(spool.segments, "sealed segment", "sealed segments"),
            size(spool.free_bytes)
        ),
    );
    text
}

fn lag(status: &Status) -> String {
    let lag = &status.lag;
    if lag.pending == 0 && lag.oldest_age_ms.is_none() {
        return line("waiting", "nothing");
    }
    let mut text = line("waiting", &lag_text(status));
    let mut table = Table::new(
        10,
        &[
            ("FOR", Side::Right),
            ("SIZE", Side::Right),
            ("FILE", Side::Left),
        ],
    );
    for LagFile {
        path,
        age_ms,
        why,
        bytes,
    } in lag.worst.iter().take(WORST_SHOWN)
    {
        let file = format!("{} ({why})", name(path));
        table.row([span(*age_ms), size(*bytes), file]);
    }
    if !table.is_empty() {
        text += &table.text();
    }
    text
}

fn pool_text(pool: &PoolStatus, status: &Status) -> String {
    let has = match (pool.copied_lsn, pool.lacks_since) {
        (_, None) => "has everything that is durable".to_owned(),
        (None, Some(_)) => "has nothing yet".to_owned(),
        (Some(lsn), Some(since)) => format!(
            "has everything up to LSN {lsn}, lacks what came in the last {}",
            span(since.millis_until(status.now))
        ),
    };
    let backlog = match pool.lacks_segments {
        0 => String::new(),
        segments => format!(
            ", {} ({}) to copy",
            some(segments, "segment", "segments"),
            size(pool.lacks_bytes)
        ),
    };
    let mut text = line("pool", &format!("{} {has}{backlog}", pool.name));
    if let Some(waiting) = &pool.waiting {
        let since = waiting.since;
        add!(
            text,
            "{:10}waits since {} ({}): {}\n",
            "",
            since.to_the_second(),
            span(since.millis_until(status.now)),
            name(&waiting.why)
        );
    }
    let mut table = volume_table(10);
    for volume in &pool.volumes {
        table.row(volume_cells(volume));
    }
    text + &table.text()
}

/// The table of volumes.
pub(super) fn volume_table(indent: usize) -> Table {
    Table::new(
        indent,
        &[
            ("VOLUME", Side::Left),
            ("STATE", Side::Left),
            ("SEGMENTS", Side::Right),
            ("SIZE", Side::Right),
            ("FREE", Side::Right),
            ("VERIFIED", Side::Left),
            ("PATH", Side::Left),
        ],
    )
}

pub(super) fn volume_cells(volume: &VolumeStatus) -> [String; 7] {
    let dash = || "-".to_owned();
    let state = match volume.state {
        VolumeState::Scratch => "scratch",
        VolumeState::Filling => "filling",
        VolumeState::Full => "full",
        VolumeState::Absent => "absent",
        VolumeState::ReadOnly => "read-only",
        VolumeState::Damaged => "damaged",
        VolumeState::Foreign => "foreign",
    };
    let state = match volume.damaged {
        0 => state.to_owned(),
        damaged => format!("{state} ({damaged} damaged)"),
    };
    [
        volume.serial.clone().unwrap_or_else(dash),
        state,
        count(volume.segments),
        size(volume.bytes),
        volume.free_bytes.map_or_else(dash, size),
        volume.last_verified.map_or_else(
            || "unknown".to_owned(),
            |time| time.to_the_second().to_string(),
        ),
        name(&volume.path),
    ]
}

fn counters(status: &Status) -> String {
    let sweep = &status.sweep;
    let mut parts = Vec::new();
    if let Some(running) = &sweep.running {
        parts.push(format!("running, {}", progress_text(running, status.now)));
    }
    parts.push(match sweep.last_finished {
        Some(time) => format!(
            "last ended {} ago and found {}",
            span(time.millis_until(status.now)),
            some(sweep.last_found, "change", "changes")
        ),
        None => "none has ended since the start".to_owned(),
    });
    if let Some(next) = sweep.next.filter(|_| sweep.running.is_none()) {
        parts.push(format!("next in {}", span(status.now.millis_until(next))));
    }
    parts.push("it finds what raises no event (mmap, chattr)".to_owned());
    let mut text = line("sweep", &parts.join("; "));
    text += &line(
        "activity",
        &format!(
            "{} read, {}; {} examined, the log grew by {} since the start",
            some(status.events.read, "event", "events"),
            some(status.events.overflows, "overflow", "overflows"),
            some(status.examined_files, "file", "files"),
            size(status.logged_bytes)
        ),
    );
    text += &line(
        "catalog",
        &format!(
            "{}: {} of {}, {}; {}",
            name(&status.catalog.path),
            some(status.catalog.files, "file", "files"),
            size(status.catalog.files_bytes),
            some(status.catalog.versions, "version", "versions"),
            size(status.catalog.bytes)
        ),
    );
    if let Some(space) = &status.space {
        let [full, limit] = super::space::text(space);
        text += &line("space", &full);
        text += &line("", &limit);
    }
    if let Some(released) = &status.released {
        let wanted = match (released.wanted, released.waiting) {
            (0, 0) => "none is wanted now".to_owned(),
            (files, programs) => format!(
                "{} to be recalled, {} waiting",
                some(files, "file is", "files are"),
                some(programs, "program is", "programs are")
            ),
        };
        let every = if released.every_file {
            "; every opening of a file is asked about for now"
        } else {
            ""
        };
        text += &line(
            "released",
            &format!(
                "{} not on disk; {wanted}{every}",
                some(released.files, "file is", "files are")
            ),
        );
    }
    if let Some(refill) = &status.refill {
        let files = some(refill.files, "file is", "files are");
        let now = match &refill.rests {
            Some(why) => format!("; it rests: {}", name(why)),
            None => String::new(),
        };
        text += &line(
            "refill",
            &format!("{files} still to flow back in the background{now}"),
        );
    }
    if status.fuzzy_files + status.unrestorable_files > 0 {
        text += &line(
            "marked",
            &format!(
                "{} fuzzy (changed while read), {} not restorable in full (`tierctl state FILE` says why)",
                some(status.fuzzy_files, "file", "files"),
                count(status.unrestorable_files)
            ),
        );
    }
    text
}
