//! Arguments of fields between commas, as in QEMU's options.

use samepage_spec::{RateLimits, Size};
use samepage_text::size::parse_size;

/// Splits text at commas. A double comma stands for one comma in a field.
pub(super) fn fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(letter);
        }
    }
    fields
}

/// Takes a field with a limit per second: `rate` or `iops`. Returns false if the field is none of them.
pub(super) fn parse_limit_field(limits: &mut RateLimits, name: &str, value: &str) -> Result<bool, String> {
    match name {
        "rate" => {
            let bytes = parse_size(value.strip_suffix("/s").unwrap_or(value));
            limits.rate = Some(Size(parse_limit(value, bytes)?));
        }
        "iops" => {
            let number = value.parse().map_err(|_| "write a whole number".to_owned());
            limits.iops = Some(parse_limit(value, number)?);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Checks a limit per second, which must not be zero.
fn parse_limit(text: &str, limit: Result<u64, String>) -> Result<u64, String> {
    match limit {
        Ok(0) => Err(format!("a limit of {text:?} would stop all requests")),
        Ok(limit) => Ok(limit),
        Err(reason) => Err(format!("a limit of {text:?}: {reason}")),
    }
}
