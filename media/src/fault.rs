//! Points at which a test can make an operation fail or stop, as a full disk, an I/O error or a kill
//! would. Outside of this crate's tests they are empty.

#[cfg(not(test))]
use std::io;

/// Called before each step that a failure can hit; `step` names it.
#[cfg(not(test))]
#[inline]
#[allow(clippy::unnecessary_wraps)] // the test version fails
pub(crate) fn at(_step: &'static str) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(crate) use testing::at;

#[cfg(test)]
pub(crate) mod testing {
    use std::cell::RefCell;
    use std::io;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// What happens at the chosen point.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Fault {
        /// The process stops there: nothing is cleaned up. A panic does that, as no `Drop` does I/O.
        Kill,
        Errno(i32),
    }

    struct Plan {
        left: usize,
        fault: Fault,
        hit: Option<&'static str>,
        passed: Vec<&'static str>,
    }

    thread_local! {
        static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
    }

    pub(crate) fn at(step: &'static str) -> io::Result<()> {
        let due = PLAN.with_borrow_mut(|plan| {
            let plan = plan.as_mut()?;
            if plan.hit.is_some() {
                return None;
            }
            if plan.left > 0 {
                plan.left -= 1;
                plan.passed.push(step);
                return None;
            }
            plan.hit = Some(step);
            Some(plan.fault)
        });
        match due {
            None => Ok(()),
            Some(Fault::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Kill) => std::panic::resume_unwind(Box::new(step)),
        }
    }

    /// Runs `work` with `fault` at the point number `n`. Gives the name of the point that was hit, or
    /// `None` when there are fewer points, and the result unless it was killed.
    pub(crate) fn inject<T>(
        n: usize,
        fault: Fault,
        work: impl FnOnce() -> T,
    ) -> (Option<&'static str>, Option<T>) {
        PLAN.set(Some(Plan {
            left: n,
            fault,
            hit: None,
            passed: Vec::new(),
        }));
        let result = catch_unwind(AssertUnwindSafe(work));
        let hit = PLAN.take().and_then(|plan| plan.hit);
        match result {
            Ok(value) => (hit, Some(value)),
            Err(payload) if payload.is::<&'static str>() && hit.is_some() => (hit, None),
            Err(payload) => std::panic::resume_unwind(payload),
        }
    }

    /// The points that `work` passes.
    pub(crate) fn steps(work: impl FnOnce()) -> Vec<&'static str> {
        PLAN.set(Some(Plan {
            left: usize::MAX,
            fault: Fault::Kill,
            hit: None,
            passed: Vec::new(),
        }));
        work();
        PLAN.take().map_or_else(Vec::new, |plan| plan.passed)
    }
}
