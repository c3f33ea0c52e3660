//! The few fields of on-disk superblocks that no system call gives: the UUID on older kernels, and
//! ext4's inode size.
//!
//! Sources: the kernel's `fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h` and
//! `include/uapi/linux/btrfs_tree.h`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use super::{Error, io};

const EXT4_OFFSET: usize = 1024;
const EXT4_MAGIC: std::ops::Range<usize> = 0x438..0x43a;
const EXT4_REVISION: usize = 0x44c;
const EXT4_INODE_SIZE: usize = 0x458;
const EXT4_UUID: usize = 0x468;
const XFS_MAGIC: &[u8] = b"XFSB";
const XFS_UUID: usize = 32;
const BTRFS_OFFSET: usize = 0x1_0000;
const BTRFS_MAGIC: &[u8] = b"_BHRfS_M";
/// Enough for the furthest of the three.
const READ_BYTES: usize = BTRFS_OFFSET + 0x60;
/// The inode size before it was configurable.
const EXT4_OLD_INODE_BYTES: u16 = 128;

/// What a superblock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// The kernel's name of the filesystem's type.
    pub fs_type: &'static str,
    /// The filesystem's UUID.
    pub uuid: [u8; 16],
    /// ext4 only: bytes of an inode.
    pub ext4_inode_bytes: Option<u16>,
}

/// Reads it from a block device (or image). `None`: it is not ext4, XFS or btrfs.
pub fn read(device: &Path) -> Result<Option<Superblock>, Error> {
    let file =
        File::open(device).map_err(|e| Error::call("open", device.display().to_string(), e))?;
    let mut bytes = vec![0; READ_BYTES];
    let length = io::read_at(file.as_fd(), &mut bytes, 0)?;
    bytes.truncate(length);
    Ok(parse(&bytes))
}

/// Parses the first bytes of a device.
pub fn parse(bytes: &[u8]) -> Option<Superblock> {
    let uuid = |offset: usize| bytes.get(offset..offset + 16)?.try_into().ok();
    if bytes.starts_with(XFS_MAGIC) {
        return Some(Superblock {
            fs_type: "xfs",
            uuid: uuid(XFS_UUID)?,
            ext4_inode_bytes: None,
        });
    }
    let btrfs = bytes.get(BTRFS_OFFSET + 0x40..BTRFS_OFFSET + 0x48);
    if btrfs == Some(BTRFS_MAGIC) {
        return Some(Superblock {
            fs_type: "btrfs",
            uuid: uuid(BTRFS_OFFSET + 0x20)?,
            ext4_inode_bytes: None,
        });
    }
    if bytes.get(EXT4_MAGIC) != Some(&[0x53, 0xef]) {
        return None;
    }
    let revision = u32::from_le_bytes(bytes.get(EXT4_REVISION..)?.first_chunk().copied()?);
    let size = u16::from_le_bytes(bytes.get(EXT4_INODE_SIZE..)?.first_chunk().copied()?);
    Some(Superblock {
        fs_type: "ext4",
        uuid: uuid(EXT4_UUID)?,
        ext4_inode_bytes: Some(if revision == 0 {
            EXT4_OLD_INODE_BYTES
        } else {
            size
        }),
    })
}

const _: () = assert!(EXT4_UUID == EXT4_OFFSET + 0x68);
