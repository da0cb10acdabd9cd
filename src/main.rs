//! The program. Everything is in the library, so that tests and other faces use the same code.

fn main() -> std::process::ExitCode {
    darkroom::cli::main()
}
