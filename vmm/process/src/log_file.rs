//! Files that lines are added to for long, while others rename them or cut them short.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a log file again at its path, which is created where nothing is there. What is written goes to its
/// end.
///
/// # Errors
/// Where it cannot be opened, or something else than a file is there by now.
pub fn open_again(path: &Path) -> io::Result<File> {
    // A FIFO without a reader would hold up everything that waits for this.
    let file = File::options().append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a regular file any more"))
    }
}
