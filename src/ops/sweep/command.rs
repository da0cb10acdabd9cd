//! The command that makes one picture again.

use super::wish::Sweep;
use super::{Axis, Value};
use crate::engine::{LoraMode, NoiseKind};

/// What all pictures have in common, as flags of `darkroom generate`.
pub(super) fn common(sweep: &Sweep) -> Vec<String> {
    sweep.shared.flags()
}

/// Flags that say something of LoRAs, and mean nothing without one.
const OF_LORAS: [&str; 2] = ["--lora-text-scale=", "--lora-blocks="];

/// The command of the picture at these values, on that device and in that number format.
pub(super) fn generate(common: &[String], values: &[(Axis, &Value)], device: &str, dtype: &str) -> String {
    // With their values behind an equals sign: a value may begin with a dash.
    let mut words = vec!["darkroom".to_owned(), "generate".into()];
    let text = |axis| values.iter().find(|(has, _)| *has == axis).map(|(_, value)| value.to_string());
    let factor = text(Axis::LoraScale).and_then(|text| text.parse::<f64>().ok());
    let set = text(Axis::Lora).filter(|text| text != super::wish::NO_LORA);
    for lora in set.iter().flat_map(|set| set.split(super::wish::TOGETHER)) {
        let scaled = match (lora.trim().rsplit_once('@'), factor) {
            (_, None) => lora.trim().to_owned(),
            (Some((reference, scale)), Some(factor)) if scale.trim().parse::<f64>().is_ok() => {
                format!("{reference}@{}", scale.trim().parse::<f64>().unwrap_or(1.) * factor)
            }
            (_, Some(factor)) => format!("{}@{factor}", lora.trim()),
        };
        words.push(format!("--lora={scaled}"));
    }
    for (axis, value) in values {
        match axis {
            Axis::Prompt | Axis::Lora | Axis::LoraScale | Axis::Dtype => {}
            Axis::Strength => words.push(format!("--prompt-strength={value}")),
            other => words.push(format!("--{other}={value}")),
        }
    }
    words.extend([format!("--dtype={dtype}"), format!("--device={device}")]);
    words.extend(common.iter().filter(|flag| set.is_some() || !OF_LORAS.iter().any(|of| flag.starts_with(of))).cloned());
    words.extend(text(Axis::Prompt).into_iter().flat_map(|prompt| ["--".to_owned(), prompt]));
    shell(&words)
}

/// Words as a shell reads them.
#[must_use]
pub fn shell(words: &[String]) -> String {
    // Only a word with a NUL cannot be quoted; no argument has one.
    words.iter().map(|word| shlex::try_quote(word).unwrap_or_default()).collect::<Vec<_>>().join(" ")
}

pub(super) fn mode(mode: LoraMode) -> Option<&'static str> {
    match mode {
        // Fp8 is not for sweeps.
        LoraMode::Auto | LoraMode::Fp8 => None,
        LoraMode::Merge => Some("merge"),
        LoraMode::Branch => Some("branch"),
    }
}

pub(super) fn noise(kind: Option<NoiseKind>) -> Option<&'static str> {
    kind.filter(|kind| *kind != NoiseKind::Cpu).map(crate::ops::generate::noise_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_says_everything_and_survives_the_shell() {
        let text = |text: &str| Value::Text(text.into());
        let values = [
            (Axis::Model, text("pocket")),
            (Axis::Lora, text("a.safetensors@0.5 + b c.safetensors")),
            (Axis::LoraScale, Value::Number(0.5)),
            (Axis::Prompt, text("it's a \"cat\" $HOME")),
            (Axis::Strength, Value::Number(0.25)),
            (Axis::Seed, Value::Whole(7)),
        ];
        let values: Vec<_> = values.iter().map(|(axis, value)| (*axis, value)).collect();
        let common = ["--noise=cuda".to_owned(), "--lora-blocks=double:0-18=1".into()];
        let words = shlex::split(&generate(&common, &values, "metal", "f32")).unwrap();
        let expected = "darkroom|generate|--lora=a.safetensors@0.25|--lora=b c.safetensors@0.5|--model=pocket|--prompt-strength=0.25|\
                        --seed=7|--dtype=f32|--device=metal|--noise=cuda|--lora-blocks=double:0-18=1|--|it's a \"cat\" $HOME";
        assert_eq!(words.join("|"), expected);
        // Without a LoRA nothing is said of one.
        let base: Vec<_> = values.iter().filter(|(axis, _)| !matches!(axis, Axis::Lora | Axis::LoraScale)).copied().collect();
        assert!(!generate(&common, &base, "cpu", "f32").contains("lora"));
    }
}
