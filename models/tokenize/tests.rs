use std::path::PathBuf;

use serde::Deserialize;

use super::*;
use crate::bundle::{Blob, ClipVocabulary};

/// One prompt with the ids that transformers and the tokenizers library gave for it in Python.
#[derive(Deserialize)]
struct Row {
    prompt: String,
    clip: Vec<u32>,
    t5: Vec<u32>,
    clip_77: Option<Vec<u32>>,
    t5_512_tail: Option<Vec<u32>>,
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

#[expect(clippy::needless_pass_by_value, reason = "callers make the paths on the spot")]
fn tokenizers(clip: PathBuf, t5: PathBuf) -> Tokenizers {
    let file = |folder: &PathBuf, name| Blob::File(folder.join(name));
    let clip = ClipVocabulary::VocabMerges { vocab: file(&clip, "vocab.json"), merges: file(&clip, "merges.txt") };
    Tokenizers {
        t5: t5::vocabulary(&file(&t5, "tokenizer.json")).unwrap(),
        t5_limit: t5::limit(Some(&file(&t5, "tokenizer_config.json"))).unwrap(),
        clip: clip::vocabulary(&clip).unwrap(),
    }
}

/// Compares every row of a table; returns how many.
fn compare(tokenizers: &Tokenizers, table: &str) -> usize {
    let table: std::collections::BTreeMap<String, Row> =
        serde_json::from_slice(&std::fs::read(fixtures().join("modules").join(table)).unwrap()).unwrap();
    for (name, row) in &table {
        let end = *row.clip.last().unwrap();
        let mut clip = row.clip_77.clone().unwrap_or_else(|| row.clip.clone());
        clip.resize(77, end);
        let got = tokenizers.clip(&row.prompt).unwrap();
        assert_eq!(got.ids, clip, "clip, {name}");
        assert_eq!(got.cut.is_some(), row.clip.len() > 77, "clip, {name}");

        let got = tokenizers.t5(&row.prompt, row.t5.len()).unwrap();
        assert_eq!(got, Tokens { ids: row.t5.clone(), cut: None }, "t5, {name}");
        let got = tokenizers.t5(&row.prompt, 512).unwrap();
        assert_eq!(got.ids.len(), 512);
        assert_eq!(got.cut.is_some(), row.t5.len() > 512, "t5, {name}");
        match &row.t5_512_tail {
            Some(tail) => assert_eq!(&got.ids[504..], tail, "t5, {name}"),
            None => assert!(got.ids[row.t5.len()..].iter().all(|id| *id == 0), "t5, {name}"),
        }
    }
    table.len()
}

#[test]
fn ids_equal_transformers_on_tricky_prompts() {
    for model in ["tiny-dev", "tiny-schnell"] {
        let folder = fixtures().join(model);
        let tokenizers = tokenizers(folder.join("tokenizer"), folder.join("tokenizer_2"));
        assert!(compare(&tokenizers, "tokenize_tiny.json") > 20);
        assert_eq!(tokenizers.t5_limit(), Some(if model == "tiny-dev" { 512 } else { 256 }));
    }
}

/// The published tokenizers are not part of this repository: `TOKENIZERS=DIR cargo test -- --ignored real_tokenizers`, where DIR
/// holds FLUX.1-dev's `tokenizer` as `clip` and `tokenizer_2` as `t5`.
#[test]
#[ignore = "needs the published tokenizers in $TOKENIZERS"]
#[expect(clippy::disallowed_methods, reason = "the published tokenizers are not in the repository; a person says where they are")]
fn real_tokenizers_equal_transformers() {
    let folder = PathBuf::from(std::env::var_os("TOKENIZERS").expect("TOKENIZERS is set"));
    assert!(compare(&tokenizers(folder.join("clip"), folder.join("t5")), "tokenize_real.json") > 20);
}

#[test]
fn what_is_cut_off_is_told() {
    let folder = fixtures().join("tiny-dev");
    let tokenizers = tokenizers(folder.join("tokenizer"), folder.join("tokenizer_2"));
    let prompt = "a cat sitting on a wooden table, oil painting";
    let whole = tokenizers.t5(prompt, 512).unwrap();
    for length in 1..20 {
        let short = tokenizers.t5(prompt, length).unwrap();
        assert_eq!(short.ids[..length - 1], whole.ids[..length - 1]);
        assert_eq!(short.ids[length - 1], 1, "the end mark stays");
        let cut = short.cut.unwrap();
        assert!(prompt.ends_with(&cut) && !cut.is_empty(), "{cut:?}");
    }
    assert_eq!(tokenizers.t5("a cat", 2).unwrap().cut.as_deref(), Some("cat"));

    // One word whose tokens begin and end inside characters.
    let emoji = "🐱".repeat(77);
    let cut = tokenizers.clip(&emoji).unwrap().cut.unwrap();
    assert!(emoji.ends_with(&cut) && cut.len() < emoji.len());
}

#[test]
fn limits_that_are_not_sane_are_capped() {
    let limit =
        |json: &'static str| t5::limit(Some(&Blob::Embedded { name: "tokenizer_config.json", bytes: json.as_bytes() })).unwrap();
    assert_eq!(limit(r#"{"model_max_length": 256}"#), Some(256));
    assert_eq!(limit(r#"{"model_max_length": 1000000000000000019884624838656}"#), Some(512));
    assert_eq!(limit(r#"{"model_max_length": 77000}"#), Some(512));
    assert_eq!(limit("{}"), None);
    assert_eq!(t5::limit(None).unwrap(), None);
}

#[test]
fn a_tokenizer_without_the_marks_is_refused() {
    let embedded = |name, json: &'static str| Blob::Embedded { name, bytes: json.as_bytes() };
    let vocab = embedded("vocab.json", r#"{"a": 0}"#);
    let merges = embedded("merges.txt", "#version: 0.2\n");
    let e = clip::vocabulary(&ClipVocabulary::VocabMerges { vocab, merges }).unwrap_err();
    assert!(e.to_string().contains("vocab.json") && e.to_string().contains("<|endoftext|>"), "{e}");
    let e = t5::vocabulary(&embedded("tokenizer.json", "<html>")).unwrap_err();
    assert!(e.to_string().starts_with("tokenizer.json"), "{e}");
}
