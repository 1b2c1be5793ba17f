//! The options for publishing page flags instead of running commands.

use std::time::Duration;

/// The action of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Publish for ever.
    Serve,
    /// Publish once.
    Once,
    /// Publish once, and compare with the kernel's flags.
    Check,
}

/// The parsed options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The action.
    pub action: Action,
    /// The time between two passes.
    pub interval: Option<Duration>,
    /// Print a line for each pass.
    pub verbose: bool,
}

/// Parses options. Returns `None` if the first argument is a command instead.
///
/// # Errors
/// Fails with a sentence about the invalid option.
pub fn parse(arguments: &[String]) -> Result<Option<Options>, String> {
    if !arguments.first().is_some_and(|first| first.starts_with('-')) {
        return Ok(None);
    }
    let mut options = Options { action: Action::Serve, interval: None, verbose: false };
    let mut arguments = arguments.iter().map(String::as_str);
    while let Some(argument) = arguments.next() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (argument, None),
        };
        match (name, value) {
            ("--publish", None) => options.action = Action::Serve,
            ("--once", None) => options.action = Action::Once,
            ("--check", None) => options.action = Action::Check,
            ("-v" | "--verbose", None) => options.verbose = true,
            ("--interval", value) => {
                let value = value.or_else(|| arguments.next()).unwrap_or_default();
                let seconds = value.parse().ok().filter(|&seconds: &f64| seconds > 0.0);
                let interval = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                options.interval =
                    Some(interval.ok_or_else(|| format!("{value:?} is not an interval in seconds"))?);
            }
            _ => return Err(format!("there is no option {argument:?}")),
        }
    }
    Ok(Some(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Option<Options>, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_read() {
        let serve = Options { action: Action::Serve, interval: None, verbose: false };
        assert_eq!(parsed("fill:1M:1"), Ok(None));
        assert_eq!(parsed("--publish"), Ok(Some(serve)));
        assert_eq!(parsed("--once -v"), Ok(Some(Options { action: Action::Once, verbose: true, ..serve })));
        let interval = Some(Duration::from_millis(1500));
        assert_eq!(parsed("--interval 1.5"), Ok(Some(Options { interval, ..serve })));
        assert_eq!(
            parsed("--check --interval=1.5"),
            Ok(Some(Options { action: Action::Check, interval, ..serve }))
        );
        for wrong in [
            "--interval",
            "--interval 0",
            "--interval=x",
            "--interval -1",
            "--fnord",
            "--once=1",
            "--once fill",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
