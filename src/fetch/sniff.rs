//! What a file is, by its first bytes: names and MIME types are not believed.

/// How many bytes are looked at: a tar's mark ends at 263.
pub(super) const HEAD: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Safetensors,
    /// tar or gzip; whether the gzip holds a tar is seen when it is read.
    Archive,
    WebPage,
    Foreign(&'static str),
    /// Nothing that is known by its first bytes.
    Unknown,
}

pub(super) fn kind(head: &[u8]) -> Kind {
    // Eight bytes of length, then a JSON object. The length of any real header has zeros at its end.
    if head.len() > 8 && head[8] == b'{' && head[5..8] == [0; 3] {
        return Kind::Safetensors;
    }
    if head.starts_with(b"\x1f\x8b") || head.get(257..262) == Some(b"ustar") {
        return Kind::Archive;
    }
    let text = head.trim_ascii_start();
    let begins = |start: &str| text.get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start.as_bytes()));
    if begins("<!doctype html") || begins("<html") || begins("<head") || begins("<body") {
        return Kind::WebPage;
    }
    if head.starts_with(b"PK\x03\x04") {
        // PyTorch puts it first.
        let pickle = head.windows(8).any(|name| name == b"data.pkl");
        return Kind::Foreign(if pickle {
            "a PyTorch pickle, which can run code when opened"
        } else {
            "a zip file (unpack it and give the .safetensors file in it)"
        });
    }
    let signs: [(&[u8], &str); 9] = [
        (b"\x80\x02", "a Python pickle, which can run code when opened"),
        (b"\x80\x04", "a Python pickle, which can run code when opened"),
        (b"\x80\x05", "a Python pickle, which can run code when opened"),
        (
            b"version https://git-lfs",
            "a git-lfs pointer, not the file that it points to (use the download link, or: git lfs pull)",
        ),
        (b"GGUF", "a GGUF file"),
        (b"\x89PNG", "a picture"),
        (b"\xff\xd8\xff", "a picture"),
        (b"%PDF", "a PDF document"),
        (b"\x7fELF", "a program"),
    ];
    if let Some((_, what)) = signs.iter().find(|(sign, _)| head.starts_with(sign)) {
        return Kind::Foreign(what);
    }
    match text {
        [] => Kind::Foreign("empty"),
        [b'{' | b'[', ..] => Kind::Foreign("a JSON text, perhaps an error message"),
        [b'<', ..] => Kind::Foreign("an XML text, perhaps an error message"),
        text if text.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) => Kind::Foreign("a text"),
        _ => Kind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        let mut safetensors = 20u64.to_le_bytes().to_vec();
        safetensors.extend(b"{\"a\":1}");
        assert_eq!(kind(&safetensors), Kind::Safetensors);
        let mut tar = vec![b'x'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(kind(&tar), Kind::Archive);
        assert_eq!(kind(b"\x1f\x8b\x08"), Kind::Archive);
        assert_eq!(kind(b"\n <!DOCTYPE HTML><title>Log in"), Kind::WebPage);
        for (head, part) in [
            (&b"PK\x03\x04..archive/data.pkl"[..], "pickle"),
            (b"PK\x03\x04..me/lora.safetensors", "a zip file (unpack it"),
            (b"\x80\x02}", "pickle"),
            (b"\x80\x05\x95", "pickle"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
            (b"{\"error\":\"Unauthorized\"}", "JSON"),
            (b"<?xml version=\"1.0\"?><Error>", "XML"),
            (b"Not found", "a text"),
            (b"", "empty"),
        ] {
            assert!(matches!(kind(head), Kind::Foreign(what) if what.contains(part)), "{head:?}");
        }
        assert_eq!(kind(b"\x01\x02\x03"), Kind::Unknown);
        assert_eq!(kind(b"\xff\xff\xff\xff\xff\xff\xff\xff{"), Kind::Unknown);
    }
}
