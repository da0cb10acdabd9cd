//! What an adapter file is: for people and, as JSON, for programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::metadata::Base;
use super::modules::Naming;
use super::{Error, keys};

/// Why a file was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refused {
    pub code: &'static str,
    pub reason: String,
}

/// Everything that could be told about a file, whether it can be used or not.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// SHA-256 of the file, in hexadecimal.
    pub digest: String,
    pub bytes: u64,
    pub tensors: usize,
    /// Prefixes as they stand before the modules' names; empty for none.
    pub prefix: Vec<String>,
    pub naming: Vec<Naming>,
    /// `dotted`, `flattened`, or both.
    pub separators: Vec<&'static str>,
    /// Modules by algorithm; `dora` counts those that have a magnitude as well.
    pub algorithms: BTreeMap<&'static str, usize>,
    pub modules_matched: usize,
    /// Modules whose change is zero.
    pub modules_empty: usize,
    pub unmatched_keys: Vec<String>,
    /// Modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Distinct values of alpha; none where the rank stands in.
    pub alphas: Vec<f64>,
    /// Tensors by type.
    pub dtypes: BTreeMap<String, usize>,
    pub text_encoders: Vec<&'static str>,
    pub trigger_words: Vec<String>,
    pub trainer: Option<String>,
    pub base: Option<Base>,
    pub notes: Vec<String>,
    /// What a user of the adapter should be told although it can be used.
    pub warnings: Vec<String>,
    pub refused: Option<Refused>,
}

impl Report {
    pub(super) fn refuse(&mut self, error: &Error) {
        self.refused = Some(Refused { code: error.code(), reason: error.to_string() });
        self.warnings.clear();
    }

    /// Adds the warnings that follow from what was found.
    pub(super) fn warn(&mut self) {
        let mut warnings = Vec::new();
        let (whole, strange): (Vec<&str>, Vec<&str>) =
            self.unmatched_keys.iter().map(String::as_str).partition(|key| keys::is_whole(key));
        if !strange.is_empty() {
            let (count, keys) = (strange.len(), strange.join(", "));
            warnings.push(format!("{count} keys of the LoRA belong to no module of FLUX.1 and have no effect: {keys}"));
        }
        if !whole.is_empty() {
            let (count, keys) = (whole.len(), whole.join(", "));
            warnings.push(format!(
                "{count} keys of the LoRA are whole weights (PEFT's modules_to_save), which are not applied: {keys}"
            ));
        }
        if self.modules_matched > 0 && self.modules_empty == self.modules_matched {
            warnings.push("every change in the LoRA is zero: the picture will be the base model's".into());
        }
        let by_peft = self.prefix.iter().any(|prefix| prefix.contains("base_model"));
        if by_peft && self.alphas.is_empty() && self.algorithms.contains_key("lora") {
            let advice = "give alpha / rank as its scale, or a folder with both files";
            warnings.push(format!(
                "PEFT wrote the LoRA, and no adapter_config.json is with it: alpha is taken to be the rank; else {advice}"
            ));
        }
        warnings.append(&mut self.warnings);
        self.warnings = warnings;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn counts<K: fmt::Display>(of: &BTreeMap<K, usize>) -> String {
            of.iter().map(|(what, count)| format!("{what} x {count}")).collect::<Vec<_>>().join(", ")
        }
        let mut line = |name: &str, text: String| if text.is_empty() { Ok(()) } else { writeln!(f, "{name:<16}{text}") };
        line("digest", self.digest.clone())?;
        line("size", format!("{:.1} MB in {} tensors", self.bytes as f64 / 1e6, self.tensors))?;
        line(
            "names",
            format!("{} {}", self.naming.iter().map(|n| format!("{n:?}").to_lowercase()).collect::<Vec<_>>().join(" and "), {
                let prefixes: Vec<_> = self.prefix.iter().filter(|p| !p.is_empty()).map(|p| format!("`{p}`")).collect();
                if prefixes.is_empty() { String::new() } else { format!("behind {}", prefixes.join(", ")) }
            }),
        )?;
        line("algorithms", counts(&self.algorithms))?;
        line("ranks", counts(&self.ranks))?;
        line("alphas", self.alphas.iter().map(f64::to_string).collect::<Vec<_>>().join(", "))?;
        line("types", counts(&self.dtypes))?;
        line("modules", format!("{} matched, {} of them without effect", self.modules_matched, self.modules_empty))?;
        line("text encoders", self.text_encoders.join(", "))?;
        line("trigger words", self.trigger_words.join(", "))?;
        line("trainer", self.trainer.clone().unwrap_or_default())?;
        line("trained on", self.base.map(|base| format!("{base:?}").to_lowercase()).unwrap_or_default())?;
        // Of a file that can be used a warning names them.
        if self.refused.is_some() {
            line("unmatched", self.unmatched_keys.join(", "))?;
        }
        for note in &self.notes {
            line("note", note.clone())?;
        }
        for warning in &self.warnings {
            line("warning", warning.clone())?;
        }
        line("refused", self.refused.as_ref().map(|r| format!("{} ({})", r.reason, r.code)).unwrap_or_default())
    }
}
