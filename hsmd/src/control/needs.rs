//! Which volumes content needs: what is in the spool, on a volume that is here, on one that is away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use replay::sources::Sources;
use tierfs::catalog::{LiveSegment, Queries};
use tierfs::ids::SegmentNo;

use super::model::{Needs, VolumeNeed};
use super::{Core, CoreError};

/// Where a segment can be read.
#[derive(Clone)]
enum Lies {
    /// Without a volume.
    Spool,
    /// On this volume, which is here.
    Here(Arc<str>),
    /// On any of these, none of which is here.
    Away(Vec<Arc<str>>),
    /// No good copy is known.
    Nowhere,
}

/// A volume's pool and place.
#[derive(Clone, Default)]
struct Known {
    pool: String,
    path: Option<String>,
}

/// What is where, as of the moment in which it was looked at.
pub(super) struct Places {
    /// What can be read; nothing where no place is here.
    sources: Option<Arc<Sources>>,
    open_segment: Option<u64>,
    volumes: HashMap<String, Known>,
    found: HashMap<SegmentNo, Lies>,
}

/// Needs that are added up.
#[derive(Default)]
pub(super) struct Sum {
    total: Needs,
    /// By serial.
    volumes: BTreeMap<Arc<str>, OnVolume>,
}

#[derive(Default)]
struct OnVolume {
    present: bool,
    files: u64,
    bytes: u64,
    segments: BTreeSet<SegmentNo>,
}

impl Places {
    /// Looks at spool and volumes.
    pub(super) fn look(core: &dyn Core, queries: Queries<'_>) -> Result<Self, CoreError> {
        let status = core.status();
        let mut volumes = HashMap::new();
        for row in queries.volumes()? {
            let place = row.volume.place.as_deref();
            let path = place.map(|place| Path::new(std::ffi::OsStr::from_bytes(place)));
            let known = Known {
                pool: row.volume.pool,
                path: path.map(|path| path.display().to_string()),
            };
            volumes.insert(row.volume.serial, known);
        }
        for pool in &status.pools {
            for volume in &pool.volumes {
                let Some(serial) = volume.serial.clone() else {
                    continue;
                };
                let known = Known {
                    pool: pool.name.clone(),
                    path: Some(volume.path.clone()),
                };
                volumes.insert(serial, known);
            }
        }
        Ok(Self {
            // Where not even one place can be read, none is here.
            sources: core.sources().ok(),
            open_segment: status.spool.open_segment,
            volumes,
            found: HashMap::new(),
        })
    }

    fn lies(&mut self, queries: Queries<'_>, no: SegmentNo) -> Result<Lies, CoreError> {
        if let Some(found) = self.found.get(&no) {
            return Ok(found.clone());
        }
        let found = self.find(queries, no)?;
        self.found.insert(no, found.clone());
        Ok(found)
    }

    fn find(&self, queries: Queries<'_>, no: SegmentNo) -> Result<Lies, CoreError> {
        if self.open_segment == Some(no.get()) {
            return Ok(Lies::Spool);
        }
        let copies = queries.copies(no)?;
        let is_bad = |serial: &str| {
            let mut of_it = copies.iter().filter(|copy| copy.serial == serial);
            of_it.any(|copy| !crate::board::is_good(&copy.state))
        };
        let mut here = None;
        if let Some(sources) = &self.sources {
            for copy in sources.copies(no) {
                match sources
                    .places()
                    .get(copy.place)
                    .map(replay::sources::Place::serial)
                {
                    Some(None) => return Ok(Lies::Spool),
                    Some(Some(serial)) if here.is_none() && !is_bad(&serial) => {
                        here = Some(Arc::from(serial));
                    }
                    _ => {}
                }
            }
        }
        if let Some(serial) = here {
            return Ok(Lies::Here(serial));
        }
        let good = copies
            .iter()
            .filter(|copy| crate::board::is_good(&copy.state));
        let away: Vec<Arc<str>> = good.map(|copy| Arc::from(copy.serial.as_str())).collect();
        Ok(if away.is_empty() {
            Lies::Nowhere
        } else {
            Lies::Away(away)
        })
    }

    /// Adds what a file needs.
    pub(super) fn add(
        &mut self,
        queries: Queries<'_>,
        content: &[LiveSegment],
        sum: &mut Sum,
    ) -> Result<(), CoreError> {
        let mut on: BTreeMap<Arc<str>, (bool, u64)> = BTreeMap::new();
        for needed in content {
            let lies = match needed.segment {
                Some(no) => self.lies(queries, no)?,
                None => Lies::Nowhere,
            };
            sum.total.bytes += needed.bytes;
            let (serials, present) = match lies {
                Lies::Spool => {
                    sum.total.spool_bytes += needed.bytes;
                    continue;
                }
                Lies::Nowhere => {
                    sum.total.nowhere_bytes += needed.bytes;
                    continue;
                }
                Lies::Here(serial) => (vec![serial], true),
                Lies::Away(serials) => (serials, false),
            };
            for serial in serials {
                let volume = sum.volumes.entry(serial.clone()).or_default();
                volume.segments.extend(needed.segment);
                let of_file = on.entry(serial).or_default();
                *of_file = (present, of_file.1 + needed.bytes);
            }
        }
        for (serial, (present, bytes)) in on {
            let volume = sum.volumes.entry(serial).or_default();
            volume.present |= present;
            volume.files += 1;
            volume.bytes += bytes;
        }
        sum.total.files += u64::from(!content.is_empty());
        Ok(())
    }

    /// What was added up, with the volumes' names; those that are away come first.
    pub(super) fn name(&self, sum: Sum) -> Needs {
        let mut needs = sum.total;
        for (serial, on) in sum.volumes {
            let known = self.volumes.get(&*serial).cloned().unwrap_or_default();
            needs.volumes.push(VolumeNeed {
                pool: known.pool,
                volume: serial.to_string(),
                path: known.path,
                present: on.present,
                files: on.files,
                bytes: on.bytes,
                segments: on.segments.into_iter().map(SegmentNo::get).collect(),
            });
        }
        needs.sort();
        needs
    }
}
