//! What a file says about itself beside its tensors: header texts, and PEFT's `adapter_config.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use regex::Regex;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Error;

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
    /// `None` for an expression that is none, or only one of Python's.
    fn new(text: &str) -> Option<Self> {
        if text.contains(|c: char| r"\^$*+?()[]{}|".contains(c)) {
            return Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).ok().map(Self::Expression);
        }
        Some(Self::Name(text.into()))
    }

    fn fits(&self, name: &str) -> bool {
        match self {
            Self::Name(end) => name.strip_suffix(end.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.')),
            Self::Expression(expression) => expression.is_match(name),
        }
    }
}

/// A number for all modules, and others for some: of their patterns the first that fits counts, as for PEFT.
#[derive(Debug, Clone, Default)]
struct Stated {
    all: Option<f64>,
    some: Vec<(Pattern, f64)>,
}

impl Stated {
    fn of(&self, name: &str) -> Option<f64> {
        self.some.iter().find(|(pattern, _)| pattern.fits(name)).map(|(_, number)| *number).or(self.all)
    }
}

/// Alphas that are not stored as tensors.
#[derive(Debug, Clone)]
pub(super) struct Scaling {
    alpha: Stated,
    /// alpha / sqrt(r) instead of alpha / r.
    pub(super) root: bool,
    /// Of PEFT's LoKr alone.
    rank: Option<Stated>,
}

impl Scaling {
    /// The alpha stated for a module, if any. `name` has no prefix, and dots if the file writes them.
    pub(super) fn alpha(&self, name: &str) -> Option<f64> {
        self.alpha.of(name)
    }

    /// What PEFT multiplies a LoKr with of which both sides are whole; elsewhere its alpha means nothing.
    pub(super) fn whole_kronecker(&self, name: &str) -> Option<f64> {
        let rank = self.rank.as_ref()?.of(name).filter(|rank| *rank > 0.)?;
        Some(self.alpha(name)? / rank)
    }
}

/// Largest text of settings that is read, in bytes.
const MOST_SETTINGS: usize = 1 << 20;

/// An object's entries in their order, which `serde_json`'s own objects forget.
#[derive(Debug)]
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// One setting; objects are patterns with their numbers.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Setting {
    Object(Entries),
    Other(Value),
}

/// What PEFT was told to make of an adapter.
#[derive(Debug, Default)]
pub(super) struct Settings {
    said: BTreeMap<String, Setting>,
    /// A component's name stands before each.
    by_component: bool,
}

impl Settings {
    /// diffusers' `lora_adapter_metadata`, else the `adapter_config.json` beside PEFT's `adapter_model.safetensors`, or in its header,
    /// where a fetched one has it. What is there and cannot be read is an error: without it the scale would be another.
    pub(super) fn find(path: &Path, header: &BTreeMap<String, String>) -> Result<Option<Self>, Error> {
        for (key, by_component) in [("lora_adapter_metadata", true), ("adapter_config", false)] {
            if let Some(text) = header.get(key) {
                return Self::parse(path, &format!("the {key} in its header"), text.as_bytes(), by_component).map(Some);
            }
        }
        if path.file_name().is_none_or(|name| name != "adapter_model.safetensors") {
            return Ok(None);
        }
        let path = path.with_file_name("adapter_config.json");
        match std::fs::read(&path) {
            Ok(text) => Self::parse(&path, "it", &text, false).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    fn parse(path: &Path, what: &str, json: &[u8], by_component: bool) -> Result<Self, Error> {
        let length = json.len();
        if length > MOST_SETTINGS {
            let reason = format!("{what} takes {length} bytes, more than the {MOST_SETTINGS} that are read");
            return Err(Error::Limit { path: path.into(), reason });
        }
        // Windows' editors begin a text with a byte order mark.
        let json = json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json);
        let said = serde_json::from_slice(json).map_err(|error| {
            let reason = format!("{what} is no object in JSON ({error}), so its alpha is not known; get or write it anew");
            Error::Damaged { path: path.into(), reason }
        })?;
        Ok(Self { said, by_component })
    }

    fn get(&self, component: &str, name: &str) -> Option<&Setting> {
        let component = if self.by_component { component } else { "" };
        self.said.get(&format!("{component}{name}"))
    }

    /// For one component (`transformer.`, `text_encoder.`).
    pub(super) fn scaling(&self, component: &str) -> Result<Scaling, Error> {
        let value = |name: &str| match self.get(component, name) {
            Some(Setting::Other(value)) => Some(value),
            _ => None,
        };
        let number = |name: &str| value(name).and_then(Value::as_f64);
        let stated = |all: Option<f64>, some: &str| Ok::<_, Error>(Stated { all, some: self.patterns(component, some)? });
        let kronecker = value("peft_type").and_then(Value::as_str) == Some("LOKR");
        Ok(Scaling {
            // PEFT's LoHa and LoKr call it `alpha`.
            alpha: stated(number("lora_alpha").or_else(|| number("alpha")), "alpha_pattern")?,
            root: value("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            rank: if kronecker { Some(stated(number("r"), "rank_pattern")?) } else { None },
        })
    }

    fn patterns(&self, component: &str, name: &str) -> Result<Vec<(Pattern, f64)>, Error> {
        let Some(Setting::Object(Entries(entries))) = self.get(component, name) else { return Ok(Vec::new()) };
        let (mut patterns, mut odd) = (Vec::new(), Vec::new());
        for (text, number) in entries.iter().filter_map(|(text, number)| Some((text, number.as_f64()?))) {
            match Pattern::new(text) {
                Some(pattern) => patterns.push((pattern, number)),
                None => odd.push(text.chars().filter(|c| !c.is_control()).take(LONGEST_SHOWN).collect()),
            }
        }
        if odd.is_empty() {
            return Ok(patterns);
        }
        // Look-around and back references; without them nobody knows which modules get which number.
        let what = format!("an expression in {name} that only Python reads (name the modules there instead)");
        Err(Error::Unsupported { what, keys: odd })
    }
}

/// Characters of a pattern that are shown.
const LONGEST_SHOWN: usize = 100;

/// Longest text of a header that is taken for words or a name, in bytes. Tables of a training's pictures are larger.
const LONGEST_TEXT: usize = 16 << 10;

fn short<'a>(header: &'a BTreeMap<String, String>, key: &str) -> Option<&'a String> {
    header.get(key).filter(|text| text.len() <= LONGEST_TEXT)
}

/// Words that the trainer says call the subject.
pub(super) fn trigger_words(header: &BTreeMap<String, String>) -> Vec<String> {
    const KEYS: [&str; 5] = ["modelspec.trigger_phrase", "trigger_word", "trigger_words", "trigger_phrase", "instance_prompt"];
    let mut words: Vec<String> = Vec::new();
    for text in KEYS.iter().filter_map(|key| short(header, key)) {
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
    let software = short(header, "software").map(|text| {
        let json = serde_json::from_str::<Value>(text).ok();
        json.and_then(|json| json.get("name").and_then(Value::as_str).map(str::to_owned)).unwrap_or_else(|| text.clone())
    });
    let known = |key: &str, name: &str| header.contains_key(key).then(|| name.to_owned());
    let kohya = short(header, "ss_network_module").map(|module| format!("kohya sd-scripts ({module})"));
    let named = short(header, "modelspec.implementation").or(short(header, "ot_version")).cloned();
    software
        .or(kohya)
        .or_else(|| known("lycoris_config", "SimpleTuner (LyCORIS)"))
        .or_else(|| known("lora_adapter_metadata", "diffusers / PEFT"))
        .or(named)
}

/// Which FLUX.1 it was trained on, as far as the header says so.
pub(super) fn base(header: &BTreeMap<String, String>) -> Base {
    let texts = ["ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model"];
    for text in texts.iter().filter_map(|key| short(header, key)).map(|text| text.to_ascii_lowercase()) {
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
        let settings = Settings::find(Path::new("a.safetensors"), &header).unwrap().unwrap();
        let scaling = settings.scaling("transformer.").unwrap();
        assert!(scaling.root);
        assert_eq!(scaling.alpha("single_transformer_blocks.0.proj_out"), Some(4.));
        assert_eq!(scaling.alpha("transformer_blocks.3.attn.to_q"), Some(2.));
        assert_eq!(scaling.alpha("transformer_blocks.3.attn.to_k"), Some(8.));
        assert_eq!(settings.scaling("text_encoder.").unwrap().alpha("x"), Some(32.));
        assert_eq!(scaled(r#"{"lora_alpha": 5}"#).unwrap().alpha("x"), Some(5.));
        assert_eq!(Settings::default().scaling("transformer.").unwrap().alpha("x"), None);
        assert!(Settings::find(Path::new("a.safetensors"), &BTreeMap::new()).unwrap().is_none());
    }

    /// With these settings in the header.
    fn scaled(config: &str) -> Result<Scaling, Error> {
        let settings = Settings::find(Path::new("a.safetensors"), &header(&[("adapter_config", config)]))?;
        settings.unwrap().scaling("transformer.")
    }

    #[test]
    fn the_first_pattern_that_fits_counts() {
        for (patterns, first) in [(r#""z.to_q": 16, "to_q": 2"#, 16.), (r#""to_q": 2, "z.to_q": 16"#, 2.)] {
            let scaling = scaled(&format!(r#"{{"lora_alpha": 4, "alpha_pattern": {{{patterns}}}}}"#)).unwrap();
            assert_eq!(
                (scaling.alpha("z.to_q"), scaling.alpha("y.to_q"), scaling.alpha("z.to_k")),
                (Some(first), Some(2.), Some(4.))
            );
        }
    }

    #[test]
    fn patterns_scale_a_whole_lokr_as_well() {
        let text =
            r#"{"peft_type": "LOKR", "r": 8, "alpha": 4, "alpha_pattern": {"a": 80}, "rank_pattern": {"a": 5, "b": 2, "c": 0}}"#;
        let scaling = scaled(text).unwrap();
        let factors = ["x.a", "x.b", "x.c", "x.d"].map(|name| scaling.whole_kronecker(name));
        assert_eq!(factors, [Some(16.), Some(2.), None, Some(0.5)]);
        assert_eq!(scaled(&text.replace("LOKR", "LORA")).unwrap().whole_kronecker("x.a"), None);
    }

    #[test]
    fn settings_that_cannot_be_read_are_an_error() {
        for text in ["{not json", "[]", "", r#"{"lora_alpha": NaN}"#] {
            let error = scaled(text).unwrap_err();
            assert!(error.code() == "damaged" && error.to_string().contains("adapter_config"), "{text}: {error}");
        }
        let error = scaled(r#"{"lora_alpha": 4, "alpha_pattern": {"to_k": 1, "(?!single_).*to_q": 16}}"#).unwrap_err();
        assert!(error.code() == "unsupported" && error.to_string().contains("(?!single_).*to_q"), "{error}");
        assert_eq!(scaled(&" ".repeat(MOST_SETTINGS + 1)).unwrap_err().code(), "over_limit");
        // A byte order mark is none of it; and no others read a rank_pattern.
        let marked = scaled("\u{feff}{\"lora_alpha\": 4, \"rank_pattern\": {\"(\": 1}}").unwrap();
        assert_eq!(marked.alpha("x"), Some(4.));
        let folder = tempfile::tempdir().unwrap();
        let (path, beside) = (folder.path().join("adapter_model.safetensors"), folder.path().join("adapter_config.json"));
        assert!(Settings::find(&path, &BTreeMap::new()).unwrap().is_none());
        std::fs::write(&beside, b"\xef\xbb\xbf{\"lora_alpha\": 8}").unwrap();
        let alpha = |path: &Path| Settings::find(path, &BTreeMap::new())?.unwrap_or_default().scaling("").map(|s| s.alpha("x"));
        assert_eq!(alpha(&path).unwrap(), Some(8.));
        std::fs::write(&beside, b"{").unwrap();
        assert!(alpha(&path).unwrap_err().to_string().contains("adapter_config.json is damaged"));
        assert_eq!(alpha(&folder.path().join("other.safetensors")).unwrap(), None);
    }

    #[test]
    fn patterns_mean_what_they_mean_to_peft() {
        let fits = |pattern: &str, name: &str| Pattern::new(pattern).unwrap().fits(name);
        assert!(fits("to_q", "transformer_blocks.1.attn.to_q") && fits("to_q", "to_q"));
        // Only whole parts of a name: a flattened comparison would take these for the same.
        assert!(!fits("transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.attn.to_q"));
        assert!(!fits("q", "transformer_blocks.1.attn.to_q") && !fits("out.0", "transformer_blocks.1.attn.to_out.0"));
        assert!(fits("^proj_out", "proj_out") && !fits("^proj_out", "single_transformer_blocks.1.proj_out"));
        assert!(fits(r"transformer_blocks\.\d+\.attn\.to_[qk]", "transformer_blocks.11.attn.to_k"));
        assert!(!fits(r"transformer_blocks\.\d+\.attn\.to_[qk]", "single_transformer_blocks.11.attn.to_k"));
        assert!(fits("a|b", "x.b") && !fits("a|b", "x.b.c"));
        assert!(Pattern::new("(").is_none() && Pattern::new("(?=to_q)").is_none());
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
        assert_eq!(trigger_words(&header(&[("trigger_words", "a,".repeat(LONGEST_TEXT).as_str())])), [""; 0]);
    }
}
