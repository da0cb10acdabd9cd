//! Two runs against each other, and the settings of one run against its best: always seed by seed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use super::metrics::{Better, Metric};
use super::results::{DENOISE, Results, Row, Setting as Group, TOTAL, by_seed, paired};
use super::stats::{self, Paired};
use super::{Axis, References};
use crate::config::Config;
use crate::ops::Error;

/// Fewer seeds than this say little of chance.
const FEW_SEEDS: usize = 8;

/// What two runs differ in, as far as their common pictures tell.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub a: String,
    pub b: String,
    /// Settings that are fixed in both, but not to the same: name, value in A, value in B.
    pub differs: Vec<(String, String, String)>,
    pub pairs: usize,
    pub seeds: usize,
    /// Too few seeds to rely on "no difference shown".
    pub few: bool,
    pub figures: Vec<Compared>,
}

/// One figure in both runs.
#[derive(Debug, Clone, Serialize)]
pub struct Compared {
    pub name: String,
    pub a: f64,
    pub b: f64,
    /// B minus A.
    #[serde(flatten)]
    pub paired: Paired,
    pub verdict: &'static str,
}

/// Settings that a row has in any case, by their names in the exact request.
const SETTINGS: [&str; 14] = [
    "base",
    "loras",
    "lora_mode",
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance",
    "true_cfg",
    "strength",
    "noise",
    "image",
    "mask",
];

/// Pairs the pictures of two runs and compares their figures.
pub fn compare(a: &Path, b: &Path, config: &Config) -> Result<Comparison, Error> {
    let read = |path: &Path| -> Result<Results, Error> {
        let mut results = Results::read(path)?;
        // The references are those of its report.
        let references = References::kept(path);
        results.measure(path, &references.judges(&results, config)?)?;
        Ok(results)
    };
    let (in_a, in_b) = (read(a)?, read(b)?);
    let varied: BTreeSet<Axis> =
        in_a.manifest.grid.varied().chain(in_b.manifest.grid.varied()).map(|(axis, _)| axis).chain([Axis::Seed]).collect();
    // By the axis's own value where both have the axis; what varies in one run alone has its value in the other's exact request.
    let both = |axis: Axis| in_a.manifest.grid.values(axis).is_some() && in_b.manifest.grid.values(axis).is_some();
    let value = |row: &Row, axis: Axis| match row.value(axis) {
        Some(value) if both(axis) => value.to_string(),
        _ => setting(row, axis),
    };
    let name = |row: &Row| varied.iter().map(|axis| value(row, *axis)).collect::<Vec<_>>().join("\n");
    let of_b: BTreeMap<String, &Row> = in_b.rows.iter().map(|row| (name(row), row)).collect();
    let pairs: Vec<(&Row, &Row)> = in_a.rows.iter().filter_map(|row| Some((row, *of_b.get(&name(row))?))).collect();
    if pairs.is_empty() {
        return Err(Error::Run {
            folder: b.into(),
            problem: format!("has no picture that agrees with one of {} in its varied settings and its seed", a.display()),
            hint: "make both runs with the same seeds, and vary the same things".into(),
        });
    }
    let mut names: Vec<&str> = vec![DENOISE, TOTAL];
    names.extend(in_a.metrics.iter().filter(|metric| in_b.metrics.contains(metric)).map(|metric| metric.name));
    let figures = names.into_iter().filter_map(|name| figure(name, &pairs)).collect();
    let seeds: BTreeSet<String> = pairs.iter().map(|(row, _)| row.exact["seed"].to_string()).collect();
    Ok(Comparison {
        a: a.display().to_string(),
        b: b.display().to_string(),
        differs: differs(&pairs),
        pairs: pairs.len(),
        seeds: seeds.len(),
        few: seeds.len() < FEW_SEEDS,
        figures,
    })
}

/// The value of an axis in a row's exact request.
fn setting(row: &Row, axis: Axis) -> String {
    match axis {
        Axis::Model => row.exact["base"]["sha256"].to_string(),
        Axis::Dtype => row.exact["base"]["dtype"].to_string(),
        Axis::Lora | Axis::LoraScale => row.exact["loras"].to_string(),
        Axis::TriggerPolicy | Axis::Prompt => row.exact["prompt"].to_string(),
        Axis::TrueCfg => row.exact["true_cfg"].to_string(),
        other => row.exact[other.name()].to_string(),
    }
}

fn differs(pairs: &[(&Row, &Row)]) -> Vec<(String, String, String)> {
    let differs = |name: &&&str| pairs.iter().all(|(a, b)| a.exact[**name] != b.exact[**name]);
    let (a, b) = pairs[0];
    let shown = |row: &Row, name: &str| {
        let axis = match name {
            "base" => Some(Axis::Model),
            "loras" => Some(Axis::Lora),
            _ => None,
        };
        let named = axis.and_then(|axis| row.value(axis)).map(ToString::to_string);
        named.filter(|_| name != "base").unwrap_or_else(|| row.exact[name].to_string())
    };
    SETTINGS.iter().filter(differs).map(|name| ((*name).to_owned(), shown(a, name), shown(b, name))).collect()
}

fn figure(name: &str, pairs: &[(&Row, &Row)]) -> Option<Compared> {
    let both: Vec<_> = pairs.iter().copied().filter(|(a, b)| a.figure(name).is_some() && b.figure(name).is_some()).collect();
    let paired = Paired::of(&paired(both.iter().copied(), name))?;
    let mean = |rows: &mut dyn Iterator<Item = &Row>| stats::mean(&by_seed(rows, name).into_values().collect::<Vec<_>>());
    let (a, b) = (mean(&mut both.iter().map(|(a, _)| *a)), mean(&mut both.iter().map(|(_, b)| *b)));
    let better = if name == DENOISE || name == TOTAL { Some(Better::Lower) } else { Metric::named(name)?.better };
    let verdict = match (paired.significant, better) {
        (false, _) => "no difference shown",
        (true, None) => "differs",
        (true, Some(Better::Higher)) if paired.difference.mean > 0. => "B is better",
        (true, Some(Better::Lower)) if paired.difference.mean < 0. => "B is better",
        (true, Some(_)) => "A is better",
    };
    Some(Compared { name: name.into(), a, b, paired, verdict })
}

/// What a run allows one to advise.
#[derive(Debug, Clone, Serialize)]
pub struct Recommendation {
    pub metric: String,
    /// The advice in a sentence, with its evidence.
    pub said: String,
    /// Cheapest first.
    pub settings: Vec<Setting>,
}

/// A combination of all that can be chosen.
#[derive(Debug, Clone, Serialize)]
pub struct Setting {
    pub name: String,
    pub seconds: f64,
    pub mean: f64,
    /// The mean paired difference to the best, in the metric's own direction; absent for the best itself.
    pub against_best: Option<f64>,
    pub interval: Option<(f64, f64)>,
    /// Significantly worse than the best; of a single seed, worse.
    pub worse: bool,
    pub recommended: bool,
}

/// The cheapest setting that is not significantly worse than the best by more than `margin`.
pub fn recommend(path: &Path, metric: Option<&str>, margin: f64, config: &Config) -> Result<Recommendation, Error> {
    if !(margin >= 0. && margin.is_finite()) {
        return Err(Error::invalid("margin", &margin, "a number from 0"));
    }
    let mut results = Results::read(path)?;
    results.measure(path, &References::kept(path).judges(&results, config)?)?;
    let metric = chosen(&results, metric)?;
    let sign = if metric.better == Some(Better::Lower) { -1. } else { 1. };
    let groups = results.settings(metric.name);
    if groups.len() < 2 {
        return Err(Error::Run {
            folder: path.into(),
            problem: format!("has fewer than two settings with {}", metric.name),
            hint: "sweep an axis other than prompt and seed, or name another metric".into(),
        });
    }
    let quality = |setting: &Group| sign * setting.mean(metric.name);
    // Of equally good ones the cheapest.
    let order = |a: &Group, b: &Group| quality(a).total_cmp(&quality(b)).then(b.mean(DENOISE).total_cmp(&a.mean(DENOISE)));
    let best = groups.iter().max_by(|a, b| order(a, b)).expect("two at least");
    let choices = results.choices();
    // Pictures that differ in the choices alone: of one seed and one prompt.
    let others: Vec<usize> = (0..results.manifest.grid.axes.len()).filter(|i| !choices.contains(i)).collect();
    let key = |row: &Row| others.iter().map(|i| row.at[*i]).collect::<Vec<_>>();
    let of_best: BTreeMap<Vec<usize>, &Row> = best.rows.iter().map(|row| (key(row), *row)).collect();
    let mut seeds = 0;
    let mut setting = |group: &Group| {
        let is_best = std::ptr::eq(group, best);
        let pairs = group.rows.iter().filter_map(|row| Some((*of_best.get(&key(row))?, *row)));
        let differences: Vec<f64> = paired(pairs, metric.name).into_iter().map(|difference| sign * difference).collect();
        seeds = seeds.max(differences.len());
        let paired = Paired::of(&differences).filter(|_| !is_best);
        // Beyond the margin, and not by chance.
        let beyond: Vec<f64> = differences.iter().map(|difference| difference + margin).collect();
        let worse = Paired::of(&beyond)
            .is_some_and(|beyond| beyond.difference.mean < 0. && (beyond.significant || beyond.difference.n == 1));
        Setting {
            name: group.name.clone(),
            seconds: group.mean(DENOISE),
            mean: group.mean(metric.name),
            against_best: paired.map(|paired| paired.difference.mean),
            interval: paired.and_then(|paired| paired.difference.interval),
            worse: worse && !is_best,
            recommended: false,
        }
    };
    let mut settings: Vec<Setting> = groups.iter().map(&mut setting).collect();
    settings.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let pick = settings.iter().position(|setting| !setting.worse).expect("the best is not worse");
    settings[pick].recommended = true;
    let said = sentence(&settings, pick, metric, seeds, margin);
    Ok(Recommendation { metric: metric.name.into(), said, settings })
}

fn chosen(results: &Results, wanted: Option<&str>) -> Result<&'static Metric, Error> {
    let have: Vec<_> = results.metrics.iter().filter(|metric| metric.better.is_some()).collect();
    let names = have.iter().map(|metric| metric.name).collect::<Vec<_>>().join(", ");
    match wanted {
        None => have.first().map(|metric| **metric).ok_or_else(|| Error::Combination {
            field: "metric",
            problem: "is not there: nothing that has a better side was measured in this run".into(),
            hint: "sweep steps, or give reference pictures with identity".into(),
        }),
        Some(wanted) => have
            .iter()
            .find(|metric| metric.name == wanted)
            .map(|metric| **metric)
            .ok_or_else(|| Error::invalid("metric", &wanted, format!("a metric of this run that has a better side: {names}"))),
    }
}

fn sentence(settings: &[Setting], pick: usize, metric: &Metric, seeds: usize, margin: f64) -> String {
    let picked = &settings[pick];
    let best = settings.iter().find(|setting| setting.against_best.is_none()).expect("one is the best");
    let mut text = match (picked.against_best, picked.interval) {
        (None, _) => format!("Use {}: it has the best {} ({:.4})", picked.name, metric.name, picked.mean),
        (Some(mean), interval) => {
            let interval = interval.map_or_else(String::new, |(low, high)| format!(", 95 % interval {low:+.4} to {high:+.4}"));
            let faster = best.seconds / picked.seconds;
            let beyond = if margin > 0. { format!(" by more than {margin}") } else { String::new() };
            format!(
                "Use {}: its {} is {:.4} against {:.4} of the best ({}), not significantly worse{beyond} \
                 (paired difference {mean:+.4}{interval}), and it is {faster:.1} times as fast",
                picked.name, metric.name, picked.mean, best.mean, best.name
            )
        }
    };
    let cheaper = pick;
    if cheaper > 0 {
        let s = if cheaper == 1 { "setting is" } else { "settings are" };
        let how = if seeds == 1 { "worse in the one seed there is" } else { "significantly worse" };
        text += &format!("; {cheaper} cheaper {s} {how}");
    }
    text += &format!(". Evidence: {seeds} seed{}", if seeds == 1 { "" } else { "s" });
    if seeds < FEW_SEEDS {
        text += ", which is few: a difference that more seeds would show may be missed. Repeat with --seeds 16";
    }
    text + "."
}
