//! Every key, what is wrong with it, and where.

use proptest::prelude::*;

use super::*;
use crate::decide::Budget;
use crate::statement::Statement;

const RULE: &str = r#"
[[rule]]
name = "cold"
action = "release"
condition = "size > mib(100)"
"#;

fn parse(text: &str) -> Result<Policy, PolicyError> {
    Policy::parse("p.toml", text)
}

/// The rule above with more lines at its end.
fn with(lines: &str) -> Result<Policy, PolicyError> {
    parse(&format!("{RULE}{lines}\n"))
}

#[test]
fn every_key_is_taken() {
    let policy = parse(
        r#"
ignore = ["*.tmp", "scratch/*"]
failures_max_percent = 25

[[rule]]
name = "make-room"
action = "release"
condition = """
  size > mib(1)
  and group = 'staff'"""
weight = "size * age(atime)"
high_watermark = 90
low_watermark = 80
every = "2h"
spool_full = true
max_files = 10
max_bytes = "1GiB"

[[rule]]
name = "project_1.0"
action = "pin"
condition = "path glob 'project/*'"
daily = "03:30"
"#,
    )
    .unwrap();
    assert_eq!(policy.failures_max_percent, 25);
    let rule = policy.rule("make-room").unwrap();
    assert_eq!(rule.watermarks, Some(Watermarks { high: 90, low: 80 }));
    assert_eq!(rule.schedule, Some(Schedule::Every { seconds: 7200 }));
    assert_eq!((rule.max_files, rule.max_bytes), (Some(10), Some(1 << 30)));
    assert_eq!(
        (rule.line, rule.condition_line, rule.weight_line),
        (5, 8, 11)
    );
    assert!(rule.spool_full);
    let statement = Statement::of(&policy, rule);
    assert_eq!(
        statement.condition,
        "state = 'premigrated' and not pinned and size > 0 and (  size > mib(1)\n  and gname = 'staff') \
         and not coalesce(path glob ?1 or path glob ?2, 0)"
    );
    assert_eq!(statement.weight.as_deref(), Some("size * age(atime)"));
    assert_eq!(statement.params, ["*.tmp", "scratch/*"]);
    let pin = policy.rule("project_1.0").unwrap();
    assert_eq!(pin.schedule, Some(Schedule::Daily(TimeOfDay(210))));
    assert_eq!(
        pin.schedule
            .map(|s| matches!(s, Schedule::Daily(t) if t.to_string() == "03:30")),
        Some(true)
    );
    assert_eq!(policy.rule("other"), None);
    assert_eq!(parse("").unwrap().rules, []);
    assert_eq!(parse("").unwrap().failures_max_percent, 10);
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    let cases: &[(&str, &str)] = &[
        (
            "every = \"5s\"",
            "p.toml:6: rule cold: every: \"5s\" is no span from 1m to 366d; write a whole number",
        ),
        (
            "every = \"1h\"\ndaily = \"03:30\"",
            "p.toml:7: rule cold: daily: the rule has every as well; keep one",
        ),
        (
            "daily = \"3:30\"",
            "p.toml:6: rule cold: daily: \"3:30\" is no time of the day; write hours",
        ),
        ("daily = \"24:00\"", "is no time of the day"),
        (
            "high_watermark = 90",
            "p.toml:6: rule cold: high_watermark: the other watermark is missing; give both",
        ),
        (
            "low_watermark = 90",
            "p.toml:6: rule cold: low_watermark: the other watermark is missing",
        ),
        (
            "high_watermark = 80\nlow_watermark = 80",
            "p.toml:7: rule cold: low_watermark: 80 is not below high_watermark 80",
        ),
        (
            "high_watermark = 100\nlow_watermark = 80",
            "p.toml:6: rule cold: high_watermark: 100 is no share",
        ),
        (
            "max_files = 0",
            "p.toml:6: rule cold: max_files: it is not above 0; write how many",
        ),
        (
            "max_bytes = \"lots\"",
            "p.toml:6: rule cold: max_bytes: \"lots\" is no size; write a whole number",
        ),
        (
            "weight = \"(size\"",
            "p.toml:6: rule cold: weight: a parenthesis is not closed (at character 1: \"(size\"); add",
        ),
        (
            "weight = \"size -- x\"",
            "rule cold: weight: -- begins a comment (at character 6: \"-- x\")",
        ),
        (
            "weight = \"\"",
            "p.toml:6: rule cold: weight: it is empty (at its end); write an expression",
        ),
        ("wait = 3", "p.toml:6: wait: unknown field `wait`"),
        (
            "max_files = \"3\"",
            "p.toml:6: max_files: invalid type: string",
        ),
        ("name = \"again\"", "p.toml:6: name: duplicate key"),
        (
            RULE,
            "p.toml:8: name: two rules are named cold, the other one in line 2; give each",
        ),
        (
            "[[rule]]\naction = \"pin\"",
            "p.toml:6: name: it is missing; give each [[rule]] a name",
        ),
        (
            "[[rule]]\nname = \"a\"",
            "p.toml:6: rule a: action: it is missing; add action",
        ),
        (
            "[[rule]]\nname = \"a\"\naction = \"pin\"",
            "p.toml:6: rule a: condition: it is missing; add condition",
        ),
        (
            "[[rule]]\nname = \"a b\"",
            "p.toml:7: name: \"a b\" is no name of a rule; use 1 to 64",
        ),
        (
            "[[rule]]\nname = \"a\"\naction = \"free\"",
            "p.toml:8: rule a: action: \"free\" is no action; write migrate",
        ),
        (
            "[[rule]]\nname = \"a\"\naction = \"pin\"\ncondition = \"1\"\nspool_full = true",
            "p.toml:10: rule a: spool_full: action pin empties no spool",
        ),
        (
            "[[rule]]\nname = \"a\"\naction = \"pin\"\ncondition = \"1\"\nhigh_watermark = 9\nlow_watermark = 8",
            "p.toml:10: rule a: high_watermark: action pin frees no space",
        ),
    ];
    for (lines, expected) in cases {
        let message = with(lines).expect_err(lines).to_string();
        assert!(message.contains(expected), "{lines}: {message}");
    }
    let top: &[(&str, &str)] = &[
        (
            "ignore = [\"\"]",
            "p.toml:1: ignore: a pattern is empty; remove it",
        ),
        (
            "ignore = [\n\"/x/*\"]",
            "p.toml:2: ignore: \"/x/*\" begins with a slash",
        ),
        (
            "failures_max_percent = 0",
            "p.toml:1: failures_max_percent: 0 is no share",
        ),
        ("[[rules]]", "p.toml:1: [[rules]]: unknown field `rules`"),
        ("rule = 1", "p.toml:1: rule: invalid type"),
    ];
    for (text, expected) in top {
        let message = parse(text).expect_err(text).to_string();
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn what_the_view_says_is_told_in_the_same_way() {
    let policy = with("weight = \"sise\"").unwrap();
    let fault = Fault {
        at: 0,
        why: "no such column: sise".to_owned(),
        advice: "the columns are size".to_owned(),
    };
    let rule = &policy.rules[0];
    assert_eq!(
        policy.expression_error(rule, "weight", &fault).to_string(),
        "p.toml:6: rule cold: weight: no such column: sise (at character 1: \"sise\"); the columns are size"
    );
    assert!(
        policy
            .expression_error(rule, "condition", &fault)
            .to_string()
            .starts_with("p.toml:5:")
    );
}

#[test]
fn a_run_has_its_limits() {
    let policy = with("max_files = 3\nmax_bytes = \"100\"").unwrap();
    let rule = &policy.rules[0];
    let run = |to_free: Option<u64>, bytes: u64| {
        let mut budget = Budget::new(rule, to_free);
        while budget.wants_more() {
            budget.take(bytes);
        }
        budget.taken()
    };
    assert_eq!(run(None, 10), (3, 30));
    assert_eq!(run(None, 60), (2, 120));
    assert_eq!(run(Some(30), 20), (2, 40));
    assert_eq!(run(Some(0), 20), (0, 0));
    let mut budget = Budget::new(rule, Some(10));
    budget.take(10);
    assert!(!budget.wants_more() && budget.may_go_on());
    budget.again(5);
    assert!(budget.wants_more());
    budget.take(4);
    budget.take(1);
    assert!(!budget.wants_more() && !budget.may_go_on(), "three files");
}

#[test]
fn the_manual_has_every_key_and_action() {
    let manual = include_str!("../../../man/hsm-policy.5");
    for key in KEYS {
        let tag = format!(".It Cm {key}");
        let table = format!(".It Cm [[{key}]]");
        assert!(
            manual.contains(&tag) || manual.contains(&table),
            "hsm-policy.5 lacks {key}"
        );
    }
    for action in Action::ALL {
        assert!(
            manual.contains(&format!(".It Cm {action}")),
            "hsm-policy.5 lacks {action}"
        );
    }
}

proptest! {
    /// No text makes it panic, and what is wrong is within the file.
    #[test]
    fn any_text_is_taken_or_refused(lines in proptest::collection::vec(prop_oneof![
        Just("[[rule]]".to_owned()),
        Just("name = \"a\"".to_owned()),
        Just("action = \"release\"".to_owned()),
        Just("condition = \"1\"".to_owned()),
        Just("high_watermark = 90".to_owned()),
        Just("low_watermark = 80".to_owned()),
        Just("ignore = [\"a\"]".to_owned()),
        "[a-z_]{1,6} = \"[a-z0-9 ():']{0,8}\"",
        "\\PC{0,20}",
    ], 0..12)) {
        let text = lines.join("\n");
        if let Err(error) = parse(&text) {
            prop_assert!(error.line >= 1 && error.line <= text.lines().count().max(1), "{}", error);
        }
    }
}
