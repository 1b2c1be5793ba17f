//! Pictures: SVG documents that stand alone and follow the viewer's light or dark scheme.
//!
//! Lengths are in SVG user units. Source: the SVG 1.1 recommendation.

use std::fmt::{Display, Write};

use crate::units::PAGE_SIZE;

/// What all pictures have. Plain rules rather than variables, which many viewers lack.
const STYLE: &str = "\
text { font: 13px system-ui, sans-serif; fill: #1c2330; } .title { font-size: 16px; font-weight: 600; } \
.end { text-anchor: end; } .middle { text-anchor: middle; } .ground { fill: #ffffff; } \
.grid { stroke: #d5dae2; } .axis { stroke: #1c2330; } \
@media (prefers-color-scheme: dark) { \
text { fill: #e4e8ef; } .ground { fill: #14181f; } .grid { stroke: #363d4a; } .axis { stroke: #e4e8ef; } }";

/// Maps sizes in bytes to places.
#[derive(Debug)]
pub struct Scale {
    /// Bytes from one tick to the next: a power of two, as people count memory.
    tick: f64,
    most: f64,
    /// Where nothing is.
    pub from: f64,
    /// Where the most is.
    pub to: f64,
}

impl Scale {
    /// From nothing to at least `most` bytes, between two places.
    pub fn linear(most: f64, from: f64, to: f64) -> Self {
        let most = most.max(PAGE_SIZE as f64);
        // 4 to 8 ticks.
        let tick = (most / 4.0).log2().floor().exp2();
        Self { tick, most, from, to }
    }

    /// The place of an amount in bytes; more than the most is at the end.
    #[must_use]
    pub fn at(&self, bytes: f64) -> f64 {
        self.from + bytes.min(self.most) / self.most * (self.to - self.from)
    }

    /// The place of so many pages.
    #[must_use]
    pub fn at_pages(&self, pages: u64) -> f64 {
        self.at(pages as f64 * PAGE_SIZE as f64)
    }

    /// Amounts in bytes to draw lines at.
    pub fn ticks(&self) -> impl Iterator<Item = f64> {
        (0..=(self.most / self.tick) as u32).map(|index| f64::from(index) * self.tick)
    }
}

/// A picture that is being drawn.
#[derive(Debug, Default)]
pub struct Canvas {
    elements: String,
}

impl Canvas {
    /// Adds an element as it is.
    pub fn element(&mut self, element: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.elements, "{element}");
    }

    /// Adds a text.
    pub fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let text = escape(text);
        self.element(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{text}</text>"));
    }

    /// Adds a line between two points.
    pub fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], class: &str) {
        self.element(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>"
        ));
    }

    /// A rectangle, with a note that viewers show at the pointer.
    pub fn rect(&mut self, [x, y, width, height]: [f64; 4], class: &str, note: &str) {
        let note = escape(note);
        self.element(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" class=\"{class}\">\
             <title>{note}</title></rect>"
        ));
    }

    /// The document, `size` wide and high, with rules of its own besides those that all have.
    pub fn finish(self, [width, height]: [f64; 2], style: &str, title: &str) -> String {
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\">\n<title>{}</title>\n<style>{STYLE} {style}</style>\n\
             <rect width=\"100%\" height=\"100%\" class=\"ground\"/>\n{}</svg>\n",
            escape(title),
            self.elements
        )
    }
}

/// Text as XML allows it; names of files and processes may hold anything.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push(char::REPLACEMENT_CHARACTER),
            control if control.is_control() => escaped.push(char::REPLACEMENT_CHARACTER),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_even() {
        for most in [1.0, 4097.0, 1e6, 1.5e9, 6.4e10, 1e19] {
            let scale = Scale::linear(most, 0.0, 100.0);
            let ticks = scale.ticks().count();
            assert!((4..=9).contains(&ticks), "{most}: {ticks}");
        }
    }
}
