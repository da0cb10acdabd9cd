//! Prompts as the text encoders read them, kept for the next job with the same words.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use models::lora::{Mode, Patches};

use super::Error;

/// Prompts that are kept: 4 MB each for FLUX.1 in 16 bits.
const KEPT: usize = 16;

/// One prompt, encoded.
#[derive(Debug, Clone)]
pub(super) struct Text {
    /// `(1, l_txt, d)` of T5.
    pub(super) txt: Tensor,
    /// `(1, d)` of CLIP.
    pub(super) pooled: Tensor,
    /// Encoder, its limit in tokens, and the text beyond it.
    pub(super) cut: Vec<(&'static str, usize, String)>,
}

/// The last prompts, the last used last. The same words through the same weights give the same numbers, so nothing changes by it but
/// the time.
#[derive(Debug, Default)]
pub(super) struct Encoded(Mutex<Vec<(Key, Text)>>);

/// The words, and what of the text encoders' weights is not the base's: adapters that reach them, and their scales.
#[derive(Debug, Clone, PartialEq)]
struct Key {
    prompt: String,
    adapters: Vec<(String, f64)>,
    mode: Mode,
}

impl Encoded {
    /// The prompt's encoding, by `read` if it is not kept.
    pub(super) fn of(&self, prompt: &str, patches: &Patches, read: impl FnOnce() -> Result<Text, Error>) -> Result<Text, Error> {
        let reaching = patches.live().iter().filter(|selected| !selected.adapter.report.text_encoders.is_empty());
        let adapters = reaching.map(|selected| (selected.adapter.identity().to_owned(), selected.scales.text)).collect();
        // Of the text encoders' weights e4m3 makes nothing.
        let mode = if patches.mode() == Mode::Fp8 { Mode::Auto } else { patches.mode() };
        let key = Key { prompt: prompt.into(), adapters, mode };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = kept.iter().position(|(has, _)| *has == key) {
            let found = kept.remove(i);
            kept.push(found.clone());
            return Ok(found.1);
        }
        let text = read()?;
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((key, text.clone()));
        Ok(text)
    }

    /// So that every prompt is read anew. Whether one was kept.
    pub(super) fn forget(&self) -> bool {
        !std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn the_prompts_that_were_used_last_are_kept() {
        let patches = Patches::new(BTreeMap::new(), &Device::Cpu, DType::F32);
        let (encoded, reads) = (Encoded::default(), std::cell::Cell::new(0f32));
        let of = |prompt: &str| {
            let read = || {
                reads.set(reads.get() + 1.);
                let txt = Tensor::new(&[[[reads.get()]]], &Device::Cpu)?;
                Ok(Text { pooled: txt.squeeze(0)?, txt, cut: Vec::new() })
            };
            encoded.of(prompt, &patches, read).unwrap().txt.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
        };
        assert_eq!((of("a"), of("b"), of("a"), of("A")), (1., 2., 1., 3.));
        // So many others, and what was used last of the first ones is still there.
        for i in 0..KEPT - 3 {
            of(&i.to_string());
        }
        let read = reads.get();
        assert_eq!((of("b"), of("a")), (2., 1.));
        of("one more");
        of("and one");
        assert_eq!((of("b"), of("a"), reads.get()), (2., 1., read + 2.));
        assert_eq!(of("A"), read + 3., "it was used least lately");
        assert!(encoded.forget() && !encoded.forget());
        assert_eq!(of("a"), read + 4.);
    }
}
