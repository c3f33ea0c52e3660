//! What happens to released files, and to what is known of them, without anybody being asked: files that are
//! cut by their path while they are recalled.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::stubs::{kib_on_disk, release_soon, wait_whole};
use hsm_tests::system::Setup;

/// Where only opening is asked about, a file can be cut by its path in the middle of a recall.
fn cut_in_a_recall(kind: Kind) {
    const SIZE: usize = 96 << 20;
    const CUT: usize = 12_345;
    let system = Setup::new(kind)
        .bytes(400 << 20)
        .with("pre_access", "false")
        .exposed()
        .start();
    let (path, bytes) = (system.at("file"), noise(1, SIZE));
    fs::write(&path, &bytes).expect("written");
    system.sync_all();
    release_soon(&system, &path);
    let reader = {
        let path = path.clone();
        thread::spawn(move || fs::read(path))
    };
    let end = Instant::now() + Duration::from_secs(30);
    while kib_on_disk(&path) < 4096 {
        assert!(Instant::now() < end, "no byte comes");
        thread::sleep(Duration::from_micros(200));
    }
    nix::unistd::truncate(&path, CUT.try_into().expect("small")).expect("cut");
    let read = reader.join().expect("the reader").expect("read");
    assert_eq!(
        read.len(),
        CUT,
        "{kind}: what was cut in the middle of a recall is back"
    );
    assert!(read == bytes[..CUT], "{kind}: what is left of it");
    wait_whole(&path);
    assert_eq!(fs::metadata(&path).expect("the file").len(), CUT as u64);
    system.sync_all();
    system.check(&format!("{kind}: cut in the middle of a recall"));
}

#[test]
fn a_file_that_is_cut_in_the_middle_of_a_recall_stays_cut_on_ext4() {
    cut_in_a_recall(Kind::Ext4);
}

#[test]
fn a_file_that_is_cut_in_the_middle_of_a_recall_stays_cut_on_xfs() {
    cut_in_a_recall(Kind::Xfs);
}
