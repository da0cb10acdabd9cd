//! Many pictures from one grid of settings, measured and compared: `darkroom sweep`.
//!
//! A [`Wish`] (flags and a file) becomes a [`Sweep`]: a [`Grid`] of axes and what all pictures share. `plan` checks every picture and
//! names it by its content, `make` makes those that are not in the run's `folder` yet, `report` measures them and shows them side by
//! side. Whatever is said of a run is said seed by seed (`stats`).

mod axes;
mod command;
mod compare;
mod environment;
mod folder;
mod make;
mod metrics;
mod plan;
#[cfg(feature = "pocket")]
mod portraits;
mod references;
mod report;
mod results;
mod stats;
mod wish;
mod writer;

use std::ops::ControlFlow;

use serde::Serialize;

use crate::config::Config;
use crate::ops::Error;

pub use axes::{Axis, Grid, Value};
pub use command::shell;
pub use compare::{Compared, Comparison, Recommendation, Setting, compare, recommend};
pub use make::{Estimate, Outcome, Stage};
pub use metrics::{Better, METRICS, Metric};
pub use references::References;
pub use report::{Layout, Written, report, sheets};
pub use stats::{Paired, Summary};
pub use wish::{Numbers, Shared, Sweep, Wish};

/// A finished run. Serialised, it is the answer of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Done {
    #[serde(flatten)]
    pub outcome: Outcome,
    #[serde(flatten)]
    pub report: Written,
}

/// Makes what is missing, measures everything, writes the report.
pub fn run(
    sweep: &Sweep,
    references: &References,
    layout: &Layout,
    config: &Config,
    told: &mut dyn FnMut(Stage<'_>) -> ControlFlow<()>,
) -> Result<Done, Error> {
    layout.check(&sweep.grid)?;
    references.check(config)?;
    let mut folder = folder::Folder::open(&sweep.folder)?;
    let outcome = make::make(sweep, config, &mut folder, told)?;
    if let Some((_, reason)) = outcome.failed.first()
        && outcome.made + outcome.kept == 0
    {
        let problem = format!("has no picture: {} could not be made, the first because: {reason}", outcome.failed.len());
        return Err(Error::Run { folder: sweep.folder.clone(), problem, hint: "mend that and run it again".into() });
    }
    let kept = References::kept(folder.path());
    let references = if references.is_empty() { &kept } else { references };
    // Breaking off here would leave nothing undone that the same command does not do again.
    let _ = told(Stage::Reporting);
    let report = report::write(folder.path(), references, *layout, config)?;
    Ok(Done { outcome, report })
}
