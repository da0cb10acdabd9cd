//! What latents look like, without the autoencoder: its decoder is, for flat colours, close to one matrix from a latent pixel's 16
//! channels to a colour. The matrix is fitted to the loaded autoencoder, so that it is right for every one.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use models::vae::Autoencoder;

use super::Error;

/// Latent channels, and one for the constant.
const TERMS: usize = 17;

/// Pixels a side of the card to which the matrix is fitted, and shapes on it.
const SIDE: usize = 256;
const SHAPES: usize = 240;

/// Channels and a constant to red, green and blue in -1..=1.
#[derive(Debug, Clone)]
pub(super) struct Preview {
    matrix: [[f64; 3]; TERMS],
}

impl Preview {
    /// Encodes a card of coloured shapes and solves for the matrix that gives the mean colour of each 8 x 8 pixels back, least squares.
    pub(super) fn fit(vae: &Autoencoder, dtype: DType, device: &Device) -> Result<Self, Error> {
        let card = card();
        let values: Vec<f32> = (0..3).flat_map(|channel| card.iter().map(move |color| color[channel])).collect();
        let pixels_of_card = Tensor::from_vec(values, (1, 3, SIDE, SIDE), device)?.to_dtype(dtype)?;
        let latents = vae.to_latents(&vae.encode(&pixels_of_card)?.mean.to_dtype(DType::F32)?)?;
        let columns = SIDE / 8;
        // normal equations: (x x^T) matrix = x y^T
        let mut left = [[0.0; TERMS]; TERMS];
        let mut right = [[0.0; 3]; TERMS];
        for (i, pixel) in pixels(&latents)?.iter().enumerate() {
            let (top, first) = (8 * (i / columns), 8 * (i % columns));
            let mean = |channel: usize| {
                let sum: f32 = (0..64).map(|j| card[(top + j / 8) * SIDE + first + j % 8][channel]).sum();
                f64::from(sum) / 64.0
            };
            let wanted = [mean(0), mean(1), mean(2)];
            for (row, a) in pixel.iter().enumerate() {
                pixel.iter().enumerate().for_each(|(column, b)| left[row][column] += a * b);
                (0..3).for_each(|channel| right[row][channel] += a * wanted[channel]);
            }
        }
        // Channels that the card does not move stay out.
        (0..TERMS).for_each(|i| left[i][i] += 1e-3);
        Ok(Self { matrix: solve(left, right) })
    }

    /// latents `(1, 16, y, x)` f32 -> picture of x by y pixels.
    pub(super) fn show(&self, latents: &Tensor) -> Result<RgbImage, Error> {
        let (_, _, height, width) = latents.dims4()?;
        let byte = |value: f64| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8;
        let pixels = pixels(latents)?;
        let colors = pixels.iter().flat_map(|pixel| {
            (0..3).map(|channel| byte((0..TERMS).map(|i| pixel[i] * self.matrix[i][channel]).sum())).collect::<Vec<_>>()
        });
        Ok(RgbImage::from_raw(width as u32, height as u32, colors.collect()).expect("three bytes for each pixel"))
    }
}

/// The channels of each pixel, row by row, with a 1 behind them.
fn pixels(latents: &Tensor) -> Result<Vec<[f64; TERMS]>, Error> {
    let rows: Vec<Vec<f32>> = latents.squeeze(0)?.flatten_from(1)?.t()?.to_device(&Device::Cpu)?.to_vec2()?;
    let pixel = |row: &Vec<f32>| {
        let mut pixel = [1.0; TERMS];
        pixel.iter_mut().zip(row).for_each(|(to, from)| *to = f64::from(*from));
        pixel
    };
    Ok(rows.iter().map(pixel).collect())
}

/// Overlapping rectangles of all colours and sizes, row by row, -1 to 1: flat colours alone would not tell channels that hold edges from
/// those that hold colours.
fn card() -> Vec<[f32; 3]> {
    let mut state = 1u32;
    // Numerical Recipes' generator; the upper bits are good enough for a card.
    let mut below = |most: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as usize % most
    };
    let mut card = vec![[0.0; 3]; SIDE * SIDE];
    for _ in 0..SHAPES {
        let (x, y, width, height) = (below(SIDE), below(SIDE), 4 + below(60), 4 + below(60));
        let color = [below(256), below(256), below(256)].map(|level| level as f32 / 127.5 - 1.0);
        for row in y..(y + height).min(SIDE) {
            card[row * SIDE + x..row * SIDE + (x + width).min(SIDE)].fill(color);
        }
    }
    card
}

/// Gauss-Jordan with the largest pivot.
fn solve(mut left: [[f64; TERMS]; TERMS], mut right: [[f64; 3]; TERMS]) -> [[f64; 3]; TERMS] {
    for i in 0..TERMS {
        let pivot = (i..TERMS).max_by(|a, b| left[*a][i].abs().total_cmp(&left[*b][i].abs())).unwrap_or(i);
        left.swap(i, pivot);
        right.swap(i, pivot);
        let (pivot, known) = (left[i], right[i]);
        for row in (0..TERMS).filter(|row| *row != i) {
            let factor = left[row][i] / pivot[i];
            left[row].iter_mut().zip(pivot).for_each(|(value, pivot)| *value -= factor * pivot);
            right[row].iter_mut().zip(known).for_each(|(value, known)| *value -= factor * known);
        }
    }
    for i in 0..TERMS {
        right[i].iter_mut().for_each(|value| *value /= left[i][i]);
    }
    right
}
