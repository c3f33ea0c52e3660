//! strace on a process that runs: calls of it are delayed, or end it, so that the product needs no fault points.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;

/// Interferes with a process until it is dropped.
pub struct Tracer(Child);

impl Tracer {
    /// Does something (`delay_enter=MICROSECONDS`, `signal=KILL:when=1`; see strace(1)) to each call of this name
    /// that any thread of the process makes.
    pub fn on(pid: i32, call: &str, act: &str) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-p", &pid.to_string(), "-o", "/dev/null"]);
        command.args(["-e", &format!("trace={call}")]);
        command.args(["-e", &format!("inject={call}:{act}")]);
        let mut tracer = command.stderr(Stdio::piped()).spawn().expect("strace");
        let mut told = BufReader::new(tracer.stderr.take().expect("its messages"));
        let mut line = String::new();
        told.read_line(&mut line).expect("a message");
        assert!(line.contains("attached"), "strace: {line}");
        // It has more to say, and nobody listens: its end is not to be because of that.
        thread::spawn(move || std::io::copy(&mut told, &mut std::io::sink()));
        Self(tracer)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // The kernel lets the process go on.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
