//! Numbers for people.

/// The size of a page in bytes.
pub(crate) const PAGE_SIZE: usize = 4096;

/// Returns a size with a binary unit.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut size = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    // Sizes that would be rounded to 1024.0 take the next unit.
    while size >= 1023.95 {
        let Some(next) = units.next() else { break };
        size /= 1024.0;
        unit = next;
    }
    format!("{size:.1} {unit}")
}

/// Returns a count with separators between thousands.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Returns the memory of this number of pages.
pub fn pages(pages: u64) -> String {
    bytes(pages.saturating_mul(PAGE_SIZE as u64))
}

/// Returns `part` of `whole` in percent, and 0 if `whole` is 0.
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_readable() {
        assert_eq!(["0 B", "1023 B", "1.0 KiB"].map(str::to_owned), [0, 1023, 1024].map(bytes));
        assert_eq!(bytes((1 << 30) - 1), "1.0 GiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(
            ["0", "999", "1,000", "1,234,567"].map(str::to_owned),
            [0, 999, 1000, 1_234_567].map(count)
        );
        assert_eq!(pages(256), "1.0 MiB");
        assert_eq!((percent(1, 4), percent(0, 0)), (25.0, 0.0));
    }
}
