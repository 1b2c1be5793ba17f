//! `samepage report`: one file of HTML that shows a run, from its statistics or from a process that runs; and
//! in [`types`] what guests use their pages for.

mod frame;
mod live;
mod statistics;
mod types;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, bail};
use samepage_web as web;
use serde::Serialize;
use serde_json::Value;

use super::args::{ReportArgs, ReportCommand};
use frame::{Frame, Line};
use samepage_process::tell::tell;

/// What the page shows.
#[derive(Debug, Default, Serialize)]
struct Run {
    title: String,
    #[serde(rename = "where")]
    place: String,
    /// The line over time.
    frames: Vec<Line>,
    /// All that is known of the moment with the most VMs, the last such.
    state: Option<Frame>,
    /// The memory of VMs at the end, as the API gives it.
    maps: BTreeMap<String, Value>,
}

pub(super) fn main(args: &ReportArgs) -> anyhow::Result<()> {
    if let Some(ReportCommand::Types(args)) = &args.of {
        return types::main(args);
    }
    let Some(output) = &args.output else { bail!("name the file to write with --output FILE") };
    let run = match (&args.stats, &args.socket) {
        (Some(file), _) => statistics::read(file)?,
        (None, Some(socket)) => live::watch(socket, args.seconds)?,
        (None, None) => bail!("name what to report: --stats FILE, or --socket PATH of a running process"),
    };
    let page = web::alone(&run.title, &run).context("write the report")?;
    if output == Path::new("-") {
        return super::print(&page);
    }
    write(output, page.as_bytes()).with_context(|| format!("write the report {}", output.display()))?;
    tell(format_args!("the report is {}", output.display()));
    Ok(())
}

/// Writes a file as a whole, or not at all.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let partial = folder.join(format!(".{name}.{}", std::process::id()));
    let written = fs::File::create(&partial)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // It may not have been made.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// Moments of all of a run, few enough to be drawn.
#[derive(Debug)]
struct Thinned<T> {
    kept: Vec<T>,
    /// Of so many moments one is kept.
    every: usize,
    seen: usize,
    /// The last one, where it is not among those that are kept.
    last: Option<T>,
}

/// Moments that are kept: less than this, and more than half of it.
const MOST_MOMENTS: usize = 1200;

impl<T> Default for Thinned<T> {
    fn default() -> Self {
        Self { kept: Vec::new(), every: 1, seen: 0, last: None }
    }
}

impl<T> Thinned<T> {
    fn add(&mut self, moment: T) {
        if self.seen.is_multiple_of(self.every) {
            self.kept.push(moment);
            self.last = None;
        } else {
            self.last = Some(moment);
        }
        self.seen += 1;
        if self.kept.len() >= MOST_MOMENTS {
            // Every other one; the newest is the last for now, if it is not among them.
            let all = std::mem::take(&mut self.kept);
            for (at, moment) in all.into_iter().enumerate() {
                if at % 2 == 0 {
                    self.kept.push(moment);
                    self.last = None;
                } else {
                    self.last = Some(moment);
                }
            }
            self.every *= 2;
        }
    }

    /// The one that was added last.
    fn newest(&self) -> Option<&T> {
        self.last.as_ref().or(self.kept.last())
    }

    /// From the first to the last.
    fn finish(mut self) -> Vec<T> {
        self.kept.extend(self.last);
        self.kept
    }
}

/// The line over time, and the moment that is shown in full.
#[derive(Debug, Default)]
struct Moments {
    lines: Thinned<Line>,
    state: Option<Frame>,
}

impl Moments {
    fn add(&mut self, frame: Frame) {
        self.lines.add(frame.line.clone());
        if self.state.as_ref().is_none_or(|state| state.vms.len() <= frame.vms.len()) {
            self.state = Some(frame);
        }
    }

    /// The moments of a run.
    fn finish(self, title: String, place: String) -> Run {
        Run { title, place, frames: self.lines.finish(), state: self.state, maps: BTreeMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(time: f64, vms: usize) -> Frame {
        let vm = |index| frame::VmFrame { name: format!("vm-{index}"), ..frame::VmFrame::default() };
        Frame { line: Line { time, ..Line::default() }, vms: (0..vms).map(vm).collect(), ..Frame::default() }
    }

    #[test]
    fn a_long_run_is_shown_from_its_start_to_its_end() {
        let mut moments = Moments::default();
        (0..100_000).for_each(|second| moments.add(frame(f64::from(second), 0)));
        let run = moments.finish(String::new(), String::new());
        assert!((600..=1201).contains(&run.frames.len()), "{}", run.frames.len());
        assert_eq!((run.frames[0].time, run.frames.last().unwrap().time), (0.0, 99_999.0));
        assert!(run.frames.windows(2).all(|pair| pair[0].time < pair[1].time));
    }

    #[test]
    fn the_state_is_that_of_the_moment_with_the_most_vms() {
        let mut moments = Moments::default();
        [0, 2, 4, 4, 1].into_iter().zip(0..).for_each(|(vms, time)| moments.add(frame(f64::from(time), vms)));
        let run = moments.finish(String::new(), String::new());
        assert_eq!((run.state.unwrap().line.time, run.frames.len()), (3.0, 5));
    }

    #[test]
    fn a_file_is_written_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.html");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write(&folder.path().join("none/a.html"), b"x").is_err());
        assert!(write(Path::new("/"), b"x").is_err());
    }
}
