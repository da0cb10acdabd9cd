//! `darkroom sweep`.

use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

use super::progress::SweepBar;
use super::settings::Settings;
use super::signal::Interrupt;
use crate::bytes;
use crate::config::Config;
use crate::ops;
use crate::ops::sweep::{self, Comparison, Estimate, Numbers, Recommendation, References, Stage, Sweep, Wish};

const EXAMPLES: &str = "\
Examples:
  Guidance against steps, four seeds each, with the embedded model (64 pictures):
    darkroom sweep \"portrait of a person with red hair\" --guidance 1,2,3,5 --steps 4,10,20,40 --seeds 4 -o run/
  How strong a LoRA should be; the trigger word is put into each prompt:
    darkroom sweep --prompts prompts.txt --model flux1-dev --lora me.safetensors --trigger-word user42 \\
      --lora-scale 0.6:1.2:0.1 --seeds 8 --identity photos-of-me/ -o scales/
  Two LoRAs and the base, each with its own prompt:
    darkroom sweep \"user1, a man\" \"user2, a woman\" \"a person\" --lora a.tar --lora b.tar --lora none --zip prompt,lora -o people/
  From a file whose keys are these flags; what is also given as a flag counts instead:
    darkroom sweep --file sweep.toml --seeds 16 -o run/
  What came of it:
    darkroom sweep recommend run/
    darkroom sweep compare run-a/ run-b/
    darkroom sweep report run/ --rows guidance --columns seed

A value is a number, a list (10,20,28), a range with its last value (1.5:5.0:0.5), or both mixed. Every value meets every other one,
unless --zip walks axes in step. The same command in the same folder goes on where it was: a picture that is there is not made again.

Exit codes: 0 done, 1 failed, 2 the command is wrong, 130 stopped with Ctrl-C (what is done stays).";

/// Pictures beyond which one is asked first.
const MOST_PICTURES: usize = 1000;
const LONGEST: Duration = Duration::from_secs(3600);
const MOST_BYTES: u64 = 10_000_000_000;

/// Make a grid of pictures, measure them, see them side by side
///
/// Everything left out comes from the model's card, as in generate. Writes into a folder: pictures, results.jsonl, results.csv, contact
/// sheets, plots, and report.html, which opens without a network.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, after_help = "More with --help: examples, what each option is for.")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,

    #[command(flatten)]
    sweep: SweepArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Measure the pictures of a run anew, and draw its sheets, plots and report
    Report {
        /// The folder that was given with -o
        run: PathBuf,
        #[command(flatten)]
        references: ReferenceArgs,
        #[command(flatten)]
        sheets: SheetArgs,
    },
    /// Two runs against each other, seed by seed
    ///
    /// Pairs the pictures that agree in every setting that varies in either run; what was fixed differently in them is what is compared.
    Compare {
        /// The folder of the first run, as given with -o
        run_a: PathBuf,
        /// The folder of the second; differences are B minus A
        run_b: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// The cheapest setting that is not significantly worse than the best, with its evidence
    Recommend {
        /// The folder that was given with -o
        run: PathBuf,
        /// What to go by: a metric of the run [default: the first of identity, adherence, clip_score, ssim that it has]
        #[arg(long, value_name = "METRIC")]
        metric: Option<String>,
        /// A loss of this much is no loss
        #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true)]
        margin: f64,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct SweepArgs {
    /// What the pictures show, in words; several are an axis
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,

    /// A file with a prompt on each line
    #[arg(long, value_name = "FILE", help_heading = "Axes")]
    prompts: Option<PathBuf>,

    /// A model's name, folder or file, as in generate; may be repeated [default: pocket]
    #[arg(long, value_name = "MODEL", help_heading = "Axes")]
    model: Vec<String>,

    /// Number formats: f32, bf16, f16, fp8, fp8-products, fp8-merged, q8_0 and so on, as in generate
    #[arg(long, value_name = "DTYPES", value_delimiter = ',', help_heading = "Axes")]
    dtype: Vec<String>,

    /// A LoRA, as in generate; may be repeated. "a@0.5 + b@0.5" are on the weights together, none is the base alone
    #[arg(long, value_name = "LORA[@SCALE]", help_heading = "Axes")]
    lora: Vec<String>,

    /// Factors for the scales of the LoRAs
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    lora_scale: Option<String>,

    /// Where the trigger word goes: prepend, start-and-middle, none
    #[arg(long, value_name = "POLICIES", value_delimiter = ',', help_heading = "Axes")]
    trigger_policy: Vec<String>,

    /// Widths in pixels, multiples of 16
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    width: Option<String>,

    /// Heights in pixels, multiples of 16; --zip width,height makes pairs of them
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    height: Option<String>,

    /// With --image: how much is painted anew, above 0 to 1
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    strength: Option<String>,

    /// Classifier-free guidance on top, 1 (off) to 100
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    true_cfg: Option<String>,

    /// How closely the prompt is followed, 0 to 100
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    guidance: Option<String>,

    /// Denoising steps, 1 to 1000
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    steps: Option<String>,

    /// Which seeds
    #[arg(long, value_name = "VALUES", allow_hyphen_values = true, help_heading = "Axes")]
    seed: Option<String>,

    /// How many seeds, from 1 on: figures are means over them [default: 1]
    #[arg(long, value_name = "COUNT", help_heading = "Axes")]
    seeds: Option<u64>,

    /// Axes that are walked in step instead of crossed: width,height; may be repeated
    #[arg(long, value_name = "AXIS,AXIS", help_heading = "Axes")]
    zip: Vec<String>,

    #[command(flatten)]
    settings: Settings,

    #[command(flatten)]
    references: ReferenceArgs,

    #[command(flatten)]
    sheets: SheetArgs,

    /// A TOML file with any of these settings
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    file: Option<PathBuf>,

    /// The run's folder; made if it is not there, gone on with if it is
    #[arg(short, long, value_name = "FOLDER", default_value = "sweep", help_heading = "Run")]
    output: PathBuf,

    /// Make each picture this often and report the spread of its times
    #[arg(long, value_name = "REPEATS", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Run")]
    bench: Option<u16>,

    /// Do not ask before a long run
    #[arg(short, long, help_heading = "Run")]
    yes: bool,

    /// Print one JSON object: counts, files, failures
    #[arg(long, help_heading = "Run")]
    json: bool,

    /// No progress bar and no remarks
    #[arg(short, long, help_heading = "Run")]
    quiet: bool,
}

#[derive(Debug, Clone, clap::Args)]
struct ReferenceArgs {
    /// A folder of pictures of the person: measures identity
    #[arg(long, value_name = "FOLDER", help_heading = "Metrics")]
    identity: Option<PathBuf>,

    /// A folder of pictures of somebody else: measures leakage; may be repeated
    #[arg(long, value_name = "FOLDER", help_heading = "Metrics")]
    others: Vec<PathBuf>,

    /// The CLIP that compares: a model's name, a card (.toml) or a folder [default: clip-vit-l14, if it was pulled]
    #[arg(long, value_name = "MODEL", help_heading = "Metrics")]
    judge: Option<String>,
}

#[derive(Debug, Clone, clap::Args)]
struct SheetArgs {
    /// The axis of the contact sheets' rows [default: the one with most values]
    #[arg(long, value_name = "AXIS", help_heading = "Sheets")]
    rows: Option<String>,

    /// The axis of their columns
    #[arg(long, value_name = "AXIS", help_heading = "Sheets")]
    columns: Option<String>,
}

impl ReferenceArgs {
    fn references(self) -> References {
        References { identity: self.identity, others: self.others, judge: self.judge }
    }
}

impl SheetArgs {
    fn layout(self) -> anyhow::Result<sweep::Layout> {
        Ok(sweep::Layout::named(self.rows.as_deref(), self.columns.as_deref())?)
    }
}

pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    match args.verb {
        None => sweep(args.sweep, config),
        Some(Verb::Report { run, references, sheets }) => {
            let report = sweep::report(&run, &references.references(), &sheets.layout()?, config)?;
            super::show(&report.html.display().to_string())
        }
        Some(Verb::Compare { run_a, run_b, json }) => {
            let comparison = sweep::compare(&run_a, &run_b, config)?;
            if json { super::show(&serde_json::to_string(&comparison)?) } else { super::show(compared(&comparison).trim_end()) }
        }
        Some(Verb::Recommend { run, metric, margin, json }) => {
            let found = sweep::recommend(&run, metric.as_deref(), margin, config)?;
            if json { super::show(&serde_json::to_string(&found)?) } else { super::show(recommended(&found).trim_end()) }
        }
    }
}

fn sweep(mut args: SweepArgs, config: &Config) -> anyhow::Result<()> {
    let (json, quiet, yes) = (args.json, args.quiet, args.yes);
    let (references, layout) = (args.references.clone().references(), args.sheets.clone().layout()?);
    let (output, bench, machine) = (args.output.clone(), args.bench, args.settings.machine());
    let file = args.file.take().map(|path| Wish::read(&path)).transpose()?;
    let wish = wish(args).or(file.unwrap_or_default());
    let mut order = Sweep {
        grid: wish.grid()?,
        shared: wish.shared()?,
        machine,
        folder: output,
        repeats: bench.map_or(1, usize::from),
        command: command(),
        most: (!yes).then_some(MOST_PICTURES),
    };
    let count = order.grid.count().unwrap_or(usize::MAX);
    if count > MOST_PICTURES && !yes && can_ask() {
        anyhow::ensure!(agreed(&format!("This makes {count} pictures."))?, "not confirmed; nothing was written");
        order.most = None;
    }
    let interrupt = Interrupt::install()?;
    let mut bar = SweepBar::new(quiet);
    let mut refusal = None;
    let done = sweep::run(&order, &references, &layout, config, &mut |stage| {
        bar.tell(stage);
        match stage {
            Stage::Estimated(estimate) => {
                if !quiet {
                    bar.aside(|| super::say(&told(estimate)));
                }
                if let Err(error) = allowed(estimate, yes, &mut bar) {
                    refusal = Some(error);
                    return ControlFlow::Break(());
                }
            }
            Stage::Step { .. } | Stage::Loading(..) => interrupt.job_begins(),
            Stage::Reporting => interrupt.writing_begins(),
            Stage::Fetching(_) => {}
        }
        if interrupt.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish();
    if let Some(refusal) = refusal {
        return Err(refusal);
    }
    let done = match done {
        Err(error) if error.is_cancelled() => {
            super::say("stopped; what is done stays, and the same command goes on with it");
            std::process::exit(i32::from(super::INTERRUPTED));
        }
        done => done?,
    };
    if !quiet {
        done.outcome.remarks.iter().for_each(|remark| super::say(&format!("note: {remark}")));
        super::say(&format!("{} pictures made, {} were there", done.outcome.made, done.outcome.kept));
    }
    if json {
        super::show(&serde_json::to_string(&done)?)?;
    } else {
        super::show(&done.report.html.display().to_string())?;
    }
    let failed = &done.outcome.failed;
    if let Some((_, reason)) = failed.first() {
        anyhow::bail!(
            "{} pictures could not be made, the first because: {reason}; the same command tries them again",
            failed.len()
        );
    }
    Ok(())
}

fn wish(args: SweepArgs) -> Wish {
    let settings = args.settings;
    let numbers = |text: Option<String>| text.map(Numbers);
    Wish {
        prompt: args.prompt,
        prompts: args.prompts,
        model: args.model,
        dtype: args.dtype,
        lora: args.lora,
        trigger_policy: args.trigger_policy,
        lora_scale: numbers(args.lora_scale),
        width: numbers(args.width),
        height: numbers(args.height),
        strength: numbers(args.strength),
        true_cfg: numbers(args.true_cfg),
        guidance: numbers(args.guidance),
        steps: numbers(args.steps),
        seed: numbers(args.seed),
        seeds: args.seeds,
        zip: args.zip,
        negative_prompt: settings.negative_prompt,
        aspect_ratio: settings.aspect_ratio,
        megapixels: settings.megapixels,
        noise: settings.noise,
        image: settings.image,
        mask: settings.mask,
        lora_text_scale: settings.lora_text_scale,
        lora_blocks: settings.lora_blocks,
        lora_mode: settings.lora_mode,
        trigger_word: settings.trigger_word,
        clean_prompt: settings.clean_prompt,
    }
}

/// What was typed, as a shell reads it.
fn command() -> String {
    let mut words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(program) = words.first_mut() {
        "darkroom".clone_into(program);
    }
    sweep::shell(&words)
}

fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

fn agreed(question: &str) -> anyhow::Result<bool> {
    super::say(&format!("{question} Go on? [y/N]"));
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("the answer cannot be read")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn told(estimate: &Estimate) -> String {
    let Estimate { cells, pictures, done, time, bytes } = *estimate;
    let there = if done > 0 { format!(", {done} are there already") } else { String::new() };
    let equal = cells - pictures - done.min(cells - pictures);
    let equal = if equal > 0 { format!(", {equal} cells share theirs with others") } else { String::new() };
    let size = bytes::in_words(bytes);
    format!("{pictures} pictures to make{there}{equal}; about {} and {size}", super::progress::clock(time))
}

/// Long runs and large ones are asked for twice.
fn allowed(estimate: &Estimate, yes: bool, bar: &mut SweepBar) -> anyhow::Result<()> {
    if yes || (estimate.time < LONGEST && estimate.bytes < MOST_BYTES) {
        return Ok(());
    }
    let refused = || {
        ops::Error::Combination {
            field: "sweep",
            problem: told(estimate),
            hint: "leave values out, or say that it is meant with --yes".into(),
        }
        .into()
    };
    if !can_ask() {
        return Err(refused());
    }
    if bar.aside(|| agreed("That is long."))? { Ok(()) } else { Err(anyhow::anyhow!("not confirmed; no picture was made")) }
}

fn compared(comparison: &Comparison) -> String {
    let mut text = format!("A {}\nB {}\n", comparison.a, comparison.b);
    for (name, a, b) in &comparison.differs {
        let _ = writeln!(text, "  {name}: {a} in A, {b} in B");
    }
    let _ = writeln!(text, "{} pairs of pictures, {} seeds\n", comparison.pairs, comparison.seeds);
    let _ = writeln!(
        text,
        "{:16} {:>10} {:>10} {:>11}  {:24} {:>7} {:>8}  ",
        "", "A", "B", "B - A", "95 % interval", "effect", "seeds"
    );
    for row in &comparison.figures {
        let paired = &row.paired;
        let interval = paired.difference.interval.map_or_else(|| "-".into(), |(low, high)| format!("{low:.4} to {high:.4}"));
        let effect = paired.effect.map_or_else(|| "-".into(), |d| format!("{d:.2}"));
        let seeds = paired.seeds_needed.map_or_else(|| "-".into(), |n| n.to_string());
        let _ = writeln!(
            text,
            "{:16} {:>10.4} {:>10.4} {:>+11.4}  {interval:24} {effect:>7} {seeds:>8}  {}",
            row.name, row.a, row.b, paired.difference.mean, row.verdict
        );
    }
    if comparison.few {
        text += "\nThese are few seeds: a difference that more would show may be missed. Repeat both with --seeds 16.\n";
    }
    text += "\neffect: the mean difference in units of its own deviation over seeds. seeds: how many would show it with a power of 80 %.\n";
    text
}

fn recommended(found: &Recommendation) -> String {
    let mut text = format!("{}\n\n", found.said);
    let _ = writeln!(text, "{:40} {:>10} {:>10}  against the best (95 % interval)", "setting", found.metric, "seconds");
    for setting in &found.settings {
        let against = match (&setting.against_best, setting.interval) {
            (None, _) => "the best".to_owned(),
            (Some(mean), Some((low, high))) => format!("{mean:+.4} ({low:+.4} to {high:+.4})"),
            (Some(mean), None) => format!("{mean:+.4}"),
        };
        let mark = if setting.recommended { " <-" } else { "" };
        let _ = writeln!(text, "{:40} {:>10.4} {:>10.3}  {against}{mark}", setting.name, setting.mean, setting.seconds);
    }
    text
}
