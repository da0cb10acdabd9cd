//! What a file says about itself beside its tensors: header texts, and PEFT's `adapter_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value};

/// FLUX.1 in its two forms; their adapters have the same shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    Dev,
    Schnell,
    Unknown,
}

/// Which modules an entry of PEFT's `alpha_pattern` means: a name or its last parts, with dots, or a regular expression for these.
#[derive(Debug, Clone)]
enum Pattern {
    Name(String),
    Expression(Regex),
}

impl Pattern {
    fn new(text: &str) -> Self {
        let plain = !text.contains(|c: char| r"\^$*+?()[]{}|".contains(c));
        let expression = if plain { None } else { Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).ok() };
        expression.map_or_else(|| Self::Name(text.into()), Self::Expression)
    }

    fn fits(&self, name: &str) -> bool {
        match self {
            Self::Name(end) => name.strip_suffix(end.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.')),
            Self::Expression(expression) => expression.is_match(name),
        }
    }
}

/// Alphas that are not stored as tensors.
#[derive(Debug, Clone, Default)]
pub(super) struct Scaling {
    alpha: Option<f64>,
    patterns: Vec<(Pattern, f64)>,
    /// alpha / sqrt(r) instead of alpha / r.
    pub(super) root: bool,
    /// What PEFT multiplies a LoKr with of which both sides are whole; elsewhere its alpha means nothing.
    pub(super) whole_kronecker: Option<f64>,
}

impl Scaling {
    /// The alpha stated for a module, if any. `name` has no prefix, and dots if the file writes them.
    pub(super) fn alpha(&self, name: &str) -> Option<f64> {
        self.patterns.iter().find(|(pattern, _)| pattern.fits(name)).map(|(_, alpha)| *alpha).or(self.alpha)
    }

    fn read(settings: &Map<String, Value>, component: &str) -> Self {
        let get = |name: &str| settings.get(&format!("{component}{name}"));
        let patterns = get("alpha_pattern").and_then(Value::as_object);
        // PEFT's LoHa and LoKr call it `alpha`.
        let alpha = get("lora_alpha").or_else(|| get("alpha")).and_then(Value::as_f64);
        let kronecker = get("peft_type").and_then(Value::as_str) == Some("LOKR");
        let rank = get("r").and_then(Value::as_f64).filter(|rank| *rank > 0.);
        Self {
            alpha,
            patterns: patterns
                .into_iter()
                .flatten()
                .filter_map(|(text, alpha)| Some((Pattern::new(text), alpha.as_f64()?)))
                .collect(),
            root: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            whole_kronecker: if kronecker { alpha.zip(rank).map(|(alpha, rank)| alpha / rank) } else { None },
        }
    }
}

/// diffusers' `lora_adapter_metadata` for one component (`transformer.`, `text_encoder.`), else `adapter_config.json`.
pub(super) fn scaling(header: &BTreeMap<String, String>, config: Option<&Value>, component: &str) -> Scaling {
    let stated = header.get("lora_adapter_metadata").and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
    match (stated, config.and_then(Value::as_object)) {
        (Some(settings), _) => Scaling::read(&settings, component),
        (None, Some(settings)) => Scaling::read(settings, ""),
        (None, None) => Scaling::default(),
    }
}

/// The `adapter_config.json` beside PEFT's `adapter_model.safetensors`, or in its header, where a fetched one has it.
pub(super) fn adapter_config(path: &Path, header: &BTreeMap<String, String>) -> Option<Value> {
    if let Some(text) = header.get("adapter_config") {
        return serde_json::from_str(text).ok();
    }
    if path.file_name()? != "adapter_model.safetensors" {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path.with_file_name("adapter_config.json")).ok()?).ok()
}

/// Words that the trainer says call the subject.
pub(super) fn trigger_words(header: &BTreeMap<String, String>) -> Vec<String> {
    const KEYS: [&str; 5] = ["modelspec.trigger_phrase", "trigger_word", "trigger_words", "trigger_phrase", "instance_prompt"];
    let mut words: Vec<String> = Vec::new();
    for text in KEYS.iter().filter_map(|key| header.get(*key)) {
        let listed: Vec<String> = serde_json::from_str(text).unwrap_or_else(|_| text.split(',').map(str::to_owned).collect());
        for word in listed.iter().map(|word| word.trim()).filter(|word| !word.is_empty()) {
            if !words.iter().any(|known| known == word) {
                words.push(word.into());
            }
        }
    }
    words
}

/// The program that made the file, as far as it says so.
pub(super) fn trainer(header: &BTreeMap<String, String>) -> Option<String> {
    let software = header.get("software").map(|text| {
        let json = serde_json::from_str::<Value>(text).ok();
        json.and_then(|json| json.get("name").and_then(Value::as_str).map(str::to_owned)).unwrap_or_else(|| text.clone())
    });
    let known = |key: &str, name: &str| header.contains_key(key).then(|| name.to_owned());
    let kohya = header.get("ss_network_module").map(|module| format!("kohya sd-scripts ({module})"));
    let named = header.get("modelspec.implementation").or(header.get("ot_version")).cloned();
    software
        .or(kohya)
        .or_else(|| known("lycoris_config", "SimpleTuner (LyCORIS)"))
        .or_else(|| known("lora_adapter_metadata", "diffusers / PEFT"))
        .or(named)
}

/// Which FLUX.1 it was trained on, as far as the header says so.
pub(super) fn base(header: &BTreeMap<String, String>) -> Base {
    let texts = ["ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model"];
    for text in texts.iter().filter_map(|key| header.get(*key)).map(|text| text.to_ascii_lowercase()) {
        if text.contains("schnell") {
            return Base::Schnell;
        }
        if text.contains("flux") && text.contains("dev") {
            return Base::Dev;
        }
    }
    Base::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn alphas_by_pattern_then_by_component() {
        let text = r#"{"transformer.r": 16, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"single_transformer_blocks.0.proj_out": 4, "to_q": 2},
            "transformer.use_rslora": true, "text_encoder.lora_alpha": 32}"#;
        let header = header(&[("lora_adapter_metadata", text)]);
        let scaling = super::scaling(&header, None, "transformer.");
        assert!(scaling.root);
        assert_eq!(scaling.alpha("single_transformer_blocks.0.proj_out"), Some(4.));
        assert_eq!(scaling.alpha("transformer_blocks.3.attn.to_q"), Some(2.));
        assert_eq!(scaling.alpha("transformer_blocks.3.attn.to_k"), Some(8.));
        assert_eq!(super::scaling(&header, None, "text_encoder.").alpha("x"), Some(32.));
        let config = serde_json::json!({ "lora_alpha": 5 });
        assert_eq!(super::scaling(&BTreeMap::new(), Some(&config), "transformer.").alpha("x"), Some(5.));
        assert_eq!(super::scaling(&BTreeMap::new(), None, "transformer.").alpha("x"), None);
    }

    #[test]
    fn patterns_mean_what_they_mean_to_peft() {
        let fits = |pattern: &str, name: &str| Pattern::new(pattern).fits(name);
        assert!(fits("to_q", "transformer_blocks.1.attn.to_q") && fits("to_q", "to_q"));
        // Only whole parts of a name: a flattened comparison would take these for the same.
        assert!(!fits("transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.attn.to_q"));
        assert!(!fits("q", "transformer_blocks.1.attn.to_q") && !fits("out.0", "transformer_blocks.1.attn.to_out.0"));
        assert!(fits("^proj_out", "proj_out") && !fits("^proj_out", "single_transformer_blocks.1.proj_out"));
        assert!(fits(r"transformer_blocks\.\d+\.attn\.to_[qk]", "transformer_blocks.11.attn.to_k"));
        assert!(!fits(r"transformer_blocks\.\d+\.attn\.to_[qk]", "single_transformer_blocks.11.attn.to_k"));
        assert!(fits("a|b", "x.b") && !fits("a|b", "x.b.c"));
        assert!(!fits("(", "x"));
    }

    #[test]
    fn who_made_it_for_what() {
        assert_eq!(trainer(&header(&[("software", r#"{"name": "ai-toolkit"}"#)])).unwrap(), "ai-toolkit");
        assert!(trainer(&header(&[("ss_network_module", "networks.lora_flux")])).unwrap().contains("kohya"));
        assert_eq!(base(&header(&[("modelspec.architecture", "flux-1-schnell/lora")])), Base::Schnell);
        assert_eq!(base(&header(&[("ss_base_model_version", "flux1-dev")])), Base::Dev);
        assert_eq!(base(&header(&[("format", "pt")])), Base::Unknown);
        assert_eq!(trigger_words(&header(&[("modelspec.trigger_phrase", "ohwx man, TOK")])), ["ohwx man", "TOK"]);
        assert_eq!(trigger_words(&header(&[("trigger_words", r#"["a", "a", "b"]"#)])), ["a", "b"]);
    }
}
