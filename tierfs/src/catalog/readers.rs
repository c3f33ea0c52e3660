//! Connections that are kept open: opening one reads and parses the whole schema, which takes longer
//! than most questions do.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::schema;
use super::{Error, Reader};

/// Connections that rest at most; who needs more at the same time opens them.
const KEPT: usize = 12;
/// Page cache of each. The questions are small, and the kernel has the file's pages as well.
const CACHE_KIB: u32 = 1024;

/// Readers of one catalog, for any number of threads.
pub struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Reader>>,
}

impl Readers {
    /// Opens nothing yet.
    pub fn new(path: PathBuf) -> Self {
        let idle = Mutex::default();
        Self { path, idle }
    }

    /// Asks something with a reader of the caller's own; it sees what is committed now.
    pub fn with<T, E: From<Error>>(
        &self,
        ask: impl FnOnce(&Reader) -> Result<T, E>,
    ) -> Result<T, E> {
        let idle = self.idle().pop();
        let reader = match idle {
            Some(reader) => reader,
            None => Reader {
                conn: schema::connect_reader_with(&self.path, CACHE_KIB)?,
                path: self.path.clone(),
            },
        };
        let answer = ask(&reader);
        // A snapshot that could not be ended would show the next one an old state.
        if reader.conn.is_autocommit() {
            let mut idle = self.idle();
            if idle.len() < KEPT {
                idle.push(reader);
            }
        }
        answer
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Reader>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
