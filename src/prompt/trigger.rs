//! Where a LoRA's trigger word goes in a prompt.

use std::str::FromStr;

/// How a trigger word is put into a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// `{trigger}, {prompt}`, unless the whole word is there already in any case.
    #[default]
    Prepend,
    /// First and, as `{trigger} portrait`, before the second half of the clauses; where it stood before is forgotten.
    StartAndMiddle,
    /// The prompt as it is.
    None,
}

impl Policy {
    pub const NAMES: [&str; 3] = ["prepend", "start-and-middle", "none"];

    /// The prompt with the trigger word in its place.
    #[must_use]
    pub fn apply(self, prompt: &str, trigger: &str) -> String {
        let trigger = trigger.trim();
        if trigger.is_empty() {
            return prompt.into();
        }
        match self {
            Self::None => prompt.into(),
            Self::Prepend if find(prompt, trigger).is_some() => prompt.into(),
            Self::Prepend if prompt.trim().is_empty() => trigger.into(),
            Self::Prepend => format!("{trigger}, {prompt}"),
            Self::StartAndMiddle => start_and_middle(prompt, trigger),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "prepend" => Ok(Self::Prepend),
            "start-and-middle" => Ok(Self::StartAndMiddle),
            "none" => Ok(Self::None),
            _ => Err(format!("must be one of {}", Self::NAMES.join(", "))),
        }
    }
}

fn start_and_middle(prompt: &str, trigger: &str) -> String {
    let middle = format!("{trigger} portrait");
    let clause = |text: &str| {
        // What this policy itself put in comes out whole, so that preparing twice changes nothing.
        let text = if find(text.trim(), &middle) == Some(0..text.trim().len()) { "" } else { text };
        let mut rest = text.to_owned();
        while let Some(range) = find(&rest, trigger) {
            rest.replace_range(range, "");
        }
        rest.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let mut clauses: Vec<String> = prompt.split(',').map(clause).filter(|clause| !clause.is_empty()).collect();
    if clauses.is_empty() {
        return trigger.into();
    }
    clauses.insert(clauses.len().div_ceil(2), middle);
    format!("{trigger}, {}", clauses.join(", "))
}

/// Where `word` stands in `text` as a whole word, in any case.
fn find(text: &str, word: &str) -> Option<std::ops::Range<usize>> {
    // An accent that is a character of its own belongs to its letter: `jose` is not in `jose\u{301}`.
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_' || ('\u{300}'..='\u{36f}').contains(&c);
    let mut before = None;
    for (start, first) in text.char_indices() {
        let begins = !before.is_some_and(part_of_word) || !word.chars().next().is_some_and(part_of_word);
        before = Some(first);
        if !begins {
            continue;
        }
        let mut rest = text[start..].chars();
        let mut taken = 0;
        let same = word.chars().all(|want| {
            rest.next().is_some_and(|got| {
                taken += got.len_utf8();
                got == want || folded(got).eq(folded(want))
            })
        });
        let ends = !rest.next().is_some_and(part_of_word) || !word.chars().next_back().is_some_and(part_of_word);
        if same && ends {
            return Some(start..start + taken);
        }
    }
    None
}

/// In any case; Greek has two small sigmas.
fn folded(c: char) -> impl Iterator<Item = char> {
    c.to_lowercase().map(|c| if c == 'ς' { 'σ' } else { c })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_comes_first_unless_it_is_there() {
        let prepend = |prompt, word| Policy::Prepend.apply(prompt, word);
        assert_eq!(prepend("confident woman, street fashion", "user42"), "user42, confident woman, street fashion");
        assert_eq!(prepend("a photo of USER42, smiling", "user42"), "a photo of USER42, smiling");
        // `user4` is not in `user42`, nor `user42` in `xuser42` or `user42_a`.
        assert_eq!(prepend("user42 smiles", "user4"), "user4, user42 smiles");
        assert_eq!(prepend("xuser42, user42_a", "user42"), "user42, xuser42, user42_a");
        assert_eq!(prepend("(user42:1.2)", "user42"), "(user42:1.2)");
        assert_eq!(prepend("", "user42"), "user42");
        assert_eq!(prepend("a cat", "  "), "a cat");
        assert_eq!(prepend("ein Bild von ÄNNE", "änne"), "ein Bild von ÄNNE");
        assert_eq!(prepend("jose\u{301} smiles", "jose"), "jose, jose\u{301} smiles");
        assert_eq!(prepend("Νίκος", "ΝΊΚΟΣ"), "Νίκος");
        assert_eq!(prepend("a photo of user42's cat", "user42"), "a photo of user42's cat");
        assert_eq!(prepend("猫の絵", "猫"), "猫, 猫の絵"); // no word boundary there
    }

    #[test]
    fn first_and_in_the_middle() {
        let both = |prompt, word| Policy::StartAndMiddle.apply(prompt, word);
        let expected = "user42585527, confident woman, user42585527 portrait, street fashion";
        assert_eq!(both("confident woman, street fashion", "user42585527"), expected);
        assert_eq!(both("User42585527, confident woman, street fashion", "user42585527"), expected);
        assert_eq!(both(expected, "user42585527"), expected);
        assert_eq!(both("a woman", "me"), "me, a woman, me portrait");
        assert_eq!(both("me", "me"), "me");
    }

    #[test]
    fn preparing_twice_changes_nothing_and_other_words_stay() {
        let words = ["a", "woman", "user4", "user42", "USER42", "été", "猫", ",", ",", "portrait", "(x:1.1)", "👩‍🎤"];
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..3000 {
            let mut prompt = String::new();
            for _ in 0..random.usize(..8) {
                prompt += words[random.usize(..words.len())];
                prompt.push(' ');
            }
            for policy in [Policy::Prepend, Policy::StartAndMiddle, Policy::None] {
                let once = policy.apply(&prompt, "user42");
                assert_eq!(policy.apply(&once, "user42"), once, "{policy:?} of {prompt:?}");
                for word in ["woman", "été", "猫", "(x:1.1)"] {
                    assert_eq!(prompt.matches(word).count(), once.matches(word).count(), "{policy:?} of {prompt:?}: {word}");
                }
            }
        }
    }
}
