//! A run's rows: a line of JSON and of CSV for each picture.

use std::collections::BTreeMap;
use std::path::Path;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value as Json, json};

use super::folder::{self, Made, Manifest};
use super::metrics::{self, Judge, METRICS, Metric};
use super::stats::{self, Summary};
use super::{Axis, Value, command, plan};
use crate::ops::{Error, files};

/// One picture of the grid.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) key: String,
    /// Of every axis of the grid.
    pub(super) values: Vec<(Axis, Value)>,
    /// The place of its value on each axis of the grid.
    pub(super) at: Vec<usize>,
    pub(super) exact: Json,
    pub(super) made: Made,
    pub(super) metrics: BTreeMap<&'static str, f64>,
    /// Makes it again.
    pub(super) command: String,
}

impl Row {
    pub(super) fn value(&self, axis: Axis) -> Option<&Value> {
        self.values.iter().find(|(has, _)| *has == axis).map(|(_, value)| value)
    }

    /// A metric, or seconds of a stage.
    pub(super) fn figure(&self, name: &str) -> Option<f64> {
        match name {
            DENOISE => Some(self.made.seconds.denoise),
            SPREAD => self.spread(),
            TOTAL => Some(self.made.seconds.total()),
            name => self.metrics.get(name).copied(),
        }
    }

    /// How far the repeats' times are apart, as a share of their median.
    fn spread(&self) -> Option<f64> {
        let times = self.made.repeats.iter().map(|stages| stages.denoise);
        let (least, most) = (times.clone().reduce(f64::min)?, times.reduce(f64::max)?);
        Some((most - least) / self.made.seconds.denoise)
    }

    /// The row as it is written, in order.
    fn fields(&self, metrics: &[&Metric]) -> Fields {
        let exact = |name: &str| self.exact[name].clone();
        let axis = |axis: Axis| self.value(axis).map_or(Json::Null, |value| json!(value));
        let seconds = &self.made.seconds;
        let mut fields = vec![
            ("id", json!(self.key)),
            ("picture", json!(folder::picture(&self.key))),
            ("model", axis(Axis::Model)),
            ("model_sha256", self.exact["base"]["sha256"].clone()),
            ("dtype", self.exact["base"]["dtype"].clone()),
            ("device", json!(self.made.device)),
            ("prompt", axis(Axis::Prompt)),
            ("prompt_read", exact("prompt")),
            ("negative_prompt", exact("negative_prompt")),
            ("width", exact("width")),
            ("height", exact("height")),
            ("steps", exact("steps")),
            ("guidance", exact("guidance")),
            ("true_cfg", exact("true_cfg")),
            ("strength", exact("strength")),
            ("seed", exact("seed")),
            ("noise", exact("noise")),
            ("lora", axis(Axis::Lora)),
            ("lora_scale", axis(Axis::LoraScale)),
            ("trigger_policy", axis(Axis::TriggerPolicy)),
            ("loras", exact("loras")),
            ("lora_mode", exact("lora_mode")),
            ("image", exact("image")),
            ("mask", exact("mask")),
            ("switch_s", json!(seconds.switch)),
            ("encode_s", json!(seconds.encode)),
            ("denoise_s", json!(seconds.denoise)),
            ("decode_s", json!(seconds.decode)),
            ("total_s", json!(rounded(seconds.total()))),
            (SPREAD, json!(self.spread())),
            ("denoise_s_of_repeats", json!(self.made.repeats.iter().map(|stages| stages.denoise).collect::<Vec<_>>())),
            ("peak_memory_bytes", json!(self.made.peak_memory_bytes)),
            ("peak_device_bytes", json!(self.made.peak_device_bytes)),
        ];
        fields.extend(metrics.iter().map(|metric| (metric.name, json!(self.metrics.get(metric.name)))));
        fields.extend([("made", json!(self.made.at)), ("notes", json!(self.made.notes)), ("command", json!(self.command))]);
        Fields(fields)
    }
}

pub(super) const DENOISE: &str = "denoise_s";
pub(super) const TOTAL: &str = "total_s";
pub(super) const SPREAD: &str = "denoise_spread";

fn rounded(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

/// In the order in which they are written.
struct Fields(Vec<(&'static str, Json)>);

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// All that a run has to show.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) manifest: Manifest,
    /// Those that at least one row has.
    pub(super) metrics: Vec<&'static Metric>,
    /// In the grid's order; pictures that are not made yet are not among them.
    pub(super) rows: Vec<Row>,
}

impl Results {
    /// Reads a run's folder, without figures of the pictures.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let (manifest, done) = folder::read(path)?;
        let row = |cell: &plan::Cell| {
            let made = done.get(&cell.key)?.clone();
            let values = plan::values(&manifest.grid, &cell.at);
            Some(Row {
                key: cell.key.clone(),
                command: {
                    let dtype = cell.exact["base"]["dtype"].as_str().unwrap_or_default();
                    command::generate(&manifest.common, &values, &made.device, dtype)
                },
                values: values.into_iter().map(|(axis, value)| (axis, value.clone())).collect(),
                at: cell.at.clone(),
                exact: cell.exact.clone(),
                made,
                metrics: BTreeMap::new(),
            })
        };
        let rows = manifest.cells.iter().filter_map(row).collect();
        Ok(Self { manifest, metrics: Vec::new(), rows })
    }

    /// Measures every picture.
    pub(super) fn measure(&mut self, path: &Path, judges: &[Box<dyn Judge>]) -> Result<(), Error> {
        let most =
            self.manifest.grid.values(Axis::Steps).unwrap_or_default().iter().filter_map(Value::as_number).reduce(f64::max);
        metrics::measure(&mut self.rows, most, path, judges)?;
        let has = |metric: &&Metric| self.rows.iter().any(|row| row.metrics.contains_key(metric.name));
        self.metrics = METRICS.iter().filter(has).collect();
        Ok(())
    }

    /// `results.jsonl` and `results.csv`.
    pub(super) fn write(&self, path: &Path) -> Result<(), Error> {
        let rows: Vec<Fields> = self.rows.iter().map(|row| row.fields(&self.metrics)).collect();
        let mut lines = Vec::new();
        for row in &rows {
            serde_json::to_writer(&mut lines, row).expect("plain data");
            lines.push(b'\n');
        }
        files::write(&path.join("results.jsonl"), true, &lines)?;
        let mut table = csv::Writer::from_writer(Vec::new());
        let failed = |error: csv::Error| Error::Write { path: path.join("results.csv"), source: error.into() };
        if let Some(first) = rows.first() {
            table.write_record(first.0.iter().map(|(name, _)| name)).map_err(failed)?;
        }
        for row in &rows {
            table.write_record(row.0.iter().map(|(_, value)| plain(value))).map_err(failed)?;
        }
        let bytes = table.into_inner().map_err(|error| Error::Write { path: path.into(), source: error.into_error() })?;
        files::write(&path.join("results.csv"), true, &bytes)
    }

    /// The places of the axes that are choices and were varied.
    pub(super) fn choices(&self) -> Vec<usize> {
        let axes = &self.manifest.grid.axes;
        (0..axes.len()).filter(|i| axes[*i].0.is_choice() && axes[*i].1.len() > 1).collect()
    }

    /// Every setting that has pictures with this metric.
    pub(super) fn settings(&self, metric: &str) -> Vec<Setting<'_>> {
        let choices = self.choices();
        let mut groups: BTreeMap<Vec<usize>, Vec<&Row>> = BTreeMap::new();
        for row in self.rows.iter().filter(|row| row.metrics.contains_key(metric)) {
            groups.entry(choices.iter().map(|i| row.at[*i]).collect()).or_default().push(row);
        }
        let name = |row: &Row| {
            let of = |i: &usize| format!("{} {}", row.values[*i].0, row.values[*i].1);
            choices.iter().map(of).collect::<Vec<_>>().join(", ")
        };
        groups.into_values().map(|rows| Setting { name: name(rows[0]), rows }).collect()
    }

    /// The summary of a figure where an axis has its value of that place: a value for each seed, the mean of its pictures.
    pub(super) fn summary(&self, axis: Axis, place: usize, figure: &str) -> Option<Summary> {
        let index = self.manifest.grid.axes.iter().position(|(has, _)| *has == axis)?;
        Summary::of(&by_seed(self.rows.iter().filter(|row| row.at[index] == place), figure).into_values().collect::<Vec<_>>())
    }
}

/// The pictures of one combination of all that can be chosen.
pub(super) struct Setting<'a> {
    pub(super) name: String,
    pub(super) rows: Vec<&'a Row>,
}

impl Setting<'_> {
    /// The mean over seeds.
    pub(super) fn mean(&self, figure: &str) -> f64 {
        stats::mean(&by_seed(self.rows.iter().copied(), figure).into_values().collect::<Vec<_>>())
    }
}

/// Differences of a figure between pictures that belong together, of each seed their mean.
pub(super) fn paired<'a>(pairs: impl Iterator<Item = (&'a Row, &'a Row)>, figure: &str) -> Vec<f64> {
    let mut by_seed: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (a, b) in pairs {
        if let (Some(x), Some(y)) = (a.figure(figure), b.figure(figure)) {
            by_seed.entry(a.exact["seed"].to_string()).or_default().push(y - x);
        }
    }
    by_seed.into_values().map(|values| stats::mean(&values)).collect()
}

/// The mean of a figure for each seed.
pub(super) fn by_seed<'a>(rows: impl Iterator<Item = &'a Row>, figure: &str) -> BTreeMap<String, f64> {
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for row in rows {
        if let Some(value) = row.figure(figure) {
            values.entry(row.exact["seed"].to_string()).or_default().push(value);
        }
    }
    values.into_iter().map(|(seed, values)| (seed, stats::mean(&values))).collect()
}

/// A value as a cell of a table: texts as they are, nothing for null, lists as JSON.
fn plain(value: &Json) -> String {
    match value {
        Json::Null => String::new(),
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}
