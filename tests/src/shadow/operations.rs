//! What is done to the files and, where it was done, to their model.
//!
//! An operation that gives an error has done nothing, or what the model was told of.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use rand::rngs::StdRng;
use rand::{Rng, RngExt};

use super::model::{Inode, Model};
use crate::stubs::{is_for_later, is_marked};
use crate::sys::{remove_xattr, set_xattr};

/// Where files are, below the thread's directory.
pub(super) const DIRECTORIES: [&str; 3] = ["a", "b", "c"];
const FILE_NAMES: u64 = 12;
/// Where files end, most of them.
const FILE_BYTES: u64 = 300_000;
const HELD_MAX: usize = 3;
/// Names drawn until one is a released file's, which are what this is about.
const DRAWS: usize = 6;

/// One kind of operation: its name, how often it is tried beside the others, what it does.
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) weight: u64,
    pub(super) run: fn(&mut Hand) -> io::Result<()>,
    /// What it was done to has to be logged before it is released.
    pub(super) changes: bool,
}

const fn change(
    name: &'static str,
    weight: u64,
    run: fn(&mut Hand) -> io::Result<()>,
) -> Operation {
    Operation {
        name,
        weight,
        run,
        changes: true,
    }
}

const fn look_at(
    name: &'static str,
    weight: u64,
    run: fn(&mut Hand) -> io::Result<()>,
) -> Operation {
    Operation {
        name,
        weight,
        run,
        changes: false,
    }
}

pub(super) const TABLE: &[Operation] = &[
    look_at("read", 100, read),
    look_at("read_part", 40, read_part),
    look_at("look", 40, look),
    look_at("read_held", 20, read_held),
    look_at("let_go", 15, let_go),
    change("create", 60, create),
    change("write_at", 50, write_at),
    change("append", 25, append),
    change("rewrite", 20, rewrite),
    change("truncate", 20, truncate),
    change("truncate_by_path", 25, truncate_by_path),
    change("cut_while_it_is_read", 15, cut_while_it_is_read),
    change("punch", 20, punch),
    change("rename", 20, rename),
    change("rename_over", 20, rename_over),
    change("exchange", 15, exchange),
    change("exchange_directories", 5, exchange_directories),
    change("link", 20, link),
    change("unlink", 20, unlink),
    change("chmod", 20, chmod),
    change("touch", 20, touch),
    change("set_xattr", 20, set_attribute),
    change("remove_xattr", 8, remove_attribute),
    change("hold", 15, hold),
    change("write_held", 20, write_held),
];

/// A thread's directory and its model.
pub(super) struct Hand {
    dir: PathBuf,
    pub(super) model: Model,
    random: StdRng,
    asked_by_path: bool,
    /// Files that are open for a while, perhaps without a name by now.
    held: VecDeque<(File, usize)>,
    /// The operation under way has met a released file.
    pub(super) met_stub: bool,
}

impl Hand {
    pub(super) fn new(dir: PathBuf, random: StdRng, asked_by_path: bool) -> Self {
        Self {
            dir,
            model: Model::default(),
            random,
            asked_by_path,
            held: VecDeque::new(),
            met_stub: false,
        }
    }

    /// A number from 0 to `end - 1`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.random.random_range(0..end)
    }

    pub(super) fn story(&self) -> String {
        format!("{}\n{}", self.dir.display(), self.model.story())
    }

    /// A length from 1 to `max`, the small ones as likely as the large ones.
    fn length(&mut self, max: u64) -> u64 {
        let bits = u64::from(max.ilog2()) + 1;
        let bound = 1u64 << self.below(bits);
        1 + self.below(bound).min(max - 1)
    }

    /// Never zeros: those are what is looked for.
    fn bytes(&mut self, max: u64) -> Vec<u8> {
        let len = self.length(max);
        let mut bytes = vec![0; small(len)];
        self.random.fill_bytes(&mut bytes);
        for byte in &mut bytes {
            *byte |= 1;
        }
        bytes
    }

    fn any_name(&mut self) -> String {
        let dir = DIRECTORIES[small(self.below(DIRECTORIES.len() as u64))];
        format!("{dir}/f{}", self.below(FILE_NAMES))
    }

    /// A name that is not taken.
    fn free_name(&mut self) -> io::Result<String> {
        for _ in 0..8 {
            let name = self.any_name();
            if !self.model.has(&name) {
                return Ok(name);
            }
        }
        Err(none())
    }

    /// A file's name; that of a released file, if one is found soon.
    fn name(&mut self) -> io::Result<String> {
        if self.model.count() == 0 {
            return Err(none());
        }
        let mut draws = 0;
        loop {
            let name = self.any_name();
            if !self.model.has(&name) {
                continue;
            }
            draws += 1;
            let stub = is_marked(&self.path(&name));
            if stub || draws == DRAWS {
                self.met_stub |= stub;
                return Ok(name);
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn inode(&mut self, name: &str) -> &mut Inode {
        self.model.at(name).expect("a name of the model").1
    }

    /// Opens a file, and finds it as it should be.
    fn open(&mut self, name: &str, options: &OpenOptions) -> io::Result<File> {
        let path = self.path(name);
        let file = options.open(&path)?;
        let context = format!("opened {}", path.display());
        let meta = file.metadata()?;
        let inode = self.inode(name);
        inode.expect_attributes(&path, &meta, &context);
        inode.expect_mtime(&meta, &context);
        Ok(file)
    }

    /// Forgets what can be reached no more.
    fn forget(&mut self) {
        let open: Vec<usize> = self.held.iter().map(|(_, id)| *id).collect();
        self.model.forget(&open);
    }
}

/// There is nothing to work on.
fn none() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

fn small(number: u64) -> usize {
    usize::try_from(number).expect("a small number")
}

fn reading() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true);
    options
}

fn writing() -> OpenOptions {
    let mut options = reading();
    options.write(true);
    options
}

/// Writes as much as the kernel takes before it refuses, and tells the model of that.
fn write_out(file: &File, inode: &mut Inode, bytes: &[u8], at: usize) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let written = file.write_at(&bytes[done..], (at + done) as u64)?;
        inode.write(&bytes[done..done + written], at + done);
        inode.changed(&file.metadata()?);
        done += written;
        inode.tell(format!("written {written} bytes at {at}"));
    }
    Ok(())
}

// ---- reading ---------------------------------------------------------------------------------------

fn read(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let mut file = h.open(&name, &reading())?;
    let mut found = Vec::new();
    file.read_to_end(&mut found)?;
    h.inode(&name).expect_bytes(0, &found, usize::MAX, &name);
    Ok(())
}

fn read_part(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let file = h.open(&name, &reading())?;
    let at = h.below(FILE_BYTES);
    let mut buffer = vec![0; small(h.length(100_000))];
    let got = file.read_at(&mut buffer, at)?;
    h.inode(&name)
        .expect_bytes(small(at), &buffer[..got], buffer.len(), &name);
    Ok(())
}

/// Opens nothing.
fn look(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let path = h.path(&name);
    let meta = fs::symlink_metadata(&path)?;
    let context = format!("looked at {}", path.display());
    h.inode(&name).expect_attributes(&path, &meta, &context);
    Ok(())
}

// ---- content ---------------------------------------------------------------------------------------

pub(super) fn create(h: &mut Hand) -> io::Result<()> {
    let name = h.free_name()?;
    let path = h.path(&name);
    let opened = writing().create_new(true).open(&path);
    // The kernel asks about it when it is there: refused, it stays, and is empty.
    let meta = match &opened {
        Ok(file) => file.metadata()?,
        Err(_) => match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(_) => return opened.map(drop),
        },
    };
    let inode = h.model.create(name.clone());
    inode.mode = meta.mode() & 0o7777;
    inode.changed(&meta);
    inode.tell(format!("created as {name}"));
    let file = opened?;
    let bytes = h.bytes(200_000);
    write_out(&file, h.inode(&name), &bytes, 0)
}

fn write_at(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let file = h.open(&name, &writing())?;
    let (at, bytes) = (h.below(FILE_BYTES), h.bytes(100_000));
    write_out(&file, h.inode(&name), &bytes, small(at))
}

fn append(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let mut options = OpenOptions::new();
    let mut file = h.open(&name, options.append(true))?;
    let bytes = h.bytes(20_000);
    let inode = h.inode(&name);
    let end = inode.bytes.len();
    let written = file.write(&bytes)?;
    inode.write(&bytes[..written], end);
    inode.changed(&file.metadata()?);
    inode.tell(format!("appended {written} bytes at {end}"));
    Ok(())
}

fn rewrite(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let path = h.path(&name);
    let file = OpenOptions::new().write(true).truncate(true).open(path)?;
    let bytes = h.bytes(100_000);
    let inode = h.inode(&name);
    inode.bytes.clear();
    inode.changed(&file.metadata()?);
    inode.tell("emptied when it was opened".to_owned());
    write_out(&file, inode, &bytes, 0)
}

fn truncate(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let file = h.open(&name, &writing())?;
    let len = h.below(FILE_BYTES);
    file.set_len(len)?;
    let inode = h.inode(&name);
    inode.bytes.resize(small(len), 0);
    inode.changed(&file.metadata()?);
    inode.tell(format!("cut or extended to {len}"));
    Ok(())
}

fn truncate_by_path(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let path = h.path(&name);
    let before = h.inode(&name).bytes.len() as u64;
    let most = if h.asked_by_path {
        FILE_BYTES
    } else {
        before + 1
    };
    let len = h.below(most);
    nix::unistd::truncate(&path, i64::try_from(len).expect("a small number"))?;
    let inode = h.inode(&name);
    inode.bytes.resize(small(len), 0);
    // Whoever looks without opening it may see that of a recall.
    inode.mtime = None;
    inode.tell(format!(
        "cut or extended from {before} to {len} by its path"
    ));
    Ok(())
}

/// Another program opens the file at the same moment.
fn cut_while_it_is_read(h: &mut Hand) -> io::Result<()> {
    if !h.asked_by_path {
        return Err(none());
    }
    let name = h.name()?;
    let path = h.path(&name);
    let before = h.inode(&name).bytes.len() as u64;
    let len = h.below(before + 1);
    let pause = Duration::from_micros(h.below(3000));
    let (read, cut) = thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&path));
        thread::sleep(pause);
        let cut = nix::unistd::truncate(&path, i64::try_from(len).expect("a small number"));
        (reader.join().expect("it ends"), cut)
    });
    let inode = h.inode(&name);
    match read {
        Ok(mut found) => {
            // What was cut while it was read may be anything.
            let known = if cut.is_ok() { small(len) } else { usize::MAX };
            found.truncate(known);
            inode.expect_bytes(0, &found, known, &name);
        }
        Err(error) if is_for_later(&error) => {}
        Err(error) => panic!("{}: {error}; {}", path.display(), inode.story()),
    }
    cut?;
    inode.bytes.truncate(small(len));
    inode.mtime = None;
    inode.tell(format!(
        "cut from {before} to {len} by its path while it was read"
    ));
    Ok(())
}

fn punch(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let file = h.open(&name, &writing())?;
    let (at, len) = (h.below(FILE_BYTES), h.length(150_000));
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |number| i64::try_from(number).expect("a small number");
    fallocate(&file, flags, signed(at), signed(len))?;
    let inode = h.inode(&name);
    inode.punch(small(at), small(len));
    inode.changed(&file.metadata()?);
    inode.tell(format!("punched {len} at {at}"));
    Ok(())
}

// ---- names -----------------------------------------------------------------------------------------

fn rename(h: &mut Hand) -> io::Result<()> {
    let (from, to) = (h.name()?, h.free_name()?);
    fs::rename(h.path(&from), h.path(&to))?;
    h.model.rename(&from, &to);
    h.inode(&to).tell(format!("renamed from {from} to {to}"));
    Ok(())
}

fn rename_over(h: &mut Hand) -> io::Result<()> {
    let (from, to) = (h.name()?, h.name()?);
    fs::rename(h.path(&from), h.path(&to))?;
    h.model.rename(&from, &to);
    h.inode(&to).tell(format!("renamed from {from} over {to}"));
    h.forget();
    Ok(())
}

fn exchange_paths(one: &PathBuf, other: &PathBuf) -> io::Result<()> {
    let flags = RenameFlags::RENAME_EXCHANGE;
    Ok(renameat2(AT_FDCWD, one, AT_FDCWD, other, flags)?)
}

fn exchange(h: &mut Hand) -> io::Result<()> {
    let (one, other) = (h.name()?, h.name()?);
    exchange_paths(&h.path(&one), &h.path(&other))?;
    h.model.exchange(&one, &other);
    for name in [&one, &other] {
        h.inode(name).tell(format!("exchanged, {name} now"));
    }
    Ok(())
}

fn exchange_directories(h: &mut Hand) -> io::Result<()> {
    let one = small(h.below(DIRECTORIES.len() as u64));
    let (one, other) = (DIRECTORIES[one], DIRECTORIES[(one + 1) % DIRECTORIES.len()]);
    exchange_paths(&h.path(one), &h.path(other))?;
    h.model.exchange_directories(one, other);
    Ok(())
}

fn link(h: &mut Hand) -> io::Result<()> {
    let (from, to) = (h.name()?, h.free_name()?);
    fs::hard_link(h.path(&from), h.path(&to))?;
    h.inode(&from).tell(format!("linked as {to}"));
    h.model.link(&from, to);
    Ok(())
}

fn unlink(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    fs::remove_file(h.path(&name))?;
    h.inode(&name).tell(format!("unlinked at {name}"));
    h.model.unlink(&name);
    h.forget();
    Ok(())
}

// ---- attributes ------------------------------------------------------------------------------------

fn chmod(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let mode = 0o600 + u32::try_from(h.below(0o100)).expect("a small number");
    fs::set_permissions(h.path(&name), Permissions::from_mode(mode))?;
    let inode = h.inode(&name);
    inode.mode = mode;
    inode.tell(format!("mode {mode:04o}"));
    Ok(())
}

fn touch(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let seconds = i64::try_from(h.below(2_000_000_000)).expect("a small number");
    let nanoseconds = i64::try_from(h.below(1_000_000_000)).expect("a small number");
    let omitted = TimeSpec::new(0, libc::UTIME_OMIT);
    let time = TimeSpec::new(seconds, nanoseconds);
    let flags = UtimensatFlags::NoFollowSymlink;
    utimensat(AT_FDCWD, &h.path(&name), &omitted, &time, flags)?;
    let inode = h.inode(&name);
    inode.mtime = Some((seconds, nanoseconds));
    inode.tell(format!("modified at {seconds}.{nanoseconds:09}"));
    Ok(())
}

fn xattr_name(h: &mut Hand) -> &'static CStr {
    const NAMES: [&CStr; 3] = [c"user.a", c"user.b", c"user.longer name"];
    NAMES[small(h.below(NAMES.len() as u64))]
}

fn set_attribute(h: &mut Hand) -> io::Result<()> {
    let (name, attribute, value) = (h.name()?, xattr_name(h), h.bytes(300));
    set_xattr(&h.path(&name), attribute, &value)?;
    let inode = h.inode(&name);
    inode.tell(format!("{attribute:?} set to {} bytes", value.len()));
    inode.xattrs.insert(attribute, value);
    Ok(())
}

fn remove_attribute(h: &mut Hand) -> io::Result<()> {
    let (name, attribute) = (h.name()?, xattr_name(h));
    if h.inode(&name).xattrs.remove(attribute).is_none() {
        return Err(none());
    }
    h.inode(&name).tell(format!("{attribute:?} removed"));
    remove_xattr(&h.path(&name), attribute)
}

// ---- descriptors that stay open --------------------------------------------------------------------

fn hold(h: &mut Hand) -> io::Result<()> {
    let name = h.name()?;
    let file = h.open(&name, &writing())?;
    let (id, inode) = h.model.at(&name).expect("a name of the model");
    inode.tell("held open".to_owned());
    h.held.push_back((file, id));
    if h.held.len() > HELD_MAX {
        let_go(h)?;
    }
    Ok(())
}

fn write_held(h: &mut Hand) -> io::Result<()> {
    let (at, bytes) = (h.below(FILE_BYTES), h.bytes(30_000));
    let (file, id) = h.held.back().ok_or_else(none)?;
    write_out(file, h.model.inode(*id), &bytes, small(at))
}

fn read_held(h: &mut Hand) -> io::Result<()> {
    let at = h.below(FILE_BYTES);
    let mut buffer = vec![0; small(h.length(100_000))];
    let (file, id) = h.held.front().ok_or_else(none)?;
    let got = file.read_at(&mut buffer, at)?;
    let inode = h.model.inode(*id);
    inode.expect_bytes(small(at), &buffer[..got], buffer.len(), "held open");
    Ok(())
}

pub(super) fn let_go(h: &mut Hand) -> io::Result<()> {
    let (file, id) = h.held.pop_front().ok_or_else(none)?;
    drop(file);
    h.model.inode(id).tell("let go".to_owned());
    h.forget();
    Ok(())
}
