//! Log files that other programs rename or truncate.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a log file again for appending, and creates it if it is missing.
///
/// # Errors
/// Fails if the path cannot be opened, or is no longer a file.
pub fn open_again(path: &Path) -> io::Result<File> {
    // Opening a FIFO without a reader would otherwise block the caller.
    let file = File::options().append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a regular file any more"))
    }
}
