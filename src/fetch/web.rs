//! Guarded requests for what is no adapter: pictures to start from, and webhooks.

use std::time::Duration;

use reqwest::header::HeaderMap;
use url::Url;

use super::client::{self, Ask, Client};
use super::guard::{Guard, redacted};
use super::{Error, Limits};

/// Longest answer of a webhook that is read, in bytes; what is longer is left.
const HEARD: usize = 1024;

/// How long is listened to what a webhook says after its status.
const LISTENING: Duration = Duration::from_secs(1);

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
        // For all of it: whoever answers slowly holds one of few places.
        let patience = self.client.limits.headers;
        let told = self.told(&url, headers, body);
        let stalled = || Error::Stalled { host: client::host(&url), seconds: patience.as_secs() };
        tokio::time::timeout(patience, told).await.unwrap_or_else(|_| Err(stalled()))
    }

    async fn told(&self, url: &Url, headers: HeaderMap, body: Vec<u8>) -> Result<(u16, Option<Duration>), Error> {
        let mut response = self.client.post(url, headers, body).await?;
        let after = response.headers().get(reqwest::header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let status = response.status().as_u16();
        // So that the connection can be used again, if there is not much to read and it comes at once.
        let mut heard = 0;
        let listen = async {
            while heard < HEARD
                && let Ok(Some(chunk)) = self.client.chunk(&mut response).await
            {
                heard += chunk.len();
            }
        };
        let _ = tokio::time::timeout(LISTENING, listen).await;
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// One that dribbles the head of its answer, and one that dribbles what comes after it.
    #[tokio::test]
    async fn a_webhook_that_dribbles_is_not_waited_for() {
        for (at_once, in_time) in [("HTTP/1.1 2", false), ("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", true)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let link = format!("http://{}/", listener.local_addr().unwrap());
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(at_once.as_bytes()).await;
                while stream.write_all(b"0").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            });
            let second = Duration::from_secs(2);
            let web = Web::new(true, Limits { headers: second, stall: second, ..Limits::default() }).unwrap();
            let begun = Instant::now();
            let told = web.post(&link, HeaderMap::new(), Vec::new()).await;
            assert_eq!(told.is_ok(), in_time, "{told:?}");
            assert!(begun.elapsed() < 2 * second, "{:?}", begun.elapsed());
        }
    }
}
