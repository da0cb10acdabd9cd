//! Rotary position embedding: where each token stands in (text order, row, column).

use candle_core::{Device, Result, Tensor};

use super::Config;

const THETA: f64 = 10_000.0;

/// cos and sin of every token's angles, each `(l_txt + l_img, e / 2)` in f32.
#[derive(Debug, Clone)]
pub struct Rope {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Rope {
    /// For `l_txt` text tokens, which all stand at (0, 0, 0), followed by `rows` x `columns` image tokens at (0, y, x).
    ///
    /// Angles are computed in f64, as the reference does: they reach 100 rad, and a bf16 table would be off by 0.2 rad.
    pub fn new(config: &Config, l_txt: usize, rows: usize, columns: usize, device: &Device) -> Result<Self> {
        let frequencies: Vec<(usize, f64)> = (config.axes.iter().enumerate())
            .flat_map(|(axis, width)| (0..*width).step_by(2).map(move |i| (axis, THETA.powf(-(i as f64) / *width as f64))))
            .collect();
        let text = std::iter::repeat_n([0, 0, 0], l_txt);
        let image = (0..rows).flat_map(|y| (0..columns).map(move |x| [0, y, x]));
        let angles: Vec<f64> =
            text.chain(image).flat_map(|place| frequencies.iter().map(move |(axis, frequency)| place[*axis] as f64 * frequency)).collect();
        let shape = (l_txt + rows * columns, config.head_width / 2);
        let table = |f: fn(f64) -> f64| Tensor::from_vec(angles.iter().map(|angle| f(*angle) as f32).collect(), shape, device);
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }
}
