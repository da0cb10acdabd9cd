use crate::bytes::in_words;

/// Why the engine could not do a job.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cancelled")]
    Cancelled,
    #[error("the device {name} cannot be used: {hint}")]
    NoDevice { name: &'static str, hint: String },
    #[error(
        "the model needs at least {} of a card that has {} for it, even with everything in main memory that can be; end what \
         else uses the card, raise --vram-limit, or take another --dtype or --device cpu",
        in_words(*need),
        in_words(*have)
    )]
    CardTooSmall { need: u64, have: u64 },
    #[error(
        "the device has no memory left for this job, also after other attempts with less on it; a picture of this size takes about {} beside the \
         weights and their LoRAs, and {free}; take a smaller picture, fewer LoRAs or --dtype fp8 or q4_k",
        in_words(*need)
    )]
    OutOfMemory {
        /// Bytes.
        need: u64,
        free: String,
        #[source]
        source: Box<Error>,
    },
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

/// How drivers and candle say it: CUDA and its libraries, then Metal.
const NO_MEMORY: [&str; 7] = [
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "allocation_failed",
    "failed to create metal resource",
    "insufficient memory",
    "outofmemory",
];

impl Error {
    /// Whether the device had no memory left. candle tells it in words only, wherever it happened.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        let mut error: Option<&dyn std::error::Error> = Some(self);
        while let Some(one) = error {
            let text = one.to_string().to_ascii_lowercase();
            if NO_MEMORY.iter().any(|words| text.contains(words)) {
                return true;
            }
            error = one.source();
        }
        false
    }
}

impl From<models::lora::Error> for Error {
    fn from(error: models::lora::Error) -> Self {
        Self::Lora(Box::new(error))
    }
}
