//! One GET request: guarded at every hop, patient where patience helps, and silent about secrets.

use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Response, StatusCode, redirect};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use url::Url;

use super::guard::{self, Guard, redacted};
use super::{Error, Limits};
use crate::config::Secret;

pub(super) const MOST_HOPS: usize = 5;

/// Larger than any listing of a repository, in bytes.
const MOST_JSON: usize = 8 << 20;

/// Longer than this a client is not kept waiting because a server says so.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    pub(super) guard: Guard,
    pub(super) limits: Limits,
}

/// What to ask for, and as whom. `hint` says what to do when that is not permitted or not there.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) url: Url,
    pub(super) bearer: Option<Secret>,
    pub(super) unauthorized: String,
    pub(super) not_found: String,
}

impl Client {
    pub(super) fn new(guard: Guard, limits: Limits) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("darkroom/", env!("CARGO_PKG_VERSION")))
            // A proxy would resolve names itself, out of the guard's sight.
            .no_proxy()
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(limits.connect)
            .dns_resolver(guard::resolver(&guard))
            .build()
            .map_err(Error::Client)?;
        Ok(Self { http, guard, limits })
    }

    /// The answer's head, after redirects, and again after failures that pass. Statuses other than 2xx, 304 and 416 are errors.
    pub(super) async fn get(&self, ask: &Ask, headers: &HeaderMap) -> Result<Response, Error> {
        let mut attempt = 0;
        loop {
            let (error, pause) = match self.follow(ask, headers).await {
                Ok(response) => match self.judge(ask, response) {
                    Ok(response) => return Ok(response),
                    Err(failed) => failed,
                },
                Err(error) => (error, None),
            };
            attempt += 1;
            if !error.is_passing() || attempt >= self.limits.attempts {
                return Err(error);
            }
            self.pause(attempt, pause).await;
        }
    }

    /// An error unless whoever asks may have it: its first byte is asked for.
    pub(super) async fn reach(&self, ask: &Ask) -> Result<(), Error> {
        let first = HeaderMap::from_iter([(RANGE, HeaderValue::from_static("bytes=0-0"))]);
        self.get(ask, &first).await.map(drop)
    }

    /// One request with a body, and its answer whatever the status.
    pub(super) async fn post(&self, url: &Url, headers: HeaderMap, body: Vec<u8>) -> Result<Response, Error> {
        self.guard.check(url)?;
        let request = self.http.post(url.clone()).headers(headers).body(body);
        match timeout(self.limits.headers, request.send()).await {
            Ok(response) => response.map_err(|error| guard::explain(&error, url)),
            Err(_) => Err(self.stalled(url, self.limits.headers)),
        }
    }

    /// Waits before attempt number `attempt`: longer each time, or as long as the server asked.
    pub(super) async fn pause(&self, attempt: u32, asked: Option<Duration>) {
        let own = self.limits.pause * 2u32.saturating_pow(attempt.saturating_sub(1).min(6));
        sleep(asked.map_or(own, |asked| asked.min(LONGEST_PAUSE))).await;
    }

    async fn follow(&self, ask: &Ask, headers: &HeaderMap) -> Result<Response, Error> {
        let mut url = ask.url.clone();
        for _ in 0..=MOST_HOPS {
            self.guard.check(&url)?;
            let mut request = self.http.get(url.clone()).headers(headers.clone()).header(ACCEPT_ENCODING, "identity");
            // Whoever is redirected to has no business with the token.
            if let Some(bearer) = ask.bearer.as_ref().filter(|_| url.origin() == ask.url.origin()) {
                let mut value = HeaderValue::from_str(&format!("Bearer {}", bearer.reveal())).map_err(|_| {
                    Error::Unauthorized { what: redacted(&ask.url), hint: "the token holds a line break or the like".into() }
                })?;
                value.set_sensitive(true);
                request = request.header(AUTHORIZATION, value);
            }
            let response = match timeout(self.limits.headers, request.send()).await {
                Ok(response) => response.map_err(|error| guard::explain(&error, &url))?,
                Err(_) => return Err(self.stalled(&url, self.limits.headers)),
            };
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            url = redirected(&url, response.headers().get(LOCATION).and_then(|value| value.to_str().ok()))?;
        }
        Err(Error::Redirects(redacted(&ask.url)))
    }

    fn judge(&self, ask: &Ask, response: Response) -> Result<Response, (Error, Option<Duration>)> {
        let what = || redacted(&ask.url);
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::NOT_MODIFIED | StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err((Error::Unauthorized { what: what(), hint: ask.unauthorized.clone() }, None))
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                Err((Error::NotFound { what: what(), hint: ask.not_found.clone() }, None))
            }
            status if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
                Err((Error::Status { host: host(response.url()), status: status.as_u16() }, after.map(Duration::from_secs)))
            }
            _ => Err((Error::Answer(host(response.url())), None)),
        }
    }

    /// The next piece of a body, or `None` at its end.
    pub(super) async fn chunk(&self, response: &mut Response) -> Result<Option<bytes::Bytes>, Error> {
        match timeout(self.limits.stall, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(_)) => Err(Error::Broken(host(response.url()))),
            Err(_) => Err(self.stalled(response.url(), self.limits.stall)),
        }
    }

    pub(super) async fn json(&self, ask: &Ask) -> Result<Value, Error> {
        serde_json::from_slice(&self.text(ask).await?).map_err(|_| Error::Answer(host(&ask.url)))
    }

    /// A short answer's bytes.
    pub(super) async fn text(&self, ask: &Ask) -> Result<Vec<u8>, Error> {
        let mut response = self.get(ask, &HeaderMap::new()).await?;
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            body.extend_from_slice(&chunk);
            if body.len() > MOST_JSON {
                return Err(Error::Answer(host(response.url())));
            }
        }
        Ok(body)
    }

    fn stalled(&self, url: &Url, after: Duration) -> Error {
        Error::Stalled { host: host(url), seconds: after.as_secs() }
    }
}

/// Where a redirect leads; whether one may go there is the guard's to say.
fn redirected(from: &Url, location: Option<&str>) -> Result<Url, Error> {
    let to = location.and_then(|location| from.join(location).ok()).ok_or_else(|| Error::Answer(host(from)))?;
    if from.scheme() == "https" && to.scheme() != "https" {
        return Err(Error::NotAllowed { url: redacted(&to), why: "an https link leads there" });
    }
    Ok(to)
}

pub(super) fn host(url: &Url) -> String {
    url.host_str().unwrap_or_default().to_owned()
}

/// A header as text.
pub(super) fn header(response: &Response, name: &HeaderName) -> Option<String> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_encrypted() {
        let to = |from: &str, location| redirected(&Url::parse(from).unwrap(), location).map(String::from).map_err(|e| e.code());
        assert_eq!(to("https://a.example/x/y", Some("z?q=1")), Ok("https://a.example/x/z?q=1".into()));
        assert_eq!(to("https://a.example/x", Some("//b.example/")), Ok("https://b.example/".into()));
        assert_eq!(to("http://a.example/x", Some("https://b.example/")), Ok("https://b.example/".into()));
        assert_eq!(to("https://a.example/x", Some("http://a.example/x")), Err("url_not_allowed"));
        assert_eq!(to("https://a.example/x", Some("http://[")), Err("bad_answer"));
        assert_eq!(to("https://a.example/x", None), Err("bad_answer"));
    }
}
