//! A rule as a question to the view `files`.

use crate::expression::Expression;
use crate::rules::{Action, Policy, Rule};

/// A condition and a weight over the view, with the values of its parameters `?1`, `?2` and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Holds for the files that the rule is about.
    pub condition: String,
    /// Larger comes first.
    pub weight: Option<String>,
    /// Texts bound to the parameters.
    pub params: Vec<String>,
}

impl Action {
    /// What an action asks of a file beside the rule's condition.
    pub fn applies_to(self) -> &'static str {
        match self {
            Self::Migrate => "state = 'logged'",
            Self::Release => "state = 'premigrated' and not pinned and size > 0",
            Self::Recall => "state = 'migrated'",
            Self::Pin => "not pinned",
        }
    }
}

impl Statement {
    /// Of a rule of this policy.
    pub fn of(policy: &Policy, rule: &Rule) -> Self {
        let ignored = ignored(&policy.ignore, 1).map(|ignored| format!(" and not {ignored}"));
        Self {
            condition: format!(
                "{} and ({}){}",
                rule.action.applies_to(),
                rule.condition.sql(),
                ignored.unwrap_or_default()
            ),
            weight: rule.weight.as_ref().map(|weight| weight.sql().to_owned()),
            params: policy.ignore.clone(),
        }
    }

    /// Of a search.
    pub fn search(condition: &Expression) -> Self {
        Self {
            condition: condition.sql().to_owned(),
            weight: None,
            params: Vec::new(),
        }
    }
}

/// Whether a file is one of those that no rule touches; `None` where nothing is ignored. The patterns are
/// bound to the parameters from `first` on. A file without a path matches none.
pub fn ignored(patterns: &[String], first: usize) -> Option<String> {
    if patterns.is_empty() {
        return None;
    }
    let each: Vec<String> = (first..first + patterns.len())
        .map(|number| format!("path glob ?{number}"))
        .collect();
    Some(format!("coalesce({}, 0)", each.join(" or ")))
}
