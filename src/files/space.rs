//! Free space on disks.

use std::path::Path;

/// The bytes that may still be written to the file system of `folder`; `None` when it does not say.
#[cfg(unix)]
pub fn free_space(folder: &Path) -> Option<u64> {
    let space = rustix::fs::statvfs(folder).ok()?;
    space.f_bavail.checked_mul(space.f_frsize)
}

/// The bytes that may still be written to the file system of `folder`: not asked for on this system.
#[cfg(not(unix))]
pub fn free_space(_folder: &Path) -> Option<u64> {
    None
}
