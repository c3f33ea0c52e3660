//! The `files` view: what policies and `tierctl find` ask, one row for each regular file.
//!
//! The view is a temporary one over a read-only connection to the catalog, with the list of stubs
//! ([`crate::residency`]) attached; hsm-policy.5 describes its columns and functions. Each column is a
//! subquery of its own, so that SQLite leaves out what a condition does not mention: a rule about sizes
//! and times reads the table `inode` in its order and nothing else.
//!
//! Conditions come from users. [`Files::check`] and [`Files::select`] let them read the view's columns
//! and call the listed functions, and nothing else, whatever their text is: SQLite's authorizer is asked
//! for everything that a statement touches. The caller must have seen that the text is an expression
//! (parentheses balanced, no comments); a time limit and a cancellation end what takes too long.

mod functions;
#[cfg(test)]
mod tests;
pub mod usage;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, Row, ToSql, params_from_iter};

use crate::catalog::{self, Error};
use crate::ids::{FileId, Lsn};
use crate::residency;

/// What a statement asks the handler after so many of SQLite's steps.
const STEPS: i32 = 20_000;
/// Before a condition, in the statement that holds it.
const BEFORE: &str = "SELECT 1 FROM files WHERE (";

/// A column of the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name in conditions.
    pub name: &'static str,
    /// What it says.
    pub about: &'static str,
}

const fn column(name: &'static str, about: &'static str) -> Column {
    Column { name, about }
}

/// The documented columns, in the order of [`FileRow`]'s fields.
pub const COLUMNS: [Column; 18] = [
    column("file", "the file's number in the log"),
    column(
        "path",
        "below the mount point, without a leading slash; NULL where it has no name there",
    ),
    column("name", "the last part of the path"),
    column("size", "bytes of content, holes included"),
    column("mtime", "when the content was last changed, unix seconds"),
    column(
        "atime",
        "when it was last read, as a sweep saw it, else mtime; unix seconds",
    ),
    column(
        "ctime",
        "when anything of it was last changed, unix seconds",
    ),
    column("uid", "the owner's number"),
    column("gid", "the group's number"),
    column("user", "the owner's name, NULL where the system knows none"),
    column(
        "group",
        "the group's name, NULL where the system knows none",
    ),
    column("mode", "permission bits"),
    column("links", "how many names it has"),
    column(
        "state",
        "'logged', 'premigrated' (on every pool and on disk), 'migrated' (its data released) or 'suspect' (it cannot be read, see hsm(7))",
    ),
    column("pinned", "1 where it is pinned, else 0"),
    column(
        "lsn",
        "the transaction that last changed attributes or content",
    ),
    column(
        "version",
        "the transaction that gave the content, NULL where there is none",
    ),
    column(
        "logged",
        "when the transaction lsn was logged, unix seconds",
    ),
];

/// How the view names the column `group`, which is a word of SQL. A condition's text has this in its place.
pub const GROUP_COLUMN: &str = "gname";

/// What conditions may call beside SQL's operators.
pub const FUNCTIONS: [&str; 27] = [
    "kib", "mib", "gib", "tib", "age", "seconds", "minutes", "hours", "days", "weeks", "glob",
    "like", "abs", "min", "max", "round", "sign", "length", "lower", "upper", "substr", "instr",
    "trim", "coalesce", "ifnull", "nullif", "iif",
];

/// What the view shows beside the tables' rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Where the mount point lies in the log's tree; empty where it is its root.
    pub prefix: Vec<u8>,
    /// Every pool has all transactions up to here.
    pub copied: Option<Lsn>,
    /// What `age` counts from, unix seconds.
    pub now: i64,
}

/// A value bound to a parameter (`?1` and so on).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number.
    Integer(i64),
    /// Bytes of a text.
    Text(Vec<u8>),
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Integer(number) => ToSqlOutput::from(*number),
            Self::Text(bytes) => ToSqlOutput::Borrowed(ValueRef::Text(bytes)),
        })
    }
}

/// Which files, in which order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Select<'s> {
    /// An expression over the view.
    pub condition: &'s str,
    /// Largest first; the order of file ids where there is none.
    pub weight: Option<&'s str>,
    /// For `?1` and so on in both.
    pub params: &'s [Value],
}

/// What is needed to act on a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Which file.
    pub file: FileId,
    /// Bytes of content.
    pub size: u64,
    /// The weight; 0 without one, or where it is NULL or a text.
    pub weight: f64,
}

/// A row of the view: see [`COLUMNS`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FileRow {
    pub file: FileId,
    pub path: Option<Vec<u8>>,
    pub name: Option<Vec<u8>>,
    pub size: u64,
    pub mtime: i64,
    pub atime: i64,
    pub ctime: Option<i64>,
    pub uid: u32,
    pub gid: u32,
    pub user: Option<String>,
    pub group: Option<String>,
    pub mode: u32,
    pub links: u64,
    pub state: String,
    pub pinned: bool,
    pub lsn: Lsn,
    pub version: Option<Lsn>,
    pub logged: Option<i64>,
}

/// Why a condition cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}; {advice}")]
pub struct BadExpression {
    /// Where in its text, bytes.
    pub at: Option<usize>,
    /// What is wrong.
    pub why: String,
    /// What to do.
    pub advice: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The condition or weight is wrong.
    #[error(transparent)]
    Expression(#[from] BadExpression),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] Error),
    /// It took too long.
    #[error(
        "the files were not all looked at within {} s; ask for less: a condition on size, times or owner is decided without paths",
        limit.as_secs()
    )]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// Somebody gave up.
    #[error("the search was cancelled")]
    Cancelled,
}

/// A value that a column of one file has, as text.
pub type Shown = (&'static str, String);

#[derive(Default)]
struct Guard {
    /// Columns of the view that the statement mentions.
    used: BTreeSet<String>,
    /// What it must not touch.
    refused: Option<String>,
}

/// A connection that answers questions about files.
pub struct Files {
    conn: Connection,
    path: PathBuf,
    guard: Arc<Mutex<Guard>>,
}

impl Files {
    /// Opens the catalog, and the list of stubs beside it where there is one.
    pub fn open(catalog: &Path, view: &View) -> Result<Self, Error> {
        let conn = catalog::read_only(catalog)?;
        let dirs = catalog::read_only(catalog)?;
        attach(&conn, catalog)?;
        Self::prepare(conn, Some(dirs), catalog, view)
    }

    /// A view of one made-up file: to check conditions where no catalog is.
    pub fn made_up() -> Result<Self, Error> {
        let path = Path::new(":memory:");
        let fail = |error| Error::sqlite(path, "making up a catalog", error);
        let conn = Connection::open_in_memory().map_err(fail)?;
        conn.execute_batch(catalog::TABLES).map_err(fail)?;
        conn.execute_batch(EMPTY_LIST).map_err(fail)?;
        conn.execute_batch(ONE_FILE).map_err(fail)?;
        let view = View {
            prefix: Vec::new(),
            copied: None,
            now: 1_000_000_000,
        };
        Self::prepare(conn, None, path, &view)
    }

    fn prepare(
        mut conn: Connection,
        dirs: Option<Connection>,
        path: &Path,
        view: &View,
    ) -> Result<Self, Error> {
        let fail = |error| Error::sqlite(path, "making the view of files", error);
        functions::register(&conn, dirs, view).map_err(fail)?;
        let copied = view.copied.map_or(0, Lsn::get);
        conn.execute_batch(&view_text(copied)).map_err(fail)?;
        // A misspelt column in double quotes must not become a text.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DQS_DML, false)
            .map_err(fail)?;
        let guard = Arc::new(Mutex::new(Guard::default()));
        let asked = guard.clone();
        conn.authorizer(Some(move |context: AuthContext<'_>| {
            let mut guard = asked.lock().unwrap_or_else(PoisonError::into_inner);
            authorize(&mut guard, &context)
        }))
        .map_err(fail)?;
        Ok(Self {
            conn,
            path: path.to_owned(),
            guard,
        })
    }

    fn fail(&self, error: rusqlite::Error) -> Error {
        Error::sqlite(&self.path, "asking about files", error)
    }

    /// Whether an expression can be a condition or a weight; gives the columns that it mentions.
    pub fn check(
        &self,
        expression: &str,
        params: &[Value],
    ) -> Result<Vec<&'static str>, FilesError> {
        *self.guard() = Guard::default();
        let sql = format!("{BEFORE}{expression})");
        let run = || -> rusqlite::Result<()> {
            let mut stmt = self.conn.prepare(&sql)?;
            let wanted = stmt.parameter_count();
            // The functions' arguments are judged when they are called.
            let mut rows = stmt.query(params_from_iter(params.iter().take(wanted)))?;
            rows.next().map(drop)
        };
        run().map_err(|error| self.explain(error, BEFORE.len()))?;
        let guard = self.guard();
        let used = COLUMNS.iter().map(|column| column.name);
        Ok(used
            .filter(|name| guard.used.contains(as_column(name)))
            .collect())
    }

    fn guard(&self) -> std::sync::MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What SQLite says of an expression that begins at `start` of the statement.
    fn explain(&self, error: rusqlite::Error, start: usize) -> FilesError {
        let refused = self.guard().refused.take();
        match error {
            rusqlite::Error::SqlInputError { msg, offset, .. } => {
                let at = usize::try_from(offset).ok();
                let at = at.and_then(|at| at.checked_sub(start));
                bad_expression(at, refused, &msg).into()
            }
            rusqlite::Error::SqliteFailure(_, Some(msg)) if refused.is_some() => {
                bad_expression(None, refused, &msg).into()
            }
            rusqlite::Error::SqliteFailure(code, Some(msg))
                if code.code == rusqlite::ErrorCode::Unknown =>
            {
                bad_expression(None, None, &msg).into()
            }
            error => self.fail(error).into(),
        }
    }

    /// Calls `each` for every file that the condition holds for.
    pub fn select(
        &mut self,
        select: &Select<'_>,
        limits: &Limits<'_>,
        each: &mut dyn FnMut(Hit) -> ControlFlow<()>,
    ) -> Result<(), FilesError> {
        let Select {
            condition, weight, ..
        } = select;
        let (column, order) = match weight {
            Some(weight) => (format!("({weight}) AS weight_"), "weight_ DESC, "),
            None => ("0".to_owned(), ""),
        };
        let tail = if weight.is_some() {
            format!(" ORDER BY {order}file")
        } else {
            String::new()
        };
        let sql = format!("SELECT file, size, {column} FROM files WHERE ({condition}){tail}");
        self.run(&sql, select.params, limits, &mut |row| {
            let weight = match row.get_ref(2)? {
                ValueRef::Real(weight) => weight,
                #[allow(clippy::cast_precision_loss)] // a weight only ranks
                ValueRef::Integer(weight) => weight as f64,
                _ => 0.0,
            };
            Ok(each(Hit {
                file: row.get(0)?,
                size: unsigned(row, 1)?,
                weight,
            }))
        })
    }

    /// Calls `each` with all columns of every file that the condition holds for, in the order of ids.
    pub fn rows(
        &mut self,
        condition: &str,
        params: &[Value],
        limits: &Limits<'_>,
        each: &mut dyn FnMut(FileRow) -> ControlFlow<()>,
    ) -> Result<(), FilesError> {
        let names: Vec<&str> = COLUMNS
            .iter()
            .map(|column| as_column(column.name))
            .collect();
        let sql = format!("SELECT {} FROM files WHERE ({condition})", names.join(", "));
        self.run(&sql, params, limits, &mut |row| Ok(each(file_row(row)?)))
    }

    /// Calls `each` with the path of every file that the condition holds for, in the order of ids.
    pub fn paths(
        &mut self,
        condition: &str,
        params: &[Value],
        limits: &Limits<'_>,
        each: &mut dyn FnMut(Option<&[u8]>) -> ControlFlow<()>,
    ) -> Result<(), FilesError> {
        let sql = format!("SELECT path FROM files WHERE ({condition})");
        self.run(&sql, params, limits, &mut |row| {
            let path = row.get_ref(0)?;
            Ok(each(path.as_bytes_or_null()?))
        })
    }

    /// All columns of one file; `None` where it is no regular file that exists.
    pub fn row(&mut self, file: FileId) -> Result<Option<FileRow>, FilesError> {
        let mut found = None;
        let id = Value::Integer(i64::try_from(file.get()).unwrap_or(i64::MAX));
        self.rows("file = ?1", &[id], &Limits::default(), &mut |row| {
            found = Some(row);
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// Whether an expression holds for a file (`None`: it is NULL, which counts as no), or its number.
    pub fn value(
        &mut self,
        file: FileId,
        expression: &str,
        params: &[Value],
    ) -> Result<Option<f64>, FilesError> {
        let mut found = None;
        // The file's id comes last: the expression's own parameters keep their numbers.
        let sql = format!(
            "SELECT ({expression}) FROM files WHERE file = {}",
            file.get()
        );
        self.run(&sql, params, &Limits::default(), &mut |row| {
            found = match row.get_ref(0)? {
                ValueRef::Null => None,
                ValueRef::Real(number) => Some(number),
                #[allow(clippy::cast_precision_loss)] // shown, and compared with 0
                ValueRef::Integer(number) => Some(number as f64),
                ValueRef::Text(_) | ValueRef::Blob(_) => Some(0.0),
            };
            Ok(ControlFlow::Break(()))
        })?;
        Ok(found)
    }

    fn run(
        &mut self,
        sql: &str,
        params: &[Value],
        limits: &Limits<'_>,
        each: &mut dyn FnMut(&Row<'_>) -> rusqlite::Result<ControlFlow<()>>,
    ) -> Result<(), FilesError> {
        *self.guard() = Guard::default();
        let ended = Arc::new(AtomicBool::new(false));
        self.watch(limits, &ended)?;
        let mut go = || -> rusqlite::Result<()> {
            let mut stmt = self.conn.prepare_cached(sql)?;
            let wanted = stmt.parameter_count();
            let mut rows = stmt.query(params_from_iter(params.iter().take(wanted)))?;
            while let Some(row) = rows.next()? {
                if each(row)?.is_break() {
                    break;
                }
            }
            Ok(())
        };
        let done = go();
        let unset = self.conn.progress_handler(0, None::<fn() -> bool>);
        unset.map_err(|error| self.fail(error))?;
        match done {
            Ok(()) => Ok(()),
            Err(_) if ended.load(Ordering::Relaxed) => Err(FilesError::TimedOut {
                limit: limits.time.unwrap_or_default(),
            }),
            Err(_) if limits.is_cancelled() => Err(FilesError::Cancelled),
            Err(error) => Err(self.explain(error, usize::MAX)),
        }
    }

    fn watch(&mut self, limits: &Limits<'_>, ended: &Arc<AtomicBool>) -> Result<(), FilesError> {
        let until = limits.time.map(|time| Instant::now() + time);
        let (ended, cancelled) = (ended.clone(), limits.cancelled.cloned());
        let handler = move || {
            if until.is_some_and(|until| Instant::now() >= until) {
                ended.store(true, Ordering::Relaxed);
                return true;
            }
            cancelled
                .as_ref()
                .is_some_and(|flag| flag.load(Ordering::Relaxed))
        };
        let set = self.conn.progress_handler(STEPS, Some(handler));
        set.map_err(|error| self.fail(error).into())
    }
}

/// Attaches the list of stubs that belongs to a catalog, or an empty one.
fn attach(conn: &Connection, catalog: &Path) -> Result<(), Error> {
    let list = residency::path_beside(catalog);
    let attached = if list.exists() {
        conn.execute("ATTACH ?1 AS residency", [list.to_string_lossy()])
            .map(drop)
    } else {
        conn.execute_batch(EMPTY_LIST)
    };
    attached.map_err(|error| Error::sqlite(&list, "attaching the list of stubs", error))
}

/// When a search ends although it has not seen every file.
#[derive(Clone, Copy, Default)]
pub struct Limits<'l> {
    /// After so long.
    pub time: Option<Duration>,
    /// When this is set.
    pub cancelled: Option<&'l Arc<AtomicBool>>,
}

impl Limits<'_> {
    fn is_cancelled(&self) -> bool {
        self.cancelled
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, number))
}

fn file_row(row: &Row<'_>) -> rusqlite::Result<FileRow> {
    let bytes = |column| -> rusqlite::Result<Option<Vec<u8>>> {
        let value = row.get_ref(column)?;
        Ok(value.as_bytes_or_null()?.map(<[u8]>::to_vec))
    };
    Ok(FileRow {
        file: row.get(0)?,
        path: bytes(1)?,
        name: bytes(2)?,
        size: unsigned(row, 3)?,
        mtime: row.get(4)?,
        atime: row.get(5)?,
        ctime: row.get(6)?,
        uid: row.get(7)?,
        gid: row.get(8)?,
        user: row.get(9)?,
        group: row.get(10)?,
        mode: row.get(11)?,
        links: unsigned(row, 12)?,
        state: row.get(13)?,
        pinned: row.get(14)?,
        lsn: row.get(15)?,
        version: row.get(16)?,
        logged: row.get(17)?,
    })
}

fn as_column(name: &str) -> &str {
    if name == "group" { GROUP_COLUMN } else { name }
}

/// Where no list of stubs is: nothing is released, nothing is known of reading.
const EMPTY_LIST: &str = "
CREATE TEMP TABLE stub(file INTEGER PRIMARY KEY, handle BLOB, since_s INTEGER);
CREATE TEMP TABLE atime(file INTEGER PRIMARY KEY, atime_s INTEGER);
";

const ONE_FILE: &str = "
INSERT INTO inode VALUES (2, 1, 0, 420, 0, 0, 1, 1, 0, 1, 0, NULL, NULL, NULL, NULL, 0, 0, 1, NULL, 0, NULL, NULL);
INSERT INTO dentry VALUES (1, x'61', 2, 1);
INSERT INTO txn VALUES (1, 1, 0, 1, 0, 1, 0, 1);
";

/// The view's text. Tables are named without their database: those of the list of stubs are where it is.
fn view_text(copied: u64) -> String {
    format!(
        "CREATE TEMP VIEW files AS SELECT
    i.file AS file,
    (SELECT hsm_path(d.parent, d.name) FROM dentry d INDEXED BY dentry_file WHERE d.file = i.file
     ORDER BY d.parent, d.name LIMIT 1) AS path,
    (SELECT CAST(d.name AS TEXT) FROM dentry d INDEXED BY dentry_file WHERE d.file = i.file
     ORDER BY d.parent, d.name LIMIT 1) AS name,
    i.size AS size,
    i.mtime_s AS mtime,
    max(coalesce((SELECT a.atime_s FROM atime a WHERE a.file = i.file), i.mtime_s), i.mtime_s) AS atime,
    coalesce((SELECT s.ctime_s FROM local_seen s WHERE s.file = i.file), i.ctime_s) AS ctime,
    i.uid AS uid,
    i.gid AS gid,
    hsm_user(i.uid) AS user,
    hsm_group(i.gid) AS {GROUP_COLUMN},
    i.mode AS mode,
    (SELECT count(*) FROM dentry d INDEXED BY dentry_file WHERE d.file = i.file) AS links,
    CASE WHEN (SELECT s.since_s FROM stub s WHERE s.file = i.file) < 0 THEN 'suspect'
         WHEN (SELECT s.since_s FROM stub s WHERE s.file = i.file) IS NOT NULL THEN 'migrated'
         WHEN i.lsn <= {copied} THEN 'premigrated' ELSE 'logged' END AS state,
    (SELECT p.lsn FROM pin p WHERE p.file = i.file) IS NOT NULL AS pinned,
    i.lsn AS lsn,
    i.content_lsn AS version,
    (SELECT t.time_s FROM txn t WHERE t.lsn = i.lsn) AS logged
  FROM inode i WHERE i.kind = 0"
    )
}

/// What a statement may do: read the view, and call what is listed. The view itself may do more.
fn authorize(guard: &mut Guard, context: &AuthContext<'_>) -> Authorization {
    let of_view = context.accessor == Some("files");
    let refused = match context.action {
        AuthAction::Select => return Authorization::Allow,
        AuthAction::Read { .. } if of_view => return Authorization::Allow,
        AuthAction::Function { function_name } => {
            let known = FUNCTIONS.contains(&function_name.to_ascii_lowercase().as_str());
            if known || (of_view && functions::is_own(function_name)) {
                return Authorization::Allow;
            }
            format!("the function {function_name}")
        }
        AuthAction::Read {
            table_name: "files",
            column_name,
        } => {
            guard.used.insert(column_name.to_owned());
            return Authorization::Allow;
        }
        AuthAction::Read { table_name, .. } => format!("the table {table_name}"),
        _ => "anything but the columns of a file".to_owned(),
    };
    guard.refused.get_or_insert(refused);
    Authorization::Deny
}

fn bad_expression(at: Option<usize>, refused: Option<String>, msg: &str) -> BadExpression {
    let columns = || {
        let names: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
        format!("the columns are {}", names.join(", "))
    };
    if let Some(what) = refused {
        return BadExpression {
            at,
            why: format!("a condition may not use {what}"),
            advice: "hsm-policy(5) lists the columns and functions that there are".to_owned(),
        };
    }
    let (msg, hint) = msg.split_once(" - should this be").unwrap_or((msg, ""));
    let advice = if !hint.is_empty() {
        format!("write text in single quotes; {}", columns())
    } else if msg.starts_with("no such column") {
        columns()
    } else if msg.starts_with("no such function") || msg.starts_with("wrong number of arguments") {
        format!("the functions are {}", FUNCTIONS.join(", "))
    } else {
        "write an expression like size > mib(100) and age(atime) > days(30)".to_owned()
    };
    BadExpression {
        at,
        why: msg.to_owned(),
        advice,
    }
}
