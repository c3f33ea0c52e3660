//! Files that could not be recalled when it was tried last: how many, why, and who is told.
//!
//! A missing volume may have a hundred thousand of them wanted, each tried again every second. So each is named in
//! the journal once, and only so many; the notice counts them, and its example stays the same as long as that
//! fails.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{FillError, Recall};
use crate::shared::{Shared, Trouble, lock};
use crate::sys::handle::Handle;

/// Files named in the journal within [`NAMED_WITHIN`]; the queue lists all.
const NAMED: u32 = 20;
const NAMED_WITHIN: Duration = Duration::from_mins(1);

/// What kind of failure it is; each has a notice of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    /// No copy is within reach.
    Away,
    /// There is no room.
    Full,
    /// Trying again does not help.
    Broken,
}

impl Class {
    const ALL: [Self; 3] = [Self::Away, Self::Full, Self::Broken];

    fn of(error: &FillError) -> Self {
        match error {
            FillError::Full(_) => Self::Full,
            error if error.may_pass() => Self::Away,
            _ => Self::Broken,
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Away => "recall-away",
            Self::Full => "recall-no-room",
            Self::Broken => "recall-broken",
        }
    }

    fn what(self, count: usize) -> String {
        let (files, them) = match count {
            1 => ("1 released file is".to_owned(), "it"),
            _ => (format!("{count} released files are"), "them"),
        };
        match self {
            Self::Away => format!("{files} wanted, and no copy of {them} is within reach"),
            Self::Full => format!("{files} wanted, and there is no room for {them}"),
            Self::Broken => format!("{files} wanted, and cannot be recalled"),
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Away => {
                "bring the volume that it names; who opens such a file waits as long as `recall_wait` says, and gets an error then"
            }
            Self::Full => {
                "make room: delete or unpin something, let a rule of the policy release more (hsm-policy(5)), or raise the quota; whoever opens the file again tries again"
            }
            Self::Broken => {
                "opening it gives an error until a good copy is here: bring a volume that has one; what to do if there is none says hsm(7), \"A file cannot be recalled\""
            }
        }
    }
}

struct Failure {
    /// The file, as people call it.
    name: String,
    why: String,
}

/// Those of one class.
#[derive(Default)]
struct Failures {
    all: HashMap<Handle, Failure>,
    /// The one that the notice names.
    example: Option<Handle>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Failing {
    classes: [Failures; 3],
    /// Since when files are counted that the journal names, and how many it has named.
    named: Option<(Instant, u32)>,
}

impl Failing {
    fn class(&mut self, class: Class) -> &mut Failures {
        let [away, full, broken] = &mut self.classes;
        match class {
            Class::Away => away,
            Class::Full => full,
            Class::Broken => broken,
        }
    }

    fn knows(&self, handle: &Handle) -> bool {
        self.classes
            .iter()
            .any(|class| class.all.contains_key(handle))
    }

    /// Why a file failed when it was tried last.
    pub(super) fn why(&self, handle: &Handle) -> Option<String> {
        let mut found = self
            .classes
            .iter()
            .filter_map(|class| class.all.get(handle));
        found.next().map(|failure| failure.why.clone())
    }

    /// Whether the journal is to name one more.
    fn may_name(&mut self) -> bool {
        let (since, count) = self.named.get_or_insert_with(|| (Instant::now(), 0));
        if since.elapsed() >= NAMED_WITHIN {
            (*since, *count) = (Instant::now(), 0);
        }
        *count += 1;
        *count <= NAMED
    }

    /// Says how it stands with a class.
    fn tell(&mut self, class: Class, shared: &Shared) {
        let failures = self.class(class);
        let known = |handle: &&Handle| failures.all.contains_key(*handle);
        let example = failures.example.as_ref().filter(known);
        let example = example.or_else(|| failures.all.keys().next()).cloned();
        failures.example = example;
        let failure = failures
            .example
            .as_ref()
            .and_then(|example| failures.all.get(example));
        match failure {
            None => shared.well(class.key()),
            Some(Failure { name, why }) => {
                let trouble = Trouble {
                    what: class.what(failures.all.len()),
                    why: format!("{name}: {why}"),
                    todo: class.advice().to_owned(),
                    severe: class == Class::Broken,
                    since: tierfs::Time::now(),
                };
                shared.lasting_trouble(class.key(), trouble);
            }
        }
    }
}

impl Recall {
    /// Says what cannot be recalled: that no copy is within reach, apart from what is worse.
    pub(super) fn tell_failure(&self, handle: &Handle, error: &FillError) {
        // A notice of its own tells of what is suspect.
        if matches!(error, FillError::Unknown(_)) {
            return;
        }
        let (class, why) = (Class::of(error), error.to_string());
        // Its name costs a look into the catalog, and is the same the next time.
        let is_new = !lock(&self.failing).knows(handle);
        let mut name = if is_new {
            self.name_of(handle)
        } else {
            String::new()
        };
        let mut failing = lock(&self.failing);
        if is_new && failing.may_name() {
            tracing::warn!(file = name, why, "a recall failed");
        }
        for other in Class::ALL {
            let failures = failing.class(other);
            if let Some(before) = failures.all.remove(handle) {
                name = before.name;
                if other != class {
                    failing.tell(other, &self.parts.shared);
                }
            }
        }
        let failure = Failure { name, why };
        failing.class(class).all.insert(handle.clone(), failure);
        failing.tell(class, &self.parts.shared);
    }

    /// It can be recalled, or nobody wants it any more.
    pub(super) fn fails_no_more(&self, handle: &Handle) {
        let mut failing = lock(&self.failing);
        for class in Class::ALL {
            if failing.class(class).all.remove(handle).is_some() {
                failing.tell(class, &self.parts.shared);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(n: u8) -> Handle {
        Handle::from_bytes(&[1, 0, 0, 0, n]).expect("a handle")
    }

    fn fail(failing: &mut Failing, n: u8) {
        let (name, why) = (format!("file {n}"), "away".to_owned());
        failing
            .class(Class::Away)
            .all
            .insert(handle(n), Failure { name, why });
    }

    #[test]
    fn the_example_stays_as_long_as_it_fails() {
        let shared = Shared::new(Duration::ZERO);
        let mut failing = Failing::default();
        let notice = |shared: &Shared| {
            shared
                .troubles()
                .first()
                .map(|(_, trouble)| (trouble.what.clone(), trouble.why.clone()))
        };
        for n in 1..=9 {
            fail(&mut failing, n);
            failing.tell(Class::Away, &shared);
            let (what, why) = notice(&shared).expect("a notice");
            assert!(what.starts_with(&n.to_string()), "{what}");
            assert_eq!(why, "file 1: away");
        }
        for n in 1..=9 {
            failing.class(Class::Away).all.remove(&handle(n));
            failing.tell(Class::Away, &shared);
        }
        assert_eq!(notice(&shared), None);
    }

    #[test]
    fn the_journal_names_so_many() {
        let mut failing = Failing::default();
        let named = (0..100).filter(|_| failing.may_name()).count();
        assert_eq!(named, usize::try_from(NAMED).expect("few"));
    }
}
