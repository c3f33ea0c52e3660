//! P3, the matrix: every tool on released files, whatever happens to the daemon meanwhile.
//!
//! Each tool sees the right bytes or an error, and the file is afterwards what it was. What the tools
//! are is in `hsm_tests::tools`.
//!
//! Where a process is killed, every other kill comes when a tool waits for an answer and none can come any
//! more. Who waits for a worker notices nothing; who waits for a guard may get EBUSY, at most one tool of
//! each kill, and every other one sees the right bytes. In the end all that is there can be replayed.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::report::say;
use hsm_tests::stubs::is_for_later;
use hsm_tests::system::{Setup, System};
use hsm_tests::tools::{Outcome, Tool, tools};
use hsm_tests::waiting::{Ends, held_programs};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often a process is killed in one run of all tools.
const KILLS: u64 = 12;
/// An answer that was on its way when the process was stopped has arrived by then.
const ARRIVED: Duration = Duration::from_millis(20);
/// What tools say that got EBUSY.
const BUSY: [&str; 2] = ["resource busy", "Errno 16"];

/// What happens while the tools work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    None,
    /// The process with this role is killed again and again.
    Killed(&'static str),
}

struct Case {
    tool: Tool,
    path: PathBuf,
    content: Vec<u8>,
}

/// A file for each tool, logged, on every pool, and released.
fn prepare(system: &System, kind: Kind) -> Vec<Case> {
    let files = system.at("files");
    for dir in [&files, &system.at("scratch")] {
        fs::create_dir(dir).expect("a directory");
    }
    let mut cases = Vec::new();
    for (number, tool) in tools().into_iter().enumerate() {
        if !tool.works_on(kind) {
            continue;
        }
        let (path, content) = (files.join(format!("file {number}")), tool.content());
        fs::write(&path, &content).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
        cases.push(Case {
            tool,
            path,
            content,
        });
    }
    system.sync_all();
    let ran = system.tierctl(&["release", "-r", files.to_str().expect("ASCII")]);
    assert_eq!(ran.code, 0, "{ran}");
    for case in &cases {
        let kib = fs::metadata(&case.path).expect("the stub").blocks() / 2;
        assert!(kib <= 4, "{} has {kib} KiB on disk", case.path.display());
    }
    cases
}

/// The bytes of a file; who came while the guard was changed tries again.
fn patiently(case: &Case) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match fs::read(&case.path) {
            Ok(bytes) => return bytes,
            Err(error) if Instant::now() < end => {
                assert!(is_for_later(&error), "{}: {error}", case.tool.name);
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{}: {error}", case.tool.name),
        }
    }
}

fn judge(case: &Case, outcome: &Outcome, trouble: Trouble, failed: &mut Vec<String>) {
    let name = case.tool.name;
    let fine = match outcome {
        Outcome::Right => true,
        // Nobody answers for what the dead guard had read: those programs get EBUSY.
        Outcome::Failed(why) => {
            trouble == Trouble::Killed("guard") && BUSY.iter().any(|words| why.contains(words))
        }
        // What cpio cannot read it pads with zeros; it says so, and ends with status 0.
        Outcome::Wrong(_) => trouble == Trouble::Killed("guard") && name.starts_with("cpio"),
    };
    if !fine {
        failed.push(format!("{name}: {outcome:?}"));
    }
    if !case.path.exists() {
        return;
    }
    // Afterwards the file is what it was, or what the tool made of it.
    let changed = case.tool.expected(case.content.clone()).unwrap_or_default();
    let found = patiently(case);
    let half_done = matches!(outcome, Outcome::Failed(_)) && case.tool.changes_the_source();
    let same = found == case.content || (case.tool.changes_the_source() && found == changed);
    if !same && !half_done {
        failed.push(format!("{name}: the file is another afterwards"));
    }
    if half_done && found.iter().all(|byte| *byte == 0) && !found.is_empty() {
        failed.push(format!("{name}: the file is zeros afterwards"));
    }
}

/// Signals the processes that run as this.
fn signal(system: &System, role: &str, signal: Signal) {
    for pid in system.processes(role) {
        // One that is gone by now hears nothing.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Kills a process again and again until the tools are done: at any moment, and when a tool waits. Gives how
/// often, and how many of these were when a tool waited for it.
fn kill_again_and_again(system: &System, role: &str, over: &AtomicBool) -> (u64, u64) {
    let (mut kills, mut hits) = (0, 0);
    // Not more, or the tools never come to their ends.
    while kills < KILLS && !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100 + 137 * kills % 700));
        if kills % 2 == 0 {
            system.kill_process(role);
            kills += 1;
            continue;
        }
        while held_programs().is_empty() && !over.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        // What is stopped answers nobody: who waits then does so when it is killed, too.
        signal(system, role, Signal::SIGSTOP);
        thread::sleep(ARRIVED);
        if held_programs().is_empty() {
            signal(system, role, Signal::SIGCONT);
            continue;
        }
        system.kill_process(role);
        kills += 1;
        hits += 1;
    }
    (kills, hits)
}

fn matrix(kind: Kind, trouble: Trouble, settings: &[(&str, &str)]) {
    let mut setup = Setup::new(kind).bytes(ROOMY_BYTES).exposed();
    for (key, value) in settings {
        setup = setup.with(key, value);
    }
    let system = setup.start();
    let mut cases = prepare(&system, kind);
    // The kills are over before the tools are: on each filesystem others are the first to meet them.
    let part = match kind {
        Kind::Ext4 => 0,
        Kind::Xfs => 1,
        Kind::Btrfs => 2,
    };
    let first = cases.len() * part / 3;
    cases.rotate_left(first);
    let elsewhere = system.home().dir("elsewhere");
    let same = system.at("scratch");
    let over = AtomicBool::new(false);
    let (mut failed, mut disturbed) = (Vec::new(), 0);
    let (kills, hits) = thread::scope(|scope| {
        let killer = match trouble {
            Trouble::None => None,
            Trouble::Killed(role) => {
                let (system, over) = (&system, &over);
                Some(scope.spawn(move || kill_again_and_again(system, role, over)))
            }
        };
        let ends = Ends(&over);
        for case in &cases {
            let content = case.content.clone();
            let outcome = case.tool.try_on(&case.path, content, &same, &elsewhere);
            disturbed += u64::from(outcome != Outcome::Right);
            judge(case, &outcome, trouble, &mut failed);
        }
        drop(ends);
        killer.map_or((0, 0), |killer| killer.join().expect("it kills"))
    });
    say(format_args!(
        "{} tools on {kind}, {trouble:?}: {kills} kills, {hits} while one waited, {disturbed} tools disturbed",
        cases.len()
    ));
    assert!(
        failed.is_empty(),
        "{kind}, {trouble:?}:\n{}",
        failed.join("\n")
    );
    if trouble != Trouble::None {
        assert!(
            hits > 0,
            "{kind}: none of {kills} kills hit a tool that waited"
        );
        // Who comes later waits for the next guard: so most tools notice nothing.
        assert!(
            disturbed <= kills,
            "{kind}: {kills} kills, {disturbed} tools"
        );
        assert!(disturbed < cases.len() as u64, "{kind}: no tool succeeds");
    }
    system.check(&format!("{kind}, {trouble:?}, {settings:?}"));
}

macro_rules! matrix {
    ($($name:ident: $kind:ident, $trouble:expr, $settings:expr;)*) => {
        $(
            #[test]
            fn $name() {
                matrix(Kind::$kind, $trouble, $settings);
            }
        )*
    };
}

matrix! {
    every_tool_reads_released_files_on_ext4: Ext4, Trouble::None, &[];
    every_tool_reads_released_files_on_xfs: Xfs, Trouble::None, &[];
    every_tool_reads_released_files_on_btrfs: Btrfs, Trouble::None, &[];
    the_worker_is_killed_on_ext4: Ext4, Trouble::Killed("worker"), &[];
    the_worker_is_killed_on_xfs: Xfs, Trouble::Killed("worker"), &[];
    the_worker_is_killed_on_btrfs: Btrfs, Trouble::Killed("worker"), &[];
    the_guard_is_killed_on_ext4: Ext4, Trouble::Killed("guard"), &[];
    the_guard_is_killed_on_xfs: Xfs, Trouble::Killed("guard"), &[];
    the_guard_is_killed_on_btrfs: Btrfs, Trouble::Killed("guard"), &[];
    only_opening_is_asked_about_on_ext4: Ext4, Trouble::None, &[("pre_access", "false")];
    only_opening_is_asked_about_on_xfs: Xfs, Trouble::None, &[("pre_access", "false")];
    only_opening_is_asked_about_on_btrfs: Btrfs, Trouble::None, &[("pre_access", "false")];
    every_file_is_asked_about_on_ext4: Ext4, Trouble::None, &[("stub_marks_max", "0")];
    every_file_is_asked_about_on_xfs: Xfs, Trouble::None, &[("stub_marks_max", "0")];
    every_file_is_asked_about_on_btrfs: Btrfs, Trouble::None, &[("stub_marks_max", "0")];
}
