//! The command line: parses, calls [`ops`](crate::ops), shows. Paths or JSON go to standard output, all else to standard error.
//!
//! Exit codes: 0 done, 1 failed, 2 the command is wrong, 130 stopped with Ctrl-C.

mod completions;
mod doctor;
mod generate;
mod keys;
mod lora;
mod models;
mod progress;
mod serve;
mod settings;
mod signal;
mod sweep;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{ColorChoice, CommandFactory, FromArgMatches, Parser, Subcommand};
use kernels::Work;
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::engine::Kept;
use crate::ops;

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;
/// What a shell reports of a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

/// Pictures from prompts with FLUX.1, on your own machine.
#[derive(Debug, Parser)]
#[command(name = "darkroom", version, arg_required_else_help = true, max_term_width = 110)]
#[command(after_help = "Begin with: darkroom generate \"a portrait of a person with long red hair, smiling\"")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Generate(Box<generate::Args>),
    Sweep(Box<sweep::Args>),
    Lora(lora::Args),
    Models(models::Args),
    Serve(Box<serve::Args>),
    Keys(keys::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let config = Config::from_environment();
    let cli = match parse(&config) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for and go to standard output; clap's code for errors is 2.
            let code = u8::try_from(error.exit_code()).unwrap_or(WRONG_USAGE);
            return match error.print() {
                // As in `show`: a reader that has enough is no failure.
                Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::from(FAILED),
                _ => ExitCode::from(code),
            };
        }
    };
    if !config.mistakes.is_empty() {
        config.mistakes.iter().for_each(|mistake| say(&format!("error: {mistake}")));
        return ExitCode::from(WRONG_USAGE);
    }
    log(&config, matches!(cli.verb, Verb::Serve(_)));
    match config.fused_kernels {
        Some(fused) => kernels::use_fused(fused),
        None => ops::proof::ask(),
    }
    for (work, whose) in [(Work::Attention, config.attention), (Work::Convolution, config.convolution)] {
        if let Some(whose) = whose {
            kernels::choose(work, whose);
        }
    }
    if let Some(cache) = &config.cache {
        kernels::keep_choices(Box::new(Kept::in_folder(cache)));
    }
    let result = match cli.verb {
        Verb::Generate(args) => generate::run(*args, &config),
        Verb::Sweep(args) => sweep::run(*args, &config),
        Verb::Lora(args) => lora::run(args, &config),
        Verb::Models(args) => models::run(args, &config),
        Verb::Serve(args) => serve::run(*args, &config),
        Verb::Keys(args) => keys::run(args),
        Verb::Doctor(args) => doctor::run(&args, &config),
        Verb::Completions(args) => completions::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn parse(config: &Config) -> Result<Cli, clap::Error> {
    // clap looks at the terminal itself, but not for NO_COLOR in help.
    let color = if config.no_color { ColorChoice::Never } else { ColorChoice::Auto };
    Cli::from_arg_matches(&Cli::command().color(color).try_get_matches()?)
}

/// What `RUST_LOG` asks for, on standard error; without it of a service what its operator must know, else only why no card is used.
fn log(config: &Config, service: bool) {
    let filter = config.log.as_deref().unwrap_or(if service {
        "warn"
    } else {
        "off,darkroom::engine::device=warn,darkroom::ops::proof=info"
    });
    let color = !config.no_color && std::io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(filter)).with_writer(std::io::stderr);
    if config.log_json { subscriber.json().init() } else { subscriber.with_ansi(color).init() }
}

/// Shows an error with its causes.
fn fail(error: &anyhow::Error) -> ExitCode {
    let known = error.downcast_ref::<ops::Error>();
    if known.is_some_and(ops::Error::is_cancelled) {
        say("stopped; nothing was written");
        return ExitCode::from(INTERRUPTED);
    }
    say(&format!("error: {error:#}"));
    ExitCode::from(if known.is_some_and(ops::Error::is_usage) { WRONG_USAGE } else { FAILED })
}

/// A line for people, on standard error. There is nobody to tell if that is closed.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A line of the result, on standard output.
fn show(line: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        // The reader has what it wanted, as `| head -1` does.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
