//! ONNX Runtime's telemetry. Its library, as PyPI has it, keeps an identifier of the device and a database under the user's cache and sends
//! events to Microsoft, from when it is loaded; what switches that off through its interface comes too late.

/// The variable that keeps the library's telemetry off where it is 1.
const VARIABLE: &str = "ORT_DISABLE_TELEMETRY";

/// Keeps telemetry off, unless the environment says something of it.
///
/// # Safety
/// No other thread may run: the environment is not to be read while it changes (see [`std::env::set_var`]).
#[allow(unsafe_code)]
pub unsafe fn disable_telemetry() {
    if std::env::var_os(VARIABLE).is_none() {
        // Sound: the caller vouches for it.
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}
