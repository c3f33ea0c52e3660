//! Directories of the tree: their names as a chain, their descriptors in a bounded cache.
//!
//! Descriptors are opened one component at a time from the target's root, never through a link.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use tierfs::FileId;
use tierfs::catalog::{self, Queries};

use crate::scope::Scope;
use crate::sys;

/// A directory of the tree with the way to it.
#[derive(Debug)]
pub struct Dir {
    /// Which.
    pub file: FileId,
    name: Vec<u8>,
    parent: Option<Arc<Dir>>,
    /// What is in it is wanted.
    pub inside: bool,
}

impl Dir {
    /// The root of the tree.
    pub fn root(scope: &Scope) -> Arc<Self> {
        Arc::new(Self {
            file: FileId::ROOT,
            name: Vec::new(),
            parent: None,
            inside: scope.holds_root(),
        })
    }

    /// The directory `name` in this one.
    pub fn child(self: &Arc<Self>, file: FileId, name: Vec<u8>, scope: &Scope) -> Arc<Self> {
        Arc::new(Self {
            file,
            inside: self.inside || scope.begins_at(self.file, &name),
            name,
            parent: Some(self.clone()),
        })
    }

    /// Directory and name; `None` for the root.
    pub fn place(&self) -> Option<(&Arc<Self>, &[u8])> {
        Some((self.parent.as_ref()?, &self.name))
    }

    /// The path from the root, without a leading slash.
    pub fn path(&self) -> Vec<u8> {
        let (mut names, mut at) = (vec![self.name.as_slice()], self);
        while let Some(parent) = &at.parent {
            names.push(&parent.name);
            at = parent;
        }
        names.pop();
        names.reverse();
        names.join(&b'/')
    }

    /// The path of an entry.
    pub fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.path();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(name);
        path
    }
}

/// Chains may be as long as the tree is deep: they are not dropped by recursion.
impl Drop for Dir {
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut dir) = next.and_then(Arc::into_inner) {
            next = dir.parent.take();
        }
    }
}

/// Finds directories by file id; for the thread that has the catalog.
pub struct DirNames {
    known: HashMap<FileId, Arc<Dir>>,
    root: Arc<Dir>,
}

/// The most directories that [`DirNames`] remembers.
const NAMES_MAX: usize = 50_000;

impl DirNames {
    /// Knows the root only.
    pub fn new(scope: &Scope) -> Self {
        Self {
            known: HashMap::new(),
            root: Dir::root(scope),
        }
    }

    /// The root.
    pub fn root(&self) -> &Arc<Dir> {
        &self.root
    }

    /// The directory of this id; `None` where it, or one above it, has no name.
    pub fn find(
        &mut self,
        queries: Queries<'_>,
        scope: &Scope,
        file: FileId,
    ) -> Result<Option<Arc<Dir>>, catalog::Error> {
        // The fold lets no directory lie within itself, so this ends.
        let (mut above, mut at) = (Vec::new(), file);
        let mut dir = loop {
            if at == FileId::ROOT {
                break self.root.clone();
            }
            if let Some(dir) = self.known.get(&at) {
                break dir.clone();
            }
            let Some((parent, name)) = queries.names_of(at)?.into_iter().next() else {
                return Ok(None);
            };
            above.push((at, name));
            at = parent;
        };
        for (file, name) in above.into_iter().rev() {
            if self.known.len() >= NAMES_MAX {
                self.known.clear();
            }
            dir = dir.child(file, name, scope);
            self.known.insert(file, dir.clone());
        }
        Ok(Some(dir))
    }
}

struct Cached {
    fd: Arc<OwnedFd>,
    used: u64,
}

#[derive(Default)]
struct Cache {
    open: HashMap<FileId, Cached>,
    clock: u64,
}

/// Descriptors of directories, for all threads.
pub struct DirFds {
    root: Arc<OwnedFd>,
    max: usize,
    cache: Mutex<Cache>,
}

impl DirFds {
    /// Keeps at most `max` directories open beside the root.
    pub fn new(root: OwnedFd, max: usize) -> Self {
        Self {
            root: Arc::new(root),
            max: max.max(16),
            cache: Mutex::default(),
        }
    }

    /// The root.
    pub fn root(&self) -> &Arc<OwnedFd> {
        &self.root
    }

    /// The directory, opened below the last one above it that is open.
    pub fn get(&self, dir: &Arc<Dir>) -> io::Result<Arc<OwnedFd>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut above, mut at) = (Vec::new(), dir);
        let mut fd = loop {
            let Some((parent, _)) = at.place() else {
                break self.root.clone();
            };
            if let Some(fd) = cache.touch(at.file) {
                break fd;
            }
            above.push(at);
            at = parent;
        };
        for dir in above.into_iter().rev() {
            if let Some((_, name)) = dir.place() {
                fd = Arc::new(sys::open_dir(&*fd, name)?);
                cache.insert(dir.file, fd.clone(), self.max);
            }
        }
        Ok(fd)
    }
}

impl Cache {
    fn touch(&mut self, file: FileId) -> Option<Arc<OwnedFd>> {
        self.clock += 1;
        let cached = self.open.get_mut(&file)?;
        cached.used = self.clock;
        Some(cached.fd.clone())
    }

    fn insert(&mut self, file: FileId, fd: Arc<OwnedFd>, max: usize) {
        if self.open.len() >= max {
            // The older half goes at once, so that the search costs little per directory.
            let mut used: Vec<u64> = self.open.values().map(|cached| cached.used).collect();
            let (_, median, _) = used.select_nth_unstable(max / 2);
            let median = *median;
            self.open.retain(|_, cached| cached.used > median);
        }
        self.clock += 1;
        let used = self.clock;
        self.open.insert(file, Cached { fd, used });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(depth: u64) -> Arc<Dir> {
        let scope = Scope::whole();
        let mut dir = Dir::root(&scope);
        for file in 2..=depth + 1 {
            dir = dir.child(FileId::new(file).unwrap(), b"d".to_vec(), &scope);
        }
        dir
    }

    #[test]
    fn a_chain_of_a_million_directories_is_dropped_without_recursion() {
        drop(chain(1_000_000));
    }

    #[test]
    fn paths_are_the_names_from_the_root() {
        assert_eq!(Dir::root(&Scope::whole()).path_of(b"x"), b"x");
        assert_eq!(chain(3).path_of(b"x"), b"d/d/d/x");
    }

    #[test]
    fn descriptors_stay_few_and_links_are_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let scope = Scope::whole();
        let root = Dir::root(&scope);
        let fds = DirFds::new(sys::open_root(temp.path()).unwrap(), 16);
        for number in 2..200 {
            let name = number.to_string();
            std::fs::create_dir(temp.path().join(&name)).unwrap();
            let dir = root.child(FileId::new(number).unwrap(), name.into_bytes(), &scope);
            fds.get(&dir).unwrap();
            assert!(fds.cache.lock().unwrap().open.len() <= 16);
        }
        std::os::unix::fs::symlink("/etc", temp.path().join("link")).unwrap();
        let link = root.child(FileId::new(999).unwrap(), b"link".to_vec(), &scope);
        assert!(fds.get(&link).is_err());
    }
}
