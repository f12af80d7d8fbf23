//! What the server does with any bytes that are sent to it: give a request or a refusal, in memory that their number bounds.

use plimsoll_runtime::server::untrusted;

/// Reads `bytes` as a body of JSON.
pub(crate) fn http(bytes: &[u8]) {
    untrusted::body(bytes, None);
}

/// Reads `bytes` as a body of JSON with tensors as bytes behind it; its length comes first, in two bytes.
pub(crate) fn binary(bytes: &[u8]) {
    if let Some((length, body)) = bytes.split_first_chunk::<2>() {
        untrusted::body(body, Some(u16::from_le_bytes(*length).into()));
    }
}

/// Reads `bytes` as a message of gRPC.
pub(crate) fn grpc(bytes: &[u8]) {
    untrusted::infer_message(bytes);
}
