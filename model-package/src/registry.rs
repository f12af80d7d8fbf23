//! The way of a package to and from an OCI registry.
