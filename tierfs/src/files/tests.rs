//! The view over a small catalog, and conditions that want more than they may have.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::usage::{Sums, Usage};
use super::{BadExpression, COLUMNS, FUNCTIONS, Files, FilesError, Limits, Select, Value, View};
use crate::catalog::{Catalog, Place};
use crate::ids::{FileId, LogId, Lsn, SegmentNo, Time};
use crate::record::{Bits, Inode, Kind, Link, Op, Pin, Txn};
use crate::residency::{Residency, Stub, path_beside};

const NOW: i64 = 1_700_000_000;
const DAY: i64 = 86_400;

fn id(number: u64) -> FileId {
    FileId::new(number).unwrap()
}

fn at(seconds: i64) -> Time {
    Time { seconds, nanos: 5 }
}

fn inode(file: u64, kind: Kind, days_old: i64) -> Op {
    Op::Inode(Inode {
        file: id(file),
        ctime: Some(at(NOW - days_old * DAY + 1)),
        kind,
        btime: None,
        mode: 0o640,
        uid: 0,
        gid: 4_000_000,
        mtime: at(NOW - days_old * DAY),
        rdev: None,
        target: None,
        flags: Bits(0),
        unrestorable: Bits(0),
    })
}

fn link(parent: u64, name: &[u8], file: u64) -> Op {
    Op::Link(Link {
        parent: id(parent),
        name: name.to_vec(),
        file: id(file),
    })
}

fn apply(catalog: &mut Catalog, ops: Vec<Op>) {
    let lsn = Lsn::after(catalog.folded());
    let time = at(NOW - 1000 + i64::try_from(lsn.get()).unwrap());
    let place = Place {
        segment: SegmentNo::FIRST,
        frame_offset: 0,
    };
    let txn = Txn {
        lsn,
        time,
        wall: time,
        ops,
    };
    catalog.apply(&txn, place).unwrap();
}

/// `/video/a.mkv` (10, two names), `/video/old/b.mkv` (11, pinned), `/c` (12, a stub), an orphan (13),
/// a suspect with a name that is no UTF-8 (14).
fn sample(path: &Path) {
    let mut catalog = Catalog::create(path, LogId([7; 16])).unwrap();
    apply(
        &mut catalog,
        vec![
            inode(1, Kind::Directory, 0),
            inode(2, Kind::Directory, 0),
            link(1, b"video", 2),
            inode(3, Kind::Directory, 0),
            link(2, b"old", 3),
            inode(10, Kind::Regular, 1),
            link(2, b"a.mkv", 10),
            link(3, b"again", 10),
            inode(11, Kind::Regular, 40),
            link(3, b"b.mkv", 11),
        ],
    );
    apply(
        &mut catalog,
        vec![
            inode(12, Kind::Regular, 50),
            link(1, b"c", 12),
            inode(13, Kind::Regular, 3),
            inode(14, Kind::Regular, 4),
            link(1, b"\xff", 14),
            Op::Pin(Pin {
                file: id(11),
                pinned: true,
            }),
        ],
    );
    catalog.commit().unwrap();
    let mut list = Residency::open(&path_beside(path)).unwrap();
    let stub = Stub {
        file: id(12),
        handle: vec![1],
    };
    list.add(&[stub], NOW).unwrap();
    let suspect = Stub {
        file: id(14),
        handle: vec![2],
    };
    list.add_suspects(&[suspect]).unwrap();
    list.set_atimes(&[(id(11), NOW - 2 * DAY)]).unwrap();
}

fn view(prefix: &[u8]) -> View {
    View {
        prefix: prefix.to_vec(),
        copied: Lsn::new(1),
        now: NOW,
    }
}

fn with_sample(test: impl FnOnce(Files)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.db");
    sample(&path);
    test(Files::open(&path, &view(b"")).unwrap());
}

fn select(files: &mut Files, condition: &str, weight: Option<&str>) -> Vec<u64> {
    let mut found = Vec::new();
    let select = Select {
        condition,
        weight,
        params: &[],
    };
    files
        .select(&select, &Limits::default(), &mut |hit| {
            found.push(hit.file.get());
            ControlFlow::Continue(())
        })
        .unwrap_or_else(|error| panic!("{condition}: {error}"));
    found
}

#[test]
fn conditions_find_files() {
    with_sample(|mut files| {
        let cases: &[(&str, &[u64])] = &[
            ("1", &[10, 11, 12, 13, 14]),
            ("size > mib(100)", &[]),
            ("size < kib(0.5) and age(mtime) > days(30)", &[11, 12]),
            ("age(atime) > days(30)", &[12]),
            ("age(atime) between hours(47) and weeks(1)", &[11, 13, 14]),
            ("path glob 'video/*'", &[10, 11]),
            ("path glob 'video/*.mkv' and not pinned", &[10]),
            ("name = 'b.mkv'", &[11]),
            ("path is null", &[13]),
            ("links = 2", &[10]),
            ("links = 0", &[13]),
            ("state = 'migrated'", &[12]),
            ("state = 'premigrated'", &[10, 11]),
            ("state = 'suspect'", &[14]),
            ("state in ('logged', 'migrated')", &[12, 13]),
            ("pinned", &[11]),
            (
                "uid = 0 and user = 'root' and gname is null",
                &[10, 11, 12, 13, 14],
            ),
            ("mode & 64 = 0", &[10, 11, 12, 13, 14]),
            ("lsn = 2 and version is null", &[12, 13, 14]),
            ("logged = 1699999002", &[12, 13, 14]),
            ("ctime - mtime = 1 and file < 12", &[10, 11]),
            ("null", &[]),
        ];
        for (condition, expected) in cases {
            assert_eq!(
                select(&mut files, condition, None),
                *expected,
                "{condition}"
            );
        }
        assert_eq!(
            select(&mut files, "file <> 13", Some("age(mtime)")),
            [12, 11, 14, 10]
        );
        assert_eq!(select(&mut files, "file < 12", Some("null")), [10, 11]);
    });
}

#[test]
fn a_row_has_every_column() {
    with_sample(|mut files| {
        let row = files.row(id(11)).unwrap().unwrap();
        assert_eq!(row.path.as_deref(), Some(&b"video/old/b.mkv"[..]));
        assert_eq!(row.name.as_deref(), Some(&b"b.mkv"[..]));
        assert_eq!((row.size, row.mtime), (0, NOW - 40 * DAY));
        assert_eq!(
            (row.atime, row.ctime),
            (NOW - 2 * DAY, Some(NOW - 40 * DAY + 1))
        );
        assert_eq!((row.uid, row.gid, row.mode), (0, 4_000_000, 0o640));
        assert_eq!((row.user.as_deref(), row.group), (Some("root"), None));
        assert_eq!((row.links, row.pinned), (1, true));
        assert_eq!((row.lsn.get(), row.version), (1, None));
        assert_eq!(
            (row.state.as_str(), row.logged),
            ("premigrated", Some(NOW - 999))
        );
        assert_eq!(files.row(id(14)).unwrap().unwrap().path.unwrap(), b"\xff");
        assert_eq!(files.row(id(2)).unwrap(), None, "a directory");
        assert_eq!(
            files.value(id(11), "age(atime) > days(1)", &[]).unwrap(),
            Some(1.0)
        );
        assert_eq!(files.value(id(11), "gname = 'x'", &[]).unwrap(), None);
    });
}

#[test]
fn paths_begin_at_the_mount_point() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.db");
    sample(&path);
    std::fs::remove_file(path_beside(&path)).unwrap();
    let mut files = Files::open(&path, &view(b"video")).unwrap();
    let mut paths = Vec::new();
    files
        .paths("path is not null", &[], &Limits::default(), &mut |path| {
            paths.push(String::from_utf8_lossy(path.unwrap()).into_owned());
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(paths, ["a.mkv", "old/b.mkv"]);
    // Without a list of stubs nothing is released, and reading counts as writing.
    assert_eq!(select(&mut files, "state = 'migrated'", None), []);
    assert_eq!(select(&mut files, "atime <> mtime", None), []);
}

fn refused(files: &Files, expression: &str) -> BadExpression {
    match files.check(expression, &[]) {
        Err(FilesError::Expression(bad)) => bad,
        other => panic!("{expression}: {other:?}"),
    }
}

#[test]
fn expressions_are_told_what_is_wrong() {
    let files = Files::made_up().unwrap();
    let cases = [
        (
            "sise > 3",
            Some(0),
            "no such column: sise",
            "the columns are file, path",
        ),
        (
            "size > \"x y\"",
            Some(7),
            "no such column: \"x y\"",
            "single quotes",
        ),
        (
            "size > megs(3)",
            Some(7),
            "no such function: megs",
            "kib, mib",
        ),
        (
            "mib() > 3",
            Some(0),
            "wrong number of arguments",
            "the functions are",
        ),
        (
            "size >",
            Some(6),
            "syntax error",
            "write an expression like",
        ),
        (
            "count(*) > 3",
            Some(0),
            "may not use the function count",
            "hsm-policy(5)",
        ),
        (
            "mib('a') > size",
            None,
            "mib() wants a number, like mib(10)",
            "write an expression",
        ),
        (
            "age(name) > 1",
            None,
            "age() wants a time",
            "write an expression",
        ),
        (
            "(size, mtime)",
            None,
            "row value misused",
            "write an expression",
        ),
    ];
    for (expression, at, why, advice) in cases {
        let bad = refused(&files, expression);
        assert!(bad.why.contains(why), "{expression}: {bad:?}");
        assert!(bad.advice.contains(advice), "{expression}: {bad:?}");
        assert_eq!(bad.at, at, "{expression}: {bad:?}");
    }
    let used = files.check("size > mib(1) and gname = 'x' and age(atime) > 3", &[]);
    assert_eq!(used.unwrap(), ["size", "atime", "group"]);
    for function in FUNCTIONS {
        let arguments = ["1", "1, 1", "1, 1, 1"];
        let known = arguments.iter().any(|arguments| {
            let checked = files.check(&format!("{function}({arguments}) > 0"), &[]);
            checked.is_ok()
        });
        assert!(known, "{function} is listed and cannot be called");
    }
}

/// The text is not trusted to be an expression of its own kind: the database is guarded as well.
#[test]
fn nothing_but_the_view_is_read() {
    let files = Files::made_up().unwrap();
    for expression in [
        "file in (select file from inode)",
        "file in inode",
        "exists (select 1 from sqlite_schema)",
        "(select 1 from pragma_table_info('inode'))",
        "file in (select 2 from stub as files)",
        "load_extension('x')",
        "hsm_path(1, 'x') is null",
        "hsm_user(0) = 'root'",
        "sqlite_version() > '3'",
        "zeroblob(1000000000) is null",
        "printf('%1000000000d', 1) is null",
        "randomblob(9) is null",
        "1) union select 2 from inode where (1",
        "1); select 1 from inode where (1",
        "1); drop table pin; --",
        "file in (with x as (select file from inode) select * from x)",
    ] {
        let checked = files.check(expression, &[]);
        assert!(
            matches!(
                checked,
                Err(FilesError::Expression(_) | FilesError::Catalog(_))
            ),
            "{expression}: {checked:?}"
        );
    }
    // And a list named as the view does not stand in for it.
    let checked = files.check("file in (select count(*) from files)", &[]);
    assert!(checked.is_err(), "{checked:?}");
}

#[test]
fn a_search_ends_in_time_and_when_it_is_cancelled() {
    with_sample(|mut files| {
        // Enough steps for the handler to be asked.
        let slow = (0..12)
            .map(|n| format!("abs(file + {n}) > 0"))
            .collect::<Vec<_>>();
        let slow = vec![format!("({})", slow.join(" and ")); 500].join(" and ");
        let select = Select {
            condition: &slow,
            weight: None,
            params: &[],
        };
        let limits = Limits {
            time: Some(Duration::ZERO),
            cancelled: None,
        };
        let mut each = |_| ControlFlow::Continue(());
        let ended = files.select(&select, &limits, &mut each);
        assert!(
            matches!(ended, Err(FilesError::TimedOut { .. })),
            "{ended:?}"
        );
        let flag = Arc::new(AtomicBool::new(true));
        let limits = Limits {
            time: None,
            cancelled: Some(&flag),
        };
        let ended = files.select(&select, &limits, &mut each);
        assert!(matches!(ended, Err(FilesError::Cancelled)), "{ended:?}");
        assert!(files.select(&select, &Limits::default(), &mut each).is_ok());
    });
}

#[test]
fn parameters_are_bound() {
    with_sample(|mut files| {
        let mut found = Vec::new();
        let params = [Value::Text(b"video/*".to_vec()), Value::Integer(10)];
        let select = Select {
            condition: "path glob ?1 and file > ?2",
            weight: Some("size"),
            params: &params,
        };
        files
            .select(&select, &Limits::default(), &mut |hit| {
                found.push(hit.file.get());
                ControlFlow::Break(())
            })
            .unwrap();
        assert_eq!(found, [11]);
        assert_eq!(COLUMNS.len(), 18);
    });
}

#[test]
fn the_manual_has_every_column_and_function() {
    let manual = include_str!("../../../man/hsm-policy.5");
    for column in COLUMNS {
        let tag = format!(".It Va {}\n", column.name);
        assert!(manual.contains(&tag), "hsm-policy.5 lacks {}", column.name);
    }
    let tags = manual.lines().filter(|line| line.starts_with(".It Fn "));
    let listed: Vec<&str> = tags
        .flat_map(|line| line.split("Fn ").skip(1))
        .filter_map(|function| function.split(' ').next())
        .collect();
    let mut known = FUNCTIONS.to_vec();
    let mut found = listed.clone();
    known.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, known);
}

#[test]
fn a_directory_is_added_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.db");
    sample(&path);
    let conn = rusqlite::Connection::open(&path).unwrap();
    for (file, size, content) in [(10, 100, 40), (11, 10, 10), (12, 1000, 1000)] {
        conn.execute("UPDATE inode SET size = ?2 WHERE file = ?1", (file, size))
            .unwrap();
        conn.execute(
            "INSERT INTO extent VALUES (?1, 0, ?2, 0, 0, 1, x'')",
            (file, content),
        )
        .unwrap();
    }
    let usage = Usage::open(&path).unwrap();
    let below = |top, depth| {
        let mut list = Vec::new();
        usage
            .below(
                id(top),
                depth,
                &AtomicBool::new(false),
                &mut |path, sums| {
                    list.push((String::from_utf8_lossy(path).into_owned(), sums));
                },
            )
            .unwrap();
        list
    };
    let sums = |files, logical, resident, released, stubs| Sums {
        files,
        logical,
        resident,
        released,
        stubs,
    };
    // The file with two names counts where it is met first.
    let video = ("video".to_owned(), sums(2, 110, 50, 0, 0));
    let old = ("video/old".to_owned(), sums(1, 10, 10, 0, 0));
    let all = (String::new(), sums(4, 1110, 50, 1000, 1));
    assert_eq!(below(1, 0), std::slice::from_ref(&all));
    assert_eq!(below(1, 1), [video.clone(), all.clone()]);
    assert_eq!(below(1, 9), [old, video, all]);
    assert_eq!(usage.of_file(id(12)).unwrap(), sums(1, 1000, 0, 1000, 1));
    assert_eq!(usage.of_file(id(10)).unwrap(), sums(1, 100, 40, 0, 0));
}
