//! Which adapters a user asks for, and how strong.

use models::lora::{BLOCKS, Scales, parse_blocks};

use crate::ops::Error;

/// An adapter as asked for, with its strength.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    pub reference: String,
    pub scales: Scales,
}

/// `FILE` or `FILE@SCALE` for each, with one scale for all text encoder parts and one set of block factors, if given.
pub fn parse(texts: &[String], text_scale: Option<f64>, blocks: Option<&str>) -> Result<Vec<Lora>, Error> {
    let needs = |field, given: bool| {
        if given && texts.is_empty() {
            let hint = "add a LoRA with lora".into();
            return Err(Error::Combination { field, problem: "was given without lora".into(), hint });
        }
        Ok(())
    };
    needs("lora-text-scale", text_scale.is_some())?;
    needs("lora-blocks", blocks.is_some())?;
    if let Some(scale) = text_scale.filter(|scale| !scale.is_finite()) {
        return Err(Error::invalid("lora-text-scale", &scale, "a finite number, such as 0.9"));
    }
    let blocks = blocks.map(|text| {
        parse_blocks(text)
            .map_err(|reason| Error::invalid("lora-blocks", &text, format!("{BLOCKS} numbers or ranges ({reason})")))
    });
    let blocks = blocks.transpose()?;
    texts.iter().map(|text| one(text, text_scale, blocks.as_deref())).collect()
}

fn one(text: &str, text_scale: Option<f64>, blocks: Option<&[f64; BLOCKS]>) -> Result<Lora, Error> {
    // A file's name may have an @ itself: only a number behind the last one is a scale.
    let (reference, scale) = match text.rsplit_once('@').map(|(reference, scale)| (reference, scale.trim().parse::<f64>())) {
        Some((reference, Ok(scale))) => (reference, scale),
        _ => (text, 1.0),
    };
    let mut scales = Scales::uniform(scale);
    scales.text = text_scale.unwrap_or(scale);
    if let Some(blocks) = blocks {
        *scales.blocks = *blocks;
    }
    if !scales.is_finite() {
        return Err(Error::invalid("lora", &text, "a LoRA with a finite scale, such as me.safetensors@0.9"));
    }
    Ok(Lora { reference: reference.into(), scales })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, f64) {
        let lora = parse(&[text.into()], None, None).unwrap().remove(0);
        (lora.reference, lora.scales.model)
    }

    #[test]
    fn a_scale_is_a_number_behind_the_last_at() {
        assert_eq!(parsed("me.safetensors"), ("me.safetensors".into(), 1.0));
        assert_eq!(parsed("me.safetensors@0.9"), ("me.safetensors".into(), 0.9));
        assert_eq!(parsed("a@b/me.safetensors@-1.5"), ("a@b/me.safetensors".into(), -1.5));
        assert_eq!(parsed("a@b/me.safetensors"), ("a@b/me.safetensors".into(), 1.0));
        let text = |scale, blocks| parse(&["x@2".into()], scale, blocks).map(|loras| loras[0].scales.clone());
        assert_eq!(text(Some(0.5), None).unwrap().text, 0.5);
        assert_eq!(text(None, Some("double=0")).unwrap().blocks[18..20], [0.0, 1.0]);
        for (result, part) in [
            (parse(&["x@nan".into()], None, None), "finite"),
            (parse(&["x@inf".into()], None, None), "finite"),
            (parse(&["x".into()], Some(f64::NAN), None), "lora-text-scale is NaN"),
            (parse(&["x".into()], None, Some("1,2")), "57"),
            (parse(&[], Some(1.0), None), "without lora"),
            (parse(&[], None, Some("double=1")), "without lora"),
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains(part) && error.is_usage(), "{error}");
        }
    }
}
