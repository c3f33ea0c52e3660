//! The programs that use the watched filesystem in the benches of release and recall.
//!
//! They do next to nothing beside the calls that are measured, so that what is compared is the kernel's
//! and hsmd's time, not theirs. Each prints one line of JSON.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use hsm_tests::report::output;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, stat};
use nix::sys::uio::pread;
use nix::unistd::write;
use serde_json::json;

/// What a page holds.
const PAGE_BYTES: usize = 4096;
/// How long one side is measured before the other has its turn.
const TURN: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    load: Load,
}

#[derive(Subcommand)]
enum Load {
    /// The same calls on two files in turns: how much longer the second one's take.
    Warm {
        /// The file whose calls are the measure.
        bare: PathBuf,
        /// The file to compare.
        watched: PathBuf,
        /// Turns of each side.
        #[arg(long, default_value_t = 100)]
        turns: usize,
    },
    /// Makes files.
    Create {
        /// In this directory, which must exist.
        dir: PathBuf,
        /// How many.
        count: usize,
        /// Bytes that are written into each.
        bytes: usize,
    },
    /// Opens files that a list names one on each line, and reads them to their end.
    Open {
        /// The list.
        list: PathBuf,
        /// As many at the same time.
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
}

fn main() -> Result<()> {
    let answer = match Arguments::parse().load {
        Load::Warm {
            bare,
            watched,
            turns,
        } => warm(&bare, &watched, turns)?,
        Load::Create { dir, count, bytes } => create(&dir, count, bytes)?,
        Load::Open { list, threads } => open_all(&list, threads)?,
    };
    output(format_args!("{answer}"));
    Ok(())
}

type Calls<'c> = Box<dyn Fn(usize) -> Result<()> + 'c>;

/// Each call in a loop of its own, so that nothing but the call is in it.
fn calls(path: &Path) -> Result<[(&'static str, Calls<'static>); 3]> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let (opened, looked_at) = (name.clone(), name);
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut page = [0; PAGE_BYTES];
    ensure!(pread(&file, &mut page, 0)? == PAGE_BYTES, "a page is read");
    Ok([
        (
            "pread",
            Box::new(move |count| {
                let mut page = [0; PAGE_BYTES];
                for _ in 0..count {
                    pread(&file, &mut page, 0)?;
                }
                Ok(())
            }),
        ),
        (
            "open",
            Box::new(move |count| {
                for _ in 0..count {
                    drop(open(opened.as_c_str(), OFlag::O_RDONLY, Mode::empty())?);
                }
                Ok(())
            }),
        ),
        (
            "stat",
            Box::new(move |count| {
                for _ in 0..count {
                    stat(looked_at.as_c_str())?;
                }
                Ok(())
            }),
        ),
    ])
}

fn warm(bare: &Path, watched: &Path, turns: usize) -> Result<serde_json::Value> {
    let mut answer = serde_json::Map::new();
    for ((call, one), (_, other)) in calls(bare)?.into_iter().zip(calls(watched)?) {
        let mut count = 1000;
        while timed(&one, count)? < TURN.as_secs_f64() {
            count *= 2;
        }
        timed(&other, count)?;
        let (mut of_bare, mut of_watched, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for turn in 0..turns {
            // Whoever comes second finds a machine that was just busy: both do, in turns.
            let (first, second) = if turn % 2 == 0 {
                (timed(&one, count)?, timed(&other, count)?)
            } else {
                let second = timed(&other, count)?;
                (timed(&one, count)?, second)
            };
            let each = |seconds: f64| seconds * 1e9 / f64::from(u32::try_from(count).unwrap_or(1));
            of_bare.push(each(first));
            of_watched.push(each(second));
            ratios.push(second / first);
        }
        let figures = json!({
            "bare_ns": share(&mut of_bare, 50),
            "watched_ns": share(&mut of_watched, 50),
            "ratio": share(&mut ratios, 50),
        });
        answer.insert(call.to_owned(), figures);
    }
    Ok(answer.into())
}

fn timed(calls: &Calls<'_>, count: usize) -> Result<f64> {
    let begun = Instant::now();
    calls(count)?;
    Ok(begun.elapsed().as_secs_f64())
}

/// The value that this many per cent do not exceed.
fn share(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent / 100).min(values.len().saturating_sub(1));
    values.get(at).copied().unwrap_or(0.0)
}

fn create(dir: &Path, count: usize, bytes: usize) -> Result<serde_json::Value> {
    let names: Vec<CString> = (0..count)
        .map(|number| {
            let path = dir.join(format!("file-{number:06}"));
            CString::new(path.as_os_str().as_bytes())
        })
        .collect::<Result<_, _>>()?;
    let content = vec![b'x'; bytes];
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let begun = Instant::now();
    for name in &names {
        let file = open(name.as_c_str(), flags, Mode::from_bits_truncate(0o644))?;
        if bytes > 0 {
            ensure!(write(&file, &content)? == bytes, "a short write");
        }
    }
    Ok(json!({ "seconds": begun.elapsed().as_secs_f64() }))
}

fn open_all(list: &Path, threads: usize) -> Result<serde_json::Value> {
    let text = std::fs::read_to_string(list)?;
    let paths: Vec<&str> = text.lines().collect();
    let next = AtomicUsize::new(0);
    let one = || -> Result<(Vec<f64>, u64)> {
        let (mut waits, mut bytes) = (Vec::new(), 0);
        let mut buffer = vec![0; 1 << 20];
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let begun = Instant::now();
            let mut file = File::open(path).with_context(|| (*path).to_owned())?;
            loop {
                match file.read(&mut buffer).with_context(|| (*path).to_owned())? {
                    0 => break,
                    read => bytes += read as u64,
                }
            }
            drop(file);
            waits.push(begun.elapsed().as_secs_f64());
        }
        Ok((waits, bytes))
    };
    let begun = Instant::now();
    let results: Vec<Result<(Vec<f64>, u64)>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        let joined = running.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => Err(anyhow::anyhow!("a thread panicked")),
        });
        joined.collect()
    });
    let seconds = begun.elapsed().as_secs_f64();
    let (mut waits, mut bytes) = (Vec::new(), 0);
    for result in results {
        let (some, read) = result?;
        waits.extend(some);
        bytes += read;
    }
    Ok(json!({
        "files": waits.len(),
        "bytes": bytes,
        "seconds": seconds,
        "p50": share(&mut waits, 50),
        "p99": share(&mut waits, 99),
        "max": share(&mut waits, 100),
    }))
}
