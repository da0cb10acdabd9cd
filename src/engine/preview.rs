//! What latents look like, without the autoencoder: its decoder is, for flat colours, close to one matrix from a latent pixel's 16
//! channels to a colour. The matrix is fitted to the loaded autoencoder, so that it is right for every one.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use models::vae::Autoencoder;

use super::Error;

/// Latent channels, and one for the constant.
const TERMS: usize = 17;

/// Patches a side of the card to which the matrix is fitted, and pixels a side of each.
const PATCHES: usize = 12;
const PATCH: usize = 16;

/// Channels and a constant to red, green and blue in -1..=1.
#[derive(Debug, Clone)]
pub(super) struct Preview {
    matrix: [[f64; 3]; TERMS],
}

impl Preview {
    /// Encodes a card of flat colours and solves for the matrix that gives them back, least squares.
    pub(super) fn fit(vae: &Autoencoder, dtype: DType, device: &Device) -> Result<Self, Error> {
        let side = PATCHES * PATCH;
        let card: Vec<f32> = (0..3)
            .flat_map(|channel| (0..side * side).map(move |i| color((i / side) / PATCH, (i % side) / PATCH)[channel]))
            .collect();
        let card = Tensor::from_vec(card, (1, 3, side, side), device)?.to_dtype(dtype)?;
        let latents = vae.to_latents(&vae.encode(&card)?.mean.to_dtype(DType::F32)?)?;
        let columns = side / 8;
        // normal equations: (x x^T) matrix = x y^T
        let mut left = [[0.0; TERMS]; TERMS];
        let mut right = [[0.0; 3]; TERMS];
        for (i, pixel) in pixels(&latents)?.iter().enumerate() {
            let wanted = color(8 * (i / columns) / PATCH, 8 * (i % columns) / PATCH);
            for (row, a) in pixel.iter().enumerate() {
                pixel.iter().enumerate().for_each(|(column, b)| left[row][column] += a * b);
                (0..3).for_each(|channel| right[row][channel] += a * f64::from(wanted[channel]));
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

/// A patch's colour, -1 to 1: all corners and much between.
fn color(row: usize, column: usize) -> [f32; 3] {
    let i = row * PATCHES + column;
    let level = |n: usize, levels: usize| 2.0 * (n % levels) as f32 / (levels - 1) as f32 - 1.0;
    [level(7 * i, 12), level(5 * i, 9), level(3 * i, 7)]
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
