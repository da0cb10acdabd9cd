//! Whose kernels are faster on a card: timed once, then always the same, so that equal jobs give equal bytes also in the next process.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::attention::attention;
use crate::ops::convolve::{Window, convolve};
use crate::whose::{Whose, Work, choose, chosen};
use crate::{choices, cudnn};

/// Runs of each that are timed, after one that is not.
const RUNS: usize = 5;

/// So many tokens less are looked at as well: a length that ends within a tile of keys, as odd prompts and sizes do.
const LESS: usize = 39;

/// How far two right answers may be apart, relative to their length: both round to 16 bits.
const APART: f64 = 1e-2;

/// Sides and channels of the pictures that convolutions are timed with: as in FLUX.1's autoencoder, but small enough for any card.
const PICTURES: [[usize; 2]; 3] = [[128, 512], [256, 256], [256, 128]];

/// Chooses whose attention is used from now on, unless that was chosen before: cuDNN's if it is installed, gives what ours gives, and is
/// faster for `heads` of `width` channels and so many tokens. What it is and why, for the log.
pub fn settle_attention(device: &Device, heads: usize, tokens: usize, width: usize, dtype: DType) -> Result<String> {
    let sizes = format!("attention-{heads}-{tokens}-{width}-{}", dtype.as_str());
    settle(Work::Attention, &sizes, device, &|| faster_attention([heads, tokens, width], dtype, device))
}

/// The same of 3 x 3 convolutions that keep the size, with a residual.
pub fn settle_convolution(device: &Device, dtype: DType) -> Result<String> {
    let sizes = format!("convolution-{}", dtype.as_str());
    settle(Work::Convolution, &sizes, device, &|| faster_convolution(&PICTURES, dtype, device))
}

fn settle(work: Work, sizes: &str, device: &Device, faster: &dyn Fn() -> Result<Timed>) -> Result<String> {
    let (choice, why) = match chosen(work) {
        Some(Whose::Own) => return Ok("ours".into()),
        Some(Whose::Cudnn) => return Ok(cudnn::cudnn_status()),
        None if !cudnn::has_cudnn() => (Whose::Own, format!("ours; {}", cudnn::cudnn_status())),
        None => {
            let name = format!("{sizes}-{}-{}", crate::card::machine(device)?, cudnn::cudnn_version());
            let kept = || choices::recall(&name).and_then(|kept| parse(&kept));
            let timed = || -> Result<(Whose, String)> {
                Ok(match faster()? {
                    // Another process may have made its own in the meantime, which holds.
                    Timed::Both(choice, why) => kept().unwrap_or_else(|| {
                        choices::remember(&name, &format!("{} {why}\n", word(choice)));
                        (choice, why)
                    }),
                    Timed::NotTheirs(why) => (Whose::Own, format!("ours; {why}")),
                })
            };
            kept().map_or_else(timed, Ok)?
        }
    };
    choose(work, choice);
    Ok(why)
}

fn word(choice: Whose) -> &'static str {
    match choice {
        Whose::Own => "own",
        Whose::Cudnn => "cudnn",
    }
}

/// What is damaged is timed again.
fn parse(kept: &str) -> Option<(Whose, String)> {
    let (first, why) = kept.trim().split_once(' ')?;
    let choice = [Whose::Own, Whose::Cudnn].into_iter().find(|choice| word(*choice) == first)?;
    Some((choice, why.to_owned()))
}

enum Timed {
    /// The faster one.
    Both(Whose, String),
    /// cuDNN's cannot be used at present: looked at again the next time.
    NotTheirs(String),
}

fn faster_attention([heads, tokens, width]: [usize; 3], dtype: DType, device: &Device) -> Result<Timed> {
    let scale = 1. / (width as f64).sqrt();
    let random = |tokens: usize| Tensor::randn(0f32, 1., (1, heads, tokens, width), device)?.to_dtype(dtype);
    let inputs = |tokens: usize| -> Result<_> { Ok([random(tokens)?, random(tokens)?, random(tokens)?]) };
    let cases = [inputs(tokens)?, inputs(tokens.saturating_sub(LESS).max(1))?];
    let own = |[q, k, v]: &[Tensor; 3]| attention(q, k, v, scale, None);
    let theirs = |[q, k, v]: &[Tensor; 3]| cudnn::attention(q, k, v, scale, None)?.map(|y| y.transpose(1, 2)).transpose();
    faster(&cases, 1, device, &own, &theirs)
}

fn faster_convolution(pictures: &[[usize; 2]], dtype: DType, device: &Device) -> Result<Timed> {
    let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, device)?.to_dtype(dtype);
    let cases = pictures.iter().map(|&[side, c]| -> Result<_> {
        let picture = [1, side, side, c];
        Ok([random(&picture)?, random(&[c, 3, 3, c])?, random(&[c])?, random(&picture)?])
    });
    let cases = cases.collect::<Result<Vec<_>>>()?;
    // Those that keep the size are timed; others only must be right.
    let [.., last] = &cases[..] else { unreachable!("there are pictures") };
    let others = [(last, Window::SAME, false), (last, Window::HALVE, false)];
    let all: Vec<_> = cases.iter().map(|case| (case, Window::SAME, true)).chain(others).collect();
    type Case<'a> = (&'a [Tensor; 4], Window, bool);
    let own =
        |([x, weight, bias, residual], window, added): &Case<'_>| convolve(x, weight, bias, *window, added.then_some(residual));
    let theirs = |([x, weight, bias, residual], window, added): &Case<'_>| {
        let side = |i| Ok::<_, candle_core::Error>(x.dim(i)? / window.stride);
        let shape = [x.dim(0)?, side(1)?, side(2)?, weight.dim(0)?];
        cudnn::convolve([x, weight, bias], added.then_some(residual), *window, shape)
    };
    faster(&all, cases.len(), device, &own, &theirs)
}

/// Compares both on all cases, and the times of the first ones.
fn faster<C>(
    cases: &[C],
    timed: usize,
    device: &Device,
    own: &dyn Fn(&C) -> Result<Tensor>,
    theirs: &dyn Fn(&C) -> Result<Option<Tensor>>,
) -> Result<Timed> {
    let status = cudnn::cudnn_status;
    for case in cases {
        // What does not run here is not an answer, whatever the reason.
        let other = match theirs(case) {
            Ok(Some(other)) => other,
            Ok(None) => return Ok(Timed::NotTheirs(status())),
            Err(error) => return Ok(Timed::NotTheirs(format!("{}: {error}", status()))),
        };
        let apart = relative(&other, &own(case)?)?;
        if apart.is_nan() || apart > APART {
            return Ok(Timed::NotTheirs(format!("{} gives something else ({apart:.1e})", status())));
        }
    }
    let all = |run: &dyn Fn(&C) -> Result<()>| cases[..timed].iter().try_for_each(run);
    let own = median(device, &|| all(&|case| own(case).map(drop)))?;
    let theirs = median(device, &|| all(&|case| theirs(case).map(drop)))?;
    let times = format!("{:.2} ms ours, {:.2} ms {}", 1e3 * own.as_secs_f64(), 1e3 * theirs.as_secs_f64(), status());
    Ok(match theirs < own {
        true => Timed::Both(Whose::Cudnn, format!("cuDNN's: {times}")),
        false => Timed::Both(Whose::Own, format!("ours: {times}")),
    })
}

/// |a - b|₂ / |b|₂.
fn relative(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let norm = |x: &Tensor| -> Result<f64> { Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt()) };
    Ok(norm(&(a - &b)?)? / norm(&b)?)
}

fn median(device: &Device, run: &dyn Fn() -> Result<()>) -> Result<Duration> {
    run()?;
    device.synchronize()?;
    let timed = |_| {
        let start = Instant::now();
        run()?;
        device.synchronize()?;
        Ok(start.elapsed())
    };
    let mut times = (0..RUNS).map(timed).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[RUNS / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_and_what_is_damaged_is_not() {
        let kept = format!("{} cuDNN's: 3.10 ms ours, 1.90 ms cuDNN 9.28.0\n", word(Whose::Cudnn));
        assert_eq!(parse(&kept), Some((Whose::Cudnn, "cuDNN's: 3.10 ms ours, 1.90 ms cuDNN 9.28.0".into())));
        assert_eq!(parse("own ours"), Some((Whose::Own, "ours".into())));
        assert!(["", "own", "theirs are faster", "\n"].iter().all(|text| parse(text).is_none()));
    }

    #[test]
    fn without_cudnn_ours_is_used_and_the_log_says_why() {
        if cudnn::has_cudnn() {
            return;
        }
        let why = settle_attention(&Device::Cpu, 2, 8, 64, DType::BF16).unwrap();
        assert!(why.starts_with("ours; no cuDNN"), "{why}");
        assert_eq!(chosen(Work::Attention), Some(Whose::Own));
        assert_eq!(settle_attention(&Device::Cpu, 2, 8, 64, DType::BF16).unwrap(), "ours");
    }

    #[test]
    fn what_cudnn_does_not_take_is_ours() {
        let attention = faster_attention([2, 8, 64], DType::BF16, &Device::Cpu).unwrap();
        let convolution = faster_convolution(&[[8, 16]], DType::BF16, &Device::Cpu).unwrap();
        for why in [attention, convolution] {
            assert!(matches!(why, Timed::NotTheirs(_)), "cuDNN takes no tensors of the processor's");
        }
        let q = Tensor::randn(0f32, 1., (1, 2, 8, 64), &Device::Cpu).unwrap();
        assert!(relative(&q, &q).unwrap() == 0. && relative(&(&q * 1.1).unwrap(), &q).unwrap() > 0.09);
    }
}
