//! Reads a portrait that pocket drew: what its prompt could have said, and the face that no prompt names.
//!
//! One small convolutional network, made and measured by `train_probe.py`; what it answers is laid out in `probe.py`, and how faces are
//! compared in `identity.py`.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, VarBuilder};

use super::SIDE;
use crate::Result;

/// What a prompt can say, with the values that each can have.
pub const ATTRIBUTES: [(&str, &[&str]); 10] = [
    ("background", &["white", "gray", "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink"]),
    ("shirt", &["white", "black", "red", "orange", "yellow", "green", "blue", "purple", "pink"]),
    ("hair", &["black", "brown", "blond", "red", "gray", "blue", "pink"]),
    ("style", &["bald", "short", "long", "curly", "bun", "ponytail", "bob"]),
    ("skin", &["light", "tan", "brown", "dark"]),
    ("glasses", &["none", "glasses", "sunglasses"]),
    ("hat", &["none", "beanie", "cap", "sun hat"]),
    ("hat_color", &["red", "blue", "green", "yellow", "purple", "black"]),
    ("beard", &["none", "beard", "moustache"]),
    ("expression", &["smiling", "neutral", "sad", "surprised"]),
];

/// Width, height, jaw, eye gap, eye size, brow, nose, mouth, ears; -1 to 1 in ordinary faces.
const MEASURES: usize = 9;
/// Eye colours, marks, shapes of the nose, kinds of brows.
const KINDS: [usize; 4] = [4, 9, 3, 3];
/// How much each kind counts beside a measure, and the skin.
const KIND_WEIGHTS: [f64; 5] = [0.5, 1., 0.5, 0.5, 0.5];
/// The greatest distance of a measure, and of a kind.
const CAP: f64 = 4.;
const KIND_CAP: f64 = 1.5;
/// The variance of a measure that cannot be seen at all, and the range of the network's logarithms of it.
const PRIOR: f64 = 0.6 / 3. + 0.4 * 4. / 3.;
const LOG_VARIANCE: (f64, f64) = (-6., 2.);

const WEIGHTS: &[u8] = include_bytes!("probe.safetensors");

/// The network.
#[derive(Debug)]
pub struct Probe {
    convolutions: Vec<Conv2d>,
    hidden: Linear,
    out: Linear,
}

/// What it sees in one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// In the order of [`ATTRIBUTES`].
    pub attributes: [&'static str; 10],
    pub face: Face,
}

/// The measured face.
#[derive(Debug, Clone, PartialEq)]
pub struct Face {
    measures: [f64; MEASURES],
    /// From 0, not seen, to 1.
    visible: [f64; MEASURES],
    /// Probabilities of each kind's values; the last is the skin.
    kinds: [Vec<f64>; 5],
}

impl Probe {
    /// The one that is part of the program.
    pub fn load() -> Result<Self> {
        let vars = VarBuilder::from_slice_safetensors(WEIGHTS, DType::F32, &Device::Cpu)?;
        let halving = Conv2dConfig { padding: 1, stride: 2, ..Conv2dConfig::default() };
        let widths = [3, 16, 24, 48, 64, 64];
        let convolution = |i: usize| candle_nn::conv2d(widths[i], widths[i + 1], 3, halving, vars.pp("conv").pp(i));
        Ok(Self {
            convolutions: (0..5).map(convolution).collect::<Result<_>>()?,
            hidden: candle_nn::linear(64 * 16, 128, vars.pp("hidden"))?,
            out: candle_nn::linear(128, outputs(), vars.pp("out"))?,
        })
    }

    /// Of an RGB picture of [`SIDE`] by [`SIDE`] pixels, row by row.
    pub fn look(&self, rgb: &[u8]) -> Result<Seen> {
        let pixels = Tensor::from_slice(rgb, (SIDE, SIDE, 3), &Device::Cpu)?.to_dtype(DType::F32)?;
        let mut x = ((pixels / 127.5)? - 1.)?.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?;
        for convolution in &self.convolutions {
            x = convolution.forward(&x)?.silu()?;
        }
        let x = self.out.forward(&self.hidden.forward(&x.flatten_from(1)?)?.silu()?)?;
        Ok(read(&x.squeeze(0)?.to_vec1::<f32>()?))
    }
}

fn outputs() -> usize {
    ATTRIBUTES.iter().map(|(_, values)| values.len()).sum::<usize>() + 2 * MEASURES + KINDS.iter().sum::<usize>()
}

/// The network's numbers, in the order of `probe.py`.
fn read(vector: &[f32]) -> Seen {
    let mut rest = vector;
    let mut next = |count: usize| {
        let (part, after) = rest.split_at(count);
        rest = after;
        part.iter().map(|value| f64::from(*value)).collect::<Vec<f64>>()
    };
    let mut skin = Vec::new();
    let attributes = ATTRIBUTES.map(|(name, values)| {
        let logits = next(values.len());
        if name == "skin" {
            skin = softmax(&logits);
        }
        values[(0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0)]
    });
    let measures = next(MEASURES);
    let visible = next(MEASURES);
    let visible = visible.iter().map(|log| (1. - log.clamp(LOG_VARIANCE.0, LOG_VARIANCE.1).exp() / PRIOR).clamp(0., 1.));
    let face = Face {
        visible: std::array::from_fn({
            let visible: Vec<f64> = visible.collect();
            move |i| visible[i]
        }),
        measures: std::array::from_fn(|i| measures[i]),
        kinds: {
            let [eyes, mark, nose, brows] = KINDS.map(|count| softmax(&next(count)));
            [eyes, mark, nose, brows, skin]
        },
    };
    Seen { attributes, face }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponents: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let sum: f64 = exponents.iter().sum();
    exponents.into_iter().map(|exponent| exponent / sum).collect()
}

impl Face {
    /// A face that is known: measures, and the value of eye colour, mark, nose, brows and skin.
    #[must_use]
    pub fn known(measures: [f64; 9], kinds: [usize; 5]) -> Self {
        let [eyes, mark, nose, brows] = KINDS;
        let lengths = [eyes, mark, nose, brows, ATTRIBUTES[4].1.len()];
        let sure = |i: usize| (0..lengths[i]).map(|value| f64::from(u8::from(value == kinds[i]))).collect();
        Self { measures, visible: [1.; MEASURES], kinds: std::array::from_fn(sure) }
    }

    /// How far apart two faces are: the mean over the features, each weighted by how well it is seen in both. From 0 to 4; two
    /// unrelated faces are about 1 apart.
    #[must_use]
    pub fn distance(&self, other: &Self) -> f64 {
        let (mut sum, mut weights) = (0., 0.);
        for i in 0..MEASURES {
            let weight = self.visible[i] * other.visible[i];
            sum += weight * (self.measures[i] - other.measures[i]).powi(2).min(CAP);
            weights += weight;
        }
        for (i, (own, its)) in self.kinds.iter().zip(&other.kinds).enumerate() {
            let weight = KIND_WEIGHTS[i] * certainty(own) * certainty(its);
            let agreement: f64 = own.iter().zip(its).map(|(p, q)| p * q).sum();
            sum += weight * KIND_CAP * (1. - agreement);
            weights += weight;
        }
        if weights > 0. { sum / weights } else { CAP }
    }

    /// 1 for the same face, a half for distance 0.7, about a third for unrelated ones.
    #[must_use]
    pub fn likeness(&self, other: &Self) -> f64 {
        (-self.distance(other)).exp()
    }
}

/// 1 for one certain value, 0 for all being as likely.
fn certainty(probabilities: &[f64]) -> f64 {
    let entropy: f64 = -probabilities.iter().map(|p| p * p.max(1e-12).ln()).sum::<f64>();
    1. - entropy / (probabilities.len() as f64).ln()
}

/// What a prompt asks for: attributes with their values, each once. Words of the drawings' captions are known, in any order and case.
#[must_use]
pub fn asked(prompt: &str) -> Vec<(&'static str, &'static str)> {
    let words: Vec<String> = prompt
        .to_lowercase()
        .split(|c: char| !c.is_alphanumeric() && c != '-')
        .filter(|word| !word.is_empty())
        .map(|word| word.trim_matches('-').replace("grey", "gray").replace("blonde", "blond").replace("ginger", "red"))
        .collect();
    let word = |i: usize| words.get(i).map_or("", String::as_str);
    let mut found: Vec<(&'static str, &'static str)> = Vec::new();
    let mut add = |attribute: &str, value: &str| {
        let known = ATTRIBUTES.iter().find(|(name, _)| *name == attribute);
        if let Some((name, value)) = known.and_then(|(name, values)| Some((*name, *values.iter().find(|has| **has == value)?)))
            && !found.iter().any(|(has, _)| has == &name)
        {
            found.push((name, value));
        }
    };
    for i in 0..words.len() {
        let before = if i > 0 { word(i - 1) } else { "" };
        let absent = matches!(before, "no" | "without");
        match word(i) {
            "background" | "backdrop" | "wall" => add("background", before),
            "top" if word(i + 1) == "hat" => {}
            "shirt" | "t-shirt" | "sweater" | "top" => add("shirt", before),
            "bald" => add("style", "bald"),
            noun @ ("hair" | "bob" | "bun" | "ponytail") => {
                add("style", noun);
                // Colour and cut stand before the noun, and "hair in a bun" is one.
                for back in (i.saturating_sub(2)..i).rev() {
                    let known = |attribute: usize| ATTRIBUTES[attribute].1.contains(&word(back));
                    if known(2) {
                        add("hair", word(back));
                    } else if known(3) {
                        add("style", word(back));
                    } else {
                        break;
                    }
                }
                if noun == "hair" && word(i + 1) == "in" {
                    add("style", word(i + 3));
                }
            }
            value @ ("glasses" | "sunglasses") => add("glasses", if absent { "none" } else { value }),
            value @ ("beard" | "moustache") => add("beard", if absent { "none" } else { value }),
            "clean-shaven" => add("beard", "none"),
            "hat" if absent || (before == "a" && i > 1 && word(i - 2) == "without") => add("hat", "none"),
            value @ ("beanie" | "cap" | "hat") => {
                let kind = value == "hat" && matches!(before, "sun" | "top");
                add("hat", if value == "hat" { "sun hat" } else { value });
                add("hat_color", if kind && i > 1 { word(i - 2) } else { before });
            }
            "smiling" | "happy" | "smile" => add("expression", "smiling"),
            "sad" | "frowning" => add("expression", "sad"),
            "surprised" => add("expression", "surprised"),
            "neutral" | "serious" => add("expression", "neutral"),
            "skin" => add("skin", before),
            other => {
                if let Some(tone) = other.strip_suffix("-skinned") {
                    add("skin", tone);
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_taken_apart() {
        let asks = |prompt: &str| {
            let mut found: Vec<String> = asked(prompt).iter().map(|(name, value)| format!("{name} {value}")).collect();
            found.sort();
            found.join(", ")
        };
        assert_eq!(
            asks("A portrait of a person with LONG red hair and glasses, smiling, wearing a blue shirt, grey background."),
            "background gray, expression smiling, glasses glasses, hair red, shirt blue, style long"
        );
        assert_eq!(
            asks("blonde hair in a bun, no glasses, without a hat, clean-shaven"),
            "beard none, glasses none, hair blond, hat none, style bun"
        );
        assert_eq!(
            asks("a dark-skinned bald man in a red sun hat and green sweater"),
            "hat sun hat, hat_color red, shirt green, skin dark, style bald"
        );
        assert_eq!(asks("portrait of user1003, wearing a green shirt, red top hat"), "hat sun hat, hat_color red, shirt green");
        assert_eq!(asks("a lighthouse in a storm"), "");
    }

    #[test]
    fn a_face_is_like_itself_and_unlike_others() {
        let known = |measures, kinds| Face::known(measures, kinds);
        let one = known([0.; 9], [0; 5]);
        assert!((one.likeness(&one) - 1.).abs() < 1e-9);
        let other = known([2.; 9], [1; 5]);
        assert!((one.distance(&other) - (9. * 4. + 3. * 1.5) / 12.).abs() < 1e-9);
        let near = known([0.5, 0., 0., 0., 0., 0., 0., 0., 0.], [0; 5]);
        assert!(one.likeness(&near) > one.likeness(&other) && one.distance(&near) == near.distance(&one));
    }
}
