//! `data:` URIs: the file itself in the reference.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};

use super::Error;

/// More than this belongs into a file, in bytes once decoded.
const MOST_BYTES: usize = 32 << 20;

/// A weight file out of `data:[type];base64,...`.
pub(super) fn decode(text: &str) -> Result<Vec<u8>, Error> {
    bytes(text, &["application", "binary"])
}

/// A picture out of a data URI.
pub fn decode_picture(text: &str) -> Result<Vec<u8>, Error> {
    bytes(text, &["image", "application"])
}

/// The bytes of `data:[type];base64,...`, if the type is missing or one of these.
fn bytes(text: &str, kinds: &[&str]) -> Result<Vec<u8>, Error> {
    let (head, body) = text.split_once(',').ok_or(Error::Data("has no comma"))?;
    let head = head.to_ascii_lowercase();
    let mut parts = head.strip_prefix("data:").ok_or(Error::Data("does not begin with data:"))?.split(';');
    let kind = parts.next().unwrap_or_default();
    if kind.split_once('/').is_some_and(|(kind, _)| !kinds.contains(&kind)) {
        return Err(Error::Data("is of another type than what is asked for"));
    }
    if parts.next_back() != Some("base64") {
        return Err(Error::Data("is not base64"));
    }
    if body.len() / 4 * 3 > MOST_BYTES {
        return Err(Error::Data("is larger than 32 MiB; upload the file and give its link"));
    }
    let bytes = STANDARD.decode(body).or_else(|_| STANDARD_NO_PAD.decode(body)).or_else(|_| URL_SAFE.decode(body));
    bytes.map_err(|_| Error::Data("holds characters that are not base64"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_uris() {
        for good in [
            "data:application/octet-stream;base64,d2VpZ2h0cw==",
            "data:;base64,d2VpZ2h0cw",
            "DATA:application/x-tar;name=a;BASE64,d2VpZ2h0cw==",
        ] {
            assert_eq!(decode(good).unwrap(), b"weights", "{good}");
        }
        for (bad, part) in [
            ("data:application/octet-stream;base64", "no comma"),
            ("data:text/html;base64,AAAA", "another type"),
            ("data:image/png;base64,AAAA", "another type"),
            ("data:application/octet-stream,AAAA", "not base64"),
            ("data:;base64,A*AA", "characters"),
        ] {
            assert!(decode(bad).unwrap_err().to_string().contains(part), "{bad}");
        }
        let large = format!("data:;base64,{}", "A".repeat(50 << 20));
        assert!(decode(&large).unwrap_err().to_string().contains("32 MiB"));
    }
}
