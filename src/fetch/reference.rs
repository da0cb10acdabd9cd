//! What a user calls an adapter.

use std::path::{Path, PathBuf};

use url::Url;

use super::Error;

/// Where an adapter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A `.safetensors` file on this machine, or a tar or tar.gz with one in it.
    File(PathBuf),
    /// A link to one of these.
    Link(Url),
    /// A file of a Hugging Face repository; without a name the only `.safetensors` there.
    Hub { repo: String, revision: String, file: Option<String> },
    /// CivitAI's model version, which is what one downloads.
    CivitaiVersion(u64),
    /// CivitAI's model: its newest version is meant.
    CivitaiModel(u64),
    /// The file itself, in base64.
    Data(String),
    /// An object that the operator's credentials reach.
    S3 { bucket: String, key: String },
}

const MAIN: &str = "main";

impl Reference {
    /// `owner/repo` is a folder's file if there is one of that path, else a repository.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::read(text, &|path| path.exists())
    }

    /// What a stranger sends: nothing of this machine, and nothing that the operator's credentials open.
    pub fn foreign(text: &str) -> Result<Self, Error> {
        match Self::read(text, &|_| false)? {
            Self::File(_) | Self::S3 { .. } => Err(Error::NotRemote(text.chars().take(80).filter(|c| !c.is_control()).collect())),
            reference => Ok(reference),
        }
    }

    /// As [`Self::parse`], asking `exists` about local paths.
    pub(super) fn read(text: &str, exists: &dyn Fn(&Path) -> bool) -> Result<Self, Error> {
        let text = text.trim();
        if text.is_empty() {
            return Err(Error::Empty);
        }
        let scheme = text.split_once(':').map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
        match scheme.as_ref().map(|(scheme, rest)| (scheme.as_str(), *rest)) {
            Some(("http" | "https", _)) => return link(text),
            Some(("hf", rest)) => return hub(rest.trim_start_matches('/')).ok_or_else(|| unknown(text)),
            Some(("civitai", id)) => return id.parse().map(Self::CivitaiVersion).map_err(|_| unknown(text)),
            Some(("urn", rest)) => return air(rest).ok_or_else(|| unknown(text)),
            Some(("data", _)) => return Ok(Self::Data(text.into())),
            Some(("s3", rest)) => return object(rest).ok_or_else(|| unknown(text)),
            Some(("file", rest)) => return Ok(Self::File(rest.trim_start_matches("//").into())),
            // One letter is a drive.
            Some((scheme, rest)) if scheme.len() > 1 && rest.starts_with("//") => return Err(unknown(text)),
            _ => {}
        }
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        if is_hub(host) && !exists(Path::new(text)) {
            return hub(path).ok_or_else(|| unknown(text));
        }
        let local = text.starts_with(['.', '/', '~']) || text.contains('\\') || exists(Path::new(text));
        // A missing file in a folder is not a repository: repositories' names do not end like files.
        let named =
            |part: &str| [".safetensors", ".tar", ".tgz", ".gz"].iter().any(|end| part.to_ascii_lowercase().ends_with(end));
        if !local
            && !named(text.split('/').nth(1).unwrap_or(".tar"))
            && let Some(reference) = hub(text)
        {
            return Ok(reference);
        }
        Ok(Self::File(text.into()))
    }
}

fn unknown(text: &str) -> Error {
    Error::Unknown(text.chars().take(80).filter(|c| !c.is_control()).collect())
}

fn is_hub(host: &str) -> bool {
    matches!(host.to_ascii_lowercase().as_str(), "huggingface.co" | "www.huggingface.co" | "hf.co")
}

fn is_civitai(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    matches!(host.strip_prefix("www.").unwrap_or(&host), "civitai.com" | "civitai.red" | "civitai.green")
}

fn link(text: &str) -> Result<Reference, Error> {
    let url = Url::parse(text).map_err(|_| unknown(text))?;
    let host = url.host_str().unwrap_or_default();
    if is_hub(host) && url.scheme() == "https" {
        let path = decoded(url.path());
        return hub(path.trim_matches('/')).ok_or_else(|| unknown(text));
    }
    let path: Vec<&str> = url.path_segments().map(Iterator::collect).unwrap_or_default();
    if is_civitai(host) && path.first() == Some(&"models") {
        let version = url.query_pairs().find(|(key, _)| key == "modelVersionId").map(|(_, value)| value.into_owned());
        let number = |text: &str| text.parse().map_err(|_| unknown(text));
        return Ok(match version {
            Some(version) => Reference::CivitaiVersion(number(&version)?),
            None => Reference::CivitaiModel(number(path.get(1).copied().unwrap_or_default())?),
        });
    }
    Ok(Reference::Link(url))
}

fn decoded(path: &str) -> String {
    percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned()
}

/// `owner/repo`, `owner/repo@revision`, `owner/repo/folder/x.safetensors`, `owner/repo/{resolve,blob,tree}/revision[/folder/x]`.
fn hub(path: &str) -> Option<Reference> {
    let parts: Vec<&str> = path.trim_end_matches('/').split('/').collect();
    let (owner, rest) = parts.split_first()?;
    let (repo, rest) = rest.split_first()?;
    let (repo, revision) = repo.split_once('@').unwrap_or((repo, MAIN));
    let (revision, file) = match rest {
        ["resolve" | "blob" | "tree" | "raw", revision, file @ ..] => (*revision, file),
        // A branch of a pull request has slashes in its name.
        file => (revision, file),
    };
    let named = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['-', '.'])
            && !part.contains("..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let within = |part: &&str| !part.is_empty() && *part != "." && *part != ".." && !part.contains(char::is_control);
    if !named(owner) || !named(repo) || !named(revision) || !file.iter().all(within) {
        return None;
    }
    let file = (!file.is_empty()).then(|| file.join("/"));
    Some(Reference::Hub { repo: format!("{owner}/{repo}"), revision: revision.into(), file })
}

/// `air:flux1:lora:civitai:MODEL@VERSION`, CivitAI's resource names.
fn air(text: &str) -> Option<Reference> {
    let (_, id) = text.strip_prefix("air:")?.split_once(":civitai:")?;
    Some(match id.split_once('@') {
        Some((_, version)) => Reference::CivitaiVersion(version.parse().ok()?),
        None => Reference::CivitaiModel(id.parse().ok()?),
    })
}

fn object(text: &str) -> Option<Reference> {
    let (bucket, key) = text.strip_prefix("//")?.split_once('/')?;
    let good = !bucket.is_empty() && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    (good && !key.is_empty()).then(|| Reference::S3 { bucket: bucket.into(), key: key.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Reference {
        Reference::read(text, &|path| path.starts_with("here")).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn on_hub(repo: &str, revision: &str, file: Option<&str>) -> Reference {
        Reference::Hub { repo: repo.into(), revision: revision.into(), file: file.map(Into::into) }
    }

    #[test]
    fn paths() {
        for path in [
            "a.safetensors",
            "me/a.safetensors",
            "here/repo",
            "./owner/repo",
            "/x/y",
            "~/x/y",
            "../a/b",
            "me/trained_model.TAR",
            "nothing",
            "C:\\loras\\a.safetensors",
            "here/model.safetensors/x",
        ] {
            assert_eq!(parse(path), Reference::File(path.into()), "{path}");
        }
        assert_eq!(parse("file:///x.tgz"), Reference::File("/x.tgz".into()));
    }

    #[test]
    fn repositories() {
        let main = |file| on_hub("alvdansen/flux-koda", "main", file);
        assert_eq!(parse(" alvdansen/flux-koda "), main(None));
        assert_eq!(parse("hf:alvdansen/flux-koda"), main(None));
        assert_eq!(parse("huggingface.co/alvdansen/flux-koda"), main(None));
        assert_eq!(parse("https://huggingface.co/alvdansen/flux-koda/tree/main"), main(None));
        assert_eq!(parse("alvdansen/flux-koda/sub/a b.safetensors"), main(Some("sub/a b.safetensors")));
        let at = |revision, file| on_hub("alvdansen/flux-koda", revision, file);
        assert_eq!(parse("alvdansen/flux-koda@v1.0"), at("v1.0", None));
        assert_eq!(
            parse("https://huggingface.co/alvdansen/flux-koda/resolve/v2/sub/a%20b.safetensors?download=true"),
            at("v2", Some("sub/a b.safetensors"))
        );
        assert_eq!(parse("hf.co/alvdansen/flux-koda/blob/0123abc/x.safetensors"), at("0123abc", Some("x.safetensors")));
    }

    #[test]
    fn links_and_the_rest() {
        let link = "https://x.example/y.safetensors?sig=a%2Fb";
        assert_eq!(parse(link), Reference::Link(Url::parse(link).unwrap()));
        assert!(matches!(parse("https://replicate.delivery/a/b/trained_model.tar"), Reference::Link(_)));
        assert_eq!(
            parse("https://civitai.com/models/618692/flux-realism?modelVersionId=691639"),
            Reference::CivitaiVersion(691_639)
        );
        assert_eq!(parse("https://civitai.com/models/618692"), Reference::CivitaiModel(618_692));
        assert!(matches!(parse("https://civitai.com/api/download/models/691639?type=Model"), Reference::Link(_)));
        assert_eq!(parse("civitai:691639"), Reference::CivitaiVersion(691_639));
        assert_eq!(parse("urn:air:flux1:lora:civitai:618692@691639"), Reference::CivitaiVersion(691_639));
        assert_eq!(
            parse("s3://my-bucket/me/a.safetensors"),
            Reference::S3 { bucket: "my-bucket".into(), key: "me/a.safetensors".into() }
        );
        assert!(matches!(parse("data:application/x-tar;base64,AAAA"), Reference::Data(_)));
    }

    #[test]
    fn what_is_none() {
        for text in [
            "  ",
            "ftp://x/y.safetensors",
            "gopher://x",
            "s3://bucket",
            "s3:///key",
            "civitai:abc",
            "urn:isbn:3",
            "hf:onlyowner",
            "https://huggingface.co/onlyowner",
            "https://",
            "https://civitai.com/models/x",
        ] {
            assert!(Reference::read(text, &|_| false).is_err(), "{text}");
        }
        for text in ["owner/repo/../../x.safetensors", "owner/..", "-x/y", "a/b\n"] {
            assert!(
                !matches!(Reference::read(text, &|_| false), Ok(Reference::Hub { repo, file, .. }) if repo.contains("..") || file.is_some()),
                "{text}"
            );
        }
    }
}
