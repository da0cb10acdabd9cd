//! What a sweep varies: axes with their values, as lists and ranges, crossed or walked in step.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ops::Error;

/// Most values of one axis.
const MOST_VALUES: usize = 100_000;

/// Digits behind the point that a range is computed with.
const MOST_PLACES: usize = 15;

/// A setting that can be varied, in the order in which a run changes them: the dearest to change first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    Model,
    Dtype,
    Lora,
    LoraScale,
    TriggerPolicy,
    Prompt,
    Width,
    Height,
    Strength,
    TrueCfg,
    Guidance,
    Steps,
    Seed,
}

/// What the values of an axis are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Whole,
    Number,
}

impl Axis {
    pub const ALL: [Self; 13] = [
        Self::Model,
        Self::Dtype,
        Self::Lora,
        Self::LoraScale,
        Self::TriggerPolicy,
        Self::Prompt,
        Self::Width,
        Self::Height,
        Self::Strength,
        Self::TrueCfg,
        Self::Guidance,
        Self::Steps,
        Self::Seed,
    ];

    /// As flags, files and columns call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dtype => "dtype",
            Self::Lora => "lora",
            Self::LoraScale => "lora-scale",
            Self::TriggerPolicy => "trigger-policy",
            Self::Prompt => "prompt",
            Self::Width => "width",
            Self::Height => "height",
            Self::Strength => "strength",
            Self::TrueCfg => "true-cfg",
            Self::Guidance => "guidance",
            Self::Steps => "steps",
            Self::Seed => "seed",
        }
    }

    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|axis| axis.name() == name)
    }

    fn kind(self) -> Kind {
        match self {
            Self::Model | Self::Dtype | Self::Lora | Self::TriggerPolicy | Self::Prompt => Kind::Text,
            Self::Width | Self::Height | Self::Steps | Self::Seed => Kind::Whole,
            Self::LoraScale | Self::Strength | Self::TrueCfg | Self::Guidance => Kind::Number,
        }
    }

    /// Chance, not a choice: figures are averaged over it.
    #[must_use]
    pub fn is_chance(self) -> bool {
        self == Self::Seed
    }

    /// A setting that one would recommend: neither chance nor what the picture shows.
    #[must_use]
    pub fn is_choice(self) -> bool {
        !matches!(self, Self::Seed | Self::Prompt)
    }

    /// Numbers from `10,20,28` and ranges `first:last:step` (or `first:last` by 1), mixed. Texts are not for this.
    pub fn numbers(self, text: &str) -> Result<Vec<Value>, Error> {
        let mut values = Vec::new();
        for part in text.split(',').map(str::trim) {
            let numbers = match part.split(':').collect::<Vec<_>>()[..] {
                [one] => vec![Decimal::read(one).ok_or_else(|| self.wrong(text))?],
                [first, last] => self.range(text, first, last, "1")?,
                [first, last, step] => self.range(text, first, last, step)?,
                _ => return Err(self.wrong(text)),
            };
            for number in numbers {
                values.push(self.number(text, &number)?);
            }
            if values.len() > MOST_VALUES {
                return Err(Error::invalid(self.name(), &text, format!("at most {MOST_VALUES} values")));
            }
        }
        Ok(values)
    }

    fn range(self, text: &str, first: &str, last: &str, step: &str) -> Result<Vec<Decimal>, Error> {
        let read = |text| Decimal::read(text).ok_or_else(|| self.wrong(text));
        let (first, last, step) = (read(first)?, read(last)?, read(step)?);
        if self.kind() == Kind::Whole && step.value != 0.0 {
            return self.whole_range(text, &first, &last, &step);
        }
        let places = first.places.max(step.places);
        let steps = (last.value - first.value) / step.value;
        if step.value == 0.0 {
            return Err(Error::invalid(self.name(), &text, "a range with a step other than 0"));
        }
        if steps < 0.0 {
            return Err(Error::invalid(
                self.name(),
                &text,
                "a range that holds a value: first:last:step leads from first to last",
            ));
        }
        // The last value belongs to it, whatever the sums round to.
        let count = (steps + 1e-6).floor();
        if count >= MOST_VALUES as f64 {
            return Err(Error::invalid(self.name(), &text, format!("a range of at most {MOST_VALUES} values")));
        }
        // Each value as a person would write it: 0.8, not 0.8000000000000000444.
        let at = |i: usize| format!("{:.places$}", first.value + i as f64 * step.value);
        Ok((0..=count as usize).filter_map(|i| Decimal::read(&at(i))).collect())
    }

    /// As [`Self::range`], exact beyond what a float holds.
    fn whole_range(self, text: &str, first: &Decimal, last: &Decimal, step: &Decimal) -> Result<Vec<Decimal>, Error> {
        let whole = |decimal: &Decimal| decimal.whole.map(i128::from).or_else(|| decimal.signed.map(i128::from));
        let (Some(first), Some(last), Some(step)) = (whole(first), whole(last), whole(step)) else {
            return Err(Error::invalid(self.name(), &text, "whole numbers from 0"));
        };
        if (last - first) * step.signum() < 0 {
            return Err(Error::invalid(
                self.name(),
                &text,
                "a range that holds a value: first:last:step leads from first to last",
            ));
        }
        let count = (last - first) / step;
        if count >= MOST_VALUES as i128 {
            return Err(Error::invalid(self.name(), &text, format!("a range of at most {MOST_VALUES} values")));
        }
        Ok((0..=count).filter_map(|i| Decimal::read(&(first + i * step).to_string())).collect())
    }

    fn number(self, text: &str, number: &Decimal) -> Result<Value, Error> {
        match (self.kind(), number.whole) {
            (Kind::Whole, Some(whole)) => Ok(Value::Whole(whole)),
            (Kind::Whole, None) => Err(Error::invalid(self.name(), &text, "whole numbers from 0")),
            (Kind::Number, _) => Ok(Value::Number(number.value)),
            (Kind::Text, _) => Err(self.wrong(text)),
        }
    }

    fn wrong(self, text: &str) -> Error {
        Error::invalid(self.name(), &text, "numbers and ranges such as 10,20,28 or 1.5:5.0:0.5 (first:last:step)")
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A number as it was written.
struct Decimal {
    value: f64,
    whole: Option<u64>,
    signed: Option<i64>,
    /// Digits behind the point.
    places: usize,
}

impl Decimal {
    fn read(text: &str) -> Option<Self> {
        let text = text.trim();
        let value = text.parse::<f64>().ok().filter(|value| value.is_finite())?;
        let (digits, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let written = digits.split_once('.').map_or(0, |(_, rest)| rest.len() as i64);
        // 2.5e-1 has two.
        let places = usize::try_from(written - exponent.parse::<i64>().ok()?).unwrap_or(0).min(MOST_PLACES);
        Some(Self { value, whole: text.parse().ok(), signed: text.parse().ok(), places })
    }
}

/// One value of an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    Whole(u64),
    Number(f64),
    Text(String),
}

impl Value {
    #[must_use]
    pub fn as_number(&self) -> Option<f64> {
        match self {
            Self::Whole(value) => Some(*value as f64),
            Self::Number(value) => Some(*value),
            Self::Text(_) => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// The axes of a sweep and how they are crossed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// In the order of [`Axis`], each once, each with at least one value.
    pub axes: Vec<(Axis, Vec<Value>)>,
    /// Axes that are walked in step: the first value of each together, then the second, ...
    pub zips: Vec<Vec<Axis>>,
}

impl Grid {
    /// Checks the axes against one another.
    pub fn new(mut axes: Vec<(Axis, Vec<Value>)>, zips: Vec<Vec<Axis>>) -> Result<Self, Error> {
        axes.sort_by_key(|(axis, _)| *axis);
        for (axis, values) in &axes {
            if values.is_empty() {
                return Err(Error::invalid(axis.name(), &"empty", "at least one value"));
            }
            let zipped = zips.iter().any(|zip| zip.contains(axis));
            if let Some(twice) = values.iter().enumerate().find(|(i, value)| values[..*i].contains(value)).filter(|_| !zipped) {
                return Err(Error::invalid(axis.name(), &format!("{} twice", twice.1), "each value once"));
            }
        }
        let grid = Self { axes, zips };
        grid.check_zips()?;
        Ok(grid)
    }

    fn check_zips(&self) -> Result<(), Error> {
        let wrong = |problem: String| Error::Combination {
            field: "zip",
            problem,
            hint: "name axes with the same number of values, each axis once".into(),
        };
        let mut seen = Vec::new();
        for zip in &self.zips {
            if zip.len() < 2 {
                return Err(wrong("names fewer than two axes".into()));
            }
            let mut lengths = Vec::new();
            for axis in zip {
                if seen.contains(axis) {
                    return Err(wrong(format!("names {axis} twice")));
                }
                seen.push(*axis);
                let values = self.values(*axis).ok_or_else(|| wrong(format!("names {axis}, which has no values")))?;
                lengths.push((axis, values.len()));
            }
            if let Some((axis, length)) = lengths.iter().find(|(_, length)| *length != lengths[0].1) {
                return Err(wrong(format!("pairs {} values of {} with {length} of {axis}", lengths[0].1, lengths[0].0)));
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn values(&self, axis: Axis) -> Option<&[Value]> {
        self.axes.iter().find(|(has, _)| *has == axis).map(|(_, values)| values.as_slice())
    }

    /// The axes with more than one value.
    pub fn varied(&self) -> impl Iterator<Item = (Axis, &[Value])> {
        self.axes.iter().filter(|(_, values)| values.len() > 1).map(|(axis, values)| (*axis, values.as_slice()))
    }

    /// How many cells there are; `None` beyond all counting.
    #[must_use]
    pub fn count(&self) -> Option<usize> {
        self.dimensions().iter().try_fold(1_usize, |count, (_, length)| count.checked_mul(*length))
    }

    /// Axes that move together, with their number of values.
    fn dimensions(&self) -> Vec<(Vec<usize>, usize)> {
        let place = |axis: &Axis| self.axes.iter().position(|(has, _)| has == axis).expect("checked by new");
        let mut dimensions: Vec<(Vec<usize>, usize)> = Vec::new();
        for (i, (axis, values)) in self.axes.iter().enumerate() {
            match self.zips.iter().find(|zip| zip.contains(axis)) {
                None => dimensions.push((vec![i], values.len())),
                Some(zip) => {
                    let mut places: Vec<usize> = zip.iter().map(place).collect();
                    places.sort_unstable();
                    // With the first of its axes.
                    if places[0] == i {
                        dimensions.push((places, values.len()));
                    }
                }
            }
        }
        dimensions
    }

    /// Every cell once: the place of its value on each axis. The last axis moves fastest, so that what is dear to change changes
    /// least.
    pub fn cells(&self) -> impl Iterator<Item = Vec<usize>> {
        let dimensions = self.dimensions();
        let (count, axes) = (self.count().unwrap_or(usize::MAX), self.axes.len());
        (0..count).map(move |mut number| {
            let mut cell = vec![0; axes];
            for (places, length) in dimensions.iter().rev() {
                places.iter().for_each(|place| cell[*place] = number % length);
                number /= length;
            }
            cell
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn numbers(axis: Axis, text: &str) -> Vec<String> {
        axis.numbers(text).unwrap().iter().map(Value::to_string).collect()
    }

    #[test]
    fn lists_and_ranges_are_read_as_people_write_them() {
        assert_eq!(numbers(Axis::Steps, "10,20, 28"), ["10", "20", "28"]);
        assert_eq!(numbers(Axis::Guidance, "1.5:5.0:0.5"), ["1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]);
        assert_eq!(numbers(Axis::LoraScale, "0.6:1.2:0.2"), ["0.6", "0.8", "1", "1.2"]);
        assert_eq!(numbers(Axis::LoraScale, "1:-1:-0.5"), ["1", "0.5", "0", "-0.5", "-1"]);
        assert_eq!(numbers(Axis::Guidance, "1:2:2.5e-1"), ["1", "1.25", "1.5", "1.75", "2"]);
        assert_eq!(numbers(Axis::Seed, "18446744073709551613:18446744073709551615").len(), 3);
        assert_eq!(numbers(Axis::Steps, "9:3:-3"), ["9", "6", "3"]);
        assert_eq!(numbers(Axis::Seed, "3:5,18446744073709551615"), ["3", "4", "5", "18446744073709551615"]);
        assert_eq!(numbers(Axis::Guidance, "1:2.4:0.5"), ["1", "1.5", "2"], "not beyond the last");
    }

    #[test]
    fn wrong_axes_are_refused_in_words() {
        let message = |axis: Axis, text: &str| axis.numbers(text).unwrap_err().to_string();
        for (axis, text, says) in [
            (Axis::Guidance, "5:1:0.5", "leads from first to last"),
            (Axis::Guidance, "1:5:0", "step other than 0"),
            (Axis::Guidance, "1:1:0", "step other than 0"),
            (Axis::Guidance, "nan", "such as 10,20,28"),
            (Axis::Guidance, "inf", "such as 10,20,28"),
            (Axis::Guidance, "1:nan:1", "such as 10,20,28"),
            (Axis::Guidance, "", "such as 10,20,28"),
            (Axis::Guidance, "1,,2", "such as 10,20,28"),
            (Axis::Guidance, "1:2:3:4", "such as 10,20,28"),
            (Axis::Steps, "2.5", "whole numbers"),
            (Axis::Steps, "-1", "whole numbers"),
            (Axis::Seed, "0:1000000000", "at most 100000 values"),
            (Axis::Guidance, "0:1:1e-300", "at most 100000 values"),
        ] {
            assert!(message(axis, text).contains(says), "{text}: {}", message(axis, text));
        }
    }

    fn grid(axes: &[(Axis, &str)], zips: &[&[Axis]]) -> Result<Grid, Error> {
        let axes = axes.iter().map(|(axis, text)| (*axis, axis.numbers(text).unwrap())).collect();
        Grid::new(axes, zips.iter().map(|zip| zip.to_vec()).collect())
    }

    #[test]
    fn axes_are_crossed_or_walked_in_step() {
        let crossed = grid(&[(Axis::Seed, "1,2"), (Axis::Guidance, "1,2,3")], &[]).unwrap();
        let cells: Vec<_> = crossed.cells().collect();
        assert_eq!(cells, [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]], "guidance, then seed");
        let zipped =
            grid(&[(Axis::Width, "64,128"), (Axis::Height, "128,64"), (Axis::Seed, "1,2")], &[&[Axis::Height, Axis::Width]]);
        let cells: Vec<_> = zipped.unwrap().cells().collect();
        assert_eq!(cells, [[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]]);
    }

    #[test]
    fn axes_that_do_not_fit_are_refused() {
        let message = |axes: &[(Axis, &str)], zips: &[&[Axis]]| grid(axes, zips).unwrap_err().to_string();
        assert!(message(&[(Axis::Steps, "4,4")], &[]).contains("4 twice"));
        let pair: &[&[Axis]] = &[&[Axis::Steps, Axis::Guidance]];
        assert!(
            message(&[(Axis::Steps, "4,5"), (Axis::Guidance, "1,2,3")], pair).contains("2 values of steps with 3 of guidance")
        );
        assert!(message(&[(Axis::Steps, "4,5")], pair).contains("guidance, which has no values"));
        assert!(message(&[(Axis::Steps, "4,5")], &[&[Axis::Steps]]).contains("fewer than two"));
        assert!(message(&[(Axis::Steps, "4,5")], &[&[Axis::Steps, Axis::Steps]]).contains("steps twice"));
    }

    proptest! {
        /// The grid is the product of its dimensions, without a cell twice, and every value occurs equally often.
        #[test]
        fn every_cell_once(lengths in prop::collection::vec(1_usize..5, 1..5)) {
            let numeric = [Axis::LoraScale, Axis::Strength, Axis::TrueCfg, Axis::Guidance];
            let axes: Vec<_> =
                numeric.iter().zip(&lengths).map(|(axis, n)| (*axis, axis.numbers(&format!("1:{n}")).unwrap())).collect();
            let grid = Grid::new(axes, Vec::new()).unwrap();
            let mut cells: Vec<_> = grid.cells().collect();
            let count: usize = lengths.iter().product();
            prop_assert_eq!(cells.len(), count);
            prop_assert_eq!(grid.count(), Some(count));
            for (i, length) in lengths.iter().enumerate() {
                for value in 0..*length {
                    prop_assert_eq!(cells.iter().filter(|cell| cell[i] == value).count(), count / length);
                }
            }
            cells.sort();
            cells.dedup();
            prop_assert_eq!(cells.len(), count);
        }
    }
}
