//! The pictures of a sweep, made one after another.

use std::collections::{BTreeMap, HashSet};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Device;
use serde::Serialize;

use super::environment::Memory;
use super::folder::{Folder, Made, Manifest, Stages};
use super::plan::{self, Base, Cell, Plan};
use super::stats;
use super::wish::{Asked, Sweep};
use super::writer::{Picture, Writer};
use super::{Axis, environment, folder, metrics, report};
use crate::config::Config;
use crate::engine::{self, Event, Finished, LoadEvent, Pipeline, Selected};
use crate::fetch::Progress;
use crate::ops::Error;
use crate::ops::generate::{self, Precision};
use crate::ops::lora::{Lora, Sources};

/// Steps of a run that only warms up and measures the pace.
const TRIAL_STEPS: usize = 2;

/// A sweep whose pictures fail one after another has a fault of its own.
const MOST_FAILURES: usize = 3;

/// Of a picture's file, about; faces of pocket are smaller, noise is larger.
const PNG_BYTES_PER_PIXEL: f64 = 1.6;
/// 16 channels of f32 for 8 x 8 pixels.
const LATENT_BYTES_PER_PIXEL: f64 = 1.;

/// What a sweep is doing. Answering `ControlFlow::Break` stops it within a step; what is done stays done.
#[derive(Debug, Clone, Copy)]
pub enum Stage<'a> {
    /// A LoRA that is not on this machine.
    Fetching(Progress),
    Loading(&'a str, LoadEvent),
    /// Before the first picture: what is to come, as two steps of the first model let expect.
    Estimated(&'a Estimate),
    /// A step of picture `picture` of `pictures` (those that are made now), with the time that is left.
    Step {
        picture: usize,
        pictures: usize,
        step: usize,
        steps: usize,
        left: Duration,
    },
    /// Metrics, tables, sheets, plots.
    Reporting,
}

/// What a sweep will take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Cells of the grid.
    pub cells: usize,
    /// Pictures to be made: equal ones once, and not those that are done.
    pub pictures: usize,
    pub done: usize,
    pub time: Duration,
    pub bytes: u64,
}

/// What became of the pictures.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    pub made: usize,
    /// From an earlier run.
    pub kept: usize,
    /// Remarks on settings without effect.
    pub remarks: Vec<String>,
    /// Name and reason of each picture that could not be made.
    pub failed: Vec<(String, String)>,
}

type Told<'a> = &'a mut dyn FnMut(Stage<'_>) -> ControlFlow<()>;

/// Makes what is not there yet.
pub(super) fn make(sweep: &Sweep, config: &Config, folder: &mut Folder, told: Told) -> Result<Outcome, Error> {
    let device = sweep.machine.open()?;
    let sources = Sources::new(config);
    let mut memory = Memory::new();
    memory.look(&device);
    let plan = plan::plan(sweep, config, &device, &sources, &mut |progress| told(Stage::Fetching(progress)))?;
    let Plan { cells, bases, remarks } = plan;
    let mut manifest = Manifest::new(&sweep.command, sweep.repeats, sweep.grid.clone(), cells);
    manifest.common = super::command::common(sweep);
    manifest.remarks.clone_from(&remarks);
    let mut surroundings = environment::environment(&device);
    surroundings.extend(bases.values().map(|base| (format!("model {}", base.model.name), format!("sha256 {}", base.sha256))));
    let path = folder.path().to_path_buf();
    // Only of a run that goes ahead: one that is refused changes nothing of the one before.
    let accepted = || {
        folder::keep(&path, &manifest)?;
        report::keep_environment(&path, &surroundings)
    };
    let cells = &manifest.cells;
    let mut done = folder.done()?;
    let wanted: HashSet<&str> = cells.iter().map(|cell| cell.key.as_str()).collect();
    // A picture that cannot be read is not there: nothing of the run could be measured.
    let is_damaged = |key: &str| {
        let read = metrics::read(&path, key);
        read.inspect_err(|error| tracing::warn!(%error, "it is made again")).is_err()
    };
    // Those that were timed less often are timed anew.
    done.retain(|key, made| made.repeats.len().max(1) >= sweep.repeats && !(wanted.contains(key.as_str()) && is_damaged(key)));
    let order = plan::order(cells, &|key| done.contains_key(key));
    let kept = cells.iter().filter(|cell| done.contains_key(&cell.key)).map(|cell| &cell.key).collect::<HashSet<_>>();
    let mut outcome = Outcome { kept: kept.len(), remarks, ..Outcome::default() };
    if order.is_empty() {
        accepted()?;
        return Ok(outcome);
    }
    let mut maker = Maker {
        sweep,
        run: &path,
        device: &device,
        sources: &sources,
        loaded: None,
        loras: (Vec::new(), Vec::new()),
        memory,
        keep_latents: sweep.grid.values(Axis::Steps).is_some_and(|steps| steps.len() > 1),
        pace: Pace::default(),
    };
    std::thread::scope(|scope| {
        let writer = Writer::begin(scope, folder);
        let made = maker.make_all((cells, &order), &bases, (&accepted, &writer), &mut outcome, told);
        // What is made is written, whatever ended it; a disk that is full is the reason of what comes after.
        writer.finish()?;
        made
    })?;
    Ok(outcome)
}

fn tell(told: Told, stage: Stage<'_>) -> Result<(), Error> {
    match told(stage) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(engine::Error::Cancelled.into()),
    }
}

/// The loaded model and what was last used with it.
struct Maker<'a> {
    sweep: &'a Sweep,
    run: &'a Path,
    device: &'a Device,
    sources: &'a Sources,
    loaded: Option<(Base, Precision, Pipeline)>,
    /// The last set of LoRAs, as asked for and opened.
    loras: (Vec<Lora>, Vec<Selected>),
    memory: Memory,
    keep_latents: bool,
    pace: Pace,
}

impl Maker<'_> {
    fn make_all(
        &mut self,
        (cells, order): (&[Cell], &[usize]),
        bases: &BTreeMap<String, Base>,
        (accepted, writer): (&dyn Fn() -> Result<(), Error>, &Writer<'_>),
        outcome: &mut Outcome,
        told: Told,
    ) -> Result<(), Error> {
        let mut in_row = 0;
        for (i, place) in order.iter().enumerate() {
            let cell = &cells[*place];
            let asked = self.sweep.shared.asked(&plan::values(&self.sweep.grid, &cell.at))?;
            let base = &bases[&asked.model];
            if self.is_other(&asked, base) {
                self.load(&asked, base, told)?;
                if i == 0 {
                    self.pace = self.trial(&asked, base, told)?;
                    let estimate = self.pace.estimate(cells, order, self.sweep.repeats, outcome.kept, self.keep_latents);
                    tell(told, Stage::Estimated(&estimate))?;
                    accepted()?;
                    self.pace.begin(cells, order, self.sweep.repeats);
                }
                let kernels = self.pipeline().kernels().to_owned();
                report::keep_environment(self.run, &BTreeMap::from([("kernels".to_owned(), kernels)]))?;
            }
            match self.make(cell, &asked, base, (i + 1, order.len()), told) {
                Ok(picture) => {
                    if !writer.take(picture) {
                        // It tells why when it is asked to finish.
                        return Ok(());
                    }
                    outcome.made += 1;
                    in_row = 0;
                }
                Err(error) if error.is_cancelled() => return Err(error),
                Err(error) => {
                    tracing::error!(key = cell.key, error = error.told(), "a picture could not be made");
                    outcome.failed.push((cell.key.clone(), error.told()));
                    in_row += 1;
                    if in_row == MOST_FAILURES {
                        return Err(error);
                    }
                }
            }
            self.pace.done(cell, self.sweep.repeats);
        }
        Ok(())
    }

    fn is_other(&self, asked: &Asked, base: &Base) -> bool {
        let precision = asked.precision_on(self.device);
        self.loaded
            .as_ref()
            .is_none_or(|(loaded, in_precision, _)| loaded.identity() != base.identity() || *in_precision != precision)
    }

    fn load(&mut self, asked: &Asked, base: &Base, told: Told) -> Result<(), Error> {
        tell(told, Stage::Loading(&base.model.name, LoadEvent::default()))?;
        // Two do not fit where one just fits.
        self.loaded = None;
        let precision = asked.precision_on(self.device);
        let plan = self.sweep.machine.plan(&base.model, self.device, Some(precision))?;
        let pipeline = Pipeline::load(&base.model.bundle, self.device, plan, &mut |event| {
            let _ = told(Stage::Loading(&base.model.name, event));
        })?;
        // The first run pays for what later ones find ready.
        let (mut job, _) = generate::prepare(&asked.request, &base.model)?;
        // With words of its own: the first picture's are then encoded in its own time.
        (job.steps, job.start, job.prompt) = (1, None, "warm-up".into());
        pipeline.run(&job, &mut |_| go_on(told, &base.model.name))?;
        self.loaded = Some((base.clone(), precision, pipeline));
        Ok(())
    }

    fn pipeline(&self) -> &Pipeline {
        &self.loaded.as_ref().expect("loaded before the first picture").2
    }

    /// Measures the pace of a step and of the rest.
    fn trial(&self, asked: &Asked, base: &Base, told: Told) -> Result<Pace, Error> {
        let (mut job, _) = generate::prepare(&asked.request, &base.model)?;
        (job.steps, job.start, job.true_cfg, job.prompt) = (TRIAL_STEPS, None, 1., "trial".into());
        let finished = self.pipeline().run(&job, &mut |_| go_on(told, &base.model.name))?;
        let pixels = (job.width * job.height) as f64;
        let timings = finished.timings;
        Ok(Pace {
            step: timings.denoise.as_secs_f64() / TRIAL_STEPS as f64 / pixels,
            rest: timings.decode.as_secs_f64() / pixels,
            encode: timings.encode.as_secs_f64(),
            ..Pace::default()
        })
    }

    fn make(
        &mut self,
        cell: &Cell,
        asked: &Asked,
        base: &Base,
        (picture, pictures): (usize, usize),
        told: Told,
    ) -> Result<Picture, Error> {
        let (mut job, _) = generate::prepare(&asked.request, &base.model)?;
        job.loras = self.open(&asked.request.loras, told)?;
        self.memory.begin();
        let mut runs = Vec::new();
        let mut first = None;
        for repeat in 0..self.sweep.repeats {
            let (memory, device, pace) = (&mut self.memory, self.device, &self.pace);
            let pipeline = &self.loaded.as_ref().expect("loaded before the first picture").2;
            let finished = pipeline.run(&job, &mut |event| {
                memory.look(device);
                let Event::Step { step, steps, .. } = event else { return ControlFlow::Continue(()) };
                let all = steps * self.sweep.repeats;
                let left = pace.left(cell, (repeat * steps + step) as f64 / all as f64, self.sweep.repeats);
                told(Stage::Step { picture, pictures, step: repeat * steps + step, steps: all, left })
            })?;
            memory.look(device);
            runs.push(stages(&finished));
            first.get_or_insert(finished);
        }
        let finished = first.expect("at least one repeat");
        let made = Made {
            key: cell.key.clone(),
            at: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            device: generate::device_name(self.device),
            seconds: median(&runs),
            repeats: if runs.len() > 1 { runs } else { Vec::new() },
            peak_memory_bytes: self.memory.peak,
            peak_device_bytes: self.memory.peak_device,
            notes: notes(&finished),
        };
        Ok(Picture {
            made,
            job,
            finished,
            model: base.model.name.clone(),
            sha256: base.sha256.clone(),
            dtype: asked.precision_on(self.device).name(),
            latents: self.keep_latents,
        })
    }

    fn open(&mut self, loras: &[Lora], told: Told) -> Result<Vec<Selected>, Error> {
        if self.loras.0 != loras {
            // The set before is let go first.
            self.loras = (Vec::new(), Vec::new());
            let opened = self.sources.open(loras, &mut |progress| told(Stage::Fetching(progress)))?;
            self.loras = (loras.to_vec(), opened);
        }
        // As the plan has it: what has no effect is not put on.
        let acts = |selected: &&Selected| selected.scales.model != 0. || selected.scales.text != 0.;
        Ok(self.loras.1.iter().filter(acts).cloned().collect())
    }
}

/// While something runs that has no steps to show.
fn go_on(told: Told, name: &str) -> ControlFlow<()> {
    told(Stage::Loading(name, LoadEvent::default()))
}

fn stages(finished: &Finished) -> Stages {
    let timings = generate::seconds(Duration::ZERO, finished, Duration::ZERO);
    Stages { switch: timings.switch, encode: timings.encode, denoise: timings.denoise, decode: timings.decode }
}

fn median(runs: &[Stages]) -> Stages {
    let of = |stage: fn(&Stages) -> f64| stats::median(&runs.iter().map(stage).collect::<Vec<_>>());
    Stages { switch: of(|s| s.switch), encode: of(|s| s.encode), denoise: of(|s| s.denoise), decode: of(|s| s.decode) }
}

fn notes(finished: &Finished) -> Vec<String> {
    let cut = |cut: &engine::Truncation| {
        format!("{} reads {} tokens of the {}; it did not see: {}", cut.encoder, cut.limit, cut.field, cut.lost)
    };
    finished.truncated.iter().map(cut).chain(finished.switch.notes.iter().cloned()).collect()
}

/// How long things take, in seconds for each pixel: more pixels take at least in proportion more.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    step: f64,
    rest: f64,
    /// Of a prompt that was not read before, in seconds.
    encode: f64,
    /// Work in all and done, in seconds as estimated.
    all: f64,
    finished: f64,
    begun: Option<Instant>,
}

impl Pace {
    fn cost(&self, cell: &Cell, repeats: usize) -> f64 {
        let number = |name: &str| cell.exact[name].as_f64().unwrap_or(1.);
        let forwards = if number("true_cfg") > 1. { 2. } else { 1. };
        let steps = (number("steps") * cell.exact["strength"].as_f64().unwrap_or(1.)).ceil();
        number("width") * number("height") * (self.step * steps * forwards + self.rest) * repeats as f64
    }

    fn estimate(&self, cells: &[Cell], order: &[usize], repeats: usize, done: usize, latents: bool) -> Estimate {
        let pixels = |place: &usize| {
            let side = |name: &str| cells[*place].exact[name].as_f64().unwrap_or(0.);
            side("width") * side("height")
        };
        let prompts: std::collections::HashSet<_> = order.iter().map(|place| cells[*place].exact["prompt"].as_str()).collect();
        let work: f64 = order.iter().map(|place| self.cost(&cells[*place], repeats)).sum();
        let each = PNG_BYTES_PER_PIXEL + if latents { LATENT_BYTES_PER_PIXEL } else { 0. };
        Estimate {
            cells: cells.len(),
            pictures: order.len(),
            done,
            time: Duration::try_from_secs_f64(work + self.encode * prompts.len() as f64).unwrap_or(Duration::MAX),
            bytes: order.iter().map(|place| pixels(place) * each).sum::<f64>() as u64,
        }
    }

    fn begin(&mut self, cells: &[Cell], order: &[usize], repeats: usize) {
        self.all = order.iter().map(|place| self.cost(&cells[*place], repeats)).sum();
        self.begun = Some(Instant::now());
    }

    fn done(&mut self, cell: &Cell, repeats: usize) {
        self.finished += self.cost(cell, repeats);
    }

    /// By the pace so far, once there is one.
    fn left(&self, cell: &Cell, share: f64, repeats: usize) -> Duration {
        let finished = self.finished + share * self.cost(cell, repeats);
        let spent = self.begun.map_or(0., |begun| begun.elapsed().as_secs_f64());
        let ratio = if finished > 0.02 * self.all { spent / finished } else { 1. };
        Duration::try_from_secs_f64((self.all - finished).max(0.) * ratio).unwrap_or_default()
    }
}
