//! Compiles the kernels: for cards with nvcc (feature `cuda`), and for tests on a processor with a C++ compiler (feature `emulator`).

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a build ends by panicking, and cargo speaks through the environment"
)]

/// Cards that the binary has machine code for: A100, RTX 30, RTX 40 and L4, H100 and H200, B200, RTX 50. Newer ones compile the
/// text for the oldest of these when the program starts.
#[cfg(feature = "cuda")]
const ARCHITECTURES: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    #[cfg(feature = "cuda")]
    cuda();
    #[cfg(feature = "emulator")]
    emulator();
}

#[cfg(feature = "emulator")]
fn emulator() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .define("DARKROOM_EMULATOR", None)
        .flag("-Wno-unknown-pragmas")
        // Memory is read as whole words, whatever values are in it; and fibers are what the other is about.
        .flag("-fno-strict-aliasing")
        .flag_if_supported("-Wno-clobbered")
        // A jump from one stack to another is what its checks are against.
        .flag("-U_FORTIFY_SOURCE")
        .file("cuda/emulator.cpp")
        .compile("darkroom_emulator");
}

#[cfg(feature = "cuda")]
fn cuda() {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap()).join("kernels.fatbin");
    let nvcc = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")).filter(|nvcc| nvcc.exists());
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--threads=0", "-Werror=all-warnings"]);
    for architecture in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    command.arg("-gencode=arch=compute_80,code=compute_80").arg("cuda/kernels.cu").arg("-o").arg(&out);
    let status =
        command.status().unwrap_or_else(|e| panic!("{} cannot be run: {e}; scripts/cuda-env sets it up", nvcc.display()));
    assert!(status.success(), "{command:?} failed");
}
