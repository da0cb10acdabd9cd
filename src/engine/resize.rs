//! Lanczos resampling as Pillow does it, byte for byte: the reference prepares pictures and masks with it, and a mask is
//! thresholded after it. (Pillow's `Resample.c`: rows first, then columns, each rounded to 8 bits.)

/// Bits after the point of Pillow's fixed-point weights.
const PRECISION: u32 = 32 - 8 - 2;
/// Lobes of the Lanczos window.
const LOBES: f64 = 3.;

/// Where the weights of one output value begin, and the weights.
type Taps = (usize, Vec<i64>);

/// Interleaved `channels` of `from.0` x `from.1` pixels -> `to.0` x `to.1` pixels (width, height).
pub(super) fn lanczos(pixels: &[u8], channels: usize, from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    let mut pixels = pixels.to_vec();
    if from.0 != to.0 {
        let taps = taps(from.0, to.0);
        let rows = pixels.chunks_exact(from.0 * channels);
        pixels = rows
            .flat_map(|row| (0..to.0 * channels).map(|i| weigh(&taps[i / channels], |x| row[x * channels + i % channels])))
            .collect();
    }
    if from.1 != to.1 {
        let stride = to.0 * channels;
        let taps = taps(from.1, to.1);
        pixels = (0..to.1 * stride).map(|i| weigh(&taps[i / stride], |y| pixels[y * stride + i % stride])).collect();
    }
    pixels
}

fn weigh((first, weights): &Taps, at: impl Fn(usize) -> u8) -> u8 {
    let half = 1 << (PRECISION - 1);
    let sum: i64 = weights.iter().enumerate().map(|(i, weight)| weight * i64::from(at(first + i))).sum();
    ((sum + half) >> PRECISION).clamp(0, 255) as u8
}

/// The taps of each of `to` values made from `from`.
fn taps(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.);
    let support = LOBES * stretch;
    let at = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.) as usize;
        let last = ((centre + support + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..last).map(|x| window((x as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        (first, weights.into_iter().map(|weight| (weight / sum * f64::from(1u32 << PRECISION)).round() as i64).collect())
    };
    (0..to).map(at).collect()
}

fn window(x: f64) -> f64 {
    let sinc = |x: f64| if x == 0. { 1. } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
    if (-LOBES..LOBES).contains(&x) { sinc(x) * sinc(x / LOBES) } else { 0. }
}
