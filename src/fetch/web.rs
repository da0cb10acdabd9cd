//! Guarded requests for what is no adapter: pictures to start from, and webhooks.

use std::time::Duration;

use reqwest::header::HeaderMap;
use url::Url;

use super::client::{Ask, Client};
use super::guard::{Guard, redacted};
use super::{Error, Limits};

/// Longest answer of a webhook that is read, in bytes; what is longer is left.
const HEARD: usize = 1024;

/// A client for strangers' links. Clones share the connections.
#[derive(Debug, Clone)]
pub struct Web {
    client: std::sync::Arc<Client>,
}

impl Web {
    /// With `private`, one's own network may be reached.
    pub fn new(private: bool, limits: Limits) -> Result<Self, Error> {
        let client = Client::new(Guard { private, trusted: Vec::new() }, limits)?;
        Ok(Self { client: std::sync::Arc::new(client) })
    }

    /// Whether a link could be asked at all: what it resolves to is seen only then.
    pub fn check(&self, link: &str) -> Result<(), Error> {
        self.client.guard.check(&parse(link)?)
    }

    /// The file at a link, at most `most` bytes.
    pub async fn get(&self, link: &str, most: usize) -> Result<Vec<u8>, Error> {
        let ask = Ask {
            url: parse(link)?,
            bearer: None,
            unauthorized: "give a link that needs no login".into(),
            not_found: "check the link".into(),
        };
        let mut response = self.client.get(&ask, &HeaderMap::new()).await?;
        let mut body = Vec::new();
        while let Some(chunk) = self.client.chunk(&mut response).await? {
            body.extend_from_slice(&chunk);
            if body.len() > most {
                return Err(Error::PictureTooLarge(most));
            }
        }
        Ok(body)
    }

    /// Tells a webhook. The status that it answers with, and for how long it wants to be left alone. No redirect is followed.
    pub async fn post(&self, link: &str, headers: HeaderMap, body: Vec<u8>) -> Result<(u16, Option<Duration>), Error> {
        let url = parse(link)?;
        let mut response = self.client.post(&url, headers, body).await?;
        let after = response.headers().get(reqwest::header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let status = response.status().as_u16();
        // So that the connection can be used again, if there is not much to read.
        let mut heard = 0;
        while heard < HEARD {
            match self.client.chunk(&mut response).await {
                Ok(Some(chunk)) => heard += chunk.len(),
                _ => break,
            }
        }
        Ok((status, after.map(Duration::from_secs)))
    }
}

fn parse(link: &str) -> Result<Url, Error> {
    Url::parse(link)
        .map_err(|_| Error::NotAllowed { url: link.chars().take(80).filter(|c| !c.is_control()).collect(), why: "it is no link" })
}

/// A link as it may be shown.
#[must_use]
pub fn shown_link(link: &str) -> String {
    Url::parse(link).map_or_else(|_| "a link".into(), |url| redacted(&url))
}
