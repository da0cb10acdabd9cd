//! The noise that PyTorch draws for a seed, so that a picture made elsewhere can be made again here.

mod box_muller;
mod mersenne;
mod philox;

use candle_core::{Device, Result, Tensor};

use mersenne::Mersenne;
use philox::Philox;

/// Which generator draws the noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoiseKind {
    /// PyTorch's CPU generator: the noise of diffusers with a CPU generator, and of ComfyUI.
    #[default]
    Cpu,
    /// PyTorch's CUDA generator (Philox).
    Cuda,
}

impl std::str::FromStr for NoiseKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err("must be cpu or cuda".into()),
        }
    }
}

/// A seeded source of normal f32 numbers, as `torch.randn(..., generator=torch.Generator(device).manual_seed(seed))`.
///
/// It has a state: a second draw goes on where the first ended, as in an image-to-image run that also samples the encoder.
#[derive(Debug, Clone)]
pub struct Generator(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Cpu(Box<Mersenne>),
    Cuda(Philox),
}

impl Generator {
    pub fn new(kind: NoiseKind, seed: u64) -> Self {
        match kind {
            NoiseKind::Cpu => Self::cpu(seed),
            NoiseKind::Cuda => Self::cuda(seed),
        }
    }

    /// PyTorch's CPU generator. Like PyTorch's, it reads only the low 32 bits of `seed`: 5 and 2^32 + 5 give the same noise.
    ///
    /// Equal bit for bit to torch 2.15 on x86-64 with AVX2. A torch build for another processor may differ in the last bits,
    /// because it takes logarithm, sine and cosine from another library.
    pub fn cpu(seed: u64) -> Self {
        Self(Kind::Cpu(Box::new(Mersenne::new(seed))))
    }

    /// PyTorch's CUDA generator; see `philox.rs` for what it is equal to, and how nearly.
    pub fn cuda(seed: u64) -> Self {
        Self(Kind::Cuda(Philox::new(seed)))
    }

    /// The next `n` numbers, as `torch.randn(n)` draws them.
    ///
    /// A draw is one unit: two draws of 8 are not one draw of 16, in PyTorch as here.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        match &mut self.0 {
            Kind::Cpu(mersenne) => mersenne.normal(n),
            Kind::Cuda(philox) => philox.normal(n),
        }
    }

    /// The next f32 tensor of `shape`, on `device`. FLUX.1's latents have the shape `(1, 16, height / 8, width / 8)`.
    pub fn latents(&mut self, shape: &[usize], device: &Device) -> Result<Tensor> {
        Tensor::from_vec(self.normal(shape.iter().product()), shape, device)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Fixture {
        cpu: Vec<Case>,
        philox: Vec<Case>,
    }

    /// The draws that one generator made, one after another.
    #[derive(Deserialize)]
    struct Case {
        seed: u64,
        draws: Vec<Draw>,
    }

    #[derive(Deserialize)]
    struct Draw {
        n: usize,
        /// The bits of the first and the last values.
        first: Vec<u32>,
        last: Vec<u32>,
        /// Sum of (i + 1) * bits of value i, modulo 2^64.
        checksum: u64,
    }

    fn fixture() -> Fixture {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/noise/noise.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    fn checksum(values: &[f32]) -> u64 {
        (1u64..).zip(values).fold(0u64, |sum, (i, value)| sum.wrapping_add(i.wrapping_mul(u64::from(value.to_bits()))))
    }

    #[test]
    fn cpu_noise_is_torchs_bit_for_bit() {
        let cases = fixture().cpu;
        assert!(cases.len() >= 60);
        for case in cases {
            let mut generator = Generator::new(NoiseKind::Cpu, case.seed);
            for (index, draw) in case.draws.iter().enumerate() {
                let values = generator.normal(draw.n);
                let place = format!("seed {}, draw {index} of {} values", case.seed, draw.n);
                assert_eq!(values.len(), draw.n, "{place}");
                assert_eq!(bits(&values[..draw.first.len()]), draw.first, "{place}");
                assert_eq!(bits(&values[draw.n - draw.last.len()..]), draw.last, "{place}");
                assert_eq!(checksum(&values), draw.checksum, "{place}");
            }
        }
    }

    #[test]
    fn philox_noise_is_that_of_an_independent_implementation() {
        for case in fixture().philox {
            let mut generator = Generator::new(NoiseKind::Cuda, case.seed);
            for draw in &case.draws {
                let values = generator.normal(draw.n);
                let ends = values[..draw.first.len()].iter().chain(&values[draw.n - draw.last.len()..]);
                for (value, expected) in ends.zip(draw.first.iter().chain(&draw.last)) {
                    let expected = f32::from_bits(*expected);
                    assert!((value - expected).abs() < 2e-6, "seed {}: {value} is not {expected}", case.seed);
                }
            }
        }
    }

    #[test]
    fn latents_are_one_draw_in_row_major_order() {
        let shape = [1, 16, 4, 6];
        let latents = Generator::cpu(7).latents(&shape, &Device::Cpu).unwrap();
        assert_eq!(latents.dims(), shape);
        assert_eq!(latents.flatten_all().unwrap().to_vec1::<f32>().unwrap(), Generator::cpu(7).normal(384));
    }

    #[test]
    fn an_empty_draw_changes_nothing() {
        for kind in [NoiseKind::Cpu, NoiseKind::Cuda] {
            let mut generator = Generator::new(kind, 3);
            assert!(generator.normal(0).is_empty());
            assert_eq!(generator.normal(20), Generator::new(kind, 3).normal(20));
        }
    }
}
