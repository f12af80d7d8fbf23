//! What a model is, in the words of the protocol: its platform, its configuration, the names that reach it.

use plimsoll_package::manifest::{Datatype, Engine, TensorSpec};
use serde_json::{Value, json};

use super::Config;
use super::model::Model;
use super::refusal::{Reason, Refusal};

impl Config {
    /// Whether a request is for the model that is served.
    ///
    /// # Errors
    /// [`Reason::NotFound`] where it is for another, or for another version.
    pub(super) fn check_target(&self, name: &str, version: Option<&str>) -> Result<(), Refusal> {
        if name != self.name {
            let text = format!("there is no model `{name}`; this server has `{}`", self.name);
            return Err(Refusal::new(Reason::NotFound, text));
        }
        match version {
            Some(version) if version != self.version => {
                let text = format!("model `{}` has no version `{version}`; it has `{}`", self.name, self.version);
                Err(Refusal::new(Reason::NotFound, text))
            }
            _ => Ok(()),
        }
    }

    /// Whether a path is that of an inference of the model that is served, written without escapes.
    pub(super) fn is_inference(&self, path: &str) -> bool {
        let of_model = path.strip_prefix("/v2/models/").and_then(|path| path.strip_prefix(&*self.name));
        let of_version = |path: &str| {
            path.strip_prefix("/versions/")?
                .strip_prefix(&*self.version)?
                .strip_prefix("/infer")
                .map(str::is_empty)
        };
        of_model.is_some_and(|path| path == "/infer" || of_version(path) == Some(true))
    }
}

/// The protocol's platform, `<project>_<format>`.
pub(super) fn platform(engine: Engine) -> String {
    format!("{}_onnx", engine.to_string().to_lowercase())
}

/// The model's configuration as Triton gives it ("Model Configuration Extension"). Where requests are batched, the first dimension is left
/// out of the shapes, as it is there.
pub(super) fn configuration(config: &Config, model: &Model) -> Value {
    let rows_max = model.scheduler.rows_max();
    let batched = rows_max > 1;
    let tensor =
        |spec: &TensorSpec| json!({"name": spec.name, "data_type": data_type(spec.datatype), "dims": &spec.shape[usize::from(batched)..]});
    let kind = if config.device.is_gpu() { "KIND_GPU" } else { "KIND_CPU" };
    let mut value = json!({
        "name": config.name, "platform": platform(model.kind()), "backend": model.kind().to_string().to_lowercase(),
        "version_policy": {"latest": {"num_versions": 1}}, "max_batch_size": if batched { rows_max } else { 0 },
        "input": model.inputs().iter().map(tensor).collect::<Vec<_>>(), "output": model.outputs().iter().map(tensor).collect::<Vec<_>>(),
        "instance_group": [{"name": config.name, "kind": kind, "count": config.instances}],
    });
    if batched {
        let delay = u64::try_from(config.batching.delay.as_micros()).unwrap_or(u64::MAX);
        value["dynamic_batching"] = json!({"preferred_batch_size": [], "max_queue_delay_microseconds": delay});
    }
    value
}

/// The datatype's name in a configuration.
pub(super) fn data_type(datatype: Datatype) -> String {
    match datatype {
        Datatype::Bytes => "TYPE_STRING".to_owned(),
        other => format!("TYPE_{other}"),
    }
}
