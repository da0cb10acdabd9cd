//! What becomes of weights on their way to a product: sent to a card, and widened.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use kernels::{
    Fp8Rows, emulated, launches, linear, linear_fp8, quantise_fp8, upload_blocks, visit_blocks, widen_blocks, widen_fp8,
};

use super::{ALL, HALF, addends_on, assert_rounded_once, places, random, relative, sets_of_addends, to_f32};

/// What is sent to a card by way of page-locked buffers, for good or for one product, is what was in main memory.
#[test]
fn what_is_sent_arrives() {
    let buffer = (16 << 20) / 2;
    for (place, run) in places() {
        // Small ones, one that ends with a buffer, and one that takes all buffers and comes back to the first.
        for n in [3, 1 << 19, buffer, 5 * buffer + 1001] {
            let x = Tensor::rand(-1f32, 1., n, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
            let there = kernels::to_device(&x, &place).unwrap();
            let bytes: Vec<u8> = x.to_vec1::<half::bf16>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
            let from_file = kernels::upload(&[&bytes], DType::BF16, &[n], &place).unwrap();
            let (first, rest) = bytes.split_at(n / 3 * 2);
            let from_parts = kernels::upload(&[first, &[], rest], DType::BF16, &[n], &place).unwrap();
            for got in [there, from_file, from_parts] {
                let apart = (to_f32(&got) - to_f32(&x)).unwrap().abs().unwrap().max_all().unwrap();
                assert_eq!(apart.to_scalar::<f32>().unwrap(), 0.0, "{n} on {place:?}");
            }
        }
        assert!(kernels::upload(&[&[0; 4], &[0; 2]], DType::BF16, &[4], &place).is_err());
        for rows in [1, 10_241] {
            let mut bytes = vec![0; rows * 8192 / 32 * 34];
            fastrand::Rng::with_seed(3).fill(&mut bytes);
            let (first, rest) = bytes.split_at(bytes.len() / 34 / 3 * 34);
            let there = upload_blocks(&[first, rest], GgmlDType::Q8_0, &[rows, 8192], &place).unwrap();
            assert!(*there.data().unwrap() == bytes, "{rows} rows of blocks on {place:?}");
        }
        assert!(upload_blocks(&[&[0; 34]], GgmlDType::Q8_0, &[2, 32], &place).is_err());
        // Weights of several sizes and types in turns, with nothing between them that waits for the card.
        let weights: Vec<Tensor> = (0..9).map(|i| (random(&[8 + 8 * (i % 3), 64]) * 0.1).unwrap()).collect();
        for (i, dtype) in [DType::F32, DType::BF16, DType::F32, DType::F32].into_iter().enumerate() {
            // The last time on a device that was opened anew.
            let place = if i < 3 || place.is_cpu() { place.clone() } else { kernels::open_cuda(0).unwrap() };
            let of = |x: &Tensor| x.to_dtype(dtype).unwrap();
            let x = of(&random(&[16, 64]));
            let x_there = x.to_device(&place).unwrap();
            let product = |w: &Tensor, x: &Tensor| run(&|| linear(x, w, None).unwrap());
            let visits: Vec<Tensor> =
                weights.iter().map(|w| kernels::visit(&of(w), &place, |w| Ok(product(&w, &x_there))).unwrap()).collect();
            for (w, got) in weights.iter().zip(visits) {
                let want = product(&of(w).to_device(&place).unwrap(), &x_there);
                let apart = (to_f32(&got) - to_f32(&want)).unwrap().abs().unwrap().max_all().unwrap();
                assert_eq!(apart.to_scalar::<f32>().unwrap(), 0.0, "{dtype:?} on {place:?}");
            }
            // What fails while it is there leaves the place to the next.
            assert!(kernels::visit(&of(&weights[0]), &place, |w| w.matmul(&x_there)).is_err());
        }
    }
}

#[test]
fn fp8_and_back() {
    // Rows of very different sizes, one of zeros; then all 256 bytes, subnormal numbers and NaN among them.
    for (n, d) in [(1, 16), (5, 96), (3, 4112)] {
        let sizes = Tensor::rand(-8f32, 8., (n, 1), &Device::Cpu).unwrap().exp().unwrap();
        let x = random(&[n, d]).broadcast_mul(&sizes).unwrap();
        let x = if n > 1 { Tensor::cat(&[x, Tensor::zeros((1, d), DType::F32, &Device::Cpu).unwrap()], 0).unwrap() } else { x };
        for dtype in ALL {
            let x = x.to_dtype(dtype).unwrap();
            let Fp8Rows { data, scale } = quantise_fp8(&x).unwrap();
            for (place, run) in places() {
                let there = x.to_device(&place).unwrap();
                let bytes = |data: &Tensor| data.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                let before = launches();
                let got = run(&|| quantise_fp8(&there).unwrap().data);
                assert_eq!(launches() - before, 1);
                let apart = (bytes(&got) - bytes(&data)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                // A division that rounds otherwise may choose the other of two neighbours; at 448 they are 32 apart.
                assert!(apart <= 32., "{dtype:?} on {place:?}: {apart}");
                assert!(relative(&bytes(&got), &bytes(&data)) < 1e-3, "{dtype:?} on {place:?}");
                let scales = run(&|| quantise_fp8(&there).unwrap().scale);
                assert!(relative(&scales, &scale) < 1e-6);
                let (data, scale) = (data.to_device(&place).unwrap(), scale.to_device(&place).unwrap());
                for scale in [Some(&scale), None, Some(&scale.narrow(0, 0, 1).unwrap().reshape(()).unwrap())] {
                    let want = widen_fp8(
                        &data.to_device(&Device::Cpu).unwrap(),
                        scale.map(|s| s.to_device(&Device::Cpu).unwrap()).as_ref(),
                        dtype,
                        &[],
                    );
                    let before = launches();
                    let got = run(&|| widen_fp8(&data, scale, dtype, &[]).unwrap());
                    assert_eq!(
                        (launches() - before, relative(&got, &to_f32(&want.unwrap()))),
                        (1, 0.0),
                        "{dtype:?} on {place:?}"
                    );
                }
            }
        }
    }
    let all: Vec<u8> = (0..=255).collect();
    let data = Tensor::from_raw_buffer(&all, DType::F8E4M3, &[16, 16], &Device::Cpu).unwrap();
    let values = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (want, got) = (
        values(widen_fp8(&data, None, DType::F32, &[]).unwrap()),
        values(emulated(|| widen_fp8(&data, None, DType::F32, &[]).unwrap())),
    );
    assert!(want.iter().zip(&got).all(|(a, b)| a == b || (a.is_nan() && b.is_nan())), "{got:?}");
    // Each finite one, scaled so that the largest is 448, is itself again.
    let finite: Vec<f32> = want.iter().copied().filter(|x| x.is_finite()).chain([448.; 2]).collect();
    let rows = Tensor::from_vec(finite.clone(), (1, 256), &Device::Cpu).unwrap();
    let again = emulated(|| quantise_fp8(&rows).unwrap()).data;
    assert_eq!(values(again.to_dtype(DType::F32).unwrap()), finite);
}

/// Every format of blocks, of random bytes: all patterns of bits, scales that are not numbers among them.
#[test]
fn blocks_of_any_bytes() {
    use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        // One block, a whole piece of work, and several with a part.
        for (rows, blocks) in [(1, 1), (2048 / kind.block_size(), 1), (7, 37)] {
            let shape = (rows, blocks * kind.block_size());
            let bytes = Tensor::rand(0f32, 256., rows * blocks * kind.type_size(), &Device::Cpu).unwrap();
            let bytes = bytes.to_dtype(DType::U8).unwrap().to_vec1::<u8>().unwrap();
            let on = |place: &Device| upload_blocks(&[&bytes], kind, &[shape.0, shape.1], place).unwrap();
            let here = on(&Device::Cpu);
            for dtype in ALL {
                let values = |x: &Tensor| to_f32(x).flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let want = values(&here.dequantize(&Device::Cpu).unwrap().to_dtype(dtype).unwrap());
                for (place, run) in places() {
                    let there = on(&place);
                    let before = launches();
                    let widened = run(&|| widen_blocks(&there, dtype, &[]).unwrap());
                    let visited = run(&|| visit_blocks(&here, dtype, &[], &place, Ok).unwrap());
                    assert_eq!(launches() - before, 2, "{kind:?} {dtype:?} on {place:?}");
                    // Products are exact in f32, and sums rounded once: there is one right value.
                    for got in [widened, visited] {
                        assert_eq!((got.dims(), got.dtype()), (&[shape.0, shape.1][..], dtype));
                        let same = |(got, want): (&f32, &f32)| got == want || (got.is_nan() && want.is_nan());
                        assert!(values(&got).iter().zip(&want).all(same), "{kind:?} {dtype:?} on {place:?}");
                    }
                }
            }
        }
    }
    let other = QTensor::quantize(&random(&[2, 256]), GgmlDType::Q8K).unwrap();
    let before = launches();
    assert_eq!(emulated(|| widen_blocks(&other, DType::F32, &[]).unwrap()).dims(), [2, 256]);
    assert_eq!(launches(), before, "a format without a kernel is left to candle");
}

/// A LoRA beside a weight that is widened for each product: merged in the same pass, as if the weight had been of 32 bits.
#[test]
fn loras_are_merged_while_weights_are_widened() {
    use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let cpu = &Device::Cpu;
    // Values enough that what is seldom does not happen often by chance.
    for (rows, columns) in [(9, 512), (131, 512)] {
        let weight = random(&[rows, columns]);
        let Fp8Rows { data, scale } = quantise_fp8(&weight).unwrap();
        for (i, addends) in sets_of_addends(rows, columns).iter().enumerate().filter(|(_, addends)| !addends.is_empty()) {
            for dtype in HALF {
                let addends: Vec<_> = addends.iter().map(|addend| addend.to_dtype(dtype).unwrap()).collect();
                for (place, run) in places() {
                    let placed = addends_on(&addends, &place);
                    let once = |work: &dyn Fn() -> Tensor, want: Tensor, of: String| {
                        let before = launches();
                        let got = run(work);
                        assert_eq!(launches() - before, 1, "{of}");
                        assert_eq!((got.dims(), got.dtype()), (&[rows, columns][..], dtype), "{of}");
                        assert_rounded_once(&got, &want, dtype, &of);
                    };
                    for scale in [Some(scale.clone()), Some(Tensor::new(0.25f32, cpu).unwrap()), None] {
                        let there =
                            (data.to_device(&place).unwrap(), scale.as_ref().map(|scale| scale.to_device(&place).unwrap()));
                        let want = widen_fp8(&data, scale.as_ref(), dtype, &addends).unwrap();
                        let widened = || widen_fp8(&there.0, there.1.as_ref(), dtype, &placed).unwrap();
                        once(&widened, want, format!("set {i}, e4m3, scale {scale:?}"));
                    }
                    for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
                        let here = QTensor::quantize(&weight, kind).unwrap();
                        let there = upload_blocks(&[&here.data().unwrap()], kind, &[rows, columns], &place).unwrap();
                        let want = || widen_blocks(&here, dtype, &addends).unwrap();
                        once(&|| widen_blocks(&there, dtype, &placed).unwrap(), want(), format!("set {i}, {kind:?}"));
                        let visited = || visit_blocks(&here, dtype, &placed, &place, Ok).unwrap();
                        once(&visited, want(), format!("set {i}, {kind:?} that waits"));
                    }
                }
            }
        }
    }
    // What a kernel does not take is composed.
    let blocks = QTensor::quantize(&random(&[2, 256]), Q8_0).unwrap();
    let wide = sets_of_addends(2, 256)[0].clone();
    let before = launches();
    let got = emulated(|| widen_blocks(&blocks, DType::BF16, &wide).unwrap());
    assert_eq!(launches(), before, "factors are to be of the product's type");
    assert_rounded_once(&got, &widen_blocks(&blocks, DType::BF16, &wide).unwrap(), DType::BF16, "composed");
    assert!(emulated(|| widen_blocks(&blocks, DType::BF16, &sets_of_addends(3, 256)[0])).is_err());
}

/// Of a card made of software.
#[allow(clippy::disallowed_methods, reason = "tests may read the environment")]
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Products of e4m3 on a card's units: what the processor makes of the same bytes.
#[test]
fn products_in_e4m3() {
    for (n, output, input) in [(1, 64, 96), (13, 48, 512), (512, 256, 128)] {
        let (x, weight) = (random(&[n, input]), (random(&[output, input]) * 0.1).unwrap());
        let (x, weight, bias) = (quantise_fp8(&x).unwrap(), quantise_fp8(&weight).unwrap(), random(&[output]));
        for dtype in [DType::F16, DType::BF16] {
            let bias = bias.to_dtype(dtype).unwrap();
            for bias in [None, Some(&bias)] {
                for through_gelu in [false, true] {
                    let of = |x: &Fp8Rows, weight: &Fp8Rows, bias: Option<&Tensor>, dtype| {
                        linear_fp8(x, weight, bias, through_gelu, dtype).unwrap()
                    };
                    let truth = of(&x, &weight, bias.map(to_f32).as_ref(), DType::F32);
                    for (place, run) in places() {
                        let there = |rows: &Fp8Rows| Fp8Rows {
                            data: rows.data.to_device(&place).unwrap(),
                            scale: rows.scale.to_device(&place).unwrap(),
                        };
                        let (x, weight, bias) = (there(&x), there(&weight), bias.map(|bias| bias.to_device(&place).unwrap()));
                        let (before, got) = (launches(), run(&|| of(&x, &weight, bias.as_ref(), dtype)));
                        // On Hopper a product, and GELU if its library has none for it; on others a product in bf16, then what scales
                        // it. (The long way widens both and makes GELU.)
                        let (made, apart) = (launches() - before, through_gelu && setting("CARD_PLAIN_SCALES").is_some());
                        let expected = match setting("CARD_CAPABILITY").as_deref() {
                            Some("9.0") => made == 1 + usize::from(apart),
                            Some(_) => dtype == DType::F16 || made == 2,
                            None => dtype == DType::F16 || made == 1 || made == 2,
                        };
                        assert!(place.is_cpu() || expected, "{made} launches");
                        let (error, bound) = (relative(&got, &truth), if dtype == DType::F16 { 1e-3 } else { 6e-3 });
                        assert!(error < bound, "{n} {output} {input} {dtype:?} {through_gelu} on {place:?}: {error:e}");
                    }
                }
            }
        }
    }
}
