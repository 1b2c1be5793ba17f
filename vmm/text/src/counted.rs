//! Numbers of things for messages.

use std::fmt::Display;

/// Returns a number and a noun: `counted(1, "VM")` is `1 VM`, and `counted(2, "VM")` is `2 VMs`.
pub fn counted<N: Display + PartialEq + From<u8>>(number: N, one: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
    format!("{number} {one}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular() {
        assert_eq!(["0 VMs", "1 VM", "2 VMs"].map(str::to_owned), [0_usize, 1, 2].map(|n| counted(n, "VM")));
        assert_eq!(counted(1_u64, "byte"), "1 byte");
    }
}
