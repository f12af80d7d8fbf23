//! The real binary on 127.0.0.1, as a client and as Kubernetes see it.

mod channel;
mod client;
mod drain;
mod drift;
#[path = "../../../tests/models/fetched.rs"]
mod fetched;
mod grpc;
mod limits;
mod preprocessing;
mod process;
mod protocol;
mod security;
mod start;
