//! The merge of a LoRA of rank 16 into one weight of FLUX.1, against a plain copy of it: `cargo bench -p darkroom-kernels --bench ops`.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and ends by panicking")]

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use kernels::{Addend, Delta, merge};
use rayon::prelude::*;

const REPEATS: usize = 15;
const RANK: usize = 16;

fn main() {
    for dtype in [DType::BF16, DType::F32] {
        for (output, input) in [(9216, 3072), (3072, 12288), (21504, 3072)] {
            let random = |shape: (usize, usize)| Tensor::rand(-1f32, 1f32, shape, &Device::Cpu).unwrap();
            let weight = random((output, input)).to_dtype(dtype).unwrap();
            let delta = Delta::LowRank { up: random((output, RANK)), down: random((RANK, input)) };
            let addends = [Addend { rows: 0..output, delta }];
            let bytes = vec![1u8; output * input * dtype.size_in_bytes()];
            let copied = median(|| {
                let mut to: Vec<u8> = kernels::zeros(bytes.len());
                to.par_chunks_mut(1 << 18).zip(bytes.par_chunks(1 << 18)).for_each(|(to, from)| to.copy_from_slice(from));
                black_box(to);
            });
            let merged = median(|| drop(black_box(merge(&weight, &addends).unwrap())));
            let rate = |seconds: f64| bytes.len() as f64 / 1e9 / seconds;
            println!(
                "{dtype:?} {output} x {input}: copy {:.1} ms ({:.2} GB/s), merge {:.1} ms ({:.2} GB/s, {:.0} % of the copy's rate)",
                copied * 1e3,
                rate(copied),
                merged * 1e3,
                rate(merged),
                100.0 * copied / merged
            );
        }
    }
}

fn median(mut run: impl FnMut()) -> f64 {
    run();
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = (0..REPEATS).map(time).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}
