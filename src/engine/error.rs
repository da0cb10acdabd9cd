/// Why the engine could not do a job.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cancelled")]
    Cancelled,
    #[error("the device {name} cannot be used: {hint}")]
    NoDevice { name: &'static str, hint: String },
    #[error(transparent)]
    Weights(#[from] models::weights::Error),
    #[error("the LoRA is refused")]
    Lora(#[source] Box<models::lora::Error>),
    #[error(transparent)]
    Schedule(#[from] models::sampler::Error),
    #[error("{path} is not a usable configuration")]
    Config {
        path: std::path::PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the autoencoder made {count} values that are not numbers; try --dtype f32 or bf16")]
    NotANumber { count: usize },
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<models::lora::Error> for Error {
    fn from(error: models::lora::Error) -> Self {
        Self::Lora(Box::new(error))
    }
}
