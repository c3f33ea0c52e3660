//! Walking the wanted part of the tree, as the catalog has it: memory grows with its depth only.

use std::collections::VecDeque;
use std::sync::Arc;

use tierfs::FileId;
use tierfs::catalog::{Child, Queries};
use tierfs::record::Kind;

use crate::dirs::{Dir, DirNames};
use crate::error::Error;
use crate::scope::Scope;

/// Entries that are asked for at once.
const BATCH: usize = 512;

/// What a walk meets.
pub enum Met<'w> {
    /// A directory, before what is in it; false leaves it out.
    Enter(&'w Arc<Dir>),
    /// The same directory, after what is in it.
    Leave(&'w Arc<Dir>),
    /// Any other entry.
    Entry(&'w Arc<Dir>, &'w Child),
}

struct Level {
    dir: Arc<Dir>,
    ready: VecDeque<Child>,
    /// Go on behind this name; `None` where all was read.
    after: Option<Vec<u8>>,
}

/// Walks depth first, in the order of names. `visit` says whether a directory is entered.
pub fn walk(
    queries: Queries<'_>,
    scope: &Scope,
    dirs: &DirNames,
    mut visit: impl FnMut(Met<'_>) -> Result<bool, Error>,
) -> Result<(), Error> {
    let root = dirs.root();
    if !visit(Met::Enter(root))? {
        return Ok(());
    }
    let mut levels = vec![level(queries, scope, root)?];
    while let Some(top) = levels.last_mut() {
        let Some(child) = top.next(queries)? else {
            visit(Met::Leave(&top.dir))?;
            levels.pop();
            continue;
        };
        if child.kind != Kind::Directory {
            if scope.wants(&top.dir, &child.name) {
                visit(Met::Entry(&top.dir, &child))?;
            }
            continue;
        }
        let dir = top.dir.child(child.file, child.name, scope);
        if visit(Met::Enter(&dir))? {
            levels.push(level(queries, scope, &dir)?);
        }
    }
    Ok(())
}

/// The entries of a directory, or the one that leads to the wanted part.
fn level(queries: Queries<'_>, scope: &Scope, dir: &Arc<Dir>) -> Result<Level, Error> {
    let mut level = Level {
        dir: dir.clone(),
        ready: VecDeque::new(),
        after: Some(Vec::new()),
    };
    if dir.inside {
        return Ok(level);
    }
    level.after = None;
    if let Some(name) = scope.way_from(dir)
        && let Some(file) = queries.lookup(dir.file, name)?
        && let Some(inode) = queries.inode(file)?
    {
        level.ready.push_back(child(name, file, &inode));
    }
    Ok(level)
}

fn child(name: &[u8], file: FileId, inode: &tierfs::catalog::InodeRow) -> Child {
    Child {
        name: name.to_vec(),
        file,
        kind: inode.kind,
        ino: None,
        ctime: None,
        size: inode.size,
    }
}

impl Level {
    fn next(&mut self, queries: Queries<'_>) -> Result<Option<Child>, Error> {
        if self.ready.is_empty()
            && let Some(after) = self.after.take()
        {
            let children = queries.children(self.dir.file, Some(&after), BATCH)?;
            if children.len() == BATCH {
                self.after = children.last().map(|child| child.name.clone());
            }
            self.ready.extend(children);
        }
        Ok(self.ready.pop_front())
    }
}
