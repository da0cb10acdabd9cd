//! Names of jobs: 26 letters and digits, in the order of creation, not to be guessed.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// Crockford's alphabet in lower case: no i, l, o, u.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const LENGTH: usize = 26;

/// A job's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(String);

impl JobId {
    /// A new one: 48 bits of time, then 74 random ones.
    #[must_use]
    pub fn new() -> Self {
        Self::of(Uuid::now_v7().as_u128())
    }

    fn of(bits: u128) -> Self {
        // 26 digits of 5 bits hold 130.
        let digit = |i: usize| char::from(ALPHABET[((bits >> (5 * (LENGTH - 1 - i))) & 31) as usize]);
        Self((0..LENGTH).map(digit).collect())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for JobId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for JobId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let good = text.len() == LENGTH && text.bytes().all(|byte| ALPHABET.contains(&byte));
        if good { Ok(Self(text.into())) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_in_order_and_are_read_again() {
        let ids: Vec<JobId> = (0..1000).map(|_| JobId::new()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(ids[7].as_str().parse(), Ok(ids[7].clone()));
        for bad in
            ["", "../../etc/passwd", "0123456789ABCDEFGHJKMNPQRS", "0123456789abcdefghjkmnpqri", "é123456789abcdefghjkmnpqr"]
        {
            assert!(bad.parse::<JobId>().is_err(), "{bad}");
        }
    }
}
