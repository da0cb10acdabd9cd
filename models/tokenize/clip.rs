//! CLIP's byte-level tokenizer from `vocab.json` and `merges.txt`, put together as transformers' `tokenization_clip.py` does, or
//! from a `tokenizer.json` as it stands.

use std::collections::HashMap;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::{Vocabulary, bad};
use crate::bundle::{Blob, ClipVocabulary};
use crate::weights::Error;

/// The positions of every published CLIP text encoder.
pub(super) const LENGTH: usize = 77;

const START: &str = "<|startoftext|>";
/// Also FLUX's padding and, for bytes that no token covers, the unknown token.
const END: &str = "<|endoftext|>";

/// What becomes one word: marks, English contractions, letters, one digit, anything else between spaces.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

pub(super) fn vocabulary(files: &ClipVocabulary) -> Result<Vocabulary, Error> {
    let (tokenizer, file) = match files {
        ClipVocabulary::Json(file) => (Tokenizer::from_bytes(file.read()?).map_err(|e| bad(file, &*e))?, file),
        ClipVocabulary::VocabMerges { vocab, merges } => {
            let tokens: HashMap<String, u32> = serde_json::from_slice(&vocab.read()?).map_err(|e| bad(vocab, &e))?;
            (build(tokens, pairs(merges)?).map_err(|e| bad(vocab, &*e))?, vocab)
        }
    };
    Vocabulary::new(tokenizer, file, END, END)
}

/// The merges of merges.txt: a version line, then two words to a line.
fn pairs(file: &Blob) -> Result<Vec<(String, String)>, Error> {
    let text = String::from_utf8(file.read()?).map_err(|e| bad(file, &e))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with("#version"));
    lines
        .map(|line| match line.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok((left.into(), right.into())),
            _ => Err(bad(file, &format!("{line:?} is not two words"))),
        })
        .collect()
}

fn build(tokens: HashMap<String, u32>, merges: Vec<(String, String)>) -> tokenizers::Result<Tokenizer> {
    let id = |mark: &str| tokens.get(mark).copied().ok_or_else(|| format!("has no token {mark}"));
    let marks = RobertaProcessing::new((END.into(), id(END)?), (START.into(), id(START)?));
    let model = BPE::builder()
        .vocab_and_merges(tokens.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .unk_token(END.into())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .build()?;
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?
        .with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), ByteLevel::default().add_prefix_space(false).into()])))
        .with_post_processor(Some(marks.trim_offsets(false).add_prefix_space(false)));
    // transformers finds a typed start mark after lower-casing and a typed end mark before it.
    let mark = |text: &str, normalized| AddedToken::from(text, true).normalized(normalized);
    tokenizer.add_special_tokens([mark(START, true), mark(END, false)])?;
    Ok(tokenizer)
}
