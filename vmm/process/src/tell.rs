//! Messages to the user, on standard error.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};

/// Prints one line. If standard error is closed, the message is lost and VMs continue.
pub fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "samepage: {text}");
}

/// Returns an error and its causes, outermost first. Causes that the message of an error already contains are
/// omitted. If a cause is a lack of open files, a hint is appended.
pub fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    let errno = |cause: &(dyn Error + 'static)| cause.downcast_ref::<io::Error>()?.raw_os_error();
    if error.chain().any(|cause| errno(cause) == Some(libc::EMFILE)) && !text.contains("ulimit -n") {
        text.push_str("; raise the limit of open files (ulimit -n)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("open disk a.img: {source}")]
    struct TellsItsCause {
        source: io::Error,
    }

    #[test]
    fn a_cause_is_told_once() {
        let source = io::Error::other("no such file");
        let error = anyhow::Error::new(TellsItsCause { source }).context("start the VM");
        assert_eq!(causes(&error), "start the VM: open disk a.img: no such file");
    }

    #[test]
    fn who_runs_out_of_files_is_told_what_to_raise() {
        let error = anyhow::Error::new(TellsItsCause { source: io::Error::from_raw_os_error(libc::EMFILE) });
        assert_eq!(causes(&error).matches("; raise the limit of open files (ulimit -n)").count(), 1);
    }
}
