//! The inputs of the served models: one table for checking requests and for the `openapi_schema` that clients read.
//!
//! Names, defaults and ranges are those of Replicate's public models (cog-flux's `predict.py`, 2025-07).

use serde_json::{Map, Value, json};

use crate::ops::AspectRatio;

/// What a field holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Text,
    Uri,
    Secret,
    Bool,
    Integer(Option<(i64, i64)>),
    Number(f64, f64),
    /// One of these texts.
    Choice(&'static [&'static str]),
    /// One of the eleven ratios.
    Ratio,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// JSON; `null` for none.
    pub(super) default: &'static str,
    pub(super) about: &'static str,
}

/// A model as clients name it.
#[derive(Debug, Clone, Copy)]
pub(in crate::api) struct Served {
    pub(in crate::api) owner: &'static str,
    pub(in crate::api) name: &'static str,
    /// The newest version's hash, and others seen in public code.
    pub(super) versions: &'static [&'static str],
    pub(super) about: &'static str,
    pub(super) fields: &'static [Field],
}

const fn field(name: &'static str, kind: Kind, default: &'static str, about: &'static str) -> Field {
    Field { name, kind, default, about }
}

const PROMPT: Field = field("prompt", Kind::Text, "", "Prompt for generated image");
const RATIO: Field = field("aspect_ratio", Kind::Ratio, "\"1:1\"", "Aspect ratio for the generated image");
const IMAGE: Field = field("image", Kind::Uri, "null", "Input image for image to image mode. The output follows its size");
const STRENGTH: Field =
    field("prompt_strength", Kind::Number(0.0, 1.0), "0.8", "Prompt strength when using img2img. 1.0 ignores the image");
const OUTPUTS: Field = field("num_outputs", Kind::Integer(Some((1, 4))), "1", "Number of outputs to generate");
const STEPS_DEV: Field = field("num_inference_steps", Kind::Integer(Some((1, 50))), "28", "Number of denoising steps");
const STEPS_SCHNELL: Field = field("num_inference_steps", Kind::Integer(Some((1, 4))), "4", "Number of denoising steps");
const GUIDANCE: Field = field("guidance", Kind::Number(0.0, 10.0), "3", "Guidance for generated image");
const SEED: Field = field("seed", Kind::Integer(None), "null", "Random seed. Set for reproducible generation");
const FORMAT: Field = field("output_format", Kind::Choice(&["webp", "jpg", "png"]), "\"webp\"", "Format of the output images");
const QUALITY: Field =
    field("output_quality", Kind::Integer(Some((0, 100))), "80", "Quality of the output images, from 0 to 100. Not used for png");
const SAFETY: Field = field("disable_safety_checker", Kind::Bool, "false", "This server has no safety checker");
const FAST: Field = field("go_fast", Kind::Bool, "true", "Run in the faster precision where there is one");
const LORA: Field = field(
    "lora_weights",
    Kind::Text,
    "null",
    "LoRA weights: owner/repo or a link of Hugging Face, a CivitAI link, a trained_model.tar or .safetensors link, a data URI",
);
const LORA_SCALE: Field = field("lora_scale", Kind::Number(-1.0, 3.0), "1", "How strongly the LoRA is applied");
const EXTRA_LORA: Field = field("extra_lora", Kind::Text, "null", "A second LoRA");
const EXTRA_SCALE: Field = field("extra_lora_scale", Kind::Number(-1.0, 3.0), "1", "How strongly the second LoRA is applied");
const MEGAPIXELS: Field = field("megapixels", Kind::Choice(&["1", "0.25"]), "\"1\"", "Approximate number of megapixels");
const HF_TOKEN: Field = field("hf_api_token", Kind::Secret, "null", "Token for private LoRAs on Hugging Face");
const CIVITAI_TOKEN: Field = field("civitai_api_token", Kind::Secret, "null", "Token for LoRAs on CivitAI");

/// Ours, beside what the models publish: what to do when a LoRA cannot be used.
pub(super) const POLICY: Field =
    field("on_lora_error", Kind::Choice(&["fail", "base"]), "null", "fail, or base: the base model's picture with a warning");

pub(super) const MODELS: &[Served] = &[
    Served {
        owner: "black-forest-labs",
        name: "flux-dev-lora",
        versions: &[
            "a53fd9255ecba80d99eaab4706c698f861fd47b098012607557385416e46aae5",
            "3801e1cc99d3a8cb01acfe564afc1ddec782e0f8248ab965906096f76c2bf3c4",
        ],
        about: "FLUX.1 dev with LoRAs",
        fields: &[
            PROMPT,
            RATIO,
            IMAGE,
            STRENGTH,
            OUTPUTS,
            STEPS_DEV,
            GUIDANCE,
            SEED,
            FORMAT,
            QUALITY,
            SAFETY,
            FAST,
            LORA,
            LORA_SCALE,
            EXTRA_LORA,
            EXTRA_SCALE,
            MEGAPIXELS,
            HF_TOKEN,
            CIVITAI_TOKEN,
        ],
    },
    Served {
        owner: "black-forest-labs",
        name: "flux-dev",
        versions: &["6e4a938f85952bdabcc15aa329178c4d681c52bf25a0342403287dc26944661d"],
        about: "FLUX.1 dev",
        fields: &[PROMPT, RATIO, IMAGE, STRENGTH, OUTPUTS, STEPS_DEV, GUIDANCE, SEED, FORMAT, QUALITY, SAFETY, FAST, MEGAPIXELS],
    },
    Served {
        owner: "black-forest-labs",
        name: "flux-schnell-lora",
        versions: &["8496fec17d5ef684e668d79bf6dc1369927417808ed3505891b063367aebffef"],
        about: "FLUX.1 schnell with LoRAs",
        fields: &[PROMPT, RATIO, OUTPUTS, STEPS_SCHNELL, SEED, FORMAT, QUALITY, SAFETY, FAST, LORA, LORA_SCALE, MEGAPIXELS],
    },
    Served {
        owner: "black-forest-labs",
        name: "flux-schnell",
        // The published one is known by its beginning only; the rest is ours.
        versions: &["c846a69991daf4c0e5d016514849d14ee5b2e6846ce6b9d6f21369e564cfe51e"],
        about: "FLUX.1 schnell",
        fields: &[PROMPT, RATIO, OUTPUTS, STEPS_SCHNELL, SEED, FORMAT, QUALITY, SAFETY, FAST, MEGAPIXELS],
    },
    Served {
        owner: "lucataco",
        name: "flux-dev-lora",
        versions: &[
            "091495765fa5ef2725a175a57b276ec30dc9d39c22d30410f2ede68a3eab66b3",
            "a22c463f11808638ad5e2ebd582e07a469031f48dd567366fb4c6fdab91d614d",
        ],
        about: "FLUX.1 dev with a LoRA of Hugging Face",
        fields: &[
            PROMPT,
            RATIO,
            IMAGE,
            STRENGTH,
            OUTPUTS,
            STEPS_DEV,
            field("guidance_scale", Kind::Number(0.0, 10.0), "3.5", "Guidance scale"),
            SEED,
            FORMAT,
            QUALITY,
            field("hf_lora", Kind::Text, "null", "Hugging Face repository, link or trained_model.tar of a LoRA"),
            field("lora_scale", Kind::Number(0.0, 1.0), "0.8", "How strongly the LoRA is applied"),
            SAFETY,
        ],
    },
];

impl Served {
    /// By `owner/name`.
    pub(in crate::api) fn named(owner: &str, name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.owner == owner && model.name == name)
    }

    /// What a request's `version` means: a hash, `owner/name`, or `owner/name:hash` (of which the hash is not looked at: public code
    /// holds many).
    pub(super) fn of_version(version: &str) -> Option<&'static Self> {
        let name = version.split(':').next().unwrap_or(version);
        match name.split_once('/') {
            Some((owner, name)) if !version.ends_with(":latest") => Self::named(owner, name),
            Some(_) => None,
            None => MODELS.iter().find(|model| model.versions.contains(&version)),
        }
    }

    /// Whether it takes guidance, as dev does and schnell does not.
    pub(in crate::api) fn is_dev(&self) -> bool {
        self.fields.iter().any(|field| field.name.starts_with("guidance"))
    }

    pub(in crate::api) fn version(&self) -> &'static str {
        self.versions[0]
    }

    /// As Cog describes a model.
    pub(in crate::api) fn openapi(&self) -> Value {
        let mut properties = Map::new();
        let mut schemas = Map::new();
        for (order, field) in self.fields.iter().enumerate() {
            let mut property = Map::from_iter([
                ("x-order".into(), json!(order)),
                ("title".into(), json!(title(field.name))),
                ("description".into(), json!(field.about)),
            ]);
            let mut set = |key: &str, value: Value| drop(property.insert(key.into(), value));
            match field.kind {
                Kind::Text => set("type", json!("string")),
                Kind::Uri => {
                    set("type", json!("string"));
                    set("format", json!("uri"));
                }
                Kind::Secret => {
                    set("type", json!("string"));
                    set("format", json!("password"));
                    set("writeOnly", json!(true));
                    set("x-cog-secret", json!(true));
                }
                Kind::Bool => set("type", json!("boolean")),
                Kind::Integer(range) => {
                    set("type", json!("integer"));
                    if let Some((least, most)) = range {
                        set("minimum", json!(least));
                        set("maximum", json!(most));
                    }
                }
                Kind::Number(least, most) => {
                    set("type", json!("number"));
                    set("minimum", json!(least));
                    set("maximum", json!(most));
                }
                Kind::Choice(_) | Kind::Ratio => {
                    set("allOf", json!([{ "$ref": format!("#/components/schemas/{}", field.name) }]));
                    let choices = json!({
                        "enum": field.choices(),
                        "type": "string",
                        "title": field.name,
                        "description": "An enumeration."
                    });
                    schemas.insert(field.name.into(), choices);
                }
            }
            match field.default {
                "" => {}
                "null" => set("nullable", json!(true)),
                default => set("default", serde_json::from_str(default).unwrap_or(Value::Null)),
            }
            properties.insert(field.name.into(), Value::Object(property));
        }
        let input = json!({ "type": "object", "title": "Input", "required": ["prompt"], "properties": properties });
        schemas.insert("Input".into(), input);
        let output = json!({ "type": "array", "items": { "type": "string", "format": "uri" }, "title": "Output" });
        schemas.insert("Output".into(), output);
        json!({ "openapi": "3.0.2", "info": { "title": "Cog", "version": "0.1.0" }, "paths": {}, "components": { "schemas": schemas } })
    }
}

impl Field {
    /// The texts that a choice allows.
    pub(super) fn choices(&self) -> Vec<&'static str> {
        match self.kind {
            Kind::Choice(choices) => choices.to_vec(),
            Kind::Ratio => AspectRatio::ALL.iter().map(|ratio| ratio.name).collect(),
            _ => Vec::new(),
        }
    }
}

/// `num_outputs` as "Num Outputs".
fn title(name: &str) -> String {
    let word = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').map(word).collect::<Vec<_>>().join(" ")
}
