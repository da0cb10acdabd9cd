//! cuDNN's attention and convolutions, on a card where it is installed.

use candle_core::{DType, Device, Tensor};
use kernels::{Whose, Window, Work, attention, choose, convolve, cudnn_status, launches};

use super::{HALF, random, relative, to_f32};

/// `None` without cuDNN.
fn card() -> Option<Device> {
    kernels::use_fused(true);
    if !kernels::has_cudnn() {
        println!("not looked at: {}", cudnn_status());
        return None;
    }
    Some(super::card())
}

#[test]
fn attention_by_cudnn() {
    let Some(card) = card() else { return };
    let by_cudnn = |x: &[Tensor; 3], scale: f64| {
        let before = launches();
        choose(Work::Attention, Whose::Cudnn);
        let y = attention(&x[0], &x[1], &x[2], scale, None).unwrap();
        choose(Work::Attention, Whose::Own);
        // Neither our kernel nor plain operations, whose heads do not lie side by side.
        assert_eq!(launches(), before, "{}", cudnn_status());
        assert!(y.transpose(1, 2).unwrap().is_contiguous(), "{}", cudnn_status());
        y
    };
    let check = |name: &str, x: [Tensor; 3], scale: f64| {
        let exact = [0, 1, 2].map(|i: usize| to_f32(&x[i]));
        let want = attention(&exact[0], &exact[1], &exact[2], scale, None).unwrap();
        let (got, again) = (by_cudnn(&x, scale), by_cudnn(&x, scale));
        let (error, bound) = (relative(&got, &want), if x[0].dtype() == DType::F16 { 1e-3 } else { 6e-3 });
        println!("cuDNN, {name} {:?} {:?}: {error:.2e}", x[0].dims(), x[0].dtype());
        assert!(error < bound, "{name} {:?} {:?}: {error:e}", x[0].dims(), x[0].dtype());
        assert_eq!(relative(&again, &to_f32(&got)), 0., "{name} differs from run to run");
    };
    for dtype in HALF {
        for (b, h, l, l_kv, e) in [(2, 3, 77, 129, 64), (1, 2, 130, 64, 128), (2, 24, 600, 600, 128), (1, 2, 1, 1, 64)] {
            let placed = |l: usize| random(&[b, h, l, e]).to_dtype(dtype).unwrap().to_device(&card).unwrap();
            check("packed", [placed(l), placed(l_kv), placed(l_kv)], 1. / (e as f64).sqrt());
        }
        // q, k and v as parts of one tensor, and scores far from 0, of which only the largest counts.
        let (l, h, e) = (70, 2, 64);
        let all = (random(&[1, l, 3 * h * e]) * 8.).unwrap().to_dtype(dtype).unwrap().to_device(&card).unwrap();
        let part = |i: usize| all.narrow(2, i * h * e, h * e).unwrap().reshape((1, l, h, e)).unwrap().transpose(1, 2).unwrap();
        check("parts", [part(0), part(1), part(2)], 1.);
    }
    println!("{}", cudnn_status());
}

#[test]
fn convolution_by_cudnn() {
    let Some(card) = card() else { return };
    for dtype in HALF {
        for (b, height, width, c, o, window, residual) in [
            (1, 16, 24, 64, 128, Window::SAME, true),
            (2, 17, 9, 16, 512, Window::SAME, false),
            (1, 32, 32, 128, 128, Window::HALVE, false),
            (1, 128, 128, 512, 512, Window::SAME, true),
        ] {
            let placed = |shape: &[usize]| random(shape).to_dtype(dtype).unwrap().to_device(&card).unwrap();
            let (x, w, bias) = (placed(&[b, height, width, c]), placed(&[o, 3, 3, c]), placed(&[o]));
            let other = residual.then(|| placed(&[b, height / window.stride, width / window.stride, o]));
            let exact = [&x, &w, &bias].map(to_f32);
            let want = convolve(&exact[0], &exact[1], &exact[2], window, other.as_ref().map(to_f32).as_ref()).unwrap();
            let by_cudnn = || {
                let before = launches();
                choose(Work::Convolution, Whose::Cudnn);
                let y = convolve(&x, &w, &bias, window, other.as_ref()).unwrap();
                choose(Work::Convolution, Whose::Own);
                assert_eq!(launches(), before, "not our kernel: {}", cudnn_status());
                y
            };
            let (got, again) = (by_cudnn(), by_cudnn());
            let (error, bound) = (relative(&got, &want), if dtype == DType::F16 { 5e-4 } else { 4e-3 });
            println!("cuDNN, {:?} to {o}, {dtype:?}: {error:.2e}", x.dims());
            assert!(error < bound, "{:?} to {o}, {dtype:?}: {error:e}", x.dims());
            assert_eq!(relative(&again, &to_f32(&got)), 0., "it differs from run to run");
        }
    }
}
