//! Support for the tests of the whole system: real filesystems, the daemon, workloads, and a
//! comparison that shares no code with what it checks.

pub mod changes;
pub mod compare;
pub mod guarded;
pub mod home;
pub mod loopfs;
pub mod power;
pub mod program;
pub mod report;
pub mod shadow;
pub mod strace;
pub mod stubs;
pub mod sys;
pub mod system;
pub mod tools;
pub mod waiting;
pub mod workload;
