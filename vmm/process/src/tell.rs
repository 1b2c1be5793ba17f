//! What the program says to its user, on standard error.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};

/// Says one line. Who has closed standard error does not hear it, and the VMs run on.
pub fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "samepage: {text}");
}

/// An error and its causes, outermost first. Errors of libraries tell their causes themselves; such
/// a cause is not told again. Files run out anywhere, so what helps against that is said here.
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
