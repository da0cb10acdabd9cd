//! Where a request may go. Checked for the first address and for every redirect; names are resolved once, and what was checked is
//! what is connected to.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::Error;
use super::address::is_public;

/// What may be reached.
#[derive(Debug, Clone, Default)]
pub(super) struct Guard {
    /// Plain http, any port and private addresses too: the operator's choice for mirrors in their own network.
    pub(super) private: bool,
    /// Origins that the operator has set, such as a mirror of the hub.
    pub(super) trusted: Vec<Url>,
}

impl Guard {
    pub(super) fn check(&self, url: &Url) -> Result<(), Error> {
        let refuse = |why| Err(Error::NotAllowed { url: redacted(url), why });
        if !matches!(url.scheme(), "https" | "http") {
            return refuse("its scheme is not https");
        }
        if !url.username().is_empty() || url.password().is_some() {
            return refuse("it holds a user name or a password");
        }
        if self.private || self.trusted.iter().any(|trusted| trusted.origin() == url.origin()) {
            return Ok(());
        }
        if url.scheme() != "https" {
            return refuse("its scheme is not https");
        }
        if url.port().is_some() {
            return refuse("its port is not https' own");
        }
        // Resolvers are not asked for literals; `Url` has turned every odd spelling of an address into one of these.
        let public = match url.host() {
            Some(Host::Ipv4(address)) => is_public(address.into()),
            Some(Host::Ipv6(address)) => is_public(address.into()),
            Some(Host::Domain(name)) => !name.is_empty(),
            None => false,
        };
        if public { Ok(()) } else { refuse(PRIVATE) }
    }

    /// Whether the name may resolve to anything.
    fn trusts(&self, name: &str) -> bool {
        self.private || self.trusted.iter().any(|url| url.host_str() == Some(name))
    }
}

const PRIVATE: &str = "it does not lead to the public internet";

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let (name, trusted) = (name.as_str().to_owned(), self.trusts(name.as_str()));
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            // One private answer among public ones is a trick, not a mirror.
            if !trusted && !found.iter().all(|address| is_public(address.ip())) {
                return Err(Box::new(Refused) as _);
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The resolver's refusal, found again in the chain of the client's error. Says nothing of the address.
#[derive(Debug)]
struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PRIVATE)
    }
}

impl std::error::Error for Refused {}

/// An error of the client in our words: without the address that was tried, and without what the link holds in secret.
pub(super) fn explain(error: &reqwest::Error, url: &Url) -> Error {
    let host = url.host_str().unwrap_or_default().to_owned();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut certificate = false;
    while let Some(error) = cause {
        if error.is::<Refused>() {
            return Error::NotAllowed { url: redacted(url), why: PRIVATE };
        }
        // rustls' errors come as text through io::Error.
        certificate |= error.to_string().contains("certificate");
        cause = error.source();
    }
    if certificate {
        Error::Certificate(host)
    } else if error.is_connect() {
        Error::Unreachable(host)
    } else {
        Error::Broken(host)
    }
}

/// A link as it may be shown: of the query only the names, since the values sign it.
pub(super) fn redacted(url: &Url) -> String {
    let mut text = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
    if let Some(port) = url.port() {
        text += &format!(":{port}");
    }
    text += url.path();
    for (i, (key, _)) in url.query_pairs().enumerate() {
        text += if i == 0 { "?" } else { "&" };
        text += &format!("{key}=...");
    }
    text.chars().filter(|c| !c.is_control()).collect()
}

/// The guard as the client's resolver.
pub(super) fn resolver(guard: &Guard) -> Arc<Guard> {
    Arc::new(guard.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(guard: &Guard, url: &str) -> bool {
        Url::parse(url).is_ok_and(|url| guard.check(&url).is_ok())
    }

    #[test]
    fn odd_spellings_of_private_places_are_refused() {
        let guard = Guard::default();
        assert!(allowed(&guard, "https://example.com/a.safetensors?sig=1"));
        assert!(allowed(&guard, "https://1.1.1.1/a"));
        for url in [
            "http://example.com/a",
            "ftp://example.com/a",
            "file:///etc/passwd",
            "gopher://example.com",
            "https://user@example.com/",
            "https://user:pass@example.com/",
            "https://example.com:22/",
            "https://example.com:6379/",
            "https://127.0.0.1/",
            "https://2130706433/",
            "https://0177.0.0.1/",
            "https://0x7f.1/",
            "https://127.0.0.1%2e/",
            "https://127.1/",
            "https://[::1]/",
            "https://[::]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[::ffff:7f00:1]/",
            "https://0/",
            "https://169.254.169.254/latest/meta-data",
            "https://[fd00::1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://１２７.0.0.1/",
            "data:,x",
            "s3://bucket/key",
        ] {
            assert!(!allowed(&guard, url), "{url}");
        }
    }

    #[test]
    fn the_operator_may_open_it() {
        let url = "http://192.168.1.2:8080/a.safetensors";
        assert!(allowed(&Guard { private: true, ..Guard::default() }, url));
        let mirror = Guard { trusted: vec![Url::parse("http://192.168.1.2:8080/hub").unwrap()], ..Guard::default() };
        assert!(allowed(&mirror, url) && !allowed(&mirror, "http://192.168.1.2:8081/a"));
        assert!(!allowed(&Guard { private: true, ..Guard::default() }, "file:///etc/passwd"));
    }

    #[tokio::test]
    async fn names_are_judged_by_what_they_resolve_to() {
        let lookup = |guard: Guard| async move { guard.resolve("localhost".parse().unwrap()).await.map(Iterator::count) };
        assert_eq!(lookup(Guard::default()).await.unwrap_err().to_string(), PRIVATE);
        assert!(lookup(Guard { private: true, ..Guard::default() }).await.is_ok_and(|answers| answers > 0));
    }

    #[test]
    fn links_are_shown_without_their_secrets() {
        let url = Url::parse("https://me:pw@h.example/a/b.safetensors?X-Amz-Signature=abc&token=def#frag").unwrap();
        assert_eq!(redacted(&url), "https://h.example/a/b.safetensors?X-Amz-Signature=...&token=...");
    }
}
