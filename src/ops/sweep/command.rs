//! The command that makes one picture again.

use super::wish::Sweep;
use super::{Axis, Value};
use crate::engine::{LoraMode, NoiseKind};

/// What all pictures have in common, as flags of `darkroom generate`.
pub(super) fn common(sweep: &Sweep) -> Vec<String> {
    sweep.shared.flags()
}

/// The command of the picture at these values.
pub(super) fn generate(common: &[String], values: &[(Axis, &Value)]) -> String {
    let mut words = vec!["darkroom".to_owned(), "generate".into()];
    let text = |axis| values.iter().find(|(has, _)| *has == axis).map(|(_, value)| value.to_string());
    words.extend(text(Axis::Prompt));
    let factor = text(Axis::LoraScale).and_then(|text| text.parse::<f64>().ok());
    for lora in
        text(Axis::Lora).filter(|text| text != super::wish::NO_LORA).iter().flat_map(|set| set.split(super::wish::TOGETHER))
    {
        let scaled = match (lora.trim().rsplit_once('@'), factor) {
            (_, None) => lora.trim().to_owned(),
            (Some((reference, scale)), Some(factor)) if scale.trim().parse::<f64>().is_ok() => {
                format!("{reference}@{}", scale.trim().parse::<f64>().unwrap_or(1.) * factor)
            }
            (_, Some(factor)) => format!("{}@{factor}", lora.trim()),
        };
        words.extend(["--lora".into(), scaled]);
    }
    for (axis, value) in values {
        let flag = match axis {
            Axis::Prompt | Axis::Lora | Axis::LoraScale => continue,
            Axis::Strength => "--prompt-strength".to_owned(),
            other => format!("--{other}"),
        };
        words.extend([flag, value.to_string()]);
    }
    words.extend(common.iter().cloned());
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
        LoraMode::Auto => None,
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
        let command = generate(&["--noise".into(), "cuda".into()], &values);
        let words = shlex::split(&command).unwrap();
        assert_eq!(words[..3], ["darkroom", "generate", "it's a \"cat\" $HOME"]);
        let rest = words[3..].join("|");
        assert_eq!(
            rest,
            "--lora|a.safetensors@0.25|--lora|b c.safetensors@0.5|--model|pocket|--prompt-strength|0.25|--seed|7|--noise|cuda"
        );
    }
}
