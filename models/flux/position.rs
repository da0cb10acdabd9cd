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
        let shape = (l_txt + rows * columns, config.head_width / 2);
        let table = |f: fn(f64) -> f64| {
            // Of every place on each axis, which many tokens share: computing them anew for each would take milliseconds.
            let at = |axis: usize, place: usize| -> Vec<f32> {
                let width = config.axes[axis] as f64;
                let angle = |i: usize| place as f64 * THETA.powf(-(i as f64) / width);
                (0..config.axes[axis]).step_by(2).map(|i| f(angle(i)) as f32).collect()
            };
            let places = [1, rows.max(1), columns.max(1)];
            let axes: Vec<Vec<Vec<f32>>> = (0..3).map(|axis| (0..places[axis]).map(|place| at(axis, place)).collect()).collect();
            let text = std::iter::repeat_n([0, 0, 0], l_txt);
            let image = (0..rows).flat_map(|y| (0..columns).map(move |x| [0, y, x]));
            let token = |place: [usize; 3]| axes.iter().zip(place).flat_map(|(axis, place)| &axis[place]).copied();
            Tensor::from_vec(text.chain(image).flat_map(token).collect(), shape, device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }
}
