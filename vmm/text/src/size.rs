//! Sizes of memory as typed.

/// Parses a size in bytes, or with K, M, G or T. These may be followed by `i`, `B` or `iB`, and always mean
/// powers of 1,024.
///
/// # Errors
/// Fails with the correct form.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let number_end = upper.find(|c: char| !c.is_ascii_digit()).unwrap_or(upper.len());
    let (number, unit) = upper.split_at(number_end);
    let shift = match unit {
        "" | "B" => 0,
        "K" | "KI" | "KB" | "KIB" => 10,
        "M" | "MI" | "MB" | "MIB" => 20,
        "G" | "GI" | "GB" | "GIB" => 30,
        "T" | "TI" | "TB" | "TIB" => 40,
        _ => return Err(format!("unknown unit {unit:?}; use K, M, G or T, as in 512M or 512MiB")),
    };
    let number: u64 = number.parse().map_err(|_| "write a whole number and a unit, as in 512M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "it does not fit into 64 bits".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("64k"), Ok(64 << 10));
        for (text, shift) in [("1Ki", 10), ("1MiB", 20), ("1Mi", 20), ("1mb", 20), ("1Gi", 30), ("1TiB", 40)]
        {
            assert_eq!(parse_size(text), Ok(1 << shift), "{text}");
        }
        for wrong in ["", "M", "1.5G", "-1", "10X", "1i", "1IB", "99999999999999999999", "99999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
