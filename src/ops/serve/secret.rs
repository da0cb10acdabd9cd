//! A service's secret: signs links and webhooks, and seals what must not lie open in the database.

use std::io::{self, Write};
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::hex::{hex, unhex};

const BYTES: usize = 32;

/// Made once and kept in the data folder. Services that share a database and their pictures must share it as well.
#[derive(Clone)]
pub struct Secret([u8; BYTES]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// That of a data folder, made if there is none.
    pub fn of(data: &Path) -> io::Result<Self> {
        let path = data.join("secret");
        match std::fs::read(&path) {
            Ok(bytes) => {
                let damaged = |_| io::Error::other(format!("{} is damaged; remove it, or put a copy back", path.display()));
                return bytes.try_into().map(Self).map_err(damaged);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut secret = [0; BYTES];
        aws_lc_rs::rand::fill(&mut secret).map_err(|_| io::Error::other("the system has no random numbers"))?;
        // Readable by its owner alone, as temporary files are made.
        let mut file = tempfile::NamedTempFile::new_in(data)?;
        file.write_all(&secret)?;
        file.as_file().sync_all()?;
        match file.persist_noclobber(&path) {
            Ok(_) => Ok(Self(secret)),
            // Another process was faster.
            Err(_) => Self::of(data),
        }
    }

    /// A key for one purpose; none of them tells of another.
    fn derive(&self, purpose: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("any length is a key");
        mac.update(purpose.as_bytes());
        mac.update(b"\n");
        mac
    }

    /// A signature of `text`, in hexadecimal digits.
    #[must_use]
    pub fn sign(&self, purpose: &str, text: &str) -> String {
        let mut mac = self.derive(purpose);
        mac.update(text.as_bytes());
        hex(&mac.finalize().into_bytes())
    }

    /// Whether a signature is ours, in constant time.
    #[must_use]
    pub fn signed(&self, purpose: &str, text: &str, signature: &str) -> bool {
        let mut mac = self.derive(purpose);
        mac.update(text.as_bytes());
        unhex(signature).is_some_and(|signature| mac.verify_slice(&signature).is_ok())
    }

    /// The key that a tenant checks webhooks with. Standard base64, never the one for links: clients split it at underscores.
    #[must_use]
    pub fn webhook_key(&self, tenant: &str) -> [u8; 24] {
        let mut mac = self.derive("webhooks");
        mac.update(tenant.as_bytes());
        std::array::from_fn({
            let bytes = mac.finalize().into_bytes();
            move |i| bytes[i]
        })
    }

    /// Text that only this service can read again.
    pub fn seal(&self, text: &str) -> io::Result<String> {
        let failed = |_| io::Error::other("encryption failed");
        let mut bytes = text.as_bytes().to_vec();
        let nonce = self.cipher().seal_in_place_append_tag(Aad::empty(), &mut bytes).map_err(failed)?;
        let nonce: &[u8] = nonce.as_ref();
        Ok(STANDARD.encode([nonce, &bytes].concat()))
    }

    /// What was sealed; `None` if that was another service, or it was changed.
    #[must_use]
    pub fn open(&self, sealed: &str) -> Option<String> {
        let mut bytes = STANDARD.decode(sealed).ok()?;
        let body = bytes.get_mut(NONCE_LEN..)?.to_vec();
        let (nonce, mut body) = (Nonce::try_assume_unique_for_key(&bytes[..NONCE_LEN]).ok()?, body);
        let text = self.cipher().open_in_place(nonce, Aad::empty(), &mut body).ok()?;
        String::from_utf8(text.to_vec()).ok()
    }

    fn cipher(&self) -> RandomizedNonceKey {
        RandomizedNonceKey::new(&AES_256_GCM, &self.derive("seal").finalize().into_bytes()).expect("32 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_signed_and_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let secret = Secret::of(folder.path()).unwrap();
        let signature = secret.sign("links", "a\nb");
        assert!(Secret::of(folder.path()).unwrap().signed("links", "a\nb", &signature), "the same after a restart");
        assert!(!secret.signed("links", "a\nc", &signature) && !secret.signed("other", "a\nb", &signature));
        assert!(!secret.signed("links", "a\nb", "") && !secret.signed("links", "a\nb", "zz"));
        assert_ne!(secret.webhook_key("me"), secret.webhook_key("you"));

        let sealed = secret.seal("hf_token").unwrap();
        assert_eq!(secret.open(&sealed).as_deref(), Some("hf_token"));
        assert_ne!(secret.seal("hf_token").unwrap(), sealed);
        let other = tempfile::tempdir().unwrap();
        assert_eq!(Secret::of(other.path()).unwrap().open(&sealed), None);
        for wrong in ["", "AAAA", &sealed[4..], "é"] {
            assert_eq!(secret.open(wrong), None);
        }
        std::fs::write(folder.path().join("secret"), b"short").unwrap();
        assert!(Secret::of(folder.path()).unwrap_err().to_string().contains("damaged"));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(other.path().join("secret")).unwrap().permissions().mode() & 0o77, 0);
        }
    }
}
