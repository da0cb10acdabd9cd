//! What OpenAI's clients send, as an order.

use std::sync::Arc;

use axum::extract::Multipart;
use axum::extract::multipart::MultipartError;
use axum::http::HeaderMap;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Submission, idempotency};
use crate::api::Server;
use crate::api::auth::Caller;
use crate::api::bodies::{self, Held};
use crate::api::problem::{Invalid, Problem, faulty};
use crate::api::replicate::{self, Served};
use crate::api::submit::{Sent, check_order, decoding};
use crate::hex::hex;
use crate::image;
use crate::ops::serve::{LONGEST_PROMPT, MOST_LORAS, MOST_PICTURE, Order, OrderedLora, Tokens};
use crate::ops::{generate, near};

/// More bring nothing.
const MOST_STEPS: u64 = 100;

/// Largest side of a picture.
const MOST_SIDE: usize = 2048;

/// The keys that are read.
const KEYS: [&str; 24] = [
    "background",
    "civitai_api_token",
    "guidance",
    "hf_api_token",
    "image",
    "lora_scale",
    "lora_weights",
    "loras",
    "mask",
    "model",
    "n",
    "num_inference_steps",
    "on_lora_error",
    "output_compression",
    "output_format",
    "partial_images",
    "prompt",
    "prompt_strength",
    "response_format",
    "seed",
    "size",
    "stream",
    "webhook",
    "webhook_events_filter",
];

/// A checked request.
#[derive(Debug)]
pub(in crate::api) struct Request {
    pub(in crate::api) served: &'static Served,
    body: Map<String, Value>,
    image: Option<Vec<u8>>,
    mask: Option<Vec<u8>>,
    /// The room that all of it takes.
    held: Option<Arc<Held>>,
    pub(super) edit: bool,
    pub(super) links: bool,
    pub(super) stream: bool,
    pub(super) partial_images: u64,
    /// png, jpeg or webp.
    pub(super) format: String,
}

/// The model of this name, with its owner or without. Without a name the one that takes LoRAs.
pub(super) fn served(name: Option<&str>) -> Option<&'static Served> {
    let name = name.unwrap_or("flux-dev-lora");
    match name.split_once('/') {
        Some((owner, name)) => Served::named(owner, name),
        None => Served::named("black-forest-labs", name),
    }
}

fn invalid(field: &str, text: impl Into<String>) -> Problem {
    Problem::invalid("invalid_value", field, text)
}

impl Request {
    pub(in crate::api) fn new(body: Map<String, Value>, held: Arc<Held>) -> Result<Self, Problem> {
        let text = |name: &str| body.get(name).and_then(Value::as_str);
        let unknown = || {
            invalid("model", format!("there is no model {:?}; this server has {}", text("model").unwrap_or_default(), known()))
        };
        let served = served(text("model")).ok_or_else(unknown)?;
        if text("prompt").is_none_or(str::is_empty) {
            return Err(Problem::Invalid(vec![Invalid::new("required", "prompt", "prompt is required")]));
        }
        if text("background") == Some("transparent") {
            return Err(invalid("background", "pictures have no transparent parts; leave it out or send opaque"));
        }
        let links = match text("response_format") {
            None | Some("b64_json") => false,
            Some("url") => true,
            Some(_) => return Err(invalid("response_format", "must be b64_json or url")),
        };
        let format = match text("output_format") {
            None => "png".to_owned(),
            Some(format @ ("png" | "webp" | "jpeg")) => format.into(),
            Some(_) => return Err(invalid("output_format", "must be png, webp or jpeg")),
        };
        let stream = boolean(&body, "stream")?.unwrap_or(false);
        let partial_images = whole(&body, "partial_images", 0, 3)?.unwrap_or(0);
        let held = Some(held);
        Ok(Self { served, image: None, mask: None, held, edit: false, links, stream, partial_images, format, body })
    }

    /// From a form, in which all values are texts. `image` and `image[]` are the pictures.
    pub(super) async fn of_form(mut form: Multipart, tenant: &str) -> Result<Self, Problem> {
        let broken = |error: MultipartError| invalid("", format!("the form cannot be read: {}", error.body_text()));
        let (mut body, mut images, mut mask, mut held) = (Map::new(), Vec::new(), None, Held::of(tenant));
        while let Some(field) = form.next_field().await.map_err(broken)? {
            let name = field.name().unwrap_or_default().to_owned();
            let bytes = bodies::whole(field, &mut held, MOST_PICTURE, broken).await?;
            match name.as_str() {
                "image" | "image[]" => images.push(bytes),
                "mask" if mask.is_some() => return Err(invalid("mask", "several were sent, but a picture has one")),
                "mask" => {
                    let read = move || (image::mask_of_alpha(&bytes, image::Limits::STRANGERS), bytes);
                    let (painted, bytes) = decoding(read).await?;
                    mask = Some(painted.map_err(|error| faulty("mask", &error))?.unwrap_or(bytes));
                }
                _ => {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    // Numbers, lists and switches come as text; what is none of them is text.
                    let value = match name.as_str() {
                        "prompt" | "model" | "size" => Value::String(text),
                        _ => replicate::value(&name, &text)?.unwrap_or(Value::String(text)),
                    };
                    body.insert(name, value);
                }
            }
        }
        let [image] = <[Vec<u8>; 1]>::try_from(images).map_err(|images| match images.len() {
            0 => Problem::invalid("required", "image", "image is required"),
            n => invalid("image", format!("{n} pictures were sent, but FLUX.1 starts from one")),
        })?;
        // Requests that differ in their pictures are different ones.
        let digest = |bytes: &Vec<u8>| hex(&Sha256::digest(bytes));
        body.insert("image".into(), Value::String(digest(&image)));
        body.insert("mask".into(), mask.as_ref().map_or(Value::Null, |mask| Value::String(digest(mask))));
        Ok(Self { image: Some(image), mask, edit: true, ..Self::new(body, Arc::new(held))? })
    }

    /// Lets go of what was sent, megabytes that nobody needs while the answer is held.
    pub(super) fn accepted(&mut self) {
        (self.body, self.image, self.mask, self.held) = (Map::new(), None, None, None);
    }

    /// What is to be accepted.
    pub(in crate::api) async fn submission(
        &self,
        server: &Server,
        caller: &Caller,
        headers: &HeaderMap,
    ) -> Result<Submission, Problem> {
        let body = &self.body;
        let unit = server.unit(self.served.is_dev());
        let defaults = &unit.model.defaults;
        let number = |name: &str, least: f64, most: f64| {
            let read = |value: &Value| value.as_f64().filter(|number| (least..=most).contains(number));
            given(body, name, read, &format!("a number from {least} to {most}"))
        };
        let text = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned).filter(|text| !text.trim().is_empty());
        let prompt = text("prompt").unwrap_or_default();
        if prompt.len() > LONGEST_PROMPT {
            return Err(invalid("prompt", format!("must be at most {LONGEST_PROMPT} bytes")));
        }
        let mut notes = Vec::new();
        let native = (defaults.width, defaults.height);
        let mut size = match text("size").as_deref() {
            None | Some("auto") => (!self.edit).then_some(native),
            Some(size) => Some(sides(size)?),
        };
        if let Some(wanted) = size
            && native.0 * native.1 < 512 * 512
            && wanted.0 * wanted.1 > native.0 * native.1
        {
            let own = near(wanted, native);
            notes.push(format!("{} x {} is beyond this model; it draws {} x {}", wanted.0, wanted.1, own.0, own.1));
            size = Some(own);
        }
        let without_lora = match body.get("on_lora_error") {
            None | Some(Value::Null) => server.without_lora,
            Some(policy) if policy == "base" => true,
            Some(policy) if policy == "fail" => false,
            Some(_) => return Err(invalid("on_lora_error", "must be fail or base")),
        };
        let steps = whole(body, "num_inference_steps", 1, MOST_STEPS)?.map_or(defaults.steps, |steps| steps as usize);
        let loras = self.loras()?;
        let tokens = Tokens { hub: text("hf_api_token"), civitai: text("civitai_api_token") };
        let (image, mask) = (picture(caller, "image", &self.image).await?, picture(caller, "mask", &self.mask).await?);
        let order = Order {
            prompt,
            size,
            steps,
            guidance: number("guidance", 0.0, 100.0)?,
            seed: whole(body, "seed", 0, u64::MAX >> 1)?.unwrap_or_else(generate::random_seed),
            outputs: whole(body, "n", 1, 10)?.unwrap_or(1) as usize,
            format: if self.format == "jpeg" { "jpg".into() } else { self.format.clone() },
            quality: whole(body, "output_compression", 0, 100)?.unwrap_or(100) as usize,
            without_lora,
            fast: false,
            loras,
            prompt_strength: if image.is_some() {
                Some(number("prompt_strength", 1e-6, 1.0)?.unwrap_or(generate::PROMPT_STRENGTH))
            } else {
                None
            },
            image: image.as_ref().map(|sent| sent.origin.clone()),
            mask: mask.as_ref().map(|sent| sent.origin.clone()),
            previews: self.stream && self.partial_images > 0,
            tokens: server.sealed(&tokens)?,
        };
        let (mut pictures, mut files) = ([None, None], Vec::new());
        for (picture, sent) in pictures.iter_mut().zip([image, mask]) {
            if let Some(sent) = sent {
                *picture = sent.picture;
                files.extend(sent.file);
            }
        }
        check_order(unit, &order, pictures).await?;
        let (input, cut) = replicate::shown(self.served, |name| KEYS.contains(&name), body);
        notes.extend(cut);
        Ok(Submission {
            order,
            model: format!("{}/{}", self.served.owner, self.served.name),
            version: self.served.version().into(),
            input,
            notes,
            files,
            held: self.held.clone(),
            within: None,
            webhook: replicate::webhook(body)?,
            idempotency: idempotency(headers, body),
        })
    }

    /// `lora_weights` with `lora_scale`, or `loras`: a list of `{"weights": ..., "scale": ...}`.
    fn loras(&self) -> Result<Vec<OrderedLora>, Problem> {
        let scale = |field: &str, value: Option<&Value>| match value.filter(|value| !value.is_null()) {
            None => Ok(1.0),
            Some(value) => value
                .as_f64()
                .filter(|scale| scale.abs() <= 10.0)
                .ok_or_else(|| invalid(field, "must be a number from -10 to 10")),
        };
        let mut loras = Vec::new();
        match self.body.get("lora_weights") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.trim().is_empty() => {}
            Some(Value::String(text)) => loras.push(OrderedLora::new(text, scale("lora_scale", self.body.get("lora_scale"))?)),
            Some(_) => return Err(invalid("lora_weights", "must be a text")),
        }
        match self.body.get("loras") {
            None | Some(Value::Null) => {}
            Some(Value::Array(list)) => {
                for lora in list {
                    let reference = lora["weights"]
                        .as_str()
                        .ok_or_else(|| invalid("loras", "each must be {\"weights\": ..., \"scale\": ...}"))?;
                    loras.push(OrderedLora::new(reference, scale("loras", lora.get("scale"))?));
                }
            }
            Some(_) => return Err(invalid("loras", "must be a list")),
        }
        if loras.len() > MOST_LORAS {
            return Err(invalid("loras", format!("must be at most {MOST_LORAS}")));
        }
        Ok(loras)
    }
}

/// A picture that was sent, if it is one.
async fn picture(caller: &Caller, field: &str, bytes: &Option<Vec<u8>>) -> Result<Option<Sent>, Problem> {
    let Some(bytes) = bytes.clone() else { return Ok(None) };
    let read = move || (image::decode_picture(&bytes, image::Limits::STRANGERS).map(drop), bytes);
    let (decoded, bytes) = decoding(read).await?;
    decoded.map_err(|error| faulty(field, &error))?;
    Ok(Some(Sent::with(caller, field, bytes)))
}

fn known() -> String {
    ["flux-dev-lora", "flux-dev", "flux-schnell-lora", "flux-schnell"].join(", ")
}

/// The value of a key that may be left out or null; `allowed` says what `read` takes.
fn given<T>(
    body: &Map<String, Value>,
    name: &str,
    read: impl Fn(&Value) -> Option<T>,
    allowed: &str,
) -> Result<Option<T>, Problem> {
    match body.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => read(value).map(Some).ok_or_else(|| invalid(name, format!("must be {allowed}"))),
    }
}

fn boolean(body: &Map<String, Value>, name: &str) -> Result<Option<bool>, Problem> {
    given(body, name, Value::as_bool, "true or false")
}

fn whole(body: &Map<String, Value>, name: &str, least: u64, most: u64) -> Result<Option<u64>, Problem> {
    let read = |value: &Value| value.as_u64().filter(|number| (least..=most).contains(number));
    given(body, name, read, &format!("a whole number from {least} to {most}"))
}

/// `1024x768`: multiples of 16.
fn sides(text: &str) -> Result<(usize, usize), Problem> {
    let wrong = || invalid("size", "must be auto or WIDTHxHEIGHT, both multiples of 16 from 64 to 2048");
    let (width, height) = text.split_once('x').ok_or_else(wrong)?;
    let side = |text: &str| {
        text.parse::<usize>().ok().filter(|side| side % 16 == 0 && (64..=MOST_SIDE).contains(side)).ok_or_else(wrong)
    };
    Ok((side(width)?, side(height)?))
}
