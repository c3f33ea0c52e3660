//! The programs and system calls by which people read, copy and change a file.
//!
//! Each is a line of shell, so that the real programs run as they are used. What a tool saw is what it
//! leaves in a file, or what is then in the source; [`Tool::try_on`] says whether that is right, wrong (a
//! program that got zeros and noticed nothing), or whether the program said that it failed. Nothing here
//! knows the daemon: the source is any file with [`Tool::content`].
//!
//! Root is needed, for loop devices and overlays. The programs are those of `tests/setup.sh test`.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use crate::changes::noise;
use crate::loopfs::Kind;
use crate::program::run;

mod table;

use table::{COPIES, OTHERS};

/// Whole pages, so that loop devices and direct I/O see all of it; several readaheads.
const CONTENT_BYTES: usize = (3 << 20) + 4096;
/// Zeros that are data: tools that make holes make one here.
const ZEROS: std::ops::Range<usize> = (1 << 20)..(1 << 20) + (256 << 10);

/// Where a tool leaves what it read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum To {
    /// In a directory on the source's own filesystem.
    Same,
    /// On another one.
    Elsewhere,
}

/// What must be found afterwards.
#[derive(Clone, Copy)]
enum Leaves {
    /// The content, in `$OUT`.
    Copy,
    /// The MD5 of the content as md5sum(1) prints it, in `$OUT`.
    Md5,
    /// What the source says when it is run as a program, in `$OUT`.
    Said,
    /// The source itself is changed in this way.
    Source(fn(Vec<u8>) -> Vec<u8>),
    /// The source is gone, the content is in `$OUT`.
    Moved,
}

/// A program, or a system call, as it is applied to a file.
pub struct Tool {
    /// What a person calls it.
    pub name: &'static str,
    to: To,
    leaves: Leaves,
    /// `$SRC` is the file, `$OUT` where what was read goes, `$DIR` a directory for more, `$PY` is python3.
    script: &'static str,
}

/// How a tool fared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It saw the right bytes.
    Right,
    /// It said that it failed: no promise is broken, if there is a reason.
    Failed(String),
    /// It said nothing, and saw something else.
    Wrong(String),
}

impl Tool {
    /// The filesystem can do what the tool asks for.
    pub fn works_on(&self, kind: Kind) -> bool {
        match self.name {
            "cp --reflink=always (FICLONE)"
            | "ioctl(FICLONERANGE)"
            | "ioctl(FICLONERANGE) into it"
            | "a store in a reflink copy" => kind != Kind::Ext4,
            "fallocate --collapse-range" | "fallocate --insert-range" => kind != Kind::Btrfs,
            _ => true,
        }
    }

    /// What the file must hold; its mode must allow running it.
    pub fn content(&self) -> Vec<u8> {
        match self.leaves {
            Leaves::Said if self.name == "exec of a binary" => {
                fs::read("/bin/echo").expect("a program")
            }
            Leaves::Said => {
                let mut script = b"#!/bin/sh\necho \"$@\"\nexit\n".to_vec();
                script.resize(CONTENT_BYTES, b'#');
                script
            }
            _ => {
                let mut content = noise(4711, CONTENT_BYTES);
                content[ZEROS].fill(0);
                content[CONTENT_BYTES - 1] = b'\n';
                content
            }
        }
    }

    /// The source is not as before when the tool is done.
    pub fn changes_the_source(&self) -> bool {
        matches!(self.leaves, Leaves::Source(_) | Leaves::Moved)
    }

    /// Nothing that the tool leaves depends on what was in the file.
    pub fn is_blind(&self) -> bool {
        matches!(self.leaves, Leaves::Source(change) if change(Vec::new()) == change(vec![1; CONTENT_BYTES]))
    }

    /// What must be found after the tool was applied to a file with this content.
    pub fn expected(&self, content: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        match self.leaves {
            Leaves::Copy | Leaves::Moved => Ok(content),
            Leaves::Source(change) => Ok(change(content)),
            Leaves::Said => Ok(b"it runs\n".to_vec()),
            Leaves::Md5 => {
                let mut md5 = Command::new("md5sum")
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()?;
                md5.stdin.take().context("a pipe")?.write_all(&content)?;
                Ok(md5.wait_with_output()?.stdout)
            }
        }
    }

    /// Applies the tool to `source` and gives what it saw. `same` is a directory on the same filesystem,
    /// `elsewhere` one on another; both are left as they were.
    pub fn run(&self, source: &Path, same: &Path, elsewhere: &Path) -> anyhow::Result<Vec<u8>> {
        let base = match self.to {
            To::Same => same,
            To::Elsewhere => elsewhere,
        };
        let dir = tempfile::Builder::new().prefix("tool.").tempdir_in(base)?;
        let out = dir.path().join("out");
        let python = std::env::var_os("HSM_PYTHON").unwrap_or_else(|| "python3".into());
        let mut command = Command::new("bash");
        command.args(["-o", "pipefail", "-euc", self.script]).envs([
            ("SRC", source.as_os_str()),
            ("OUT", out.as_os_str()),
            ("DIR", dir.path().as_os_str()),
            ("PY", &python),
            ("LC_ALL", OsStr::new("C")),
        ]);
        let ran = run(command);
        ensure!(ran.code == 0, "{}: {ran}", self.name);
        let seen = match self.leaves {
            Leaves::Source(_) => source,
            _ => &out,
        };
        fs::read(seen).with_context(|| format!("{}: reading {}", self.name, seen.display()))
    }

    /// Applies the tool to `source`, which holds `content`, and says whether it saw that.
    pub fn try_on(
        &self,
        source: &Path,
        content: Vec<u8>,
        same: &Path,
        elsewhere: &Path,
    ) -> Outcome {
        let expected = match self.expected(content) {
            Ok(expected) => expected,
            Err(error) => return Outcome::Failed(format!("{error:#}")),
        };
        match self.run(source, same, elsewhere) {
            Err(error) => Outcome::Failed(format!("{error:#}")),
            Ok(seen) => match compare(&expected, &seen) {
                Ok(()) => Outcome::Right,
                Err(error) => Outcome::Wrong(format!("{}: {error}", self.name)),
            },
        }
    }
}

/// Says where what was seen is not what it should be, and whether it is zeros.
fn compare(expected: &[u8], seen: &[u8]) -> anyhow::Result<()> {
    let differs = |(_, (a, b)): &(usize, (&u8, &u8))| a != b;
    if let Some((at, _)) = expected.iter().zip(seen).enumerate().find(differs) {
        let end = seen.len().min(at + 4096);
        let zeros = seen[at..end].iter().all(|byte| *byte == 0);
        bail!(
            "other bytes from {at} on{}",
            if zeros { ": ZEROS" } else { "" }
        );
    }
    ensure!(
        expected.len() == seen.len(),
        "{} bytes instead of {}",
        seen.len(),
        expected.len()
    );
    Ok(())
}

/// All of them.
pub fn tools() -> Vec<Tool> {
    let copies = COPIES.iter().map(|(name, to, script)| Tool {
        name,
        to: *to,
        leaves: Leaves::Copy,
        script,
    });
    let others = OTHERS.iter().map(|(name, to, leaves, script)| Tool {
        name,
        to: *to,
        leaves: *leaves,
        script,
    });
    copies.chain(others).collect()
}
