//! Hashing a file as the medium has it.
//!
//! The page cache would give back what was just written to it, whatever reached the medium. So the
//! cache of the file is dropped, and it is read with direct I/O where the filesystem can do that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::PosixFadviseAdvice;

/// Enough for the largest block size of any disk.
const ALIGNMENT: usize = 64 * 1024;
const CHUNK: usize = 2 * 1024 * 1024;

/// Length and BLAKE3 of `file`; `direct` is the same file opened with `O_DIRECT`, if that worked.
pub(crate) fn hash(file: &File, direct: Option<File>) -> io::Result<(u64, [u8; 32])> {
    drop_cache(file);
    let mut room = vec![0u8; CHUNK + ALIGNMENT];
    let skip = room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let buf = &mut room[skip..skip + CHUNK];
    let mut direct = direct;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0u64;
    loop {
        // Direct reads must begin at whole blocks: a short one is the end, or the last direct one.
        if !at.is_multiple_of(ALIGNMENT as u64) {
            direct = None;
        }
        let read = match &direct {
            Some(file) => file.read_at(buf, at),
            None => file.read_at(buf, at),
        };
        match read {
            Ok(0) => break,
            Ok(n) => {
                hasher.update(&buf[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && direct.is_some() => direct = None,
            Err(e) => return Err(e),
        }
    }
    drop_cache(file);
    Ok((at, *hasher.finalize().as_bytes()))
}

/// Asks the kernel to forget the clean pages of a file. It is advice: it may keep them.
fn drop_cache(file: &File) {
    let _ = nix::fcntl::posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn every_length_around_the_block_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for bytes in [
            0,
            1,
            511,
            512,
            4095,
            4096,
            4097,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            3 * CHUNK + 77,
        ] {
            let data: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let mut file = File::create(&path).unwrap();
            file.write_all(&data).unwrap();
            file.sync_all().unwrap();
            let want = (bytes as u64, *blake3::hash(&data).as_bytes());
            let file = File::open(&path).unwrap();
            assert_eq!(hash(&file, None).unwrap(), want);
            let direct = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path);
            assert_eq!(hash(&file, direct.ok()).unwrap(), want);
        }
    }
}
