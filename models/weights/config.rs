//! A component's `config.json`, where there is one: compared with the weights, and asked for what shapes cannot tell.

use serde_json::Value;

use super::{Component, Error};

/// The settings of one component. Without a file every question is answered with its default.
#[derive(Debug, Clone, Copy)]
pub struct Config<'a> {
    component: Component,
    values: Option<&'a Value>,
}

impl<'a> Config<'a> {
    #[must_use]
    pub fn new(component: Component, values: Option<&'a Value>) -> Self {
        Self { component, values }
    }

    /// Errors if config.json gives `name` and it differs from what the weights show.
    pub fn agree(&self, name: &str, found: usize) -> Result<(), Error> {
        match self.integer(name, found)? {
            said if said == found => Ok(()),
            said => Err(self.contradiction(format!("config.json says {name} is {said}, but the weights have {found}"))),
        }
    }

    /// As [`Self::agree`], for a list.
    pub fn agree_all(&self, name: &str, found: &[usize]) -> Result<(), Error> {
        let read = |value: &'a Value| serde_json::from_value::<Vec<usize>>(value.clone()).ok();
        match self.read(name, read, "a list of whole numbers")? {
            Some(said) if said != found => {
                Err(self.contradiction(format!("config.json says {name} are {said:?}, but the weights have {found:?}")))
            }
            _ => Ok(()),
        }
    }

    /// The whole number `name`, or `default` if config.json is absent or silent.
    pub fn integer(&self, name: &str, default: usize) -> Result<usize, Error> {
        let read = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        self.read(name, read, "a whole number").map(|value| value.unwrap_or(default))
    }

    /// The number `name`, or `default` if config.json is absent or silent.
    pub fn number(&self, name: &str, default: f64) -> Result<f64, Error> {
        self.read(name, Value::as_f64, "a number").map(|value| value.unwrap_or(default))
    }

    /// The text `name`, or `default` if config.json is absent or silent.
    pub fn text(&self, name: &str, default: &'a str) -> Result<&'a str, Error> {
        self.read(name, Value::as_str, "text").map(|value| value.unwrap_or(default))
    }

    /// The error of settings that this engine or these weights cannot follow.
    #[must_use]
    pub fn contradiction(&self, reason: String) -> Error {
        Error::Unsupported { component: self.component, reason }
    }

    fn read<T>(&self, name: &str, read: impl Fn(&'a Value) -> Option<T>, kind: &str) -> Result<Option<T>, Error> {
        match self.values.and_then(|values| values.get(name)) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.contradiction(format!("config.json says {name} is {value}, which is not {kind}"))),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_settings_take_their_default_and_wrong_ones_are_named() {
        let file = serde_json::json!({ "width": 8, "eps": 1e-5, "act": "gelu", "none": null });
        let config = Config::new(Component::Clip, Some(&file));
        assert_eq!(config.integer("width", 4).unwrap(), 8);
        assert_eq!(config.integer("none", 4).unwrap(), 4);
        assert_eq!(config.number("eps", 0.0).unwrap(), 1e-5);
        assert_eq!(config.text("act", "").unwrap(), "gelu");
        assert_eq!(Config::new(Component::Clip, None).integer("width", 4).unwrap(), 4);
        config.agree("width", 8).unwrap();
        assert!(config.agree("width", 4).unwrap_err().to_string().contains("width is 8, but the weights have 4"));
        assert!(config.integer("act", 0).unwrap_err().to_string().contains("not a whole number"));
    }
}
