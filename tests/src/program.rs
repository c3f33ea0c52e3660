//! Running the project's programs: where they lie, what they answered, and a limit on their time.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::sys;

/// A program that takes longer hangs.
pub const LIMIT: Duration = Duration::from_mins(2);

/// The program's file: in `HSM_BIN`, or where cargo puts it beside this test.
pub fn locate(name: &str) -> PathBuf {
    let dir = std::env::var_os("HSM_BIN").map_or_else(
        || {
            let me = std::env::current_exe().expect("this test's own path");
            // target/debug/deps/test
            me.ancestors()
                .nth(2)
                .expect("a target directory")
                .to_owned()
        },
        PathBuf::from,
    );
    let program = dir.join(name);
    assert!(
        program.exists(),
        "{} is not there: `cargo build -p hsmd -p replay --bins` first, or set HSM_BIN",
        program.display()
    );
    program
}

/// What a program answered.
#[derive(Clone, Debug)]
pub struct Ran {
    command: String,
    /// Its exit status; 128 and the signal's number if it was killed.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said beside.
    pub stderr: String,
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` ended with status {}\n--- stdout\n{}--- stderr\n{}---",
            self.command,
            self.code,
            cut(&self.stdout),
            cut(&self.stderr)
        )
    }
}

/// The end of a long text.
fn cut(text: &str) -> &str {
    let from = text.len().saturating_sub(6000);
    let from = (from..text.len())
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0);
    &text[from..]
}

impl Ran {
    /// Itself, if it ended with this status.
    #[must_use]
    pub fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self}");
        self
    }

    /// Itself, if it succeeded.
    #[must_use]
    pub fn done(self) -> Self {
        self.with_code(0)
    }

    /// What it printed, as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON: {e}: {self}"))
    }

    /// All that it said.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Itself, if it refused with status 2 and says each of these words.
    #[must_use]
    pub fn refuses(self, words: &[&str]) -> Self {
        assert_eq!(self.code, 2, "should refuse: {self}");
        let text = self.text().to_lowercase();
        for word in words {
            assert!(
                text.contains(&word.to_lowercase()),
                "should say {word:?}: {self}"
            );
        }
        assert!(!text.contains("panicked"), "{self}");
        self
    }
}

/// A program that runs, its output going to files.
pub struct Running {
    command: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    /// Starts a command. Its output goes to `NAME.out` and `NAME.err` in `dir`, appended. It is
    /// killed when the calling thread ends.
    pub fn start(mut command: Command, dir: &Path, name: &str) -> Self {
        let line = shown(&command);
        let file = |ending: &str| {
            let path = dir.join(format!("{name}.{ending}"));
            let file = File::options().create(true).append(true).open(&path);
            (path, file.expect("a file for output"))
        };
        let (stdout, out) = file("out");
        let (stderr, err) = file("err");
        command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .env("NO_COLOR", "1");
        sys::kill_with_parent(&mut command);
        let child = command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
        Self {
            command: line,
            child,
            stdout,
            stderr,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    /// Whether it runs still.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("to wait for it").is_none()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("to send a signal");
    }

    /// What it has said so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// Waits for its end, at most so long; `None` if it goes on.
    pub fn wait(&mut self, limit: Duration) -> Option<Ran> {
        let end = Instant::now() + limit;
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.child.try_wait().expect("to wait for it") {
                return Some(self.ran(status));
            }
            if Instant::now() >= end {
                return None;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Kills it (SIGKILL) and gives what it said.
    pub fn kill(&mut self) -> Ran {
        let _ = self.child.kill();
        let status = self.child.wait().expect("to wait for it");
        self.ran(status)
    }

    fn ran(&self, status: ExitStatus) -> Ran {
        use std::os::unix::process::ExitStatusExt;
        let read =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let by_signal = || 128 + status.signal().unwrap_or_default();
        Ran {
            command: self.command.clone(),
            code: status.code().unwrap_or_else(by_signal),
            stdout: read(&self.stdout),
            stderr: read(&self.stderr),
        }
    }
}

fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args().map(OsStr::to_string_lossy) {
        line.push(' ');
        line.push_str(&argument);
    }
    line
}

/// Runs a command to its end; panics if it takes longer than [`LIMIT`].
pub fn run(command: Command) -> Ran {
    run_within(command, LIMIT)
}

/// Runs a command to its end; panics if it takes longer than `limit`.
pub fn run_within(command: Command, limit: Duration) -> Ran {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut running = Running::start(command, dir.path(), "run");
    match running.wait(limit) {
        Some(ran) => ran,
        None => panic!("hangs for {limit:?}: {}", running.kill()),
    }
}
