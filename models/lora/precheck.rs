//! What a safetensors header may look like before the real parser sees it: adapters come from strangers, and a small file can
//! name a million tensors.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// All linear layers of FLUX.1 with their alphas are about 1,500 tensors and 200 KB of header; then come the texts.
pub(super) const MAX_HEADER_BYTES: usize = MAX_METADATA_BYTES + (4 << 20);
const MAX_TENSORS: usize = 20_000;
/// kohya writes every caption's tags of the data set into `ss_tag_frequency`.
const MAX_METADATA_BYTES: usize = 16 << 20;
const MAX_NAME: usize = 256;
const MAX_DIMENSIONS: usize = 4;
const MAX_SIZE: u64 = 1 << 20;

/// An error says what is out of bounds. Whether offsets and lengths agree is the real parser's business.
pub fn precheck(bytes: &[u8]) -> Result<(), String> {
    let Some(length) = bytes.first_chunk::<8>() else { return Err("it is shorter than a header".into()) };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(format!("its header takes {length} bytes, more than the {MAX_HEADER_BYTES} that an adapter may have"));
    }
    let Some(header) = bytes.get(8..8 + length) else {
        return Err(format!("its header should take {length} bytes and the file ends before; download it again"));
    };
    serde_json::from_slice::<Header>(header).map(|_| ()).map_err(|e| format!("its header is not acceptable: {e}"))
}

struct Header;

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Tensors)
    }
}

struct Tensors;

impl<'de> Visitor<'de> for Tensors {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let text = map.next_value::<Metadata>()?.0;
                if text > MAX_METADATA_BYTES {
                    return Err(A::Error::custom(format!("{text} bytes of metadata, at most {MAX_METADATA_BYTES} are read")));
                }
            } else {
                if name.is_empty() || name.len() > MAX_NAME || name.chars().any(|c| c.is_control()) {
                    let shown: String = name.chars().take(40).flat_map(char::escape_default).collect();
                    return Err(A::Error::custom(format!(
                        "the tensor name \"{shown}\" is empty, too long or holds control characters"
                    )));
                }
                let Shape(shape) = map.next_value()?;
                if shape.len() > MAX_DIMENSIONS || shape.iter().any(|size| *size > MAX_SIZE) {
                    return Err(A::Error::custom(format!("tensor {name} of shape {shape:?} is larger than any of FLUX.1")));
                }
            }
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor {name} is there twice")));
            }
            if names.len() > MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
        }
        Ok(Header)
    }
}

/// Bytes of text in all keys and values.
struct Metadata(usize);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut bytes = 0;
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    bytes += key.len() + value.len();
                }
                Ok(Metadata(bytes))
            }
        }
        deserializer.deserialize_map(Texts)
    }
}

struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Tensor {
            shape: Vec<u64>,
            #[serde(rename = "dtype")]
            _dtype: String,
            #[serde(rename = "data_offsets")]
            _data_offsets: IgnoredAny,
        }
        Ok(Self(Tensor::deserialize(deserializer)?.shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
    }

    fn refused(header: &str) -> String {
        precheck(&file(header)).unwrap_err()
    }

    const TENSOR: &str = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;

    #[test]
    fn ordinary_headers_pass() {
        precheck(&file(&format!(r#"{{"__metadata__":{{"a":"b"}},"x.lora_A.weight":{TENSOR}}}  "#))).unwrap();
        precheck(&file("{}")).unwrap();
    }

    #[test]
    fn bombs_are_refused() {
        assert!(precheck(b"").unwrap_err().contains("shorter"));
        assert!(precheck(&u64::MAX.to_le_bytes()).unwrap_err().contains("header takes"));
        assert!(precheck(&file("{}")[..9]).unwrap_err().contains("ends before"));
        let many: Vec<String> = (0..=MAX_TENSORS).map(|i| format!(r#""t{i}":{TENSOR}"#)).collect();
        assert!(refused(&format!("{{{}}}", many.join(","))).contains("20000 tensors"));
        assert!(refused(&format!(r#"{{"a":{TENSOR},"a":{TENSOR}}}"#)).contains("twice"));
        assert!(refused(&format!(r#"{{"a\u0000b":{TENSOR}}}"#)).contains("control"));
        assert!(refused(&format!(r#"{{"{}":{TENSOR}}}"#, "n".repeat(300))).contains("too long"));
        assert!(refused(r#"{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}"#).contains("larger"));
        assert!(refused(r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1],"data_offsets":[0,4]}}"#).contains("larger"));
        assert!(refused(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#).contains("not acceptable"));
        let texts = |bytes: usize| format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, "x".repeat(bytes));
        precheck(&file(&texts(MAX_METADATA_BYTES - 1))).unwrap();
        assert!(refused(&texts(MAX_METADATA_BYTES)).contains("metadata"));
        assert!(refused(&texts(MAX_HEADER_BYTES)).contains("header takes"));
        assert!(refused("[[[[").contains("not acceptable"));
    }

    #[test]
    fn random_bytes_never_make_it_fail() {
        let good = file(&format!(r#"{{"__metadata__":{{"a":"b"}},"x.lora_A.weight":{TENSOR}}}"#));
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..random.usize(1..=4) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            bytes.truncate(random.usize(1..=bytes.len()));
            let _ = precheck(&bytes);
        }
    }
}
