//! PyTorch's CUDA generator: Philox4x32-10, laid out over the tensor as `torch.randn` on a GPU does.
//!
//! Follows pytorch v2.7.1 `aten/src/ATen/native/cuda/DistributionTemplates.h` and cuRAND's `curand_normal4`. Value `i` comes
//! from thread `i`: counter `(draws before, 0, i, 0)`, key `seed`, and the first of the four numbers that a thread makes.
//!
//! This holds while the GPU can hold one thread for each value, that is up to
//! `multiprocessors * threads per multiprocessor` values: 125,952 on an RTX 3090, 196,608 on an RTX 4090, 221,184 on an A100
//! SXM, 270,336 on an H100 or H200 SXM. A 1024 x 1024 picture has 262,144. Beyond it a GPU starts to use the threads' other
//! numbers, so there the noise of PyTorch itself differs from one GPU to another; here it stays the same everywhere.
//!
//! Compared with the generator's published vectors, with an independent implementation, and with printed values of PyTorch on
//! a GPU (four digits); never bit for bit with a GPU. A GPU's own sine is an approximation (absolute error up to 2^-21), so
//! values may differ from it by about 1e-6.

/// What each round multiplies with.
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// What the key grows by from round to round.
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

#[derive(Debug, Clone)]
pub(super) struct Philox {
    key: [u32; 2],
    /// Draws made; PyTorch's offset divided by 4.
    draws: u64,
}

impl Philox {
    pub(super) fn new(seed: u64) -> Self {
        Self { key: halves(seed), draws: 0 }
    }

    /// `n` normal numbers, as `torch.randn(n, device="cuda")` in f32.
    pub(super) fn normal(&mut self, n: usize) -> Vec<f32> {
        if n == 0 {
            return Vec::new();
        }
        let [low, high] = halves(self.draws);
        self.draws += 1;
        (0..n as u64)
            .map(|i| {
                let [thread_low, thread_high] = halves(i);
                let [x, y, ..] = philox([low, high, thread_low, thread_high], self.key);
                box_muller(x, y)
            })
            .collect()
    }
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [low0, high0] = halves(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let [low1, high1] = halves(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// The first number of cuRAND's Box-Muller pair (the sine).
fn box_muller(x: u32, y: u32) -> f32 {
    const TO_UNIT: f32 = 1.0 / 4_294_967_296.0;
    const TO_ANGLE: f32 = TO_UNIT * std::f32::consts::TAU;
    // f32 and fused, as on the GPU: its rounding of the two uniform numbers is the largest of all.
    let unit = (x as f32).mul_add(TO_UNIT, TO_UNIT / 2.0);
    let angle = (y as f32).mul_add(TO_ANGLE, TO_ANGLE / 2.0);
    // f64, so that the result does not depend on a platform's f32 mathematics.
    ((-2.0 * f64::from(unit).ln()).sqrt() * f64::from(angle).sin()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123's `kat_vectors` for philox4x32-10: nothing, all ones, digits of pi.
    #[test]
    fn the_generator_gives_its_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// `torch.manual_seed(0); torch.randn(16, 8, device="cuda")` as torch 2.2.0 on a GPU has printed it, the first rows.
    #[test]
    fn seed_0_gives_the_values_that_a_gpu_prints() {
        let printed = [
            [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284],
            [-1.0745, -0.3631, -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820],
            [-0.1271, 1.2169, 1.4353, 1.0605, -0.4941, -1.4244, -0.7244, -1.2973],
        ];
        for (value, printed) in Philox::new(0).normal(128).into_iter().zip(printed.as_flattened()) {
            assert!((value - printed).abs() <= 0.51e-4, "{value} would print as {printed}");
        }
    }

    #[test]
    fn each_draw_goes_on() {
        let mut philox = Philox::new(1);
        let (first, second) = (philox.normal(64), philox.normal(64));
        assert_eq!(first, Philox::new(1).normal(64));
        assert_ne!(first, second);
    }
}
