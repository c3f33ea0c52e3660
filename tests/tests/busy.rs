//! Files that are written all the time are captured at a bounded cost, and whole once they rest.
//!
//! `HSM_FULL=1` fills the disk image with data first.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};
use rusqlite::Connection;

fn full() -> bool {
    std::env::var_os("HSM_FULL").is_some()
}

/// How long the writers write.
fn seconds() -> u64 {
    if full() { 60 } else { 6 }
}

/// Ends the writer, also where the test fails: its scope waits for it.
struct StopAtEnd<'s>(&'s AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn write_database(path: &Path, stop: &AtomicBool) -> rusqlite::Result<i64> {
    let open = Connection::open(path)?;
    open.execute_batch(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
         CREATE TABLE orders(id INTEGER PRIMARY KEY, item TEXT, count INTEGER);",
    )?;
    let mut rows = 0i64;
    while !stop.load(Ordering::Relaxed) {
        let transaction = open.unchecked_transaction()?;
        for _ in 0..20 {
            rows += 1;
            open.execute(
                "INSERT INTO orders(item, count) VALUES (hex(randomblob(50)), ?1)",
                [rows],
            )?;
        }
        open.execute("UPDATE orders SET count = count + 1 WHERE id % 50 = 0", [])?;
        transaction.commit()?;
    }
    Ok(rows)
}

/// Nothing is fuzzy any more, and all comes back.
fn is_whole_at_rest(system: &System, context: &str) {
    system.sync_all();
    let status = system.status();
    assert_eq!(status["fuzzy_files"], 0, "{context}: {status:#}");
    system.check(context);
}

#[test]
fn a_database_that_is_written_all_the_time() {
    hsm_tests::compare::ignore_holes();
    let system = Setup::new(Kind::Ext4).bytes(2 << 30).start();
    let path = system.at("orders.db");
    let stop = AtomicBool::new(false);
    let rows = thread::scope(|scope| {
        let ended = StopAtEnd(&stop);
        let writer = scope.spawn(|| write_database(&path, &stop));
        for _ in 0..seconds() {
            thread::sleep(Duration::from_secs(1));
            // A sync must end although the writer does not.
            system.sync(&[]);
        }
        drop(ended);
        writer.join().expect("the writer").expect("SQLite")
    });
    say(format_args!("{rows} rows"));
    is_whole_at_rest(&system, "a database");
    let fresh = system.replay_to_fresh(&[]);
    let copy = Connection::open(fresh.at("orders.db")).expect("the copy");
    let answer: String = copy
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .expect("integrity_check");
    assert_eq!(answer, "ok");
    let count: i64 = copy
        .query_row("SELECT count(*) FROM orders", [], |row| row.get(0))
        .expect("count");
    assert_eq!(count, rows);
}

const IMAGE_BYTES: u64 = 2 << 30;

/// Writes 4 KiB of noise at random places of the image, some hundred times a second.
fn write_image(file: &File, stop: &AtomicBool, written: &AtomicU64) -> io::Result<()> {
    let mut place = 12345u64;
    while !stop.load(Ordering::Relaxed) {
        place = place
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let offset = (place >> 20) % (IMAGE_BYTES / 4096) * 4096;
        file.write_all_at(&noise(place, 4096), offset)?;
        written.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(4));
    }
    Ok(())
}

#[test]
fn a_disk_image_with_random_writes() {
    hsm_tests::compare::ignore_holes();
    let system = Setup::new(Kind::Xfs).bytes(6 << 30).start();
    let path = system.at("disk.img");
    let file = File::create_new(&path).expect("an image");
    file.set_len(IMAGE_BYTES).expect("its size");
    let filled = if full() { IMAGE_BYTES } else { 64 << 20 };
    for place in (0..filled).step_by(1 << 20) {
        file.write_all_at(&noise(place, 1 << 20), place)
            .expect("to fill it");
    }
    system.sync(&[]);
    let before = system.status()["logged_bytes"]
        .as_u64()
        .expect("logged_bytes");
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let ended = StopAtEnd(&stop);
        let writer = scope.spawn(|| write_image(&file, &stop, &written));
        for _ in 0..seconds() {
            thread::sleep(Duration::from_secs(1));
            let status = system.status();
            say(format_args!("lag: {}", status["lag"]));
        }
        drop(ended);
        writer.join().expect("the writer").expect("writes");
    });
    drop(file);
    system.sync(&[]);
    let logged = system.status()["logged_bytes"]
        .as_u64()
        .expect("logged_bytes")
        - before;
    let written = written.into_inner();
    let each = logged / written.max(1);
    say(format_args!(
        "{written} writes, {logged} bytes logged, {each} for each"
    ));
    // A block of 64 KiB for each write, and a little for those that were captured half way.
    assert!(each < 80 << 10, "{each} bytes were logged for each write");
    is_whole_at_rest(&system, "a disk image");
}
