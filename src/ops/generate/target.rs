//! Where pictures go: checked before the work starts, written whole or not at all.

use std::path::{Path, PathBuf};

use super::Output;
use crate::image::Format;
use crate::ops::Error;
use crate::ops::files::{check_folder, folder_of, write};

const DEFAULT_QUALITY: u8 = 90;

/// The files of one job.
#[derive(Debug)]
pub(super) struct Targets {
    pub format: Format,
    pub quality: u8,
    pictures: Vec<Target>,
    latents: Option<PathBuf>,
    force: bool,
}

#[derive(Debug)]
enum Target {
    /// The name that was asked for.
    Named(PathBuf),
    /// `stem.ext` in the folder, or the next free `stem-2.ext`.
    Generated { folder: PathBuf, stem: String },
}

impl Targets {
    /// One file for each seed. Fails if a folder is missing or not writable, or a named file is there and may not be replaced.
    pub(super) fn plan(output: &Output, seeds: &[u64]) -> Result<Self, Error> {
        let format = format(output)?;
        let quality = quality(output, format)?;
        let generated = |folder: PathBuf| {
            let target = |seed: &u64| Target::Generated { folder: folder.clone(), stem: format!("darkroom-{seed}") };
            seeds.iter().map(target).collect::<Vec<_>>()
        };
        let pictures = match &output.path {
            None => generated(PathBuf::from(".")),
            Some(path) if is_folder(path) => generated(path.clone()),
            Some(path) => named(path, format, seeds.len()),
        };
        let targets = Self { format, quality, pictures, latents: output.latents.clone(), force: output.force };
        targets.check()?;
        Ok(targets)
    }

    fn check(&self) -> Result<(), Error> {
        // All pictures go to one folder.
        if let Some(first) = self.pictures.first() {
            check_folder("output", first.folder())?;
        }
        if let Some(latents) = &self.latents {
            check_folder("save-latents", folder_of(latents))?;
        }
        let named = self.pictures.iter().filter_map(|target| match target {
            Target::Named(path) => Some(path),
            Target::Generated { .. } => None,
        });
        if let Some(latents) = self.latents.as_deref().filter(|_| named.clone().any(|path| self.is_latents(path))) {
            return Err(Error::Combination {
                field: "save-latents",
                problem: format!("is {}, where a picture goes", latents.display()),
                hint: "give the latents another name, such as latents.safetensors".into(),
            });
        }
        for path in named.chain(&self.latents) {
            if path.is_dir() {
                return Err(Error::Exists { path: path.clone() });
            }
            if !self.force && path.exists() {
                return Err(Error::Exists { path: path.clone() });
            }
        }
        Ok(())
    }

    /// Whether this path is that of the latents, however their folders are called.
    fn is_latents(&self, path: &Path) -> bool {
        self.latents.as_deref().is_some_and(|latents| place(latents) == place(path))
    }

    /// Writes the pictures and the latents, all that can be written: the paths that they got. An error names those as well.
    pub(super) fn write(
        &self,
        pictures: &[Vec<u8>],
        latents: impl FnOnce() -> Result<Vec<u8>, Error>,
    ) -> Result<(Vec<PathBuf>, Option<PathBuf>), Error> {
        let (mut written, mut failed) = (Vec::new(), Vec::new());
        for (i, bytes) in pictures.iter().enumerate() {
            match self.write_picture(i, bytes) {
                Ok(path) => written.push(path),
                Err(error) => failed.push(error),
            }
        }
        let latents = self.write_latents(latents).unwrap_or_else(|error| {
            failed.push(error);
            None
        });
        let count = failed.len();
        let Some(first) = failed.into_iter().next() else { return Ok((written, latents)) };
        written.extend(latents);
        if written.is_empty() {
            return Err(first);
        }
        Err(Error::Partly { written, failed: count, source: Box::new(first) })
    }

    /// Writes output `index`, from 0; the path that it got.
    fn write_picture(&self, index: usize, bytes: &[u8]) -> Result<PathBuf, Error> {
        match &self.pictures[index] {
            Target::Named(path) => write(path, self.force, bytes).map(|()| path.clone()),
            Target::Generated { folder, stem } => {
                for attempt in 1.. {
                    let suffix = if attempt == 1 { String::new() } else { format!("-{attempt}") };
                    let path = tidy(folder.join(format!("{stem}{suffix}.{}", self.format)));
                    if path.exists() || self.is_latents(&path) {
                        continue;
                    }
                    match write(&path, false, bytes) {
                        // Another process was faster.
                        Err(Error::Exists { .. }) => {}
                        result => return result.map(|()| path),
                    }
                }
                unreachable!("some number is free")
            }
        }
    }

    /// Writes the latents, if they are wanted; the path.
    fn write_latents(&self, bytes: impl FnOnce() -> Result<Vec<u8>, Error>) -> Result<Option<PathBuf>, Error> {
        let Some(path) = &self.latents else { return Ok(None) };
        write(path, self.force, &bytes()?)?;
        Ok(Some(path.clone()))
    }
}

impl Target {
    fn folder(&self) -> &Path {
        match self {
            Self::Named(path) => folder_of(path),
            Self::Generated { folder, .. } => folder,
        }
    }
}

fn format(output: &Output) -> Result<Format, Error> {
    let path = output.path.as_deref().filter(|path| !is_folder(path));
    let Some(extension) = path.and_then(Path::extension).map(|extension| extension.to_string_lossy().into_owned()) else {
        return Ok(output.format.unwrap_or_default());
    };
    match (Format::from_extension(&extension), output.format) {
        (Some(stated), None) => Ok(stated),
        (Some(stated), Some(wanted)) if stated == wanted => Ok(stated),
        (Some(_), Some(wanted)) => Err(Error::Combination {
            field: "output-format",
            problem: format!("is {wanted}, but the output's name ends in .{extension}"),
            hint: "make them agree, or leave one out".into(),
        }),
        (None, _) => Err(Error::invalid(
            "output",
            &format!("a name that ends in .{extension}"),
            "a name that ends in .png, .jpg or .webp, or a folder",
        )),
    }
}

fn quality(output: &Output, format: Format) -> Result<u8, Error> {
    match output.quality {
        None => Ok(DEFAULT_QUALITY),
        Some(quality) if quality > 100 => Err(Error::invalid("output-quality", &quality, "from 0 (smallest) to 100 (best)")),
        Some(_) if !format.is_lossy() => Err(Error::Combination {
            field: "output-quality",
            problem: format!("was given, but {format} is lossless"),
            hint: "leave it out, or choose the output-format jpg or webp".into(),
        }),
        Some(quality) => Ok(quality as u8),
    }
}

/// `path`, or `stem-1.ext` to `stem-n.ext` if there are several. A name without an extension gets the format's.
fn named(path: &Path, format: Format, count: usize) -> Vec<Target> {
    let extension = path.extension().map_or_else(|| format.extension().into(), |text| text.to_string_lossy().into_owned());
    if count == 1 {
        return vec![Target::Named(path.with_extension(extension))];
    }
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    (1..=count).map(|i| Target::Named(path.with_file_name(format!("{stem}-{i}.{extension}")))).collect()
}

/// A folder that is there, or a path that can only mean one.
fn is_folder(path: &Path) -> bool {
    path.is_dir() || path.as_os_str().to_string_lossy().ends_with(std::path::is_separator)
}

/// Where a file will be.
fn place(path: &Path) -> PathBuf {
    let folder = folder_of(path);
    folder.canonicalize().unwrap_or_else(|_| folder.into()).join(path.file_name().unwrap_or_default())
}

/// `./name` as people write it: `name`.
fn tidy(path: PathBuf) -> PathBuf {
    path.strip_prefix(".").map(Path::to_path_buf).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn output(path: Option<PathBuf>) -> Output {
        Output { path, format: None, quality: None, force: false, metadata: true, latents: None }
    }

    #[test]
    fn generated_names_take_the_next_free_number() {
        let folder = tempfile::tempdir().unwrap();
        let targets = Targets::plan(&output(Some(folder.path().into())), &[7, 8]).unwrap();
        let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(name(targets.write_picture(0, b"a").unwrap()), "darkroom-7.png");
        assert_eq!(name(targets.write_picture(0, b"b").unwrap()), "darkroom-7-2.png");
        assert_eq!(name(targets.write_picture(1, b"c").unwrap()), "darkroom-8.png");
        assert_eq!(fs::read(folder.path().join("darkroom-7.png")).unwrap(), b"a");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "no temporary file is left");
    }

    #[test]
    fn several_outputs_of_one_name_are_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let targets = Targets::plan(&output(Some(folder.path().join("cat.jpeg"))), &[1, 2]).unwrap();
        assert_eq!(targets.format, Format::Jpg);
        assert_eq!(targets.write_picture(1, b"x").unwrap(), folder.path().join("cat-2.jpeg"));
    }

    #[test]
    fn named_files_are_not_replaced_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cat.png");
        fs::write(&path, b"old").unwrap();
        let mut wanted = output(Some(path.clone()));
        assert!(matches!(Targets::plan(&wanted, &[1]), Err(Error::Exists { .. })));
        wanted.force = true;
        Targets::plan(&wanted, &[1]).unwrap().write_picture(0, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn pictures_and_latents_never_share_a_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        let plan = |name: &str, latents: &str, seeds: &[u64]| {
            let mut wanted = output(Some(folder.path().join(name)));
            (wanted.force, wanted.latents) = (true, Some(folder.path().join(latents)));
            Targets::plan(&wanted, seeds)
        };
        for (name, latents, seeds) in
            [("a.png", "a.png", &[1][..]), ("a.png", "sub/../a.png", &[1]), ("a.png", "a-2.png", &[1, 2]), ("a", "a.png", &[1])]
        {
            let error = plan(name, latents, seeds).unwrap_err();
            assert!(error.to_string().contains("save-latents") && error.is_usage(), "{error}");
        }
        // Generated names go out of the way.
        let (pictures, latents) =
            plan("sub/", "sub/darkroom-7.png", &[7]).unwrap().write(&[b"picture".to_vec()], || Ok(b"latents".to_vec())).unwrap();
        assert_eq!(fs::read(&pictures[0]).unwrap(), b"picture");
        assert_eq!(fs::read(latents.unwrap()).unwrap(), b"latents");
    }

    #[test]
    fn what_can_be_written_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut wanted = output(Some(path("a.png")));
        wanted.latents = Some(path("a.safetensors"));
        let targets = Targets::plan(&wanted, &[1, 2, 3]).unwrap();
        // Somebody else was faster.
        fs::write(path("a-2.png"), b"theirs").unwrap();
        let pictures = [b"1".to_vec(), b"2".to_vec(), b"3".to_vec()];
        let error = targets.write(&pictures, || Ok(b"latents".to_vec())).unwrap_err().told();
        for part in ["1 of 4", "a-1.png, ", "a-3.png, ", "a.safetensors)", "a-2.png is there already"] {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
        let content = ["a-1.png", "a-2.png", "a-3.png", "a.safetensors"].map(|name| fs::read(path(name)).unwrap());
        assert_eq!(content, [&b"1"[..], b"theirs", b"3", b"latents"]);
        // Nothing was written: its own error says it all.
        let error = targets.write(&pictures, || Ok(b"latents".to_vec())).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
    }

    #[test]
    fn a_name_without_an_extension_gets_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut wanted = output(Some(folder.path().join("cat")));
        wanted.format = Some(Format::Webp);
        let targets = Targets::plan(&wanted, &[1]).unwrap();
        assert_eq!(targets.write_picture(0, b"x").unwrap(), folder.path().join("cat.webp"));
    }

    #[test]
    fn wrong_targets_are_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let message = |output: &Output| Targets::plan(output, &[1]).unwrap_err().to_string();
        assert!(message(&output(Some(folder.path().join("no/cat.png")))).contains("mkdir -p"));
        assert!(message(&output(Some(folder.path().join("no/")))).contains("mkdir -p"));
        assert!(message(&output(Some(folder.path().join("cat.gif")))).contains(".gif"));
        let mut both = output(Some(folder.path().join("cat.png")));
        both.format = Some(Format::Jpg);
        assert!(message(&both).contains("agree"));
        let mut lossless = output(Some(folder.path().into()));
        lossless.quality = Some(50);
        assert!(message(&lossless).contains("lossless"));
        lossless.format = Some(Format::Jpg);
        lossless.quality = Some(101);
        assert!(message(&lossless).contains("101"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
