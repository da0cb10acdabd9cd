//! Prompts that a chat model wrote: its greeting and its markdown are no part of the picture.

/// How an assistant begins before it comes to the prompt.
const OPENINGS: &[&str] = &[
    "here is",
    "here's",
    "here are",
    "sure",
    "certainly",
    "of course",
    "absolutely",
    "okay",
    "ok",
    "prompt",
    "the prompt",
    "image prompt",
    "final prompt",
];

/// Strips markdown marks, code fences, quotes around the whole and an assistant's leading sentence that ends in a colon. Words of
/// the prompt itself stay as they are.
#[must_use]
pub fn clean(prompt: &str) -> String {
    let mut lines: Vec<String> =
        prompt.lines().filter(|line| !line.trim_start().starts_with("```")).map(|line| marks(line.trim())).collect();
    lines.retain(|line| !line.is_empty());
    if let Some(first) = lines.first() {
        let rest = without_opening(first).to_owned();
        if rest.is_empty() && lines.len() > 1 {
            lines.remove(0);
        } else if !rest.is_empty() {
            lines[0] = rest;
        }
    }
    unquoted(lines.join(" ").trim()).to_owned()
}

/// A line without list marks, headings and emphasis.
fn marks(line: &str) -> String {
    let line = line.trim_start_matches('#').trim_start_matches('>').trim_start();
    let line = ["- ", "* ", "+ ", "• "].iter().find_map(|mark| line.strip_prefix(mark)).unwrap_or(line);
    line.replace("**", "").replace("__", "").replace('`', "").trim().into()
}

/// What follows a leading `Here is your prompt:`.
fn without_opening(line: &str) -> &str {
    let Some((before, after)) = line.split_once(':') else { return line };
    let before = before.trim().to_lowercase();
    let opening = OPENINGS.iter().any(|opening| {
        before.strip_prefix(opening).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', ',', '!', '.']))
    });
    // A colon after a weight or deep in a sentence is the prompt's own.
    if opening && before.split_whitespace().count() <= 12 { after.trim() } else { line }
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
        assert_eq!(clean("Here is your prompt:\n\n**confident woman**, street fashion"), "confident woman, street fashion");
        assert_eq!(clean("Sure! Here's a detailed prompt: \"a cat in a hat\""), "a cat in a hat");
        assert_eq!(clean("```text\na cat\n```"), "a cat");
        assert_eq!(clean("# Portrait\n- red hair\n- smiling"), "Portrait red hair smiling");
        assert_eq!(clean("Prompt: a `cat`"), "a cat");
    }

    #[test]
    fn a_plain_prompt_stays() {
        for prompt in [
            "a cat, (red:1.2) hat",
            "time 12:30 on a clock",
            "user42, confident woman",
            "sure-footed goat: a study",
            "5 * 3 written on a board",
            "the sign says \"open\"",
        ] {
            assert_eq!(clean(prompt), prompt);
            assert_eq!(clean(&clean(prompt)), clean(prompt));
        }
        assert_eq!(clean(""), "");
    }
}
