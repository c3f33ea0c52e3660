//! The ways in which a system like this loses data without anybody noticing, and the tests that fail where it
//! does. A test that is renamed or taken out is missed here.
//!
//! The kernel lets whoever reads a file without its data have zeros, unless it was told to ask first. Most of these
//! ways are gaps between what it asks about and what people do; each was met with a real kernel.

use std::fs;
use std::path::{Path, PathBuf};

use hsm_tests::tools::tools;

/// A way to lose data.
struct Way {
    what: &'static str,
    /// Each fails where it is taken.
    tests: &'static [&'static str],
    /// Of the matrix ([`MATRIX`]), those that meet it.
    tools: &'static [&'static str],
}

/// The tests that have every tool read released files, whatever happens meanwhile.
const MATRIX: &[&str] = &[
    "every_tool_reads_released_files_on_ext4",
    "every_tool_reads_released_files_on_xfs",
    "every_tool_reads_released_files_on_btrfs",
    "the_worker_is_killed_on_ext4",
    "the_guard_is_killed_on_ext4",
    "only_opening_is_asked_about_on_ext4",
    "every_file_is_asked_about_on_ext4",
    // What the matrix itself is worth.
    "zeros_are_told_from_content_on_ext4",
    "zeros_are_told_from_content_on_btrfs",
];

const WAYS: &[Way] = &[
    Way {
        what: "What was opened or mapped before the kernel was told to ask is never asked about: neither when hsmd starts, nor when a file is released.",
        tests: &[
            "nobody_reaches_a_stub_before_it_is_asked_about",
            "what_was_left_behind_is_taken_away_before_it_is_exposed_again",
            "what_was_mounted_by_hand_meanwhile_is_not_taken_over",
            "a_filesystem_that_is_mounted_elsewhere_is_refused",
            "what_is_in_use_stays_on_ext4",
            "what_is_in_use_stays_on_xfs",
            "what_is_in_use_stays_on_btrfs",
            "all_names_of_a_file_are_released_and_recalled",
            "a_place_holder_is_no_user",
        ],
        tools: &[],
    },
    Way {
        what: "Looking for holes (SEEK_DATA, FIEMAP) is asked about by nobody, and tools that do it read nothing of a stub at all: so opening is what is asked about.",
        tests: &["only_opening_is_asked_about_on_xfs"],
        tools: &[
            "cp --sparse=auto --reflink=never",
            "tar -S",
            "bsdtar",
            "qemu-img convert",
            "lseek(SEEK_DATA), then read",
        ],
    },
    Way {
        what: "When nobody holds the group any more, all who wait go on, and read zeros.",
        tests: &[
            "a_service_manager_holds_accesses_while_nothing_of_hsmd_is_left_on_xfs",
            "a_service_manager_holds_accesses_while_nothing_of_hsmd_is_left_on_btrfs",
            "a_service_manager_guards_what_a_killed_keeper_has_exposed",
            "nobody_reads_zeros_when_the_guard_is_killed_on_ext4",
            "readers_wait_for_the_next_worker_on_ext4",
            "who_waits_goes_on_waiting_over_an_upgrade",
            "random_release_and_recall_under_kills_on_ext4",
        ],
        tools: &[],
    },
    Way {
        what: "A queue of questions that has a limit lets people go on when it is full.",
        tests: &[
            "a_long_queue_lets_nobody_pass",
            "what_runs_has_the_groups_and_signals_that_it_needs",
        ],
        tools: &[],
    },
    Way {
        what: "Answers go by the number of a descriptor: one that a dead process owed lets somebody else go on who has the same number by now.",
        tests: &[
            "what_a_dead_process_read_is_answered_before_the_next_one_reads",
            "the_guard_is_killed_on_xfs",
        ],
        tools: &[],
    },
    Way {
        what: "Where the kernel is to open files for writing to tell of them, whoever reads by a read-only mount or snapshot gets EPERM.",
        tests: &[
            "what_cannot_be_written_to_is_told_of",
            "who_reads_by_a_read_only_mount_of_ext4_gets_the_bytes",
            "released_files_of_a_snapshot_come_back",
        ],
        tools: &[],
    },
    Way {
        what: "Without a descriptor to be had the kernel cannot tell of an access, and denies it, whatever it is of.",
        tests: &[
            "a_guard_with_few_descriptors_keeps_some_for_others",
            "a_worker_without_descriptors_lets_programs_wait",
            "a_crowd_waits_and_some_of_it_is_killed",
        ],
        tools: &[],
    },
    Way {
        what: "Telling of an access breaks the leases of others, and waits for that.",
        tests: &["leases_of_users_hold_nobody_else_up"],
        tools: &[],
    },
    Way {
        what: "Cutting a file by the descriptor that came with a question is asked about again: one waits for oneself.",
        tests: &["a_released_file_comes_back_on_ext4"],
        tools: &["truncate(2) to less", "ftruncate(2) to less"],
    },
    Way {
        what: "The range that a question names is not the one that is read: appending, clones and growing mappings have another, or none.",
        tests: &["a_range_is_found_among_other_records"],
        tools: &[
            ">> (O_APPEND)",
            "cp --reflink=always (FICLONE)",
            "mmap of one page, then mremap",
        ],
    },
    Way {
        what: "Loop devices and mappings through overlays are asked about only when the file is opened.",
        tests: &[],
        tools: &[
            "losetup -r, then cat",
            "losetup --direct-io=on, then cat",
            "overlayfs, then mmap",
        ],
    },
    Way {
        what: "What is cut to nothing keeps its mark, and old bytes would come back where it grows again.",
        tests: &[
            "a_file_that_is_cut_in_the_middle_of_a_recall_stays_cut_on_ext4",
            "only_opening_is_asked_about_under_kills",
        ],
        tools: &["> (O_TRUNC)", "truncate(2) to more"],
    },
    Way {
        what: "A mark goes with a copy of a file's attributes, and whole files would be taken for stubs, or zeros for whole files.",
        tests: &[
            "a_mark_that_was_copied_is_void_on_ext4",
            "a_mark_that_was_copied_is_void_on_btrfs",
            "a_copy_of_a_stub_without_its_data_is_neither_read_nor_logged",
            "marks_that_are_taken_off_come_back_on_ext4",
        ],
        tools: &["cp -a", "bsdtar", "rsync"],
    },
    Way {
        what: "A store through a mapping into a page that is dirty already changes the data and no time.",
        tests: &[
            "stores_through_a_mapping_show_after_a_flush",
            "stores_are_found_on_ext4",
            "what_changed_since_it_was_logged_is_not_lost_on_ext4",
        ],
        tools: &["a store through mmap"],
    },
    Way {
        what: "Events that are merged lose their order, and name what has another name by now.",
        tests: &[
            "told_in_any_order",
            "with_events_lost",
            "sweeps_race_renames_on_ext4",
        ],
        tools: &[],
    },
    Way {
        what: "Subvolumes of btrfs: a watch set in one sees only it, and a snapshot's files have the numbers of others.",
        tests: &[
            "what_cannot_be_watched_says_why",
            "btrfs_is_seen_whole_through_a_subvolume",
            "btrfs_subvolumes_have_handles_of_their_own",
            "released_files_of_a_snapshot_come_back",
        ],
        tools: &[],
    },
    Way {
        what: "A directory whose files are not asked about does not ask about a stub that is moved into it.",
        tests: &["a_stub_that_is_moved_among_whole_files_is_asked_about"],
        tools: &["mv on the same filesystem"],
    },
    Way {
        what: "A punch up to the file's end leaves blocks behind it.",
        tests: &[
            "a_punch_gives_back_what_lies_behind_the_end_too",
            "a_released_file_comes_back_on_xfs",
        ],
        tools: &[],
    },
    Way {
        what: "Who comes between the lease and the kernel's being told to ask is not asked.",
        tests: &[
            "who_comes_right_before_the_punch_waits_for_the_recall",
            "who_opens_while_it_is_released_never_reads_zeros",
        ],
        tools: &[],
    },
    Way {
        what: "A lease that somebody waits for ends by itself, though nobody gave it back; and its holder gets a signal that kills.",
        tests: &[
            "a_lease_that_somebody_waits_for_does_not_hold",
            "who_comes_while_release_has_its_lease_keeps_the_file",
            "what_runs_has_the_groups_and_signals_that_it_needs",
        ],
        tools: &[],
    },
    Way {
        what: "Whoever has a lease on a file holds up who is to be told of it, and with as many leases as there are readers everybody.",
        tests: &[
            "a_lease_holds_nobody_up_who_comes_at_the_same_time",
            "leases_of_users_hold_nobody_else_up",
        ],
        tools: &[],
    },
    Way {
        what: "A file that is not asked about stays so when its data is taken away; and one that is being written to cannot be made so without a flag.",
        tests: &[
            "what_is_ignored_stays_so_until_it_is_taken_back",
            "who_has_a_file_ignored_while_it_is_released_hides_nothing",
            "a_file_that_was_ignored_is_asked_about_again_when_it_is_released",
            "who_opens_where_every_file_is_asked_about_never_reads_zeros",
        ],
        tools: &[],
    },
    Way {
        what: "What hsmd itself reads it is not asked about: a stub's zeros would be logged as a new version.",
        tests: &[
            "a_released_file_comes_back_on_ext4",
            "a_released_file_comes_back_on_btrfs",
            "random_release_and_recall_on_ext4",
            "the_power_fails_at_every_step_on_ext4",
        ],
        tools: &[],
    },
    Way {
        what: "An inode that cannot be read looks deleted: it would be logged as that, or nobody asked about it any more.",
        tests: &[
            "a_stub_that_cannot_be_read_for_a_while_stays_guarded",
            "a_directory_that_cannot_be_read_is_not_gone",
            "a_filesystem_that_was_shut_down_is_not_empty",
            "stubs_of_a_disk_that_was_set_back_are_guarded",
        ],
        tools: &[],
    },
    Way {
        what: "Reading the group fails for a single access, too, and whoever ended for that would let all others go on.",
        tests: &[
            "an_access_that_cannot_be_told_of_is_the_only_one",
            "a_guard_with_few_descriptors_keeps_some_for_others",
        ],
        tools: &[],
    },
    Way {
        what: "An error that the kernel does not take for an answer leaves the program waiting for ever.",
        tests: &[
            "every_errno_is_an_answer",
            "only_errors_that_the_kernel_takes_are_given",
            "a_full_disk_leaves_the_stub_whole_on_ext4",
        ],
        tools: &[],
    },
    Way {
        what: "A program does not run while somebody has its file open for writing: recall has closed it by then.",
        tests: &["a_recalled_program_runs_on_over_a_restart"],
        tools: &["exec of a binary", "exec of a script"],
    },
    Way {
        what: "A new file whose opening is denied is there all the same, and empty.",
        tests: &["a_new_file_that_nobody_let_open_is_empty_and_can_be_written"],
        tools: &[],
    },
    Way {
        what: "Guard and worker wait for each other where both have more to say than the links between them take.",
        tests: &[
            "a_crowd_that_no_link_takes_is_served_in_the_end",
            "a_full_link_is_not_waited_for",
            "a_user_has_so_many_programs_that_wait",
        ],
        tools: &[],
    },
    Way {
        what: "What is looked at and what is punched are two files, where another comes to have the name in between.",
        tests: &[
            "what_lies_in_a_new_directory_while_another_is_released_stays_whole",
            "what_is_saved_over_a_file_while_it_is_released_stays_whole",
        ],
        tools: &[],
    },
    Way {
        what: "A signal that a waiting program handles could end the wait, with less than all bytes.",
        tests: &["handled_signals_shorten_no_wait"],
        tools: &[],
    },
];

fn sources(dir: &Path, list: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, list);
        } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with(file!()) {
            list.push(path);
        }
    }
}

/// All sources of the workspace but this one.
fn all_sources() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut list = Vec::new();
    for name in ["hsmd", "tests", "tierfs", "media", "replay", "policies"] {
        sources(&root.join(name), &mut list);
    }
    assert!(list.len() > 100, "only {} sources", list.len());
    let text = |path: &PathBuf| fs::read_to_string(path).expect("a source");
    list.iter().map(text).collect::<Vec<_>>().join("\n")
}

/// Whether a test of this name is there: a function with that attribute, or one that a macro makes of its name.
fn is_test(sources: &str, name: &str) -> bool {
    let function = format!("fn {name}()");
    let made = format!(" {name}: ");
    let is_marked = |(at, _): (usize, &str)| {
        let before = sources[..at].trim_end().rsplit('\n');
        let mut attributes = before.take_while(|line| line.trim_start().starts_with('#'));
        attributes.any(|line| line.trim() == "#[test]")
    };
    sources.match_indices(&function).any(is_marked)
        || sources
            .lines()
            .any(|line| line.contains(&made) && line.ends_with(';'))
}

#[test]
fn every_way_to_lose_data_has_its_tests() {
    let sources = all_sources();
    let tools: Vec<&str> = tools().iter().map(|tool| tool.name).collect();
    let mut missing = Vec::new();
    let mut look = |test: &str, what: &str| {
        if !is_test(&sources, test) {
            missing.push(format!("the test {test}: {what}"));
        }
    };
    for test in MATRIX {
        look(test, "the tools on released files");
    }
    for way in WAYS {
        assert!(
            way.tests.len() + way.tools.len() > 0,
            "no test: {}",
            way.what
        );
        for test in way.tests {
            look(test, way.what);
        }
    }
    for way in WAYS {
        for tool in way.tools {
            if !tools.contains(tool) {
                missing.push(format!("the tool {tool:?}: {}", way.what));
            }
        }
    }
    assert!(missing.is_empty(), "missing:\n{}", missing.join("\n"));
}

#[test]
fn tests_that_are_not_there_are_missed() {
    let sources = all_sources();
    assert!(is_test(&sources, "every_errno_is_an_answer"));
    assert!(is_test(&sources, "random_release_and_recall_on_ext4"));
    assert!(!is_test(&sources, "nobody_wrote_this_one"));
    // A function, and no test.
    assert!(!is_test(&sources, "raise_open_files"));
}
