//! Measures how long a policy's question takes over a large catalog: `scan ROWS [DIRECTORY]`.
//!
//! The catalog is made up with SQL, since a real one of ten million files takes an hour to fill: a
//! thousand files in a directory, sizes up to 2 GiB of which a twentieth is large, ages up to two years.
//! Prints a line of JSON for each question, in the order in which they were asked.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hsm_tests::report::output;
use hsmd::sys::pagecache::drop_cached;
use rusqlite::Connection;
use tierfs::catalog::Catalog;
use tierfs::files::{Files, Limits, Select, View};
use tierfs::residency::{Residency, path_beside};
use tierfs::{LogId, Lsn};

const NOW: i64 = 1_700_000_000;

/// Before this one the catalog leaves the page cache.
const COLD: &str = "size and age, nothing cached";

/// Names and conditions. The second is the one of the goal.
const QUESTIONS: [(&str, &str, Option<&str>); 6] = [
    (COLD, "size > mib(100) and age(mtime) > days(30)", None),
    (
        "size and age",
        "size > mib(100) and age(mtime) > days(30)",
        None,
    ),
    (
        "size and age of reading",
        "size > mib(100) and age(atime) > days(30)",
        None,
    ),
    (
        "candidates for release, weighed",
        "size > mib(1) and state <> 'migrated' and not pinned",
        Some("size * age(atime)"),
    ),
    ("age of reading", "age(atime) > days(700)", None),
    ("path", "path glob 'd77/*' and size > mib(100)", None),
];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let rows: i64 = arguments
        .next()
        .context("scan ROWS [DIRECTORY]")?
        .parse()
        .context("ROWS is a number")?;
    let dir = match arguments.next() {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let path = dir.path().join("catalog.db");
    fill(&path, rows)?;
    let view = View {
        prefix: Vec::new(),
        copied: Lsn::new(1),
        now: NOW,
    };
    for (name, condition, weight) in QUESTIONS {
        let select = Select {
            condition,
            weight,
            params: &[],
        };
        if name == COLD {
            let file = std::fs::File::open(&path)?;
            file.sync_all()?;
            drop_cached(file.as_fd(), 0, 0)?;
        }
        let begun = Instant::now();
        let mut files = Files::open(&path, &view)?;
        let mut hits = 0_u64;
        files.select(&select, &Limits::default(), &mut |_| {
            hits += 1;
            ControlFlow::Continue(())
        })?;
        let seconds = begun.elapsed().as_secs_f64();
        ensure!(hits > 0, "{condition} finds nothing");
        output(format_args!(
            "{{\"question\": \"{name}\", \"rows\": {rows}, \"hits\": {hits}, \"seconds\": {seconds:.3}}}"
        ));
    }
    Ok(())
}

fn fill(path: &Path, rows: i64) -> Result<()> {
    drop(Catalog::create(path, LogId([7; 16]))?);
    drop(Residency::open(&path_beside(path))?);
    let conn = Connection::open(path)?;
    conn.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")?;
    let numbers =
        "WITH RECURSIVE n(i) AS (VALUES (0) UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1)";
    let dirs = rows / 1000 + 1;
    let inode = "INSERT INTO inode SELECT i + 2, 1, ?2, 420, 1000, 1000,
        CASE WHEN ?2 = 1 THEN 0 WHEN abs(random()) % 20 = 0 THEN abs(random()) % 2147483648
             ELSE abs(random()) % 4194304 END,
        ?4 - abs(random()) % 63072000, 5, ?4, 5, NULL, NULL, NULL, NULL, 0, 0, 1, randomblob(32), 0,
        CAST(printf('%020d', i + ?3) AS BLOB), i FROM n";
    conn.execute(
        "INSERT INTO inode VALUES (1, 1, 1, 493, 0, 0, 0, ?1, 0, ?1, 0, NULL, NULL, NULL, NULL, 0, 0,
         NULL, NULL, 0, NULL, 2)",
        [NOW],
    )?;
    conn.execute(&format!("{numbers} {inode}"), (dirs, 1, 0, NOW))?;
    conn.execute(
        &format!("{numbers} INSERT INTO dentry SELECT 1, CAST('d' || i AS BLOB), i + 2, 1 FROM n"),
        [dirs],
    )?;
    let files = inode.replacen("i + 2", "i + 2 + ?3", 1);
    conn.execute(&format!("{numbers} {files}"), (rows, 0, dirs, NOW))?;
    conn.execute(
        &format!(
            "{numbers} INSERT INTO dentry SELECT i / 1000 + 2, CAST('f' || i AS BLOB), i + 2 + ?2, 1 FROM n"
        ),
        (rows, dirs),
    )?;
    conn.execute(
        "INSERT INTO txn VALUES (1, ?1, 0, ?1, 0, 1, 0, 1)",
        [NOW - 1000],
    )?;
    conn.execute_batch("COMMIT; PRAGMA journal_mode = WAL")?;
    // A tenth was read since it was written, a hundredth is pinned, a twentieth released.
    conn.execute_batch(
        "INSERT INTO pin SELECT file, 1 FROM inode WHERE kind = 0 AND file % 100 = 0",
    )?;
    let list = Connection::open(path_beside(path))?;
    list.execute("ATTACH ?1 AS catalog", [path.to_string_lossy()])?;
    list.execute_batch(
        "INSERT INTO atime SELECT file, mtime_s + 1000 FROM catalog.inode WHERE kind = 0 AND file % 10 = 0;
         INSERT INTO stub SELECT file, x'00', 0 FROM catalog.inode WHERE kind = 0 AND file % 20 = 1",
    )?;
    Ok(())
}
