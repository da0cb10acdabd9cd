//! What a user calls an adapter.

use std::path::PathBuf;

use super::Error;

/// Where an adapter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A `.safetensors` file.
    File(PathBuf),
    /// A tar or tar.gz with one `.safetensors` file in it, as trainers give it.
    Archive(PathBuf),
}

impl Reference {
    /// A path on this machine. Links are recognised and refused.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            Some("http" | "https") => return Err(Error::NotFetched("a link")),
            Some("s3") => return Err(Error::NotFetched("an object store")),
            Some("file") => return Self::parse(&text["file://".len()..]),
            _ if text.starts_with("data:") => return Err(Error::NotFetched("a data URI")),
            _ if text.is_empty() => return Err(Error::Empty),
            _ => {}
        }
        let path = PathBuf::from(text);
        let lower = text.to_ascii_lowercase();
        let archive = [".tar", ".tar.gz", ".tgz"].iter().any(|end| lower.ends_with(end));
        Ok(if archive { Self::Archive(path) } else { Self::File(path) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_archives_and_links() {
        assert_eq!(Reference::parse("a/b.safetensors").unwrap(), Reference::File("a/b.safetensors".into()));
        assert_eq!(Reference::parse(" me/trained_model.TAR ").unwrap(), Reference::Archive("me/trained_model.TAR".into()));
        assert_eq!(Reference::parse("file:///x.tgz").unwrap(), Reference::Archive("/x.tgz".into()));
        for link in ["https://x/y.safetensors", "HTTP://x", "s3://b/k", "data:application/octet-stream;base64,AA"] {
            assert!(Reference::parse(link).unwrap_err().to_string().contains("give its path"), "{link}");
        }
        assert!(Reference::parse("  ").is_err());
    }
}
