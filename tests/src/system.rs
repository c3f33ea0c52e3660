//! The whole system on one machine: a watched filesystem, spool, catalog, pools of volumes, and the
//! daemon that runs there.
//!
//! The daemon is killed when the fixture is dropped, and what it said is printed if the test fails.
//! It dies with the thread that started it, so [`System::start`] belongs on the test's own thread.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::compare::{Tree, differences, listing};
use crate::home::Home;
use crate::loopfs::{Kind, LoopDevice, LoopFs, SMALL_BYTES};
use crate::program::{LIMIT, Ran, Running, locate, run};
use crate::report::say;
use crate::strace::Call;

/// What the watched filesystem lies on.
enum Disk {
    Sparse,
    Thin(u64),
    Failing,
}

/// How a [`System`] is made.
pub struct Setup {
    kind: Kind,
    bytes: u64,
    pools: usize,
    exposed: bool,
    managed: bool,
    installed: bool,
    disk: Disk,
    mkfs: &'static [&'static str],
    settings: Vec<(String, String)>,
}

impl Setup {
    /// One pool with one volume, small segments, no sweep unless it is asked for.
    pub fn new(kind: Kind) -> Self {
        let setup = Self {
            kind,
            bytes: SMALL_BYTES,
            pools: 1,
            exposed: false,
            managed: false,
            installed: false,
            disk: Disk::Sparse,
            mkfs: &[],
            settings: Vec::new(),
        };
        setup
            .with("segment_bytes", "\"4MiB\"")
            .with("sweep_interval", "\"1d\"")
    }

    /// The watched filesystem's size.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// The daemon mounts the filesystem, so that files can be released.
    #[must_use]
    pub fn exposed(mut self) -> Self {
        self.exposed = true;
        self
    }

    /// Further arguments of mkfs.
    #[must_use]
    pub fn mkfs(mut self, options: &'static [&'static str]) -> Self {
        self.mkfs = options;
        self
    }

    /// So many pools, of one volume each.
    #[must_use]
    pub fn pools(mut self, pools: usize) -> Self {
        self.pools = pools;
        self
    }

    /// A key of the configuration and its value, as TOML; the last one given counts.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.settings.retain(|(other, _)| other != key);
        self.settings.push((key.to_owned(), value.to_owned()));
        self
    }

    /// A service manager starts the daemon, keeps its descriptors, and starts it again when it is killed
    /// (SIGUSR1 to [`System::daemon`] kills all of it).
    #[must_use]
    pub fn managed(mut self) -> Self {
        self.managed = true;
        self
    }

    /// See [`LoopFs::thin`].
    #[must_use]
    pub fn thin(mut self, store_bytes: u64) -> Self {
        self.disk = Disk::Thin(store_bytes);
        self
    }

    /// See [`LoopFs::on_failing_disk`].
    #[must_use]
    pub fn on_failing_disk(mut self) -> Self {
        self.disk = Disk::Failing;
        self
    }

    /// The daemon's program is a copy of its own, see [`System::install`].
    #[must_use]
    pub fn installed(mut self) -> Self {
        self.installed = true;
        self
    }

    /// Makes everything but starts nothing.
    pub fn build(self) -> System {
        let home = Home::new();
        let mut system = System {
            daemon: None,
            fs: match self.disk {
                Disk::Sparse => LoopFs::with_options(self.kind, self.bytes, self.mkfs),
                Disk::Thin(store) => LoopFs::thin(self.kind, self.bytes, self.mkfs, store),
                Disk::Failing => LoopFs::on_failing_disk(self.kind, self.bytes, self.mkfs),
            },
            home,
            bytes: self.bytes,
            settings: self.settings,
            device: None,
            managed: self.managed,
            program: locate("hsmd"),
            trap: None,
            pools: Vec::new(),
            asked: AtomicU64::new(0),
        };
        for number in 0..self.pools {
            let volume = system.home.dir(&format!("pool{number}/vol0"));
            system.pools.push(vec![volume]);
        }
        if self.exposed {
            system.hand_over();
        }
        if self.installed {
            system.program = system.home.at("hsmd");
            system.install();
        }
        system.write_config();
        system
    }

    /// Makes everything and starts the daemon.
    pub fn start(self) -> System {
        let mut system = self.build();
        system.start();
        system
    }
}

/// A watched filesystem with all that belongs to it.
pub struct System {
    daemon: Option<Running>,
    fs: LoopFs,
    home: Home,
    bytes: u64,
    settings: Vec<(String, String)>,
    device: Option<LoopDevice>,
    managed: bool,
    program: PathBuf,
    trap: Option<Call>,
    pools: Vec<Vec<PathBuf>>,
    asked: AtomicU64,
}

impl System {
    // ---- places ---------------------------------------------------------------------------------

    /// The watched filesystem.
    pub fn fs(&self) -> &LoopFs {
        &self.fs
    }

    /// Where the watched filesystem is mounted.
    pub fn root(&self) -> &Path {
        self.fs.root()
    }

    /// A path on the watched filesystem.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.fs.at(name)
    }

    /// The block device that the daemon mounts.
    pub fn device(&self) -> Option<&Path> {
        self.device.as_ref().map(LoopDevice::path)
    }

    /// A directory for everything else, on the machine's own disk.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The configuration.
    pub fn config(&self) -> PathBuf {
        self.home.at("hsmd.toml")
    }

    /// The spool.
    pub fn spool(&self) -> PathBuf {
        self.home.at("spool")
    }

    /// The catalog's file.
    pub fn catalog(&self) -> PathBuf {
        self.home.at("state/catalog.db")
    }

    /// The volumes of one pool.
    pub fn volumes(&self, pool: usize) -> Vec<PathBuf> {
        self.pools[pool].clone()
    }

    /// The volumes of all pools.
    pub fn all_volumes(&self) -> Vec<PathBuf> {
        self.pools.concat()
    }

    // ---- configuration --------------------------------------------------------------------------

    /// Changes a key of the configuration; the daemon reads it when it starts.
    pub fn set(&mut self, key: &str, value: &str) {
        self.settings.retain(|(other, _)| other != key);
        self.settings.push((key.to_owned(), value.to_owned()));
        self.write_config();
    }

    /// Replaces the volumes of a pool; a new pool where there was none.
    pub fn set_volumes(&mut self, pool: usize, volumes: Vec<PathBuf>) {
        if pool == self.pools.len() {
            self.pools.push(Vec::new());
        }
        self.pools[pool] = volumes;
        self.write_config();
    }

    /// From now on the daemon mounts the filesystem.
    pub fn hand_over(&mut self) {
        self.fs.unmount();
        self.plug_in();
    }

    fn plug_in(&mut self) {
        let device = self.fs.device();
        let path = quoted(device.path());
        self.device = Some(device);
        self.set("device", &path);
    }

    /// Puts another filesystem under the daemon, which must not run.
    pub fn move_to(&mut self, fs: LoopFs) {
        assert!(self.daemon.is_none(), "stop the daemon first");
        self.fs = fs;
        self.write_config();
    }

    /// The configuration's text with some lines replaced: of each key the last value counts.
    pub fn config_text(&self, changed: &[(&str, &str)]) -> String {
        let paths = [
            ("mount", self.root().to_owned()),
            ("spool", self.spool()),
            ("catalog", self.catalog()),
            ("socket", self.home.at("hsmd.sock")),
        ];
        let mut keys: Vec<(String, String)> = paths
            .iter()
            .map(|(key, path)| ((*key).to_owned(), quoted(path)))
            .chain(self.settings.iter().cloned())
            .collect();
        for (key, value) in changed {
            keys.push(((*key).to_owned(), (*value).to_owned()));
        }
        // Of a key that is given twice the last value counts.
        let keys: BTreeMap<String, String> = keys.into_iter().collect();
        let mut text = String::new();
        for (key, value) in keys {
            let _ = writeln!(text, "{key} = {value}");
        }
        for (number, volumes) in self.pools.iter().enumerate() {
            let _ = write!(
                text,
                "[[pool]]\nname = \"pool{number}\"\nvolumes = {volumes:?}\n"
            );
        }
        text
    }

    fn write_config(&self) {
        self.home.dir("answers");
        self.home.dir("spool");
        self.home.dir("state");
        fs::write(self.config(), self.config_text(&[])).expect("the configuration");
    }

    // ---- the daemon -------------------------------------------------------------------------------

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        if let Err(ran) = self.try_start() {
            panic!("hsmd does not start: {ran}");
        }
    }

    /// Starts the daemon and waits until it answers; gives what it said if it ends instead.
    pub fn try_start(&mut self) -> Result<(), Ran> {
        assert!(self.daemon.is_none(), "the daemon runs already");
        let mut daemon = self.spawn();
        let end = Instant::now() + LIMIT;
        loop {
            if self.tierctl(&["status", "--json"]).code == 0 {
                self.daemon = Some(daemon);
                return Ok(());
            }
            if let Some(ran) = daemon.wait(Duration::from_millis(20)) {
                return Err(ran);
            }
            assert!(
                Instant::now() < end,
                "hsmd does not become ready: {}",
                daemon.kill()
            );
        }
    }

    /// Waits until the daemon answers that something else has started again.
    pub fn wait_until_it_answers(&self) {
        let end = Instant::now() + LIMIT;
        while self.tierctl(&["status", "--json"]).code != 0 {
            assert!(Instant::now() < end, "hsmd does not become ready again");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the daemon without waiting for anything.
    pub fn start_unready(&mut self) {
        assert!(self.daemon.is_none(), "the daemon runs already");
        self.daemon = Some(self.spawn());
    }

    /// The next process that is started as the daemon is killed before this call.
    pub fn trap_next_start(&mut self, call: Call) {
        self.trap = Some(call);
    }

    fn spawn(&mut self) -> Running {
        let hsmd = &self.program;
        let trap = self.trap.take().map(Call::before);
        let mut command = if self.managed {
            let python = std::env::var_os("HSM_PYTHON").unwrap_or_else(|| "python3".into());
            let mut manager = Command::new(python);
            manager.arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/src/service_manager.py"
            ));
            let _ = fs::remove_file(self.home.path().join("notify"));
            if let Some(words) = trap {
                fs::write(self.home.at("notify.trap"), words.join("\n")).expect("a trap");
            }
            manager.arg(self.home.path().join("notify")).arg(hsmd);
            manager
        } else if let Some(words) = trap {
            let mut strace = Command::new(&words[0]);
            strace.args(&words[1..]).arg(hsmd);
            strace
        } else {
            Command::new(hsmd)
        };
        command.arg("--config").arg(self.config());
        Running::start(command, self.home.path(), "hsmd")
    }

    /// The daemon's process, which must have been started.
    pub fn daemon(&mut self) -> &mut Running {
        self.daemon.as_mut().expect("the daemon was started")
    }

    /// Puts the daemon's program into place, as an upgrade does: a new file where another one was. Needs
    /// [`Setup::installed`].
    pub fn install(&self) {
        assert_eq!(self.program, self.home.at("hsmd"), "not this daemon's own");
        let _ = fs::remove_file(&self.program);
        fs::copy(locate("hsmd"), &self.program).expect("a copy of hsmd");
    }

    /// Kills the daemon.
    pub fn kill9(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill();
        }
    }

    /// The processes of the daemon that run as this: "keeper", "guard" or "worker".
    pub fn processes(&self, role: &str) -> Vec<i32> {
        let config = self.config().into_os_string().into_encoded_bytes();
        let mut found = Vec::new();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            let is = |role: &str| match role {
                "keeper" => words[0] == self.program.as_os_str().as_encoded_bytes(),
                role => words.contains(&role.as_bytes()),
            };
            let others = ["guard", "worker"]
                .iter()
                .any(|other| *other != role && is(other));
            if words.contains(&config.as_slice()) && is(role) && !others {
                found.push(pid);
            }
        }
        found
    }

    /// The only process of the daemon that runs as this.
    pub fn process(&self, role: &str) -> i32 {
        let found = self.processes(role);
        assert_eq!(found.len(), 1, "{role}: {found:?}");
        found[0]
    }

    /// Sends the guard or the worker a signal.
    pub fn signal_process(&self, role: &str, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(self.process(role));
        nix::sys::signal::kill(pid, signal).expect("to send a signal");
    }

    /// Stops the guard or the worker, until [`Self::signal_process`] sends it SIGCONT: it does nothing any more.
    pub fn stop_process(&self, role: &str) {
        self.signal_process(role, Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.process(role));
        let runs = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| !rest.starts_with('T'))
        };
        while fs::read_dir(&tasks)
            .expect("its threads")
            .flatten()
            .any(runs)
        {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the guard or the worker; waits until another one runs.
    pub fn kill_process(&self, role: &str) {
        let before = self.processes(role);
        for pid in &before {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let end = Instant::now() + Duration::from_secs(30);
        while self.processes(role).iter().all(|pid| before.contains(pid)) {
            assert!(Instant::now() < end, "no {role} is started again");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills keeper, guard and worker at once, as a power loss would; the mount stays behind.
    pub fn kill_all(&mut self) {
        // A service manager's death leaves its keeper behind.
        let roles = ["keeper", "guard", "worker"];
        let all: Vec<i32> = roles.iter().flat_map(|role| self.processes(role)).collect();
        self.kill9();
        for pid in all {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
        let end = Instant::now() + Duration::from_secs(30);
        while roles.iter().any(|role| !self.processes(role).is_empty()) && Instant::now() < end {
            for pid in roles.iter().flat_map(|role| self.processes(role)) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The power of the watched filesystem fails, and the daemon is gone with it. Programs that have it open
    /// are the caller's to end, before [`Self::power_returns`].
    pub fn power_fails(&mut self) {
        self.fs.power_fails();
        self.kill_all();
    }

    /// The power is there again, and the daemon starts.
    pub fn power_returns(&mut self) {
        self.fs.unmount();
        if self.fs.is_on_failing_disk() {
            drop(self.device.take());
            self.fs.power_returns();
            self.plug_in();
        }
        self.start();
    }

    /// Stops the daemon with SIGTERM; it must end in time and with status 0.
    pub fn stop(&mut self) {
        let Some(mut daemon) = self.daemon.take() else {
            return;
        };
        daemon.signal(Signal::SIGTERM);
        match daemon.wait(Duration::from_mins(1)) {
            Some(ran) => assert_eq!(ran.code, 0, "SIGTERM: {ran}"),
            None => panic!("hsmd does not stop at SIGTERM: {}", daemon.kill()),
        }
    }

    /// Stops the daemon and starts it again.
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Keeps the daemon from running.
    pub fn pause(&mut self) {
        self.daemon().signal(Signal::SIGSTOP);
    }

    /// Lets the daemon run on.
    pub fn resume(&mut self) {
        self.daemon().signal(Signal::SIGCONT);
    }

    // ---- tierctl and replay -------------------------------------------------------------------------

    /// Asks the daemon something.
    pub fn tierctl(&self, words: &[&str]) -> Ran {
        let command = self.tierctl_command(words);
        let mut running = Running::start(command, self.home.path(), &self.answer_name());
        match running.wait(LIMIT) {
            Some(ran) => ran,
            None => panic!("hangs: {}\n{}", running.kill(), self.portrait()),
        }
    }

    /// The command that [`System::tierctl`] runs.
    pub fn tierctl_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(locate("tierctl"));
        command.arg("--config").arg(self.config()).args(words);
        command
    }

    /// A name for the files that take one answer.
    fn answer_name(&self) -> String {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        format!("answers/{number}")
    }

    /// What the daemon is at, for the report of a hang: its status and what its threads wait for.
    fn portrait(&self) -> String {
        let mut text = String::new();
        let command = self.tierctl_command(&["status"]);
        let mut status = Running::start(command, self.home.path(), &self.answer_name());
        if let Some(ran) = status.wait(Duration::from_secs(10)) {
            let _ = writeln!(text, "{ran}");
        }
        let pid = self
            .daemon
            .as_ref()
            .map_or(0, |daemon| daemon.pid().as_raw());
        for task in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let stack = read("stack");
            let top: Vec<&str> = stack.lines().take(4).collect();
            let _ = writeln!(text, "{}: {}", read("comm").trim_end(), top.join(" "));
        }
        text
    }

    /// What `tierctl status` knows.
    pub fn status(&self) -> Value {
        self.tierctl(&["status", "--json"]).done().json()
    }

    /// Waits until the status is as wanted.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + Duration::from_mins(1);
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{what}: never so: {status:#}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// `tierctl sync` with these arguments; gives the LSN up to which all is safe.
    pub fn sync(&self, arguments: &[&str]) -> u64 {
        let mut words = vec!["sync", "--json"];
        words.extend(arguments);
        let answer = self.tierctl(&words).done().json();
        answer["lsn"].as_u64().unwrap_or(0)
    }

    /// Everything is on the volumes that was changed before, also what raised no event.
    pub fn sync_all(&self) -> u64 {
        self.sync(&["--to", "media", "--sweep"])
    }

    /// Runs replay from volumes.
    pub fn replay_from(&self, volumes: &[PathBuf], to: &Path, more: &[&str]) -> Ran {
        run(self.replay_command(volumes, to, more))
    }

    /// The command that [`System::replay_from`] runs.
    pub fn replay_command(&self, volumes: &[PathBuf], to: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(locate("replay"));
        for volume in volumes {
            command.arg("--from").arg(volume);
        }
        command.arg("--to").arg(to).args(more);
        command
    }

    /// An empty filesystem as large as the watched one.
    pub fn fresh(&self) -> LoopFs {
        LoopFs::new(self.fs.kind(), self.bytes)
    }

    /// Replays the first pool's volumes onto a fresh filesystem; everything must come back.
    pub fn replay_to_fresh(&self, more: &[&str]) -> LoopFs {
        let fresh = self.fresh();
        let _ = self
            .replay_from(&self.volumes(0), fresh.root(), more)
            .done();
        fresh
    }

    /// The proof: everything synced, replayed from the media, and compared.
    pub fn check(&self, context: &str) {
        drop(self.checked(context));
    }

    /// The same; gives what was replayed.
    pub fn checked(&self, context: &str) -> LoopFs {
        self.sync_all();
        let fresh = self.replay_to_fresh(&[]);
        let found = differences(&Tree::read(self.root()), &Tree::read(fresh.root()));
        for difference in found.iter().take(3) {
            self.tell_history(&self.at(&difference.path), &fresh.at(&difference.path));
        }
        assert!(found.is_empty(), "{context}: {}", listing(&found));
        fresh
    }

    /// What is known of a file that does not come back.
    fn tell_history(&self, path: &Path, replayed: &Path) {
        let text = path.to_string_lossy();
        let mut stat = Command::new("stat");
        stat.args([path, replayed]);
        say(format_args!("{}", run(stat)));
        say(format_args!("{}", self.tierctl(&["state", &text])));
        say(format_args!("{}", self.tierctl(&["log", "list", &text])));
        let mut cmp = Command::new("sh");
        cmp.args([
            "-c",
            "cmp -l \"$0\" \"$1\" | head -n 5; cmp -l \"$0\" \"$1\" | wc -l",
        ]);
        cmp.args([path, replayed]);
        say(format_args!("{}", run(cmp)));
    }
}

/// A path as a TOML string.
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

impl Drop for System {
    fn drop(&mut self) {
        if self.device.is_some() {
            // Before the guard goes: nobody is to read zeros, not even a test that fails.
            let _ = nix::mount::umount2(self.fs.root(), nix::mount::MntFlags::MNT_DETACH);
        }
        let exposed = self.device.is_some();
        let said = self.daemon.take().map(|mut daemon| daemon.kill());
        if exposed {
            self.kill_all();
            // While it is ours: once the home is cleared away, another test may have its number.
            drop(self.device.take());
        }
        if thread::panicking() {
            match said {
                Some(ran) => say(format_args!("the daemon, killed at the test's end: {ran}")),
                None => say(format_args!(
                    "the daemon said:\n{}",
                    fs::read_to_string(self.home.at("hsmd.err")).unwrap_or_default()
                )),
            }
        }
    }
}
