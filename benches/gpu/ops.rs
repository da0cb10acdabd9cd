//! Each operation at FLUX.1-dev's sizes (1024 x 1024, 512 text tokens): candle's operations, then kernels of ours, in turn.

use std::time::Instant;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use kernels::{
    Addend, After, Beside, Delta, Heads, Projection, Whose, Window, Work, add_gated_then_norm, attention, attention_beside,
    choose, convolve, gelu_beside, group_norm, joint_heads, linear, linear_beside, linear_fp8, linear_gelu, merge,
    modulated_norm, quantise_fp8, widen_blocks,
};
use serde_json::json;

use crate::report::Report;

/// Where and in what type it is computed, and sizes, so that the bench itself can be tried with small ones.
struct Setting {
    device: Device,
    dtype: DType,
    l: usize,
    l_txt: usize,
    d: usize,
    heads: usize,
    e: usize,
    mlp: usize,
    side: usize,
}

impl Setting {
    fn random(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::randn(0f32, 1., shape, &self.device)?.to_dtype(dtype)
    }

    /// As trained weights are.
    fn small(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        (self.random(shape, DType::F32)? * 0.02)?.to_dtype(dtype)
    }

    /// Bytes of a value.
    fn value(&self) -> f64 {
        self.dtype.size_in_bytes() as f64
    }
}

/// How far results of the same arithmetic in 16 bits may be apart.
const NEAR: f64 = 2e-2;

/// An operation, and what it must do at least: bytes to move, and operations of the matrix units.
struct Case {
    name: String,
    bytes: f64,
    flops: f64,
    /// How far both results may be apart.
    most: f64,
    run: Box<dyn Fn() -> Result<Tensor>>,
}

impl Case {
    fn new(name: impl Into<String>, bytes: f64, flops: f64, run: impl Fn() -> Result<Tensor> + 'static) -> Self {
        Self { name: name.into(), bytes, flops, most: NEAR, run: Box::new(run) }
    }
}

/// Times of each operation, in ms: all rounds, of both kinds of kernels; and which results are too far apart.
pub(crate) fn run(device: &Device, dtype: DType, full: bool, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let device = device.clone();
    let on = if full {
        Setting { device, dtype, l: 4608, l_txt: 512, d: 3072, heads: 24, e: 128, mlp: 12288, side: 1024 }
    } else {
        Setting { device, dtype, l: 144, l_txt: 16, d: 256, heads: 2, e: 128, mlp: 1024, side: 64 }
    };
    // Both are timed here, whichever the steps used.
    choose(Work::Attention, Whose::Own);
    choose(Work::Convolution, Whose::Own);
    let copy = copy_rate(&on.device, full)?;
    println!("\noperations in {dtype:?}, medians of {rounds}; a copy on the device: {:.0} GB/s", copy / 1e9);
    report.add("operations", json!({"name": "a copy on the device", "bytes_per_second": copy}))?;
    println!("{:42} {:>10} {:>10} {:>7} {:>10} {:>10} {:>9}", "", "plain, ms", "fused, ms", "ratio", "GB/s", "TFLOP/s", "apart");
    for make in [blocks, single_blocks, products, convolutions, loras, widenings] {
        for case in make(&on)? {
            report.part(&case.name, |report| time(&case, &on.device, rounds, report));
        }
    }
    // Where it has no plan, its case above is our kernel's.
    println!("{}", kernels::cudnn_status());
    report.add("operations", json!({"name": "cuDNN", "status": kernels::cudnn_status()}))
}

/// What blocks do beside their products, and the autoencoder's norm.
fn blocks(on: &Setting) -> Result<Vec<Case>> {
    let &Setting { dtype, l, l_txt, d, heads, e, mlp, side, .. } = on;
    let (x, update) = (on.random(&[1, l, d], dtype)?, on.random(&[1, l, d], dtype)?);
    let modulation = on.random(&[1, 1, 3 * d], dtype)?.chunk(3, 2)?;
    let y = on.random(&[1, l, 3 * d + mlp], dtype)?;
    let (qkv, hidden) = (y.narrow(2, 0, 3 * d)?, y.narrow(2, 3 * d, mlp)?);
    let text = on.random(&[1, l_txt, 3 * d], dtype)?;
    let scale = on.random(&[e], DType::F32)?;
    let angles = on.random(&[l + l_txt, e / 2], DType::F32)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let head = || on.random(&[1, heads, l, e], dtype);
    let heads_of = [head()?, head()?, head()?];
    let picture = on.random(&[1, side, side, 128], dtype)?;
    let (weight, bias) = (on.random(&[128], DType::F32)?, on.random(&[128], DType::F32)?);

    let rows = (l * d) as f64 * on.value();
    let attend = move |[q, k, v]: &[Tensor; 3]| attention(q, k, v, 1. / (e as f64).sqrt(), None);
    let flops = 4. * (l * l * d) as f64;
    let mut cases = vec![
        Case::new("layer norm, modulate", 2. * rows, 0., {
            let (x, modulation) = (x.clone(), modulation.clone());
            move || modulated_norm(&x, &modulation[0], &modulation[1], 1e-6)
        }),
        Case::new("gate, residual, layer norm, modulate", 4. * rows, 0., {
            let x = x.clone();
            move || {
                let both = add_gated_then_norm(&x, [&modulation[2], &update], [&modulation[0], &modulation[1]], 1e-6)?;
                Ok(both.1)
            }
        }),
        Case::new("heads: norm, rotate, join", 6. * (rows + (l_txt * d) as f64 * on.value()), 0., move || {
            let stream = |qkv| Projection { qkv, query_scale: scale.clone(), key_scale: scale.clone() };
            Ok(joint_heads(&[stream(&text), stream(&qkv)], heads, &cos, &sin, 1e-6)?.q)
        }),
        Case::new("[attention | gelu(mlp)]", 2. * (l * (d + mlp)) as f64 * on.value(), 0., move || gelu_beside(&x, &hidden)),
        Case::new("attention", 4. * rows, flops, {
            let heads = heads_of.clone();
            move || attend(&heads)
        }),
        Case::new("group norm, SiLU, 128 channels", 3. * (128 * side * side) as f64 * on.value(), 0., move || {
            group_norm(&picture, 32, &weight, &bias, 1e-6, After::Silu)
        }),
    ];
    if kernels::has_cudnn() {
        cases.push(Case::new("attention, cuDNN", 4. * rows, flops, move || {
            choose(Work::Attention, Whose::Cudnn);
            let y = attend(&heads_of);
            choose(Work::Attention, Whose::Own);
            y
        }));
    }
    Ok(cases)
}

/// A single block from its first product to what its second one reads, with kernels of ours in two ways: GELU and attention where that
/// is read, and in a pass of their own.
fn single_blocks(on: &Setting) -> Result<Vec<Case>> {
    let &Setting { dtype, l, d, heads, e, mlp, .. } = on;
    let (x, w) = (on.random(&[l, d], dtype)?, on.small(&[3 * d + mlp, d], dtype)?);
    let bias = on.small(&[3 * d + mlp], dtype)?;
    let head = || on.random(&[1, heads, l, e], dtype);
    let heads = Heads { q: head()?, k: head()?, v: head()? };
    let bytes = (l * (9 * d + mlp) + (3 * d + mlp) * d) as f64 * on.value();
    let flops = (2 * l * (3 * d + mlp) * d + 4 * l * l * d) as f64;
    let ways = [("in place", true), ("GELU beside it", false)];
    Ok(ways
        .map(|(name, in_place)| {
            let (x, w, bias, heads) = (x.clone(), w.clone(), bias.clone(), heads.clone());
            Case::new(format!("single linear1, attention, {name}"), bytes, flops, move || {
                let right = match in_place && kernels::places_beside(&x) {
                    true => linear_beside(&x, &w, Some(&bias), 3 * d, d)?.1.reshape(&[1, l])?,
                    false => Beside::open(&linear(&x, &w, Some(&bias))?.unsqueeze(0)?, 3 * d)?.1,
                };
                attention_beside(&heads, &right)
            })
        })
        .into())
}

/// Products with the matrices of both kinds of block.
fn products(on: &Setting) -> Result<Vec<Case>> {
    let &Setting { dtype, l, l_txt, d, mlp, .. } = on;
    // (name, tokens, outputs, inputs, GELU)
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
    let mut cases = Vec::new();
    for (name, tokens, output, input, through_gelu) in matrices {
        let (x, w) = (on.random(&[tokens, input], dtype)?, on.small(&[output, input], dtype)?);
        let bias = on.small(&[output], dtype)?;
        let bytes = (tokens * (input + output) + output * input) as f64 * on.value();
        let flops = 2. * (tokens * output * input) as f64;
        cases.push(Case::new(format!("{name}: {tokens} x {output} x {input}"), bytes, flops, {
            let (x, w, bias) = (x.clone(), w.clone(), bias.clone());
            move || (if through_gelu { linear_gelu } else { linear })(&x, &w, Some(&bias))
        }));
        if !kernels::has_fp8_products(&on.device) {
            continue;
        }
        // In the place of "fused": the same in e4m3, with the making of the rows, beside candle's product in 16 bits.
        let rows = quantise_fp8(&w)?;
        let bytes = (tokens * (input + output)) as f64 * on.value() + (output * input) as f64;
        let in_e4m3 = Case::new(format!("{name} in e4m3"), bytes, flops, move || {
            if kernels::fused() {
                return linear_fp8(&quantise_fp8(&x)?, &rows, Some(&bias), through_gelu, dtype);
            }
            (if through_gelu { linear_gelu } else { linear })(&x, &w, Some(&bias))
        });
        cases.push(Case { most: 0.04, ..in_e4m3 });
    }
    Ok(cases)
}

/// The autoencoder's convolutions, from the decoder's first to an encoder's last.
fn convolutions(on: &Setting) -> Result<Vec<Case>> {
    let &Setting { dtype, side, .. } = on;
    // (name, side, channels in and out, window, residual)
    let all = [
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
    let mut cases = Vec::new();
    for (name, side, input, output, window, beside) in all {
        let out = side * window.enlarge / window.stride;
        let (x, w) = (on.random(&[1, side, side, input], dtype)?, on.small(&[output, 3, 3, input], dtype)?);
        let bias = on.small(&[output], dtype)?;
        let residual = beside.then(|| on.random(&[1, out, out, output], dtype)).transpose()?;
        let written = out * out * output * (1 + usize::from(beside));
        let bytes = (side * side * input + written + w.elem_count()) as f64 * on.value();
        let flops = 18. * (out * out * input * output) as f64;
        let name = format!("convolution {name}: {side} x {side}");
        let run = move || convolve(&x, &w, &bias, window, residual.as_ref());
        if kernels::has_cudnn() && window.enlarge == 1 && input.min(output) >= 16 {
            let run = run.clone();
            cases.push(Case::new(format!("{name}, cuDNN"), bytes, flops, move || {
                choose(Work::Convolution, Whose::Cudnn);
                let y = run();
                choose(Work::Convolution, Whose::Own);
                y
            }));
        }
        cases.push(Case::new(name, bytes, flops, run));
    }
    Ok(cases)
}

/// LoRAs onto matrices of the blocks.
fn loras(on: &Setting) -> Result<Vec<Case>> {
    let &Setting { dtype, d, mlp, .. } = on;
    let mut cases = Vec::new();
    for (output, input) in [(3 * d, d), (d, d + mlp), (3 * d + mlp, d)] {
        let w = on.small(&[output, input], dtype)?;
        let (up, down) = (on.small(&[output, 16], DType::F32)?, on.small(&[16, input], DType::F32)?);
        let addends = [Addend { rows: 0..output, delta: Delta::LowRank { up, down } }];
        let bytes = 2. * (output * input) as f64 * on.value();
        cases.push(Case::new(format!("LoRA of rank 16 onto {output} x {input}"), bytes, 0., move || merge(&w, &addends)));
    }
    Ok(cases)
}

/// GGUF's blocks to the type of computation.
fn widenings(on: &Setting) -> Result<Vec<Case>> {
    let &Setting { dtype, d, mlp, .. } = on;
    let (output, input) = (3 * d + mlp, d);
    let mut cases = Vec::new();
    for kind in [GgmlDType::Q8_0, GgmlDType::Q6K, GgmlDType::Q5K, GgmlDType::Q4K, GgmlDType::Q4_0] {
        let matrix = quantised(kind, output, input, &on.device)?;
        let bytes = matrix.storage_size_in_bytes() as f64 + (output * input) as f64 * on.value();
        let name = format!("{kind:?} widened: {output} x {input}");
        cases.push(Case::new(name, bytes, 0., move || widen_blocks(&matrix, dtype, &[])));
    }
    Ok(cases)
}

/// Times both in turn, and prints the medians.
fn time(case: &Case, device: &Device, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    let error = apart(case)?;
    let [mut plain, mut fused] = [false, true].map(|_| Vec::with_capacity(rounds));
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
    report.add(
        "operations",
        json!({
            "name": case.name, "apart": error, "bound": case.most, "plain_ms": plain, "fused_ms": fused, "bytes": case.bytes,
            "flops": case.flops,
        }),
    )?;
    // What is not a number is too far as well.
    anyhow::ensure!(error < case.most, "our kernels' result is {error:.1e} away from candle's");
    Ok(())
}

/// A matrix as GGUF has it: the same rows over and over, because the processor, which makes them, takes its time.
fn quantised(kind: GgmlDType, output: usize, input: usize, device: &Device) -> Result<QTensor> {
    const ROWS: usize = 64;
    let rows = QTensor::quantize(&Tensor::randn(0f32, 0.02, (ROWS, input), &Device::Cpu)?, kind)?;
    let all = rows.data()?.repeat(output.div_ceil(ROWS));
    let size = output * input / kind.block_size() * kind.type_size();
    QTensor::new(QStorage::from_data(all[..size].into(), device, kind)?, (output, input))
}

/// How far the results of both kinds of kernels are apart, relative to their length.
fn apart(case: &Case) -> Result<f64> {
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
fn once(device: &Device, case: &Case) -> Result<f64> {
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
