//! The service manager's descriptor store: it holds both groups, so that accesses wait even while no
//! process of ours is left (`sd_pid_notify_with_fds(3)`, `FileDescriptorStoreMax=`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use sd_notify::NotifyState;

use crate::sys::fanotify::Group;
use crate::sys::permission::PermissionGroup;
use crate::sys::process;

const PERMISSION: &str = "hsmd-permission";
const EVENTS: &str = "hsmd-events";

/// Both groups of an hsmd that was killed.
pub struct Stored {
    /// Accesses wait in it.
    pub group: PermissionGroup,
    /// Of changes.
    pub events: Group,
}

/// What the service manager has kept since an hsmd that was killed.
pub fn take() -> Option<Stored> {
    let (mut group, mut events) = (None, None);
    for (number, name) in sd_notify::listen_fds_with_names().ok()? {
        let inherited = process::inherit(number).and_then(|fd| match name.as_str() {
            PERMISSION => process::above_others(&fd),
            _ => Ok(fd),
        });
        let fd: OwnedFd = match inherited {
            Ok(fd) => fd,
            Err(error) => {
                tracing::warn!(%error, "what the service manager has kept cannot be used");
                continue;
            }
        };
        match name.as_str() {
            PERMISSION => group = Some(fd),
            EVENTS => events = Some(fd),
            // Closed.
            _ => {}
        }
    }
    Some(Stored {
        group: PermissionGroup::from_fd(group?),
        events: Group::from_fd(events?),
    })
}

/// Gives both groups to the service manager, if there is one and it keeps any.
pub fn keep(group: &PermissionGroup, events: &Group) {
    for (name, fd) in [(PERMISSION, group.as_fd()), (EVENTS, events.as_fd())] {
        tell(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd]);
    }
}

/// The filesystem is hidden: nobody needs them any more.
pub fn drop_all() {
    for name in [PERMISSION, EVENTS] {
        tell(
            &[NotifyState::FdStoreRemove, NotifyState::FdName(name)],
            &[],
        );
    }
}

fn tell(state: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) {
    let told = if fds.is_empty() {
        sd_notify::notify(state)
    } else {
        sd_notify::notify_with_fds(state, fds)
    };
    if let Err(error) = told {
        tracing::warn!(%error, "the service manager does not hear");
    }
}
