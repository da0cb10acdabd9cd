//! What a worker is told of a job: complete, so that running it again gives the same picture.

use std::sync::Arc;

use models::lora::{Mode, Scales};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::blobs::Blobs;
use crate::config::Secret as Token;
use crate::fetch::{self, Credentials};
use crate::hex::hex;
use crate::image::{Format, Limits, decode_picture};
use crate::jobs::Job;
use crate::ops::Error;
use crate::ops::generate::{Picture, Request};
use crate::ops::lora::{Lora, check_foreign};

/// Adapters of one job.
pub const MOST_LORAS: usize = 8;

/// Longest prompt, in bytes; the encoders read some 2000.
pub const LONGEST_PROMPT: usize = 8 << 10;

/// Longest link, name of a LoRA or token, in bytes: rows of jobs are read again and again.
pub const LONGEST_REFERENCE: usize = 4096;

/// Longest side of a picture to start from, in pixels; larger ones are shrunk.
const LONGEST_SIDE: u32 = 1440;

/// Whether that is the file itself instead of where it is. As everywhere in links, the case does not matter.
#[must_use]
pub fn is_data(reference: &str) -> bool {
    reference.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// A job's request, every default filled in.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Order {
    pub prompt: String,
    /// Width and height; that of `image` where there is none.
    pub size: Option<(usize, usize)>,
    pub steps: usize,
    /// Where none is given, the model's own.
    pub guidance: Option<f64>,
    pub seed: u64,
    pub outputs: usize,
    /// png, jpg or webp.
    pub format: String,
    pub quality: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<OrderedLora>,
    /// A picture to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Origin>,
    /// White is painted anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Origin>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_strength: Option<f64>,
    /// Make the base model's picture if a LoRA cannot be used, and say so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_lora: bool,
    /// In fp8 products, where the model's weights allow it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fast: bool,
    /// Show what is to come.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub previews: bool,
    /// The request's own tokens for private LoRAs, sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct OrderedLora {
    pub reference: String,
    pub scale: f64,
    /// Where the service has it in its own storage, if it came inside its request: `reference` names it then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
}

impl OrderedLora {
    #[must_use]
    pub fn new(reference: &str, scale: f64) -> Self {
        Self { reference: reference.trim().into(), scale, stored: None }
    }
}

/// Where a picture to start from is.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Its key in the service's own storage.
    Stored(String),
    Link(String),
}

/// Tokens that a request brings for its LoRAs.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
pub struct Tokens {
    pub hub: Option<String>,
    pub civitai: Option<String>,
}

impl Tokens {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hub.is_none() && self.civitai.is_none()
    }

    /// As the fetcher takes them.
    #[must_use]
    pub fn credentials(&self) -> Credentials {
        Credentials { hub: self.hub.as_deref().map(Token::new), civitai: self.civitai.as_deref().map(Token::new) }
    }
}

impl Order {
    /// The same for `ops::generate`, with the pictures that `image` and `mask` name.
    pub fn request(&self, image: Option<Picture>, mask: Option<Picture>) -> Result<Request, Error> {
        let (width, height) = match (self.size, &image) {
            (Some(size), _) => size,
            (None, Some(image)) => follow(image)?,
            (None, None) => return Err(Error::invalid("size", &"missing", "given, or that of a picture to start from")),
        };
        Ok(Request {
            prompt: self.prompt.clone(),
            width: Some(width),
            height: Some(height),
            steps: Some(self.steps),
            guidance: self.guidance,
            seed: Some(self.seed),
            outputs: Some(self.outputs),
            prompt_strength: image.is_some().then_some(self.prompt_strength).flatten(),
            image,
            mask,
            loras: self.loras(),
            lora_mode: if self.fast { Mode::Fp8 } else { Mode::default() },
            previews: self.previews.then_some(std::time::Duration::from_millis(500)),
            ..Request::default()
        })
    }

    /// The adapters as `ops::lora` takes them.
    fn loras(&self) -> Vec<Lora> {
        let lora = |lora: &OrderedLora| Lora { reference: lora.reference.clone(), scales: Scales::uniform(lora.scale) };
        self.loras.iter().map(lora).collect()
    }

    /// Of an accepted job.
    pub(super) fn of(job: &Job) -> Result<Self, Error> {
        serde_json::from_value(job.request["order"].clone())
            .map_err(|error| Error::invalid("request", &error.to_string(), "what this version stores"))
    }

    /// The same, with the text of those that came inside the request.
    pub(super) async fn loras_from(&self, blobs: &Blobs) -> Result<Vec<Lora>, Error> {
        let mut loras = self.loras();
        for (ordered, lora) in self.loras.iter().zip(&mut loras) {
            if let Some(key) = &ordered.stored {
                let text = blobs.get(key).await?.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
                let gone = || Error::Fetch {
                    reference: "the LoRA that was sent".into(),
                    source: Arc::new(fetch::Error::NotFound {
                        what: "its file".into(),
                        hint: "it was removed; send it again".into(),
                    }),
                };
                lora.reference = text.ok_or_else(gone)?;
            }
        }
        Ok(loras)
    }

    /// Everything that is wrong whatever the model: for requests of strangers.
    pub fn check(&self) -> Result<(), Error> {
        if self.prompt.len() > LONGEST_PROMPT {
            return Err(Error::invalid(
                "prompt",
                &format!("{} bytes long", self.prompt.len()),
                format!("at most {LONGEST_PROMPT} bytes"),
            ));
        }
        if self.prompt.contains('\0') {
            return Err(Error::invalid("prompt", &"text with a NUL character", "text without it"));
        }
        if self.loras.len() > MOST_LORAS {
            return Err(Error::invalid("loras", &self.loras.len(), format!("at most {MOST_LORAS}")));
        }
        for lora in &self.loras {
            if lora.reference.len() > LONGEST_REFERENCE && !is_data(&lora.reference) {
                return Err(Error::invalid(
                    "lora_weights",
                    &format!("{} bytes long", lora.reference.len()),
                    format!("at most {LONGEST_REFERENCE} bytes, or the file itself as a data URI"),
                ));
            }
            check_foreign(&lora.reference)?;
        }
        self.format().map(drop)
    }

    pub fn format(&self) -> Result<Format, Error> {
        self.format.parse().map_err(|()| Error::invalid("output_format", &self.format, "webp, jpg or png"))
    }

    /// Names what is made of the weights, the adapters and their scales: jobs that agree in it follow each other without a switch. Empty
    /// for the weights as they are.
    #[must_use]
    pub fn affinity(&self) -> String {
        if self.loras.is_empty() && !self.fast {
            return String::new();
        }
        let mut hasher = Sha256::new();
        hasher.update([u8::from(self.fast)]);
        for lora in &self.loras {
            hasher.update(lora.reference.as_bytes());
            hasher.update(lora.scale.to_le_bytes());
        }
        hex(&hasher.finalize()[..16])
    }
}

/// The size of the output for a picture to start from: within 1440 a side, multiples of 16.
fn follow(image: &Picture) -> Result<(usize, usize), Error> {
    let pixels = decode_picture(&image.bytes, Limits::STRANGERS).map_err(|source| Error::UnreadablePicture {
        field: "image",
        name: image.name.clone(),
        source,
    })?;
    Ok(fit(pixels.width(), pixels.height()))
}

fn fit(width: u32, height: u32) -> (usize, usize) {
    let longest = width.max(height);
    let within = |side: u32| {
        if longest > LONGEST_SIDE {
            (f64::from(side) * f64::from(LONGEST_SIDE) / f64::from(longest)).floor()
        } else {
            f64::from(side)
        }
    };
    // The nearest, half to even, as Python rounds.
    let near = |side: f64| ((side / 16.0).round_ties_even() as usize * 16).max(16);
    (near(within(width)), near(within(height)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::serve::Secret;
    use crate::ops::serve::run::credentials;

    fn order() -> Order {
        Order {
            prompt: "x".into(),
            size: Some((64, 64)),
            steps: 1,
            guidance: None,
            seed: 1,
            outputs: 1,
            format: "png".into(),
            quality: 80,
            loras: Vec::new(),
            image: None,
            mask: None,
            prompt_strength: None,
            without_lora: false,
            fast: false,
            previews: false,
            tokens: None,
        }
    }

    #[test]
    fn pictures_to_start_from_set_the_size() {
        for ((width, height), size) in [
            ((1600, 1000), (1440, 896)),
            ((500, 333), (496, 336)),
            ((4000, 3000), (1440, 1088)),
            ((1080, 1920), (816, 1440)),
            ((3, 5), (16, 16)),
        ] {
            assert_eq!(fit(width, height), size, "{width} x {height}");
        }
    }

    #[test]
    fn what_no_request_may_hold() {
        let order = order();
        order.check().unwrap();
        let lora = |reference: &str| OrderedLora::new(reference, 1.0);
        for local in ["/etc/passwd", "./x.safetensors", "file:///etc/passwd", "s3://operators/private.safetensors", "~/x", "x"] {
            let error = Order { loras: vec![lora(local)], ..order.clone() }.check().unwrap_err();
            assert_eq!(error.code(), "lora_bad_reference", "{local}: {error}");
        }
        for good in ["someone/flux-lora", "https://example.com/a.safetensors", "civitai:12", "data:;base64,AAAA"] {
            Order { loras: vec![lora(good)], ..order.clone() }.check().unwrap();
        }
        let long = |start: &str| Order { loras: vec![lora(&format!("{start}{}", "a".repeat(5000)))], ..order.clone() }.check();
        for data in ["data:;base64,", "DATA:;base64,", " Data:;base64,"] {
            long(data).unwrap();
        }
        let error = long("https://example.com/").unwrap_err();
        assert!(error.told().contains("5020 bytes long") && error.told().contains("at most 4096 bytes"), "{}", error.told());
        assert!(Order { loras: vec![lora("a/b"); 9], ..order.clone() }.check().is_err());
        assert!(Order { prompt: "x".repeat(8193), ..order.clone() }.check().is_err());
        assert!(Order { prompt: "a\0b".into(), ..order }.check().is_err());
    }

    #[test]
    fn tokens_that_another_secret_sealed_are_not_taken_for_none() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [own, other] = folders.each_ref().map(|folder| Secret::of(folder.path()).unwrap());
        let tokens = Tokens { hub: Some("hf_token".into()), civitai: None };
        let sealed = own.seal(&serde_json::to_string(&tokens).unwrap()).unwrap();
        let sent = Order { tokens: Some(sealed), loras: vec![OrderedLora::new("a/b", 1.0)], ..order() };
        assert!(credentials(&sent, &own).unwrap().hub.is_some());
        let error = credentials(&sent, &other).unwrap_err();
        assert!(error.told().contains("`secret`") && error.is_lora(), "{}", error.told());
        // Nobody asks for them.
        assert!(credentials(&Order { loras: Vec::new(), ..sent }, &other).unwrap().hub.is_none());
    }
}
