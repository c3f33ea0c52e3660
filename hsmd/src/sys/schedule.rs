//! When a thread gets the processor: at once, or when nobody else wants it.

#![allow(unsafe_code)] // sched_setscheduler has no checked wrapper

use super::Error;

/// A thread of this process, see [`this_thread`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Thread(libc::pid_t);

/// The calling thread.
pub fn this_thread() -> Thread {
    Thread(nix::unistd::gettid().as_raw())
}

/// How a thread competes for the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// As every program does.
    Normal,
    /// It takes what others leave, and gives way to them at once.
    Idle,
}

/// Puts a thread of this process into a class. It takes effect at once, whatever the thread does.
pub fn set_class(thread: Thread, class: Class) -> Result<(), Error> {
    let policy = match class {
        Class::Normal => libc::SCHED_OTHER,
        Class::Idle => libc::SCHED_IDLE,
    };
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` is a valid structure that the kernel only reads.
    let done = unsafe { libc::sched_setscheduler(thread.0, policy, &raw const param) };
    nix::errno::Errno::result(done)
        .map(drop)
        .map_err(|error| Error::call("sched_setscheduler", format!("thread {}", thread.0), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(thread: Thread) -> i32 {
        // SAFETY: no memory is passed.
        unsafe { libc::sched_getscheduler(thread.0) }
    }

    #[test]
    fn another_thread_changes_its_class() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            tell.send(this_thread()).unwrap();
            let _ = ended.recv();
        });
        let thread = told.recv().unwrap();
        assert_eq!(policy(thread), libc::SCHED_OTHER);
        set_class(thread, Class::Idle).unwrap();
        assert_eq!(policy(thread), libc::SCHED_IDLE);
        set_class(thread, Class::Normal).unwrap();
        assert_eq!(policy(thread), libc::SCHED_OTHER);
        assert_eq!(policy(this_thread()), libc::SCHED_OTHER);
        drop(end);
        other.join().unwrap();
        assert!(set_class(Thread(i32::MAX), Class::Idle).is_err());
    }
}
