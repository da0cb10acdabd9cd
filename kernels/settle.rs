//! Whose attention is faster on a card: timed once, then always the same, so that equal jobs give equal bytes also in the next process.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::attention::{Attention, attention, choose_attention, chosen_attention};
use crate::{choices, cudnn};

/// Runs of each that are timed, after one that is not.
const RUNS: usize = 5;

/// So many tokens less are looked at as well: a length that ends within a tile of keys, as odd prompts and sizes do.
const LESS: usize = 39;

/// How far two right answers may be apart, relative to their length: both round to 16 bits.
const APART: f64 = 1e-2;

/// Chooses whose attention is used from now on, unless that was chosen before: cuDNN's if it is installed, gives what ours gives, and is
/// faster for `heads` of `width` channels and so many tokens. What it is and why, for the log.
pub fn settle_attention(device: &Device, heads: usize, tokens: usize, width: usize, dtype: DType) -> Result<String> {
    let (choice, why) = match chosen_attention() {
        Some(Attention::Own) => return Ok("ours".into()),
        Some(Attention::Cudnn) => return Ok(cudnn::cudnn_status()),
        None if !cudnn::has_cudnn() => (Attention::Own, format!("ours; {}", cudnn::cudnn_status())),
        None => {
            let sizes = format!("{heads}-{tokens}-{width}-{}", dtype.as_str());
            let name = format!("attention-{}-{}-{sizes}", crate::card::machine(device)?, cudnn::cudnn_status());
            let kept = || choices::recall(&name).and_then(|kept| parse(&kept));
            let timed = || -> Result<(Attention, String)> {
                Ok(match faster([heads, tokens, width], dtype, device)? {
                    // Another process may have made its own in the meantime, which holds.
                    Timed::Both(choice, why) => kept().unwrap_or_else(|| {
                        choices::remember(&name, &format!("{} {why}\n", word(choice)));
                        (choice, why)
                    }),
                    Timed::NotTheirs(why) => (Attention::Own, format!("ours; {why}")),
                })
            };
            kept().map_or_else(timed, Ok)?
        }
    };
    choose_attention(choice);
    Ok(why)
}

fn word(choice: Attention) -> &'static str {
    match choice {
        Attention::Own => "own",
        Attention::Cudnn => "cudnn",
    }
}

/// What is damaged is timed again.
fn parse(kept: &str) -> Option<(Attention, String)> {
    let (first, why) = kept.trim().split_once(' ')?;
    let choice = [Attention::Own, Attention::Cudnn].into_iter().find(|choice| word(*choice) == first)?;
    Some((choice, why.to_owned()))
}

enum Timed {
    /// The faster one.
    Both(Attention, String),
    /// cuDNN's cannot be used at present: looked at again the next time.
    NotTheirs(String),
}

fn faster([heads, tokens, width]: [usize; 3], dtype: DType, device: &Device) -> Result<Timed> {
    let scale = 1. / (width as f64).sqrt();
    let random = |tokens: usize| Tensor::randn(0f32, 1., (1, heads, tokens, width), device)?.to_dtype(dtype);
    let own = |[q, k, v]: &[Tensor; 3]| attention(q, k, v, scale, None);
    // What does not run here is not an answer, whatever the reason.
    let theirs = |[q, k, v]: &[Tensor; 3]| cudnn::attention(q, k, v, scale, None).map_err(|error| error.to_string());
    let (mut whole, status) = (None, cudnn::cudnn_status);
    for tokens in [tokens, tokens.saturating_sub(LESS).max(1)] {
        let inputs = [random(tokens)?, random(tokens)?, random(tokens)?];
        let other = match theirs(&inputs) {
            Ok(Some(other)) => other,
            Ok(None) => return Ok(Timed::NotTheirs(status())),
            Err(error) => return Ok(Timed::NotTheirs(format!("{}: {error}", status()))),
        };
        let apart = relative(&other, &own(&inputs)?)?;
        if apart.is_nan() || apart > APART {
            return Ok(Timed::NotTheirs(format!("{} gives something else ({apart:.1e})", status())));
        }
        whole.get_or_insert(inputs);
    }
    let Some(inputs) = whole else { unreachable!("there were two lengths") };
    let own = median(device, &|| own(&inputs).map(drop))?;
    let theirs = median(device, &|| theirs(&inputs).map(drop).map_err(candle_core::Error::msg))?;
    let times = format!("{:.2} ms ours, {:.2} ms {}", 1e3 * own.as_secs_f64(), 1e3 * theirs.as_secs_f64(), status());
    Ok(match theirs < own {
        true => Timed::Both(Attention::Cudnn, format!("cuDNN's: {times}")),
        false => Timed::Both(Attention::Own, format!("ours: {times}")),
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
        let kept = format!("{} cuDNN's: 3.10 ms ours, 1.90 ms cuDNN 9.28.0\n", word(Attention::Cudnn));
        assert_eq!(parse(&kept), Some((Attention::Cudnn, "cuDNN's: 3.10 ms ours, 1.90 ms cuDNN 9.28.0".into())));
        assert_eq!(parse("own ours"), Some((Attention::Own, "ours".into())));
        assert!(["", "own", "theirs are faster", "\n"].iter().all(|text| parse(text).is_none()));
    }

    #[test]
    fn without_cudnn_ours_is_used_and_the_log_says_why() {
        if cudnn::has_cudnn() {
            return;
        }
        let why = settle_attention(&Device::Cpu, 2, 8, 64, DType::BF16).unwrap();
        assert!(why.starts_with("ours; no cuDNN"), "{why}");
        assert_eq!(chosen_attention(), Some(Attention::Own));
        assert_eq!(settle_attention(&Device::Cpu, 2, 8, 64, DType::BF16).unwrap(), "ours");
    }

    #[test]
    fn what_cudnn_does_not_take_is_ours() {
        let why = faster([2, 8, 64], DType::BF16, &Device::Cpu).unwrap();
        assert!(matches!(why, Timed::NotTheirs(_)), "cuDNN takes no tensors of the processor's");
        let q = Tensor::randn(0f32, 1., (1, 2, 8, 64), &Device::Cpu).unwrap();
        assert!(relative(&q, &q).unwrap() == 0. && relative(&(&q * 1.1).unwrap(), &q).unwrap() > 0.09);
    }
}
