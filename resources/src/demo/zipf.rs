//! Zipf's law: ranks with a probability proportional to a power of the rank.
//!
//! The guest has no mathematical library, so logarithm and power are computed here from additions and
//! multiplications. So host and guest get exactly the same table.

use core::f64::consts::LN_2;

/// Terms of the series for logarithm and power. The error is below one part in 2^40.
const TERMS: u32 = 16;

/// Calls `put` for each rank from 0 on, with the probability of this or a lower rank in units of 2^-64. The
/// probability of rank r is proportional to (r + 1)^-`theta`, with `theta` in hundredths.
pub fn chances(ranks: u32, theta: u32, mut put: impl FnMut(u32, u64)) {
    let exponent = -f64::from(theta) / 100.0;
    let weight = |rank: u32| exp2(exponent * log2(rank + 1));
    let total: f64 = (0..ranks).map(weight).sum();
    let mut sum = 0.0;
    for rank in 0..ranks {
        sum += weight(rank);
        let last = rank == ranks - 1;
        // A too large float becomes the largest integer.
        put(rank, if last { u64::MAX } else { (sum / total * power_of_two(64)) as u64 });
    }
}

/// Returns the rank for a uniformly distributed `random`, given the table's entries.
pub fn choose(ranks: u32, random: u64, chance: impl Fn(u32) -> u64) -> u32 {
    let (mut low, mut high) = (0, ranks.saturating_sub(1));
    while low < high {
        let middle = low + (high - low) / 2;
        if chance(middle) > random {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// Returns the logarithm to base 2 of a number above 0.
fn log2(number: u32) -> f64 {
    let exponent = number.ilog2();
    let mantissa = f64::from(number) / f64::from(1_u32 << exponent);
    // ln m = 2 artanh((m - 1) / (m + 1)); the argument is below 1/3.
    let argument = (mantissa - 1.0) / (mantissa + 1.0);
    let mut power = argument;
    let mut sum = 0.0;
    for term in 0..TERMS {
        sum += power / f64::from(2 * term + 1);
        power *= argument * argument;
    }
    f64::from(exponent) + 2.0 * sum / LN_2
}

/// Returns 2 to the power of a number between -1000 and 1000.
fn exp2(exponent: f64) -> f64 {
    let whole = exponent as i64;
    let rest = (exponent - whole as f64) * LN_2;
    let mut power = 1.0;
    let mut sum = 0.0;
    for term in 1..=TERMS {
        sum += power;
        power *= rest / f64::from(term);
    }
    sum * power_of_two(whole)
}

/// Returns 2 to the power of an integer between -1022 and 1023.
const fn power_of_two(exponent: i64) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_and_powers_are_right() {
        for number in [1, 2, 3, 7, 1000, 65_535, 1 << 20, u32::MAX] {
            assert!((log2(number) - f64::from(number).log2()).abs() < 1e-11, "{number}");
        }
        for exponent in [-40.7, -1.5, -0.001, 0.0, 0.5, 31.9] {
            assert!((exp2(exponent) / f64::exp2(exponent) - 1.0).abs() < 1e-11, "{exponent}");
        }
    }

    #[test]
    fn ranks_have_their_chances() {
        for theta in [0, 60, 90, 120] {
            let mut table = Vec::new();
            chances(100, theta, |rank, chance| {
                assert_eq!(rank as usize, table.len());
                table.push(chance);
            });
            assert!(table.is_sorted());
            let law = |rank: usize| ((rank + 1) as f64).powf(-f64::from(theta) / 100.0);
            let total: f64 = (0..100).map(law).sum();
            let mut below = 0;
            for (rank, &chance) in table.iter().enumerate() {
                let share = (chance - below) as f64 / 2f64.powi(64);
                assert!((share - law(rank) / total).abs() < 1e-9, "rank {rank} of theta {theta}: {share}");
                below = chance;
            }
            let chosen = |random| choose(100, random, |rank| table[rank as usize]);
            assert_eq!((chosen(0), chosen(u64::MAX)), (0, 99));
            assert_eq!((chosen(table[40] - 1), chosen(table[40])), (40, 41));
        }
    }

    #[test]
    fn one_rank_is_always_chosen_and_none_gives_rank_0() {
        chances(1, 90, |_, chance| assert_eq!(chance, u64::MAX));
        assert_eq!(choose(1, 5, |_| u64::MAX), 0);
        chances(0, 90, |_, _| unreachable!());
        assert_eq!(choose(0, 5, |_| unreachable!()), 0);
    }
}
