use plimsoll_package::manifest::{Engine, MODEL_FILE, PROBE_FILE, Probe};

use crate::client::get;
use crate::process::{Server, command, device, failure, library, model, package, seal};

#[test]
fn auto_falls_back_to_tract_in_words_where_the_library_is_missing() {
    let package = package("mlp", Engine::OnnxRuntime);
    let mut server = Server::listening(&mut command(package.path(), &[]));
    let line = server.line("another engine than the preferred one serves");
    assert_eq!(line["engine"], "Tract");
    assert_eq!(
        line["reason"],
        "OnnxRuntime: ONNX Runtime's library cannot be used: ORT_DYLIB_PATH names none"
    );
    server.line("ready");
    assert!(
        get(server.http, "/metrics")
            .text
            .contains("plimsoll_runtime_engine_info{engine=\"Tract\",fallback=\"true\"} 1")
    );
}

#[test]
fn auto_falls_back_to_onnxruntime_where_tract_does_not_run_the_model() {
    let package = package("bfloat16", Engine::Tract);
    let mut command = command(package.path(), &[]);
    let mut server = Server::listening(command.env("ORT_DYLIB_PATH", library()));
    let line = server.line("another engine than the preferred one serves");
    assert_eq!(line["engine"], "OnnxRuntime");
    server.line("ready");
}

#[test]
fn a_changed_byte_stops_the_start() {
    let package = package("mlp", Engine::Tract);
    let path = package.path().join(MODEL_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (code, reason) = failure(&mut command(package.path(), &["--engine", "tract"]));
    assert_eq!(code, Some(1));
    assert!(
        reason.contains("model.onnx has digest sha256:") && reason.contains("its manifest says sha256:"),
        "{reason}"
    );
}

#[test]
fn outputs_other_than_the_recorded_ones_stop_the_start() {
    let package = package("mlp", Engine::OnnxRuntime);
    let mut probe = Probe::read(package.path()).unwrap();
    probe.outputs[0].data[0] += 0.1;
    std::fs::write(package.path().join(PROBE_FILE), serde_json::to_vec(&probe).unwrap()).unwrap();
    seal(package.path(), "mlp", Engine::OnnxRuntime);
    let (code, reason) = failure(command(package.path(), &[]).env("ORT_DYLIB_PATH", library()));
    assert_eq!(code, Some(1));
    assert!(reason.contains("no engine serves") && !reason.contains('\n'), "{reason}");
    assert!(
        reason.contains("OnnxRuntime: output `y` differs") && reason.contains("Tract: output `y` differs"),
        "{reason}"
    );
}

#[test]
fn what_cannot_be_served_is_refused_at_once_with_the_reason() {
    let reason = |path: &std::path::Path, arguments: &[&str]| {
        let (code, reason) = failure(&mut command(path, arguments));
        assert_eq!(code, Some(1), "{reason}");
        reason
    };
    let empty = tempfile::tempdir().unwrap();
    assert!(reason(empty.path(), &[]).contains("manifest.json: No such file"));
    assert!(reason(&empty.path().join("none.onnx"), &["--engine", "tract"]).contains("none.onnx: No such file"));
    assert!(reason(&model("mlp"), &["--engine", "onnxruntime"]).contains("ORT_DYLIB_PATH names none"));
    assert!(reason(&model("strings"), &["--engine", "tract"]).contains("BYTES, which tract does not run"));
    assert!(reason(&model("make").with_extension("py"), &["--engine", "tract"]).contains("is not an ONNX model"));
}

#[test]
fn a_device_that_is_not_there_is_refused_with_what_it_needs() {
    // Without its providers, where it has any.
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("libonnxruntime.so");
    std::os::unix::fs::symlink(library(), &alone).unwrap();
    let reason = |arguments: &[&str]| failure(command(&model("mlp"), arguments).env("ORT_DYLIB_PATH", &alone)).1;
    for (device, provider) in [("cuda:0", "cuda"), ("tensorrt", "tensorrt"), ("openvino", "openvino")] {
        let reason = reason(&["--device", device]);
        let text = format!("needs libonnxruntime_providers_{provider}.so beside");
        assert!(reason.contains(&text) && !reason.contains("Tract"), "{reason}");
    }
    assert!(reason(&["--engine", "tract", "--device", "cuda:0"]).contains("tract computes on the CPU, not on cuda:0"));
}

#[test]
fn a_taken_address_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, reason) = failure(&mut command(&model("mlp"), &["--metrics", &address]));
    assert_eq!(code, Some(1));
    assert!(reason.contains(&format!("cannot listen on {address}")), "{reason}");
}

#[test]
fn a_bare_model_is_served_under_its_file_name() {
    let server = Server::ready(&model("weight-only"), &[]);
    assert_eq!(get(server.http, "/v2/models/weight-only/ready").status, 200);
}

#[test]
fn a_readiness_probe_that_comes_while_the_model_loads_waits_for_it() {
    let mut command = command(&model("slow"), &[]);
    let server = Server::listening(command.env("ORT_DYLIB_PATH", library()));
    assert_eq!(get(server.http, "/v2/models/slow/ready").status, 200);
}

#[test]
fn a_registry_that_is_not_there_fails_the_pull_with_the_reason() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut pull = std::process::Command::new(env!("CARGO_BIN_EXE_plimsoll-runtime"));
    pull.arg("pull")
        .arg(format!("{free}/models/digits:v1"))
        .arg(dir.path())
        .arg("--plain-http");
    let (code, reason) = failure(&mut pull);
    assert_eq!(code, Some(1));
    assert!(reason.contains(&format!("{free}/models/digits:v1")), "{reason}");
}

#[test]
fn code_that_only_the_start_needs_is_not_resident() {
    let server = Server::ready(&model("mlp"), &["--engine", "onnxruntime"]);
    // Reading the flags and loading ONNX Runtime alone touch more than twice as much.
    let resident = server.resident_code();
    assert!((1..10 << 20).contains(&resident), "{resident} bytes");
    assert_eq!(get(server.http, "/v2/health/ready").status, 200);
}

#[test]
fn nothing_is_left_in_the_users_home() {
    let home = tempfile::tempdir().unwrap();
    let mut command = command(&model("mlp"), &["--engine", "onnxruntime"]);
    command
        .env("ORT_DYLIB_PATH", library())
        .env("HOME", home.path())
        .env_remove("XDG_CACHE_HOME")
        .env_remove("ORT_DISABLE_TELEMETRY");
    Server::listening(&mut command).line("ready");
    // ONNX Runtime's telemetry would keep a database there.
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// On one processor OpenVINO has one thread, however many it is given.
#[test]
fn openvino_is_refused_where_it_would_not_tell_of_failed_inferences() {
    if device().as_deref() != Some("openvino") {
        return;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let first = allowed.trim().split([',', '-']).next().unwrap();
    let mut command = std::process::Command::new("taskset");
    command
        .args(["--cpu-list", first, env!("CARGO_BIN_EXE_plimsoll-runtime"), "serve"])
        .arg(model("mlp"))
        .args(["--device", "openvino", "--threads", "2", "--http", "127.0.0.1:0", "--grpc", "none"])
        .env("ORT_DYLIB_PATH", library());
    let (code, reason) = failure(&mut command);
    assert_eq!(code, Some(1));
    assert!(
        reason.contains("does not tell of failed inferences") && reason.contains("give --threads 1"),
        "{reason}"
    );
}
