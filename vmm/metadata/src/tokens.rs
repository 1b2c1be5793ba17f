//! Tokens, by which a program of the guest proves that it asked for one.
//!
//! A token is the time at which it expires, random bytes, and a keyed digest of both and of the VM's name, all in
//! hexadecimal digits. The key is random and leaves the process never. So the host keeps nothing for a token, however
//! many a guest asks for, and no other VM's token is valid.

use std::io;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};

/// Bounds of a token's life, in seconds: Firecracker's.
pub(crate) const LIFE: std::ops::RangeInclusive<u32> = 1..=21_600;

const TIME_BYTES: usize = 8;
const RANDOM_BYTES: usize = 8;
const DIGEST_BYTES: usize = 32;
const TOKEN_BYTES: usize = TIME_BYTES + RANDOM_BYTES + DIGEST_BYTES;

pub(crate) struct Tokens {
    key: [u8; 32],
    vm: String,
}

impl Tokens {
    /// # Errors
    /// Fails if the kernel has no random bytes.
    pub(crate) fn new(vm: &str) -> io::Result<Self> {
        Ok(Self { key: random()?, vm: vm.to_owned() })
    }

    /// Returns a token that is valid for so many seconds from `now` on.
    pub(crate) fn make(&self, now: Duration, life: u32) -> io::Result<String> {
        let expires = (now + Duration::from_secs(life.into())).as_millis() as u64;
        let mut token = [0; TIME_BYTES + RANDOM_BYTES];
        token[..TIME_BYTES].copy_from_slice(&expires.to_le_bytes());
        token[TIME_BYTES..].copy_from_slice(&random::<RANDOM_BYTES>()?);
        let digest = self.digest(&token);
        Ok([&token[..], digest.as_bytes()].concat().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether a token is one of this VM's, and has not expired.
    pub(crate) fn is_valid(&self, now: Duration, token: &str) -> bool {
        let Some(bytes) = decode(token) else { return false };
        let (signed, digest) = bytes.split_at(TIME_BYTES + RANDOM_BYTES);
        let Ok(digest) = <[u8; DIGEST_BYTES]>::try_from(digest) else { return false };
        let Some(expires) = signed.first_chunk().copied().map(u64::from_le_bytes) else { return false };
        // The comparison of two digests takes the same time wherever they differ.
        self.digest(signed) == blake3::Hash::from(digest) && now.as_millis() < expires.into()
    }

    fn digest(&self, signed: &[u8]) -> blake3::Hash {
        blake3::Hasher::new_keyed(&self.key).update(signed).update(self.vm.as_bytes()).finalize()
    }
}

fn decode(token: &str) -> Option<[u8; TOKEN_BYTES]> {
    let digits = token.as_bytes();
    if digits.len() != 2 * TOKEN_BYTES {
        return None;
    }
    let mut bytes = [0; TOKEN_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn random<const BYTES: usize>() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    // So few bytes come all at once, or not at all.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_valid_for_its_vm_until_it_expires() {
        let (tokens, others) = (Tokens::new("a").unwrap(), Tokens::new("a").unwrap());
        let at = Duration::from_secs;
        let token = tokens.make(at(10), 5).unwrap();
        assert!(tokens.is_valid(at(14), &token) && !tokens.is_valid(at(15), &token));
        assert!(!others.is_valid(at(14), &token));
        let renamed = Tokens { key: tokens.key, vm: "b".to_owned() };
        assert!(!renamed.is_valid(at(14), &token));
        assert_ne!(token, tokens.make(at(10), 5).unwrap());
    }

    #[test]
    fn a_forged_token_is_not_valid() {
        let tokens = Tokens::new("a").unwrap();
        let token = tokens.make(Duration::ZERO, 100).unwrap();
        for at in 0..token.len() {
            let mut forged = token.clone().into_bytes();
            forged[at] = if forged[at] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_valid(Duration::ZERO, &String::from_utf8(forged).unwrap()), "digit {at}");
        }
        for wrong in ["", "0", &token[1..], &format!("{token}0"), &"é".repeat(TOKEN_BYTES), &"+f".repeat(48)]
        {
            assert!(!tokens.is_valid(Duration::ZERO, wrong), "{wrong}");
        }
    }
}
