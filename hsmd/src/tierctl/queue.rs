//! `tierctl queue`: what recall has to do, and calling it off.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context;
use nix::unistd::{Uid, User};

use super::args::Args;
use super::format::{add, name, size, some, span};
use super::{PROGRAM, connect, needs, path_parameters};
use crate::control::model::{QueueList, QueueStage, QueuedFile};
use crate::control::queue::CancelParameters;
use crate::control::when::When;
use crate::output::{self, Exit};

/// Processes that are named of one user.
const PIDS: usize = 5;

pub(super) fn list(args: &Args) -> anyhow::Result<Exit> {
    let queue = connect(args)?.queue()?;
    if args.json {
        output::json(&queue)?;
    } else {
        output::text(&render(&queue, When::now(), &user_name))?;
    }
    Ok(Exit::Done)
}

/// A user as people know him.
fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

pub(super) fn render(queue: &QueueList, now: When, user: &dyn Fn(u32) -> String) -> String {
    if queue.files.is_empty() {
        return "nobody waits for a released file\n".to_owned();
    }
    let mut text = String::new();
    for file in &queue.files {
        text.push_str(&file_text(file, now, user));
    }
    if queue.omitted > 0 {
        add!(text, "and {} more\n", some(queue.omitted, "file", "files"));
    }
    let programs: u64 = queue.files.iter().map(|file| file.programs).sum();
    let files = queue.files.len() as u64 + queue.omitted;
    add!(
        text,
        "{} in the queue, {}\n",
        some(files, "file", "files"),
        match programs {
            1 => "1 program waits".to_owned(),
            many => format!("{} wait", some(many, "program", "programs")),
        }
    );
    text + &needs::render(&queue.needs)
}

fn file_text(file: &QueuedFile, now: When, user: &dyn Fn(u32) -> String) -> String {
    let path = match &file.path.path {
        Some(path) => name(path),
        None => file.file.map_or_else(
            || "a file without a name".to_owned(),
            |file| format!("file {file}"),
        ),
    };
    let stage = match file.stage {
        QueueStage::Wanted => "wanted".to_owned(),
        QueueStage::Filling => format!("filling, {} of it there", size(file.filled)),
        QueueStage::There => "there, not yet durable".to_owned(),
    };
    let large = file
        .size
        .map_or_else(String::new, |bytes| format!(", {}", size(bytes)));
    let since = file.since.map_or_else(
        || ", nobody waits for it".to_owned(),
        |since| format!(", for {}", span(since.millis_until(now))),
    );
    let mut text = format!("{path}{large}: {stage}{since}\n");
    text.push_str(&waiters_text(file, user));
    for volume in &file.needs.volumes {
        add!(text, "  is on {}\n", needs::volume_name(volume));
    }
    if file.needs.nowhere_bytes > 0 {
        add!(
            text,
            "  no good copy is known of {}\n",
            size(file.needs.nowhere_bytes)
        );
    }
    if let Some(error) = &file.error {
        add!(text, "  it is tried again and again: {}\n", name(error));
    }
    text
}

/// Who waits, a line for each user.
fn waiters_text(file: &QueuedFile, user: &dyn Fn(u32) -> String) -> String {
    let mut users: BTreeMap<u32, (u64, u64, Vec<String>)> = BTreeMap::new();
    for waiter in &file.waiters {
        let (programs, requests, pids) = users.entry(waiter.uid).or_default();
        *programs += u64::from(waiter.program);
        *requests += u64::from(!waiter.program);
        pids.extend(waiter.pid.map(|pid| pid.to_string()));
    }
    let mut text = String::new();
    for (uid, (programs, requests, pids)) in users {
        let mut parts = Vec::new();
        if programs > 0 {
            let mut part = some(programs, "program", "programs");
            if !pids.is_empty() {
                let more = if pids.len() > PIDS { " ..." } else { "" };
                let pids: Vec<String> = pids.into_iter().take(PIDS).collect();
                add!(part, " (process {}{more})", pids.join(", "));
            }
            parts.push(part);
        }
        if requests > 0 {
            parts.push(some(requests, "request", "requests"));
        }
        add!(text, "  user {}: {}\n", name(&user(uid)), parts.join(", "));
    }
    let shown = file.waiters.len() as u64;
    let all = file.programs + file.requests;
    if all > shown {
        add!(text, "  and {} more\n", all - shown);
    }
    text
}

pub(super) fn cancel(args: &Args, paths: &[PathBuf], user: Option<&str>) -> anyhow::Result<Exit> {
    let mut asked = CancelParameters {
        all: paths.is_empty(),
        user: user.map(uid_of).transpose()?,
        ..CancelParameters::default()
    };
    for path in paths {
        asked.paths.push(path_parameters(path)?.path);
    }
    let done = connect(args)?.cancel(&asked)?;
    if args.json {
        output::json(&done)?;
    } else {
        output::text(&format!(
            "cancelled: {}, for which {} and {} waited\n",
            some(done.files, "file", "files"),
            some(done.programs, "program", "programs"),
            some(done.requests, "request", "requests"),
        ))?;
    }
    for failure in &done.failures {
        let what = format!("{}: {}", name(&failure.path.path), name(&failure.error));
        output::error(PROGRAM, &what);
    }
    Ok(match (done.failures.is_empty(), done.files) {
        (true, _) => Exit::Done,
        (false, 0) => Exit::No,
        (false, _) => Exit::Partly,
    })
}

fn uid_of(text: &str) -> anyhow::Result<u32> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    let user = User::from_name(text).with_context(|| format!("looking up user {text}"))?;
    let user = user.with_context(|| format!("there is no user {text}: give a name or a number"))?;
    Ok(user.uid.as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::model::{Needs, QueueWaiter, VolumeNeed};
    use crate::control::path::PathText;

    fn when(text: &str) -> When {
        text.parse().unwrap()
    }

    fn volume(pool: &str, serial: &str, present: bool) -> VolumeNeed {
        VolumeNeed {
            pool: pool.to_owned(),
            volume: serial.to_owned(),
            path: Some(format!("/archive/{pool}1")),
            present,
            files: 1,
            bytes: 300_001,
            segments: vec![3, 4],
        }
    }

    fn waiter(uid: u32, pid: Option<i32>) -> QueueWaiter {
        QueueWaiter {
            uid,
            program: pid.is_some(),
            pid,
            since: when("2026-11-20T17:00:00Z"),
        }
    }

    #[test]
    fn a_queue_reads_well() {
        let user = |uid: u32| if uid == 0 { "root" } else { "alice" }.to_owned();
        let now = when("2026-11-20T17:00:12Z");
        let empty = render(&QueueList::default(), now, &user);
        assert_eq!(empty, "nobody waits for a released file\n");
        let needs = Needs {
            files: 1,
            bytes: 400_001,
            spool_bytes: 100_000,
            nowhere_bytes: 0,
            volumes: vec![volume("a", "4f00", false), volume("b", "9182", false)],
        };
        let wanted = QueuedFile {
            path: Some(PathText::of(b"/data/a\nb")).into(),
            file: Some(7),
            size: Some(400_001),
            stage: QueueStage::Wanted,
            filled: 0,
            since: Some(when("2026-11-20T17:00:00Z")),
            programs: 3,
            requests: 1,
            waiters: vec![
                waiter(0, Some(4711)),
                waiter(1000, Some(4712)),
                waiter(1000, None),
            ],
            needs: needs.clone(),
            error: Some("segment 3 is within reach nowhere".to_owned()),
        };
        let filling = QueuedFile {
            path: None.into(),
            stage: QueueStage::Filling,
            filled: 1 << 20,
            since: None,
            programs: 0,
            requests: 0,
            waiters: vec![],
            needs: Needs::default(),
            error: None,
            ..wanted.clone()
        };
        let queue = QueueList {
            files: vec![wanted, filling],
            omitted: 0,
            needs,
        };
        let text = "\
/data/a\\nb, 390 KiB: wanted, for 12 s
  user root: 1 program (process 4711)
  user alice: 1 program (process 4712), 1 request
  and 1 more
  is on volume 4f00 of pool a at /archive/a1, which is AWAY
  is on volume 9182 of pool b at /archive/b1, which is AWAY
  it is tried again and again: segment 3 is within reach nowhere
file 7, 390 KiB: filling, 1 MiB of it there, nobody waits for it
2 files in the queue, 3 programs wait
97 KiB are in the spool and need no volume
volume 4f00 of pool a at /archive/a1, which is AWAY: 1 file, 292 KiB in 2 segments
volume 9182 of pool b at /archive/b1, which is AWAY: 1 file, 292 KiB in 2 segments
bring the volumes that are away; those of one pool suffice
";
        assert_eq!(render(&queue, now, &user), text);
    }
}
