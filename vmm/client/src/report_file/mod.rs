//! `samepage report`: an HTML file that shows a run, from its statistics or from a running process. [`types`]
//! reports what guests use their pages for.

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

/// The page's data.
#[derive(Debug, Default, Serialize)]
struct Run {
    title: String,
    #[serde(rename = "where")]
    place: String,
    /// The chart over time.
    frames: Vec<Line>,
    /// The complete state at the moment with the most VMs, or the last of several such moments.
    state: Option<Frame>,
    /// Maps of the VMs' memory at the end, in the API's form.
    maps: BTreeMap<String, Value>,
}

pub(super) fn main(args: &ReportArgs) -> anyhow::Result<()> {
    if let Some(ReportCommand::Types(args)) = &args.of {
        return types::main(args);
    }
    let Some(output) = &args.output else { bail!("name the file to write with --output FILE") };
    let run = match &args.stats {
        Some(file) => statistics::read(file)?,
        None => live::watch(&args.socket.client(), args.seconds)?,
    };
    let page = web::alone(&run.title, &run).context("write the report")?;
    if output == Path::new("-") {
        return super::print(&page);
    }
    write(output, page.as_bytes()).with_context(|| format!("write the report {}", output.display()))?;
    tell(format_args!("the report is {}", output.display()));
    Ok(())
}

/// Writes a file completely, or not at all.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let partial = folder.join(format!(".{name}.{}", std::process::id()));
    let written = fs::File::create(&partial)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // The partial file may not exist.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// A sample of a run's moments that is small enough to draw.
#[derive(Debug)]
struct Thinned<T> {
    kept: Vec<T>,
    /// The sample keeps one of this number of moments.
    every: usize,
    seen: usize,
    /// The last moment, if the sample does not keep it.
    last: Option<T>,
}

/// Upper limit for kept moments. After thinning, more than half of it remain.
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
            // Keep every other moment. The newest becomes the last moment, unless the sample keeps it.
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

    /// Returns the latest moment.
    fn newest(&self) -> Option<&T> {
        self.last.as_ref().or(self.kept.last())
    }

    /// Returns the moments in order.
    fn finish(mut self) -> Vec<T> {
        self.kept.extend(self.last);
        self.kept
    }
}

/// The chart over time, and the moment with the complete state.
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

    /// Returns the data of a run.
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
