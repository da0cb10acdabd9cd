//! Whether a job can fit into this machine at all. An estimate, on the low side: it refuses what is hopeless.

use crate::engine;
use crate::ops::Error;
use crate::ops::models::Model;

/// A picture and what is made of it: three channels in f32, in bytes, and the encoded file.
const BYTES_PER_PIXEL: u64 = 3 * 4 + 3 + 3;

/// Widths of a token's activations that are alive at once inside a block, in multiples of the hidden width: the stream (1), queries,
/// keys and values (3) beside the MLP's inner layer (4), the former once more by heads (3), and the attended values (1).
const HIDDEN_WIDTHS: u64 = 12;

const F32_BYTES: u64 = 4;

/// Refuses a job that needs more than all memory there is.
pub(super) fn check(model: &Model, width: usize, height: usize, outputs: usize) -> Result<(), Error> {
    let need = needed(model.shape.hidden as u64, width as u64, height as u64, outputs as u64);
    match engine::memory() {
        Some((_, have)) if need > have => Err(Error::TooLarge { width, height, need, have }),
        _ => Ok(()),
    }
}

fn needed(hidden: u64, width: u64, height: u64, outputs: u64) -> u64 {
    let tokens = (width / 16) * (height / 16);
    let pictures = width * height * BYTES_PER_PIXEL;
    // Done pictures wait as bytes, three for each pixel.
    let waiting = width * height * 3 * outputs.saturating_sub(1);
    tokens * hidden * HIDDEN_WIDTHS * F32_BYTES + pictures + waiting
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_sizes_are_small_and_absurd_ones_are_not() {
        assert!(needed(3072, 1024, 1024, 1) < 2_000_000_000);
        assert!(needed(256, 128, 128, 4) < 10_000_000);
        assert!(needed(256, 65_536, 65_536, 1) > 200_000_000_000);
    }
}
