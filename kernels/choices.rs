//! Which of cuBLASLt's algorithms is used for each shape, kept in a file: timed once on a card, then always the same, so that equal
//! jobs give equal bytes also in the next process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// An algorithm, as the library describes it to itself.
pub(crate) type Algorithm = [u64; 8];

/// A product: rows of x, outputs and inputs of the weight, type and epilogue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shape {
    pub(crate) n: usize,
    pub(crate) output: usize,
    pub(crate) input: usize,
    /// Type of the values and what is done to the product: `bf16-bias-gelu`.
    pub(crate) kind: String,
}

static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Where choices are kept. Without a folder they are made anew in every process, and may differ between two.
pub fn keep_choices_in(folder: &Path) {
    *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.to_owned());
}

/// The choices for one card, driver and library, whose names make up `machine`.
#[derive(Debug, Default)]
pub(crate) struct Choices {
    known: BTreeMap<Shape, Algorithm>,
    path: Option<PathBuf>,
}

impl Choices {
    pub(crate) fn of(machine: &str) -> Self {
        let folder = FOLDER.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let path = folder.map(|folder| folder.join(format!("gemm-{}.txt", machine.chars().map(safe).collect::<String>())));
        // A file that cannot be read is as good as none: its choices are timed again.
        let known = path.as_ref().and_then(|path| fs::read_to_string(path).ok()).map(|text| parse(&text)).unwrap_or_default();
        Self { known, path }
    }

    pub(crate) fn get(&self, shape: &Shape) -> Option<Algorithm> {
        self.known.get(shape).copied()
    }

    /// Notes a choice, and returns the one that holds: another process may have made its own in the meantime.
    pub(crate) fn note(&mut self, shape: Shape, algorithm: Algorithm) -> Algorithm {
        let theirs = self.path.as_ref().and_then(|path| fs::read_to_string(path).ok()).map(|text| parse(&text));
        self.known.extend(theirs.unwrap_or_default());
        let holds = *self.known.entry(shape).or_insert(algorithm);
        if let Some(path) = &self.path {
            // Without the file the choice still holds for this process.
            let _ = write(path, &self.known);
        }
        holds
    }
}

fn parse(text: &str) -> BTreeMap<Shape, Algorithm> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [n, output, input, kind, algorithm @ ..] = &words[..] else { return None };
        let number = |word: &str| word.parse().ok();
        let algorithm: Vec<u64> = algorithm.iter().map(|word| u64::from_str_radix(word, 16).ok()).collect::<Option<_>>()?;
        let shape = Shape { n: number(n)?, output: number(output)?, input: number(input)?, kind: (*kind).into() };
        Some((shape, algorithm.try_into().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// In one move, so that a reader never sees half a file.
fn write(path: &Path, known: &BTreeMap<Shape, Algorithm>) -> io::Result<()> {
    let mut text =
        String::from("# tokens outputs inputs kind algorithm: timed on this card; delete the file to time them again\n");
    for (Shape { n, output, input, kind }, algorithm) in known {
        let _ = write!(text, "{n} {output} {input} {kind}");
        for word in algorithm {
            let _ = write!(text, " {word:016x}");
        }
        text.push('\n');
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let new = folder.join(format!("{}.{}", path.file_name().unwrap_or_default().display(), std::process::id()));
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(n: usize) -> Shape {
        Shape { n, output: 9216, input: 3072, kind: "bf16-bias".into() }
    }

    #[test]
    fn the_first_choice_holds_whoever_made_it() {
        let folder = std::env::temp_dir().join(format!("darkroom-choices-{}", std::process::id()));
        keep_choices_in(&folder);
        let machine = "NVIDIA H200 / driver 580.1";
        let (mut one, mut two) = (Choices::of(machine), Choices::of(machine));
        assert_eq!(one.get(&shape(512)), None);
        assert_eq!(one.note(shape(512), [1; 8]), [1; 8]);
        assert_eq!(two.note(shape(512), [2; 8]), [1; 8], "the other process was first");
        assert_eq!(two.note(shape(4096), [u64::MAX; 8]), [u64::MAX; 8]);
        assert_eq!(one.note(shape(1), [3; 8]), [3; 8]);
        let again = Choices::of(machine);
        assert_eq!(
            (again.get(&shape(512)), again.get(&shape(4096)), again.get(&shape(1))),
            (Some([1; 8]), Some([u64::MAX; 8]), Some([3; 8]))
        );
        assert_eq!(Choices::of("another card").get(&shape(512)), None);
        // What is damaged is timed again, the rest holds.
        let file = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("nonsense\n1 2 3\n{}", &text[..text.len() - 3])).unwrap();
        let damaged = Choices::of(machine);
        assert_eq!((damaged.get(&shape(1)), damaged.get(&shape(512))), (Some([3; 8]), Some([1; 8])));
        fs::remove_dir_all(&folder).unwrap();
    }
}
