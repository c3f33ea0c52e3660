//! What was reported durable survives a power loss: the disk as it is at that moment, without what the
//! kernel had not written yet, is mounted again.

use super::support::{MANUALS, Mounted, new_label, open, temporaries};
use super::*;
use crate::fault::testing::{Fault, inject};

fn disks() -> impl Iterator<Item = Mounted> {
    let all = [("ext4", 16), ("xfs", 300), ("btrfs", 120)];
    all.into_iter()
        .filter_map(|(kind, mib)| Mounted::new(kind, mib, &[]))
}

#[test]
fn a_label_and_objects_that_were_reported_survive() {
    for disk in disks() {
        let wanted = new_label();
        label(&disk.path(), &wanted, &MANUALS).unwrap();
        disk.lose_power();
        for i in 0..3 {
            let volume = open(&disk.path());
            assert_eq!(*volume.label(), wanted);
            let at = name(&format!("segments/{i:06}/{i:010}"));
            append(&volume, &at, &data(i, 300_000)).unwrap();
            disk.lose_power();
            let volume = open(&disk.path());
            assert_eq!(volume.list().unwrap().len() as u64, i + 1);
            assert_eq!(volume.verify(&at).unwrap().hash, hash(&data(i, 300_000)));
        }
    }
}

#[test]
fn an_object_that_was_there_already_survives() {
    for disk in disks() {
        label(&disk.path(), &new_label(), &MANUALS).unwrap();
        let content = data(1, 300_000);
        for n in 0.. {
            let at = name(&format!("segments/{n:06}/1"));
            let volume = open(&disk.path());
            let (hit, _) = inject(n, Fault::Kill, || append(&volume, &at, &content));
            // The process is killed and starts again, then the power goes.
            append(&open(&disk.path()), &at, &content).unwrap();
            disk.lose_power();
            open(&disk.path()).verify(&at).unwrap();
            if hit.is_none() {
                break;
            }
        }
    }
}

#[test]
fn power_that_is_lost_at_any_step_leaves_nothing_half() {
    for disk in disks() {
        label(&disk.path(), &new_label(), &MANUALS).unwrap();
        let content = data(1, 300_000);
        for n in 0.. {
            let at = name(&format!("segments/{n:06}/1"));
            let volume = open(&disk.path());
            let (hit, _) = inject(n, Fault::Kill, || append(&volume, &at, &content));
            disk.lose_power();
            let volume = open(&disk.path());
            for entry in volume.list().unwrap() {
                volume.verify(&entry.name).unwrap();
            }
            append(&volume, &at, &content).unwrap();
            volume.verify(&at).unwrap();
            assert!(temporaries(&disk.path()).is_empty(), "{hit:?}");
            if hit.is_none() {
                break;
            }
        }
    }
}
