use super::*;

fn stub(file: u64) -> Stub {
    Stub {
        file: FileId::new(file).expect("not 0"),
        handle: vec![1, 0, 0, 0, 7],
    }
}

#[test]
fn the_list_is_kept_and_says_whether_it_is_complete() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = path_beside(&dir.path().join("catalog.db"));
    let mut list = Residency::open(&path).expect("a list");
    list.add(&[stub(3), stub(1), stub(2), stub(3)], 5)
        .expect("added");
    let mark = list.next_generation().expect("noted");
    assert!(!list.is_complete(&[1; 16], Some(&mark)).expect("read"));
    list.set_complete(&[1; 16], &mark).expect("noted");
    assert!(list.is_complete(&[1; 16], Some(&mark)).expect("read"));
    list.note_unmarked(stub(2));
    let next = list.prepare_to_leave().expect("noted").expect("one leaves");
    // The disk may have got it, or not.
    assert!(list.is_complete(&[1; 16], Some(&mark)).expect("read"));
    assert!(list.is_complete(&[1; 16], Some(&next)).expect("read"));
    list.leave().expect("removed");
    assert_eq!(list.prepare_to_leave().expect("nothing"), None);
    drop(list);
    let list = Residency::open(&path).expect("the same list");
    assert_eq!(list.page(None, 10).expect("read"), [stub(1), stub(3)]);
    assert_eq!(list.page(FileId::new(1), 10).expect("read"), [stub(3)]);
    assert_eq!(list.count().expect("counted"), 2);
    assert!(list.get(stub(3).file).expect("read").is_some());
    assert!(list.is_complete(&[1; 16], Some(&next)).expect("read"));
    assert!(!list.is_complete(&[1; 16], Some(&mark)).expect("set back"));
    assert!(!list.is_complete(&[1; 16], None).expect("read"));
    assert!(!list.is_complete(&[2; 16], Some(&next)).expect("read"));
}

#[test]
fn a_list_that_was_set_back_is_not_complete() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, old) = (dir.path().join("list"), dir.path().join("old"));
    let fs_uuid = [1; 16];
    let mut list = Residency::open(&path).expect("a list");
    let first = list.next_generation().expect("noted");
    list.set_complete(&fs_uuid, &first).expect("noted");
    let second = list.add(&[stub(1)], 5).expect("added");
    drop(list);
    std::fs::copy(&path, &old).expect("kept");
    let mut list = Residency::open(&path).expect("the same list");
    // A crash may have come before the disk got it.
    assert!(list.is_complete(&fs_uuid, Some(&first)).expect("read"));
    assert!(list.is_complete(&fs_uuid, Some(&second)).expect("read"));
    let third = list.add(&[stub(2)], 6).expect("added");
    for mark in [&first, &second, &third] {
        assert!(list.is_complete(&fs_uuid, Some(mark)).expect("read"));
    }
    list.note_unmarked(stub(1));
    let fourth = list.prepare_to_leave().expect("noted").expect("one leaves");
    let fifth = list.add(&[stub(3)], 7).expect("added meanwhile");
    list.leave().expect("removed");
    for (mark, known) in [(&third, false), (&fourth, true), (&fifth, true)] {
        assert_eq!(list.is_complete(&fs_uuid, Some(mark)).expect("read"), known);
    }
    drop(list);
    std::fs::rename(&old, &path).expect("set back");
    let mut list = Residency::open(&path).expect("an old list");
    assert!(!list.is_complete(&fs_uuid, Some(&fifth)).expect("read"));
    // What happens before every file has been looked at makes it no better.
    list.set_incomplete().expect("noted");
    let sixth = list.add(&[stub(4)], 8).expect("added");
    assert!(!list.is_complete(&fs_uuid, Some(&sixth)).expect("read"));
    for _ in 0..2 * GENERATIONS_MAX {
        list.add(&[stub(4)], 9).expect("added again and again");
    }
    let last = list.next_generation().expect("noted");
    list.set_complete(&fs_uuid, &last).expect("noted");
    assert!(list.is_complete(&fs_uuid, Some(&last)).expect("read"));
    assert!(!list.is_complete(&fs_uuid, Some(&sixth)).expect("read"));
}

#[test]
fn what_is_released_again_stays_on_the_list() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut list = Residency::open(&dir.path().join("list")).expect("a list");
    let stubs = [stub(1), stub(2), stub(3), stub(4)];
    list.add(&stubs, 5).expect("added");
    for stub in &stubs {
        list.note_unmarked(stub.clone());
    }
    list.add(&[stub(1)], 6).expect("released before the sync");
    assert!(list.prepare_to_leave().expect("noted").is_some());
    list.add(&[stub(2)], 6).expect("released during the sync");
    list.note_unmarked(stub(2));
    list.leave().expect("left");
    assert_eq!(list.page(None, 9).expect("read"), [stub(1), stub(2)]);
    assert!(list.has_leaving());
    let other = Stub {
        handle: vec![9],
        ..stub(1)
    };
    list.note_unmarked(other);
    list.note_unmarked(stub(2));
    assert!(list.prepare_to_leave().expect("noted").is_some());
    list.leave().expect("removed");
    assert_eq!(list.page(None, 9).expect("read"), [stub(1)]);
}

#[test]
fn what_was_found_flows_back_and_what_was_released_does_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("list");
    let mut list = Residency::open(&path).expect("a list");
    list.keep_for(&[1; 16]).expect("noted");
    assert!(!list.wants_refill().expect("read"));
    let end = Lsn::new(7).expect("a number");
    list.add(&[stub(6)], 4).expect("of the disk before");
    list.take_over(&[1; 16], end).expect("noted");
    assert_eq!(list.page(None, 9).expect("read"), []);
    list.add(&[stub(2)], 5)
        .expect("released before it was found");
    let found = [stub(1), stub(2), stub(3), stub(4), stub(5)];
    list.add_found(&found).expect("added");
    list.add(&[stub(3)], 6).expect("whole, and released");
    list.note_unmarked(stub(4));
    list.pass_over(&[stub(5).file], 7).expect("noted");
    drop(list);
    let mut list = Residency::open(&path).expect("the same list");
    list.keep_for(&[1; 16]).expect("the same");
    assert!(list.wants_refill().expect("read"));
    let left = [stub(1).file, stub(4).file];
    assert_eq!(list.found(None, 9).expect("read"), left);
    assert_eq!(list.found(Some(left[0]), 9).expect("read"), left[1..]);
    assert_eq!(list.found(None, 1).expect("read"), left[..1]);
    assert_eq!(list.count_found().expect("counted"), 2);
    list.note_unmarked(stub(4));
    assert_eq!(list.count_found().expect("counted"), 1);
    assert_eq!(list.get_found(left[1]).expect("read"), None);
    assert_eq!(list.get_found(left[0]).expect("read"), Some(stub(1)));
    assert_eq!(list.get_found(stub(2).file).expect("read"), None);
    list.add_found(&[stub(5)]).expect("found once more");
    assert_eq!(list.get_found(stub(5).file).expect("read"), None);
    list.end_refill().expect("noted");
    assert!(!list.wants_refill().expect("read"));
    assert_eq!(list.taken_over().expect("read"), Some(end));
    list.take_over(&[1; 16], end).expect("noted");
    assert!(list.wants_refill().expect("read"));
    list.keep_for(&[2; 16]).expect("another disk");
    assert!(!list.wants_refill().expect("read"));
    assert_eq!(list.taken_over().expect("read"), None);
}

#[test]
fn suspects_are_on_the_list_and_no_stubs() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("list");
    let mut list = Residency::open(&path).expect("a list");
    list.add(&[stub(1), stub(2)], 5).expect("released");
    list.add_suspects(&[stub(2), stub(3), stub(4)])
        .expect("added");
    drop(list);
    let mut list = Residency::open(&path).expect("the same list");
    assert_eq!(list.count().expect("counted"), 4);
    assert_eq!(list.count_found().expect("counted"), 0);
    assert_eq!(list.suspects().expect("read"), (Some(stub(2)), 3));
    assert_eq!(list.get_suspect(stub(1).file).expect("read"), None);
    assert_eq!(list.get_suspect(stub(3).file).expect("read"), Some(stub(3)));
    list.note_unmarked(stub(2));
    list.note_unmarked(stub(1));
    assert_eq!(list.get_suspect(stub(2).file).expect("read"), None);
    assert_eq!(list.suspects().expect("read"), (Some(stub(3)), 2));
    assert_eq!(list.count_stubs().expect("counted"), 2);
    list.add_found(&[stub(2), stub(1)])
        .expect("stubs after all");
    assert_eq!(list.get_found(stub(2).file).expect("read"), Some(stub(2)));
    assert_eq!(list.get_found(stub(1).file).expect("read"), None);
    list.add(&[stub(3), stub(4)], 6)
        .expect("whole, and released");
    assert_eq!(list.suspects().expect("read"), (None, 0));
}

#[test]
fn flags_are_kept_until_the_file_has_them_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("list");
    let mut list = Residency::open(&path).expect("a list");
    list.note_unsealed(&[1], 0x10).expect("noted");
    list.note_unsealed(&[1], 0x20).expect("noted");
    list.note_unsealed(&[2], 0x10).expect("noted");
    drop(list);
    let mut list = Residency::open(&path).expect("the same list");
    assert_eq!(list.seals_of(&[1]), 0x30);
    list.note_sealed(&[1]).expect("noted");
    list.note_sealed(&[3]).expect("never noted");
    assert_eq!(list.unsealed(), [(vec![2], 0x10)]);
    drop(list);
    let mut list = Residency::open(&path).expect("the same list");
    assert_eq!(list.unsealed(), [(vec![2], 0x10)]);
    list.keep_for(&[1; 16]).expect("not known before");
    list.keep_for(&[1; 16]).expect("the same");
    assert_eq!(list.seals_of(&[2]), 0x10);
    list.keep_for(&[2; 16]).expect("another disk");
    drop(list);
    let list = Residency::open(&path).expect("the same list");
    assert_eq!((list.unsealed(), list.seals_of(&[2])), (vec![], 0));
}

#[test]
fn what_is_no_list_is_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("list");
    std::fs::write(
        &path,
        b"this is not a database at all, but text of some length",
    )
    .expect("written");
    let list = Residency::open(&path).expect("a new list");
    assert_eq!(list.count().expect("counted"), 0);
    let mode = std::fs::metadata(&path).expect("the file").permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
        0o600
    );
    let mark = list.new_generation().expect("random");
    assert!(!list.is_complete(&[1; 16], Some(&mark)).expect("read"));
}

#[test]
fn access_times_only_go_forward() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut list = Residency::open(&dir.path().join("list")).expect("a list");
    let file = FileId::ROOT;
    for atime in [7, 9, 8] {
        list.set_atimes(&[(file, atime)]).expect("noted");
    }
    let found: i64 = list
        .conn
        .query_row("SELECT atime_s FROM atime WHERE file = 1", [], |row| {
            row.get(0)
        })
        .expect("read");
    assert_eq!(found, 9);
    list.set_atimes(&[(stub(5).file, 1), (stub(7).file, 1)])
        .expect("noted");
    assert_eq!(
        list.atimes_of(Some(file), 2).expect("read"),
        [stub(5).file, stub(7).file]
    );
    list.forget_atimes(&[file, stub(7).file])
        .expect("forgotten");
    assert_eq!(list.atimes_of(None, 9).expect("read"), [stub(5).file]);
    assert_eq!(list.count_atimes().expect("counted"), 1);
}
