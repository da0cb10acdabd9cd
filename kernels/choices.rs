//! Which of cuBLASLt's algorithms is used for each shape: timed once on a card, then always the same, so that equal
//! jobs give equal bytes also in the next process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::OnceLock;

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

/// Keeps texts by name from one process to the next.
pub trait Keeper: Send + Sync {
    fn read(&self, name: &str) -> Option<String>;
    /// What cannot be written is lost, which costs time only.
    fn write(&self, name: &str, text: &str);
}

static KEEPER: OnceLock<Box<dyn Keeper>> = OnceLock::new();

/// Who keeps the choices. Without a keeper they are made anew in every process, and may differ between two. The first one stays.
pub fn keep_choices(keeper: Box<dyn Keeper>) {
    let _ = KEEPER.set(keeper);
}

/// The choices for one card, driver and library, whose names make up the machine.
#[derive(Debug, Default)]
pub(crate) struct Choices {
    known: BTreeMap<Shape, Algorithm>,
    name: String,
}

impl Choices {
    pub(crate) fn of(machine: &str) -> Self {
        let name = file_name(&format!("gemm-{machine}"));
        Self { known: kept(&name), name }
    }

    pub(crate) fn get(&self, shape: &Shape) -> Option<Algorithm> {
        self.known.get(shape).copied()
    }

    /// Notes a choice, and returns the one that holds: another process may have made its own in the meantime. One that was `refused`
    /// does not hold.
    pub(crate) fn note(&mut self, shape: Shape, algorithm: Algorithm, refused: Option<Algorithm>) -> Algorithm {
        self.known.extend(kept(&self.name));
        let holds = self.known.entry(shape).or_insert(algorithm);
        if refused == Some(*holds) {
            *holds = algorithm;
        }
        let holds = *holds;
        write(&self.name, &format(&self.known));
        holds
    }
}

/// What a text about `subject` is kept as.
fn file_name(subject: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    subject.chars().map(safe).collect::<String>() + ".txt"
}

/// What was learned about `subject` and kept, see [`keep_choices`].
#[must_use]
pub fn recall(subject: &str) -> Option<String> {
    read(&file_name(subject))
}

/// Keeps what was learned about `subject`, in the place of what was there.
pub fn remember(subject: &str, text: &str) {
    write(&file_name(subject), text);
}

fn read(name: &str) -> Option<String> {
    KEEPER.get()?.read(name)
}

fn write(name: &str, text: &str) {
    if let Some(keeper) = KEEPER.get() {
        keeper.write(name, text);
    }
}

/// What is damaged is left out, and timed again.
fn kept(name: &str) -> BTreeMap<Shape, Algorithm> {
    read(name).map(|text| parse(&text)).unwrap_or_default()
}

fn parse(text: &str) -> BTreeMap<Shape, Algorithm> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [n, output, input, kind, algorithm @ ..] = &words[..] else { return None };
        let number = |word: &str| word.parse().ok();
        let hex = |word: &&str| (word.len() == 16).then(|| u64::from_str_radix(word, 16).ok()).flatten();
        let algorithm: Vec<u64> = algorithm.iter().map(hex).collect::<Option<_>>()?;
        let shape = Shape { n: number(n)?, output: number(output)?, input: number(input)?, kind: (*kind).into() };
        Some((shape, algorithm.try_into().ok()?))
    };
    text.lines().filter_map(line).collect()
}

fn format(known: &BTreeMap<Shape, Algorithm>) -> String {
    let mut text =
        String::from("# tokens outputs inputs kind algorithm: timed on this card; delete the file to time them again\n");
    for (Shape { n, output, input, kind }, algorithm) in known {
        let _ = write!(text, "{n} {output} {input} {kind}");
        for word in algorithm {
            let _ = write!(text, " {word:016x}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn shape(n: usize) -> Shape {
        Shape { n, output: 9216, input: 3072, kind: "bf16-bias".into() }
    }

    /// In memory.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<BTreeMap<String, String>>>);

    impl Keeper for Memory {
        fn read(&self, name: &str) -> Option<String> {
            self.0.lock().unwrap().get(name).cloned()
        }
        fn write(&self, name: &str, text: &str) {
            self.0.lock().unwrap().insert(name.into(), text.into());
        }
    }

    #[test]
    fn the_first_choice_holds_whoever_made_it() {
        let memory = Memory::default();
        keep_choices(Box::new(memory.clone()));
        let machine = "NVIDIA H200 / driver 580.1";
        let (mut one, mut two) = (Choices::of(machine), Choices::of(machine));
        assert_eq!(one.get(&shape(512)), None);
        assert_eq!(one.note(shape(512), [1; 8], None), [1; 8]);
        assert_eq!(two.note(shape(512), [2; 8], None), [1; 8], "the other process was first");
        assert_eq!(two.note(shape(4096), [u64::MAX; 8], None), [u64::MAX; 8]);
        assert_eq!(one.note(shape(1), [3; 8], None), [3; 8]);
        // What the library refuses does not hold, whoever noted it.
        assert_eq!(two.note(shape(512), [4; 8], Some([1; 8])), [4; 8]);
        assert_eq!(one.note(shape(512), [5; 8], Some([1; 8])), [4; 8], "another has found another one");
        let again = Choices::of(machine);
        let all = [512, 4096, 1].map(|n| again.get(&shape(n)));
        assert_eq!(all, [Some([4; 8]), Some([u64::MAX; 8]), Some([3; 8])]);
        assert_eq!(Choices::of("another card").get(&shape(512)), None);
        // What is damaged is timed again, the rest holds.
        let name = "gemm-NVIDIA-H200---driver-580.1.txt";
        let text = memory.read(name).unwrap();
        memory.write(name, &format!("nonsense\n1 2 3\n{}", &text[..text.len() - 3]));
        let damaged = Choices::of(machine);
        assert_eq!([1, 512, 4096].map(|n| damaged.get(&shape(n))), [Some([3; 8]), Some([4; 8]), None]);
    }
}
