//! How strongly an adapter acts, and where.

use super::modules::{DOUBLE_BLOCKS as DOUBLE, Module, SINGLE_BLOCKS as SINGLE};
use crate::weights::Component;

/// Double blocks, then single ones.
pub const BLOCKS: usize = DOUBLE + SINGLE;

/// Scales of one adapter: for the transformer, the text encoders, and each block.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    pub model: f64,
    pub text: f64,
    /// A factor for each double block, then for each single block; 1 unless stated.
    pub blocks: Box<[f64; BLOCKS]>,
}

impl Scales {
    /// The same scale everywhere.
    #[must_use]
    pub fn uniform(scale: f64) -> Self {
        Self { model: scale, text: scale, blocks: Box::new([1.; BLOCKS]) }
    }

    /// The scale for one module.
    #[must_use]
    pub fn of(&self, module: &Module) -> f64 {
        if module.component != Component::Transformer {
            return self.text;
        }
        let block = |prefix: &str| module.name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        let index = block("double_blocks.").or_else(|| block("single_blocks.").map(|i| DOUBLE + i));
        self.model * index.and_then(|i| self.blocks.get(i)).unwrap_or(&1.)
    }

    /// All scales are numbers.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.model.is_finite() && self.text.is_finite() && self.blocks.iter().all(|factor| factor.is_finite())
    }
}

/// Factors of the blocks from text: 57 numbers (19 double blocks, then 38 single ones), or ranges such as
/// `double:0-18=1,single:20-37=0.5`; blocks that are not named keep 1. The error says what is wrong.
pub fn parse_blocks(text: &str) -> Result<Box<[f64; BLOCKS]>, String> {
    let number =
        |text: &str| text.trim().parse::<f64>().ok().filter(|v| v.is_finite()).ok_or_else(|| format!("`{text}` is no number"));
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if !text.contains('=') {
        let numbers = parts.iter().map(|part| number(part)).collect::<Result<Vec<_>, _>>()?;
        return numbers.try_into().map(Box::new).map_err(|numbers: Vec<f64>| {
            format!("{} numbers, but FLUX.1 has {BLOCKS} blocks: {DOUBLE} double, then {SINGLE} single", numbers.len())
        });
    }
    let mut blocks = Box::new([1.; BLOCKS]);
    for part in parts {
        let (range, factor) = part.split_once('=').ok_or_else(|| format!("`{part}` is not of the form double:0-18=1"))?;
        let (kind, range) = range.split_once(':').unwrap_or((range, ""));
        let (before, count) = match kind.trim() {
            "double" => (0, DOUBLE),
            "single" => (DOUBLE, SINGLE),
            other => return Err(format!("`{other}` is neither double nor single")),
        };
        let index = |text: &str| {
            text.trim()
                .parse::<usize>()
                .ok()
                .filter(|i| *i < count)
                .ok_or_else(|| format!("`{text}` is none of the {kind} blocks 0 to {}", count - 1))
        };
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (index(first)?, index(last)?),
            None if range.is_empty() => (0, count - 1),
            None => (index(range)?, index(range)?),
        };
        if first > last {
            return Err(format!("`{range}` runs backwards"));
        }
        blocks[before + first..=before + last].fill(number(factor)?);
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::super::modules::Place;
    use super::*;

    #[test]
    fn blocks_by_range_and_by_number() {
        let blocks = parse_blocks("double:0-2=0.5, single:37=2,single:0-1=0").unwrap();
        assert_eq!((blocks[2], blocks[3], blocks[19], blocks[20], blocks[21], blocks[56]), (0.5, 1., 0., 0., 1., 2.));
        assert_eq!(parse_blocks("double=0.25").unwrap()[..20], [vec![0.25; 19], vec![1.]].concat());
        let numbers: Vec<String> = (0..57).map(|i| i.to_string()).collect();
        assert_eq!(parse_blocks(&numbers.join(",")).unwrap()[56], 56.);
        for (text, part) in [
            ("1,2", "57 blocks"),
            ("double:0-19=1", "0 to 18"),
            ("triple:1=1", "neither"),
            ("double:1=x", "no number"),
            ("single:3-1=1", "backwards"),
            ("double:1=NaN", "no number"),
        ] {
            assert!(parse_blocks(text).unwrap_err().contains(part), "{text}");
        }
    }

    #[test]
    fn a_module_gets_its_blocks_scale() {
        let mut scales = Scales { model: 2., text: 0.5, ..Scales::uniform(1.) };
        scales.blocks[19 + 7] = 0.25;
        let of = |component, name: &str| scales.of(&Module { component, name: name.into(), place: Place::Whole });
        assert_eq!(of(Component::Transformer, "single_blocks.7.linear1"), 0.5);
        assert_eq!(of(Component::Transformer, "double_blocks.7.img_mlp.0"), 2.);
        assert_eq!(of(Component::Transformer, "img_in"), 2.);
        assert_eq!(of(Component::T5, "encoder.block.0.layer.0.SelfAttention.q"), 0.5);
    }
}
