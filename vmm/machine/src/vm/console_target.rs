//! Opens what a guest's console is written to.

use std::io::{self, Write};

use vmm_sys_util::eventfd::EventFd;

use super::VmError;
use crate::config::ConsoleConfig;
use crate::console::{CopySink, FileSink, Log, PrefixSink};

/// Opens the target of the console, and returns its file if that can be opened again.
pub(super) fn open(
    console: ConsoleConfig,
    vm: &str,
    closing: &EventFd,
) -> Result<(Box<dyn Write + Send>, Option<Log>), VmError> {
    let failed = |path: &str| {
        let path = path.to_owned();
        |source| VmError::Console { path, source }
    };
    let sink: Box<dyn Write + Send> = match console {
        ConsoleConfig::Stdio => Box::new(FileSink::stdout(closing).map_err(failed("standard output"))?),
        ConsoleConfig::PrefixedStdio => {
            let out = FileSink::stdout(closing).map_err(failed("standard output"))?;
            Box::new(PrefixSink::new(vm, out))
        }
        ConsoleConfig::File(path) => {
            let sink = FileSink::create(&path, closing).map_err(failed(&path.display().to_string()))?;
            let log = sink.log(&path);
            return Ok((Box::new(sink), log));
        }
        ConsoleConfig::Off => Box::new(io::sink()),
        ConsoleConfig::Copied { to, copy } => {
            let (to, log) = open(*to, vm, closing)?;
            return Ok((Box::new(CopySink::new(copy, to)), log));
        }
        ConsoleConfig::Sink(sink) => sink,
    };
    Ok((sink, None))
}
