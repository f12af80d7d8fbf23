use plimsoll_package::manifest::{Engine, Probe};
use serde_json::{Value, json};

use crate::client::{Connection, get, post};
use crate::process::{Server, device, model, package};

fn mlp_body() -> Value {
    json!({"id": "a-1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]})
}

#[test]
fn both_engines_serve_a_package_and_give_its_recorded_outputs() {
    for engine in [Engine::Tract, Engine::OnnxRuntime] {
        let package = package("mlp", engine);
        let server = Server::ready(package.path(), &["--name", "net", "--model-version", "3"]);
        assert_eq!(get(server.http, "/v2/health/live").json(), json!({"live": true}));
        assert_eq!(get(server.http, "/v2/health/ready").json(), json!({"ready": true}));
        assert_eq!(
            get(server.http, "/v2/models/net/ready").json(),
            json!({"name": "net", "ready": true})
        );
        let metadata = json!({
            "name": "net", "versions": ["3"], "platform": format!("{}_onnx", engine.to_string().to_lowercase()),
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
        });
        assert_eq!(get(server.http, "/v2/models/net").json(), metadata);
        assert_eq!(get(server.http, "/v2/models/net/versions/3").json(), metadata);

        let probe = Probe::read(package.path()).unwrap();
        let (input, output) = (&probe.inputs[0], &probe.outputs[0]);
        let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": input.shape, "data": input.data}]});
        let answer = post(server.http, "/v2/models/net/versions/3/infer", &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let answer = answer.json();
        assert_eq!((&answer["model_name"], &answer["model_version"]), (&json!("net"), &json!("3")));
        assert_eq!(answer["outputs"][0]["shape"], json!(output.shape));
        for (value, expected) in answer["outputs"][0]["data"].as_array().unwrap().iter().zip(&output.data) {
            assert!((value.as_f64().unwrap() - expected).abs() < 1e-5, "{value} {expected}");
        }
    }
}

#[test]
fn the_id_comes_back_and_outputs_come_in_the_order_asked_for() {
    let server = Server::ready(&model("two-inputs"), &["--engine", "tract"]);
    let tensor = |name: &str, data: [i64; 2]| json!({"name": name, "datatype": "INT64", "shape": [1, 2], "data": [data]});
    let body = json!({
        "id": "a-1", "inputs": [tensor("b", [1, 2]), tensor("a", [9007199254740993, 1])],
        "outputs": [{"name": "greater"}, {"name": "sum"}],
    });
    let answer = post(server.http, "/v2/models/two-inputs/infer", &body).json();
    assert_eq!(answer["id"], "a-1");
    let greater = json!({"name": "greater", "datatype": "BOOL", "shape": [1, 2], "data": [true, false]});
    let sum = json!({"name": "sum", "datatype": "INT64", "shape": [1, 2], "data": [9007199254740994_i64, 3]});
    assert_eq!(answer["outputs"], json!([greater, sum]));
}

#[test]
fn every_datatype_goes_in_and_comes_out() {
    for engine in ["tract", "onnxruntime"] {
        let server = Server::ready(&model("every-type"), &["--engine", engine]);
        let mut probe: Probe = serde_json::from_slice(&std::fs::read(model("every-type").with_extension("probe.json")).unwrap()).unwrap();
        if engine == "onnxruntime" && device().as_deref() == Some("openvino") {
            // Wider ones are refused.
            let wide = probe.inputs.iter_mut().find(|input| input.datatype.to_string() == "INT64").unwrap();
            let narrow = |value: &mut f64| *value = value.clamp(i32::MIN.into(), i32::MAX.into());
            wide.data.iter_mut().for_each(narrow);
        }
        // Integers as integers: a double in JSON would be rounded by others.
        let values = |datatype: &str, data: &[f64]| -> Value {
            let value = |value: &f64| match datatype {
                "BOOL" => json!(*value != 0.0),
                _ if datatype.contains("INT") => serde_json::from_str(&format!("{value:.0}")).unwrap(),
                _ => json!(value),
            };
            data.iter().map(value).collect()
        };
        let mut inputs = vec![];
        for input in &probe.inputs {
            let datatype = input.datatype.to_string();
            inputs.push(json!({"name": input.name, "datatype": datatype, "shape": [3], "data": values(&datatype, &input.data)}));
        }
        let answer = post(server.http, "/v2/models/every-type/infer", &json!({"inputs": inputs}));
        assert_eq!(answer.status, 200, "{}", answer.text);
        for (output, input) in answer.json()["outputs"].as_array().unwrap().iter().zip(&inputs) {
            assert_eq!(output["datatype"], input["datatype"]);
            for (given, expected) in output["data"].as_array().unwrap().iter().zip(input["data"].as_array().unwrap()) {
                let same = match (given.as_f64(), expected.as_f64()) {
                    // Single precision is written with its own shortest digits.
                    (Some(given), Some(expected)) if given.fract() != 0.0 || given.abs() > 1e30 => (given / expected - 1.0).abs() < 1e-6,
                    (Some(_), Some(_)) if !given.is_f64() => given == expected,
                    (given, expected) => given == expected,
                };
                assert!(same, "{engine}: {output} {input}");
            }
        }
    }
}

#[test]
fn strings_pass_through_onnxruntime() {
    let server = Server::ready(&model("strings"), &["--engine", "onnxruntime"]);
    let body = json!({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["grüß", ""]}]});
    let answer = post(server.http, "/v2/models/strings/infer", &body);
    assert_eq!(answer.json()["outputs"][0]["data"], json!(["grüß", ""]), "{}", answer.text);
}

#[test]
fn a_refusal_names_what_is_wrong_and_what_would_be_right() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let infer = "/v2/models/mlp/infer";
    let refuse = |body: Value, status: u16, text: &str| {
        let answer = post(server.http, infer, &body);
        assert_eq!((answer.status, answer.error().as_str()), (status, text));
    };
    let input =
        |datatype: &str, shape: Value, data: Value| json!({"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]});
    refuse(
        input("INT64", json!([1, 4]), json!([1, 2, 3, 4])),
        400,
        "input `x` takes FP32, INT64 was given",
    );
    refuse(
        input("FP32", json!([1, 3]), json!([1, 2, 3])),
        400,
        "input `x` takes shape [-1, 4] (-1 is any size), [1, 3] was given",
    );
    refuse(json!({"inputs": []}), 400, "input `x` (FP32, shape [-1, 4]) is missing");
    let mut unknown = mlp_body();
    unknown["outputs"] = json!([{"name": "z"}]);
    refuse(unknown, 400, "output `z` is not the model's; it gives y");
    let mut twice = mlp_body();
    twice["inputs"] = json!([twice["inputs"][0], twice["inputs"][0]]);
    refuse(twice, 400, "input `x` is given twice; it takes x");

    let status = |method: &str, path: &str, headers: &str, body: &str| {
        let answer = Connection::open(server.http).unwrap().send(method, path, headers, body).unwrap();
        (answer.status, answer.error())
    };
    assert_eq!(status("POST", infer, "", "{").0, 400);
    assert_eq!(status("GET", infer, "", ""), (405, "this path takes another method".to_owned()));
    assert_eq!(
        status("GET", "/v3", "", ""),
        (404, "there is nothing at this path; see /v2".to_owned())
    );
    let (code, text) = status("POST", "/v2/models/other/infer", "", "{}");
    assert_eq!((code, text.as_str()), (404, "there is no model `other`; this server has `mlp`"));
    let (code, text) = status("POST", "/v2/models/mlp/versions/9/infer", "", "{}");
    assert_eq!((code, text.as_str()), (404, "model `mlp` has no version `9`; it has `1`"));
    let (code, text) = status("POST", infer, "inference-header-content-length: 9\r\n", "{}");
    assert_eq!(
        (code, text.as_str()),
        (400, "Inference-Header-Content-Length is 9, the body has 2 bytes")
    );
    assert_eq!(status("POST", infer, "content-encoding: gzip\r\n", "{}").0, 400);
    let (code, text) = status("POST", infer, "content-encoding: br\r\n", "{}");
    assert!(code == 415 && text.contains("send gzip, deflate or identity"), "{code} {text}");

    let answer = post(server.http, infer, &mlp_body());
    assert_eq!(answer.status, 200, "after all refusals the server serves on: {}", answer.text);
}

#[test]
fn a_failure_inside_of_the_engine_costs_one_request_and_is_logged_with_its_trace() {
    let mut server = Server::ready(&model("two-inputs"), &["--engine", "onnxruntime"]);
    let tensor = |name: &str, rows: usize| json!({"name": name, "datatype": "INT64", "shape": [rows, 2], "data": vec![0; 2 * rows]});
    let body = |rows| json!({"inputs": [tensor("a", 2), tensor("b", rows)]}).to_string();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut connection = Connection::open(server.http).unwrap();
    let headers = format!("traceparent: 00-{trace}-00f067aa0ba902b7-01\r\n");
    let answer = connection.send("POST", "/v2/models/two-inputs/infer", &headers, &body(3)).unwrap();
    assert_eq!(answer.status, 500);
    assert!(answer.error().starts_with("OnnxRuntime failed: "), "{}", answer.text);
    let line = server.line("inference failed");
    assert_eq!((&line["code"], &line["trace"]), (&json!(500), &json!(trace)));
    assert_eq!(
        connection.send("POST", "/v2/models/two-inputs/infer", "", &body(2)).unwrap().status,
        200
    );
}

#[test]
fn metrics_count_requests_and_failures_by_reason_and_name_the_engine() {
    let package = package("mlp", Engine::Tract);
    let server = Server::ready(package.path(), &["--metrics", "127.0.0.1:0"]);
    post(server.http, "/v2/models/model/infer", &mlp_body());
    post(server.http, "/v2/models/model/infer", &json!({"inputs": []}));
    assert_eq!(get(server.http, "/metrics").status, 404, "metrics have an address of their own");
    let metrics = get(server.metrics.unwrap(), "/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    for line in [
        "plimsoll_runtime_requests_total 2",
        "plimsoll_runtime_request_failures_total{reason=\"InvalidArgument\"} 1",
        "plimsoll_runtime_batch_size_count 1",
        "plimsoll_runtime_request_duration_seconds_count 2",
        "plimsoll_runtime_inference_duration_seconds_count 1",
        "plimsoll_runtime_queue_duration_seconds_count 1",
        "plimsoll_runtime_requests_in_flight 0",
        "plimsoll_runtime_ready 1",
        "plimsoll_runtime_engine_info{engine=\"Tract\",fallback=\"false\"} 1",
    ] {
        assert!(
            metrics.text.lines().any(|known| known == line),
            "{line} is not in\n{}",
            metrics.text
        );
    }
    assert!(metrics.text.contains("toolchain=\"0.0.0-test\""));
}

#[test]
fn a_batch_of_many_clients_gives_each_its_own_answer() {
    let package = package("mlp", Engine::Tract);
    let server = Server::ready(package.path(), &["--max-delay-ms", "20"]);
    let address = server.http;
    let body = |value: f64| {
        let data = [value, 2.0, 3.0, 4.0];
        json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]})
    };
    let alone: Vec<Value> = (0..16)
        .map(|value| post(address, "/v2/models/model/infer", &body(f64::from(value))).json()["outputs"][0]["data"].clone())
        .collect();
    let together: Vec<_> = (0..16)
        .map(|value| std::thread::spawn(move || (value, post(address, "/v2/models/model/infer", &body(f64::from(value))))))
        .collect();
    for request in together {
        let (value, answer) = request.join().unwrap();
        let given = answer.json()["outputs"][0]["data"].clone();
        for (given, alone) in given.as_array().unwrap().iter().zip(alone[value as usize].as_array().unwrap()) {
            assert!((given.as_f64().unwrap() - alone.as_f64().unwrap()).abs() < 1e-5, "{given} {alone}");
        }
    }
    let statistics = get(address, "/v2/models/model/stats").json();
    let statistics = &statistics["model_stats"][0];
    assert_eq!((&statistics["name"], &statistics["inference_count"]), (&json!("model"), &json!(32)));
    let executions = statistics["execution_count"].as_u64().unwrap();
    assert!(executions < 32, "some ran together: {statistics}");
    assert_eq!(statistics["inference_stats"]["success"]["count"], 32);
    let batches: u64 = statistics["batch_stats"]
        .as_array()
        .unwrap()
        .iter()
        .map(|batch| batch["compute_infer"]["count"].as_u64().unwrap())
        .sum();
    assert_eq!(batches, executions);
}

#[test]
fn the_configuration_tells_how_requests_are_batched() {
    let package = package("mlp", Engine::Tract);
    let server = Server::ready(package.path(), &["--max-batch", "8", "--max-delay-ms", "2"]);
    let configuration = get(server.http, "/v2/models/model/config").json();
    assert_eq!(configuration["max_batch_size"], 8);
    assert_eq!(
        configuration["input"],
        json!([{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}])
    );
    assert_eq!(configuration["dynamic_batching"]["max_queue_delay_microseconds"], 2000);
    let server = Server::ready(package.path(), &["--max-batch", "1"]);
    let configuration = get(server.http, "/v2/models/model/versions/1/config").json();
    assert_eq!(
        (&configuration["max_batch_size"], &configuration["input"][0]["dims"]),
        (&json!(0), &json!([-1, 4]))
    );
    let index = Connection::open(server.http)
        .unwrap()
        .send("POST", "/v2/repository/index", "", "{}")
        .unwrap();
    assert_eq!(index.json()[0]["state"], "READY");
}

#[test]
fn a_unix_socket_is_served_and_taken_away() {
    use std::io::{Read as _, Write as _};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.sock");
    let address = format!("unix:{}", path.display());
    // What a crash leaves behind is in nobody's way.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let mut server = Server::ready(&model("mlp"), &["--engine", "tract", "--metrics", &address, "--drain-delay", "0"]);
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("plimsoll_runtime_ready 1"),
        "{answer}"
    );
    server.terminate();
    assert!(server.wait().success());
    assert!(!path.exists());
}

#[test]
fn a_person_finds_a_page_and_the_report_of_the_package() {
    let package = package("mlp", Engine::Tract);
    std::fs::write(package.path().join("report.html"), "<p>what it cost</p>").unwrap();
    let server = Server::ready(package.path(), &[]);
    let page = get(server.http, "/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'self'"));
    for file in ["/page.js", "/page.css"] {
        assert_eq!(get(server.http, file).status, 200, "{file}");
    }
    assert!(get(server.http, "/report.html").text.contains("what it cost"));
    let bare = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let answer = get(bare.http, "/report.json");
    assert!(answer.status == 404 && answer.error().contains("bare file"), "{}", answer.text);
}

#[test]
fn the_metrics_tell_of_the_gpu_where_one_computes() {
    let server = Server::ready(&model("mlp"), &[]);
    let metrics = get(server.http, "/metrics").text;
    for name in ["gpu_memory_bytes", "gpu_memory_used_bytes", "gpu_utilization_ratio"] {
        let is_told = metrics.contains(&format!("\nplimsoll_runtime_{name}{{gpu="));
        assert_eq!(is_told, device().is_some_and(|device| device != "openvino"), "{name}: {metrics}");
    }
}

#[test]
fn every_path_of_the_openapi_document_is_there() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let document = get(server.http, "/v2/openapi.json").json();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 12, "{paths:?}");
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let answer = Connection::open(server.http)
                .unwrap()
                .send(&method.to_uppercase(), path, "", "{}")
                .unwrap();
            let known = &methods[method]["responses"][answer.status.to_string()];
            assert!(known.is_object(), "{method} {path} answers {}: {}", answer.status, answer.text);
        }
    }
}

#[test]
fn answers_are_compared_with_another_revision_in_the_background() {
    let other = Server::ready(&model("mlp"), &["--engine", "onnxruntime"]);
    let url = format!("http://{}/v2/models/mlp", other.http);
    let server = Server::ready(&model("mlp"), &["--engine", "tract", "--shadow", &url, "--shadow-share", "50%"]);
    for _ in 0..8 {
        assert_eq!(post(server.http, "/v2/models/mlp/infer", &mlp_body()).status, 200);
    }
    let agreed = "plimsoll_runtime_shadow_requests_total{result=\"Agreed\"} 4";
    while !get(server.http, "/metrics").text.contains(agreed) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let metrics = get(server.http, "/metrics").text;
    assert!(metrics.contains("plimsoll_runtime_shadow_difference_count 4"), "{metrics}");
    for bound in ["0.000001", "0.0001", "0.1", "1.0", "+Inf"] {
        let bucket = format!("plimsoll_runtime_shadow_difference_bucket{{le=\"{bound}\"}} ");
        assert!(metrics.contains(&bucket), "{bucket}: {metrics}");
    }
    drop(other);
    let answers: Vec<u16> = (0..4)
        .map(|_| post(server.http, "/v2/models/mlp/infer", &mlp_body()).status)
        .collect();
    assert_eq!(answers, [200; 4], "the caller never hears of it");
    while !get(server.http, "/metrics")
        .text
        .contains("plimsoll_runtime_shadow_requests_total{result=\"Failed\"} 2")
    {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_share_of_the_answers_is_logged_and_every_refusal() {
    let mut server = Server::ready(&model("mlp"), &["--access-log", "25%", "--drain-delay", "0"]);
    for _ in 0..8 {
        assert_eq!(post(server.http, "/v2/models/mlp/infer", &mlp_body()).status, 200);
    }
    for _ in 0..3 {
        assert_eq!(post(server.http, "/v2/models/mlp/infer", &json!({"inputs": []})).status, 400);
    }
    server.terminate();
    let lines = server.lines_to("stopped");
    let count = |message: &str| lines.iter().filter(|line| line["message"] == message).count();
    assert_eq!((count("inference"), count("inference refused")), (2, 3), "{lines:?}");
    let line = lines.iter().find(|line| line["message"] == "inference").unwrap();
    assert!(
        line["milliseconds"].as_f64().unwrap() > 0.0 && line["method"] == "POST /v2/models/{name}/infer",
        "{line}"
    );
}
