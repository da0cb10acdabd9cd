//! What a file is, from its first bytes: people point at the wrong file often, and pickles must never be opened.

/// The two formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Safetensors,
    Gguf,
}

/// Largest header that the safetensors format allows, in bytes.
const MAX_SAFETENSORS_HEADER: u64 = 100_000_000;

/// The format of a file's bytes, or what the file looks like instead.
pub(super) fn format(bytes: &[u8]) -> Result<Format, String> {
    if bytes.starts_with(b"GGUF") {
        return Ok(Format::Gguf);
    }
    let header = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
    let looks_right = bytes.get(8) == Some(&b'{') && header.is_some_and(|length| length <= MAX_SAFETENSORS_HEADER);
    if looks_right { Ok(Format::Safetensors) } else { Err(describe(bytes)) }
}

/// A sentence on what a file that is no checkpoint looks like, and what to do.
#[must_use]
pub fn describe(bytes: &[u8]) -> String {
    let start = bytes.trim_ascii_start();
    let starts = |prefix: &str| start.len() >= prefix.len() && start[..prefix.len()].eq_ignore_ascii_case(prefix.as_bytes());
    if bytes.is_empty() {
        "the file is empty; download it again".into()
    } else if starts("version https://git-lfs") {
        "a git-lfs pointer, not the file itself; run `git lfs pull` in that folder".into()
    } else if starts("<!doctype") || starts("<html") || starts("<?xml") || starts("<head") {
        "a web page; the download was answered by a login or error page".into()
    } else if bytes.starts_with(b"PK\x03\x04") && !is_torch(bytes) {
        "a zip file; unpack it and name the .safetensors file inside".into()
    } else if bytes.starts_with(b"PK\x03\x04")
        || bytes.starts_with(b"\x80\x02")
        || bytes.starts_with(b"\x80\x04")
        || bytes.starts_with(b"\x80\x05")
    {
        "a PyTorch pickle (.pt, .pth, .ckpt, .bin), which can run code when opened; use the .safetensors file".into()
    } else if bytes.starts_with(b"\x1f\x8b") || bytes.get(257..262) == Some(b"ustar") {
        "an archive; unpack it and name the .safetensors file inside".into()
    } else if starts("{") {
        "a JSON text; name the .safetensors file or the model's folder".into()
    } else {
        "neither safetensors nor GGUF; the file may be damaged or of another kind".into()
    }
}

/// PyTorch's files are zips with a `data.pkl`: the first thing in them, and named again in the directory at the end.
fn is_torch(zip: &[u8]) -> bool {
    let part = zip.len().min(64 << 10);
    let names_it = |part: &[u8]| part.windows(8).any(|name| name == b"data.pkl");
    names_it(&zip[..part]) || names_it(&zip[zip.len() - part..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_files_are_named() {
        let pickle = format(b"\x80\x02}q\x00").unwrap_err();
        assert!(pickle.contains("pickle"), "{pickle}");
        let far = [&b"PK\x03\x04"[..], &[0; 100_000], b"archive/data.pkl", &[0; 1000]].concat();
        for torch in [&b"PK\x03\x04..archive/data.pkl"[..], &far] {
            assert!(format(torch).unwrap_err().contains("pickle"));
        }
        let zip = format(b"PK\x03\x04..me/lora.safetensors").unwrap_err();
        assert!(zip.contains("zip") && zip.contains("unpack") && !zip.contains("pickle"), "{zip}");
        assert!(format(b"<!DOCTYPE html><html>").unwrap_err().contains("web page"));
        assert!(format(b"version https://git-lfs.github.com/spec/v1\n").unwrap_err().contains("git lfs pull"));
        assert!(format(b"").unwrap_err().contains("empty"));
        assert_eq!(format(b"GGUF\x03\0\0\0"), Ok(Format::Gguf));
        assert_eq!(format(b"\x02\0\0\0\0\0\0\0{}"), Ok(Format::Safetensors));
    }
}
