//! The OpenAPI document of what is served over HTTP (OpenAPI 3.1), with the name of the model in its paths.

use std::sync::Arc;

use axum::extract::State as Shared;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use plimsoll_package::manifest::TensorSpec;

use super::Json;
use crate::server::State;
use crate::server::images::IMAGE;
use crate::server::model::Model;

pub(super) async fn document(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    Json(describe(&state.config.name, &state.config.version, state.model()))
}

/// What a model called `name` is asked, and by whom; before it is proven, all that any model may be asked.
fn describe(name: &str, version: &str, model: Option<&Model>) -> Value {
    let takes_images = model.is_none_or(|model| model.preprocessing.raw_input() == Some(IMAGE));
    let embeds = model.is_none_or(|model| model.preprocessing.embedding(None).is_ok());
    let error =
        |text: &str| json!({"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}});
    let answer = |text: &str, schema: &str| json!({"description": text, "content": {"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}}});
    let health = |id: &str, text: &str, schema: &str| {
        json!({"get": {"operationId": id, "summary": text, "responses": {
            "200": answer("It is so.", schema), "503": answer("It is not so.", schema), "401": error("No known token was sent."),
        }}})
    };
    let read = |id: &str, text: &str, schema: &str| {
        json!({"get": {"operationId": id, "summary": text, "responses": {
            "200": answer(text, schema), "401": error("No known token was sent."), "503": error("The model is loading."),
        }}})
    };
    let infer = |id: &str| {
        json!({"post": {
            "operationId": id, "summary": "Run the model on tensors.",
            "description": "Tensors may also come as bytes behind the JSON, whose length is then in Inference-Header-Content-Length \
                (Triton's binary tensor data extension), and the body may be compressed by gzip or deflate.",
            "requestBody": {"required": true, "content": if takes_images { json!({
                "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
                "image/*": {"schema": {"description": "A picture as the input `image`."}},
            }) } else { json!({
                "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
            }) }},
            "responses": {
                "200": {"description": "The outputs; some or all of them as bytes behind the JSON where that was asked for.", "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}},
                    "application/octet-stream": {"schema": {}},
                }},
                "400": error("The request is not what the protocol or the model takes."),
                "401": error("No known token was sent."),
                "408": error("The body did not arrive in time."),
                "413": error("The body is larger than this server takes."),
                "415": error("The body's encoding is not known."),
                "429": error("The server has as much as it takes on; see Retry-After."),
                "500": error("The engine failed."),
                "503": error("The model is loading."),
                "504": error("There was no answer in time."),
            },
        }})
    };
    let path = format!("/v2/models/{name}");
    let versioned = format!("{path}/versions/{version}");
    let mut paths = serde_json::Map::new();
    paths.insert(
        "/v2".to_owned(),
        read("server", "Name, version and extensions of the server.", "Server"),
    );
    paths.insert("/v2/health/live".to_owned(), health("live", "Whether the server is alive.", "Live"));
    paths.insert(
        "/v2/health/ready".to_owned(),
        health("ready", "Whether the model is proven and traffic should come.", "Ready"),
    );
    paths.insert("/v2/models".to_owned(), read("models", "The names of the models.", "Models"));
    paths.insert(
        "/v2/repository/index".to_owned(),
        json!({"post": {
            "operationId": "index", "summary": "The models and their states.",
            "responses": {"200": answer("The models.", "Index"), "401": error("No known token was sent.")},
        }}),
    );
    for (prefix, suffix) in [(&path, ""), (&versioned, "OfVersion")] {
        let id = |name: &str| format!("{name}{suffix}");
        paths.insert(prefix.clone(), read(&id("model"), "The model's signature.", "Model"));
        paths.insert(
            format!("{prefix}/ready"),
            health(&id("modelReady"), "Whether the model is ready.", "ModelReady"),
        );
        paths.insert(
            format!("{prefix}/config"),
            read(&id("config"), "The model's configuration, as Triton has it.", "Config"),
        );
        paths.insert(
            format!("{prefix}/stats"),
            read(&id("stats"), "How many requests there were, and where their time went.", "Stats"),
        );
        let mut drift = read(
            &id("drift"),
            "How far inputs and outputs are from those that the optimiser recorded.",
            "Drift",
        );
        drift["get"]["responses"]["404"] = error("The package records nothing to compare with.");
        paths.insert(format!("{prefix}/drift"), drift);
        paths.insert(format!("{prefix}/infer"), infer(&id("infer")));
    }
    // The list of models is there for every model, and empty for one that gives no embeddings.
    paths.extend(openais(name).into_iter().filter(|(path, _)| embeds || path == "/v1/models"));
    json!({
        "openapi": "3.1.0",
        "info": {"title": format!("Plimsoll: {name}"), "version": super::super::VERSION, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "The Open Inference Protocol V2 over HTTP."},
        "paths": paths,
        "components": {"schemas": schemas(model)},
    })
}

/// A tensor that fits an input of the model.
fn input(spec: &TensorSpec) -> Value {
    let dimension = |&size: &i64| {
        if size < 0 {
            json!({"type": "integer", "minimum": 0})
        } else {
            json!({"const": size})
        }
    };
    let mut shape = json!({"type": "array", "minItems": spec.shape.len(), "maxItems": spec.shape.len()});
    if !spec.shape.is_empty() {
        shape["prefixItems"] = spec.shape.iter().map(dimension).collect();
    }
    json!({"properties": {"name": {"const": spec.name}, "datatype": {"const": spec.datatype}, "shape": shape}})
}

/// OpenAI's API of embeddings.
fn openais(name: &str) -> [(String, Value); 3] {
    let body = |schema: &str| json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}});
    let error = |text: &str| json!({"description": text, "content": body("OpenAiError")});
    let read = |id: &str, text: &str, schema: &str, missing: bool| {
        let mut responses = json!({
            "200": {"description": text, "content": body(schema)},
            "401": error("No known token was sent."), "503": error("The model is loading."),
        });
        if missing {
            responses["400"] = error("The model gives no embeddings of texts.");
        }
        json!({"get": {"operationId": id, "summary": text, "responses": responses}})
    };
    let embeddings = json!({"post": {
        "operationId": "embeddings", "summary": "Embeddings of texts, as OpenAI's API has them.",
        "requestBody": {"required": true, "content": body("EmbeddingsRequest")},
        "responses": {
            "200": {"description": "An embedding for each text.", "content": body("Embeddings")},
            "400": error("The request is not what is taken, or the model gives no embeddings of texts."),
            "401": error("No known token was sent."),
            "404": error("There is no such model."),
            "408": error("The body did not arrive in time."),
            "413": error("The body is larger than this server takes."),
            "415": error("The body's encoding is not known."),
            "429": error("The server has as much as it takes on; see Retry-After."),
            "500": error("The engine failed."),
            "503": error("The model is loading."),
            "504": error("There was no answer in time."),
        },
    }});
    [
        ("/v1/embeddings".to_owned(), embeddings),
        (
            "/v1/models".to_owned(),
            read(
                "openAiModels",
                "The model, where it gives embeddings of texts.",
                "OpenAiModels",
                false,
            ),
        ),
        (
            format!("/v1/models/{name}"),
            read("openAiModel", "The model, where it gives embeddings of texts.", "OpenAiModel", true),
        ),
    ]
}

fn schemas(model: Option<&Model>) -> Value {
    let inputs = model.map(|model| model.described_inputs().iter().map(input).collect::<Vec<_>>());
    let object = |required: &[&str], properties: Value| json!({"type": "object", "required": required, "properties": properties});
    let text = || json!({"type": "string"});
    let list = |schema: &str| json!({"type": "array", "items": {"$ref": format!("#/components/schemas/{schema}")}});
    let count = || json!({"type": "integer", "minimum": 0});
    let number = || json!({"type": "number", "minimum": 0});
    let verdict = || json!({"enum": ["TooFew", "Stable", "Moderate", "Significant"]});
    let datatypes = [
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64", "BYTES",
    ];
    let shape = json!({"type": "array", "maxItems": 1024, "items": {"type": "integer", "minimum": 0}});
    let pooling = ["none", "mean", "cls", "max", "last"];
    let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    let parameters = json!({"type": "object", "properties": {
        "priority": {"type": "integer", "minimum": 0, "description": "Lower numbers go first; 0 is the middle."},
        "timeout": {"type": "integer", "minimum": 0, "description": "Microseconds after which the answer is not waited for."},
        "binary_data_output": {"type": "boolean", "description": "Whether outputs come as bytes behind the JSON."},
        "pooling": {"enum": pooling, "description": "How embeddings of tokens become one of the text."},
        "normalize": {"type": "boolean", "description": "Whether embeddings are divided by their length."},
        "truncate": {"type": "boolean", "description": "Whether texts of more tokens than the model takes are cut off."},
    }});
    json!({
        "Error": object(&["error"], json!({"error": text()})),
        "Live": object(&["live"], json!({"live": {"type": "boolean"}})),
        "Ready": object(&["ready"], json!({"ready": {"type": "boolean"}})),
        "ModelReady": object(&["name", "ready"], json!({"name": text(), "ready": {"type": "boolean"}})),
        "Server": object(&["name", "version", "extensions"], json!({"name": text(), "version": text(), "extensions": {"type": "array", "items": text()}})),
        "Models": object(&["models"], json!({"models": {"type": "array", "items": text()}})),
        "Index": {"type": "array", "items": object(&["name", "version", "state", "reason"],
            json!({"name": text(), "version": text(), "state": {"enum": ["READY", "LOADING"]}, "reason": text()}))},
        "Signature": object(&["name", "datatype", "shape"], json!({
            "name": text(), "datatype": {"enum": datatypes},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}, "description": "-1 is any size."}})),
        "Model": object(&["name", "versions", "platform", "inputs", "outputs"], json!({
            "name": text(), "versions": {"type": "array", "items": text()}, "platform": text(), "inputs": list("Signature"), "outputs": list("Signature")})),
        "Config": object(&["name", "platform", "backend", "max_batch_size", "input", "output"], json!({
            "name": text(), "platform": text(), "backend": text(), "max_batch_size": count()})),
        "Total": object(&["count", "ns"], json!({"count": count(), "ns": count()})),
        "Stats": object(&["model_stats"], json!({"model_stats": {"type": "array", "items": object(
            &["name", "version", "last_inference", "inference_count", "execution_count", "inference_stats", "batch_stats"], json!({
                "name": text(), "version": text(), "last_inference": count(), "inference_count": count(), "execution_count": count(),
                "inference_stats": {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Total"}},
                "batch_stats": {"type": "array", "items": {"type": "object"}}}))}})),
        "Tensor": object(&["name", "datatype", "shape", "data"], json!({
            "name": text(), "datatype": {"enum": datatypes}, "shape": shape,
            "data": {"type": "array", "description": "Flat in row-major order, or nested as the shape."}, "parameters": {"type": "object"}})),
        "Input": match inputs {
            Some(inputs) => json!({"allOf": [{"$ref": "#/components/schemas/Tensor"}, {"anyOf": inputs}]}),
            None => json!({"$ref": "#/components/schemas/Tensor"}),
        },
        "Drift": object(&["model_name", "model_version", "window_s", "reference", "thresholds", "rows", "verdict", "tensors"], json!({
            "model_name": text(), "model_version": text(), "window_s": number(),
            "reference": object(&["from", "samples"], json!({"from": {"enum": ["Calibration", "Evaluation"]}, "samples": count()})),
            "thresholds": object(&["moderate", "significant", "rows_min"], json!({"moderate": number(), "significant": number(), "rows_min": count()})),
            "rows": count(), "verdict": verdict(),
            "tensors": {"type": "array", "items": object(&["name", "side", "kind", "psi", "ks", "count", "verdict"], json!({
                "name": text(), "side": {"enum": ["input", "output"]}, "kind": {"enum": ["values", "lengths", "classes"]},
                "psi": {"type": ["number", "null"], "minimum": 0, "description": "Population stability index."},
                "ks": {"type": ["number", "null"], "minimum": 0, "maximum": 1, "description": "Kolmogorov-Smirnov statistic; null for classes."},
                "count": count(), "verdict": verdict()}))}})),
        "InferRequest": object(&["inputs"], json!({
            "id": text(), "inputs": list("Input"), "parameters": parameters,
            "outputs": {"type": "array", "items": object(&["name"], json!({"name": text(), "parameters": {"type": "object", "properties": {
                "binary_data": {"type": "boolean"}, "classification": {"type": "integer", "minimum": 0}}}}))}})),
        "OpenAiError": object(&["error"], json!({"error": object(&["message", "type"], json!({
            "message": text(), "type": text(), "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}))})),
        "OpenAiModel": object(&["id", "object", "created", "owned_by"], json!({
            "id": text(), "object": {"const": "model"}, "created": count(), "owned_by": text()})),
        "OpenAiModels": object(&["object", "data"], json!({"object": {"const": "list"}, "data": list("OpenAiModel")})),
        "EmbeddingsRequest": object(&["model", "input"], json!({
            "model": text(), "input": {"anyOf": [text(), {"type": "array", "items": text()}, tokens, {"type": "array", "items": tokens}]},
            "encoding_format": {"enum": ["float", "base64"]}, "dimensions": count(), "pooling": {"enum": pooling},
            "normalize": {"type": "boolean"}, "truncate": {"type": "boolean"}})),
        "Embeddings": object(&["object", "data", "model", "usage"], json!({
            "object": {"const": "list"}, "model": text(),
            "data": {"type": "array", "items": object(&["object", "index", "embedding"], json!({
                "object": {"const": "embedding"}, "index": count(), "embedding": {"type": ["array", "string"]}}))},
            "usage": object(&["prompt_tokens", "total_tokens"], json!({"prompt_tokens": count(), "total_tokens": count()}))})),
        "InferResponse": object(&["model_name", "model_version", "outputs"], json!({
            "model_name": text(), "model_version": text(), "id": text(), "outputs": list("Tensor")})),
    })
}
