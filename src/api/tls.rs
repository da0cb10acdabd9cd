//! TLS: from files, or with a certificate of our own that is made on the first start.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::replace::replace;

/// Ready to shake hands.
#[derive(Clone)]
pub struct Tls(pub(super) TlsAcceptor);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls(..)")
    }
}

impl Tls {
    /// From PEM files: the certificate with those that it depends on, and its key.
    pub fn open(certificate: &Path, key: &Path) -> io::Result<Self> {
        let bad = |path: &Path| {
            let path = path.display().to_string();
            move |error: rustls::pki_types::pem::Error| io::Error::other(format!("{path} cannot be used: {error}"))
        };
        let chain = CertificateDer::pem_file_iter(certificate).map_err(bad(certificate))?;
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(bad(certificate))?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(bad(key))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(io::Error::other)?;
        let mut config = config.with_no_client_auth().with_single_cert(chain, key).map_err(io::Error::other)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// With the certificate of a data folder, made if there is none for all of `names`. Answers where it is, so that clients can be
    /// told to trust it.
    pub fn own(data: &Path, names: &[String]) -> io::Result<(Self, PathBuf)> {
        let folder = data.join("tls");
        let (certificate, key, made_for) = (folder.join("certificate.pem"), folder.join("key.pem"), folder.join("names"));
        let wanted = names.join("\n");
        if std::fs::read_to_string(&made_for).ok().as_deref() != Some(&wanted) || !certificate.exists() {
            std::fs::create_dir_all(&folder)?;
            let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
            params.distinguished_name.push(DnType::CommonName, "darkroom");
            let pair = KeyPair::generate().map_err(io::Error::other)?;
            let made = params.self_signed(&pair).map_err(io::Error::other)?;
            replace(&key, pair.serialize_pem().as_bytes())?;
            std::fs::write(&certificate, made.pem())?;
            std::fs::write(&made_for, wanted)?;
        }
        Ok((Self::open(&certificate, &key)?, certificate))
    }
}
