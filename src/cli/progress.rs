//! The bar on standard error: step, time per step, time left. Where that is no terminal nothing is drawn.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::bytes;
use crate::engine::{Event, LoadEvent};
use crate::fetch::Progress;
use crate::ops::generate::Stage;
use crate::ops::sweep;

const REDRAW: Duration = Duration::from_millis(100);

/// Shows one job.
#[derive(Debug)]
pub(super) struct JobBar {
    bar: ProgressBar,
    first_step: Option<Instant>,
}

impl JobBar {
    pub(super) fn new(quiet: bool) -> Self {
        Self { bar: spinner(quiet), first_step: None }
    }

    pub(super) fn tell(&mut self, stage: Stage) {
        match stage {
            Stage::Fetching(progress) => self.bar.set_message(fetching(progress)),
            Stage::Loading(event) => self.bar.set_message(loading("the model", event)),
            Stage::Engine(Event::Encoding) => self.bar.set_message("reading the prompt"),
            Stage::Engine(Event::Step { output, outputs, step, steps }) => self.step(output, outputs, step, steps),
            Stage::Engine(Event::Decoding { output, outputs }) => {
                self.bar.set_message(format!("decoding{}", of(output, outputs)))
            }
            Stage::Engine(Event::Preview { .. }) => {}
            Stage::Writing => self.bar.set_message("writing"),
        }
    }

    /// Time is measured from the first finished step on: the one before it also warms up.
    fn step(&mut self, output: usize, outputs: usize, step: usize, steps: usize) {
        let done = (output - 1) * steps + step;
        let left = outputs * steps - done;
        self.bar.set_length((outputs * steps) as u64);
        self.bar.set_style(plain("{bar:24} {msg}"));
        self.bar.set_position(done as u64);
        let first = *self.first_step.get_or_insert_with(Instant::now);
        let pace = (done > 1).then(|| first.elapsed().div_f64((done - 1) as f64));
        let pace = pace.map_or_else(String::new, |pace| {
            format!(", {:.2} s a step, {} left", pace.as_secs_f64(), clock(pace.mul_f64(left as f64)))
        });
        self.bar.set_message(format!("step {step} of {steps}{}{pace}", of(output, outputs)));
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for JobBar {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Shows many pictures.
#[derive(Debug)]
pub(super) struct SweepBar {
    bar: ProgressBar,
}

impl SweepBar {
    pub(super) fn new(quiet: bool) -> Self {
        Self { bar: spinner(quiet) }
    }

    pub(super) fn tell(&mut self, stage: sweep::Stage) {
        match stage {
            sweep::Stage::Fetching(progress) => self.bar.set_message(fetching(progress)),
            sweep::Stage::Loading(model, event) => self.bar.set_message(loading(model, event)),
            sweep::Stage::Estimated(_) => {}
            sweep::Stage::Step { picture, pictures, step, steps, left } => {
                self.bar.set_length(pictures as u64);
                self.bar.set_style(plain("{bar:24} {msg}"));
                self.bar.set_position(picture as u64 - 1);
                let left = clock(left);
                self.bar.set_message(format!("picture {picture} of {pictures}, step {step} of {steps}, {left} left"));
            }
            sweep::Stage::Reporting => self.bar.set_message("measuring and drawing"),
        }
    }

    /// Says or asks something without the bar in the way.
    pub(super) fn aside<T>(&mut self, work: impl FnOnce() -> T) -> T {
        self.bar.suspend(work)
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for SweepBar {
    fn drop(&mut self) {
        self.finish();
    }
}

fn spinner(quiet: bool) -> ProgressBar {
    let bar =
        ProgressBar::with_draw_target(None, if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() });
    bar.set_style(plain("{spinner} {msg}"));
    bar.enable_steady_tick(REDRAW);
    bar
}

/// A download in words.
pub(super) fn fetching(Progress { done, total }: Progress) -> String {
    match total {
        Some(total) => format!("fetching the LoRA, {} of {}", bytes::in_words(done), bytes::in_words(total)),
        None if done > 0 => format!("fetching the LoRA, {}", bytes::in_words(done)),
        None => "fetching the LoRA".into(),
    }
}

/// A load in words.
fn loading(model: &str, LoadEvent { done, total, elapsed }: LoadEvent) -> String {
    if done == 0 {
        return format!("loading {model}");
    }
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let rate = gigabytes(done) / elapsed.as_secs_f64().max(1e-3);
    format!("loading {model}, {:.1} of {:.1} GB, {rate:.1} GB/s", gigabytes(done), gigabytes(total))
}

fn of(output: usize, outputs: usize) -> String {
    if outputs == 1 { String::new() } else { format!(", picture {output} of {outputs}") }
}

pub(super) fn clock(time: Duration) -> String {
    let seconds = time.as_secs_f64().ceil() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02} h", seconds / 3600, seconds / 60 % 60),
    }
}

fn plain(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a template of this file").progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_says_how_far_and_how_fast_it_is() {
        assert_eq!(loading("flux1-dev", LoadEvent::default()), "loading flux1-dev");
        let event = LoadEvent { done: 12_300_000_000, total: 33_500_000_000, elapsed: Duration::from_secs(3) };
        assert_eq!(loading("flux1-dev", event), "loading flux1-dev, 12.3 of 33.5 GB, 4.1 GB/s");
    }

    #[test]
    fn times_are_short() {
        assert_eq!(clock(Duration::from_millis(1)), "1 s");
        assert_eq!(clock(Duration::from_secs(61)), "1:01 min");
    }
}
