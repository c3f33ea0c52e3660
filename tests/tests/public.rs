//! Workloads that others wrote: `fsx` and the file stressors of `stress-ng`, then replay and compare.

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::program::{Running, run};
use hsm_tests::report::say;
use hsm_tests::system::Setup;
use hsm_tests::workload::seed;

/// A program of the setup script: on the path, or where cargo install put it.
fn tool(name: &str) -> PathBuf {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from(built), PathBuf::from("/usr/sbin")])
        .map(|dir| dir.join(name))
        .find(|file| file.exists())
        .unwrap_or_else(|| panic!("{name} is missing: run `tests/setup.sh test`"))
}

fn fsx(kind: Kind) {
    let seed = seed() % 1_000_000;
    let system = Setup::new(kind).bytes(ROOMY_BYTES).start();
    let operations = if std::env::var_os("HSM_FULL").is_some() {
        100_000
    } else {
        3000
    };
    let artifacts = system.home().dir("fsx");
    let running: Vec<Running> = (0..3)
        .map(|number| {
            let mut command = Command::new(tool("fsx"));
            command
                .args(["-q", "-q", "-N", &operations.to_string()])
                .args(["-S", &(seed + number).to_string()])
                .arg("-P")
                .arg(&artifacts)
                .arg(system.at(format!("fsx{number}")));
            Running::start(command, system.home().path(), &format!("fsx{number}"))
        })
        .collect();
    for mut fsx in running {
        let ran = fsx.wait(Duration::from_mins(5)).expect("fsx ends");
        let _ = ran.done();
    }
    system.check(&format!("fsx on {kind}, HSM_SEED={seed}"));
}

#[test]
fn fsx_on_ext4() {
    hsm_tests::compare::ignore_holes();
    fsx(Kind::Ext4);
}

#[test]
fn fsx_on_xfs() {
    hsm_tests::compare::ignore_holes();
    fsx(Kind::Xfs);
}

#[test]
fn fsx_on_btrfs() {
    hsm_tests::compare::ignore_holes();
    fsx(Kind::Btrfs);
}

/// Stressors that make, change and remove files. They are killed, so that their files stay.
const STRESSORS: &[&str] = &[
    "--acl",
    "--chmod",
    "--chown",
    "--copy-file",
    "--dentry",
    "--dir",
    "--dirdeep",
    "--fallocate",
    "--filename",
    "--fpunch",
    "--hdd",
    "--iomix",
    "--link",
    "--locka",
    "--metamix",
    "--open",
    "--punch",
    "--rename",
    "--seek",
    "--symlink",
    "--sync-file",
    "--touch",
    "--unlink",
    "--utime",
    "--xattr",
];

/// Those that this version of stress-ng knows.
fn known_stressors() -> Vec<&'static str> {
    let help = run_text(Command::new(tool("stress-ng")).arg("--help"));
    let known = |stressor: &&&str| help.contains(&format!("{stressor} N"));
    STRESSORS.iter().filter(known).copied().collect()
}

fn run_text(command: &mut Command) -> String {
    let output = command.output().expect("stress-ng runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stress_ng(kind: Kind) {
    let system = Setup::new(kind).bytes(ROOMY_BYTES).start();
    let seconds = if std::env::var_os("HSM_FULL").is_some() {
        30
    } else {
        3
    };
    let dir = system.at("stress");
    std::fs::create_dir(&dir).expect("a directory");
    let known = known_stressors();
    say(format_args!("{known:?}"));
    for some in known.chunks(9) {
        let mut command = Command::new(tool("stress-ng"));
        command
            .arg("--temp-path")
            .arg(&dir)
            .args(["--hdd-bytes", "8M"]);
        for stressor in some {
            command.args([stressor, "1"]);
        }
        command.args(["--timeout", "60", "--quiet"]);
        let mut stress = Running::start(command, system.home().path(), "stress");
        thread::sleep(Duration::from_secs(seconds));
        end_stress(&mut stress);
        system.sync(&[]);
    }
    // stress-ng must be gone, or it changes the tree below the comparison.
    system.check(&format!("stress-ng on {kind}"));
}

/// Kills stress-ng with all its children, which it makes in its own process group.
fn end_stress(stress: &mut Running) {
    let tree = run({
        let mut command = Command::new("ps");
        command.args(["-e", "-o", "pid=,ppid="]);
        command
    });
    let pairs: Vec<(i32, i32)> = tree
        .stdout
        .lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().map(str::parse);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        })
        .collect();
    let mut family = vec![stress.pid().as_raw()];
    let mut at = 0;
    while let Some(&parent) = family.get(at) {
        family.extend(
            pairs
                .iter()
                .filter(|pair| pair.1 == parent)
                .map(|pair| pair.0),
        );
        at += 1;
    }
    // Stopped first, so that none of them makes another.
    for signal in [nix::sys::signal::SIGSTOP, nix::sys::signal::SIGKILL] {
        for &pid in &family {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }
    stress.kill();
    let alive = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z ") && stat.contains("stress"))
    };
    while family.iter().any(alive) {
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn stress_ng_on_ext4() {
    hsm_tests::compare::ignore_holes();
    stress_ng(Kind::Ext4);
}

#[test]
fn stress_ng_on_xfs() {
    hsm_tests::compare::ignore_holes();
    stress_ng(Kind::Xfs);
}

#[test]
fn stress_ng_on_btrfs() {
    hsm_tests::compare::ignore_holes();
    stress_ng(Kind::Btrfs);
}
