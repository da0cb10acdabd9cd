//! A run's folder: what was asked for, what is done, and the pictures. Everything in it may be cut off at any moment: whole files are
//! renamed into place, and of the ledger, which grows by a line for each picture, at most the last line is torn.
//!
//! ```text
//! manifest.json      the grid and the exact request of each picture
//! ledger.jsonl       a line for each picture that is done: times, memory, device
//! pictures/KEY.png   KEY is a digest of the exact request
//! latents/KEY.safetensors   where steps are compared
//! ```

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Grid;
use super::plan::Cell;
use crate::ops::Error;
use crate::ops::files;

/// Of the manifest and the ledger.
const FORMAT: u32 = 1;

const MANIFEST: &str = "manifest.json";
const LEDGER: &str = "ledger.jsonl";
const LOCK: &str = ".lock";
const PICTURES: &str = "pictures";
const LATENTS: &str = "latents";

/// What a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: u32,
    /// Program and version.
    pub(super) software: String,
    /// RFC 3339.
    pub(super) made: String,
    pub(super) command: String,
    pub(super) repeats: usize,
    pub(super) grid: Grid,
    /// What all pictures have in common, as flags for a command.
    pub(super) common: Vec<String>,
    pub(super) remarks: Vec<String>,
    pub(super) cells: Vec<Cell>,
}

/// Just enough of a manifest to know who wrote it.
#[derive(Deserialize)]
struct Header {
    format: u32,
    software: String,
}

impl Manifest {
    pub(super) fn new(command: &str, repeats: usize, grid: Grid, cells: Vec<Cell>) -> Self {
        let software = concat!("darkroom ", env!("CARGO_PKG_VERSION")).into();
        let made = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        Self {
            format: FORMAT,
            software,
            made,
            command: command.into(),
            repeats,
            grid,
            common: Vec::new(),
            remarks: Vec::new(),
            cells,
        }
    }

    /// That of a run's folder; `None` if there is none.
    fn read(folder: &Path) -> Result<Option<Self>, Error> {
        let path = folder.join(MANIFEST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::UnreadableFile { field: "output", path, source }),
        };
        let broken = |problem: String| Error::Run { folder: folder.into(), problem, hint: "choose another folder".into() };
        let header: Header = serde_json::from_slice(&text).map_err(|e| broken(format!("its {MANIFEST} is no sweep's ({e})")))?;
        if header.format != FORMAT {
            let (format, software) = (header.format, header.software);
            return Err(broken(format!("was written by {software} in format {format}, and this version reads format {FORMAT}")));
        }
        serde_json::from_slice(&text).map(Some).map_err(|e| broken(format!("its {MANIFEST} is damaged ({e})")))
    }
}

/// Seconds of the stages of one picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Stages {
    pub(super) switch: f64,
    pub(super) encode: f64,
    pub(super) denoise: f64,
    pub(super) decode: f64,
}

impl Stages {
    pub(super) fn total(&self) -> f64 {
        self.switch + self.encode + self.denoise + self.decode
    }
}

/// A line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Made {
    pub(super) key: String,
    /// When, RFC 3339.
    pub(super) at: String,
    pub(super) device: String,
    /// The medians of the repeats.
    pub(super) seconds: Stages,
    /// Of each repeat, if there were several.
    #[serde(default)]
    pub(super) repeats: Vec<Stages>,
    /// The process's resident memory, the highest of looks before and after every step.
    pub(super) peak_memory_bytes: Option<u64>,
    /// Memory of the device that was free when the run began and was not at the highest point.
    pub(super) peak_device_bytes: Option<u64>,
    /// Ends of prompts that an encoder did not read, and other remarks.
    #[serde(default)]
    pub(super) notes: Vec<String>,
}

/// An open folder, to write into; nobody else does meanwhile.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    ledger: File,
    _lock: File,
}

impl Folder {
    /// Makes the folder, or takes up the run in it.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let failed = |path: PathBuf| move |source| Error::Write { path, source };
        let fresh = match fs::read_dir(path) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                files::check_folder("output", files::folder_of(path))?;
                fs::create_dir(path).map_err(failed(path.into()))?;
                true
            }
            Err(source) => return Err(Error::UnreadableFile { field: "output", path: path.into(), source }),
        };
        files::check_folder("output", path)?;
        if !fresh && !path.join(LOCK).exists() && Manifest::read(path)?.is_none() {
            return Err(Error::Run {
                folder: path.into(),
                problem: "is not empty and holds no sweep".into(),
                hint: "choose an empty folder, or one of a sweep to go on with".into(),
            });
        }
        Manifest::read(path)?;
        let lock = lock(path)?;
        for part in [PICTURES, LATENTS] {
            fs::create_dir_all(path.join(part)).map_err(failed(path.join(part)))?;
        }
        // What a killed run was writing: with the lock nobody writes now.
        for part in [path.to_path_buf(), path.join(PICTURES), path.join(LATENTS)] {
            files::sweep_up(&part);
        }
        let ledger = path.join(LEDGER);
        let ledger = OpenOptions::new().create(true).append(true).read(true).open(&ledger).map_err(failed(ledger))?;
        Ok(Self { path: path.into(), ledger, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is done, by key; a torn last line is cut off.
    pub(super) fn done(&mut self) -> Result<HashMap<String, Made>, Error> {
        let failed = |source| Error::Write { path: self.path.join(LEDGER), source };
        let mut bytes = Vec::new();
        self.ledger.seek(SeekFrom::Start(0)).and_then(|_| self.ledger.read_to_end(&mut bytes)).map_err(failed)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            self.ledger.set_len(whole as u64).map_err(failed)?;
        }
        let mut done = read_ledger(&bytes[..whole]);
        done.retain(|key, _| self.picture(key).exists());
        Ok(done)
    }

    pub(super) fn picture(&self, key: &str) -> PathBuf {
        self.path.join(picture(key))
    }

    /// Keeps a picture: the files first, then the line that says that they are there.
    pub(super) fn add(&mut self, made: &Made, png: &[u8], latents: Option<&[u8]>) -> Result<(), Error> {
        if let Some(latents) = latents {
            files::write(&latents_path(&self.path, &made.key), true, latents)?;
        }
        files::write(&self.picture(&made.key), true, png)?;
        let mut line = serde_json::to_vec(made).expect("plain data");
        line.push(b'\n');
        let written = self.ledger.write_all(&line).and_then(|()| self.ledger.sync_data());
        written.map_err(|source| Error::Write { path: self.path.join(LEDGER), source })
    }
}

/// Nobody else changes the folder while this is held.
pub(super) fn lock(folder: &Path) -> Result<File, Error> {
    let path = folder.join(LOCK);
    let lock = File::create(&path).map_err(|source| Error::Write { path, source })?;
    if lock.try_lock().is_err() {
        return Err(Error::Run {
            folder: folder.into(),
            problem: "is being worked on by another sweep".into(),
            hint: "wait for it, or choose another folder".into(),
        });
    }
    Ok(lock)
}

/// Writes the manifest, unless the one that is there says the same.
pub(super) fn keep(folder: &Path, manifest: &Manifest) -> Result<(), Error> {
    if let Some(mut there) = Manifest::read(folder)? {
        there.made.clone_from(&manifest.made);
        if there == *manifest {
            return Ok(());
        }
    }
    let text = serde_json::to_vec(manifest).expect("plain data");
    files::write(&folder.join(MANIFEST), true, &text)
}

/// From the run's folder.
pub(super) fn picture(key: &str) -> String {
    format!("{PICTURES}/{key}.png")
}

pub(super) fn latents_path(folder: &Path, key: &str) -> PathBuf {
    folder.join(LATENTS).join(format!("{key}.safetensors"))
}

/// A run as it is, to look at.
pub(super) fn read(folder: &Path) -> Result<(Manifest, HashMap<String, Made>), Error> {
    let manifest = Manifest::read(folder)?.ok_or_else(|| Error::Run {
        folder: folder.into(),
        problem: format!("holds no sweep: it has no {MANIFEST}"),
        hint: "name the folder that was given to darkroom sweep with -o".into(),
    })?;
    let mut done = read_ledger(&fs::read(folder.join(LEDGER)).unwrap_or_default());
    done.retain(|key, _| folder.join(picture(key)).exists());
    Ok((manifest, done))
}

/// The last line of a key counts; a line that is none is passed over.
fn read_ledger(bytes: &[u8]) -> HashMap<String, Made> {
    let mut done = HashMap::new();
    for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice::<Made>(line) {
            Ok(made) => drop(done.insert(made.key.clone(), made)),
            Err(error) => tracing::warn!(%error, "a damaged line of the ledger; its picture is made again"),
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(key: &str) -> Made {
        let seconds = Stages { switch: 0., encode: 0.1, denoise: 1., decode: 0.2 };
        Made {
            key: key.into(),
            at: "2026-01-01T00:00:00Z".into(),
            device: "cpu".into(),
            seconds,
            repeats: Vec::new(),
            peak_memory_bytes: Some(1),
            peak_device_bytes: None,
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_torn_line_is_cut_off_and_the_rest_is_kept() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("run");
        let mut folder = Folder::open(&path).unwrap();
        folder.add(&made("a"), b"png", Some(b"latents")).unwrap();
        folder.add(&made("b"), b"png", None).unwrap();
        drop(folder);
        for torn in ["{\"key\":\"c\",\"at", "{\"key\":\"c\"}\n{\"ke"] {
            let mut ledger = OpenOptions::new().append(true).open(path.join(LEDGER)).unwrap();
            ledger.write_all(torn.as_bytes()).unwrap();
            let mut folder = Folder::open(&path).unwrap();
            assert_eq!(folder.done().unwrap().len(), 2, "{torn}");
            folder.add(&made("d"), b"png", None).unwrap();
            assert_eq!(folder.done().unwrap().len(), 3, "a new line does not join the torn one");
            fs::remove_file(folder.picture("d")).unwrap();
            assert_eq!(folder.done().unwrap().len(), 2, "a picture that was deleted is not done");
        }
    }

    #[test]
    fn foreign_folders_and_foreign_manifests_are_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let message = || Folder::open(place.path()).unwrap_err().to_string();
        fs::write(place.path().join("photo.jpg"), "mine").unwrap();
        assert!(message().contains("not empty and holds no sweep"), "{}", message());
        let manifest = place.path().join(MANIFEST);
        fs::write(&manifest, r#"{"format": 2, "software": "darkroom 9.0.0", "other": []}"#).unwrap();
        assert!(message().contains("darkroom 9.0.0 in format 2"), "{}", message());
        fs::write(&manifest, r#"{"format": 1, "software": "darkroom 0.1.0"}"#).unwrap();
        assert!(message().contains("damaged"), "{}", message());
        fs::write(&manifest, "none").unwrap();
        assert!(message().contains("no sweep's"), "{}", message());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "nothing was written");
    }

    #[test]
    fn one_sweep_at_a_time() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("run");
        let _first = Folder::open(&path).unwrap();
        assert!(Folder::open(&path).unwrap_err().to_string().contains("another sweep"));
        assert!(Folder::open(&place.path().join("no/run")).unwrap_err().to_string().contains("mkdir -p"));
    }
}
