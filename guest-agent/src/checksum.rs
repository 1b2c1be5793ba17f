//! The checksum in result lines: 64-bit FNV-1a.
//!
//! It detects accidental differences, which is enough for a report. It is also short enough to reimplement in
//! any language. See <http://www.isthe.com/chongo/tech/comp/fnv/>.

/// A running 64-bit FNV-1a checksum. Printed as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fnv1a(u64);

impl Fnv1a {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    /// Returns the checksum of no bytes.
    pub const fn new() -> Self {
        Self(Self::OFFSET_BASIS)
    }

    /// Returns the checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut sum = Self::new();
        sum.update(bytes);
        sum
    }

    /// Appends `bytes` to the summed bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(Self::PRIME));
    }

    /// Returns the checksum as a number.
    pub const fn value(self) -> u64 {
        self.0
    }
}

impl Default for Fnv1a {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Display for Fnv1a {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_published_vectors() {
        assert_eq!(Fnv1a::of(b"").value(), 0xcbf2_9ce4_8422_2325);
        assert_eq!(Fnv1a::of(b"a").value(), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(Fnv1a::of(b"foobar").value(), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn does_not_depend_on_how_the_bytes_arrive() {
        let mut pieces = Fnv1a::new();
        pieces.update(b"foo");
        pieces.update(b"");
        pieces.update(b"bar");
        assert_eq!(pieces, Fnv1a::of(b"foobar"));
    }

    #[test]
    fn is_printed_with_leading_zeros() {
        assert_eq!(Fnv1a(0xab).to_string(), "00000000000000ab");
    }
}
