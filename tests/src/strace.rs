//! strace as a trap: a process is killed when one of its threads is about to make a certain call, or its calls are
//! delayed, so the product needs no fault points of its own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// Before which call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Call {
    /// The system call.
    pub name: &'static str,
    /// Which of the thread's calls of this kind, from 1.
    pub nth: u32,
}

/// `nth` counts from 1.
pub const fn call(name: &'static str, nth: u32) -> Call {
    Call { name, nth }
}

impl Call {
    /// The arguments of strace.
    fn words(self) -> [String; 6] {
        let Self { name, nth } = self;
        [
            "-o".to_owned(),
            "/dev/null".to_owned(),
            "-e".to_owned(),
            format!("trace={name}"),
            "-e".to_owned(),
            format!("inject={name}:signal=KILL:when={nth}"),
        ]
    }

    /// A command's words with the trap before them. The process that is started is the command's own, and
    /// its children are left alone.
    pub fn before(self) -> Vec<String> {
        let mut words = vec!["strace".to_owned(), "-D".to_owned()];
        words.extend(self.words());
        words
    }
}

/// Whom a trap waits for.
#[derive(Clone, Copy, Debug)]
pub enum Whom<'w> {
    /// A process with all its threads, and all children that it makes from now on.
    All(i32),
    /// The thread with this name.
    Thread(i32, &'w str),
    /// The first thread alone.
    First(i32),
}

/// A trap that is set. Ends with whom it waits for, or when it is dropped.
pub struct Trap(Child);

impl Trap {
    /// Sets it.
    pub fn set(whom: Whom<'_>, call: Call) -> Self {
        let mut command = Command::new("strace");
        match whom {
            Whom::All(process) => command.args(["-f", "-p", &process.to_string()]),
            Whom::Thread(process, name) => command.args(["-p", &thread_of(process, name)]),
            Whom::First(process) => command.args(["-p", &process.to_string()]),
        };
        command.args(call.words());
        Self(attached(command))
    }

    /// Waits until the process is dead. False where something else is so before.
    pub fn kills_before(self, process: i32, over: &dyn Fn() -> bool) -> bool {
        while is_alive(process) {
            if over() {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        // The kernel lets go of whom it traces. Asked to do so itself it may wait for the dead for ever.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Interferes with a process until it is dropped.
pub struct Tracer(Child);

impl Tracer {
    /// Does something (`delay_enter=MICROSECONDS`, `signal=KILL:when=1`; see strace(1)) to each call of this name
    /// that any thread of the process makes.
    pub fn on(pid: i32, call: &str, act: &str) -> Self {
        Self::on_all(pid, &[(call, act)])
    }

    /// The same to calls of several names.
    pub fn on_all(pid: i32, calls: &[(&str, &str)]) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-p", &pid.to_string(), "-o", "/dev/null"]);
        let names: Vec<&str> = calls.iter().map(|(call, _)| *call).collect();
        command.args(["-e", &format!("trace={}", names.join(","))]);
        for (call, act) in calls {
            command.args(["-e", &format!("inject={call}:{act}")]);
        }
        Self(attached(command))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // The kernel lets the process go on.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts strace, and waits until it has attached to its process.
fn attached(mut command: Command) -> Child {
    let mut tracer = command.stderr(Stdio::piped()).spawn().expect("strace");
    let mut told = BufReader::new(tracer.stderr.take().expect("its messages"));
    let mut line = String::new();
    told.read_line(&mut line).expect("a message");
    assert!(line.contains("attached"), "strace: {line}");
    // It has more to say, and nobody listens: its end is not to be because of that.
    thread::spawn(move || std::io::copy(&mut told, &mut std::io::sink()));
    tracer
}

/// Whether a process runs, and is not dead and unburied.
pub fn is_alive(process: i32) -> bool {
    Path::new(&format!("/proc/{process}/fd/0")).exists()
}

/// A number of a process's thread by its name.
fn thread_of(process: i32, name: &str) -> String {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
    tasks
        .flatten()
        .find(|task| {
            let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            comm.trim_end() == name
        })
        .map_or_else(
            || panic!("process {process} has no thread {name:?}"),
            |task| task.file_name().to_string_lossy().into_owned(),
        )
}
