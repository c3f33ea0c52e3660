//! The interface's text says what is true: methods, errors, and the fields of every type.

use std::collections::{BTreeMap, BTreeSet};

use hsmd::control::CoreError;
use hsmd::control::methods::Method;
use hsmd::control::model::*;
use hsmd::control::path::PathText;
use hsmd::control::varlink::{Failure, INTERFACE, INTERFACE_TEXT};
use serde::Serialize;
use serde_json::Value;

use crate::fake::{all_well, at};

fn without_comments() -> String {
    let lines = INTERFACE_TEXT.lines().filter(|line| !line.starts_with('#'));
    lines.collect::<Vec<_>>().join("\n")
}

/// The names at the front of `text`'s fields: `(a: int, b: ?[]string)`.
fn fields(text: &str) -> BTreeSet<String> {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => parts.push(String::new()),
            c if depth == 0 => parts.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    let names = parts.iter().filter_map(|part| part.split(':').next());
    names
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// What follows `keyword NAME`, by name.
fn declared(keyword: &str) -> BTreeMap<String, String> {
    let text = without_comments();
    let mut found = BTreeMap::new();
    for part in text.split(&format!("\n{keyword} ")).skip(1) {
        let name: String = part
            .chars()
            .take_while(char::is_ascii_alphanumeric)
            .collect();
        let open = part.find('(').unwrap();
        let mut depth = 0;
        let close = part[open..].find(|c| {
            depth += match c {
                '(' => 1,
                ')' => -1,
                _ => 0,
            };
            depth == 0
        });
        found.insert(name, part[open + 1..open + close.unwrap()].to_owned());
    }
    found
}

fn keys<T: Serialize>(value: &T) -> BTreeSet<String> {
    let value = serde_json::to_value(value).unwrap();
    value.as_object().unwrap().keys().cloned().collect()
}

#[test]
fn every_method_is_described() {
    let described: BTreeSet<String> = declared("method").into_keys().collect();
    let known = Method::ALL.iter().map(|(name, _)| (*name).to_owned());
    assert_eq!(described, known.collect());
    for (name, method) in Method::ALL {
        assert_eq!(name, format!("{method:?}"));
    }
}

#[test]
fn every_error_is_described() {
    let described = declared("error");
    let text = String::new;
    let failures = [
        Failure::PermissionDenied(text()),
        Failure::Busy(text()),
        CoreError::NotFound(text()).into(),
        CoreError::NotWatched {
            path: "/".into(),
            mount: "/".into(),
        }
        .into(),
        CoreError::Unavailable(text()).into(),
        CoreError::Cancelled("").into(),
        CoreError::Failed(text()).into(),
    ];
    let mut names = BTreeSet::new();
    for failure in failures {
        let name = failure.name();
        let name = name
            .strip_prefix(&format!("{INTERFACE}."))
            .unwrap()
            .to_owned();
        assert_eq!(
            fields(&described[&name]),
            keys(&failure.reply().parameters.unwrap())
        );
        names.insert(name);
    }
    assert_eq!(names, described.into_keys().collect());
}

#[rustfmt::skip] // a table
#[allow(clippy::too_many_lines)]
fn samples() -> Vec<(&'static str, BTreeSet<String>)> {
    let status = all_well();
    let progress = Progress {
        since: at(0),
        done: 0,
        total: None,
    };
    let path = PathText::of(b"/\xff");
    vec![
        ("Status", keys(&status)),
        ("Lag", keys(&status.lag)),
        ("SpoolStatus", keys(&status.spool)),
        ("PoolStatus", keys(&status.pools[0])),
        ("VolumeStatus", keys(&status.pools[0].volumes[0])),
        (
            "PoolVolume",
            keys(&PoolVolume {
                pool: "a".into(),
                volume: status.pools[0].volumes[0].clone(),
            }),
        ),
        ("ReleasedStatus", keys(&status.released)),
        ("RefillStatus", keys(&status.refill)),
        ("SpaceStatus", keys(&status.space)),
        ("PathName", keys(&path)),
        (
            "Moved",
            keys(&Moved {
                path: path.clone(),
                word: MovedWord::Refused,
                bytes: 0,
                why: None,
            }),
        ),
        ("SweepStatus", keys(&status.sweep)),
        ("EventCounts", keys(&status.events)),
        ("CatalogStatus", keys(&status.catalog)),
        ("Progress", keys(&progress)),
        (
            "LagFile",
            keys(&LagFile {
                path: String::new(),
                age_ms: 0,
                why: String::new(),
                bytes: 0,
            }),
        ),
        ("Waiting", keys(&waiting())),
        ("Notice", keys(&notice())),
        ("FileState", keys(&file_state(path))),
        (
            "FileCopy",
            keys(&FileCopy {
                pool: String::new(),
                volume: String::new(),
                path: None,
                segments: 0,
                segments_needed: 0,
                verified: None,
            }),
        ),
        (
            "Pending",
            keys(&Pending {
                since: at(0),
                why: String::new(),
            }),
        ),
        (
            "Versions",
            keys(&Versions {
                list: vec![],
                omitted: 0,
            }),
        ),
        (
            "Version",
            keys(&Version {
                file: 1,
                lsn: 1,
                time: at(0),
                changes: vec![],
                size: None,
                fuzzy: false,
            }),
        ),
        (
            "Transaction",
            keys(&Transaction {
                lsn: 1,
                time: at(0),
                wall: at(0),
                segment: 1,
                frame_offset: 0,
                operations_total: 0,
                operations: vec![],
            }),
        ),
        (
            "Operation",
            keys(&Operation {
                kind: String::new(),
                file: None,
                parent: None,
                name: None,
                text: String::new(),
            }),
        ),
        (
            "Content",
            keys(&Content {
                file: 1,
                lsn: 1,
                content_lsn: None,
                size: 0,
                fuzzy: false,
            }),
        ),
        (
            "Piece",
            keys(&Piece {
                data: None,
                zeros: None,
            }),
        ),
        ("VerifyProgress", keys(&VerifyProgress::default())),
        (
            "VerifyDone",
            keys(&VerifyDone {
                serial: String::new(),
                pool: String::new(),
                path: String::new(),
                objects: 0,
                bytes: 0,
                faults: vec![],
            }),
        ),
        (
            "CatalogDigest",
            keys(&CatalogDigest {
                lsn: None,
                digest: String::new(),
            }),
        ),
        ("Event", event_keys()),
        ("Path", keys(&PathText::of(b"/\xff"))),
        ("QueueList", keys(&QueueList::default())),
        ("QueuedFile", keys(&queued_file())),
        ("QueueWaiter", keys(&queued_file().waiters[0])),
        ("Needs", keys(&Needs::default())),
        ("VolumeNeed", keys(&queued_file().needs.volumes[0])),
        ("RecallPlan", keys(&RecallPlan::default())),
        ("RecallProgress", keys(&RecallProgress::default())),
        ("CancelDone", keys(&CancelDone::default())),
        ("FoundFile", keys(&found_file())),
        (
            "DirectoryUsage",
            keys(&DirectoryUsage {
                path: PathText::of(b"/\xff"),
                files: 0,
                logical_bytes: 0,
                resident_bytes: 0,
                released_bytes: 0,
                stubs: 0,
            }),
        ),
        ("PinsDone", keys(&PinsDone::default())),
        (
            "PathFailure",
            keys(&PathFailure {
                path: PathText::of(b"/\xff"),
                error: String::new(),
            }),
        ),
        (
            "PolicyFile",
            keys(&PolicyFile {
                rule: String::new(),
                action: String::new(),
                file: 1,
                path: Some(PathText::of(b"/\xff")).into(),
                size: 0,
                weight: None,
                error: None,
            }),
        ),
        (
            "RuleDone",
            keys(&RuleDone {
                rule: String::new(),
                action: String::new(),
                why: String::new(),
                files: 0,
                bytes: 0,
                failed: 0,
                gave_up: false,
                left: false,
                error: None,
            }),
        ),
        (
            "Explanation",
            keys(&Explanation {
                file: found_file(),
                rules: vec![],
            }),
        ),
        (
            "RuleExplained",
            keys(&RuleExplained {
                rule: String::new(),
                action: String::new(),
                applies: false,
                weight: None,
                clauses: vec![],
            }),
        ),
        (
            "Clause",
            keys(&Clause {
                text: String::new(),
                holds: None,
                values: vec![],
            }),
        ),
        (
            "ColumnValue",
            keys(&ColumnValue {
                column: String::new(),
                value: None,
            }),
        ),
    ]
}

fn queued_file() -> QueuedFile {
    QueuedFile {
        path: Some(PathText::of(b"/\xff")).into(),
        file: None,
        size: None,
        stage: QueueStage::Wanted,
        filled: 0,
        since: None,
        programs: 0,
        requests: 0,
        waiters: vec![QueueWaiter {
            uid: 0,
            program: true,
            pid: None,
            since: at(0),
        }],
        needs: Needs {
            volumes: vec![VolumeNeed {
                pool: String::new(),
                volume: String::new(),
                path: None,
                present: false,
                files: 0,
                bytes: 0,
                segments: vec![],
            }],
            ..Needs::default()
        },
        error: None,
    }
}

fn found_file() -> FoundFile {
    FoundFile {
        file: 1,
        path: Some(PathText::of(b"/\xff")).into(),
        size: 0,
        mtime: at(0),
        atime: at(0),
        ctime: None,
        uid: 0,
        gid: 0,
        user: None,
        group: None,
        mode: 0,
        links: 0,
        state: String::new(),
        pinned: false,
        lsn: 1,
        version: None,
        logged: None,
    }
}

fn waiting() -> Waiting {
    Waiting {
        reason: WaitingReason::Full,
        serial: None,
        path: String::new(),
        since: at(0),
        why: String::new(),
    }
}

fn notice() -> Notice {
    Notice {
        severity: Severity::Info,
        what: String::new(),
        why: String::new(),
        advice: String::new(),
        since: None,
    }
}

fn file_state(path: PathText) -> FileState {
    FileState {
        path,
        state: FileStateWord::Dirty,
        file: None,
        kind: None,
        size: None,
        mtime: None,
        lsn: None,
        time: None,
        fuzzy: false,
        pinned: false,
        unrestorable: vec![],
        pending: None,
        pools_having: 0,
        pools: 0,
        copies: vec![],
        nowhere_bytes: 0,
    }
}

fn event_keys() -> BTreeSet<String> {
    let (time, text) = (at(0), String::new);
    let events = [
        Event::Durable {
            time,
            lsn: 1,
            paths: vec![],
            paths_total: 0,
        },
        Event::Sealed {
            time,
            segment: 1,
            bytes: 0,
            lsn: None,
        },
        Event::Copied {
            time,
            pool: text(),
            volume: text(),
            segment: 1,
            lsn: None,
        },
        Event::Volume {
            time,
            pool: text(),
            volume: None,
            path: text(),
            state: VolumeState::Full,
        },
        Event::Notice {
            time,
            notice: notice(),
        },
        Event::Overflow { time, total: 1 },
        Event::Sweep {
            time,
            finished: true,
            files: 0,
            found: 0,
        },
        Event::State {
            time,
            state: State::Following,
        },
        Event::Missed { count: 1 },
    ];
    let mut all = BTreeSet::new();
    for event in &events {
        all.extend(keys(event));
        // Events come back from their JSON as they were.
        let value: Value = serde_json::to_value(event).unwrap();
        assert_eq!(&serde_json::from_value::<Event>(value).unwrap(), event);
    }
    all
}

#[test]
fn every_type_has_the_fields_that_are_sent() {
    let described = declared("type");
    let samples = samples();
    for (name, sent) in &samples {
        assert_eq!(&fields(&described[*name]), sent, "type {name}");
    }
    let known: BTreeSet<String> = samples.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(described.into_keys().collect::<BTreeSet<_>>(), known);
}
