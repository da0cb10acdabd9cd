use thiserror::Error;

/// Why there is no walk from noise to latents.
#[derive(Debug, Error)]
pub enum Error {
    #[error("the scheduler's config is not what diffusers writes: compare it with the model's published scheduler_config.json")]
    Config(#[from] serde_json::Error),
    #[error("the scheduler's config asks for {field} = {value}, which is not supported; supported: {supported}")]
    Unsupported { field: &'static str, value: String, supported: &'static str },
    #[error("strength is {strength}; use a number above 0 and up to 1")]
    Strength { strength: f64 },
    #[error("strength {strength} leaves none of {steps} steps to walk; use more of either")]
    NothingLeft { strength: f64, steps: usize },
}
