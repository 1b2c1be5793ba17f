//! Line numbers of the parts of a JSON text, which the JSON parser does not provide.

use std::collections::HashMap;

use super::source::escape;

/// Returns the line of each value by its JSON pointer, and the duplicate keys of objects with the line of the
/// second. Lines count from 1. The text must be valid JSON.
pub(super) fn lines(text: &str) -> (HashMap<String, usize>, Vec<(usize, String)>) {
    let mut scan = Scan { text: text.as_bytes(), at: 0, line: 1, lines: HashMap::new(), doubled: Vec::new() };
    scan.value("");
    (scan.lines, scan.doubled)
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
    line: usize,
    lines: HashMap<String, usize>,
    doubled: Vec<(usize, String)>,
}

impl Scan<'_> {
    /// Returns the next byte that is not a space, or 0 at the end.
    fn peek(&mut self) -> u8 {
        while let Some(byte) = self.text.get(self.at).copied() {
            match byte {
                b'\n' => self.line += 1,
                b' ' | b'\t' | b'\r' => {}
                _ => return byte,
            }
            self.at += 1;
        }
        0
    }

    fn value(&mut self, pointer: &str) {
        let first = self.peek();
        if self.lines.insert(pointer.to_owned(), self.line).is_some()
            && let Some((_, key)) = pointer.rsplit_once('/')
        {
            self.doubled.push((self.line, key.replace("~1", "/").replace("~0", "~")));
        }
        match first {
            b'{' => self.each(b'}', |scan, _| {
                let key = scan.string();
                // The colon.
                scan.peek();
                scan.at += 1;
                scan.value(&format!("{pointer}/{}", escape(&key)));
            }),
            b'[' => self.each(b']', |scan, index| scan.value(&format!("{pointer}/{index}"))),
            b'"' => drop(self.string()),
            _ => {
                let word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
                self.at += self.text.iter().skip(self.at).take_while(|byte| word(byte)).count();
            }
        }
    }

    /// Calls `part` for each element between brackets.
    fn each(&mut self, end: u8, mut part: impl FnMut(&mut Self, usize)) {
        self.at += 1;
        for index in 0.. {
            match self.peek() {
                0 => return,
                byte if byte == end => break,
                b',' => self.at += 1,
                _ => {}
            }
            // An element follows a comma.
            self.peek();
            part(self, index);
        }
        self.at += 1;
    }

    /// Reads a string, without its quotes.
    fn string(&mut self) -> String {
        let start = self.at;
        self.at += 1;
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at = self.text.len().min(self.at + 1);
        let string = self.text.get(start..self.at).unwrap_or_default();
        serde_json::from_slice(string).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_has_its_line() {
        let text = "{\n\"a\": [1,\n {\"b/c\": \"x\\\"\\n,\", \"d\": {}},\n [], true],\n\"e\": null,\n\"a\": -1.5e+3\n}";
        serde_json::from_str::<serde_json::Value>(text).unwrap();
        let (lines, doubled) = lines(text);
        let line = |pointer: &str| lines[pointer];
        assert_eq!(
            (line(""), line("/a/0"), line("/a/1"), line("/a/1/b~1c"), line("/a/1/d")),
            (1, 2, 3, 3, 3)
        );
        assert_eq!((line("/a/2"), line("/a/3"), line("/e")), (4, 4, 5));
        assert_eq!(doubled, [(6, "a".to_owned())]);
    }

    #[test]
    fn no_text_is_too_much() {
        for text in ["", "[", "{\"", "{\"a\\", "[1,", "{\"a\":", "\"\\", "[[[[", "}", "{\"a\" 1}"] {
            let _ = lines(text);
        }
    }
}
