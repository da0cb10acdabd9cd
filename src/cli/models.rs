//! `darkroom models`: list, pull, verify, remove.

use std::sync::Arc;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::bytes;
use crate::config::Config;
use crate::ops::models::{self, Checked, Found, Installed, Listed, Pulling};
use crate::ops::{self};

const PULL_HELP: &str = "\
Some models are given only to accounts that accepted a licence. Accept it on the model's page, make a token at
https://huggingface.co/settings/tokens and put it into HF_TOKEN.

Environment:
  HF_TOKEN, HF_TOKEN_PATH  the token, or a file with it
  HF_HOME, HF_HUB_CACHE    where files are kept (shared with Python's huggingface_hub)
  HF_ENDPOINT              another hub
  HF_HUB_OFFLINE=1         fetch nothing";

/// The base models: which there are, fetching, checking and removing them
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show the models, their size and licence, and which are here
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Fetch a model from the hub and check it
    #[command(after_help = PULL_HELP)]
    Pull {
        /// A name from `darkroom models list`, or a card's path
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// No progress bar
        #[arg(short, long)]
        quiet: bool,
    },
    /// Read a model's files again and compare them with the published sizes and digests
    Verify {
        /// A name from `darkroom models list`, or a card's path
        name: String,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
        /// No progress bar
        #[arg(short, long)]
        quiet: bool,
    },
    /// Delete a model's files from the cache; files that another model here needs stay
    Remove {
        /// A name from `darkroom models list`, or a card's path
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    match args.verb {
        Verb::List { json } => list(json, config),
        Verb::Pull { name, json, quiet } => pull(&name, json, quiet, config),
        Verb::Verify { name, json, quiet } => verify(&name, json, quiet, config),
        Verb::Remove { name, json } => remove(&name, json, config),
    }
}

fn list(json: bool, config: &Config) -> anyhow::Result<()> {
    let rows = models::list(config);
    if json {
        return super::show(&serde_json::to_string(&rows)?);
    }
    rows.iter().try_for_each(|row| super::show(&line(row)))
}

fn line(row: &Listed) -> String {
    let here = match row.installed {
        Installed::Embedded => "embedded",
        Installed::Yes => "here",
        Installed::Partly => "partly here",
        Installed::No => "-",
    };
    let size = if row.bytes == 0 { "-".into() } else { bytes::in_words(row.bytes) };
    let gated = if row.gated { " (accept it first)" } else { "" };
    format!("{:<22} {here:<12} {size:>8}  {}; {}{gated}", row.name, row.what, row.licence)
}

fn pull(name: &str, json: bool, quiet: bool, config: &Config) -> anyhow::Result<()> {
    let bar = bytes_bar(quiet);
    let shown = bar.clone();
    let told = Arc::new(move |event| match event {
        Pulling::File { name, bytes, index, count } => {
            shown.reset();
            shown.set_length(bytes);
            shown.set_message(format!("{index} of {count}: {name}"));
        }
        Pulling::Arrived(done) | Pulling::Checking(done) => shown.set_position(done),
        Pulling::Waiting => shown.set_message("another process fetches this file; waiting"),
    });
    let told: models::Watcher = told;
    let pulled = models::pull(name, config, &told);
    bar.finish_and_clear();
    let pulled = pulled.map_err(ops::Error::from)?;
    if json {
        return super::show(&serde_json::to_string(&pulled)?);
    }
    let fetched = format!("fetched {} files ({})", pulled.fetched, bytes::in_words(pulled.bytes));
    super::say(&format!("{fetched}, {} were here; try: darkroom generate \"a lighthouse\" --model {name}", pulled.present));
    Ok(())
}

fn verify(name: &str, json: bool, quiet: bool, config: &Config) -> anyhow::Result<()> {
    let bar = bytes_bar(quiet);
    let rows = models::verify(name, config, &mut |file, done, bytes| {
        bar.set_length(bytes);
        bar.set_message(file.to_owned());
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let rows = rows.map_err(ops::Error::from)?;
    if json {
        super::show(&serde_json::to_string(&rows)?)?;
    } else {
        rows.iter().try_for_each(|row| super::show(&verdict(row)))?;
    }
    let bad = rows.iter().filter(|row| !row.found.is_good()).count();
    anyhow::ensure!(bad == 0, "{bad} of {} files of {name} are missing or damaged; run: darkroom models pull {name}", rows.len());
    Ok(())
}

fn verdict(row: &Checked) -> String {
    let found = match &row.found {
        Found::Sound => "sound".into(),
        Found::NoDigest => "there (no digest is published)".into(),
        Found::Missing => "MISSING".into(),
        Found::WrongSize { expected, found } => format!("WRONG SIZE: {found} bytes, should be {expected}"),
        Found::WrongDigest { expected, found } => format!("DAMAGED: SHA-256 is {found}, should be {expected}"),
    };
    format!("{}: {found}", row.file)
}

fn remove(name: &str, json: bool, config: &Config) -> anyhow::Result<()> {
    let removed = models::remove(name, config).map_err(ops::Error::from)?;
    if json {
        return super::show(&serde_json::to_string(&removed)?);
    }
    for kept in &removed.kept {
        super::say(&format!("kept {kept}"));
    }
    super::say(&format!("{} are free again", bytes::in_words(removed.freed_bytes)));
    Ok(())
}

fn bytes_bar(quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let bar = ProgressBar::with_draw_target(None, target);
    let style = ProgressStyle::with_template("{bar:24} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left  {msg}");
    bar.set_style(style.expect("a template of this file").progress_chars("=> "));
    bar
}
