//! What is tried: each operation that has a kernel, as FLUX.1 uses it.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{D, DType, Device, Result, Tensor};

use crate::{
    Addend, After, Beside, Delta, Fp8Rows, Heads, Projection, Window, add_gated_then_norm, add_gated_then_norm_fp8, attention,
    attention_beside, attention_beside_fp8, convolve, gelu, gelu_beside, gelu_beside_fp8, group_norm, has_fp8_products,
    joint_heads, linear, linear_beside, linear_fp8, linear_gelu, merge, modulated_norm, modulated_norm_fp8, quantise_fp8,
    rms_norm, visit, widen_blocks, widen_fp8,
};

/// Channels of a head.
const WIDTH: usize = 128;

/// Groups of a group norm.
const GROUPS: usize = 32;

const EPS: f32 = 1e-6;

pub(super) struct Sizes {
    text: usize,
    image: usize,
    heads: usize,
    /// Of the autoencoder's picture, and its channels.
    side: usize,
    channels: usize,
    /// GGUF's formats: all of them, or one.
    formats: usize,
}

impl Sizes {
    /// Nothing is a multiple of a tile.
    pub(super) const SMALL: Self = Self { text: 5, image: 74, heads: 2, side: 18, channels: 64, formats: FORMATS.len() };
    /// FLUX.1's for 1024 x 1024, but for the autoencoder, whose last pictures are larger than need be here.
    pub(super) const FLUX1: Self = Self { text: 512, image: 4096, heads: 24, side: 256, channels: 256, formats: 1 };
}

const FORMATS: [(&str, GgmlDType); 10] = [
    ("Q4_K blocks, alone and with two LoRAs", GgmlDType::Q4K),
    ("Q4_0 blocks, alone and with two LoRAs", GgmlDType::Q4_0),
    ("Q4_1 blocks, alone and with two LoRAs", GgmlDType::Q4_1),
    ("Q5_0 blocks, alone and with two LoRAs", GgmlDType::Q5_0),
    ("Q5_1 blocks, alone and with two LoRAs", GgmlDType::Q5_1),
    ("Q8_0 blocks, alone and with two LoRAs", GgmlDType::Q8_0),
    ("Q2_K blocks, alone and with two LoRAs", GgmlDType::Q2K),
    ("Q3_K blocks, alone and with two LoRAs", GgmlDType::Q3K),
    ("Q5_K blocks, alone and with two LoRAs", GgmlDType::Q5K),
    ("Q6_K blocks, alone and with two LoRAs", GgmlDType::Q6K),
];

type Op = dyn Fn(&[Tensor]) -> Result<Tensor>;

pub(super) struct Case {
    pub(super) name: &'static str,
    /// Random values in f32.
    pub(super) inputs: Vec<Tensor>,
    pub(super) op: Box<Op>,
    /// What the error may be more: e4m3 has the other one of two neighbours where sums in another order fall on the other side of the
    /// middle.
    pub(super) slack: f64,
}

/// Of these sizes, with inputs on `device`: what can be tried on the device `tried`.
pub(super) fn all(sizes: &Sizes, device: &Device, tried: &Device) -> Result<Vec<Case>> {
    let &Sizes { text, image, heads, side, channels: c, formats } = sizes;
    let (l, d) = (text + image, heads * WIDTH);
    let mut cases = Vec::new();
    let mut add = |name, slack, inputs: &[&Tensor], op: Box<Op>| {
        cases.push(Case { name, inputs: inputs.iter().copied().cloned().collect(), op, slack });
    };
    let random = |shape: &[usize], size: f64| Tensor::randn(0f32, 1., shape, device)? * size;
    // Rows `(1, l, d)`, and what modulates them.
    let (x, update) = (random(&[1, l, d], 2.)?, random(&[1, l, d], 1.)?);
    let (gate, scale, shift) = (random(&[1, 1, d], 1.)?, random(&[1, 1, d], 1.)?, random(&[1, 1, d], 1.)?);
    let gated = [&x, &gate, &update, &scale, &shift];
    add("norm", 0., &[&x, &scale, &shift], Box::new(|x| modulated_norm(&x[0], &x[1], &x[2], EPS)));
    let op = |x: &[Tensor]| {
        let (sum, norm) = add_gated_then_norm(&x[0], [&x[1], &x[2]], [&x[3], &x[4]], EPS)?;
        Tensor::cat(&[sum, norm], D::Minus1)
    };
    add("gated sum and its norm", 0., &gated, Box::new(op));
    let op = |x: &[Tensor]| rms_norm(&x[0], &f32(&x[1])?.flatten_all()?, EPS);
    add("root-mean-square norm", 0., &[&x, &scale], Box::new(op));
    add("GELU", 0., &[&x], Box::new(|x| gelu(&x[0])));
    let mlp = random(&[1, l, 4 * d], 2.)?;
    add("GELU beside", 0., &[&x, &mlp], Box::new(|x| gelu_beside(&x[0], &x[1])));

    let [txt, img] = [random(&[1, text, 3 * d], 1.)?, random(&[1, image, 3 * d], 1.)?];
    let (angles, head_scales) = (random(&[l, WIDTH / 2], 3.)?, random(&[4, WIDTH], 1.)?);
    let op = |x: &[Tensor]| heads_of(&x[..2], &x[2], &x[3]).and_then(|heads| Tensor::cat(&[heads.q, heads.k, heads.v], 3));
    add("heads of both streams", 0., &[&txt, &img, &angles, &head_scales], Box::new(op));
    let [q, k, v] = [random(&[1, heads, l, WIDTH], 2.)?, random(&[1, heads, l, WIDTH], 1.)?, random(&[1, heads, l, WIDTH], 1.)?];
    let op = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], 1. / (WIDTH as f64).sqrt(), None);
    add("attention", 0., &[&q, &k, &v], Box::new(op));
    // Pocket's, and those of other small models.
    for (name, parts) in [("attention of 64 channels", 2), ("attention of 32 channels", 4), ("attention of 16 channels", 8)] {
        let op = move |x: &[Tensor]| {
            let part = |x: &Tensor| x.reshape((1, (), l, WIDTH / parts));
            attention(&part(&x[0])?, &part(&x[1])?, &part(&x[2])?, (parts as f64 / WIDTH as f64).sqrt(), None)
        };
        add(name, 0., &[&q, &k, &v], Box::new(op));
    }

    // Weights of a size that gives products of about 1.
    let (flat, weight, bias) = (x.squeeze(0)?, random(&[7 * d, d], 1. / (d as f64).sqrt())?, random(&[7 * d], 1.)?);
    let product = [&flat, &weight.narrow(0, 0, 4 * d)?, &bias.narrow(0, 0, 4 * d)?];
    add("product", 0., &product, Box::new(|x| linear(&x[0], &x[1], Some(&x[2]))));
    add("product and GELU", 0., &product, Box::new(|x| linear_gelu(&x[0], &x[1], Some(&x[2]))));
    let op = |x: &[Tensor]| visit(&x[1].to_device(&Device::Cpu)?, x[0].device(), |w| linear(&x[0], &w, Some(&x[2])));
    add("weights that wait in main memory", 0., &product, Box::new(op));
    if has_fp8_products(tried) {
        let op = |x: &[Tensor]| linear_fp8(&e4m3(&x[0])?, &e4m3(&x[1])?, Some(&x[2]), true, x[0].dtype());
        add("e4m3 product", 0., &product, Box::new(op));
    }
    let single = [&flat, &weight, &bias, &angles, &head_scales.narrow(0, 0, 2)?];
    let op = |x: &[Tensor]| beside(x).and_then(|(heads, mlp)| attention_beside(&heads, &mlp));
    add("single block's attention and MLP", 0., &single, Box::new(op));
    let op = |x: &[Tensor]| beside(x).and_then(|(heads, mlp)| attention_beside_fp8(&heads, &mlp)?.widen(x[0].dtype()));
    add("the same to e4m3", SLACK, &single, Box::new(op));

    let op = |x: &[Tensor]| gelu_beside_fp8(&x[0], &x[1])?.widen(x[0].dtype());
    add("GELU beside to e4m3", SLACK, &[&x, &mlp], Box::new(op));
    let op = |x: &[Tensor]| quantise_fp8(&x[0])?.widen(x[0].dtype());
    add("to e4m3 and back", SLACK, &[&x], Box::new(op));
    let op = |x: &[Tensor]| modulated_norm_fp8(&x[0], &x[1], &x[2], EPS)?.widen(x[0].dtype());
    add("norm to e4m3", SLACK, &[&x, &scale, &shift], Box::new(op));
    let op = |x: &[Tensor]| {
        let (sum, norm) = add_gated_then_norm_fp8(&x[0], [&x[1], &x[2]], [&x[3], &x[4]], EPS)?;
        Tensor::cat(&[sum, norm.widen(x[0].dtype())?], D::Minus1)
    };
    add("gated sum and its norm to e4m3", SLACK, &gated, Box::new(op));

    let weight = weight.narrow(0, 0, 3 * d)?;
    let low_rank = |rows, r| Ok::<_, candle_core::Error>([random(&[rows, r], 0.02)?, random(&[r, d], 0.5)?]);
    let ([up, down], [another_up, another_down]) = (low_rank(2 * d, 16)?, low_rank(3 * d, 5)?);
    let adapted = [&weight, &up, &down, &another_up, &another_down];
    add("weight with two LoRAs", 0., &adapted, Box::new(|x| merge(&x[0], &addends(x, DType::F32)?)));
    let op = |x: &[Tensor]| {
        let Fp8Rows { data, scale } = e4m3(&x[0])?;
        widen_fp8(&data, Some(&scale), x[0].dtype(), &addends(x, x[0].dtype())?)
    };
    add("e4m3 weight with two LoRAs", 0., &adapted, Box::new(op));
    for &(name, format) in &FORMATS[..formats] {
        let op = move |x: &[Tensor]| {
            let here = QTensor::quantize(&f32(&x[0])?.to_device(&Device::Cpu)?, format)?;
            let there = QTensor::new(QStorage::from_data(here.data()?, x[0].device(), format)?, here.shape().clone())?;
            let wide = |addends: &[Addend]| widen_blocks(&there, x[0].dtype(), addends);
            Tensor::cat(&[wide(&[])?, wide(&addends(x, x[0].dtype())?)?], 0)
        };
        add(name, 0., &adapted, Box::new(op));
    }

    let (picture, residual) = (random(&[1, side, side, c], 1.)?, random(&[1, side, side, c], 1.)?);
    let (taps, bias) = (random(&[c, 3, 3, c], 1. / (9. * c as f64).sqrt())?, random(&[c], 1.)?);
    let op = |x: &[Tensor]| group_norm(&(&x[0] + 2.)?, GROUPS, &f32(&x[1])?, &f32(&x[1])?, EPS, After::Silu);
    add("group norm and SiLU", 0., &[&picture, &bias], Box::new(op));
    let op = |x: &[Tensor]| convolve(&x[0], &x[1], &x[2], Window::SAME, Some(&x[3]));
    add("convolution and what it is added to", 0., &[&picture, &taps, &bias, &residual], Box::new(op));
    for (name, window) in [("convolution that halves", Window::HALVE), ("convolution of a doubled picture", Window::DOUBLE)] {
        let op = move |x: &[Tensor]| convolve(&x[0], &x[1], &x[2], window, None);
        add(name, 0., &[&picture, &taps, &bias], Box::new(op));
    }
    let colours = [&picture, &taps.narrow(0, 0, 3)?, &bias.narrow(0, 0, 3)?];
    add("convolution to colours", 0., &colours, Box::new(|x| convolve(&x[0], &x[1], &x[2], Window::SAME, None)));
    Ok(cases)
}

/// See [`Case::slack`].
const SLACK: f64 = 5e-3;

fn f32(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)
}

/// Heads of these projections, of angles `(l, e / 2)` and the scales of each projection's queries and keys.
fn heads_of(projections: &[Tensor], angles: &Tensor, scales: &Tensor) -> Result<Heads> {
    let (angles, scales) = (f32(angles)?, f32(scales)?);
    let stream = |(i, qkv)| Ok(Projection { qkv, query_scale: scales.get(2 * i)?, key_scale: scales.get(2 * i + 1)? });
    let streams = projections.iter().enumerate().map(stream).collect::<Result<Vec<_>>>()?;
    joint_heads(&streams, projections[0].dim(2)? / (3 * WIDTH), &angles.cos()?, &angles.sin()?, EPS)
}

/// As in a single block: of its rows `(l, d)`, its first weight and bias, angles and scales.
fn beside(x: &[Tensor]) -> Result<(Heads, Beside)> {
    let (l, d) = x[0].dims2()?;
    let (qkv, mlp) = linear_beside(&x[0], &x[1], Some(&x[2]), 3 * d, d)?;
    Ok((heads_of(&[qkv.unsqueeze(0)?], &x[3], &x[4])?, mlp.reshape(&[1, l])?))
}

/// Of the inputs after the weight: one of its last two thirds of rows, one of all.
fn addends(x: &[Tensor], dtype: DType) -> Result<Vec<Addend>> {
    let low = |up: &Tensor, down: &Tensor| {
        let (n, all) = (up.dim(0)?, x[0].dim(0)?);
        let delta = Delta::LowRank { up: up.to_dtype(dtype)?, down: down.to_dtype(dtype)? };
        Ok::<_, candle_core::Error>(Addend { rows: all - n..all, delta })
    };
    Ok(vec![low(&x[1], &x[2])?, low(&x[3], &x[4])?])
}

/// x in e4m3, made by the processor: the same bytes wherever it is.
fn e4m3(x: &Tensor) -> Result<Fp8Rows> {
    let rows = quantise_fp8(&f32(x)?.to_device(&Device::Cpu)?)?;
    Ok(Fp8Rows { data: rows.data.to_device(x.device())?, scale: rows.scale.to_device(x.device())? })
}
