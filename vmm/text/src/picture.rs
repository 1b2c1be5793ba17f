//! Standalone SVG pictures that follow the viewer's light or dark scheme.
//!
//! Lengths are in SVG user units. Source: the SVG 1.1 recommendation.

use std::fmt::{Display, Write};

use crate::units::PAGE_SIZE;

/// The common style. It uses plain rules, because many viewers lack variables.
const STYLE: &str = "\
text { font: 13px system-ui, sans-serif; fill: #1c2330; } .title { font-size: 16px; font-weight: 600; } \
.end { text-anchor: end; } .middle { text-anchor: middle; } .ground { fill: #ffffff; } \
.grid { stroke: #d5dae2; } .axis { stroke: #1c2330; } \
@media (prefers-color-scheme: dark) { \
text { fill: #e4e8ef; } .ground { fill: #14181f; } .grid { stroke: #363d4a; } .axis { stroke: #e4e8ef; } }";

/// Maps sizes in bytes to positions.
#[derive(Debug)]
pub struct Scale {
    /// Bytes between two ticks: a power of two, as is usual for memory.
    tick: f64,
    most: f64,
    /// The position of 0.
    pub from: f64,
    /// The position of the maximum.
    pub to: f64,
}

impl Scale {
    /// Returns a scale from 0 to at least `most` bytes, between two positions.
    pub fn linear(most: f64, from: f64, to: f64) -> Self {
        let most = most.max(PAGE_SIZE as f64);
        // 4 to 8 ticks.
        let tick = (most / 4.0).log2().floor().exp2();
        Self { tick, most, from, to }
    }

    /// Returns the position of a size in bytes. Larger sizes than the maximum are at the end.
    #[must_use]
    pub fn at(&self, bytes: f64) -> f64 {
        self.from + bytes.min(self.most) / self.most * (self.to - self.from)
    }

    /// Returns the position of this number of pages.
    #[must_use]
    pub fn at_pages(&self, pages: u64) -> f64 {
        self.at(pages as f64 * PAGE_SIZE as f64)
    }

    /// Returns the sizes in bytes at which to draw lines.
    pub fn ticks(&self) -> impl Iterator<Item = f64> {
        (0..=(self.most / self.tick) as u32).map(|index| f64::from(index) * self.tick)
    }
}

/// A picture under construction.
#[derive(Debug, Default)]
pub struct Canvas {
    elements: String,
}

impl Canvas {
    /// Adds an element without changes.
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

    /// Adds a rectangle, with a note that viewers show at the pointer.
    pub fn rect(&mut self, [x, y, width, height]: [f64; 4], class: &str, note: &str) {
        let note = escape(note);
        self.element(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" class=\"{class}\">\
             <title>{note}</title></rect>"
        ));
    }

    /// Returns the document with this width and height, and with `style` in addition to the common style.
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

/// Returns text escaped for XML. Names of files and processes may contain any character.
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
