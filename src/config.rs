//! What the environment sets, apart from what stands for an option of a command (`DATABASE_URL`): everything is handed a [`Config`].
//!
//! The hub's variables mean what they mean to Python's `huggingface_hub`, so a cache that is already there is used.

use std::env;
use std::fmt;
use std::path::PathBuf;

use kernels::Whose;

/// What an object store is told of the environment.
const STORE: &[&str] = &[
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ALLOW_HTTP",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    #[must_use]
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself: for the request that needs it, never for a message.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The model hub.
#[derive(Debug, Clone)]
pub struct Hub {
    /// `HF_ENDPOINT`, or the public hub.
    pub endpoint: String,
    /// `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `token` in the hub's home.
    pub token: Option<Secret>,
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE`: nothing is fetched.
    pub offline: bool,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub hub: Hub,
    /// `CIVITAI_API_TOKEN`.
    pub civitai_token: Option<Secret>,
    /// `AWS_...`, for `s3://` references: keys, region, endpoint.
    pub store: Vec<(String, Secret)>,
    /// `DARKROOM_PRIVATE_URLS`: links to LoRAs may be http and lead into one's own network.
    pub private_urls: bool,
    /// `DARKROOM_LORA_CACHE_GB`: how much fetched LoRAs may take of the disk; 20 if not set.
    pub lora_cache_bytes: u64,
    /// `DARKROOM_KERNELS=fused` or `plain`: kernels of our own on CUDA, or candle's operations; if not set, ours where they have been right.
    pub fused_kernels: Option<bool>,
    /// `DARKROOM_ATTENTION=own` or `cudnn`: with them, whose attention; if not set, the faster one, timed once on each card.
    pub attention: Option<Whose>,
    /// `DARKROOM_CONVOLUTION`: the same of the autoencoder's convolutions.
    pub convolution: Option<Whose>,
    /// Our own cache, which may be deleted at any time: `$XDG_CACHE_HOME/darkroom`. `None` where there is no home.
    pub cache: Option<PathBuf>,
    /// `RUST_LOG`, as `tracing-subscriber` reads it.
    pub log: Option<String>,
    /// `DARKROOM_LOG_FORMAT=json`: a line of JSON for each event.
    pub log_json: bool,
    /// `NO_COLOR` is set to anything.
    pub no_color: bool,
    /// Variables of ours whose values mean nothing, with what they may be.
    pub mistakes: Vec<String>,
}

impl Config {
    #[must_use]
    pub fn from_environment() -> Self {
        Self::read(&text)
    }

    /// `variable` answers what a variable is set to; empty counts as not set.
    fn read(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let caches = path("XDG_CACHE_HOME").or_else(dirs::cache_dir);
        let home = path("HF_HOME").or_else(|| caches.as_ref().map(|caches| caches.join("huggingface"))).unwrap_or_default();
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let implicit = variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none_or(|value| !truthy(&value));
        let token = variable("HF_TOKEN").or_else(|| implicit.then(|| std::fs::read_to_string(token_file).ok()).flatten());
        let hub = Hub {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into()).trim_end_matches('/').into(),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()).map(Secret),
            cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| truthy(&value)),
        };
        let mut mistakes = Vec::new();
        // What a variable of ours is set to, if it is one of these; anything else is a mistake.
        let mut choice = |name: &str, known: &[&'static str]| {
            let value = variable(name)?;
            let found = known.iter().find(|known| known.eq_ignore_ascii_case(value.trim())).copied();
            if found.is_none() {
                mistakes.push(format!("{name}={value}: must be {}", known.join(" or ")));
            }
            found
        };
        let fused_kernels = choice("DARKROOM_KERNELS", &["fused", "plain"]).map(|kernels| kernels == "fused");
        let mut whose = |name| {
            choice(name, &["own", "cudnn"]).map(|name| match name {
                "own" => Whose::Own,
                _ => Whose::Cudnn,
            })
        };
        let [attention, convolution] = [whose("DARKROOM_ATTENTION"), whose("DARKROOM_CONVOLUTION")];
        let private_urls =
            choice("DARKROOM_PRIVATE_URLS", &["1", "on", "yes", "true", "0", "off", "no", "false"]).is_some_and(truthy);
        let log_json = choice("DARKROOM_LOG_FORMAT", &["json", "text"]) == Some("json");
        let gigabytes = variable("DARKROOM_LORA_CACHE_GB").and_then(|text| {
            let gigabytes = text.trim().parse::<f64>().ok().filter(|gigabytes| gigabytes.is_finite() && *gigabytes >= 0.0);
            if gigabytes.is_none() {
                mistakes.push(format!("DARKROOM_LORA_CACHE_GB={text}: must be a number of gigabytes from 0 on, such as 20"));
            }
            gigabytes
        });
        Self {
            hub,
            civitai_token: variable("CIVITAI_API_TOKEN").map(Secret),
            store: STORE.iter().filter_map(|name| Some(((*name).to_owned(), Secret(variable(name)?)))).collect(),
            private_urls,
            lora_cache_bytes: (gigabytes.unwrap_or(20.0) * 1e9) as u64,
            fused_kernels,
            attention,
            convolution,
            cache: caches.map(|caches| caches.join("darkroom")),
            log: variable("RUST_LOG"),
            log_json,
            no_color: variable("NO_COLOR").is_some(),
            mistakes,
        }
    }
}

/// As `huggingface_hub` reads a switch.
fn truthy(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
}

#[expect(clippy::disallowed_methods, reason = "the one reader of the environment")]
fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(set: &[(&str, &str)]) -> Config {
        Config::read(&|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn what_means_nothing_is_said() {
        let right = [("DARKROOM_KERNELS", "Fused"), ("DARKROOM_ATTENTION", " own "), ("DARKROOM_LORA_CACHE_GB", "0.5")];
        let right = config(&right);
        assert_eq!((right.fused_kernels, right.attention, right.lora_cache_bytes), (Some(true), Some(Whose::Own), 500_000_000));
        assert_eq!((right.mistakes.len(), config(&[]).mistakes.len()), (0, 0));
        let wrong = config(&[
            ("DARKROOM_KERNELS", "fast"),
            ("DARKROOM_ATTENTION", "flash"),
            ("DARKROOM_LOG_FORMAT", "xml"),
            ("DARKROOM_LORA_CACHE_GB", "-1"),
        ]);
        assert_eq!(wrong.mistakes.len(), 4);
        assert_eq!(wrong.mistakes[1], "DARKROOM_ATTENTION=flash: must be own or cudnn");
        assert!(wrong.fused_kernels.is_none() && wrong.attention.is_none() && wrong.lora_cache_bytes == 20_000_000_000);
    }

    #[test]
    fn the_hub_cache_is_found_as_python_finds_it() {
        assert_eq!(config(&[("XDG_CACHE_HOME", "/x")]).hub.cache, PathBuf::from("/x/huggingface/hub"));
        assert_eq!(config(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")]).hub.cache, PathBuf::from("/h/hub"));
        assert_eq!(config(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).hub.cache, PathBuf::from("/c"));
        assert_eq!(config(&[("XDG_CACHE_HOME", "/x")]).cache, Some(PathBuf::from("/x/darkroom")));
    }

    #[test]
    fn a_token_comes_from_the_variable_or_the_file_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_from_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(config(&[("HF_HOME", home)]).hub.token, Some(Secret::new("hf_from_file")));
        assert_eq!(config(&[("HF_HOME", home), ("HF_TOKEN", "hf_set")]).hub.token, Some(Secret::new("hf_set")));
        assert_eq!(config(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).hub.token, None);
        let secrets = config(&[("HF_TOKEN", "hf_set"), ("CIVITAI_API_TOKEN", "c_set"), ("AWS_SECRET_ACCESS_KEY", "a_set")]);
        assert!(!format!("{secrets:?}").contains("_set"));
    }

    #[test]
    fn switches_and_endpoint() {
        assert!(config(&[("HF_HUB_OFFLINE", "1")]).hub.offline);
        assert!(!config(&[("HF_HUB_OFFLINE", "0")]).hub.offline);
        assert_eq!(config(&[]).hub.endpoint, DEFAULT_ENDPOINT);
        assert_eq!(config(&[("HF_ENDPOINT", "http://127.0.0.1:8/")]).hub.endpoint, "http://127.0.0.1:8");
    }
}
