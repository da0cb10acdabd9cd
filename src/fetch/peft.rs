//! PEFT keeps what scales its factors in a file beside them. Put into the header of theirs, the two are not parted.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use serde_json::{Map, Value};

pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// Largest file that is taken for one, and largest header that it is put into, in bytes.
pub(super) const MOST_CONFIG: u64 = 1 << 20;
const MOST_HEADER: u64 = 100 << 20;

/// Where the settings of a file of this name are: `a/adapter_model.safetensors` -> `a/adapter_config.json`.
pub(super) fn config_of(name: &str) -> Option<String> {
    let folder = name.strip_suffix(WEIGHTS)?;
    (folder.is_empty() || folder.ends_with('/')).then(|| format!("{folder}{CONFIG}"))
}

/// Whether a file of this name may be one that [`config_of`] means.
pub(super) fn is_config(name: &str) -> bool {
    name.rsplit('/').next() == Some(CONFIG)
}

/// Settings as they lie there: of the patterns in them PEFT takes the first that fits, so their order counts. What is no JSON is seen and
/// refused by whoever reads the adapter.
fn text(config: &[u8]) -> String {
    // Windows' editors begin a text with a byte order mark.
    String::from_utf8_lossy(config.strip_prefix(b"\xef\xbb\xbf").unwrap_or(config)).into_owned()
}

/// Puts `config` into the header of a safetensors file as its text `adapter_config`; its data moves back. What is no such file stays
/// as it is, for those to refuse who read it.
pub(super) fn join(file: &mut File, config: &[u8]) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut before = [0; 8];
    file.seek(SeekFrom::Start(0))?;
    if length < 8 {
        return Ok(());
    }
    file.read_exact(&mut before)?;
    let old = u64::from_le_bytes(before);
    if old > MOST_HEADER.min(length - 8) {
        return Ok(());
    }
    let mut header = vec![0; old as usize];
    file.read_exact(&mut header)?;
    let Ok(mut header) = serde_json::from_slice::<Map<String, Value>>(&header) else { return Ok(()) };
    let texts = header.entry("__metadata__").or_insert_with(|| Value::Object(Map::new()));
    let Some(texts) = texts.as_object_mut() else { return Ok(()) };
    texts.insert("adapter_config".into(), Value::String(text(config)));
    let mut header = Value::Object(header).to_string().into_bytes();
    // Never shorter than it was, and data begin at a multiple of eight.
    header.resize(header.len().max(old as usize).next_multiple_of(8), b' ');
    move_back(file, 8 + old, length, header.len() as u64 - old)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)
}

/// Moves the bytes `from..to` back by `by`, the last ones first.
fn move_back(file: &mut File, from: u64, to: u64, by: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut end = to;
    while end > from {
        let part = &mut buffer[..(end - from).min(1 << 20) as usize];
        end -= part.len() as u64;
        file.seek(SeekFrom::Start(end))?;
        file.read_exact(part)?;
        file.seek(SeekFrom::Start(end + by))?;
        file.write_all(part)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use models::lora::Adapter;

    use super::*;

    #[test]
    fn a_joined_file_is_the_file_with_its_settings_beside_it() {
        let peft = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora/writers/peft");
        let folder = tempfile::tempdir().unwrap();
        let alone = folder.path().join("a.safetensors");
        std::fs::copy(peft.join(WEIGHTS), &alone).unwrap();
        let factors = |path: &Path| {
            let updates = Adapter::open(path).unwrap().updates;
            updates.into_iter().map(|update| (update.tensor(), update.change.factor)).collect::<Vec<_>>()
        };
        let without = factors(&alone);
        let mut file = File::options().read(true).write(true).open(&alone).unwrap();
        join(&mut file, &std::fs::read(peft.join(CONFIG)).unwrap()).unwrap();
        assert_eq!(factors(&alone), factors(&peft.join(WEIGHTS)));
        assert_ne!(factors(&alone), without);
        assert_eq!(Adapter::inspect(&alone).warnings, [""; 0]);
    }

    #[test]
    fn settings_keep_their_order_and_what_is_none_is_seen() {
        let unsorted = r#"{ "b": {"z": [1, {"y": 0.5, "x": null}], "a": true}, "a": "\u00e9" }"#;
        for (config, joined) in [
            (unsorted.as_bytes(), unsorted),
            (b"\xef\xbb\xbf{\"r\": 4}", r#"{"r": 4}"#),
            (b"[]", "[]"),
            (b"{not json", "{not json"),
            (b"\xff", "\u{fffd}"),
        ] {
            assert_eq!(text(config), joined);
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora/writers/peft_lokr");
        // A damaged one is not as good as none: the scale is not known.
        let broken = folder_of(&folder, b"{\"r\": ");
        let report = Adapter::inspect(&broken.path().join("a.safetensors"));
        assert!(report.refused.is_some_and(|refused| refused.code == "damaged" && refused.reason.contains("adapter_config")));
    }

    /// A folder with the adapter of another one joined with these settings.
    fn folder_of(folder: &Path, config: &[u8]) -> tempfile::TempDir {
        let made = tempfile::tempdir().unwrap();
        let path = made.path().join("a.safetensors");
        std::fs::copy(folder.join(WEIGHTS), &path).unwrap();
        join(&mut File::options().read(true).write(true).open(&path).unwrap(), config).unwrap();
        made
    }

    #[test]
    fn data_of_any_length_move_and_what_is_no_adapter_stays() {
        for data in [0, 1, 1 << 20, (2 << 20) + 17] {
            let data: Vec<u8> = (0..data).map(|i| (i * 7 % 251) as u8).collect();
            let bytes = [&2u64.to_le_bytes()[..], b"{}", &data].concat();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            join(&mut file, b"{\"r\": 4}").unwrap();
            let mut joined = Vec::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_end(&mut joined).unwrap();
            let header = u64::from_le_bytes(joined[..8].try_into().unwrap()) as usize;
            assert!(header.is_multiple_of(8) && joined[8 + header..] == data);
            let header: Value = serde_json::from_slice(&joined[8..8 + header]).unwrap();
            assert_eq!(header["__metadata__"]["adapter_config"], "{\"r\": 4}");
        }
        for (bytes, config) in
            [(&b"abc"[..], &b"{}"[..]), (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b"{}"), (b"\x02\0\0\0\0\0\0\0[]", b"{}")]
        {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            join(&mut file, config).unwrap();
            let mut left = Vec::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_end(&mut left).unwrap();
            assert_eq!(left, bytes);
        }
    }

    #[test]
    fn settings_are_in_the_same_folder() {
        assert_eq!(config_of("out/adapter_model.safetensors").as_deref(), Some("out/adapter_config.json"));
        assert_eq!(config_of(WEIGHTS).as_deref(), Some(CONFIG));
        assert_eq!((config_of("my_adapter_model.safetensors"), config_of("lora.safetensors")), (None, None));
        assert!(is_config("out/adapter_config.json") && is_config(CONFIG) && !is_config("x_adapter_config.json"));
    }
}
