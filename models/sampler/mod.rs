//! From noise to latents.

/// Which generator draws the noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoiseKind {
    /// PyTorch's CPU generator: the noise of diffusers with a CPU generator, and of ComfyUI.
    #[default]
    Cpu,
    /// PyTorch's CUDA generator (Philox).
    Cuda,
}
