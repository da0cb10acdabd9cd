//! What requests say beside their input: the body's form, headers, webhooks.

use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use serde_json::{Map, Value};

use crate::api::problem::Problem;
use crate::jobs::{Event, Webhook};

/// Deepest that lists and objects of a body may lie in each other. It is stored inside of more, and readers of JSON end at 128.
const DEEPEST: usize = 64;

/// Longest address of a webhook, in bytes.
const LONGEST_WEBHOOK: usize = 4096;

/// Longest that an answer is held back, and what `Prefer: wait` without a number means.
const LONGEST_WAIT: u64 = 60;

/// A JSON object; other media types are refused, since a form of another site could send them.
pub(in crate::api) fn object(headers: &HeaderMap, body: &[u8]) -> Result<Map<String, Value>, Problem> {
    let json = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")));
    if !json {
        return Err(Problem::Media);
    }
    match serde_json::from_slice::<Value>(body) {
        Ok(body) if is_deeper(&body, DEEPEST) => Err(too_deep("")),
        Ok(Value::Object(body)) => Ok(body),
        Ok(_) => Err(Problem::invalid("invalid_type", "", "Invalid type. Expected: object")),
        Err(error) => Err(Problem::invalid("invalid_json", "", format!("the body is not JSON: {error}"))),
    }
}

/// A value that came as text, such as one of a form. `None` if it is no JSON.
pub(in crate::api) fn value(field: &str, text: &str) -> Result<Option<Value>, Problem> {
    match serde_json::from_str::<Value>(text) {
        Ok(value) if is_deeper(&value, DEEPEST) => Err(too_deep(field)),
        value => Ok(value.ok()),
    }
}

/// Whether more than `most` lists and objects lie in each other.
fn is_deeper(value: &Value, most: usize) -> bool {
    let deeper = |value: &Value| is_deeper(value, most - 1);
    match value {
        Value::Array(list) => most == 0 || list.iter().any(deeper),
        Value::Object(map) => most == 0 || map.values().any(deeper),
        _ => false,
    }
}

fn too_deep(field: &str) -> Problem {
    let said =
        format!("lists and objects lie in each other more than {DEEPEST} deep; at most {DEEPEST} are allowed: send it flatter");
    Problem::invalid("invalid", field, said)
}

/// `Prefer: wait` or `wait=n`.
pub(super) fn wait(headers: &HeaderMap) -> Result<Option<Duration>, Problem> {
    let Some(prefer) = headers.get("prefer").and_then(|prefer| prefer.to_str().ok()) else { return Ok(None) };
    for part in prefer.split([',', ';']).map(str::trim) {
        match part.split_once('=') {
            None if part.eq_ignore_ascii_case("wait") => return Ok(Some(Duration::from_secs(LONGEST_WAIT))),
            Some((name, seconds)) if name.trim().eq_ignore_ascii_case("wait") => {
                let wrong =
                    || Problem::invalid("invalid", "", "Prefer must be wait, or wait=n with n from 1 to 99; above 60 is 60");
                let seconds: u64 = seconds.trim().parse().ok().filter(|seconds| (1..=99).contains(seconds)).ok_or_else(wrong)?;
                return Ok(Some(Duration::from_secs(seconds.min(LONGEST_WAIT))));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// `Cancel-After: 90`, `1m30s`, `2h`: in milliseconds, from 5 s to 24 h.
pub(super) fn within(headers: &HeaderMap) -> Result<Option<i64>, Problem> {
    let Some(text) = headers.get("cancel-after").map(|after| after.to_str().unwrap_or_default().trim().to_owned()) else {
        return Ok(None);
    };
    let mut seconds: i64 = 0;
    let mut number = String::new();
    let mut good = !text.is_empty();
    for c in text.chars() {
        let factor = match c {
            '0'..='9' => {
                number.push(c);
                continue;
            }
            's' => 1,
            'm' => 60,
            'h' => 3600,
            _ => 0,
        };
        good &= factor > 0 && !number.is_empty();
        seconds = seconds.saturating_add(number.parse::<i64>().unwrap_or(0).saturating_mul(factor));
        number.clear();
    }
    seconds = seconds.saturating_add(number.parse().unwrap_or(0));
    if good && (5..=86_400).contains(&seconds) {
        return Ok(Some(seconds * 1000));
    }
    let description = "Cancel-After must be a time from 5s to 24h, such as 90, 30s or 1m30s";
    Err(Problem::invalid("invalid", "", description))
}

pub(in crate::api) fn webhook(body: &Map<String, Value>) -> Result<Option<Webhook>, Problem> {
    let Some(url) = body.get("webhook").or(body.get("webhook_completed")).and_then(Value::as_str) else { return Ok(None) };
    let bad = |field: &str, text: &str| Problem::invalid("invalid", field, text);
    if !(url.starts_with("https://") || url.starts_with("http://")) || url.contains(char::is_control) {
        return Err(bad("webhook", "Does not match format 'uri'"));
    }
    if url.len() > LONGEST_WEBHOOK {
        return Err(bad(
            "webhook",
            &format!("is {} bytes long, and must be at most {LONGEST_WEBHOOK}: give a shorter link", url.len()),
        ));
    }
    let events = match body.get("webhook_events_filter").filter(|filter| !filter.is_null()) {
        // What old clients send names its one event.
        None if !body.contains_key("webhook") => vec![Event::Completed],
        None => Event::ALL.to_vec(),
        Some(filter) => {
            let known = |event: &Value| event.as_str().and_then(|event| event.parse().ok());
            let events: Option<Vec<Event>> = filter.as_array().and_then(|events| events.iter().map(known).collect());
            let events =
                events.ok_or_else(|| bad("webhook_events_filter", "must be a list of start, output, logs and completed"))?;
            // Each once, however often it is named.
            let mut once = Vec::new();
            for event in events {
                if !once.contains(&event) {
                    once.push(event);
                }
            }
            once
        }
    };
    Ok(Some(Webhook { url: url.into(), events }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn what_lies_too_deep() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(value("", &nested(DEEPEST)).unwrap().unwrap().to_string(), nested(DEEPEST));
        assert!(value("", &nested(DEEPEST + 1)).is_err() && value("", &nested(1000)).unwrap().is_none());
        let headers = headers("content-type", "application/json");
        let body = |depth: usize| object(&headers, format!("{{\"a\": {}}}", nested(depth)).as_bytes()).is_ok();
        assert!(body(DEEPEST - 1) && !body(DEEPEST));
    }

    #[test]
    fn webhooks_are_short() {
        let read = |body: Value| webhook(body.as_object().unwrap());
        let url = format!("https://example.com/{}", "a".repeat(LONGEST_WEBHOOK - 20));
        let events = vec!["output"; 100_000];
        let hook = read(json!({ "webhook": url, "webhook_events_filter": events })).unwrap().unwrap();
        assert_eq!((hook.url.len(), hook.events), (LONGEST_WEBHOOK, vec![Event::Output]));
        assert!(read(json!({ "webhook": url + "a" })).is_err());
    }

    #[test]
    fn waiting_and_deadlines() {
        let seconds = |value: &str| wait(&headers("prefer", value)).map(|wait| wait.map(|wait| wait.as_secs())).map_err(drop);
        assert_eq!(seconds("wait"), Ok(Some(60)));
        assert_eq!(seconds("wait=5"), Ok(Some(5)));
        assert_eq!(seconds("respond-async, wait=99"), Ok(Some(60)));
        assert_eq!(seconds("respond-async"), Ok(None));
        assert!(seconds("wait=0").is_err() && seconds("wait=x").is_err());
        let after = |value: &str| within(&headers("cancel-after", value)).map_err(drop);
        assert_eq!(after("90"), Ok(Some(90_000)));
        assert_eq!(after("1m30s"), Ok(Some(90_000)));
        assert_eq!(after("24h"), Ok(Some(86_400_000)));
        for bad in ["", "4", "25h", "m", "1d", "-5", "5 s"] {
            assert!(after(bad).is_err(), "{bad}");
        }
    }
}
