//! The bias that T5 adds to attention scores by the distance of two tokens.

use candle_core::{DType, Tensor};

use crate::Result;
use crate::weights::{Config, Error, Source};

/// Distance from which all tokens share the last bucket, unless config.json says otherwise.
const MAX_DISTANCE: usize = 128;

/// One number for each head and each bucket of distances; the first block's table serves all blocks.
#[derive(Debug)]
pub(super) struct RelativeBias {
    /// `(buckets, h)`.
    table: Tensor,
    buckets: usize,
    max_distance: usize,
}

impl RelativeBias {
    pub(super) fn load(source: &Source, buckets: usize, heads: usize, config: &Config) -> Result<Self, Error> {
        let max_distance = config.integer("relative_attention_max_distance", MAX_DISTANCE)?;
        if max_distance <= buckets / 4 {
            return Err(config.contradiction(format!("relative_attention_max_distance {max_distance} with {buckets} buckets")));
        }
        // Scores are f32, so what is added to them is too.
        let table = source.tensor_as("relative_attention_bias.weight", (buckets, heads), DType::F32)?;
        Ok(Self { table, buckets, max_distance })
    }

    /// The bias of `l` tokens among themselves: `(1, h, l, l)` f32, query before key.
    pub(super) fn forward(&self, l: usize) -> Result<Tensor> {
        let heads = self.table.dim(1)?;
        let distance = |query: usize, key: usize| key as i64 - query as i64;
        let bucket = |query: usize, key: usize| bucket(distance(query, key), self.buckets, self.max_distance) as u32;
        let buckets: Vec<u32> = (0..l).flat_map(|query| (0..l).map(move |key| bucket(query, key))).collect();
        let buckets = Tensor::from_vec(buckets, l * l, self.table.device())?;
        self.table.t()?.contiguous()?.index_select(&buckets, 1)?.reshape((1, heads, l, l))
    }
}

/// The bucket of a key `distance` after its query (negative: before). Half the buckets look ahead; in each half small
/// distances have a bucket of their own and larger ones share buckets that widen by their logarithm.
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> usize {
    let half = buckets / 2;
    let ahead = if distance > 0 { half } else { 0 };
    let distance = distance.unsigned_abs() as usize;
    let exact = half / 2;
    if distance < exact {
        return ahead + distance;
    }
    // In f32 and in this order, as the reference: it decides on which side of a step a distance falls.
    let ratio = (distance as f32 / exact as f32).ln() / (max_distance as f64 / exact as f64).ln() as f32;
    ahead + (exact + (ratio * (half - exact) as f32) as usize).min(half - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distances at which `_relative_position_bucket` of transformers 5.23.0 changes its bucket (32 buckets, distance 128).
    #[test]
    fn buckets_change_where_the_reference_changes_them() {
        let steps = |sign: i64| -> Vec<(i64, usize)> {
            let buckets: Vec<usize> = (0..400).map(|n| bucket(sign * n, 32, 128)).collect();
            (1..400).filter(|n| buckets[*n] != buckets[n - 1]).map(|n| (n as i64, buckets[n])).collect()
        };
        let far = [(8, 8), (12, 9), (16, 10), (23, 11), (32, 12), (46, 13), (64, 14), (91, 15)];
        let near = (1..8).map(|n| (n, n as usize));
        let behind: Vec<(i64, usize)> = near.chain(far).collect();
        assert_eq!(steps(-1), behind);
        let ahead: Vec<(i64, usize)> = behind.iter().map(|(n, bucket)| (*n, bucket + 16)).collect();
        assert_eq!(steps(1), ahead);
    }
}
