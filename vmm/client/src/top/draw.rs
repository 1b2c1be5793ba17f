//! Draws the screen: the use of memory, the engine and the cache, a chart over time, and a row for each VM.
//!
//! Everything fits into 80 columns and 24 lines. A larger terminal shows a larger chart and more rows.
//! Colours are the terminal's own, so that they suit light and dark terminals.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Axis, Block, Cell, Chart, Clear, Dataset, GraphType, Paragraph, Row, Table, TableState,
};
use samepage_api_types::lifecycle::State;
use samepage_text::counted::counted;

use super::model::{Column, Model, ReadRates, Row as Vm};

const RESIDENT: Color = Color::Blue;
const SAVED: Color = Color::Green;
const FAINT: Style = Style::new().add_modifier(Modifier::DIM);

const KEYS: &str = "q quit  ↑↓ select  s sort  r reverse  p pause  c console  t types  ? help";

const HELP: &str = "\
 ↑ ↓ PgUp PgDn   select a VM
 s or → and ←    sort by the next or previous column
 r               reverse the order
 p or space      pause or resume the VM
 c or Enter      attach to its console; Ctrl-A x comes back
 t               what its pages are used for, as its guest says
 q or Ctrl-C     leave

 CPU%    of one core, by all vCPUs, and for them
 RES     private pages, and the VM's share of each frame
 SHARED  its pages that are mapped to frames
 SAVED   memory saved by sharing, with zeros
 WANTS   more memory that would save most reads
 GUEST HOST DISK   reads each second, by their source

 any key goes back";

/// Draws the screen.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model) {
    let area = frame.area();
    // The chart gets a third of the additional lines of a large terminal.
    let line = 6 + area.height.saturating_sub(24) / 3;
    let [title, memory, bar, engine, cache, chart, table, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(line),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(area);
    draw_title(frame, model, title);
    draw_memory(frame, model, memory, bar);
    draw_engine(frame, model, engine);
    draw_cache(frame, model, cache);
    draw_chart(frame, model, chart);
    draw_vms(frame, model, table);
    let text = match &model.message {
        Some(message) => Line::from(format!(" {message}")).bold().yellow(),
        None => Line::from(format!(" {KEYS}")).style(FAINT),
    };
    frame.render_widget(text, keys);
    if model.types {
        draw_types(frame, model, area);
    }
    if model.help {
        draw_help(frame, area);
    }
}

fn draw_title(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let name = " samepage ";
    let running = model.rows.iter().filter(|vm| vm.state == State::Running).count();
    let text = format!(" {}, {running} running ", counted(model.rows.len(), "VM"));
    let room = usize::from(area.width).saturating_sub(name.len() + text.len() + 2);
    let socket = Span::from(format!(" {}", end_of(&model.socket, room))).style(FAINT);
    frame.render_widget(Line::from(vec![Span::from(name).bold().reversed(), socket]), area);
    frame.render_widget(Paragraph::new(text).alignment(Alignment::Right), area);
}

fn draw_memory(frame: &mut Frame<'_>, model: &Model, text: Rect, bar: Rect) {
    let Some(latest) = &model.latest else { return };
    let sharing = &latest.sharing;
    let saved = sharing.saved_bytes;
    let mut line = Figures::new("memory", text.width);
    line.add(&[], &amount(sharing.guest_bytes), "promised");
    line.add(&[Span::from("■ ").fg(RESIDENT)], &amount(sharing.resident_bytes), "resident");
    line.add(&[Span::from("■ ").fg(SAVED)], &amount(saved), "saved");
    if !sharing.enabled {
        line.say("not shared".yellow());
    } else if sharing.statistics.groups_stopped > 0 {
        line.say("sharing has stopped".red().bold());
    } else if sharing.resident_bytes + saved > 0 {
        let percent = 100.0 * saved as f64 / (sharing.resident_bytes + saved) as f64;
        line.say(format!("{percent:.0} % less").bold().fg(SAVED));
    }
    frame.render_widget(line.line(), text);

    let width = f64::from(bar.width.saturating_sub(2));
    let most = sharing.guest_bytes.max(sharing.resident_bytes + saved).max(1) as f64;
    let cells = |bytes: u64| (bytes as f64 / most * width).round() as usize;
    let resident = cells(sharing.resident_bytes);
    let saved = cells(saved).min(width as usize - resident.min(width as usize));
    let rest = (width as usize).saturating_sub(resident + saved);
    let bars = Line::from(vec![
        Span::from(" "),
        Span::from("█".repeat(resident)).fg(RESIDENT),
        Span::from("█".repeat(saved)).fg(SAVED),
        Span::from("░".repeat(rest)).style(FAINT),
    ]);
    frame.render_widget(bars, bar);
}

fn draw_engine(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(latest) = &model.latest else { return };
    let (engine, counted) = (&model.engine, &latest.sharing.statistics);
    let mut line = Figures::new("engine", area.width);
    line.add(&[], &format!("{:.1} %", engine.cpu), "CPU");
    line.add(&[], &count(engine.scanned), "scanned/s");
    line.add(&[], &count(engine.merged), "merged/s");
    line.add(&[], &count(engine.broken), "broken/s");
    line.add(&[], &count(counted.frames as f64), "frames");
    line.add(&[], &format!("{} of {}", counted.mappings, counted.mappings_limit), "mappings");
    frame.render_widget(line.line(), area);
}

fn draw_cache(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(latest) = &model.latest else { return };
    let cache = &latest.cache;
    let ReadRates { guests, host, disk } = model.reads;
    let rate = |bytes: f64| short(bytes as u64);
    let mut line = Figures::new("cache", area.width);
    line.add(&[], &format!("{} of {}", short(cache.cached_bytes), short(cache.limit_bytes)), "held");
    line.add(&[Span::from("read/s: ").style(FAINT)], &rate(guests), "guests");
    line.add(&[], &rate(host), "host");
    line.add(&[], &rate(disk), "disk");
    frame.render_widget(line.line(), area);
}

fn draw_chart(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(newest) = model.history.back() else { return };
    // A cell shows two points, so there is about one point for each second.
    let seconds = f64::from(area.width.saturating_sub(10)).max(60.0);
    let shown = || model.history.iter().filter(|moment| newest.time - moment.time <= seconds);
    let saved: Vec<_> = shown().map(|moment| (moment.time - newest.time, moment.saved)).collect();
    let resident: Vec<_> = shown().map(|moment| (moment.time - newest.time, moment.resident)).collect();
    let most = saved.iter().chain(&resident).map(|(_, bytes)| *bytes).fold(1.0, f64::max) * 1.05;
    let dataset = |points, color| {
        Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).fg(color).data(points)
    };
    let label = |bytes: f64| Line::from(format!("{:>7}", amount(bytes as u64)));
    let chart = Chart::new(vec![dataset(&resident, RESIDENT), dataset(&saved, SAVED)])
        .x_axis(Axis::default().bounds([-seconds, 0.0]).style(FAINT))
        .y_axis(Axis::default().bounds([0.0, most]).style(FAINT).labels([
            label(0.0),
            label(most / 2.0),
            label(most),
        ]));
    frame.render_widget(chart, area);
}

/// Least width of the name column, in cells.
const NAME_WIDTH: u16 = 12;

/// Returns heading and width in cells.
fn heading(column: Column) -> (&'static str, Constraint) {
    let (heading, width) = match column {
        Column::Name => return ("NAME", Constraint::Min(NAME_WIDTH)),
        Column::State => ("STATE", 7),
        Column::Cpu => ("CPU%", 5),
        Column::Memory => ("MEM", 5),
        Column::Resident => ("RES", 5),
        Column::Shared => ("SHARED", 6),
        Column::Saved => ("SAVED", 5),
        Column::Wanted => ("WANTS", 5),
        Column::Guests => ("GUEST", 5),
        Column::Host => ("HOST", 5),
        Column::Disk => ("DISK", 5),
    };
    (heading, Constraint::Length(width))
}

fn is_text(column: Column) -> bool {
    matches!(column, Column::Name | Column::State)
}

fn draw_vms(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let headings = Column::ALL.map(|column| {
        let (text, _) = heading(column);
        let style = if column == model.sort { Style::new().bold().underlined() } else { Style::new().bold() };
        let line = Line::from(Span::styled(text, style));
        Cell::from(if is_text(column) { line } else { line.right_aligned() })
    });
    let widths = Column::ALL.map(|column| heading(column).1);
    let others: u16 =
        widths.iter().map(|width| if let Constraint::Length(width) = width { width + 1 } else { 0 }).sum();
    let room = usize::from(area.width.saturating_sub(others + 2)).max(NAME_WIDTH.into());
    let rows = model.rows.iter().map(|vm| {
        Row::new(Column::ALL.map(|column| {
            let (mut text, style) = cell(vm, column);
            if column == Column::Name {
                text = middle_cut(&text, room);
            }
            let line = Line::from(Span::styled(text, style));
            Cell::from(if is_text(column) { line } else { line.right_aligned() })
        }))
    });
    let table = Table::new(rows, widths)
        .header(Row::new(headings))
        .column_spacing(1)
        .row_highlight_style(Style::new().reversed())
        .block(Block::new().padding(ratatui::widgets::Padding::horizontal(1)));
    let mut state = TableState::new().with_selected(model.selected_row());
    frame.render_stateful_widget(table, area, &mut state);
}

/// Returns a share of a core, in five letters at most: VMs with many vCPUs use more than one core.
fn percent(cpu: f64) -> String {
    if cpu < 999.95 { format!("{cpu:.1}") } else { format!("{cpu:.0}") }
}

fn cell(vm: &Vm, column: Column) -> (String, Style) {
    let plain = Style::new();
    let maybe = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), short);
    let rate = |of: fn(&ReadRates) -> f64| {
        let rate = vm.reads.as_ref().map(of);
        let style = if rate.is_some_and(|rate| rate >= 1.0) { plain } else { FAINT };
        (rate.map_or_else(|| "-".to_owned(), |rate| short(rate as u64)), style)
    };
    match column {
        Column::Name => (vm.name.clone(), plain),
        Column::State => (vm.state.name().to_owned(), state_style(vm.state)),
        Column::Cpu => (vm.cpu.map_or_else(|| "-".to_owned(), percent), plain),
        Column::Memory => (short(vm.memory), plain),
        Column::Resident => (maybe(vm.resident), plain.fg(RESIDENT)),
        Column::Shared => (maybe(vm.shared), plain),
        Column::Saved => (maybe(vm.saved), plain.fg(SAVED)),
        Column::Wanted => (maybe(vm.wanted), plain),
        Column::Guests => rate(|reads| reads.guests),
        Column::Host => rate(|reads| reads.host),
        Column::Disk => rate(|reads| reads.disk),
    }
}

fn state_style(state: State) -> Style {
    match state {
        State::Running => Style::new().green(),
        State::Paused | State::Created => Style::new().yellow(),
        State::Stopped => FAINT,
        State::Crashed | State::Failed => Style::new().red().bold(),
    }
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let lines = HELP.lines().count() as u16;
    let (width, height) = (60.min(area.width), (lines + 2).min(area.height));
    let place =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(HELP).block(Block::bordered().title(" samepage top ")), place);
}

/// Draws the selected VM's pages by type, and how much of each type is shared.
fn draw_types(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(vm) = model.selected() else { return };
    let pages = model.latest.as_ref().and_then(|latest| latest.pages.as_ref());
    let pages = pages.filter(|(name, _)| *name == vm.name).map(|(_, pages)| pages);
    let mut rows = Vec::new();
    for (page_type, one) in pages.and_then(|pages| pages.types.as_ref()).iter().flat_map(|types| types.iter())
    {
        let figures = [one.bytes, one.shared_bytes, one.pages_sharing * 4096, one.zero_bytes];
        let life = match one.mean_life_seconds {
            Some(life) => format!("{} s", count(life)),
            // The average lifetime is longer than the time of observation.
            None if one.broken > 0 => format!(">{} s", count(one.watched_seconds.floor())),
            None => "-".to_owned(),
        };
        let figures = figures.into_iter().map(short).chain([count(one.broken as f64), life]);
        let cells = figures.map(|text| Cell::from(Line::from(text).right_aligned()));
        let style = if one.pages == 0 { FAINT } else { Style::new() };
        let name = Cell::from(page_type.name());
        rows.push(Row::new(std::iter::once(name).chain(cells)).style(style));
    }
    let note = match pages {
        None => "asking",
        Some(pages) if pages.types.is_none() => "the VM has no memory now",
        Some(pages) if !pages.publishing => "the guest has no agent that publishes page types",
        Some(_) => "as published by the agent in the guest",
    };
    let place = Rect { width: 72, height: 12, x: area.x + 4, y: area.y + 5 }.intersection(area);
    let headings = ["MEM", "SHARED", "SAVED", "GIVEN", "BROKEN", "LIFE"];
    let headings = headings.map(|text| Cell::from(Line::from(text).right_aligned()));
    let header = Row::new(std::iter::once(Cell::from("TYPE")).chain(headings)).bold();
    let widths = [14, 7, 7, 7, 7, 7, 9].map(Constraint::Length);
    let block = Block::bordered()
        .title(format!(" {} ", vm.name))
        .title_bottom(format!(" {note} · t goes back "))
        .padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Clear, place);
    frame.render_widget(Table::new(rows, widths).header(header).column_spacing(1).block(block), place);
}

/// A line of figures. A figure that does not fit completely is omitted.
struct Figures {
    spans: Vec<Span<'static>>,
    room: usize,
}

impl Figures {
    fn new(label: &str, width: u16) -> Self {
        let label = format!(" {label:<8}");
        let room = usize::from(width).saturating_sub(label.len());
        Self { spans: vec![Span::from(label).bold()], room }
    }

    /// Adds a figure with its label, after a mark.
    fn add(&mut self, mark: &[Span<'static>], value: &str, of: &str) {
        let figure = [Span::from(format!("{value} ")), Span::from(of.to_owned()).style(FAINT)];
        self.fit(&[mark, &figure[..]].concat());
    }

    fn say(&mut self, text: Span<'static>) {
        self.fit(&[text]);
    }

    fn fit(&mut self, part: &[Span<'static>]) {
        let width: usize = part.iter().map(Span::width).sum();
        // Leave one cell free at the edge.
        if width < self.room {
            self.spans.extend_from_slice(part);
            self.spans.push(Span::from("  "));
            self.room = self.room.saturating_sub(width + 2);
        } else {
            // No later figure may use the remaining room.
            self.room = 0;
        }
    }

    fn line(self) -> Line<'static> {
        Line::from(self.spans)
    }
}

/// Returns the end of a text in this number of characters, because the end says more than the start.
fn end_of(text: &str, room: usize) -> String {
    let length = text.chars().count();
    if length <= room {
        return text.to_owned();
    }
    let end = text.chars().skip(length + 1 - room.max(1));
    std::iter::once('…').chain(end).collect()
}

/// Returns a name in this number of characters, shortened in the middle, because most names differ at their
/// ends.
fn middle_cut(name: &str, room: usize) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= room {
        return name.to_owned();
    }
    let end = room / 2;
    let start = room.saturating_sub(end + 1);
    letters[..start].iter().chain(&['…']).chain(&letters[letters.len() - end..]).collect()
}

/// Returns a size in few characters.
fn amount(bytes: u64) -> String {
    let (value, unit) = scaled(bytes);
    match unit {
        "" => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.1} {unit}iB"),
        _ => format!("{value:.0} {unit}iB"),
    }
}

/// Returns a size in at most five characters.
fn short(bytes: u64) -> String {
    let (value, unit) = scaled(bytes);
    match unit {
        "" => format!("{bytes}"),
        _ if value < 9.95 => format!("{value:.1}{unit}"),
        _ => format!("{value:.0}{unit}"),
    }
}

fn scaled(bytes: u64) -> (f64, &'static str) {
    let units = ["", "K", "M", "G", "T", "P", "E"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1023.5 {
        value /= 1024.0;
        unit += 1;
    }
    (value, units[unit])
}

/// Returns a number in at most five characters.
fn count(number: f64) -> String {
    match number {
        ..9999.5 => format!("{number:.0}"),
        ..99_950.0 => format!("{:.1}k", number / 1e3),
        ..999_500.0 => format!("{:.0}k", number / 1e3),
        ..99_950_000.0 => format!("{:.1}M", number / 1e6),
        _ => format!("{:.0}M", number / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::EngineRates;
    use super::super::model::tests::model;
    use super::*;

    /// The picture as text, a string for each line.
    fn picture(model: &Model, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(line).collect()
    }

    #[test]
    fn many_vcpus_use_more_than_one_core() {
        assert_eq!(
            [0.04, 99.96, 400.0, 999.9, 999.96, 25_400.0].map(percent),
            ["0.0", "100.0", "400.0", "999.9", "1000", "25400"]
        );
    }

    #[test]
    fn everything_fits_into_80_by_24() {
        let lines = picture(&model(4), 80, 24);
        let text = lines.join("\n");
        for wanted in [
            "samepage  /run/samepage.sock",
            "4 VMs, 3 running",
            "512 MiB promised",
            "200 MiB resident",
            "236 MiB saved",
            "54 % less",
            "5.0 % CPU",
            "1000 scanned/s",
            "100 merged/s",
            "3 broken/s",
            "32M of 512M held",
            "6.0M guests",
            "q quit",
            "? help",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing:\n{text}");
        }
        let heading = lines.iter().position(|line| line.contains("NAME")).unwrap();
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&lines[heading]).len(), 11, "{text}");
        assert_eq!(
            words(&lines[heading + 1]),
            ["vm-0", "running", "10.0", "128M", "40M", "70M", "60M", "12M", "0", "0", "4.0K"]
        );
        assert_eq!(
            words(&lines[heading + 3]),
            ["vm-2", "paused", "30.0", "128M", "42M", "70M", "58M", "-", "2.0M", "0", "4.0K"]
        );
        assert!(lines.iter().all(|line| line.chars().count() == 80));
    }

    #[test]
    fn the_types_of_the_selected_vm_are_shown() {
        let mut model = model(2);
        model.types = true;
        assert_eq!(model.pages_of().as_deref(), Some("vm-0"));
        let text = picture(&model, 80, 24).join("\n");
        let row = text.lines().find(|line| line.contains("anonymous")).unwrap();
        let words: Vec<_> = row.split_whitespace().skip_while(|word| *word != "anonymous").collect();
        assert_eq!(words[..8], ["anonymous", "4.0M", "2.0M", "0", "0", "2", "4", "s"], "{text}");
        assert!(text.contains("balloon") && text.contains("t goes back"), "{text}");
        // Of another VM nothing is known yet.
        model.select(1);
        assert!(picture(&model, 80, 24).join("\n").contains("asking"));
    }

    #[test]
    fn figures_as_long_as_can_be_are_whole_or_not_there() {
        let mut model = model(4);
        model.socket = format!("/run/{}/samepage.sock", "long".repeat(40));
        let long = (1023 << 20) - 1;
        let latest = model.latest.as_mut().unwrap();
        let sharing = &mut latest.sharing;
        (sharing.guest_bytes, sharing.resident_bytes, sharing.saved_bytes) = (long, long, long);
        sharing.statistics.frames = 99_949_000;
        (latest.cache.cached_bytes, latest.cache.limit_bytes) = (long, long);
        model.reads = ReadRates { guests: long as f64, host: long as f64, disk: long as f64 };
        model.engine = EngineRates { cpu: 100.0, scanned: 99_949.0, merged: 99_949.0, broken: 99_949.0 };
        for width in 40..120 {
            for line in &picture(&model, width, 24)[..5] {
                // A figure that was cut off would touch the edge.
                assert!(line.ends_with(' '), "{width}: {line}");
            }
        }
        let lines = picture(&model, 80, 24);
        assert!(lines[0].contains("…") && lines[0].contains("samepage.sock"), "{}", lines[0]);
        assert!(lines[1].contains("1023 MiB saved  50 % less"), "{}", lines[1]);
        assert!(lines[3].contains("99.9k broken/s"), "{}", lines[3]);
        assert!(lines[4].contains("1023M disk"), "{}", lines[4]);
    }

    #[test]
    fn the_selected_of_many_vms_is_in_sight() {
        let mut model = model(32);
        model.select(20);
        let text = picture(&model, 80, 24).join("\n");
        assert!(text.contains("vm-20") && !text.contains("vm-0 "), "{text}");
        let all = picture(&model, 160, 60).join("\n");
        assert!((0..32).all(|vm| all.contains(&format!("vm-{vm} "))), "{all}");
        assert!(all.contains("1234 of 65530 mappings"), "{all}");
    }

    #[test]
    fn names_that_differ_at_their_ends_are_told_apart() {
        let mut model = model(3);
        for (vm, row) in model.rows.iter_mut().enumerate() {
            row.name = format!("production-webserver-frontend-{vm}");
        }
        let text = picture(&model, 80, 24).join("\n");
        for vm in 0..3 {
            assert!(text.contains(&format!("product…ntend-{vm}")), "{text}");
        }
        let wide = picture(&model, 120, 24).join("\n");
        assert!(wide.contains("production-webserver-frontend-2 "), "{wide}");
        assert_eq!(["abc", "abcdefgh"].map(|name| middle_cut(name, 5)), ["abc", "ab…gh"]);
        assert_eq!([0, 1, 2].map(|room| middle_cut("abc", room)), ["…", "…", "…c"]);
    }

    #[test]
    fn a_terminal_of_any_size_and_nothing_known_are_borne() {
        let empty = Model::new("/s".into());
        for (width, height) in [(1, 1), (20, 5), (79, 23), (300, 100)] {
            let _ = picture(&empty, width, height);
            let mut model = model(3);
            let _ = picture(&model, width, height);
            model.help = true;
            let _ = picture(&model, width, height);
        }
    }

    #[test]
    fn help_and_messages_are_shown() {
        let mut model = model(1);
        model.say("VM vm-0 is paused".into());
        assert!(picture(&model, 80, 24)[23].contains("VM vm-0 is paused"));
        model.help = true;
        let text = picture(&model, 80, 24).join("\n");
        assert!(text.contains("attach to its console") && text.contains("any key goes back"), "{text}");
    }

    #[test]
    fn amounts_are_short() {
        let told = [0, 999, 1023, 1024, 10 << 10, 1023 << 10, 1 << 20, 5 << 29, u64::MAX].map(short);
        assert_eq!(told, ["0", "999", "1023", "1.0K", "10K", "1023K", "1.0M", "2.5G", "16E"]);
        assert!(told.iter().all(|text| text.len() <= 5));
        assert_eq!([12.0, 12_345.0, 2e6].map(count), ["12", "12.3k", "2.0M"]);
        assert!(
            [9999.4, 9999.5, 99_949.0, 99_950.0, 999_499.0, 999_500.0, 99_949_999.0, 1e8, 9.9e9]
                .map(count)
                .iter()
                .all(|text| text.len() <= 5)
        );
        assert_eq!(amount(3 << 19), "1.5 MiB");
    }
}
