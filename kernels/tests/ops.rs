//! Every op against plain composed maths in f32, on the CPU and on every device the build has, in every dtype.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{D, DType, Device, Result, Tensor};
use kernels::{add_gated, attention, attention_in_chunks, gelu, layer_norm, linear, modulated_norm, rms_norm, rotate};

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        devices.push(Device::new_cuda(0).expect("a CUDA build is tested on a machine with a card"));
    }
    if cfg!(feature = "metal") {
        devices.push(Device::new_metal(0).expect("a Metal build is tested on a machine with Metal"));
    }
    devices
}

/// Bound on max |error| / max |reference| for outputs of this dtype.
fn bound(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 2e-3,
        _ => 1.2e-2,
    }
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.3f32, 1.7, shape, &Device::Cpu).unwrap()
}

/// Runs `op` on inputs rounded to each dtype on each device, and `reference` on the same rounded inputs in f32 on the CPU.
fn check(
    name: &str,
    inputs: &[Tensor],
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
    reference: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let rounded: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
            let placed: Vec<Tensor> = rounded.iter().map(|x| x.to_device(&device).unwrap()).collect();
            let exact: Vec<Tensor> = rounded.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
            let (got, want) = (op(&placed).unwrap(), reference(&exact).unwrap());
            assert_eq!((got.dtype(), got.dims()), (dtype, want.dims()), "{name}");
            let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            let max = |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let error = max((got - &want).unwrap()) / max(want);
            assert!(error <= bound(dtype), "{name} on {device:?} in {dtype:?}: {error:e}");
        }
    }
}

fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
    let scores = bias.map_or(Ok(scores.clone()), |bias| scores.broadcast_add(bias))?;
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.matmul(&v.contiguous()?)
}

#[test]
fn attention_whole_and_in_chunks() {
    let (b, h, l, l_kv, e) = (2, 3, 37, 53, 32);
    let inputs = [random(&[b, h, l, e]), random(&[b, h, l_kv, e]), random(&[b, h, l_kv, e])];
    let scale = 1. / (e as f64).sqrt();
    // The smaller ones hold one and five rows of scores at a time.
    for bytes in [usize::MAX, b * h * l_kv * 4, b * h * l_kv * 4 * 5] {
        check(
            "attention",
            &inputs,
            |x| attention_in_chunks(&x[0], &x[1], &x[2], scale, None, bytes),
            |x| plain_attention(&x[0], &x[1], &x[2], scale, None),
        );
    }
}

#[test]
fn attention_adds_its_bias_to_the_right_rows() {
    let (h, l, e) = (2, 21, 16);
    let inputs = [random(&[1, h, l, e]), random(&[1, h, l, e]), random(&[1, h, l, e])];
    let bias = random(&[1, h, l, l]);
    let [q, k, v] = &inputs;
    // One of every row, and one for all of them, as a mask of tokens is.
    for bias in [bias, random(&[1, 1, 1, l])] {
        let want = plain_attention(q, k, v, 1., Some(&bias)).unwrap();
        let whole = attention(q, k, v, 1., Some(&bias)).unwrap();
        let rows = attention_in_chunks(q, k, v, 1., Some(&bias), h * l * 4 * 4).unwrap();
        for got in [whole, rows] {
            let difference = (got - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // Scores of up to 50 have an ulp of 4e-6; another row's bias moves values by about 1.
            assert!(difference < 1e-4, "{difference}");
        }
    }
}

#[test]
fn layer_norm_of_rows() {
    check(
        "layer_norm",
        &[random(&[2, 19, 96])],
        |x| layer_norm(&x[0], 1e-6),
        |x| {
            let centred = x[0].broadcast_sub(&x[0].mean_keepdim(D::Minus1)?)?;
            let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
            centred.broadcast_div(&(variance + 1e-6)?.sqrt()?)
        },
    );
}

#[test]
fn modulated_norm_and_gate_of_rows() {
    let (scale, shift) = (random(&[2, 1, 96]), random(&[2, 1, 96]));
    check(
        "modulated_norm",
        &[random(&[2, 19, 96]), scale, shift],
        |x| modulated_norm(&x[0], &x[1], &x[2], 1e-6),
        |x| layer_norm(&x[0], 1e-6)?.broadcast_mul(&(&x[1] + 1.)?)?.broadcast_add(&x[2]),
    );
    check(
        "add_gated",
        &[random(&[2, 19, 96]), random(&[2, 1, 96]), random(&[2, 19, 96])],
        |x| add_gated(&x[0], &x[1], &x[2]),
        |x| &x[0] + x[1].broadcast_mul(&x[2])?,
    );
}

#[test]
fn gelu_of_any_shape() {
    check("gelu", &[(random(&[3, 5, 301]) * 4.).unwrap()], |x| gelu(&x[0]), |x| x[0].gelu());
    let far = Tensor::new(&[-200f32, -20., -0.0, 0., 20., 200.], &Device::Cpu).unwrap();
    let got = gelu(&far).unwrap().to_vec1::<f32>().unwrap();
    assert!(got.iter().zip([0f32, 0., 0., 0., 20., 200.]).all(|(got, want)| (got - want).abs() < 1e-12), "{got:?}");
}

#[test]
fn linear_with_and_without_bias() {
    let inputs = [random(&[13, 40]), random(&[27, 40]), random(&[27])];
    let product = |x: &[Tensor]| x[0].matmul(&x[1].t()?);
    check("linear", &inputs, |x| linear(&x[0], &x[1], None), product);
    check("linear", &inputs, |x| linear(&x[0], &x[1], Some(&x[2])), |x| product(x)?.broadcast_add(&x[2]));
    assert!(linear(&inputs[0], &inputs[1], Some(&random(&[26]))).is_err());
    assert!(linear(&random(&[13, 41]), &inputs[1], None).is_err());
}

#[test]
fn rms_norm_of_rows() {
    let scale = random(&[64]);
    check(
        "rms_norm",
        &[random(&[2, 3, 11, 64])],
        |x| rms_norm(&x[0], &scale.to_device(x[0].device())?, 1e-6),
        |x| x[0].broadcast_div(&(x[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?)?.broadcast_mul(&scale),
    );
}

#[test]
fn norms_of_views() {
    // A view with strides and an offset must read the same values as its copy.
    let view = random(&[2, 8, 3, 64]).narrow(1, 2, 5).unwrap().transpose(1, 2).unwrap();
    let copy = view.contiguous().unwrap();
    let same =
        |a: Tensor, b: Tensor| assert_eq!((a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.);
    same(layer_norm(&view, 1e-6).unwrap(), layer_norm(&copy, 1e-6).unwrap());
    let scale = random(&[64]);
    same(rms_norm(&view, &scale, 1e-6).unwrap(), rms_norm(&copy, &scale, 1e-6).unwrap());
}

#[test]
fn rotation_of_pairs() {
    let angles = random(&[13, 16]);
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    check(
        "rotate",
        &[random(&[2, 3, 13, 32])],
        |x| rotate(&x[0], &cos.to_device(x[0].device())?, &sin.to_device(x[0].device())?),
        |x| {
            let pairs = x[0].reshape((2, 3, 13, 16, 2))?;
            let (even, odd) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
            let first = (even.broadcast_mul(&cos)? - odd.broadcast_mul(&sin)?)?;
            let second = (even.broadcast_mul(&sin)? + odd.broadcast_mul(&cos)?)?;
            Tensor::stack(&[first, second], 4)?.flatten_from(3)
        },
    );
}
