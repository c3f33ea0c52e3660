//! The whole of a replay: sources, fold, scope, target.

use std::path::{Path, PathBuf};

use tierfs::catalog::{Catalog, Counts, History, LiveSegment};
use tierfs::ids::Lsn;
use tierfs::{SegmentNo, Time};

use crate::error::Error;
use crate::fold::{self, Folded, SegmentRead, Segments};
use crate::materialise::{self, Log, Made, Options};
use crate::moment::Moment;
use crate::report::Collector;
use crate::scope::Scope;
use crate::sources::Sources;
use crate::state::{Identity, Mode};
use crate::verify::{self, Verified};

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Volumes and directories of segments.
    pub from: Vec<PathBuf>,
    /// The moment.
    pub until: Moment,
    /// Only this part of the tree, bytes of its path from the root.
    pub path: Option<Vec<u8>>,
    /// Files with their content, or stubs.
    pub mode: Mode,
    /// Where the temporary catalog lies; `None`: the system's place for temporary files.
    pub scratch: Option<PathBuf>,
}

/// The log, folded to the moment that was asked for.
pub struct Replay {
    /// Where the log is.
    pub sources: Sources,
    catalog: Catalog,
    scope: Scope,
    path: Option<Vec<u8>>,
    mode: Mode,
    read: Vec<SegmentRead>,
    /// The tree is as of this transaction.
    pub at: Lsn,
    /// Its time.
    pub time: Option<Time>,
    /// The last transaction of the log.
    pub last: Lsn,
}

impl Replay {
    /// Reads the log's transactions; nothing is written but the temporary catalog.
    pub fn prepare(request: &Request, found: &Collector<'_>) -> Result<Self, Error> {
        if request.mode == Mode::Stubs && request.path.is_some() {
            return Err(Error::StubsOfPart);
        }
        let sources = Sources::open(&request.from)?;
        for warning in sources.warnings() {
            found.warning(warning);
        }
        let mut catalog =
            Catalog::temporary(request.scratch.as_deref(), sources.log_id(), History::Drop)?;
        let segments = match request.mode {
            Mode::Whole => Segments::Skip,
            Mode::Stubs => Segments::Names,
        };
        let folded = fold::fold(&sources, &mut catalog, request.until, segments, found)?;
        tracing::debug!(?folded.at, ?folded.last, "the log is folded");
        let Folded {
            at: Some(at),
            last: Some(last),
            read,
        } = folded
        else {
            return Err(Error::Nothing(format!(
                "the log {} holds no transaction up to {}",
                sources.log_id(),
                request.until
            )));
        };
        let scope = Scope::of(catalog.queries(), request.path.as_deref(), at)?;
        if catalog.queries().inode(tierfs::FileId::ROOT)?.is_none() {
            return Err(Error::Nothing(format!(
                "at transaction {at} the log {} has no root directory yet",
                sources.log_id()
            )));
        }
        Ok(Self {
            time: catalog.last_time(),
            sources,
            catalog,
            scope,
            path: request.path.clone(),
            mode: request.mode,
            read,
            at,
            last,
        })
    }

    /// What is restored, as an unfinished replay remembers it.
    pub fn identity(&self) -> Identity {
        Identity {
            log_id: self.sources.log_id(),
            at: self.at,
            path: self.path.clone(),
        }
    }

    /// Builds the tree below `to`, which is empty or an unfinished replay of the same.
    pub fn materialise(
        &self,
        to: &Path,
        options: Options,
        found: &Collector<'_>,
    ) -> Result<Made, Error> {
        let identity = self.identity();
        let opened = materialise::open(to, self.mode, Some(&identity))?;
        let log = Log {
            sources: &self.sources,
            queries: self.catalog.queries(),
            scope: &self.scope,
            mode: self.mode,
        };
        materialise::materialise(opened, identity, log, options, found)
    }

    /// Compares the tree below `to` with the log.
    pub fn verify(&self, to: &Path, found: &Collector<'_>) -> Result<Verified, Error> {
        verify::verify(to, self.catalog.queries(), &self.scope, found)
    }

    /// Files with their content, or stubs.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// How much there is in the whole tree at the moment.
    pub fn counts(&self) -> Counts {
        self.catalog.counts()
    }

    /// What must be read for the content, segment by segment. Asking is most of the work of knowing.
    pub fn needs(&self) -> Result<Vec<LiveSegment>, Error> {
        Ok(self.catalog.queries().live(self.scope.file())?.segments()?)
    }

    /// For each place: which of the segments are read from it, given that the first copy is used.
    pub fn needs_by_place(&self) -> Result<Vec<PlaceNeeds>, Error> {
        let mut needs: Vec<PlaceNeeds> = self
            .sources
            .places()
            .iter()
            .map(|place| PlaceNeeds {
                place: place.to_string(),
                serial: place.serial(),
                path: place.path().to_owned(),
                ..PlaceNeeds::default()
            })
            .collect();
        for read in &self.read {
            if let Some(copy) = self.sources.copies(read.segment).first() {
                needs[copy.place].metadata_bytes += read.bytes;
            }
        }
        let all: Vec<SegmentNo> = match self.mode {
            Mode::Whole => self.sources.segments().collect(),
            Mode::Stubs => self.read.iter().map(|read| read.segment).collect(),
        };
        for segment in all {
            if let Some(copy) = self.sources.copies(segment).first() {
                let need = &mut needs[copy.place];
                need.segments += 1;
                need.segment_bytes += copy.bytes;
            }
        }
        if self.mode == Mode::Stubs {
            return Ok(needs);
        }
        for live in self.needs()? {
            let copy = live
                .segment
                .and_then(|segment| self.sources.copies(segment).first());
            if let (Some(copy), Some(segment)) = (copy, live.segment) {
                let need = &mut needs[copy.place];
                need.needed.push(segment);
                need.content_bytes += live.bytes;
            }
        }
        Ok(needs)
    }
}

/// What one place is needed for.
#[derive(Clone, Debug, Default)]
pub struct PlaceNeeds {
    /// As messages name it.
    pub place: String,
    /// Its serial, where it is a volume.
    pub serial: Option<String>,
    /// Where it is.
    pub path: PathBuf,
    /// Segments that are read from it for their transactions.
    pub segments: u64,
    /// Bytes of those.
    pub segment_bytes: u64,
    /// Bytes of them that hold transactions: more is not read where no content is wanted.
    pub metadata_bytes: u64,
    /// Segments that content is read from; none for stubs.
    pub needed: Vec<SegmentNo>,
    /// Bytes of that content.
    pub content_bytes: u64,
}
