//! What files are read and refused, and the examples.

use std::path::{Path, PathBuf};

use super::{LoadError, load, parse};

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/examples");
    let mut list: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    list.sort();
    list
}

#[test]
fn the_examples_are_sound() {
    let examples = examples();
    assert_eq!(examples.len(), 4, "{examples:?}");
    for example in examples {
        let policy = load(&example).unwrap_or_else(|error| panic!("{error}"));
        assert!(!policy.rules.is_empty());
    }
}

#[test]
fn the_example_of_the_manual_is_sound() {
    let manual = include_str!("../../../man/hsm-policy.5");
    let example = manual.split_once(".Sh EXAMPLES").unwrap().1;
    let example = example.split_once("indent\n").unwrap().1;
    let example = example.split_once(".Ed").unwrap().0;
    assert_eq!(parse("man", example).unwrap().rules.len(), 2);
}

#[test]
fn names_that_the_view_does_not_know_are_told() {
    let text = "[[rule]]\nname = \"a\"\naction = \"pin\"\ncondition = \"size > mb(1)\"\n";
    assert_eq!(
        parse("p.toml", text)
            .unwrap_err()
            .to_string()
            .split(';')
            .next()
            .unwrap(),
        "p.toml:4: rule a: condition: no such function: mb (at character 8: \"mb(1)\")"
    );
    let text = text
        .replace("size > mb(1)", "1")
        .replace("\"pin\"", "\"pin\"\nweight = \"sise\"");
    let error = parse("p.toml", &text).unwrap_err();
    assert!(matches!(error, LoadError::Wrong(_)));
    assert!(
        error
            .to_string()
            .starts_with("p.toml:4: rule a: weight: no such column: sise"),
        "{error}"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    let error = load(&file).unwrap_err().to_string();
    assert!(
        error.contains("p.toml: the policy cannot be read: No such file"),
        "{error}"
    );
    std::fs::write(&file, vec![b' '; (1 << 20) + 1]).unwrap();
    let error = load(&file).unwrap_err().to_string();
    assert!(error.contains("at most 1 MiB"), "{error}");
}
