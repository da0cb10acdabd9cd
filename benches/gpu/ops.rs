//! Each operation at FLUX.1-dev's sizes (1024 x 1024, 512 text tokens): candle's operations, then kernels of ours, in turn.

use std::time::Instant;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use kernels::{
    Addend, After, Attention, Delta, Projection, Window, add_gated_then_norm, attention, choose_attention, convolve, gelu_beside,
    group_norm, joint_heads, linear, linear_fp8, linear_gelu, merge, modulated_norm, quantise_fp8, widen_blocks,
};
use serde_json::{Value, json};

/// Sizes, so that the bench itself can be tried with small ones.
struct Sizes {
    l: usize,
    l_txt: usize,
    d: usize,
    heads: usize,
    e: usize,
    mlp: usize,
    side: usize,
}

/// How far results of the same arithmetic in 16 bits may be apart.
const NEAR: f64 = 2e-2;

/// An operation, and what it must do at least: bytes to move, and operations of the matrix units.
struct Case<'a> {
    name: String,
    bytes: f64,
    flops: f64,
    /// How far both results may be apart.
    most: f64,
    run: Box<dyn Fn() -> Result<Tensor> + 'a>,
}

/// Times of one operation, in ms: all rounds, of both kinds of kernels.
pub(crate) fn run(device: &Device, dtype: DType, full: bool, rounds: usize) -> anyhow::Result<Value> {
    let sizes = if full {
        Sizes { l: 4608, l_txt: 512, d: 3072, heads: 24, e: 128, mlp: 12288, side: 1024 }
    } else {
        Sizes { l: 144, l_txt: 16, d: 256, heads: 2, e: 128, mlp: 1024, side: 64 }
    };
    let value = dtype.size_in_bytes() as f64;
    let random = |shape: &[usize], dtype| Tensor::randn(0f32, 1., shape, device)?.to_dtype(dtype);
    let Sizes { l, l_txt, d, heads, e, mlp, side } = sizes;
    let (x, update) = (random(&[1, l, d], dtype)?, random(&[1, l, d], dtype)?);
    let modulation = random(&[1, 1, 3 * d], dtype)?.chunk(3, 2)?;
    let y = random(&[1, l, 3 * d + mlp], dtype)?;
    let (qkv, hidden) = (y.narrow(2, 0, 3 * d)?, y.narrow(2, 3 * d, mlp)?);
    let text = random(&[1, l_txt, 3 * d], dtype)?;
    let scale = random(&[e], DType::F32)?;
    let angles = random(&[l + l_txt, e / 2], DType::F32)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let head = |l| random(&[1, heads, l, e], dtype);
    let (q, k, v) = (head(l)?, head(l)?, head(l)?);
    let picture = random(&[1, side, side, 128], dtype)?;
    let (weight, bias) = (random(&[128], DType::F32)?, random(&[128], DType::F32)?);

    let rows = (l * d) as f64 * value;
    let stream = |qkv| Projection { qkv, query_scale: scale.clone(), key_scale: scale.clone() };
    let mut cases = vec![
        Case {
            name: "layer norm, modulate".into(),
            bytes: 2. * rows,
            flops: 0.,
            most: NEAR,
            run: Box::new(|| modulated_norm(&x, &modulation[0], &modulation[1], 1e-6)),
        },
        Case {
            name: "gate, residual, layer norm, modulate".into(),
            bytes: 4. * rows,
            flops: 0.,
            most: NEAR,
            run: Box::new(|| {
                let both = add_gated_then_norm(&x, [&modulation[2], &update], [&modulation[0], &modulation[1]], 1e-6)?;
                Ok(both.1)
            }),
        },
        Case {
            name: "heads: norm, rotate, join".into(),
            bytes: 6. * (rows + (l_txt * d) as f64 * value),
            flops: 0.,
            most: NEAR,
            run: Box::new(|| Ok(joint_heads(&[stream(&text), stream(&qkv)], heads, &cos, &sin, 1e-6)?.q)),
        },
        Case {
            name: "[attention | gelu(mlp)]".into(),
            bytes: 2. * (l * (d + mlp)) as f64 * value,
            flops: 0.,
            most: NEAR,
            run: Box::new(|| gelu_beside(&x, &hidden)),
        },
        Case {
            name: "attention".into(),
            bytes: 4. * rows,
            flops: 4. * (l * l * d) as f64,
            most: NEAR,
            run: Box::new(|| attention(&q, &k, &v, 1. / (e as f64).sqrt(), None)),
        },
        Case {
            name: "group norm, SiLU, 128 channels".into(),
            bytes: 3. * (128 * side * side) as f64 * value,
            flops: 0.,
            most: NEAR,
            run: Box::new(|| group_norm(&picture, 32, &weight, &bias, 1e-6, After::Silu)),
        },
    ];
    if kernels::has_cudnn() {
        cases.push(Case {
            name: "attention, cuDNN".into(),
            bytes: 4. * rows,
            flops: 4. * (l * l * d) as f64,
            most: NEAR,
            run: Box::new(|| {
                choose_attention(Attention::Cudnn);
                let y = attention(&q, &k, &v, 1. / (e as f64).sqrt(), None);
                choose_attention(Attention::Own);
                y
            }),
        });
    }
    // (name, tokens, outputs, inputs, GELU) of the matrices of both kinds of block.
    let matrices = [
        ("img qkv", l - l_txt, 3 * d, d, false),
        ("img proj", l - l_txt, d, d, false),
        ("img mlp up, GELU", l - l_txt, mlp, d, true),
        ("img mlp down", l - l_txt, d, mlp, false),
        ("txt qkv", l_txt, 3 * d, d, false),
        ("txt mlp up, GELU", l_txt, mlp, d, true),
        ("txt mlp down", l_txt, d, mlp, false),
        ("single linear1", l, 3 * d + mlp, d, false),
        ("single linear2", l, d, d + mlp, false),
    ];
    let small = |shape: &[usize], dtype| -> Result<Tensor> { (random(shape, DType::F32)? * 0.02)?.to_dtype(dtype) };
    for (name, tokens, output, input, through_gelu) in matrices {
        let (x, w) = (random(&[tokens, input], dtype)?, small(&[output, input], dtype)?);
        let bias = small(&[output], dtype)?;
        cases.push(Case {
            name: format!("{name}: {tokens} x {output} x {input}"),
            bytes: (tokens * (input + output) + output * input) as f64 * value,
            flops: 2. * (tokens * output * input) as f64,
            most: NEAR,
            run: {
                let (x, w, bias) = (x.clone(), w.clone(), bias.clone());
                Box::new(move || (if through_gelu { linear_gelu } else { linear })(&x, &w, Some(&bias)))
            },
        });
        if !kernels::has_fp8_products(device) {
            continue;
        }
        // In the place of "fused": the same in e4m3, with the making of the rows, beside candle's product in 16 bits.
        let rows = quantise_fp8(&w)?;
        cases.push(Case {
            name: format!("{name} in e4m3"),
            bytes: (tokens * input) as f64 * value + (output * input) as f64 + (tokens * output) as f64 * value,
            flops: 2. * (tokens * output * input) as f64,
            most: 0.04,
            run: Box::new(move || {
                if kernels::fused() {
                    return linear_fp8(&quantise_fp8(&x)?, &rows, Some(&bias), through_gelu, dtype);
                }
                (if through_gelu { linear_gelu } else { linear })(&x, &w, Some(&bias))
            }),
        });
    }
    // (name, side, channels in and out, window, residual) of the autoencoder's convolutions, the decoder's first and an encoder's last.
    let convolutions = [
        ("16 to 512", side / 8, 16, 512, Window::SAME, false),
        ("512, residual", side / 8, 512, 512, Window::SAME, true),
        ("512, doubled", side / 8, 512, 512, Window::DOUBLE, false),
        ("512 to 256", side / 2, 512, 256, Window::SAME, false),
        ("256, doubled", side / 2, 256, 256, Window::DOUBLE, false),
        ("256 to 128", side, 256, 128, Window::SAME, false),
        ("128, residual", side, 128, 128, Window::SAME, true),
        ("128 to 3", side, 128, 3, Window::SAME, false),
        ("3 to 128", side, 3, 128, Window::SAME, false),
        ("128, halved", side, 128, 128, Window::HALVE, false),
    ];
    for (name, side, input, output, window, beside) in convolutions {
        let out = side * window.enlarge / window.stride;
        let (x, w, bias) =
            (random(&[1, side, side, input], dtype)?, small(&[output, 3, 3, input], dtype)?, small(&[output], dtype)?);
        let residual = beside.then(|| random(&[1, out, out, output], dtype)).transpose()?;
        let written = out * out * output * (1 + usize::from(beside));
        cases.push(Case {
            name: format!("convolution {name}: {side} x {side}"),
            bytes: (side * side * input + written + w.elem_count()) as f64 * value,
            flops: 18. * (out * out * input * output) as f64,
            most: NEAR,
            run: Box::new(move || convolve(&x, &w, &bias, window, residual.as_ref())),
        });
    }
    for (output, input) in [(3 * d, d), (d, d + mlp), (3 * d + mlp, d)] {
        let w = small(&[output, input], dtype)?;
        let delta = Delta::LowRank { up: small(&[output, 16], DType::F32)?, down: small(&[16, input], DType::F32)? };
        let addends = [Addend { rows: 0..output, delta }];
        cases.push(Case {
            name: format!("LoRA of rank 16 onto {output} x {input}"),
            bytes: 2. * (output * input) as f64 * value,
            flops: 0.,
            most: NEAR,
            run: Box::new(move || merge(&w, &addends)),
        });
    }
    for kind in [GgmlDType::Q8_0, GgmlDType::Q6K, GgmlDType::Q5K, GgmlDType::Q4K, GgmlDType::Q4_0] {
        let (output, input) = (3 * d + mlp, d);
        let blocks = blocks(kind, output, input, device)?;
        cases.push(Case {
            name: format!("{kind:?} widened: {output} x {input}"),
            bytes: blocks.storage_size_in_bytes() as f64 + (output * input) as f64 * value,
            flops: 0.,
            most: NEAR,
            run: Box::new(move || widen_blocks(&blocks, dtype, &[])),
        });
    }

    let copy = copy_rate(device, full)?;
    println!("\noperations in {dtype:?}, medians of {rounds}; a copy on the device: {:.0} GB/s", copy / 1e9);
    println!("{:42} {:>10} {:>10} {:>7} {:>10} {:>10} {:>9}", "", "plain, ms", "fused, ms", "ratio", "GB/s", "TFLOP/s", "apart");
    let mut report = Vec::new();
    for case in &cases {
        let error = apart(case)?;
        let times = [false, true].map(|_| Vec::with_capacity(rounds));
        let [mut plain, mut fused] = times;
        for round in 0..=rounds {
            for (on, times) in [(false, &mut plain), (true, &mut fused)] {
                kernels::use_fused(on);
                let milliseconds = once(device, case)?;
                // The first round warms up.
                if round > 0 {
                    times.push(milliseconds);
                }
            }
        }
        kernels::use_fused(false);
        plain.sort_by(f64::total_cmp);
        fused.sort_by(f64::total_cmp);
        let (p, f) = (plain[rounds / 2], fused[rounds / 2]);
        let (gigabytes, teraflops) = (case.bytes / f / 1e6, case.flops / f / 1e9);
        println!("{:42} {p:10.3} {f:10.3} {:7.2} {gigabytes:10.0} {teraflops:10.0} {error:9.1e}", case.name, p / f);
        anyhow::ensure!(error < case.most, "{}: our kernels' result is {error:.1e} away from candle's", case.name);
        report.push(json!({"name": case.name, "apart": error, "plain_ms": plain, "fused_ms": fused, "bytes": case.bytes, "flops": case.flops}));
    }
    // Where it has no plan, its case above is our kernel's.
    println!("{}", kernels::cudnn_status());
    Ok(json!({"copy_bytes_per_second": copy, "cudnn": kernels::cudnn_status(), "operations": report}))
}

/// A matrix as GGUF has it: the same rows over and over, because the processor, which makes them, takes its time.
fn blocks(kind: GgmlDType, output: usize, input: usize, device: &Device) -> Result<QTensor> {
    const ROWS: usize = 64;
    let rows = QTensor::quantize(&Tensor::randn(0f32, 0.02, (ROWS, input), &Device::Cpu)?, kind)?;
    let all = rows.data()?.repeat(output.div_ceil(ROWS));
    let size = output * input / kind.block_size() * kind.type_size();
    QTensor::new(QStorage::from_data(all[..size].into(), device, kind)?, (output, input))
}

/// How far the results of both kinds of kernels are apart, relative to their length.
fn apart(case: &Case<'_>) -> Result<f64> {
    let result = |fused| {
        kernels::use_fused(fused);
        let result = (case.run)()?.to_dtype(DType::F32);
        kernels::use_fused(false);
        result
    };
    let (plain, fused) = (result(false)?, result(true)?);
    let norm = |x: &Tensor| Ok::<_, candle_core::Error>(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt());
    Ok(norm(&(fused - &plain)?)? / norm(&plain)?)
}

/// Milliseconds of one run: a few in a row, so that launching is not what is measured, synchronised around.
fn once(device: &Device, case: &Case<'_>) -> Result<f64> {
    const IN_A_ROW: usize = 5;
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..IN_A_ROW {
        std::hint::black_box((case.run)()?);
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() * 1e3 / IN_A_ROW as f64)
}

/// Bytes read and written in a second by a plain copy.
fn copy_rate(device: &Device, full: bool) -> Result<f64> {
    let values = if full { 1 << 28 } else { 1 << 20 };
    let x = Tensor::rand(0f32, 1., values, device)?;
    let mut seconds = Vec::new();
    for _ in 0..7 {
        device.synchronize()?;
        let start = Instant::now();
        std::hint::black_box(x.copy()?);
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(8. * values as f64 / seconds[3])
}
