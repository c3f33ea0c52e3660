//! The configuration file: TOML, every key checked when it is loaded.
//!
//! What is wrong is reported with file, line, key, and what to write instead; a key that is not
//! known is an error, so that a misspelt one is not ignored. Only the text is judged here. Whether
//! the paths exist and suit is for [`crate::preflight`]. man/hsmd.toml.5 describes every key; a test
//! holds it to this module.

use std::fmt;
use std::fs;
use std::ops::{Range, RangeInclusive};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use policies::units::BYTES as SIZE_UNITS;
use serde::Deserialize;
use toml::Spanned;

/// Where the configuration lies unless --config says otherwise.
pub const DEFAULT_PATH: &str = "/etc/hsmd/hsmd.toml";
/// Larger is no configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);

const RPO: RangeInclusive<Duration> = Duration::from_millis(100)..=HOUR;
const SWEEP_INTERVAL: RangeInclusive<Duration> =
    Duration::from_mins(1)..=Duration::from_hours(30 * 24);
const SEGMENT_AGE: RangeInclusive<Duration> = SECOND..=DAY;
const SEGMENT_BYTES: RangeInclusive<u64> = MIB..=GIB;
const SPOOL_BYTES_MAX: RangeInclusive<u64> = 16 * MIB..=(1 << 20) * GIB;
/// The spool must hold the open segment, a sealed one that is being copied, and room to seal.
const SPOOL_SEGMENTS_MIN: u64 = 4;
const COMPRESSION_LEVEL: RangeInclusive<i64> = 1..=19;
const POOL_NAME_BYTES_MAX: usize = 32;
/// `sun_path` of a Unix socket, less its final NUL.
const SOCKET_BYTES_MAX: usize = 107;

/// A key that need not be given, and the text that stands for it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyDefault {
    /// The key.
    pub key: &'static str,
    /// As one would write it in the file, without quotes.
    pub text: &'static str,
}

const fn default(key: &'static str, text: &'static str) -> KeyDefault {
    KeyDefault { key, text }
}

const SOCKET_DEFAULT: KeyDefault = default("socket", "/run/hsmd/control.sock");
const RPO_DEFAULT: KeyDefault = default("rpo", "1s");
const SWEEP_INTERVAL_DEFAULT: KeyDefault = default("sweep_interval", "1h");
const SEGMENT_BYTES_DEFAULT: KeyDefault = default("segment_bytes", "64MiB");
const SEGMENT_AGE_DEFAULT: KeyDefault = default("segment_age", "1m");
const SPOOL_BYTES_MAX_DEFAULT: KeyDefault = default("spool_bytes_max", "16GiB");
const COMPRESSION_LEVEL_DEFAULT: KeyDefault = default("compression_level", "1");

const MOUNT_OPTIONS_DEFAULT: KeyDefault = default("mount_options", "defaults");
const PRE_ACCESS_DEFAULT: KeyDefault = default("pre_access", "true");
const STUB_MARKS_MAX_DEFAULT: KeyDefault = default("stub_marks_max", "100000");
const RECALL_WAIT_DEFAULT: KeyDefault = default("recall_wait", "10m");
const RECALL_WAITERS_MAX_DEFAULT: KeyDefault = default("recall_waiters_max", "4000");
const RECALL_THREADS_DEFAULT: KeyDefault = default("recall_threads", "8");
const REFILL_DEFAULT: KeyDefault = default("refill", "true");
const RECALL_WAIT: RangeInclusive<Duration> = Duration::from_millis(100)..=DAY;
const STUB_MARKS_MAX: RangeInclusive<i64> = 0..=10_000_000;
const RECALL_WAITERS_MAX: RangeInclusive<i64> = 1..=400_000;
const RECALL_THREADS: RangeInclusive<i64> = 1..=64;

/// All defaults.
pub const DEFAULTS: [KeyDefault; 14] = [
    MOUNT_OPTIONS_DEFAULT,
    PRE_ACCESS_DEFAULT,
    STUB_MARKS_MAX_DEFAULT,
    RECALL_WAIT_DEFAULT,
    RECALL_WAITERS_MAX_DEFAULT,
    RECALL_THREADS_DEFAULT,
    REFILL_DEFAULT,
    SOCKET_DEFAULT,
    RPO_DEFAULT,
    SWEEP_INTERVAL_DEFAULT,
    SEGMENT_BYTES_DEFAULT,
    SEGMENT_AGE_DEFAULT,
    SPOOL_BYTES_MAX_DEFAULT,
    COMPRESSION_LEVEL_DEFAULT,
];

/// A configuration whose text is sound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The file that it was read from.
    pub file: PathBuf,
    /// Mount point of the watched filesystem.
    pub mount: PathBuf,
    /// Its block device, where hsmd mounts it: only then can files be released.
    pub device: Option<PathBuf>,
    /// How it is mounted then, as in fstab(5).
    pub mount_options: String,
    /// Ask about every access where the kernel can, not only about opening.
    pub pre_access: bool,
    /// Stubs that have marks of their own at most; more, and every file is asked about.
    pub stub_marks_max: u64,
    /// How long a program waits for a copy that is away.
    pub recall_wait: Duration,
    /// Accesses of one user that wait at most.
    pub recall_waiters_max: usize,
    /// Files recalled at once.
    pub recall_threads: usize,
    /// What a disk made of stubs lacks comes back in the background.
    pub refill: bool,
    /// Directory of the segments that some pool still lacks.
    pub spool: PathBuf,
    /// The SQLite file.
    pub catalog: PathBuf,
    /// The rules for releasing, recalling, migrating and pinning.
    pub policies: Option<PathBuf>,
    /// The control socket.
    pub socket: PathBuf,
    /// Whose members may control the daemon beside root.
    pub control_group: Option<String>,
    /// How old a change may become before it is durable in the spool.
    pub rpo: Duration,
    /// Time between two sweeps for changes that raise no event.
    pub sweep_interval: Duration,
    /// Size at which a segment is sealed.
    pub segment_bytes: u64,
    /// Age at which a segment that holds something is sealed.
    pub segment_age: Duration,
    /// How large the spool may grow.
    pub spool_bytes_max: u64,
    /// zstd's level.
    pub compression_level: i32,
    /// Each gets the whole log. Never empty.
    pub pools: Vec<Pool>,
}

/// Volumes that together hold one copy of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Unique among the pools.
    pub name: String,
    /// Directories, filled in this order. Never empty.
    pub volumes: Vec<PathBuf>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: the configuration cannot be read: {source}; {advice}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// Something in it is wrong.
    #[error("{}:{line}: {key}: {why}; {advice}", file.display())]
    Key {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key, or the table, or the text of the line.
        key: String,
        /// What is wrong.
        why: String,
        /// What to do.
        advice: String,
    },
    /// Something is not in it.
    #[error("{}: {key} is missing; {advice}", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// What to do.
        advice: &'static str,
    },
}

type Text = Spanned<String>;

/// The file's shape. Everything optional, so that what is missing is reported by our own words.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    mount: Option<Text>,
    device: Option<Text>,
    mount_options: Option<Text>,
    pre_access: Option<bool>,
    stub_marks_max: Option<Spanned<i64>>,
    recall_wait: Option<Text>,
    recall_waiters_max: Option<Spanned<i64>>,
    recall_threads: Option<Spanned<i64>>,
    refill: Option<bool>,
    spool: Option<Text>,
    catalog: Option<Text>,
    policies: Option<Text>,
    socket: Option<Text>,
    control_group: Option<Text>,
    rpo: Option<Text>,
    sweep_interval: Option<Text>,
    segment_bytes: Option<Text>,
    segment_age: Option<Text>,
    spool_bytes_max: Option<Text>,
    compression_level: Option<Spanned<i64>>,
    #[serde(default)]
    pool: Vec<RawPool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPool {
    name: Option<Text>,
    volumes: Option<Spanned<Vec<Text>>>,
}

impl Config {
    /// Reads and checks a file.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let failed = |source: std::io::Error| ConfigError::Read {
            file: file.to_owned(),
            advice: match source.kind() {
                std::io::ErrorKind::NotFound => {
                    "write it (hsmd.toml(5) has an example) or name another with --config"
                }
                std::io::ErrorKind::PermissionDenied => "run as root",
                std::io::ErrorKind::InvalidData => "it must be UTF-8 text of at most 1 MiB",
                _ => "make it a readable file",
            },
            source,
        };
        let length = fs::metadata(file).map_err(failed)?.len();
        if length > FILE_BYTES_MAX {
            return Err(failed(std::io::ErrorKind::InvalidData.into()));
        }
        let text = fs::read_to_string(file).map_err(failed)?;
        Self::parse(file, &text)
    }

    /// Checks a text as if it stood in `file`.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let source = Source { file, text };
        let raw: RawConfig = toml::from_str(text).map_err(|e| source.syntax(&e))?;
        let pools = source.pools(raw.pool)?;
        let segment_bytes =
            source.size(raw.segment_bytes, SEGMENT_BYTES_DEFAULT, &SEGMENT_BYTES)?;
        let spool_span = raw.spool_bytes_max.as_ref().map_or(0..0, Spanned::span);
        let config = Self {
            file: file.to_owned(),
            mount: source.path_required(raw.mount, "mount", "add mount = \"/data\", the mount point of the filesystem to watch")?,
            device: raw.device.map(|text| source.path(text, "device")).transpose()?,
            mount_options: source.mount_options(raw.mount_options)?,
            pre_access: raw.pre_access.unwrap_or(true),
            stub_marks_max: source.count(raw.stub_marks_max, STUB_MARKS_MAX_DEFAULT, &STUB_MARKS_MAX)?,
            recall_wait: source.duration(raw.recall_wait, RECALL_WAIT_DEFAULT, &RECALL_WAIT)?,
            recall_waiters_max: source.count(raw.recall_waiters_max, RECALL_WAITERS_MAX_DEFAULT, &RECALL_WAITERS_MAX)?,
            recall_threads: source.count(raw.recall_threads, RECALL_THREADS_DEFAULT, &RECALL_THREADS)?,
            refill: raw.refill.unwrap_or(true),
            spool: source.path_required(raw.spool, "spool", "add spool = \"/var/lib/hsmd/spool\", a directory that is not on the watched filesystem")?,
            catalog: source.path_required(raw.catalog, "catalog", "add catalog = \"/var/lib/hsmd/catalog.db\", a file that is not on the watched filesystem")?,
            policies: raw.policies.map(|text| source.path(text, "policies")).transpose()?,
            socket: source.socket(raw.socket)?,
            control_group: source.group(raw.control_group)?,
            rpo: source.duration(raw.rpo, RPO_DEFAULT, &RPO)?,
            sweep_interval: source.duration(raw.sweep_interval, SWEEP_INTERVAL_DEFAULT, &SWEEP_INTERVAL)?,
            segment_bytes,
            segment_age: source.duration(raw.segment_age, SEGMENT_AGE_DEFAULT, &SEGMENT_AGE)?,
            spool_bytes_max: source.size(raw.spool_bytes_max, SPOOL_BYTES_MAX_DEFAULT, &SPOOL_BYTES_MAX)?,
            compression_level: source.level(raw.compression_level)?,
            pools,
        };
        if config.spool_bytes_max < SPOOL_SEGMENTS_MIN * segment_bytes {
            let why = format!(
                "{} is less than {SPOOL_SEGMENTS_MIN} segments of {}",
                Bytes(config.spool_bytes_max),
                Bytes(segment_bytes)
            );
            let advice = format!(
                "make it at least {}",
                Bytes(SPOOL_SEGMENTS_MIN * segment_bytes)
            );
            return Err(source.key(&spool_span, "spool_bytes_max", why, advice));
        }
        source.check_nesting(&config)?;
        Ok(config)
    }

    /// All volumes of all pools.
    pub fn volumes(&self) -> impl Iterator<Item = &Path> {
        self.pools
            .iter()
            .flat_map(|pool| pool.volumes.iter().map(PathBuf::as_path))
    }
}

/// The file's name and text, to say where something is wrong.
struct Source<'t> {
    file: &'t Path,
    text: &'t str,
}

impl Source<'_> {
    fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().get(..offset).unwrap_or_default();
        before.split(|&b| b == b'\n').count().max(1)
    }

    fn key(
        &self,
        span: &Range<usize>,
        key: impl Into<String>,
        why: impl Into<String>,
        advice: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Key {
            file: self.file.to_owned(),
            line: self.line(span.start),
            key: key.into(),
            why: why.into(),
            advice: advice.into(),
        }
    }

    /// What the TOML parser objects to. It names no key, so the line's own text does.
    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        let span = error.span().unwrap_or(0..0);
        let line = self.line(span.start);
        let text = self.text.lines().nth(line - 1).unwrap_or_default();
        let key = text.split('=').next().unwrap_or_default().trim();
        let advice = if error.message().starts_with("unknown field") {
            "correct the key, or remove it"
        } else {
            "correct the line as hsmd.toml(5) shows it"
        };
        let key = if key.is_empty() { "the file" } else { key };
        self.key(
            &span,
            key,
            error.message().trim().replace('\n', ", "),
            advice,
        )
    }

    fn path(&self, text: Text, key: &str) -> Result<PathBuf, ConfigError> {
        let span = text.span();
        let path = PathBuf::from(text.into_inner());
        let wrong = if !path.is_absolute() {
            "is not absolute"
        } else if path.components().any(|c| c == Component::ParentDir) {
            "contains \"..\""
        } else if path
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .any(u8::is_ascii_control)
        {
            "contains a control character"
        } else {
            // Without trailing slashes and dots, so that equal paths are equal text.
            return Ok(path.components().collect());
        };
        let why = format!("{} {wrong}", path.display());
        Err(self.key(&span, key, why, "write the whole path, from the root /"))
    }

    fn path_required(
        &self,
        text: Option<Text>,
        key: &'static str,
        advice: &'static str,
    ) -> Result<PathBuf, ConfigError> {
        let text = text.ok_or_else(|| ConfigError::Missing {
            file: self.file.to_owned(),
            key,
            advice,
        })?;
        self.path(text, key)
    }

    fn socket(&self, text: Option<Text>) -> Result<PathBuf, ConfigError> {
        let Some(text) = text else {
            return Ok(PathBuf::from(SOCKET_DEFAULT.text));
        };
        let span = text.span();
        let path = self.path(text, "socket")?;
        if path.as_os_str().len() > SOCKET_BYTES_MAX {
            let why = format!("{} is longer than {SOCKET_BYTES_MAX} bytes", path.display());
            return Err(self.key(
                &span,
                "socket",
                why,
                "the kernel allows no more: choose a shorter path",
            ));
        }
        Ok(path)
    }

    fn group(&self, text: Option<Text>) -> Result<Option<String>, ConfigError> {
        let Some(text) = text else {
            return Ok(None);
        };
        let span = text.span();
        let name = text.into_inner();
        let sound = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b':');
        if !sound {
            let why = format!("{name:?} is no group's name");
            return Err(self.key(
                &span,
                "control_group",
                why,
                "name a group of /etc/group, or remove the key for root only",
            ));
        }
        Ok(Some(name))
    }

    fn mount_options(&self, text: Option<Text>) -> Result<String, ConfigError> {
        let Some(text) = text else {
            return Ok(MOUNT_OPTIONS_DEFAULT.text.to_owned());
        };
        let span = text.span();
        let options = text.into_inner();
        let sound = options.bytes().all(|b| b.is_ascii_graphic());
        let loses = |option: &str| matches!(option, "subvolid=5" | "remount" | "bind" | "loop");
        if !sound || options.split(',').any(loses) {
            return Err(self.key(
                &span,
                "mount_options",
                format!("{options:?} cannot be used"),
                "give options of the filesystem and of the mount, separated by commas, as in fstab(5)",
            ));
        }
        Ok(options)
    }

    fn count<T: TryFrom<i64>>(
        &self,
        value: Option<Spanned<i64>>,
        default: KeyDefault,
        bounds: &RangeInclusive<i64>,
    ) -> Result<T, ConfigError> {
        let (span, number) = match value {
            Some(value) => (value.span(), value.into_inner()),
            None => (0..0, default.text.parse().unwrap_or(*bounds.start())),
        };
        let fits = Some(number).filter(|number| bounds.contains(number));
        fits.and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| {
                self.key(
                    &span,
                    default.key,
                    format!("{number} is not possible"),
                    format!("choose {} to {}", bounds.start(), bounds.end()),
                )
            })
    }

    fn level(&self, value: Option<Spanned<i64>>) -> Result<i32, ConfigError> {
        let (span, level) = match value {
            Some(value) => (value.span(), value.into_inner()),
            None => (0..0, COMPRESSION_LEVEL_DEFAULT.text.parse().unwrap_or(1)),
        };
        let (low, high) = (COMPRESSION_LEVEL.start(), COMPRESSION_LEVEL.end());
        match i32::try_from(level) {
            Ok(small) if COMPRESSION_LEVEL.contains(&level) => Ok(small),
            _ => Err(self.key(
                &span,
                "compression_level",
                format!("{level} is not a level of zstd that is used here"),
                format!("choose {low} (fast) to {high} (small)"),
            )),
        }
    }

    fn duration(
        &self,
        text: Option<Text>,
        default: KeyDefault,
        bounds: &RangeInclusive<Duration>,
    ) -> Result<Duration, ConfigError> {
        let example =
            "write a whole number and a unit: ms, s, m, h, d or w, like \"250ms\" or \"5m\"";
        self.quantity(
            text,
            default,
            bounds,
            parse_duration,
            |d| Span(d).to_string(),
            example,
        )
    }

    fn size(
        &self,
        text: Option<Text>,
        default: KeyDefault,
        bounds: &RangeInclusive<u64>,
    ) -> Result<u64, ConfigError> {
        let example = "write a whole number and a unit: B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, like \"64MiB\"";
        self.quantity(
            text,
            default,
            bounds,
            parse_size,
            |b| Bytes(b).to_string(),
            example,
        )
    }

    fn quantity<T: Copy + PartialOrd>(
        &self,
        text: Option<Text>,
        default: KeyDefault,
        bounds: &RangeInclusive<T>,
        parse: fn(&str) -> Option<T>,
        show: fn(T) -> String,
        example: &'static str,
    ) -> Result<T, ConfigError> {
        let (span, text) = match text {
            Some(text) => (text.span(), text.into_inner()),
            None => (0..0, default.text.to_owned()),
        };
        let key = default.key;
        let value = parse(&text).ok_or_else(|| {
            self.key(
                &span,
                key,
                format!("{text:?} cannot be understood"),
                example,
            )
        })?;
        if bounds.contains(&value) {
            return Ok(value);
        }
        let (low, high) = (show(*bounds.start()), show(*bounds.end()));
        let why = if value < *bounds.start() {
            format!("{text} is less than {low}")
        } else {
            format!("{text} is more than {high}")
        };
        Err(self.key(&span, key, why, format!("choose {low} to {high}")))
    }

    fn pools(&self, raw: Vec<RawPool>) -> Result<Vec<Pool>, ConfigError> {
        if raw.is_empty() {
            return Err(ConfigError::Missing {
                file: self.file.to_owned(),
                key: "[[pool]]",
                advice: "add [[pool]], name = \"main\" and volumes = [\"/archive/vol1\"]: without a pool nothing leaves this disk",
            });
        }
        let mut pools: Vec<Pool> = Vec::with_capacity(raw.len());
        for raw in raw {
            let pool = self.pool(raw, &pools)?;
            pools.push(pool);
        }
        Ok(pools)
    }

    fn pool(&self, raw: RawPool, others: &[Pool]) -> Result<Pool, ConfigError> {
        let missing = |key, advice| ConfigError::Missing {
            file: self.file.to_owned(),
            key,
            advice,
        };
        let name = raw.name.ok_or_else(|| {
            missing(
                "name of a [[pool]]",
                "add name = \"main\", of the letters a to z, digits and hyphens",
            )
        })?;
        let span = name.span();
        let name = name.into_inner();
        let letters = name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if !letters || name.is_empty() || name.len() > POOL_NAME_BYTES_MAX || name.starts_with('-')
        {
            let why = format!("{name:?} is no name of a pool");
            let advice = format!(
                "use 1 to {POOL_NAME_BYTES_MAX} letters a to z, digits and hyphens, no hyphen first"
            );
            return Err(self.key(&span, "name", why, advice));
        }
        if others.iter().any(|other| other.name == name) {
            let why = format!("two pools are named {name}");
            return Err(self.key(&span, "name", why, "give each pool a name of its own"));
        }
        let list = raw.volumes.ok_or_else(|| {
            missing(
                "volumes of a [[pool]]",
                "add volumes = [\"/archive/vol1\"], directories on other disks",
            )
        })?;
        let span = list.span();
        let mut volumes: Vec<PathBuf> = Vec::new();
        for text in list.into_inner() {
            let span = text.span();
            let path = self.path(text, "volumes")?;
            let taken = others
                .iter()
                .flat_map(|o| &o.volumes)
                .chain(&volumes)
                .any(|v| *v == path);
            if taken {
                let why = format!("{} is listed twice", path.display());
                return Err(self.key(
                    &span,
                    "volumes",
                    why,
                    "a volume belongs to one pool, once: remove one of them",
                ));
            }
            volumes.push(path);
        }
        if volumes.is_empty() {
            let why = format!("pool {name} has no volume");
            return Err(self.key(&span, "volumes", why, "list at least one directory"));
        }
        Ok(Pool { name, volumes })
    }

    /// No two of the daemon's places may lie within each other: each holds only what belongs there.
    fn check_nesting(&self, config: &Config) -> Result<(), ConfigError> {
        let mut places: Vec<(&str, &Path)> = vec![
            ("spool", &config.spool),
            ("catalog", &config.catalog),
            ("socket", &config.socket),
        ];
        places.extend(config.volumes().map(|volume| ("volumes", volume)));
        for (i, (key, path)) in places.iter().enumerate() {
            for (j, (other_key, other)) in places.iter().enumerate() {
                if i != j && path.starts_with(other) {
                    let needle = format!("{:?}", path.display().to_string());
                    let at = self.text.find(&needle).unwrap_or(0);
                    let why = format!(
                        "{} lies in {}, which is {other_key}",
                        path.display(),
                        other.display()
                    );
                    return Err(self.key(&(at..at), *key, why, "give each a place of its own"));
                }
            }
        }
        Ok(())
    }
}

/// A whole number and the unit behind it.
fn split_number(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim()))
}

const DURATION_UNITS: [(&str, u64); 6] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
    ("w", 604_800_000),
];

/// "250ms", "1s", "5m", "1h", "1d", "2w".
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_number(text)?;
    let (_, millis) = DURATION_UNITS.iter().find(|(name, _)| *name == unit)?;
    Some(Duration::from_millis(number.checked_mul(*millis)?))
}

/// "512", "64MiB", "1GB".
pub fn parse_size(text: &str) -> Option<u64> {
    policies::units::bytes(text)
}

/// A size in the largest unit of 1024 that divides it.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = SIZE_UNITS[1..7]
            .iter()
            .rev()
            .find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit))
            .unwrap_or(&("B", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// A duration in the largest unit that divides it.
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        let (name, unit) = DURATION_UNITS[..5]
            .iter()
            .rev()
            .find(|(_, unit)| millis != 0 && millis.is_multiple_of(u128::from(*unit)))
            .unwrap_or(&("ms", 1));
        write!(f, "{}{name}", millis / u128::from(*unit))
    }
}

#[cfg(test)]
mod tests;
