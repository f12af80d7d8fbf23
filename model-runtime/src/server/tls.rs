//! TLS: certificates that are read anew when they change, and, where asked for, clients that show one of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio_rustls::TlsAcceptor;

use super::watched::Watched;

/// Where the server's identity lies, in PEM.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The certificate and those that lead to its root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Roots that clients' certificates must lead to; `None` asks clients for none.
    pub client_roots: Option<PathBuf>,
}

/// Accepts connections with TLS 1.2 and 1.3.
pub(super) struct Acceptor(Watched<ServerConfig>);

impl Acceptor {
    /// Reads the files.
    ///
    /// # Errors
    /// In words, where one is missing or does not hold what it should.
    pub(super) fn new(tls: Tls) -> Result<Self, String> {
        let paths = [&tls.certificate, &tls.key].into_iter().chain(&tls.client_roots).cloned().collect();
        Watched::new(paths, move || configuration(&tls)).map(Self)
    }

    /// An acceptor with the certificates as they are now.
    pub(super) fn current(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.get())
    }
}

fn configuration(tls: &Tls) -> Result<ServerConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let invalid = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match &tls.client_roots {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = rustls::RootCertStore::empty();
            for root in certificates(path)? {
                roots.add(root).map_err(|error| invalid(path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| invalid(path, &error))?)
        }
    };
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| invalid(&tls.key, &error))?;
    let mut configuration = builder
        .with_single_cert(certificates(&tls.certificate)?, key)
        .map_err(|error| invalid(&tls.certificate, &error))?;
    configuration.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(configuration)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(format!("{}: holds no certificate in PEM form", path.display())),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}
