//! Whom a client trusts.

use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::error::{Problem, RegistryError};

/// Makes ring the process's provider of cryptography; does nothing where one is set.
pub fn install_crypto_provider() {
    // An error says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The roots to trust, in DER: the system's, or Mozilla's where the system (an image without a distribution) has none, and those
/// of the PEM file `extra_ca`.
///
/// # Errors
/// Where `extra_ca` cannot be read or holds no certificate.
pub fn trusted_roots(extra_ca: Option<&Path>) -> Result<Vec<Vec<u8>>, RegistryError> {
    let mut roots = rustls_native_certs::load_native_certs().certs;
    if roots.is_empty() {
        roots.extend_from_slice(webpki_root_certs::TLS_SERVER_ROOT_CERTS);
    }
    if let Some(path) = extra_ca {
        let unreadable = |why: String| RegistryError::new(&path.display().to_string(), Problem::Invalid, why);
        let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certificates = certificates.map_err(|error| unreadable(format!("cannot read the certificates: {error}")))?;
        if certificates.is_empty() {
            return Err(unreadable("holds no certificate in PEM form".into()));
        }
        roots.extend(certificates);
    }
    Ok(roots.iter().map(|root| root.to_vec()).collect())
}
