//! Random trees, and a description of a tree that shares no code with the crate: find(1), getfattr(1),
//! lsattr(1) and b3 hashes of whole files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::fs::{run, text};

/// One line for each entry, by path: type, mode, owner, mtime, size, links, target, device, content.
pub fn describe(root: &Path) -> BTreeMap<String, String> {
    let out = run(
        "find",
        &[text(root), "-printf", "%P\\t%y %m %U:%G %T@ %s %n %l\\0"],
    );
    let mut tree = BTreeMap::new();
    let mut groups: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for line in out.split('\0').filter(|line| !line.is_empty()) {
        let (path, rest) = line.split_once('\t').unwrap();
        if path.starts_with("lost+found") {
            continue;
        }
        let full = root.join(path);
        let mut rest = rest.to_owned();
        // The size of a directory and its links are the filesystem's.
        if rest.starts_with('d') {
            let fields: Vec<&str> = rest.split(' ').collect();
            rest = fields[..4].join(" ");
        }
        let meta = full.symlink_metadata().unwrap();
        if meta.is_file() {
            // Holes first: what was read of reserved blocks counts as data afterwards.
            rest += &format!(" holes {:?}", holes(&full));
            rest += &format!(" {}", blake3::hash(&fs::read(&full).unwrap()));
            rest += &format!(" flags {}", flags(&full));
        } else if meta.is_dir() {
            rest += &format!(" flags {}", flags(&full));
        }
        rest += &format!(" rdev {:x}", meta.rdev());
        if meta.nlink() > 1 && !meta.is_dir() {
            groups.entry(meta.ino()).or_default().push(path.to_owned());
        }
        tree.insert(path.to_owned(), rest);
    }
    for group in groups.values_mut() {
        group.sort();
        for path in group.iter() {
            *tree.get_mut(path).unwrap() += &format!(" links {group:?}");
        }
    }
    let xattrs = run(
        "getfattr",
        &[
            "-R",
            "-h",
            "-P",
            "-d",
            "-m",
            "-",
            "-e",
            "hex",
            "--absolute-names",
            text(root),
        ],
    );
    for block in xattrs
        .split("\n\n")
        .filter(|block| !block.trim().is_empty())
    {
        let (head, rest) = block.trim_start().split_once('\n').unwrap_or((block, ""));
        let path = head
            .trim_start_matches("# file: ")
            .trim_start_matches(text(root));
        let mut list: Vec<&str> = rest
            .lines()
            .filter(|line| !line.starts_with("trusted.SGI_ACL"))
            .collect();
        list.sort_unstable();
        // getfattr escapes what find does not: only plain names carry xattrs here.
        if let Some(entry) = tree.get_mut(path.trim_start_matches('/')) {
            *entry += &format!(" xattrs {list:?}");
        }
    }
    tree
}

fn flags(path: &Path) -> String {
    let out = run("lsattr", &["-d", text(path)]);
    let letters = out.split(' ').next().unwrap_or("");
    letters
        .chars()
        .filter(|letter| "cSiadAmjDTC".contains(*letter))
        .collect()
}

/// 4 KiB units that are holes.
fn holes(path: &Path) -> Vec<(u64, u64)> {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let (mut at, mut holes) = (0, Vec::new());
    while at < size {
        let data = nix::unistd::lseek(
            &file,
            i64::try_from(at).unwrap(),
            nix::unistd::Whence::SeekData,
        );
        let data = data.map_or(size, |data| u64::try_from(data).unwrap());
        if data > at {
            holes.push((at, data));
        }
        if data >= size {
            break;
        }
        let hole = nix::unistd::lseek(
            &file,
            i64::try_from(data).unwrap(),
            nix::unistd::Whence::SeekHole,
        );
        at = u64::try_from(hole.unwrap()).unwrap();
    }
    holes
}

/// Says where two trees differ; empty where they do not.
pub fn differences(left: &Path, right: &Path) -> Vec<String> {
    let (left, right) = (describe(left), describe(right));
    let mut all = Vec::new();
    for (path, line) in &left {
        match right.get(path) {
            Some(other) if other == line => {}
            other => all.push(format!("{path:?}\n  {line}\n  {other:?}")),
        }
    }
    all.extend(
        right
            .keys()
            .filter(|path| !left.contains_key(*path))
            .map(|path| format!("{path:?} is new")),
    );
    all
}

/// Makes a random tree of every kind of entry below `root`. Prints its seed where a test fails.
pub struct RandomTree {
    rng: StdRng,
    /// The filesystem takes these chattr flags on files.
    pub flags: &'static str,
}

impl RandomTree {
    pub fn new(seed: u64) -> Self {
        eprintln!("seed {seed}");
        Self {
            rng: StdRng::seed_from_u64(seed),
            flags: "dSA",
        }
    }

    pub fn fill(&mut self, root: &Path, entries: usize) {
        let mut dirs = vec![root.to_owned()];
        let mut files: Vec<PathBuf> = Vec::new();
        for number in 0..entries {
            let parent = dirs[self.rng.random_range(0..dirs.len())].clone();
            let path = parent.join(self.name(number));
            match self.rng.random_range(0..20) {
                0..3 => {
                    fs::create_dir(&path).unwrap();
                    dirs.push(path);
                    continue;
                }
                3..5 => symlink(format!("../nowhere/{number}"), &path).unwrap(),
                5 => mknod(&path, libc::S_IFIFO, 0),
                6 => mknod(&path, libc::S_IFSOCK, 0),
                7 => mknod(&path, libc::S_IFCHR, libc::makedev(1, 3)),
                8 => mknod(&path, libc::S_IFBLK, libc::makedev(7, 255)),
                9..11 if !files.is_empty() => {
                    let other = files[self.rng.random_range(0..files.len())].clone();
                    fs::hard_link(other, &path).unwrap();
                }
                _ => self.file(&path),
            }
            files.push(path);
        }
        for path in &files {
            self.attributes(path);
        }
        dirs.reverse();
        for path in &dirs {
            if self.rng.random_bool(0.3) {
                run("setfacl", &["-d", "-m", "u:1234:rx", text(path)]);
            }
            self.attributes(path);
        }
        self.flag(files.iter().chain(&dirs));
    }

    /// Flags last, one for each file: some forbid all further changes.
    fn flag<'p>(&mut self, paths: impl Iterator<Item = &'p PathBuf>) {
        let mut seen = std::collections::BTreeSet::new();
        for path in paths {
            let meta = path.symlink_metadata().unwrap();
            let fits = (meta.is_file() || meta.is_dir()) && seen.insert(meta.ino());
            if fits && self.rng.random_bool(0.15) {
                let flag = self.flags.as_bytes()[self.rng.random_range(0..self.flags.len())];
                run(
                    "chattr",
                    &[&format!("+{}", char::from(flag)), "--", text(path)],
                );
            }
        }
    }

    fn name(&mut self, number: usize) -> String {
        match self.rng.random_range(0..12) {
            0 => format!("{number} with spaces"),
            1 => format!("{number}-ünïcödé-文件"),
            2 => format!("{number}{}", "x".repeat(250 - number.to_string().len())),
            3 => format!(".hidden{number}"),
            4 => format!("-{number}"),
            _ => format!("{number}"),
        }
    }

    fn file(&mut self, path: &Path) {
        let mut file = File::create(path).unwrap();
        let size = match self.rng.random_range(0..10) {
            0 => 0,
            1..6 => self.rng.random_range(1..5000),
            6..8 => self.rng.random_range(5000..300_000),
            _ => self.rng.random_range(300_000..4_000_000),
        };
        let mut bytes = vec![0; size];
        self.rng.fill_bytes(&mut bytes);
        if self.rng.random_bool(0.5) {
            bytes.fill(7);
        }
        file.write_all(&bytes).unwrap();
        if self.rng.random_bool(0.2) {
            file.seek(SeekFrom::Start(self.rng.random_range(0..20_000_000)))
                .unwrap();
            file.write_all(b"after a hole").unwrap();
        }
        if self.rng.random_bool(0.1) {
            file.set_len(self.rng.random_range(0..50_000_000)).unwrap();
        }
    }

    fn attributes(&mut self, path: &Path) {
        let meta = path.symlink_metadata().unwrap();
        if self.rng.random_bool(0.5) {
            let (uid, gid) = (
                self.rng.random_range(0..70_000),
                self.rng.random_range(0..70_000),
            );
            std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
        }
        if !meta.is_symlink() {
            let mode = self.rng.random_range(0..0o10000);
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let plain = path.as_os_str().as_bytes().iter().all(u8::is_ascii_graphic);
        if plain && self.rng.random_bool(0.3) {
            let value = "v".repeat(self.rng.random_range(0..300));
            let name = if meta.is_file() || meta.is_dir() {
                "user.test"
            } else {
                "trusted.test"
            };
            run(
                "setfattr",
                &["-h", "-n", name, "-v", &value, "--", text(path)],
            );
            if meta.is_file() {
                run("setfacl", &["-m", "u:99:rw,g:7:x", "--", text(path)]);
            }
            if meta.is_file() && self.rng.random_bool(0.5) {
                // cap_net_raw+ep, as setcap(8) writes it.
                let value = "0x0100000200200000000000000000000000000000";
                run(
                    "setfattr",
                    &["-n", "security.capability", "-v", value, "--", text(path)],
                );
            }
        }
        self.time(path);
    }

    fn time(&mut self, path: &Path) {
        let seconds = self.rng.random_range(-1_000_000_000..4_000_000_000_i64);
        let nanos = self.rng.random_range(0..1_000_000_000);
        let time = nix::sys::time::TimeSpec::new(seconds, nanos);
        nix::sys::stat::utimensat(
            nix::fcntl::AT_FDCWD,
            path,
            &time,
            &time,
            nix::sys::stat::UtimensatFlags::NoFollowSymlink,
        )
        .unwrap();
    }
}

fn mknod(path: &Path, kind: u32, device: u64) {
    let kind = nix::sys::stat::SFlag::from_bits_truncate(kind);
    nix::sys::stat::mknod(
        path,
        kind,
        nix::sys::stat::Mode::from_bits_truncate(0o600),
        device,
    )
    .unwrap();
}
