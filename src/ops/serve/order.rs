//! What a worker is told of a job: complete, so that running it again gives the same picture.

use models::lora::Scales;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hex::hex;
use crate::image::Format;
use crate::ops::Error;
use crate::ops::generate::{Picture, Request};
use crate::ops::lora::Lora;
use crate::{fetch, image};

/// A job's request, every default filled in.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Order {
    pub prompt: String,
    pub width: usize,
    pub height: usize,
    pub steps: usize,
    pub guidance: f64,
    pub seed: u64,
    pub outputs: usize,
    /// png, jpg or webp.
    pub format: String,
    pub quality: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<OrderedLora>,
    /// A picture to start from, as a data URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_strength: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct OrderedLora {
    pub reference: String,
    pub scale: f64,
}

impl Order {
    /// The same for `ops::generate`.
    pub fn request(&self) -> Result<Request, Error> {
        let image = self.image.as_deref().map(|uri| picture("image", uri)).transpose()?;
        let lora = |lora: &OrderedLora| Lora { reference: lora.reference.clone(), scales: Scales::uniform(lora.scale) };
        Ok(Request {
            prompt: self.prompt.clone(),
            // A picture to start from brings its own size.
            width: Some(self.width),
            height: Some(self.height),
            steps: Some(self.steps),
            guidance: Some(self.guidance),
            seed: Some(self.seed),
            outputs: Some(self.outputs),
            prompt_strength: image.is_some().then_some(self.prompt_strength).flatten(),
            image,
            loras: self.loras.iter().map(lora).collect(),
            ..Request::default()
        })
    }

    pub fn format(&self) -> Result<Format, Error> {
        self.format.parse().map_err(|()| Error::invalid("output_format", &self.format, "webp, jpg or png"))
    }

    /// Names the adapters and their scales: jobs that agree in it follow each other without a switch. Empty for none.
    #[must_use]
    pub fn affinity(&self) -> String {
        if self.loras.is_empty() {
            return String::new();
        }
        let mut hasher = Sha256::new();
        for lora in &self.loras {
            hasher.update(lora.reference.as_bytes());
            hasher.update(lora.scale.to_le_bytes());
        }
        hex(&hasher.finalize()[..16])
    }
}

/// The picture in a data URI.
pub fn picture(field: &'static str, uri: &str) -> Result<Picture, Error> {
    let unreadable = |looks_like: String| Error::UnreadablePicture {
        field,
        name: "the data URI".into(),
        source: image::Error::NotAPicture { looks_like },
    };
    let bytes = fetch::decode_picture(uri).map_err(|error| unreadable(error.to_string()))?;
    Ok(Picture { name: "the data URI".into(), bytes })
}
