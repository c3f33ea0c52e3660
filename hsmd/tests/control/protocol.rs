//! The protocol as strangers speak it: raw bytes on the socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hsmd::control::client::ClientError;
use hsmd::control::model::{Event, SyncRequest};
use hsmd::control::server::{Access, Options, ServeError, Server};
use serde_json::{Value, json};

use crate::fake::{Daemon, at, eventually};

struct Raw {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Raw {
    fn connect(daemon: &Daemon) -> Self {
        let stream = UnixStream::connect(&daemon.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    fn send(&mut self, message: &str) {
        self.stream.write_all(message.as_bytes()).unwrap();
        self.stream.write_all(&[0]).unwrap();
    }

    /// The next reply, `None` at the end.
    fn reply(&mut self) -> Option<Value> {
        loop {
            if let Some(at) = self.buffer.iter().position(|&byte| byte == 0) {
                let rest = self.buffer.split_off(at + 1);
                let bytes = std::mem::replace(&mut self.buffer, rest);
                return Some(serde_json::from_slice(&bytes[..at]).unwrap());
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return None,
                Ok(len) => self.buffer.extend_from_slice(&piece[..len]),
                // What we sent and nobody read makes the end a reset.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn ask(&mut self, message: &str) -> Value {
        self.send(message);
        self.reply().unwrap()
    }
}

fn event(total: u64) -> Event {
    Event::Overflow { time: at(0), total }
}

#[test]
fn the_service_describes_itself() {
    let daemon = Daemon::start();
    let mut raw = Raw::connect(&daemon);
    let info = raw.ask(r#"{"method":"org.varlink.service.GetInfo"}"#);
    let interfaces = &info["parameters"]["interfaces"];
    assert_eq!(
        interfaces,
        &json!(["org.varlink.service", "io.hsmd.Control"])
    );
    for interface in interfaces.as_array().unwrap() {
        let asked = json!({ "method": "org.varlink.service.GetInterfaceDescription", "parameters": { "interface": interface } });
        let reply = raw.ask(&asked.to_string());
        let text = reply["parameters"]["description"].as_str().unwrap();
        assert!(text.contains(&format!("interface {}", interface.as_str().unwrap())));
    }
    let status = raw.ask(r#"{"method":"io.hsmd.Control.GetStatus","parameters":{}}"#);
    assert_eq!(status["parameters"]["status"]["durable_lsn"], 1042);
    assert!(status.get("error").is_none() && status.get("continues").is_none());
}

#[test]
fn what_there_is_not_is_named() {
    let daemon = Daemon::start();
    let mut raw = Raw::connect(&daemon);
    for (request, error, key, value) in [
        (
            r#"{"method":"io.hsmd.Control.Explode"}"#,
            "org.varlink.service.MethodNotFound",
            "method",
            "io.hsmd.Control.Explode",
        ),
        (
            r#"{"method":"GetStatus"}"#,
            "org.varlink.service.MethodNotFound",
            "method",
            "GetStatus",
        ),
        (
            r#"{"method":"org.other.Get"}"#,
            "org.varlink.service.InterfaceNotFound",
            "interface",
            "org.other",
        ),
        (
            r#"{"method":"io.hsmd.Control.GetFileState"}"#,
            "org.varlink.service.InvalidParameter",
            "parameter",
            "path",
        ),
        (
            r#"{"method":"io.hsmd.Control.GetFileState","parameters":{"path":"relative"}}"#,
            "org.varlink.service.InvalidParameter",
            "parameter",
            "path",
        ),
        (
            r#"{"method":"io.hsmd.Control.GetFileState","parameters":{"path":"/a/../b"}}"#,
            "org.varlink.service.InvalidParameter",
            "parameter",
            "path",
        ),
        (
            r#"{"method":"io.hsmd.Control.GetTransaction","parameters":{"lsn":-1}}"#,
            "org.varlink.service.InvalidParameter",
            "parameter",
            "(parameters)",
        ),
        (
            r#"{"method":"io.hsmd.Control.GetTransaction","parameters":{"lsn":0}}"#,
            "org.varlink.service.InvalidParameter",
            "parameter",
            "lsn",
        ),
    ] {
        let reply = raw.ask(request);
        assert_eq!(reply["error"], error, "{request}");
        assert_eq!(reply["parameters"][key], value, "{request}");
        assert!(reply["parameters"]["message"].is_string());
    }
    let reply = raw.ask(r#"{"method":"io.hsmd.Control.Subscribe"}"#);
    assert_eq!(reply["error"], "org.varlink.service.ExpectedMore");
    let reply =
        raw.ask(r#"{"method":"io.hsmd.Control.GetFileState","parameters":{"path":"/elsewhere"}}"#);
    assert_eq!(reply["error"], "io.hsmd.Control.NotWatched");
    // The connection still works.
    assert!(raw.ask(r#"{"method":"io.hsmd.Control.GetStatus"}"#)["error"].is_null());
}

#[test]
fn malformed_requests_end_the_connection_and_nothing_else() {
    let daemon = Daemon::start();
    for bad in [
        "",
        "x",
        "{\"method\":",
        "[]",
        "null",
        "{\"method\":7}",
        "\u{7f}",
    ] {
        let mut raw = Raw::connect(&daemon);
        assert_eq!(
            raw.ask(bad)["error"],
            "org.varlink.service.InvalidParameter",
            "{bad:?}"
        );
        assert_eq!(raw.reply(), None);
    }
    let mut deep = Raw::connect(&daemon);
    let nested = format!("{{\"method\":{}", "[".repeat(500_000));
    assert_eq!(
        deep.ask(&nested)["error"],
        "org.varlink.service.InvalidParameter"
    );
    // Half a request, and away.
    Raw::connect(&daemon)
        .stream
        .write_all(b"{\"method\":\"io.hsmd")
        .unwrap();
    daemon.client().status().unwrap();
}

#[test]
fn oversized_requests_are_refused() {
    let daemon = Daemon::start();
    // Large, but not too large.
    let mut raw = Raw::connect(&daemon);
    let pad = " ".repeat(900_000);
    let reply = raw.ask(&format!(
        "{{\"method\":\"io.hsmd.Control.GetStatus\"{pad}}}"
    ));
    assert!(reply["error"].is_null());
    for nul in [true, false] {
        let mut raw = Raw::connect(&daemon);
        let mut flood = vec![b' '; 3 << 20];
        if nul {
            flood.push(0);
        }
        // The server stops reading after a megabyte and closes: writing on may fail.
        let _ = raw.stream.write_all(&flood);
        if let Some(reply) = raw.reply() {
            assert_eq!(reply["error"], "org.varlink.service.InvalidParameter");
            assert_eq!(raw.reply(), None);
        }
    }
    daemon.client().status().unwrap();
}

#[test]
fn requests_may_be_pipelined_and_one_way() {
    let daemon = Daemon::start();
    let mut raw = Raw::connect(&daemon);
    for _ in 0..20 {
        raw.send(r#"{"method":"io.hsmd.Control.GetStatus","oneway":true}"#);
        raw.send(r#"{"method":"io.hsmd.Control.GetCatalogDigest"}"#);
    }
    for _ in 0..20 {
        assert_eq!(raw.reply().unwrap()["parameters"]["digest"]["lsn"], 6);
    }
    raw.send(r#"{"method":"io.hsmd.Control.Stop","oneway":true}"#);
    eventually("stopped", || daemon.core.stopped.load(Ordering::SeqCst));
}

#[test]
fn a_client_that_goes_away_cancels_its_sync() {
    let daemon = Daemon::start();
    let mut raw = Raw::connect(&daemon);
    raw.send(r#"{"method":"io.hsmd.Control.Sync","parameters":{"media":true}}"#);
    eventually("syncing", || daemon.core.syncs.load(Ordering::SeqCst) == 1);
    let left = Instant::now();
    drop(raw);
    eventually("cancelled", || {
        daemon.core.sync_cancelled.load(Ordering::SeqCst)
    });
    assert!(
        left.elapsed() < Duration::from_secs(2),
        "{:?}",
        left.elapsed()
    );
}

#[test]
fn a_client_that_has_nothing_more_to_ask_still_gets_its_answer() {
    let daemon = Daemon::start();
    let mut raw = Raw::connect(&daemon);
    raw.send(r#"{"method":"io.hsmd.Control.Sync"}"#);
    raw.stream.shutdown(Shutdown::Write).unwrap();
    eventually("syncing", || daemon.core.syncs.load(Ordering::SeqCst) == 1);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!daemon.core.sync_cancelled.load(Ordering::SeqCst));
    daemon.core.sync_done.store(true, Ordering::SeqCst);
    assert_eq!(
        raw.reply().unwrap()["parameters"],
        json!({ "lsn": 1042, "waited_ms": 250 })
    );
    assert_eq!(raw.reply(), None);
}

#[test]
fn a_client_that_goes_away_cancels_its_verification() {
    let daemon = Daemon::start();
    daemon.core.verify_endless.store(true, Ordering::SeqCst);
    let mut raw = Raw::connect(&daemon);
    raw.send(r#"{"method":"io.hsmd.Control.VerifyVolume","parameters":{"volume":"4f00aa11bb22cc33"},"more":true}"#);
    let reply = raw.reply().unwrap();
    assert_eq!(reply["continues"], true);
    assert!(reply["parameters"]["progress"]["objects"].as_u64().unwrap() > 0);
    drop(raw);
    eventually("cancelled", || {
        daemon.core.verify_cancelled.load(Ordering::SeqCst)
    });
}

#[test]
fn clients_that_never_read_stall_nobody() {
    let daemon = Daemon::start();
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let mut raw = Raw::connect(&daemon);
        raw.send(r#"{"method":"io.hsmd.Control.Subscribe","more":true}"#);
        stuck.push(raw);
        let mut raw = Raw::connect(&daemon);
        raw.stream.set_nonblocking(true).unwrap();
        let request = b"{\"method\":\"io.hsmd.Control.GetStatus\"}\0".repeat(5000);
        // As much as fits: thousands of answers that nobody takes.
        let _ = raw.stream.write(&request);
        stuck.push(raw);
    }
    let mut reader = daemon.client();
    reader.subscribe().unwrap();
    for total in 0..20_000 {
        daemon.core.emit(&event(total));
    }
    eventually("events were missed", || daemon.core.missed() > 0);
    let asked = Instant::now();
    for _ in 0..20 {
        daemon.client().status().unwrap();
    }
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    // Who reads gets events, and is told how many were too many.
    let mut seen = 0;
    while let Some(event) = reader.next_event().unwrap() {
        match event {
            Event::Overflow { total, .. } => seen = seen.max(total),
            Event::Missed { count } => assert!(count > 0),
            other => panic!("{other:?}"),
        }
        if seen >= 50 {
            break;
        }
    }
    daemon.core.emit(&event(99_999));
}

#[test]
fn events_come_in_order_and_end_with_the_daemon() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.subscribe().unwrap();
    for total in 0..50 {
        daemon.core.emit(&event(total));
    }
    for total in 0..50 {
        assert_eq!(client.next_event().unwrap(), Some(event(total)));
    }
    daemon.client().stop().unwrap();
    assert_eq!(client.next_event().unwrap(), None);
}

#[test]
fn stopping_the_server_does_not_wait_for_clients() {
    let mut daemon = Daemon::start();
    let mut raw = Raw::connect(&daemon);
    raw.send(r#"{"method":"io.hsmd.Control.Sync"}"#);
    let idle = Raw::connect(&daemon);
    eventually("syncing", || daemon.core.syncs.load(Ordering::SeqCst) == 1);
    let begun = Instant::now();
    daemon.server.take().unwrap().stop();
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(daemon.core.sync_cancelled.load(Ordering::SeqCst));
    assert!(!daemon.socket.exists());
    drop(idle);
}

#[test]
fn many_clients_at_once() {
    let daemon = Daemon::start();
    daemon.core.sync_done.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                let mut client = daemon.client();
                for _ in 0..10 {
                    client.status().unwrap();
                    client.sync(SyncRequest::default()).unwrap();
                }
            });
        }
    });
    assert_eq!(daemon.core.syncs.load(Ordering::SeqCst), 500);
}

#[test]
fn only_so_many_connections_are_taken() {
    let daemon = Daemon::start();
    let mut held: Vec<_> = (0..256).map(|_| daemon.client()).collect();
    // Every one of them works, so every one is counted.
    for client in &mut held {
        client.status().unwrap();
    }
    let answer = daemon.client().status();
    assert!(
        matches!(&answer, Err(ClientError::Answered { name, .. }) if name == "Busy")
            || matches!(&answer, Err(ClientError::Broken { .. })),
        "{answer:?}"
    );
    held.clear();
    eventually("room again", || daemon.client().status().is_ok());
}

fn options(daemon: &Daemon, name: &str, access: Access) -> Options {
    Options {
        socket: daemon.dir.path().join(name),
        group: None,
        access,
    }
}

#[test]
fn a_living_socket_is_never_replaced_a_dead_one_is() {
    let daemon = Daemon::start();
    let again = Server::start(
        options(&daemon, "control.sock", Access::Everyone),
        daemon.core.clone(),
    );
    assert!(matches!(again, Err(ServeError::InUse { .. })));
    daemon.client().status().unwrap();
    let path = daemon.dir.path().join("dead.sock");
    drop(UnixListener::bind(&path).unwrap());
    let before = std::fs::symlink_metadata(&path).unwrap().ino();
    let server = Server::start(
        options(&daemon, "dead.sock", Access::Group),
        daemon.core.clone(),
    )
    .unwrap();
    let meta = std::fs::symlink_metadata(&path).unwrap();
    assert_ne!(meta.ino(), before);
    assert_eq!(meta.permissions().mode() & 0o777, 0o660);
    server.stop();
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    let refused = Server::start(
        options(&daemon, "dead.sock", Access::Group),
        daemon.core.clone(),
    );
    assert!(matches!(refused, Err(ServeError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}
