//! Every key, its default and its bounds; and that the man page has them all.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::{
    Bytes, Config, ConfigError, DEFAULTS, RawConfig, RawPool, Span, parse_duration, parse_size,
};

const MINIMAL: &str = r#"mount   = "/data"
spool   = "/var/lib/hsmd/spool"
catalog = "/var/lib/hsmd/catalog.db"

[[pool]]
name = "main"
volumes = ["/archive/vol1", "/archive/vol2"]
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/hsmd/hsmd.toml"), text)
}

/// The message for the minimal configuration with lines before its pool.
fn refused(lines: &str) -> String {
    let text = MINIMAL.replacen("\n[[pool]]", &format!("{lines}\n[[pool]]"), 1);
    parse(&text).expect_err(lines).to_string()
}

fn accepted(lines: &str) -> Config {
    let text = MINIMAL.replacen("\n[[pool]]", &format!("{lines}\n[[pool]]"), 1);
    parse(&text).expect(lines)
}

#[test]
fn the_least_configuration_gets_the_defaults() {
    let config = parse(MINIMAL).unwrap();
    assert_eq!(config.mount, Path::new("/data"));
    assert_eq!(config.socket, Path::new("/run/hsmd/control.sock"));
    assert_eq!(config.control_group, None);
    assert_eq!(config.rpo, Duration::from_secs(1));
    assert_eq!(config.sweep_interval, Duration::from_hours(1));
    assert_eq!(config.segment_bytes, 64 << 20);
    assert_eq!(config.segment_age, Duration::from_mins(1));
    assert_eq!(config.spool_bytes_max, 16 << 30);
    assert_eq!(config.compression_level, 1);
    assert_eq!(config.pools.len(), 1);
    let volumes: Vec<_> = config.volumes().collect();
    assert_eq!(
        volumes,
        [Path::new("/archive/vol1"), Path::new("/archive/vol2")]
    );
}

#[test]
fn every_key_is_taken() {
    let config = accepted(
        "policies = \"/etc/p.toml\"\nsocket = \"/run/x//./y/\"\ncontrol_group = \"hsm\"\nrpo = \"250ms\"\nsweep_interval = \"2d\"\n\
         segment_bytes = \"2MB\"\nsegment_age = \"5m\"\nspool_bytes_max = \"1GiB\"\ncompression_level = 3",
    );
    assert_eq!(config.policies.as_deref(), Some(Path::new("/etc/p.toml")));
    assert_eq!(config.socket, Path::new("/run/x/y"));
    assert_eq!(config.socket.as_os_str(), "/run/x/y");
    assert_eq!(config.control_group.as_deref(), Some("hsm"));
    assert_eq!(config.rpo, Duration::from_millis(250));
    assert_eq!(config.sweep_interval, Duration::from_hours(48));
    assert_eq!(config.segment_bytes, 2_000_000);
    assert_eq!(config.segment_age, Duration::from_mins(5));
    assert_eq!(config.spool_bytes_max, 1 << 30);
    assert_eq!(config.compression_level, 3);
}

/// Lines, and what the message about them must contain.
const WRONG_LINES: &[(&str, [&str; 2])] = &[
    (
        "rpo = \"1 fortnight\"",
        [
            "hsmd.toml:4: rpo: \"1 fortnight\" cannot be understood",
            "ms, s, m, h",
        ],
    ),
    (
        "rpo = \"99ms\"",
        [
            "hsmd.toml:4: rpo: 99ms is less than 100ms",
            "choose 100ms to 1h",
        ],
    ),
    (
        "rpo = \"61m\"",
        ["rpo: 61m is more than 1h", "choose 100ms to 1h"],
    ),
    (
        "\nrpo = 1",
        [
            "hsmd.toml:5: rpo: invalid type: integer",
            "correct the line",
        ],
    ),
    (
        "rp = \"1s\"",
        ["hsmd.toml:4: rp: unknown field `rp`", "correct the key"],
    ),
    ("rpo = \"1s", ["hsmd.toml:4: rpo:", "correct the line"]),
    (
        "rpo = \"1s\"\nrpo = \"2s\"",
        ["hsmd.toml:5: rpo: duplicate key", "correct the line"],
    ),
    (
        "segment_bytes = \"1023KiB\"",
        ["segment_bytes: 1023KiB is less than 1MiB", "1MiB to 1GiB"],
    ),
    (
        "segment_bytes = \"1.5GiB\"",
        [
            "segment_bytes: \"1.5GiB\" cannot be understood",
            "whole number",
        ],
    ),
    (
        "segment_bytes = \"99999999999999999999B\"",
        ["cannot be understood", "whole number"],
    ),
    (
        "segment_age = \"0s\"",
        ["segment_age: 0s is less than 1s", "1s to 1d"],
    ),
    (
        "sweep_interval = \"1s\"",
        ["sweep_interval: 1s is less than 1m", "1m to 30d"],
    ),
    (
        "spool_bytes_max = \"100MiB\"",
        [
            "hsmd.toml:4: spool_bytes_max: 100MiB is less than 4 segments of 64MiB",
            "at least 256MiB",
        ],
    ),
    (
        "compression_level = 0",
        ["compression_level: 0 is not a level", "1 (fast) to 19"],
    ),
    (
        "compression_level = 99999999999",
        ["compression_level: 99999999999 is not", "1 (fast)"],
    ),
    (
        "control_group = \"\"",
        ["control_group: \"\" is no group's name", "root only"],
    ),
    (
        "socket = \"run/x\"",
        ["socket: run/x is not absolute", "whole path"],
    ),
    (
        "socket = \"/run/../x\"",
        ["socket: /run/../x contains \"..\"", "whole path"],
    ),
    (
        "socket = \"/run\\n\"",
        ["contains a control character", "whole path"],
    ),
    (
        "socket = \"/var/lib/hsmd/spool/s\"",
        [
            "socket: /var/lib/hsmd/spool/s lies in /var/lib/hsmd/spool, which is spool",
            "own",
        ],
    ),
];

#[test]
fn errors_name_file_line_key_and_remedy() {
    for (lines, wanted) in WRONG_LINES {
        let message = refused(lines);
        for part in *wanted {
            assert!(
                message.contains(part),
                "{lines:?} gives {message:?}, not {part:?}"
            );
        }
    }
    let long = refused(&format!("socket = \"/{}\"", "x".repeat(107)));
    assert!(long.contains("longer than 107 bytes"), "{long}");
}

#[test]
fn what_is_missing_is_named() {
    for key in ["mount", "spool", "catalog", "name", "volumes"] {
        let text: String = MINIMAL
            .lines()
            .filter(|l| !l.starts_with(key))
            .fold(String::new(), |t, l| t + l + "\n");
        let message = parse(&text).unwrap_err().to_string();
        assert!(
            message.contains(&format!("{key} ")) && message.contains("missing; add"),
            "{message}"
        );
    }
    let message = parse(MINIMAL.split_once("[[pool]]").unwrap().0)
        .unwrap_err()
        .to_string();
    assert!(message.contains("[[pool]] is missing"), "{message}");
}

#[test]
fn pools_and_volumes_are_told_apart() {
    let with = |pool: &str| parse(&format!("{MINIMAL}{pool}"));
    let second = with("[[pool]]\nname = \"off-site2\"\nvolumes = [\"/remote/v\"]").unwrap();
    assert_eq!(second.pools[1].name, "off-site2");
    for (pool, wanted) in [
        (
            "[[pool]]\nname = \"main\"\nvolumes = [\"/v\"]",
            "toml:9: name: two pools are named main",
        ),
        (
            "[[pool]]\nname = \"Main\"\nvolumes = [\"/v\"]",
            "toml:9: name: \"Main\" is no name",
        ),
        ("[[pool]]\nname = \"\"\nvolumes = [\"/v\"]", "is no name"),
        ("[[pool]]\nname = \"-x\"\nvolumes = [\"/v\"]", "is no name"),
        (
            "[[pool]]\nname = \"b\"\nvolumes = []",
            "toml:10: volumes: pool b has no volume",
        ),
        (
            "[[pool]]\nname = \"b\"\nvolumes = [\"/v\",\n\"/archive/vol1/\"]",
            "toml:11: volumes: /archive/vol1 is listed twice",
        ),
        (
            "[[pool]]\nname = \"b\"\nvolumes = [\"/v\", \"/v\"]",
            "volumes: /v is listed twice",
        ),
        (
            "[[pool]]\nname = \"b\"\nvolumes = [\"/archive/vol1/x\"]",
            "/archive/vol1/x lies in /archive/vol1",
        ),
        (
            "[[pool]]\nname = \"b\"\nvolumes = [\"/var/lib/hsmd\"]",
            "lies in /var/lib/hsmd, which is volumes",
        ),
        (
            "[[pool]]\nname = \"b\"\nvolumes = [\"v\"]",
            "volumes: v is not absolute",
        ),
        (
            "[[pool]]\nname = \"b\"\nvolumes = [\"/v\"]\nsize = 1",
            "toml:11: size: unknown field",
        ),
    ] {
        let message = with(pool).expect_err(pool).to_string();
        assert!(message.contains(wanted), "{message:?}, not {wanted:?}");
    }
}

#[test]
fn files_that_cannot_be_read_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let absent = Config::load(&dir.path().join("absent.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        absent.contains("absent.toml") && absent.contains("--config"),
        "{absent}"
    );
    assert!(
        Config::load(dir.path())
            .unwrap_err()
            .to_string()
            .contains("make it a readable file")
    );
    let file = dir.path().join("hsmd.toml");
    fs::write(&file, b"mount = \"\xff\"").unwrap();
    assert!(
        Config::load(&file)
            .unwrap_err()
            .to_string()
            .contains("UTF-8")
    );
    fs::write(&file, vec![b'#'; 2 << 20]).unwrap();
    assert!(
        Config::load(&file)
            .unwrap_err()
            .to_string()
            .contains("1 MiB")
    );
    fs::write(&file, MINIMAL).unwrap();
    assert_eq!(Config::load(&file).unwrap().file, file);
}

#[test]
fn units() {
    assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
    assert_eq!(parse_duration(" 2 w "), Some(Duration::from_hours(14 * 24)));
    assert_eq!(parse_duration("1"), None);
    assert_eq!(parse_duration(""), None);
    assert_eq!(parse_duration("99999999999999999w"), None);
    assert_eq!(parse_size("512"), Some(512));
    assert_eq!(parse_size("64MiB"), Some(64 << 20));
    assert_eq!(parse_size("1GB"), Some(1_000_000_000));
    assert_eq!(parse_size("1mb"), None);
    assert_eq!(parse_size("-1MiB"), None);
    assert_eq!(Bytes(64 << 20).to_string(), "64MiB");
    assert_eq!(Bytes(1000).to_string(), "1000B");
    assert_eq!(Bytes(0).to_string(), "0B");
    assert_eq!(Span(Duration::from_hours(1)).to_string(), "1h");
    assert_eq!(Span(Duration::from_millis(1500)).to_string(), "1500ms");
}

/// The keys that the parser knows, from its own message about one that it does not.
fn known_keys() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for message in [
        toml::from_str::<RawConfig>("x = 1")
            .err()
            .unwrap()
            .to_string(),
        toml::from_str::<RawPool>("x = 1")
            .err()
            .unwrap()
            .to_string(),
    ] {
        let (_, list) = message.split_once("expected").unwrap();
        keys.extend(list.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    assert!(
        keys.contains("mount") && keys.contains("volumes") && keys.len() >= 14,
        "{keys:?}"
    );
    keys
}

/// The man page without its markup.
fn man_page() -> String {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../man/hsmd.toml.5");
    let text = fs::read_to_string(file).unwrap();
    assert!(text.is_ascii(), "roff wants escapes for other characters");
    text.replace("\\-", "-")
        .replace("\\(dq", "\"")
        .replace("\\(aq", "'")
        .replace("\\&", "")
}

#[test]
fn the_man_page_has_every_key_and_default() {
    let man = man_page();
    for key in known_keys() {
        if key != "pool" {
            assert!(
                man.contains(&format!("\n.BR {key} ")) || man.contains(&format!("\n.B {key}\n")),
                "{key} has no entry"
            );
        }
    }
    for default in DEFAULTS {
        let entry = man
            .split_once(&format!("\n.BR {} ", default.key))
            .unwrap()
            .1;
        let entry = entry.split("\n.TP").next().unwrap();
        assert!(
            entry.contains(&format!("Default: {}", default.text))
                || entry.contains(&format!("Default: \"{}\"", default.text)),
            "{}: {entry}",
            default.key
        );
    }
}

#[test]
fn the_man_page_documents_no_other_key() {
    let keys = known_keys();
    let man = man_page();
    for line in man.lines().filter_map(|l| l.strip_prefix(".BR ")) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if rest.starts_with("\" = ") {
            assert!(keys.contains(word), "{word} is no key");
        }
    }
}

#[test]
fn the_example_of_the_man_page_is_a_sound_configuration_with_every_key() {
    let man = man_page();
    let example = man.split_once(".SH EXAMPLE").unwrap().1;
    let example = example
        .split_once(".EX\n")
        .unwrap()
        .1
        .split_once("\n.EE")
        .unwrap()
        .0;
    let config = parse(example).unwrap();
    assert!(config.pools.len() >= 2);
    for key in known_keys() {
        assert!(
            example
                .lines()
                .any(|l| l.starts_with(&key) || l == format!("[[{key}]]")),
            "{key}"
        );
    }
}

proptest! {
    #[test]
    fn any_text_parses_or_fails(text in "\\PC{0,80}") {
        let _ = parse(&text);
        let _ = parse(&format!("{MINIMAL}{text}"));
        let _ = parse_duration(&text);
        let _ = parse_size(&text);
    }

    #[test]
    fn what_is_shown_parses_back(number: u64) {
        prop_assert_eq!(parse_size(&Bytes(number).to_string()), Some(number));
        let span = Duration::from_millis(number);
        prop_assert_eq!(parse_duration(&Span(span).to_string()), Some(span));
    }
}
