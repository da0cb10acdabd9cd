//! Prompts that a chat model wrote: its greeting and its markdown are no part of the picture.

/// How an assistant agrees before it comes to the prompt.
const AGREEING: &[&str] = &["sure thing", "sure", "certainly", "of course", "absolutely", "okay", "ok", "great", "got it"];
/// How it announces the prompt,
const ANNOUNCING: &[&str] = &["here is", "here's", "here’s", "here are", "this is", "below is"];
/// and what it then calls it.
const CALLED: &[&str] = &["prompt", "prompts", "version", "description", "caption", "rewrite"];
/// Longest announcement, in words.
const ANNOUNCEMENT: usize = 14;

/// Strips markdown marks, code fences, quotes around the whole and an assistant's leading sentence. Words of the prompt itself stay as
/// they are, and cleaning twice changes nothing.
#[must_use]
pub fn clean(prompt: &str) -> String {
    let mut text = once(prompt);
    // Each pass takes something away, so this ends.
    loop {
        let next = once(&text);
        if next == text {
            return text;
        }
        text = next;
    }
}

fn once(prompt: &str) -> String {
    let lines = || prompt.lines().map(str::trim).filter(|line| !line.is_empty() && !is_fence(line));
    let numbered = lines().filter(|line| number(line).is_some()).count() > 1;
    let mut lines: Vec<String> = lines().map(|line| marks(line, numbered)).filter(|line| !line.is_empty()).collect();
    let rest = lines.first().and_then(|first| without_announcement(first, lines.len() > 1)).map(str::to_owned);
    match rest {
        Some(rest) if rest.is_empty() => _ = lines.remove(0),
        Some(rest) => lines[0] = rest,
        None => {}
    }
    unquoted(lines.join(" ").trim()).to_owned()
}

/// Three backticks alone or with the name of a language.
fn is_fence(line: &str) -> bool {
    line.strip_prefix("```").is_some_and(|language| language.chars().all(|c| c.is_ascii_alphanumeric()))
}

/// What follows `1. ` or `1) `.
fn number(line: &str) -> Option<&str> {
    let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
    if rest.len() == line.len() { None } else { rest.strip_prefix(". ").or_else(|| rest.strip_prefix(") ")) }
}

/// A line without list marks, headings and emphasis. One number alone may be the prompt's own.
fn marks(line: &str, numbered: bool) -> String {
    let hashes = line.trim_start_matches('#');
    let line = if hashes.len() < line.len() && hashes.starts_with(' ') { hashes.trim_start() } else { line };
    let line = ["> ", "- ", "* ", "+ ", "• "].iter().find_map(|mark| line.strip_prefix(mark)).unwrap_or(line);
    let line = if numbered { number(line).unwrap_or(line) } else { line };
    let line = ["```", "***", "**", "__", "*", "`"].iter().fold(line.to_owned(), |line, mark| without_pairs(&line, mark));
    line.trim().into()
}

/// Takes `mark` away where a pair of it encloses words, as in `**word**`; `5 * 3`, `2**8` and `my__name` keep theirs.
fn without_pairs(line: &str, mark: &str) -> String {
    let word = |c: char| c.is_alphanumeric() || mark.starts_with(c);
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find(mark) {
        let (before, inside) = (&rest[..start], &rest[start + mark.len()..]);
        let opens = !before.chars().next_back().or(out.chars().next_back()).is_some_and(word)
            && inside.chars().next().is_some_and(|c| !c.is_whitespace() && !mark.starts_with(c));
        let closes = |at: usize| {
            inside[..at].chars().next_back().is_some_and(|c| !c.is_whitespace())
                && !inside[at + mark.len()..].chars().next().is_some_and(word)
        };
        out.push_str(before);
        match inside.match_indices(mark).map(|(at, _)| at).find(|at| opens && closes(*at)) {
            Some(end) => {
                out.push_str(&inside[..end]);
                rest = &inside[end + mark.len()..];
            }
            None => {
                out.push_str(mark);
                rest = inside;
            }
        }
    }
    out + rest
}

/// What follows a leading `Sure! Here is your prompt:`, if the line begins like that. With `more` lines after it, the line may end
/// in a full stop or an exclamation mark too.
fn without_announcement(line: &str, more: bool) -> Option<&str> {
    let colon = line.match_indices(':').map(|(at, _)| at).find(|at| {
        // A colon within a word or number, such as a weight, is the prompt's own.
        line[at + 1..].chars().next().is_none_or(|c| c.is_whitespace() || "\"“'«".contains(c))
    });
    if let Some(at) = colon
        && announces(&line[..at])
    {
        let rest = line[at + 1..].trim();
        return (more || !rest.is_empty()).then_some(rest);
    }
    (more && line.ends_with(['.', '!']) && announces(line)).then_some("")
}

fn announces(sentence: &str) -> bool {
    let mut text = sentence.trim().to_lowercase();
    let mut agreed = false;
    while let Some(rest) = AGREEING.iter().find_map(|word| {
        let rest = text.strip_prefix(word)?;
        (rest.is_empty() || rest.starts_with([',', '!', '.'])).then_some(rest)
    }) {
        text = rest.trim_start_matches([',', '!', '.', ' ']).to_owned();
        agreed = true;
    }
    let words: Vec<&str> =
        text.split(|c: char| !c.is_alphanumeric() && c != '’' && c != '\'').filter(|w| !w.is_empty()).collect();
    let called = |word: &&str| CALLED.contains(word);
    let announced = ANNOUNCING.iter().any(|start| text.strip_prefix(start).is_some_and(|rest| rest.starts_with(' ')));
    match words.len() {
        0 => agreed,
        // `Prompt:`, `The final prompt:`
        1..=3 if words.last() == Some(&"prompt") => true,
        n => n <= ANNOUNCEMENT && announced && words.iter().any(called),
    }
}

fn unquoted(text: &str) -> &str {
    for (open, close) in [('"', '"'), ('“', '”'), ('\'', '\''), ('«', '»')] {
        if let Some(inner) = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close))
            && !inner.contains([open, close])
        {
            return inner.trim();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chatter_and_markdown_go() {
        for (written, meant) in [
            ("Here is your prompt:\n\n**confident woman**, street fashion", "confident woman, street fashion"),
            ("Sure! Here's a detailed prompt: \"a cat in a hat\"", "a cat in a hat"),
            ("Certainly!\na cat", "a cat"),
            ("Of course. Here’s the improved version:\n> a cat", "a cat"),
            ("**Prompt:** a cat", "a cat"),
            ("Final prompt: Prompt: a cat", "a cat"),
            ("```text\na cat\n```", "a cat"),
            ("# Portrait\n- red hair\n- smiling", "Portrait red hair smiling"),
            ("```a cat```", "a cat"),
            ("1. a cat\n2. a dog", "a cat a dog"),
            ("Prompt: a `cat`", "a cat"),
            ("a *very* __red__ ***hat***", "a very red hat"),
            ("“a cat”", "a cat"),
            ("Here is the prompt: (red:1.2) hat, 12:30", "(red:1.2) hat, 12:30"),
        ] {
            assert_eq!(clean(written), meant, "{written:?}");
            assert_eq!(clean(meant), meant);
        }
    }

    #[test]
    fn a_plain_prompt_stays() {
        for prompt in [
            "",
            "a cat, (red:1.2) hat",
            "time 12:30 on a clock",
            "user42, confident woman",
            "sure-footed goat: a study",
            "5 * 3 written on a board",
            "2**8 and 3**4",
            "my__own__user, portrait",
            "#1 dad on a mug",
            "1. FC players in the rain",
            "OK sign: neon letters",
            "prompt engineering book: cover art",
            "here is a woman: she smiles",
            "Sure, a (red:1.2) hat",
            "great wave: a woodcut",
            "the sign says \"open\"",
            "-5 degrees, frost",
            ">_< emoticon",
            "ok",
            "Prompt:",
        ] {
            assert_eq!(clean(prompt), prompt);
        }
    }

    #[test]
    fn cleaning_twice_changes_nothing() {
        let pieces = [
            "**", "*", "__", "`", "```", "\n", " ", "\"", "“", "”", "Sure!", "Here is", "prompt", ":", "a", "猫", "é", "- ",
            "# ", "1. ", ">", ".",
        ];
        let mut random = fastrand::Rng::with_seed(9);
        for _ in 0..20_000 {
            let text: String = (0..random.usize(..12)).map(|_| pieces[random.usize(..pieces.len())]).collect();
            let once = clean(&text);
            assert_eq!(clean(&once), once, "{text:?}");
            for word in ["猫", "é"] {
                // Only an announcement may take words with it.
                assert!(!text.contains(word) || once.contains(word) || text.contains("prompt"), "{text:?}");
            }
        }
    }
}
