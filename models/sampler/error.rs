use thiserror::Error;

/// Why there is no walk from noise to latents.
#[derive(Debug, Error)]
pub enum Error {
    #[error("the scheduler's config is not what diffusers writes: compare it with the model's published scheduler_config.json")]
    Config(#[from] serde_json::Error),
    #[error("the scheduler's config asks for {field} = {value}, which is not supported; supported: {supported}")]
    Unsupported { field: &'static str, value: String, supported: &'static str },
    #[error("steps is 0; use at least 1")]
    NoSteps,
    #[error("strength is {strength}; use a number above 0 and up to 1")]
    Strength { strength: f64 },
    #[error("strength {strength} of {steps} steps leaves no step to walk; use a strength of at least {least:.3} or more steps")]
    NothingLeft { strength: f64, steps: usize, least: f64 },
}
