//! Whether darkroom's own kernels are right on this machine's card: found out once, by a process of its own, and kept.
//!
//! They have not run on every card with every driver, and a kernel that goes wrong takes its process with it or, worse, does not. So
//! candle's operations are used until every kernel has given on this card what the plain operations give.

use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Device, DeviceLocation};

use super::doctor::{Finding, Verdict};
use super::{Error, Machine};
use crate::engine;

/// So long may trying them take: a card that is newer than the program has them compiled first.
const LONGEST: Duration = Duration::from_secs(300);

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on a card that is opened has our kernels where they are right, and candle's operations elsewhere.
pub(crate) fn ask() {
    ASKED.store(true, Ordering::Relaxed);
}

/// What was found out about a card.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    /// How much was tried.
    Right(String),
    /// What was not right first.
    Wrong(String),
    /// How trying them ended without an answer, one time.
    Unclear(String),
}

impl Known {
    fn of(subject: &str) -> Option<Self> {
        let kept = kernels::recall(subject)?;
        let (word, why) = kept.trim().split_once(' ')?;
        match word {
            "right" => Some(Self::Right(why.into())),
            "wrong" => Some(Self::Wrong(why.into())),
            "unclear" => Some(Self::Unclear(why.into())),
            // What is damaged is found out again.
            _ => None,
        }
    }

    fn keep(&self, subject: &str) {
        let (word, why) = match self {
            Self::Right(why) => ("right", why),
            Self::Wrong(why) => ("wrong", why),
            Self::Unclear(why) => ("unclear", why),
        };
        kernels::remember(subject, &format!("{word} {}\n", why.replace('\n', " ")));
    }
}

/// The card, its driver, and these kernels.
fn subject(device: &Device) -> Result<String, Error> {
    let machine = kernels::machine(device).map_err(engine::Error::from)?;
    Ok(format!("kernels-{machine}-{}-{}", env!("CARGO_PKG_VERSION"), kernels::digest()))
}

/// Turns our kernels on if [`ask`] was called and they are right on this card; the first time that takes some seconds.
pub(super) fn settle(machine: &Machine, device: &Device) {
    static SETTLED: Mutex<bool> = Mutex::new(false);
    // Whoever comes meanwhile waits for the answer.
    let mut settled = SETTLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !device.is_cuda() || !ASKED.load(Ordering::Relaxed) || std::mem::replace(&mut settled, true) {
        return;
    }
    match known(machine, device) {
        Ok(Known::Right(_)) => kernels::use_fused(true),
        Ok(Known::Wrong(why)) => {
            tracing::warn!("candle's operations are used: darkroom's own are wrong on this card, please report it: {why}");
        }
        Ok(Known::Unclear(why)) => {
            tracing::warn!(
                "candle's operations are used, as trying darkroom's own ended badly; the next start tries again: {why}"
            );
        }
        // Also where a card serves one process at a time, which this one is.
        Err(why) => tracing::warn!(
            "candle's operations are used, as darkroom's own could not be tried; darkroom doctor --kernels tries them by itself: {why}"
        ),
    }
}

fn known(machine: &Machine, device: &Device) -> Result<Known, String> {
    let subject = subject(device).map_err(|error| error.to_string())?;
    let before = Known::of(&subject);
    if let Some(known @ (Known::Right(_) | Known::Wrong(_))) = before {
        return Ok(known);
    }
    tracing::info!("darkroom's kernels are tried on this card, once");
    let DeviceLocation::Cuda { gpu_id } = device.location() else { return Err("there is no card".into()) };
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.args(["doctor", "--kernels", "--device", &format!("cuda:{gpu_id}")]);
    if let Some(limit) = machine.vram_limit {
        command.args(["--vram-limit", &limit.to_string()]);
    }
    let ended = run(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()));
    let ended = ended.map_err(|error| error.to_string())?;
    match (Known::of(&subject), ended) {
        (Some(known @ (Known::Right(_) | Known::Wrong(_))), _) => Ok(known),
        // Nothing can be kept here, so it is found out at each start.
        (_, Ended::Well) => Ok(Known::Right("just now".into())),
        (_, Ended::Refused(said)) => Err(said.lines().last().unwrap_or("it does not say why").into()),
        (_, Ended::Crashed(how)) => {
            // A machine that is busy or has no memory left is not the kernels' fault, but it is not so twice.
            let known = if before.is_some() { Known::Wrong(how) } else { Known::Unclear(how) };
            known.keep(&subject);
            Ok(known)
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Well,
    /// With what it said, or how somebody stopped it.
    Refused(String),
    Crashed(String),
}

fn run(command: &mut Command) -> std::io::Result<Ended> {
    let mut child = command.spawn()?;
    let mut stderr = child.stderr.take();
    let listening = std::thread::spawn(move || {
        let mut said = String::new();
        // What cannot be read any more is not needed.
        let _ = stderr.as_mut().map(|stderr| stderr.read_to_string(&mut said));
        said
    });
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > LONGEST {
            child.kill()?;
            child.wait()?;
            return Ok(Ended::Crashed(format!("trying them did not end within {} seconds", LONGEST.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let said = listening.join().unwrap_or_default();
    Ok(match status.code() {
        Some(0) => Ended::Well,
        _ if crashed(status) => Ended::Crashed(format!("trying them died, {status}")),
        Some(_) => Ended::Refused(said),
        None => Ended::Refused(format!("trying them was stopped, {status}")),
    })
}

/// Whether a process ended by its own fault: a panic, or a signal that nobody sends.
fn crashed(status: ExitStatus) -> bool {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return [libc::SIGILL, libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV].contains(&signal);
    }
    // The exit code of Rust's panics; Windows has large ones for faults.
    status.code().is_some_and(|code| code == 101 || !(0..256).contains(&code))
}

/// Tries each of our kernels on the card, and keeps what came out. Errors if they cannot be tried now.
pub(crate) fn try_kernels(machine: Machine) -> Result<Vec<Finding>, Error> {
    let device = engine::device(machine.device)?;
    if !device.is_cuda() {
        return Err(Error::invalid("device", &"no CUDA card", "one: darkroom's own kernels are for these"));
    }
    let subject = subject(&device)?;
    let mut findings = Vec::new();
    let tried = kernels::prove(&device, machine.vram_limit, &mut |proof| findings.push(finding(proof)));
    if let Err(error) = tried.map_err(engine::Error::from) {
        if error.is_out_of_memory() {
            return Err(error.into());
        }
        findings.push(Finding::new("kernels", Verdict::Bad, format!("not tried to the end: {}", chain(&error))));
        // After a fault the libraries cannot let go of the card, and end the program when they try.
        Box::leak(Box::new(device.clone()));
    }
    let known = match findings.iter().find(|finding| finding.verdict == Verdict::Bad) {
        Some(Finding { item, text, .. }) => Known::Wrong(format!("{item}: {text}")),
        None => Known::Right(format!("{} trials", findings.len())),
    };
    known.keep(&subject);
    Ok(findings)
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    // candle's go on with a backtrace.
    let first_line = |error: &dyn std::error::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    causes.map(first_line).collect::<Vec<_>>().join(": ")
}

fn finding(proof: &kernels::Proof) -> Finding {
    let kernels::Proof { operation, dtype, at_full_size, error, most, worst, most_of_worst, repeats, .. } = proof;
    let size = if *at_full_size { " at FLUX.1's sizes" } else { "" };
    let twice = if *repeats { "" } else { ", and something else the second time" };
    let text = format!("{error:.1e} off (at most {most:.1e}), the worst value {worst:.1e} ({most_of_worst:.1e}){twice}");
    let verdict = if proof.holds() { Verdict::Good } else { Verdict::Bad };
    Finding::new(&format!("{operation} in {}{size}", dtype.as_str()), verdict, text)
}

/// Whose operations a card computes with, and why.
pub(super) fn examine(device: &Device) -> Finding {
    let (asked, fused) = (ASKED.load(Ordering::Relaxed), kernels::fused());
    let known = subject(device).ok().and_then(|subject| Known::of(&subject));
    let (verdict, text) = match known {
        _ if !asked && fused => (Verdict::Good, "darkroom's own, as DARKROOM_KERNELS says".into()),
        _ if !asked => (Verdict::Note, "candle's operations, as DARKROOM_KERNELS says".into()),
        Some(Known::Right(why)) => (Verdict::Good, format!("darkroom's own, which are right on this card ({why})")),
        Some(Known::Wrong(why)) => (
            Verdict::Note,
            format!(
                "candle's operations: darkroom's own are wrong on this card, please report it: {why}; darkroom doctor --kernels tries them again"
            ),
        ),
        // It cannot be kept here.
        None | Some(Known::Unclear(_)) if fused => {
            (Verdict::Good, "darkroom's own, which were right on this card at this start".into())
        }
        Some(Known::Unclear(why)) => (
            Verdict::Note,
            format!(
                "candle's operations: trying darkroom's own ended badly; the next start, or darkroom doctor --kernels, tries again: {why}"
            ),
        ),
        None => {
            (Verdict::Note, "candle's operations: darkroom's own could not be tried; darkroom doctor --kernels says why".into())
        }
    };
    Finding::new("kernels", verdict, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_that_dies_is_told_from_one_that_says_why_not() {
        let shell = |script: &str| run(Command::new("sh").args(["-c", script]).stderr(Stdio::piped())).unwrap();
        assert_eq!(shell("exit 0"), Ended::Well);
        assert_eq!(shell("echo the card is full >&2; exit 1"), Ended::Refused("the card is full\n".into()));
        assert!(matches!(shell("kill -SEGV $$"), Ended::Crashed(how) if how.contains("signal")));
        assert!(matches!(shell("exit 101"), Ended::Crashed(_)));
        // Whoever stops it says nothing of the kernels. (Ctrl-C is not heard by what was started in the background.)
        assert!(matches!(shell("kill -TERM $$"), Ended::Refused(how) if how.contains("stopped")));
    }

    #[test]
    fn what_did_not_hold_is_bad() {
        let proof = kernels::Proof {
            operation: "attention",
            dtype: candle_core::DType::BF16,
            at_full_size: true,
            error: 0.3,
            most: 0.004,
            worst: f64::NAN,
            most_of_worst: 0.03,
            repeats: false,
            launches: 1,
        };
        let Finding { item, verdict, text } = finding(&proof);
        assert_eq!((item.as_str(), verdict), ("attention in bf16 at FLUX.1's sizes", Verdict::Bad));
        assert_eq!(text, "3.0e-1 off (at most 4.0e-3), the worst value NaN (3.0e-2), and something else the second time");
        let right = kernels::Proof { error: 0.001, worst: 0.01, repeats: true, ..proof };
        assert_eq!(finding(&right).verdict, Verdict::Good);
    }
}
