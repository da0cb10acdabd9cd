//! PyTorch's CPU generator: mt19937, and the two ways in which `torch.randn` makes normal numbers of it.
//!
//! Follows pytorch v2.7.1 `aten/src/ATen/core/MT19937RNGEngine.h`, `ATen/core/DistributionsHelper.h` and
//! `ATen/native/cpu/DistributionTemplates.h`; compared with torch 2.15.0.

use super::box_muller;

/// Words of state.
const WORDS: usize = 624;
/// How far ahead a word is mixed with.
const AHEAD: usize = 397;
/// Draws of at least this many values take the vectorised way.
const VECTORISED_FROM: usize = 16;

#[derive(Debug, Clone)]
pub(super) struct Mersenne {
    words: [u32; WORDS],
    next: usize,
    /// The second number of a pair, kept for the next small draw.
    spare: Option<f64>,
}

impl Mersenne {
    /// Reads the low 32 bits of `seed` only, as PyTorch does.
    pub(super) fn new(seed: u64) -> Self {
        let mut words = [0u32; WORDS];
        words[0] = seed as u32;
        for i in 1..WORDS {
            let previous = words[i - 1];
            words[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { words, next: WORDS, spare: None }
    }

    /// `n` normal numbers, as `torch.randn(n)` in f32.
    pub(super) fn normal(&mut self, n: usize) -> Vec<f32> {
        if n < VECTORISED_FROM {
            return (0..n).map(|_| self.normal_f64() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| self.uniform_f32()).collect();
        let (chunks, rest) = values.as_chunks_mut();
        chunks.iter_mut().for_each(box_muller::transform);
        if !rest.is_empty()
            && let Some(last) = values.last_chunk_mut()
        {
            // PyTorch fills an incomplete last chunk by drawing the last 16 values anew.
            *last = std::array::from_fn(|_| self.uniform_f32());
            box_muller::transform(last);
        }
        values
    }

    /// The way of small draws: pairs in f64, the second of which waits for the next call.
    fn normal_f64(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let angle = std::f64::consts::TAU * self.uniform_f64();
        let radius = (-2.0 * (-self.uniform_f64()).ln_1p()).sqrt();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }

    /// Uniform in [0, 1): 24 bits, all that an f32 holds.
    fn uniform_f32(&mut self) -> f32 {
        (self.word() & ((1 << 24) - 1)) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1): 53 bits of two words, the earlier word on top.
    fn uniform_f64(&mut self) -> f64 {
        let both = u64::from(self.word()) << 32 | u64::from(self.word());
        (both & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            self.refill();
        }
        let mut word = self.words[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn refill(&mut self) {
        for i in 0..WORDS {
            let joined = (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % WORDS] & 0x7fff_ffff);
            let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[i] = self.words[(i + AHEAD) % WORDS] ^ (joined >> 1) ^ twist;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_published_generator() {
        // The value that the C++ standard demands of std::mt19937: seed 5489, the 10000th word.
        let mut mersenne = Mersenne::new(5489);
        assert_eq!((0..10_000).map(|_| mersenne.word()).last(), Some(4_123_659_995));
    }

    #[test]
    fn only_the_low_half_of_a_seed_counts() {
        assert_eq!(Mersenne::new(5).normal(40), Mersenne::new((1 << 32) + 5).normal(40));
    }
}
