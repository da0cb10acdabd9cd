//! How long a step took, kept for each card, so that a plan can say what to expect.

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::Device;
use models::flux::Config;

use super::plan::Plan;

/// Steps of a job that say something: the first ones also warm up.
const LEAST: usize = 5;

/// Less than this is not written down anew.
const NEWS: f64 = 0.01;

/// What the time of a step of 1024 x 1024 depends on, on one card: the model's size and how long its prompts are, what is computed with, what
/// it takes of the card (which tells files that are quantised apart), and whose kernels (not whose attention).
fn key(config: &Config, plan: &Plan) -> String {
    let Config { hidden, double_blocks, single_blocks, guidance, .. } = config;
    let bytes = plan.need.map_or(0, |need| need.transformer);
    let sent = plan.need.map_or(0, |need| need.sent[0]);
    let (kind, kernels) = (if *guidance { "dev" } else { "schnell" }, if kernels::fused() { "fused" } else { "plain" });
    format!("{kind}-{double_blocks}+{single_blocks}x{hidden}-{}-{bytes}-{sent}-{kernels}", plan.name())
}

/// Keeps what the steps of a picture of 1024 x 1024 took, without a negative prompt and with nothing beside the weights: their median.
pub(super) fn note(device: &Device, config: &Config, plan: &Plan, steps: &[Duration]) {
    let (Ok(subject), true) = (subject(device), steps.len() >= LEAST) else { return };
    let mut steps = steps[1..].to_vec();
    steps.sort();
    let median = steps[steps.len() / 2].as_secs_f64();
    let mut all = parse(&kernels::recall(&subject).unwrap_or_default());
    let before = all.insert(key(config, plan), median);
    if before.is_some_and(|before| (median / before - 1.).abs() < NEWS) {
        return;
    }
    kernels::remember(&subject, &all.iter().map(|(key, seconds)| format!("{key} {seconds:.4}\n")).collect::<String>());
}

/// What was noted last, in seconds.
pub(super) fn last(device: &Device, config: &Config, plan: &Plan) -> Option<f64> {
    parse(&kernels::recall(&subject(device).ok()?)?).get(&key(config, plan)).copied()
}

fn subject(device: &Device) -> candle_core::Result<String> {
    Ok(format!("steps-{}", kernels::machine(device)?))
}

/// What is damaged is left out.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let line = |line: &str| {
        let (key, seconds) = line.split_once(' ')?;
        let seconds = seconds.parse().ok().filter(|seconds: &f64| seconds.is_finite() && *seconds > 0.0)?;
        Some((key.to_owned(), seconds))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use models::weights::Keep;

    use super::super::plan::{CONTEXT, Room};
    use super::super::sizes::Sizes;
    use super::*;

    #[test]
    fn times_are_kept_for_what_they_depend_on() {
        let plan = |sizes: &Sizes, gigabytes: f64, asked| {
            Plan::fitting(DType::BF16, sizes, Room::Card((gigabytes * 1e9) as u64 - CONTEXT), asked).unwrap()
        };
        let (dev, config) = (Sizes::FLUX1, Config::DEV);
        let dense = plan(&dev, 80., None);
        let q4 = Sizes { quantised: [Some(6_700_000_000), None], ..dev.clone() };
        let keys = [
            key(&config, &dense),
            key(&config, &plan(&dev, 80., Some(Keep::Fp8Merged))),
            key(&config, &plan(&dev, 80., Some(Keep::Fp8))),
            key(&config, &plan(&dev, 8., Some(Keep::Fp8))),
            key(&config, &plan(&q4, 80., None)),
            key(&Config { guidance: false, ..config.clone() }, &dense),
        ];
        assert!(keys.iter().enumerate().all(|(i, key)| !key.contains(' ') && !keys[..i].contains(key)), "{keys:?}");
        let read = parse(&format!("{} 0.1134\n\nnonsense\n{} fast\n{} -1\n", keys[0], keys[1], keys[2]));
        assert_eq!(read, BTreeMap::from([(keys[0].clone(), 0.1134)]));
        assert_eq!(last(&Device::Cpu, &config, &dense), None, "a processor is no card");
    }
}
