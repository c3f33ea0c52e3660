//! Every refusal, on real filesystems.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Refusal, Report, check};
use crate::config::Config;
use crate::sys::testfs::{KINDS, TestFs, run};

/// A configuration beside (not on) a filesystem; `replace` changes its paths.
fn config(mount: &Path, base: &Path, replace: &[(&str, &Path)]) -> Config {
    let mut text = format!(
        "mount = \"{}\"\nspool = \"{b}/spool\"\ncatalog = \"{b}/catalog.db\"\nsocket = \"{b}/sock\"\n\
         spool_bytes_max = \"256MiB\"\n[[pool]]\nname = \"main\"\nvolumes = [\"{b}/vol1\"]\n",
        mount.display(),
        b = base.display()
    );
    for (key, path) in replace {
        let name = match *key {
            "spool" => "/spool",
            "catalog" => "/catalog.db",
            "socket" => "/sock",
            "volumes" => "/vol1",
            other => panic!("{other}"),
        };
        text = text.replace(
            &format!("\"{}{name}\"", base.display()),
            &format!("{:?}", path.display().to_string()),
        );
    }
    let file = base.join("hsmd.toml");
    fs::write(&file, &text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    Config::load(&file).unwrap()
}

fn refusals(config: &Config) -> Vec<Refusal> {
    check(config).expect_err("a refusal")
}

/// The one refusal, as it is printed.
fn only(config: &Config) -> String {
    let all = refusals(config);
    assert_eq!(all.len(), 1, "{all:#?}");
    all[0].to_string()
}

fn good(config: &Config) -> Report {
    check(config).unwrap_or_else(|all| panic!("{all:#?}"))
}

#[test]
fn a_sound_machine_is_reported() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let report = good(&config(fs.root(), fs.outside(), &[]));
        assert_eq!(report.fs_type, kind);
        assert_eq!(report.device, Path::new(&fs.device()));
        assert_eq!(report.mount_point, fs.root());
        let warnings: Vec<_> = report.warnings.iter().map(ToString::to_string).collect();
        assert!(
            warnings
                .iter()
                .any(|w| w.contains("vol1: the volume is absent")),
            "{warnings:?}"
        );
        fs::create_dir(fs.outside().join("vol1")).unwrap();
        let report = good(&config(fs.root(), fs.outside(), &[]));
        let warnings: Vec<_> = report.warnings.iter().map(ToString::to_string).collect();
        assert!(
            warnings
                .iter()
                .any(|w| w.contains("same filesystem as the spool")),
            "{warnings:?}"
        );
        let names = fs::read_dir(fs.outside()).unwrap().count();
        assert_eq!(names, 4, "image, mnt, hsmd.toml, vol1: nothing was made");
    }
}

#[test]
fn mounts_that_cannot_be_watched() {
    let mut fs = TestFs::new("ext4");
    let base = fs.outside().to_owned();
    let absent = only(&config(&base.join("absent"), &base, &[]));
    assert!(
        absent.contains("no such directory; make and mount it"),
        "{absent}"
    );
    let file = only(&config(&fs.image(), &base, &[]));
    assert!(file.contains("not a directory"), "{file}");
    fs::create_dir(fs.at("dir")).unwrap();
    let inner = only(&config(&fs.at("dir"), &base, &[]));
    assert!(
        inner.contains(&format!(
            "a directory of the filesystem at {}",
            fs.root().display()
        )),
        "{inner}"
    );
    let bind = base.join("bind");
    fs.mount_also(&["--bind", fs.at("dir").to_str().unwrap()], &bind);
    let part = only(&config(&bind, &base, &[]));
    assert!(
        part.contains("only the directory /dir of its filesystem"),
        "{part}"
    );
    let memory = base.join("memory");
    fs.mount_also(&["-t", "tmpfs", "none"], &memory);
    let message = only(&config(&memory, &base, &[]));
    assert!(
        message.contains("it is tmpfs, which lives in memory")
            && message.contains("use a filesystem of type ext4"),
        "{message}"
    );
    let options = ["lower", "upper", "work"].map(|name| {
        let path = memory.join(name);
        fs::create_dir(&path).unwrap();
        path.display().to_string()
    });
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        options[0], options[1], options[2]
    );
    let overlay = base.join("overlay");
    fs.mount_also(&["-t", "overlay", "-o", &options, "none"], &overlay);
    let message = only(&config(&overlay, &base, &[]));
    assert!(
        message.contains("it is overlay, which shows other filesystems"),
        "{message}"
    );
    let message = only(&config(Path::new("/proc"), &base, &[]));
    assert!(message.contains("it is proc"), "{message}");
}

#[test]
fn every_other_type_has_its_reason() {
    for (fs_type, part) in [
        ("nfs4", "network"),
        ("fuse.sshfs", "FUSE"),
        ("fuseblk", "FUSE"),
        ("ext3", "whole seconds"),
        ("squashfs", "cannot change"),
        ("zfs", "not made for"),
    ] {
        let (reason, advice) = super::watched::unsuitable(fs_type).unwrap();
        assert!(
            reason.contains(part) && !advice.is_empty(),
            "{fs_type}: {reason}"
        );
    }
}

#[test]
fn small_inodes_are_refused() {
    let fs = TestFs::with_options("ext4", &["-I", "128"]);
    let message = only(&config(fs.root(), fs.outside(), &[]));
    assert!(
        message.contains("inodes of 128 bytes") && message.contains("-I 256"),
        "{message}"
    );
}

#[test]
fn a_read_only_mount_is_told_of() {
    let fs = TestFs::new("xfs");
    run("mount", &["-o", "remount,ro", fs.root().to_str().unwrap()]);
    let report = good(&config(fs.root(), fs.outside(), &[]));
    assert!(
        report
            .warnings
            .iter()
            .any(|w| w.reason.contains("read-only"))
    );
}

#[test]
fn own_places_on_the_watched_filesystem_are_refused() {
    for kind in KINDS {
        let mut fs = TestFs::new(kind);
        let base = fs.outside().to_owned();
        fs::create_dir(fs.at("here")).unwrap();
        symlink(fs.at("here"), base.join("link")).unwrap();
        let bind = base.join("bind");
        fs.mount_also(&["--bind", fs.at("here").to_str().unwrap()], &bind);
        let mut inside: Vec<PathBuf> =
            vec![fs.at("new/deeper"), base.join("link/new"), bind.join("new")];
        if kind == "btrfs" {
            let (sub, device, at) = (fs.at("sub"), fs.device(), base.join("submount"));
            run("btrfs", &["subvolume", "create", sub.to_str().unwrap()]);
            fs.mount_also(&["-o", "subvol=sub", &device], &at);
            inside.extend([sub.join("x"), at.join("x")]);
        }
        for path in inside {
            for (key, what) in [
                ("spool", "the spool lies on the watched"),
                ("catalog", "the catalog lies on the watched"),
                ("socket", "the control socket lies on the watched"),
                ("volumes", "the volume lies on the watched"),
            ] {
                let message = only(&config(fs.root(), &base, &[(key, &path)]));
                assert!(
                    message.starts_with(path.to_str().unwrap()),
                    "{kind}: {message}"
                );
                assert!(
                    message.contains(what) && message.contains("another disk"),
                    "{message}"
                );
            }
        }
        let mut moved = config(fs.root(), &base, &[]);
        moved.file = fs.at("hsmd.toml");
        fs::copy(base.join("hsmd.toml"), &moved.file).unwrap();
        let message = only(&moved);
        assert!(
            message.contains("the configuration lies on the watched filesystem"),
            "{message}"
        );
    }
}

#[test]
fn a_spool_on_a_loop_device_over_the_watched_filesystem_is_refused() {
    let mut fs = TestFs::new("xfs");
    let (image, at) = (fs.at("inner.img"), fs.outside().join("inner"));
    fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]);
    fs.mount_also(&["-o", "loop", image.to_str().unwrap()], &at);
    let spool = at.join("spool");
    let message = only(&config(fs.root(), fs.outside(), &[("spool", &spool)]));
    assert!(
        message.contains("the spool lies on the watched"),
        "{message}"
    );
}

#[test]
fn swap_and_own_program_on_the_watched_filesystem_are_refused() {
    let fs = TestFs::new("ext4");
    let swap = fs.at("swap");
    fs::write(&swap, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&swap, fs::Permissions::from_mode(0o600)).unwrap();
    run("mkswap", &[swap.to_str().unwrap()]);
    run("sync", &[]);
    let on = Command::new("swapon")
        .arg(&swap)
        .status()
        .unwrap()
        .success();
    let result = check(&config(fs.root(), fs.outside(), &[]));
    if on {
        run("swapoff", &[swap.to_str().unwrap()]);
        let all = result.expect_err("swap");
        assert!(
            all[0]
                .to_string()
                .contains("it is a swap file on the watched filesystem; swapoff"),
            "{all:?}"
        );
    }
    // The program: a copy of this test, run from there, checks itself.
    let program = fs.at("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    config(fs.root(), fs.outside(), &[]);
    let output = Command::new(&program)
        .args([
            "--exact",
            "preflight::tests::child_checks_the_given_file",
            "--nocapture",
        ])
        .env("HSMD_TEST_CONFIG", fs.outside().join("hsmd.toml"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("this program lies on the watched filesystem"),
        "{text}"
    );
}

/// Not a test of its own: what other tests run in another process.
#[test]
fn child_checks_the_given_file() {
    let Some(file) = std::env::var_os("HSMD_TEST_CONFIG") else {
        return;
    };
    match check(&Config::load(Path::new(&file)).unwrap()) {
        Ok(report) => println!("{report:?}"),
        Err(all) => all.iter().for_each(|refusal| println!("{refusal}")),
    }
}

#[test]
fn without_privileges_each_lack_is_named() {
    let fs = TestFs::new("ext4");
    config(fs.root(), fs.outside(), &[]);
    fs::set_permissions(fs.outside(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = fs.outside().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args([
            "--exact",
            "preflight::tests::child_checks_the_given_file",
            "--nocapture",
        ])
        .env("HSMD_TEST_CONFIG", fs.outside().join("hsmd.toml"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for part in [
        "this process: it lacks CAP_SYS_ADMIN",
        "CAP_DAC_READ_SEARCH",
        "CAP_LEASE",
        "run it as root",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.contains("the spool cannot be written below"), "{text}");
}

#[test]
fn places_that_cannot_be_made() {
    let mut fs = TestFs::new("ext4");
    let base = fs.outside().to_owned();
    let file = base.join("file");
    fs::write(&file, "").unwrap();
    for (key, path, part) in [
        ("spool", file.clone(), "the spool cannot be there"),
        (
            "spool",
            file.join("below"),
            "file exists and is not a directory",
        ),
        ("catalog", base.clone(), "exists and is not a file"),
        ("socket", file.clone(), "exists and is not a socket"),
        ("volumes", file.clone(), "exists and is not a directory"),
    ] {
        let mut changed = config(fs.root(), &base, &[]);
        match key {
            "spool" => changed.spool.clone_from(&path),
            "catalog" => changed.catalog.clone_from(&path),
            "socket" => changed.socket.clone_from(&path),
            _ => changed.pools[0].volumes = vec![path.clone()],
        }
        let all = refusals(&changed);
        assert!(
            all.iter().any(|r| r.to_string().contains(part)),
            "{key}: {all:?}"
        );
    }
    let dangling = base.join("dangling");
    symlink(base.join("nowhere"), &dangling).unwrap();
    let message = only(&config(fs.root(), &base, &[("spool", &dangling.join("x"))]));
    assert!(message.contains("leads nowhere"), "{message}");

    let locked = base.join("locked");
    fs::create_dir(&locked).unwrap();
    run("chattr", &["+i", locked.to_str().unwrap()]);
    let result = check(&config(
        fs.root(),
        &base,
        &[("spool", &locked.join("spool"))],
    ));
    run("chattr", &["-i", locked.to_str().unwrap()]);
    let all = result.expect_err("immutable");
    assert!(all[0].to_string().contains("immutable"), "{all:?}");

    let frozen = base.join("frozen");
    fs.mount_also(&["-t", "tmpfs", "-o", "ro", "none"], &frozen);
    let message = only(&config(
        fs.root(),
        &base,
        &[("catalog", &frozen.join("c.db"))],
    ));
    assert!(message.contains("mounted read-only"), "{message}");
}

#[test]
fn the_configuration_file_itself() {
    let fs = TestFs::new("ext4");
    let good = config(fs.root(), fs.outside(), &[]);
    fs::set_permissions(&good.file, fs::Permissions::from_mode(0o664)).unwrap();
    let message = only(&good);
    assert!(
        message.contains("mode 0664") && message.contains("chmod go-w"),
        "{message}"
    );
    fs::set_permissions(&good.file, fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&good.file, Some(4242), None).unwrap();
    let message = only(&good);
    assert!(
        message.contains("belongs to user 4242") && message.contains("chown root"),
        "{message}"
    );
    let mut group = config(fs.root(), fs.outside(), &[]);
    std::os::unix::fs::chown(&good.file, Some(0), None).unwrap();
    group.control_group = Some("no-such-group".into());
    let message = only(&group);
    assert!(
        message.contains("no such group; groupadd --system no-such-group"),
        "{message}"
    );
    group.control_group = Some("root".into());
    assert!(check(&group).is_ok());
}

#[test]
fn pools_on_one_disk_and_a_spool_in_memory_are_told_of() {
    let mut fs = TestFs::new("ext4");
    let base = fs.outside().to_owned();
    let memory = base.join("memory");
    fs.mount_also(&["-t", "tmpfs", "-o", "size=64m", "none"], &memory);
    let mut two = config(fs.root(), &base, &[("spool", &memory.join("spool"))]);
    let second = crate::config::Pool {
        name: "second".into(),
        volumes: vec![base.join("vol2")],
    };
    two.pools.push(second);
    fs::create_dir(base.join("vol1")).unwrap();
    fs::create_dir(base.join("vol2")).unwrap();
    let warnings: Vec<_> = good(&two)
        .warnings
        .iter()
        .map(ToString::to_string)
        .collect();
    for part in [
        "pools main and second",
        "lies in memory",
        "less than spool_bytes_max",
    ] {
        assert!(
            warnings.iter().any(|w| w.contains(part)),
            "{part}: {warnings:?}"
        );
    }
}
