//! `samepage events`: prints a line for each event.

use std::io;
use std::ops::ControlFlow;

use samepage_api_types::events::{Event, Happening};
use samepage_text::counted::counted;

use super::args::EventsArgs;
use super::client;
use super::table::mebibytes;

pub(super) fn follow(args: &EventsArgs) -> anyhow::Result<()> {
    let path = args.since.map_or_else(|| "/events".to_owned(), |since| format!("/events?since={since}"));
    let mut lines = Lines::default();
    let mut failed = None;
    client(&args.connection).stream(&path, |bytes| {
        for data in lines.take(bytes) {
            let text = if args.connection.json { Some(data) } else { tell(&data) };
            if let Some(text) = text
                && let Err(error) = write(&(text + "\n"))
            {
                failed = Some(error);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    match failed {
        // If the reader closes the output, it has what it needs.
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn write(text: &str) -> io::Result<()> {
    use io::Write;
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// Assembles lines and extracts their data.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        let text = String::from_utf8_lossy(&whole);
        text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

/// Returns an event as text, or `None` for an unknown event.
fn tell(data: &str) -> Option<String> {
    let Event { id, what, .. } = serde_json::from_str(data).ok()?;
    let text = match what {
        Happening::State { vm, state, reason: None } => format!("VM {vm} is {}", state.name()),
        Happening::State { vm, state, reason: Some(reason) } => {
            format!("VM {vm} is {}: {reason}", state.name())
        }
        Happening::Crash { vm, report } => format!("VM {vm} crashed: {report}"),
        Happening::Deleted { vm } => format!("VM {vm} is deleted"),
        Happening::Disk { vm, disk, message } => format!("VM {vm}: disk {disk}: {message}"),
        Happening::Balloon { vm, size_bytes } => {
            format!("VM {vm}: its balloon has {}, as was asked for", mebibytes(size_bytes))
        }
        Happening::Adopted { vm, state, worker } => {
            format!("VM {vm} was adopted, and is {} (worker process {worker})", state.name())
        }
        Happening::Left { worker, message } => format!("worker process {worker} is left alone: {message}"),
        Happening::Limit { message } | Happening::Memory { message, .. } => message,
        Happening::Missed { count } => format!("{} missing here", counted(count, "event")),
    };
    Some(format!("{id:>6}  {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_in_words_however_they_come() {
        let text = "id: 3\nevent: state\ndata: {\"id\":3,\"time_seconds\":1.0,\"event\":\"state\",\
                    \"vm\":\"a\",\"state\":\"paused\"}\n\n: nothing new\n\n";
        let mut lines = Lines::default();
        let data: Vec<_> = text.as_bytes().chunks(7).flat_map(|part| lines.take(part)).collect();
        assert_eq!(data.len(), 1);
        assert_eq!(tell(&data[0]).as_deref(), Some("     3  VM a is paused"));
        assert_eq!(tell("{\"event\":\"unheard of\"}"), None);
    }
}
