//! `tierctl policy`: check, run and explain the rules.

use std::path::Path;

use serde::Serialize;

use super::args::Args;
use super::format::{add, name, size, some};
use super::{PROGRAM, connect, needs, path_parameters, tier};
use crate::control::model::{Clause, Explanation, PolicyFile, PolicyRun, RuleDone, RuleExplained};
use crate::control::path::PathText;
use crate::control::policies::RunParameters;
use crate::output::{self, Exit};
use crate::policy::{self, LoadError};

/// Failed files that are repeated at the end.
const REPEATED: usize = 20;

/// What `check --json` prints.
#[derive(Serialize)]
struct Checked {
    file: String,
    sound: bool,
    rules: Vec<String>,
    error: Option<String>,
}

pub(super) fn check(args: &Args, file: &Path) -> anyhow::Result<Exit> {
    let loaded = policy::load(file);
    if let Err(error @ LoadError::Read { .. }) = loaded {
        return Err(error.into());
    }
    let checked = Checked {
        file: file.display().to_string(),
        sound: loaded.is_ok(),
        rules: loaded.as_ref().map_or_else(
            |_| Vec::new(),
            |policy| policy.rules.iter().map(|rule| rule.name.clone()).collect(),
        ),
        error: loaded.err().map(|error| error.to_string()),
    };
    if args.json {
        output::json(&checked)?;
    } else if checked.sound {
        let rules = some(checked.rules.len() as u64, "rule", "rules");
        output::text(&format!("{}: {rules}, sound\n", name(&checked.file)))?;
    }
    if let Some(error) = checked.error {
        output::error(PROGRAM, &error);
        return Ok(Exit::No);
    }
    Ok(Exit::Done)
}

pub(super) fn run(args: &Args, rule: Option<&str>, dry_run: bool) -> anyhow::Result<Exit> {
    let asked = RunParameters {
        name: rule.map(str::to_owned),
        dry_run,
    };
    let (mut rules, mut failed) = (Vec::new(), Vec::new());
    let mut recalled: Vec<Vec<PathText>> = Vec::new();
    let mut handled = (0, 0);
    let printed = connect(args)?.run_policy(&asked, &mut |part: PolicyRun| {
        if args.json {
            for file in &part.files {
                output::json_line(file)?;
            }
            for rule in &part.rules {
                output::json_line(rule)?;
            }
        } else {
            output::clear();
            let shown = part.files.iter().filter(|_| dry_run);
            output::text(&shown.map(file_line).collect::<String>())?;
            output::text(
                &part
                    .rules
                    .iter()
                    .map(|rule| rule_line(rule, dry_run))
                    .collect::<String>(),
            )?;
            show_progress(&part, &mut handled, dry_run);
        }
        if dry_run {
            let wanted = part.files.iter().filter(|file| file.action == "recall");
            let paths: Vec<PathText> = wanted.filter_map(path_of).collect();
            recalled.extend(Some(paths).filter(|paths| !paths.is_empty()));
        }
        let wrong = part.files.into_iter().filter(|file| file.error.is_some());
        failed.extend(wrong.take(REPEATED.saturating_sub(failed.len())));
        rules.extend(part.rules);
        Ok(())
    })?;
    printed?;
    if !recalled.is_empty() {
        show_needs(args, &recalled)?;
    }
    for file in &failed {
        let error = file.error.as_deref().unwrap_or_default();
        output::error(
            PROGRAM,
            &format!("rule {}: {}: {error}", file.rule, shown(file)),
        );
    }
    for rule in &rules {
        if let Some(error) = &rule.error {
            output::error(PROGRAM, &format!("rule {}: {error}", rule.rule));
        }
    }
    Ok(exit(&rules))
}

/// Where it is done, how far the rule is that runs.
fn show_progress(part: &PolicyRun, (files, bytes): &mut (u64, u64), dry_run: bool) {
    // Its last files may come with its end.
    if !part.rules.is_empty() {
        (*files, *bytes) = (0, 0);
        return;
    }
    *files += part.files.len() as u64;
    *bytes += part.files.iter().map(|file| file.size).sum::<u64>();
    if let Some(last) = part.files.last().filter(|_| !dry_run) {
        output::progress(&format!(
            "rule {}: {}, {}",
            last.rule,
            some(*files, "file", "files"),
            size(*bytes)
        ));
    }
}

fn path_of(file: &PolicyFile) -> Option<PathText> {
    Some(PathText {
        path: file.path.path.clone()?,
        path_base64: file.path.path_base64.clone(),
    })
}

/// Which volumes the rules that recall would need.
fn show_needs(args: &Args, batches: &[Vec<PathText>]) -> anyhow::Result<()> {
    let plan = match tier::plan_recall(&mut connect(args)?, batches) {
        Ok(plan) => plan,
        Err(error) => {
            let what = format!("which volumes a recall needs is not known: {error:#}");
            output::note(PROGRAM, &what);
            return Ok(());
        }
    };
    if args.json {
        output::json_line(&serde_json::json!({ "needs": plan.needs }))?;
    } else {
        output::text(&needs::render(&plan.needs))?;
    }
    Ok(())
}

fn exit(rules: &[RuleDone]) -> Exit {
    let broken = |rule: &RuleDone| rule.error.is_some() || rule.failed > 0;
    if !rules.iter().any(broken) {
        Exit::Done
    } else if rules.iter().all(|rule| rule.error.is_some()) {
        Exit::Error
    } else {
        Exit::Partly
    }
}

fn shown(file: &PolicyFile) -> String {
    match &file.path.path {
        Some(path) => name(path),
        None => format!("file {} (without a path)", file.file),
    }
}

fn file_line(file: &PolicyFile) -> String {
    format!(
        "would {} {:>9}  {}\n",
        file.action,
        size(file.size),
        shown(file)
    )
}

/// What became of a rule, in one line.
fn rule_line(rule: &RuleDone, dry_run: bool) -> String {
    let mut text = format!("rule {}: ", rule.rule);
    if rule.error.is_some() {
        text.push_str("could not run\n");
        return text;
    }
    let would = if dry_run { "would " } else { "" };
    let done = if dry_run { "" } else { "d" };
    let verb = match (dry_run, rule.action.as_str()) {
        (false, "pin") => "pinned".to_owned(),
        (false, "recall") => "recalled".to_owned(),
        (_, action) => format!("{would}{action}{done}"),
    };
    let files = some(rule.files - rule.failed, "file", "files");
    add!(text, "{verb} {files}, {}", size(rule.bytes));
    if rule.failed > 0 {
        add!(text, "; {} failed", some(rule.failed, "file", "files"));
    }
    if rule.gave_up {
        text.push_str(", so many that it gave up");
    } else if rule.left {
        text.push_str("; more are left for another run");
    }
    add!(text, " ({})\n", rule.why);
    text
}

pub(super) fn explain(args: &Args, path: &Path) -> anyhow::Result<Exit> {
    let explanation = connect(args)?.explain(&path_parameters(path)?)?;
    if args.json {
        output::json(&explanation)?;
    } else {
        output::text(&render(&explanation))?;
    }
    if explanation.rules.iter().any(|rule| rule.applies) {
        Ok(Exit::Done)
    } else {
        Ok(Exit::No)
    }
}

fn render(explanation: &Explanation) -> String {
    let file = &explanation.file;
    let mut text = format!(
        "{}: {}, {}{}\n",
        file.path
            .path
            .as_deref()
            .map_or_else(|| format!("file {}", file.file), name),
        file.state,
        size(file.size),
        if file.pinned { ", pinned" } else { "" }
    );
    for rule in &explanation.rules {
        text.push_str(&rule_text(rule));
    }
    if explanation.rules.is_empty() {
        text.push_str("the policy has no rules\n");
    }
    text
}

fn rule_text(rule: &RuleExplained) -> String {
    let answer = if rule.applies {
        format!("would {} it", rule.action)
    } else {
        "is not about it".to_owned()
    };
    let mut text = format!("rule {} {answer}\n", rule.rule);
    for clause in &rule.clauses {
        add!(
            text,
            "  {:<4} {}{}\n",
            holds(clause),
            one_line(&clause.text),
            values(clause)
        );
    }
    if let Some(weight) = rule.weight {
        add!(text, "  weight {weight}\n");
    }
    text
}

fn holds(clause: &Clause) -> &'static str {
    match clause.holds {
        Some(true) => "yes",
        Some(false) => "no",
        None => "null",
    }
}

fn one_line(text: &str) -> String {
    name(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn values(clause: &Clause) -> String {
    if clause.values.is_empty() {
        return String::new();
    }
    let values = clause.values.iter().map(|value| {
        let shown = value
            .value
            .as_deref()
            .map_or_else(|| "NULL".to_owned(), name);
        format!("{} is {shown}", value.column)
    });
    format!("   ({})", values.collect::<Vec<_>>().join(", "))
}
