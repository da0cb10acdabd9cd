//! `darkroom completions`.

use clap::CommandFactory;
use clap_complete::Shell;

/// Print a script that completes darkroom's commands and options in your shell
///
/// For bash: darkroom completions bash > ~/.local/share/bash-completion/completions/darkroom
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell
    shell: Shell,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "darkroom", &mut script);
    super::show(String::from_utf8_lossy(&script).trim_end())
}
