//! The auditor: recounts from the kernel's side who maps which frame, and compares it with the
//! metadata. What it looks for first is a frame that a page still shows and the metadata has given up:
//! it would show one VM another VM's memory.

#![expect(unsafe_code, reason = "reads frames by address and the memory file's status")]

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use serde::Serialize;

use crate::engine::Engine;
use crate::engine::members::Member;
use crate::frames::store::Frame;
use crate::memory::content::{self, Page};
use crate::memory::pagemap::Entry;
use crate::memory::ram::PAGE_SIZE;

/// How many pages' entries are read at a time.
const ENTRIES: u32 = 512;
/// How many problems are described; further ones are counted.
const DESCRIBED: usize = 20;

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AuditReport {
    /// Guest pages checked.
    pub pages: u64,
    /// Frames checked.
    pub frames: u64,
    /// Guest pages that show a frame.
    pub showing: u64,
    /// Pages whose physical page was compared with the frame's; 0 where the process may not know.
    pub physically_checked: u64,
    /// Contradictions between the kernel and the metadata.
    pub problems: u64,
    /// The first of them, in words.
    pub descriptions: Vec<String>,
}

impl AuditReport {
    /// Whether the metadata is right.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.problems == 0
    }

    /// Adds what another audit found.
    pub(crate) fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.frames += other.frames;
        self.showing += other.showing;
        self.physically_checked += other.physically_checked;
        self.problems += other.problems;
        self.descriptions.extend(other.descriptions);
        self.descriptions.truncate(DESCRIBED);
    }

    fn problem(&mut self, description: impl FnOnce() -> String) {
        self.problems += 1;
        if self.descriptions.len() < DESCRIBED {
            self.descriptions.push(description());
        }
    }
}

/// One line of `/proc/self/maps` that maps guest RAM or the store.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    start: usize,
    end: usize,
    /// The frame at its start, where it maps the store.
    frame: Option<Frame>,
    private: bool,
}

impl Engine {
    /// Recounts everything. See [`AuditReport`].
    ///
    /// # Errors
    /// Fails if the page maps cannot be read.
    pub fn audit(&mut self) -> io::Result<AuditReport> {
        let mut report = AuditReport::default();
        let store = self.store.file().as_raw_fd();
        let members = self.members.iter().filter(|member| !member.space.lost());
        let processes: BTreeSet<u32> = members.map(|member| member.space.memory().process()).collect();
        let maps = processes.into_iter().map(|process| Ok((process, mappings(store, process)?)));
        let maps: HashMap<_, _> = maps.collect::<io::Result<_>>()?;
        let mut sharers: HashMap<Frame, u32> = HashMap::new();
        let mut mapped = 0;
        for member in self.members.iter().filter(|member| !member.space.lost()) {
            let mappings = &maps[&member.space.memory().process()];
            mapped += self.audit_member(member, mappings, &mut sharers, &mut report)?;
        }
        let known: u64 =
            self.members.iter().filter(|m| !m.space.lost()).map(|m| u64::from(m.space.mappings())).sum();
        // The kernel may merge a VM's mapping with a neighbour's, or keep two apart for a while.
        if mapped > known + known / 8 + 64 {
            report.problem(|| format!("guest RAM has {mapped} mappings, the books say {known}"));
        }
        self.audit_frames(&sharers, &mut report)?;
        self.audit_holes(&mut report);
        Ok(report)
    }

    fn audit_member(
        &self,
        member: &Member,
        mappings: &[Mapping],
        sharers: &mut HashMap<Frame, u32>,
        report: &mut AuditReport,
    ) -> io::Result<u64> {
        let space = &member.space;
        let pages = space.pages();
        let base = space.memory().address();
        let mut index = mappings.partition_point(|mapping| mapping.end <= base);
        let mut mapped = 0;
        let mut entries = vec![Entry::default(); ENTRIES as usize];
        let mut frames_entry = [Entry::default()];
        for start in (0..pages).step_by(ENTRIES as usize) {
            let count = ENTRIES.min(pages - start) as usize;
            space.memory().entries(start..start + count as u32, &mut entries[..count])?;
            for (page, entry) in (start..).zip(&entries[..count]) {
                let address = base + page as usize * PAGE_SIZE;
                while mappings.get(index).is_some_and(|mapping| mapping.end <= address) {
                    index += 1;
                }
                report.pages += 1;
                let Some(mapping) = mappings.get(index).filter(|mapping| mapping.start <= address) else {
                    report.problem(|| format!("page {page} at {address:#x} is not mapped"));
                    continue;
                };
                mapped += u64::from(mapping.start.max(base) == address);
                let shown = mapping.frame.map(|frame| frame + ((address - mapping.start) / PAGE_SIZE) as u32);
                if shown != space.refers(page) {
                    report.problem(|| {
                        format!("page {page} maps frame {shown:?}, the books say {:?}", space.refers(page))
                    });
                }
                if shown.is_some() && !mapping.private {
                    report.problem(|| {
                        format!("page {page} maps the frame store shared: writes would go through")
                    });
                }
                let Some(frame) = shown else {
                    if space.attached(page) {
                        report.problem(|| format!("page {page} is anonymous, the books attach it"));
                    }
                    continue;
                };
                // A private copy in swap proves nothing, and is no contradiction either.
                let left = entry.private() || entry.swapped() && !entry.file();
                if !space.attached(page) && !left {
                    report.problem(|| format!("page {page} shows frame {frame} that it has given up"));
                }
                if space.attached(page) {
                    *sharers.entry(frame).or_default() += 1;
                    if !self.store.is_live(frame) {
                        report.problem(|| format!("page {page} is attached to the free frame {frame}"));
                        continue;
                    }
                }
                if entry.present() && entry.file() {
                    report.showing += 1;
                    // SAFETY: the frame is live; the read makes its page table entry.
                    unsafe { self.store.content(frame).read_volatile() };
                    self.host.pagemap.read(self.store.content(frame).addr(), &mut frames_entry)?;
                    let (guests, stores) = (entry.physical(), frames_entry[0].physical());
                    report.physically_checked += u64::from(guests != 0);
                    if guests != stores {
                        report.problem(|| {
                            format!(
                                "page {page} shows physical page {guests:#x}, frame {frame} is {stores:#x}"
                            )
                        });
                    }
                }
            }
        }
        Ok(mapped)
    }

    fn audit_frames(&mut self, sharers: &HashMap<Frame, u32>, report: &mut AuditReport) -> io::Result<()> {
        let mut page: Page = [0; PAGE_SIZE];
        let lost = self.members.iter().any(|member| member.space.lost());
        let frames: Vec<_> = self.store.live_frames().collect();
        let live = frames.len() as u32;
        for frame in frames {
            report.frames += 1;
            let counted = sharers.get(&frame).copied().unwrap_or(0);
            let booked = self.store.sharers(frame);
            if if lost { counted > booked } else { counted != booked } {
                report.problem(|| format!("frame {frame} has {counted} sharers, the books say {booked}"));
            }
            if !self.store.is_filled(frame) {
                continue;
            }
            if self.store.kept(frame) != self.cache.index.of(frame).is_some() {
                report.problem(|| format!("frame {frame} is kept without a block, or the other way round"));
            }
            self.store.read(frame, &mut page)?;
            let (is, was) = (self.digest_of(&page), self.store.digest(frame));
            if is != was {
                report.problem(|| format!("frame {frame} has changed: digest {is:#x}, was {was:#x}"));
            }
            // SAFETY: the frame is live and both are readable.
            if !unsafe { content::equal(self.store.content(frame), page.as_ptr()) } {
                report.problem(|| format!("frame {frame} reads differently through file and mapping"));
            }
        }
        let held = self.cache.being_filled() + self.compaction.held();
        if held != self.store.held() {
            let booked = self.store.held();
            report.problem(|| format!("{booked} frames are held, {held} of them by somebody"));
        }
        if live != self.store.live() {
            let booked = self.store.live();
            report.problem(|| format!("{live} frames are live, the books say {booked}"));
        }
        Ok(())
    }

    /// Memory of the store outside live frames would be a leak.
    fn audit_holes(&mut self, report: &mut AuditReport) {
        self.store.drop_spare(&*self.host.calls);
        let (charged, live) = (self.store.charged_bytes().unwrap_or(0), u64::from(self.store.live()));
        if self.store.dead() == 0 && charged > live * PAGE_SIZE as u64 {
            let leaked = self.ownerless_with_memory().map(|frame| self.describe_ownerless(frame));
            let leaked: Vec<_> = leaked.take(LISTED_FRAMES).collect();
            report.problem(|| {
                let listed = leaked.join(", ");
                format!("the store is charged {charged} bytes for {live} frames; without owners: {listed}")
            });
        }
    }
}

impl Engine {
    /// The frames that hold memory and have no owner, as the kernel says where there is data.
    fn ownerless_with_memory(&self) -> impl Iterator<Item = Frame> + '_ {
        let mut at = 0;
        let extents = std::iter::from_fn(move || {
            let data = self.store.seek(at, libc::SEEK_DATA)?;
            at = self.store.seek(data, libc::SEEK_HOLE)?;
            let first = (data / PAGE_SIZE as u64) as u32;
            Some(Frame::new(first).run((at.div_ceil(PAGE_SIZE as u64) as u32).saturating_sub(first)))
        });
        extents.flatten().filter(|&frame| !self.store.is_live(frame))
    }

    /// Says what is in such a frame, and which pages' mappings refer to it: who touched it may be told by that.
    fn describe_ownerless(&self, frame: Frame) -> String {
        let mut page: Page = [0; PAGE_SIZE];
        let content = match self.store.read(frame, &mut page) {
            Ok(()) if page.iter().all(|&byte| byte == 0) => "zeros",
            Ok(()) => "content",
            Err(_) => "unreadable",
        };
        let pages = self.members.iter().flat_map(|member| {
            let space = &member.space;
            let refers = move |&page: &u32| space.refers(page) == Some(frame);
            space.backing().on_frames().runs_within(0..space.pages()).flatten().filter(refers)
        });
        let pages: Vec<_> = pages.collect();
        format!("frame {frame} ({content}, left by pages {pages:?})")
    }
}

/// Frames that are listed of those that hold memory and have no owner.
const LISTED_FRAMES: usize = 8;

/// The private and store mappings of a process, by address.
fn mappings(store: i32, process: u32) -> io::Result<Vec<Mapping>> {
    let link = fs::read_link(format!("/proc/self/fd/{store}"))?;
    let inode = {
        let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: writes one struct that is ours; it is initialised where the call succeeds.
        if unsafe { libc::fstat(store, status.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above succeeded.
        unsafe { status.assume_init() }.st_ino
    };
    let name = link.to_string_lossy().into_owned();
    let name = name.trim_end_matches(" (deleted)").to_owned();
    let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
    Ok(maps.lines().filter_map(|line| parse(line, &name, inode)).collect())
}

/// Parses `start-end perms offset dev inode path`.
fn parse(line: &str, store_name: &str, store_inode: u64) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let inode: u64 = fields.nth(1)?.parse().ok()?;
    let stores = inode == store_inode && fields.next().is_some_and(|path| path.starts_with(store_name));
    Some(Mapping {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        frame: stores.then_some(Frame::new((offset / PAGE_SIZE as u64) as u32)),
        private: permissions.ends_with('p'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lines_of_the_map() {
        let store = "7f00-9f00 rw-p 00003000 00:01 77   /memfd:samepage-frames (deleted)";
        let parsed = parse(store, "/memfd:samepage-frames", 77).unwrap();
        assert_eq!(
            (parsed.start, parsed.end, parsed.frame, parsed.private),
            (0x7f00, 0x9f00, Some(Frame::new(3)), true)
        );
        let other = parse("1000-2000 rw-p 00000000 00:00 0 ", "/memfd:samepage-frames", 77).unwrap();
        assert_eq!((other.frame, other.private), (None, true));
    }
}
