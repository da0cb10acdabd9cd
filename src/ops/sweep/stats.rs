//! What measured figures allow one to say. Every sample here is a seed: chance, where everything else is a choice.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// How often a sample is drawn anew for an interval.
const RESAMPLES: usize = 10_000;

/// The same figures give the same interval.
const RESAMPLING_SEED: u64 = 1979;

/// Of an interval: 95 %.
const CONFIDENCE: f64 = 0.95;

/// Of a planned experiment: how surely it shows a difference that is there.
const POWER: f64 = 0.8;

/// So many equal signs are chance in 3 of 100 cases.
const EQUAL_SIGNS: usize = 6;

/// Beyond this many seeds nobody goes.
const MOST_SEEDS: usize = 100_000;

/// The figures of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub n: usize,
    pub mean: f64,
    pub median: f64,
    /// Of the mean: 2.5 % and 97.5 % of what drawing the sample anew gives (bootstrap). Absent for fewer than two values.
    pub interval: Option<(f64, f64)>,
}

impl Summary {
    /// `None` of nothing.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        (!values.is_empty()).then(|| Self {
            n: values.len(),
            mean: mean(values),
            median: median(values),
            interval: bootstrap(values),
        })
    }
}

#[must_use]
pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[must_use]
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

/// Of sorted values, between two of them in proportion, as NumPy does it.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + part * (sorted[high] - sorted[low])
}

/// The percentile interval of the mean.
fn bootstrap(values: &[f64]) -> Option<(f64, f64)> {
    if values.len() < 2 {
        return None;
    }
    let mut random = fastrand::Rng::with_seed(RESAMPLING_SEED);
    let mut draw = || (0..values.len()).map(|_| values[random.usize(..values.len())]).sum::<f64>() / values.len() as f64;
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| draw()).collect();
    means.sort_by(f64::total_cmp);
    let tail = (1. - CONFIDENCE) / 2.;
    Some((quantile(&means, tail), quantile(&means, 1. - tail)))
}

/// A difference between two settings, seed by seed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Paired {
    /// Of the differences, the second minus the first.
    #[serde(flatten)]
    pub difference: Summary,
    /// Cohen's d of paired samples: the mean difference in units of the differences' own deviation. Absent where that is 0.
    pub effect: Option<f64>,
    /// The two-sided p of the paired t-test.
    pub p: Option<f64>,
    /// Seeds that an experiment needs to show this difference at 5 % with a power of 80 %. Absent where no number would do.
    pub seeds_needed: Option<usize>,
    /// The interval does not hold 0, and p is below 5 %: of few seeds the interval alone is too sure. Equal differences need six.
    pub significant: bool,
}

impl Paired {
    /// Of the differences, one for each seed.
    #[must_use]
    pub fn of(differences: &[f64]) -> Option<Self> {
        let difference = Summary::of(differences)?;
        let n = differences.len();
        let squares = differences.iter().map(|value| (value - difference.mean).powi(2)).sum::<f64>();
        let deviation = (squares / (n.max(2) - 1) as f64).sqrt();
        // Rounding leaves something of equal values.
        let spread = n > 1 && deviation > difference.mean.abs() * 1e-12;
        let effect = spread.then(|| difference.mean / deviation);
        let p = effect.and_then(|d| p_of(d * (n as f64).sqrt(), n - 1));
        let sure = p.map_or(n >= EQUAL_SIGNS, |p| p < 1. - CONFIDENCE);
        Some(Self {
            difference,
            effect,
            p,
            seeds_needed: effect.and_then(seeds_for),
            significant: difference.interval.is_some_and(|(low, high)| low > 0. || high < 0.) && sure,
        })
    }
}

fn p_of(t: f64, freedom: usize) -> Option<f64> {
    let student = StudentsT::new(0., 1., freedom as f64).ok()?;
    Some(2. * student.cdf(-t.abs()))
}

/// The least n for which n >= ((t(1 - 5 %/2) + t(80 %)) / d)^2, with Student's t of n - 1 degrees of freedom.
fn seeds_for(effect: f64) -> Option<usize> {
    let enough = |n: usize| {
        StudentsT::new(0., 1., (n - 1) as f64).is_ok_and(|student| {
            let wanted = student.inverse_cdf(1. - (1. - CONFIDENCE) / 2.) + student.inverse_cdf(POWER);
            n as f64 >= (wanted / effect).powi(2)
        })
    };
    if !enough(MOST_SEEDS) {
        return None;
    }
    // More seeds are never worse.
    let (mut least, mut most) = (2, MOST_SEEDS);
    while least < most {
        let middle = (least + most) / 2;
        if enough(middle) { most = middle } else { least = middle + 1 }
    }
    Some(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_in_figures() {
        let summary = Summary::of(&[1., 2., 3., 10.]).unwrap();
        assert_eq!((summary.n, summary.mean, summary.median), (4, 4., 2.5));
        assert_eq!(Summary::of(&[7.]).unwrap().interval, None, "one value says nothing of chance");
        assert!(Summary::of(&[]).is_none());
    }

    /// SciPy and statsmodels, which resample with other random numbers and solve for the power exactly.
    #[test]
    fn figures_are_those_of_scipy() {
        let text = include_str!("../../../tests/fixtures/sweep/stats.json");
        let expected: serde_json::Value = serde_json::from_str(text).unwrap();
        for case in expected["cases"].as_array().unwrap() {
            let values: Vec<f64> = case["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let number = |name: &str| case[name].as_f64().unwrap();
            let paired = Paired::of(&values).unwrap();
            let (low, high) = paired.difference.interval.unwrap();
            let width = number("high") - number("low");
            let close = |name: &str, value: f64, tolerance: f64| {
                assert!((value - number(name)).abs() <= tolerance, "{name}: {value}, not {}", number(name));
            };
            close("mean", paired.difference.mean, 1e-12);
            close("median", paired.difference.median, 1e-12);
            close("low", low, 0.02 * width);
            close("high", high, 0.02 * width);
            close("effect", paired.effect.unwrap(), 1e-9);
            close("p", paired.p.unwrap(), 1e-6);
            let needed = paired.seeds_needed.map_or(f64::INFINITY, |n| n as f64);
            close("seeds_needed", needed, 1. + 0.002 * number("seeds_needed"));
        }
    }

    #[test]
    fn equal_values_have_no_spread_and_no_effect() {
        let paired = Paired::of(&[0.1; 6]).unwrap();
        assert_eq!((paired.effect, paired.seeds_needed), (None, None));
        assert!(paired.significant, "always 0.1 more");
        assert!(!Paired::of(&[0.1; 5]).unwrap().significant && !Paired::of(&[0.1, 0.2]).unwrap().significant, "of too few seeds");
        assert!(!Paired::of(&[0.; 5]).unwrap().significant);
        assert_eq!(Paired::of(&[0.3]).unwrap().p, None);
    }
}
