//! What a picture says about how it was made.

/// The text that A1111, Forge, Civitai and most viewers read.
pub const PARAMETERS_KEY: &str = "parameters";

/// Our own chunk: JSON with the exact settings.
pub const JSON_KEY: &str = "darkroom";

/// Settings in the two forms that are written: as text chunks of a PNG, in the EXIF block of JPEG and WebP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Program and version.
    pub software: String,
    /// The prompt, a line `Negative prompt: ...` if there is one, and a line of `Key: value` pairs.
    pub parameters: String,
    pub json: String,
}

impl Metadata {
    /// `settings` in the order in which they shall be read; the format is recognised from three pairs on.
    #[must_use]
    pub fn new(software: &str, prompt: &str, negative: Option<&str>, settings: &[(&str, String)], json: String) -> Self {
        let mut parameters = prompt.trim().to_owned();
        if let Some(negative) = negative.filter(|negative| !negative.is_empty()) {
            parameters.push_str("\nNegative prompt: ");
            parameters.push_str(negative.trim());
        }
        let pairs: Vec<_> = settings.iter().map(|(key, value)| format!("{key}: {}", quoted(value))).collect();
        parameters.push('\n');
        parameters.push_str(&pairs.join(", "));
        Self { software: software.into(), parameters, json }
    }
}

/// As a JSON string where the value would break the line of pairs.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n']) { serde_json::Value::from(value).to_string() } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_line_quotes_what_would_break_it() {
        let settings = [("Steps", "4".to_owned()), ("Size", "64x32".to_owned()), ("Model", "a, b: c".to_owned())];
        let metadata = Metadata::new("darkroom 1", "a cat\nin a hat\n", Some("dogs"), &settings, "{}".into());
        let expected = "a cat\nin a hat\nNegative prompt: dogs\nSteps: 4, Size: 64x32, Model: \"a, b: c\"";
        assert_eq!(metadata.parameters, expected);
    }

    #[test]
    fn no_negative_prompt_no_line() {
        let settings = [("Steps", "4".to_owned())];
        assert_eq!(Metadata::new("", "x", Some(""), &settings, String::new()).parameters, "x\nSteps: 4");
        assert_eq!(Metadata::new("", "x", None, &settings, String::new()).parameters, "x\nSteps: 4");
    }
}
