//! The functions that the `files` view and its conditions call.
//!
//! Paths are made of the directories' paths, which are remembered: files that were made together lie
//! together, in ids and in directories. The directories are read through a connection of their own, so
//! their names may be those of a moment later than the search's; paths here are for matching and showing,
//! what is done to a file is done to its id.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nix::unistd::{Gid, Group, Uid, User};
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, ToSql};

use super::View;

/// Directories whose paths are remembered; then they are forgotten, all at once.
const DIRECTORIES_MAX: usize = 100_000;
/// No path is deeper; what is lies within itself.
const DEPTH_MAX: usize = 10_000;

const OWN: [&str; 6] = [
    "hsm_path",
    "hsm_user",
    "hsm_group",
    "coalesce",
    "count",
    "exists",
];

/// Whether the view itself may call it.
pub(super) fn is_own(name: &str) -> bool {
    OWN.contains(&name)
}

/// Bytes as SQL text, which need not be UTF-8.
struct Text(Vec<u8>);

impl ToSql for Text {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Text(&self.0)))
    }
}

pub(super) fn register(
    conn: &Connection,
    dirs: Option<Connection>,
    view: &View,
) -> rusqlite::Result<()> {
    const KIB: i64 = 1 << 10;
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
    let units: [(&'static str, i64); 9] = [
        ("kib", KIB),
        ("mib", KIB << 10),
        ("gib", KIB << 20),
        ("tib", KIB << 30),
        ("seconds", 1),
        ("minutes", 60),
        ("hours", 3600),
        ("days", 86_400),
        ("weeks", 604_800),
    ];
    for (name, unit) in units {
        conn.create_scalar_function(name, 1, flags, move |context| times(context, name, unit))?;
    }
    let now = view.now;
    conn.create_scalar_function("age", 1, flags, move |context| {
        let time = context.get_raw(0);
        match time {
            ValueRef::Null => Ok(None),
            ValueRef::Integer(time) => Ok(Some(now.saturating_sub(time))),
            _ => Err(wrong("age() wants a time: mtime, atime, ctime or logged")),
        }
    })?;
    conn.create_scalar_function(
        "hsm_user",
        1,
        flags,
        names(|id| {
            let user = User::from_uid(Uid::from_raw(id)).ok()??;
            Some(user.name)
        }),
    )?;
    conn.create_scalar_function(
        "hsm_group",
        1,
        flags,
        names(|id| {
            let group = Group::from_gid(Gid::from_raw(id)).ok()??;
            Some(group.name)
        }),
    )?;
    let paths = Mutex::new(Paths {
        conn: dirs,
        prefix: view.prefix.clone(),
        known: HashMap::new(),
    });
    conn.create_scalar_function("hsm_path", 2, flags, move |context| {
        let (parent, name) = (context.get::<i64>(0)?, context.get_raw(1).as_bytes()?);
        let mut paths = paths.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(paths.path(parent, name)?.map(Text))
    })
}

fn wrong(message: impl Into<String>) -> rusqlite::Error {
    rusqlite::Error::UserFunctionError(message.into().into())
}

fn times(context: &Context<'_>, name: &str, unit: i64) -> rusqlite::Result<i64> {
    match context.get_raw(0) {
        ValueRef::Integer(number) => Ok(number.saturating_mul(unit)),
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        // mib(0.5); saturates
        ValueRef::Real(number) => Ok((number * unit as f64) as i64),
        _ => Err(wrong(format!("{name}() wants a number, like {name}(10)"))),
    }
}

/// A function from numbers to names that asks the system once for each.
fn names(
    ask: impl Fn(u32) -> Option<String> + Send + 'static,
) -> impl Fn(&Context<'_>) -> rusqlite::Result<Option<String>> + Send + 'static {
    let known: Mutex<HashMap<u32, Option<String>>> = Mutex::default();
    move |context| {
        let id = context.get(0)?;
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(id).or_insert_with(|| ask(id)).clone())
    }
}

struct Paths {
    /// Of a made-up catalog there is none: all its files lie in the root.
    conn: Option<Connection>,
    prefix: Vec<u8>,
    /// The paths of directories; `None` of those that have no name.
    known: HashMap<i64, Option<Arc<[u8]>>>,
}

impl Paths {
    /// A file's path below the mount point.
    fn path(&mut self, parent: i64, name: &[u8]) -> rusqlite::Result<Option<Vec<u8>>> {
        let Some(dir) = self.directory(parent)? else {
            return Ok(None);
        };
        let path = join(&dir, name);
        if self.prefix.is_empty() {
            return Ok(Some(path));
        }
        let below = path.strip_prefix(&self.prefix[..]);
        Ok(below
            .and_then(|rest| rest.strip_prefix(b"/"))
            .map(<[u8]>::to_vec))
    }

    fn directory(&mut self, dir: i64) -> rusqlite::Result<Option<Arc<[u8]>>> {
        if let Some(known) = self.known.get(&dir) {
            return Ok(known.clone());
        }
        let (mut way, mut at) = (Vec::new(), dir);
        let mut path: Option<Arc<[u8]>> = loop {
            if at == 1 {
                break Some(Arc::default());
            }
            if let Some(known) = self.known.get(&at) {
                break known.clone();
            }
            let Some((parent, name)) = self.entry(at)? else {
                break None;
            };
            way.push((at, name));
            if way.len() > DEPTH_MAX {
                break None;
            }
            at = parent;
        };
        if self.known.len() + way.len() > DIRECTORIES_MAX {
            self.known.clear();
        }
        for (dir, name) in way.into_iter().rev() {
            path = path.map(|above| join(&above, &name).into());
            self.known.insert(dir, path.clone());
        }
        Ok(path)
    }

    fn entry(&self, dir: i64) -> rusqlite::Result<Option<(i64, Vec<u8>)>> {
        let Some(conn) = &self.conn else {
            return Ok(None);
        };
        conn.prepare_cached(
            "SELECT parent, name FROM dentry WHERE file = ?1 ORDER BY parent, name LIMIT 1",
        )?
        .query_row([dir], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(dir.len() + 1 + name.len());
    path.extend_from_slice(dir);
    if !dir.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}
