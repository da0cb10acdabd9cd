//! Our kernels for cards against the plain operations, in every dtype, at odd sizes and strides: emulated on the processor, and on a
//! card where there is one. Outputs are poisoned before, so what a kernel does not write shows.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and errors are of interest on a card")]

#[cfg(feature = "cuda")]
mod cudnn;
mod weights;

use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor};
use kernels::{
    Addend, After, Beside, Delta, Fp8Rows, Heads, Projection, Window, add_gated, add_gated_then_norm, add_gated_then_norm_fp8,
    attention, attention_beside, convolve, emulated, gelu, gelu_beside, gelu_beside_fp8, group_norm, joined, joint_heads,
    launches, linear, linear_gelu, merge, modulated_norm, modulated_norm_fp8, quantise_fp8, rms_norm,
};

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.3f32, 1.7, shape, &Device::Cpu).unwrap()
}

fn to_f32(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

/// Euclidean distance over the length of the truth.
fn relative(got: &Tensor, truth: &Tensor) -> f64 {
    assert_eq!(got.dims(), truth.dims());
    let norm = |x: &Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(to_f32(got) - truth).unwrap()) / norm(truth)
}

/// Runs `op` with our kernels and without on inputs of each dtype, and without in f32: the kernel's error is at most that of the plain
/// operations in the same dtype (which round once) and a little, and equal inputs give equal bits. `expected` launches are made.
fn check(name: &str, dtypes: &[DType], inputs: &[Tensor], expected: usize, op: impl Fn(&[Tensor]) -> Result<Tensor>) {
    for &dtype in dtypes {
        let of = |dtype: DType, x: &Tensor| x.to_dtype(dtype).unwrap();
        let rounded: Vec<Tensor> = inputs.iter().map(|x| view_like(&of(dtype, x), x)).collect();
        let exact: Vec<Tensor> = rounded.iter().map(|x| of(DType::F32, x)).collect();
        let truth = op(&exact).unwrap();
        let plain = relative(&op(&rounded).unwrap(), &truth);
        for (place, run) in places() {
            let placed: Vec<Tensor> = rounded.iter().map(|x| view_like(&x.to_device(&place).unwrap(), x)).collect();
            let before = launches();
            let got = run(&|| op(&placed).unwrap());
            assert_eq!(launches() - before, expected, "{name} in {dtype:?} on {place:?}: launches");
            assert_eq!(got.dtype(), dtype);
            let error = relative(&got, &truth);
            let unit = match dtype {
                DType::F32 => 2e-5,
                DType::F16 => 5e-4,
                _ => 4e-3,
            };
            println!("{name} {dtype:?}: {error:.2e}, plain {plain:.2e}");
            // What our kernels leave alone is done by candle, which rounds more often on a card than on the processor.
            let slack = if expected == 0 { 4.0 } else { 1.1 };
            assert!(error <= slack * plain + 0.05 * unit, "{name} in {dtype:?} on {place:?}: {error:e}, plain {plain:e}");
            let again = run(&|| op(&placed).unwrap());
            let same = (to_f32(&again) - to_f32(&got)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert_eq!(same, 0.0, "{name} in {dtype:?} on {place:?} differs from run to run");
        }
    }
}

type Run = fn(&dyn Fn() -> Tensor) -> Tensor;

/// Where kernels of ours run.
fn places() -> Vec<(Device, Run)> {
    let mut places: Vec<(Device, Run)> = vec![(Device::Cpu, |f| emulated(f))];
    if cfg!(feature = "cuda") {
        kernels::use_fused(true);
        places.push((card(), |f| f()));
    }
    places
}

/// As programs open it, and one for all.
fn card() -> Device {
    static CARD: OnceLock<Device> = OnceLock::new();
    CARD.get_or_init(|| kernels::open_cuda(0).expect("a CUDA build is tested on a machine with a card")).clone()
}

/// `x` with the strides and offset of `like`: a conversion or a move makes a copy in one piece.
fn view_like(x: &Tensor, like: &Tensor) -> Tensor {
    let (strides, dims) = (like.stride(), like.dims());
    let offset = like.layout().start_offset();
    if like.is_contiguous() && offset == 0 {
        return x.contiguous().unwrap();
    }
    // Only views of wider last dimensions are needed here: `(.., width)` narrowed to columns `offset..offset + d`.
    let (d, width) = (dims[dims.len() - 1], strides[strides.len() - 2]);
    let pad = x.pad_with_zeros(dims.len() - 1, offset, width - offset - d).unwrap();
    pad.narrow(dims.len() - 1, offset, d).unwrap()
}

const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const HALF: [DType; 2] = [DType::F16, DType::BF16];

#[test]
fn norms_and_gates() {
    for (b, l, d) in [(1, 1, 8), (2, 19, 96), (1, 3, 3072), (2, 2, 4104), (1, 1, 32768)] {
        // Modulation as it is in a block: a part of a wider row.
        let rows = random(&[b, 1, 3 * d]);
        let part = |i| rows.narrow(2, i * d, d).unwrap();
        let wide = random(&[b, l, 2 * d + 8]);
        let x = wide.narrow(2, 8, d).unwrap();
        check("modulated_norm", &ALL, &[x.clone(), part(0), part(1)], 1, |x| modulated_norm(&x[0], &x[1], &x[2], 1e-6));
        let inputs = [x, part(2), random(&[b, l, d]), part(0), part(1)];
        check("add_gated", &ALL, &inputs, 1, |x| add_gated(&x[0], &x[1], &x[2]));
        let both = |x: &[Tensor]| add_gated_then_norm(&x[0], [&x[1], &x[2]], [&x[3], &x[4]], 1e-6);
        check("sum", &ALL, &inputs, 1, |x| Ok(both(x)?.0));
        // The plain norm is that of the rounded sum too, so only f32 is compared with unrounded truth.
        check("norm of the sum", &[DType::F32], &inputs, 1, |x| Ok(both(x)?.1));
        for dtype in HALF {
            let inputs: Vec<Tensor> = inputs.iter().map(|x| view_like(&x.to_dtype(dtype).unwrap(), x)).collect();
            let (got, want) = (emulated(|| both(&inputs).unwrap()), both(&inputs).unwrap());
            assert!(relative(&got.1, &to_f32(&want.1)) < 1e-3, "{dtype:?}");
        }
    }
}

/// Rows of e4m3 made in one pass are those of the two passes, to the bit.
fn check_fp8(name: &str, inputs: &[Tensor], one: impl Fn(&[Tensor]) -> Fp8Rows, two: impl Fn(&[Tensor]) -> Tensor) {
    for dtype in ALL {
        let rounded: Vec<Tensor> = inputs.iter().map(|x| view_like(&x.to_dtype(dtype).unwrap(), x)).collect();
        for (place, run) in places() {
            let placed: Vec<Tensor> = rounded.iter().map(|x| view_like(&x.to_device(&place).unwrap(), x)).collect();
            let parts: [fn(Fp8Rows) -> Tensor; 2] = [|rows| rows.data, |rows| rows.scale];
            for part in parts {
                let before = launches();
                let got = to_f32(&run(&|| part(one(&placed))));
                assert_eq!(launches() - before, 1, "{name} {dtype:?} on {place:?}");
                let want = to_f32(&run(&|| part(quantise_fp8(&two(&placed)).unwrap())));
                assert_eq!((got.dims(), relative(&got, &want)), (want.dims(), 0.), "{name} {dtype:?} on {place:?}");
            }
        }
    }
}

#[test]
fn rows_of_e4m3_in_the_same_pass() {
    for (b, l, d) in [(1, 1, 8), (2, 19, 96), (1, 3, 3072), (1, 2, 32768)] {
        let rows = random(&[b, 1, 3 * d]);
        let part = |i| rows.narrow(2, i * d, d).unwrap();
        let x = random(&[b, l, 2 * d + 8]).narrow(2, 8, d).unwrap();
        let inputs = [x, part(2), random(&[b, l, d]), part(0), part(1)];
        check_fp8(
            "modulated_norm",
            &inputs,
            |x| modulated_norm_fp8(&x[0], &x[3], &x[4], 1e-6).unwrap(),
            |x| modulated_norm(&x[0], &x[3], &x[4], 1e-6).unwrap(),
        );
        let added = |x: &[Tensor]| add_gated_then_norm_fp8(&x[0], [&x[1], &x[2]], [&x[3], &x[4]], 1e-6).unwrap();
        let plain = |x: &[Tensor]| add_gated_then_norm(&x[0], [&x[1], &x[2]], [&x[3], &x[4]], 1e-6).unwrap();
        check_fp8("norm of the sum", &inputs, |x| added(x).1, |x| plain(x).1);
        check("sum", &ALL, &inputs, 1, |x| Ok(added(x).0));
    }
    for (b, l, d, m) in [(1, 1, 8, 8), (2, 7, 96, 400), (1, 2, 3072, 12288)] {
        let mlp = random(&[b, l, 3 * d + m]).narrow(2, 3 * d, m).unwrap();
        let inputs = [random(&[b, l, d]), mlp];
        let (one, two) = (|x: &[Tensor]| gelu_beside_fp8(&x[0], &x[1]), |x: &[Tensor]| gelu_beside(&x[0], &x[1]));
        check_fp8("gelu_beside", &inputs, |x| one(x).unwrap(), |x| two(x).unwrap());
    }
    // A row of zeros, and one that is too long for a block.
    let zeros = Tensor::zeros((1, 2, 16), DType::F32, &Device::Cpu).unwrap();
    let rows = emulated(|| gelu_beside_fp8(&zeros, &zeros).unwrap());
    assert_eq!(to_f32(&rows.widen(DType::F32).unwrap()).abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.);
    // What is no number does not become one, and spoils nothing beside it.
    let mut values: Vec<f32> = (0..16).map(|i| i as f32).collect();
    (values[3], values[8]) = (f32::NAN, f32::INFINITY);
    let broken = Tensor::from_vec(values, (1, 2, 8), &Device::Cpu).unwrap();
    let of = |rows: Fp8Rows| to_f32(&rows.widen(DType::F32).unwrap()).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for got in [of(emulated(|| quantise_fp8(&broken).unwrap())), of(quantise_fp8(&broken).unwrap())] {
        assert!(got[3].is_nan() && !got[8].is_finite(), "{got:?}");
        assert!(got[..3].iter().enumerate().all(|(i, value)| (value - i as f32).abs() < 0.3), "{got:?}");
    }
    let long = random(&[1, 1, 16400]);
    let before = launches();
    let rows = emulated(|| gelu_beside_fp8(&long, &long).unwrap());
    assert_eq!((launches() - before, rows.data.dims(), rows.scale.dims()), (2, &[1, 1, 32800][..], &[1, 1, 1][..]));
}

#[test]
fn root_mean_square_norms() {
    for (b, l, d) in [(1, 1, 8), (2, 7, 96), (1, 3, 4096)] {
        let scale = random(&[d]);
        check("rms_norm", &ALL, &[random(&[b, l, d])], 1, |x| rms_norm(&x[0], &scale.to_device(x[0].device())?, 1e-6));
    }
}

#[test]
fn what_does_not_fit_is_left_to_plain_operations() {
    let x = random(&[2, 3, 12]);
    let row = random(&[2, 1, 12]);
    check("width of 12", &ALL, &[x.clone(), row.clone(), row.clone()], 0, |x| modulated_norm(&x[0], &x[1], &x[2], 1e-6));
    check("gelu of 301", &ALL, &[random(&[5, 301])], 0, |x| gelu(&x[0]));
    let one = random(&[1, 2, 9, 24]);
    check("heads of 24", &HALF, &[one.clone(), one.clone(), one], 0, |x| attention(&x[0], &x[1], &x[2], 0.2, None));
}

#[test]
fn gelu_by_itself_and_beside() {
    check("gelu", &ALL, &[(random(&[3, 5, 304]) * 4.).unwrap()], 1, |x| gelu(&x[0]));
    for (b, l, d, m) in [(1, 1, 8, 8), (2, 7, 96, 400), (1, 5, 3072, 12288)] {
        let wide = random(&[b, l, 3 * d + m]);
        let mlp = wide.narrow(2, 3 * d, m).unwrap();
        check("gelu_beside", &ALL, &[random(&[b, l, d]), mlp], 1, |x| gelu_beside(&x[0], &x[1]));
    }
}

#[test]
fn heads_of_two_streams() {
    for (b, h, e, txt, img) in [(1, 1, 2, 1, 1), (2, 3, 16, 5, 7), (1, 2, 128, 3, 9), (1, 1, 256, 2, 2)] {
        let width = 3 * h * e;
        let wide = random(&[b, img, width + 24]);
        let angles = random(&[txt + img, e / 2]);
        let tables = [angles.cos().unwrap(), angles.sin().unwrap()];
        let scales: Vec<Tensor> = (0..4).map(|_| random(&[e])).collect();
        let inputs = [random(&[b, txt, width]), wide.narrow(2, 16, width).unwrap()];
        for part in 0..3 {
            check("joint_heads", &ALL, &inputs, 2, |x| {
                let at = |t: &Tensor| t.to_device(x[0].device()).unwrap();
                let stream = |qkv, i: usize| Projection { qkv, query_scale: at(&scales[i]), key_scale: at(&scales[i + 1]) };
                let streams = [stream(&x[0], 0), stream(&x[1], 2)];
                let heads = joint_heads(&streams, h, &at(&tables[0]), &at(&tables[1]), 1e-6)?;
                Ok([heads.q, heads.k, heads.v][part].clone())
            });
        }
    }
}

#[test]
fn attention_of_all_widths() {
    for (b, h, l, l_kv, e) in [(1, 1, 1, 1, 16), (2, 2, 37, 53, 32), (1, 2, 130, 64, 64), (1, 1, 150, 200, 128)] {
        let inputs = [random(&[b, h, l, e]), random(&[b, h, l_kv, e]), random(&[b, h, l_kv, e])];
        let scale = 1. / (e as f64).sqrt();
        let op = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], scale, None);
        for dtype in HALF {
            let rounded: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
            let exact: Vec<Tensor> = rounded.iter().map(to_f32).collect();
            for (place, run) in places() {
                let placed: Vec<Tensor> = rounded.iter().map(|x| x.to_device(&place).unwrap()).collect();
                let before = launches();
                let got = run(&|| op(&placed).unwrap());
                assert_eq!(launches() - before, 1);
                // The weights of the values are rounded to 16 bits, as in every such kernel.
                let (error, bound) = (relative(&got, &op(&exact).unwrap()), if dtype == DType::F16 { 1e-3 } else { 6e-3 });
                println!("attention {e} {dtype:?} on {place:?}: {error:.2e}");
                assert!(error < bound, "{l} {l_kv} {e} {dtype:?} on {place:?}: {error:e}");
                assert!(got.transpose(1, 2).unwrap().is_contiguous(), "heads lie side by side");
            }
        }
    }
}

/// Attention into the left part of rows whose right part is there: what it is by itself, and the right part stays.
#[test]
fn attention_beside_what_is_there() {
    for (b, h, l, e, m) in [(1, 1, 1, 16, 16), (2, 3, 37, 32, 96), (1, 2, 130, 128, 1024), (1, 2, 9, 64, 40)] {
        for dtype in HALF {
            let of = |shape: &[usize]| random(shape).to_dtype(dtype).unwrap();
            let [q, k, v] = [(); 3].map(|()| of(&[b, h, l, e]));
            let rows = of(&[b, l, h * e + m]);
            for (place, run) in places() {
                let at = |x: &Tensor| x.copy().unwrap().to_device(&place).unwrap();
                let heads = Heads { q: at(&q), k: at(&k), v: at(&v) };
                let before = launches();
                let got = to_f32(&run(&|| attention_beside(&heads, &Beside::Placed(at(&rows))).unwrap()));
                assert_eq!(launches() - before, 1);
                let alone = to_f32(&run(&|| heads.attend().unwrap()));
                let part = |x: &Tensor, from, length| x.narrow(2, from, length).unwrap();
                assert_eq!(relative(&part(&got, 0, h * e), &alone), 0., "{dtype:?} on {place:?}");
                assert_eq!(relative(&part(&got, h * e, m), &part(&to_f32(&rows), h * e, m)), 0., "{dtype:?} on {place:?}");
            }
        }
    }
}

#[test]
fn attention_of_views_and_large_scores() {
    // q, k and v as parts of one tensor, and scores far from 0, of which only the largest counts.
    let (l, h, e) = (70, 2, 64);
    let all = (random(&[1, l, 3 * h * e]) * 8.).unwrap().to_dtype(DType::BF16).unwrap();
    let part = |i: usize| all.narrow(2, i * h * e, h * e).unwrap().reshape((1, l, h, e)).unwrap().transpose(1, 2).unwrap();
    let op = |x: [Tensor; 3]| attention(&x[0], &x[1], &x[2], 1., None).unwrap();
    let want = op([part(0), part(1), part(2)].map(|x| to_f32(&x)));
    for (place, run) in places() {
        let all = all.to_device(&place).unwrap();
        let part = |i: usize| all.narrow(2, i * h * e, h * e).unwrap().reshape((1, l, h, e)).unwrap().transpose(1, 2).unwrap();
        assert!(relative(&run(&|| op([part(0), part(1), part(2)])), &want) < 6e-3, "{place:?}");
    }
}

#[test]
fn group_norms() {
    for (b, height, width, c, groups) in
        [(1, 2, 4, 8, 4), (2, 20, 23, 24, 2), (1, 9, 16, 32, 32), (1, 95, 100, 16, 2), (2, 1, 1, 8, 2), (1, 3, 7, 2048, 32)]
    {
        let (weight, bias) = (random(&[c]), random(&[c]));
        // A mean far from 0, as activations of an autoencoder have it.
        let x = (random(&[b, height, width, c]) + 30.).unwrap();
        for after in [After::Nothing, After::Silu] {
            let name = format!("group_norm {height} {width} {c} {after:?}");
            check(&name, &HALF, std::slice::from_ref(&x), 3, |x| {
                let at = |t: &Tensor| t.to_device(x[0].device()).unwrap();
                group_norm(&x[0], groups, &at(&weight), &at(&bias), 1e-6, after)
            });
        }
        let op = || group_norm(&x, groups, &weight, &bias, 1e-6, After::Silu).unwrap();
        assert!(relative(&emulated(op), &op()) < 2e-5, "in f32, whose mean of 30 costs both five bits");
    }
    let x = random(&[1, 5, 7, 12]);
    let one = Tensor::ones(12, DType::F32, &Device::Cpu).unwrap();
    check("12 channels", &HALF, &[x], 0, |x| {
        let one = one.to_device(x[0].device())?;
        group_norm(&x[0], 3, &one, &one, 1e-6, After::Silu)
    });
}

#[test]
fn convolutions() {
    let wide = Window { stride: 1, before: 2, after: 1, enlarge: 1 };
    let narrow = Window { stride: 2, before: 0, after: 0, enlarge: 2 };
    let cases = [
        // A pixel; more than a tile; several chunks and, but for the last, all outputs of a tile; what is filled up with zeros.
        ([1, 1, 1, 8], 8, vec![Window::SAME, Window::DOUBLE, wide]),
        ([2, 9, 19, 16], 40, vec![Window::SAME, Window::HALVE, Window::DOUBLE, wide, narrow]),
        ([1, 11, 5, 72], 136, vec![Window::SAME, Window::HALVE, Window::DOUBLE]),
        ([1, 10, 18, 3], 3, vec![Window::SAME, Window::HALVE, Window::DOUBLE, narrow]),
        ([2, 6, 8, 33], 21, vec![Window::SAME, Window::HALVE]),
        ([1, 7, 9, 8], 5, vec![wide]),
        ([1, 8, 17, 64], 64, vec![Window::DOUBLE]),
    ];
    for (shape, o, windows) in cases {
        let (weight, bias) = ((random(&[o, 3, 3, shape[3]]) * 0.2).unwrap(), random(&[o]));
        for window in windows {
            let x = random(&shape);
            let residual = random(convolve(&x, &weight, &bias, window, None).unwrap().dims());
            let name = format!("convolve {shape:?} to {o} {window:?}");
            let inputs = [x, weight.clone(), bias.clone(), residual];
            check(&name, &HALF, &inputs[..3], 1, |x| convolve(&x[0], &x[1], &x[2], window, None));
            check(&format!("{name}, residual"), &HALF, &inputs, 1, |x| convolve(&x[0], &x[1], &x[2], window, Some(&x[3])));
        }
    }
    let plain = Window { stride: 3, ..Window::SAME };
    let inputs = [random(&[1, 7, 6, 8]), random(&[4, 3, 3, 8]), random(&[4])];
    check("stride of 3", &HALF, &inputs, 0, |x| convolve(&x[0], &x[1], &x[2], plain, None));
    check("in f32", &[DType::F32], &inputs, 0, |x| convolve(&x[0], &x[1], &x[2], Window::SAME, None));
    let (x, weight) = (random(&[1, 7, 6, 8]), random(&[4, 1, 1, 8]));
    let point = Window { before: 0, after: 0, ..Window::SAME };
    check("1 x 1", &HALF, &[x, weight, random(&[4])], 0, |x| convolve(&x[0], &x[1], &x[2], point, None));
}

/// Sets of addends for a weight of this size.
fn sets_of_addends(rows: usize, columns: usize) -> [Vec<Addend>; 4] {
    let low = |rows: std::ops::Range<usize>, r: usize| {
        let up = (random(&[rows.len(), r]) * 0.05).unwrap();
        Addend { rows, delta: Delta::LowRank { up, down: random(&[r, columns]) } }
    };
    let dense = (random(&[rows / 2, columns]) * 0.02).unwrap();
    let sets = [
        vec![low(0..rows, 1)],
        vec![low(0..rows, 16), low(rows / 3..rows, 5)],
        vec![low(rows / 2..rows, 33), Addend { rows: 0..rows / 2, delta: Delta::Dense(dense) }, low(0..rows, 4)],
        vec![],
    ];
    sets.map(|addends| addends.into_iter().filter(|addend| !addend.rows.is_empty()).collect())
}

/// What is rounded once to 16 bits: apart by one unit in the last place where the sum lies near the middle of two, which is seldom.
fn assert_rounded_once(got: &Tensor, want: &Tensor, dtype: DType, of: &str) {
    let unit = if dtype == DType::F16 { 1.01 / 1024. } else { 1.01 / 128. };
    let values = |x: &Tensor| to_f32(x).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (got, want) = (values(got), values(want));
    let close = |(got, want): (&f32, &f32)| (got - want).abs() <= unit * want.abs().max(0.05);
    assert!(got.len() == want.len() && got.iter().zip(&want).all(close), "{of} {dtype:?}");
    let apart = got.iter().zip(&want).filter(|(got, want)| got != want).count();
    assert!(apart * 50 <= got.len().max(50), "{of}: {apart} of {} in {dtype:?}", got.len());
}

#[test]
fn merges_of_several_loras() {
    for (rows, columns) in [(1, 8), (150, 72), (300, 200)] {
        for addends in sets_of_addends(rows, columns) {
            for dtype in HALF {
                let weight = random(&[rows, columns]).to_dtype(dtype).unwrap();
                for (place, run) in places() {
                    let (there, placed) = (weight.to_device(&place).unwrap(), addends_on(&addends, &place));
                    let before = launches();
                    let got = run(&|| merge(&there, &placed).unwrap());
                    assert_eq!(launches() - before, 1);
                    assert_rounded_once(&got, &merge(&weight, &addends).unwrap(), dtype, &format!("{rows} x {columns}"));
                }
            }
        }
    }
}

/// Three LoRAs whose q, k, v and MLP are apart are twelve addends of one fused weight: more than a launch takes, until they are joined.
#[test]
fn many_loras_are_merged_in_one_pass() {
    let (rows, columns) = (64, 72);
    let part = |i: usize, r: usize| {
        let rows = 16 * (i % 4)..16 * (i % 4 + 1);
        Addend { delta: Delta::LowRank { up: (random(&[16, r]) * 0.05).unwrap(), down: random(&[r, columns]) }, rows }
    };
    let mut addends: Vec<Addend> = (0..12).map(|i| part(i, 3 + i)).collect();
    addends.insert(5, Addend { rows: 8..40, delta: Delta::Dense((random(&[32, columns]) * 0.02).unwrap()) });
    let fewer = joined(addends.clone()).unwrap();
    assert_eq!(fewer.len(), 5);
    let weight = random(&[rows, columns]).to_dtype(DType::BF16).unwrap();
    let want = merge(&weight, &addends).unwrap();
    for (place, run) in places() {
        let (there, placed) = (weight.to_device(&place).unwrap(), addends_on(&fewer, &place));
        let before = launches();
        let got = run(&|| merge(&there, &placed).unwrap());
        assert_eq!(launches() - before, 1);
        assert_rounded_once(&got, &want, DType::BF16, "joined");
    }
    assert_eq!(joined(addends[..8].to_vec()).unwrap().len(), 8, "a launch takes them");
}

fn addends_on(addends: &[Addend], place: &Device) -> Vec<Addend> {
    let to = |x: &Tensor| x.to_device(place).unwrap();
    let moved = |delta: &Delta| match delta {
        Delta::LowRank { up, down } => Delta::LowRank { up: to(up), down: to(down) },
        Delta::Dense(delta) => Delta::Dense(to(delta)),
    };
    addends.iter().map(|addend| Addend { rows: addend.rows.clone(), delta: moved(&addend.delta) }).collect()
}

/// cuBLASLt's products, which there are on a card only.
#[test]
fn products_with_bias_and_gelu() {
    for (n, output, input) in [(1, 64, 96), (13, 40, 512), (512, 256, 128)] {
        let wide = random(&[n, input + 16]);
        let inputs = [wide.narrow(1, 8, input).unwrap(), (random(&[output, input]) * 0.1).unwrap(), random(&[output])];
        for dtype in HALF {
            let rounded: Vec<Tensor> = inputs.iter().map(|x| view_like(&x.to_dtype(dtype).unwrap(), x)).collect();
            let exact: Vec<Tensor> = rounded.iter().map(to_f32).collect();
            for bias in [false, true] {
                for through_gelu in [false, true] {
                    let op = |x: &[Tensor]| {
                        (if through_gelu { linear_gelu } else { linear })(&x[0], &x[1], bias.then_some(&x[2])).unwrap()
                    };
                    let truth = op(&exact);
                    for (place, run) in places() {
                        let placed: Vec<Tensor> = rounded.iter().map(|x| view_like(&x.to_device(&place).unwrap(), x)).collect();
                        let (before, error) = (launches(), relative(&run(&|| op(&placed)), &truth));
                        assert!(place.is_cpu() || launches() > before, "cuBLASLt has no algorithm for {n} {output} {input}");
                        let bound = if dtype == DType::F16 { 5e-4 } else { 4e-3 };
                        assert!(error < bound, "{n} {output} {input} {dtype:?} {bias} {through_gelu} on {place:?}: {error:e}");
                    }
                }
            }
        }
    }
    let (x, w) = (random(&[3, 16]), random(&[8, 24]));
    assert!(linear_gelu(&x, &w, None).is_err() && linear(&x, &w, None).is_err());
}

/// A card that is opened twice has a stream for each device: what cuBLASLt works in for one is not the other's meanwhile.
#[cfg(feature = "cuda")]
#[test]
fn products_of_two_streams() {
    kernels::use_fused(true);
    let (x, w) = (random(&[64, 512]).to_dtype(DType::BF16).unwrap(), random(&[256, 512]).to_dtype(DType::BF16).unwrap());
    let truth = linear(&to_f32(&x), &to_f32(&w), None).unwrap();
    let placed = [card(), kernels::open_cuda(0).unwrap()].map(|card| [&x, &w].map(|x| x.to_device(&card).unwrap()));
    let products: Vec<Tensor> = placed.iter().cycle().take(6).map(|[x, w]| linear(x, w, None).unwrap()).collect();
    for product in &products {
        assert!(relative(product, &truth) < 4e-3);
    }
}
