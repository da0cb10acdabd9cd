//! How long a step took, kept for each card, so that a plan can say what to expect.

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::Device;
use models::flux::Config;
use models::weights::OnHost;

use super::plan::Plan;

/// Steps of a job that say something: the first ones also warm up.
const LEAST: usize = 5;

/// What the time of a step of 1024 x 1024 depends on, on one card: the model's size, what it is kept as and where, whose kernels.
fn key(config: &Config, plan: &Plan) -> String {
    let OnHost { blocks_from: [doubles, singles], text: _, modulations: _ } = plan.on_host;
    let [doubles, singles] = [doubles.min(config.double_blocks), singles.min(config.single_blocks)];
    let Config { hidden, double_blocks, single_blocks, .. } = config;
    let kernels = if kernels::fused() { "fused" } else { "plain" };
    format!("{}-{doubles}/{double_blocks}-{singles}/{single_blocks}x{hidden}-{kernels}", plan.name())
}

/// Keeps what the steps of a picture of 1024 x 1024 took, without a negative prompt: their median.
pub(super) fn note(device: &Device, config: &Config, plan: &Plan, steps: &[Duration]) {
    let (Ok(subject), true) = (subject(device), steps.len() >= LEAST) else { return };
    let mut steps = steps[1..].to_vec();
    steps.sort();
    let mut all = parse(&kernels::recall(&subject).unwrap_or_default());
    all.insert(key(config, plan), steps[steps.len() / 2].as_secs_f64());
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

    use super::*;

    #[test]
    fn times_are_kept_for_what_they_depend_on() {
        let plan = |transformer, on_host| Plan { transformer, on_host, ..DType::BF16.into() };
        let of = |plan| key(&Config::DEV, &plan);
        let here = OnHost::default();
        let keys = [
            of(plan(Keep::Stored, here)),
            of(plan(Keep::Fp8, here)),
            of(plan(Keep::Fp8, OnHost { blocks_from: [19, 20], ..here })),
            key(&Config { double_blocks: 2, ..Config::DEV }, &plan(Keep::Fp8, here)),
        ];
        assert!(keys.iter().enumerate().all(|(i, key)| !key.contains(' ') && !keys[..i].contains(key)), "{keys:?}");
        // T5 and the modulations are not used in a step.
        assert_eq!(of(plan(Keep::Fp8, OnHost { text: true, modulations: true, ..here })), keys[1]);
        let read = parse(&format!("{} 0.1134\n\nnonsense\n{} fast\n{} -1\n", keys[0], keys[1], keys[2]));
        assert_eq!(read, BTreeMap::from([(keys[0].clone(), 0.1134)]));
        assert_eq!(last(&Device::Cpu, &Config::DEV, &plan(Keep::Stored, here)), None, "a processor is no card");
    }
}
