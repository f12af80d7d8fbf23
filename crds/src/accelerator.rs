//! `spec.accelerator`: the devices that the serving pods need.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::LabelValue;

/// The devices that each serving pod needs. When left out, the model is served on CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.resource) != has(self.deviceClass)",
     "message": "set either resource (an extended resource such as nvidia.com/gpu) or deviceClass (dynamic resource allocation)"},
    {"rule": "!has(self.resource) || self.resource.matches('^[a-z0-9.-]+/[A-Za-z0-9._-]+$')",
     "message": "resource must be an extended resource with its vendor's domain, such as nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-1g.5gb"},
]))]
#[serde(rename_all = "camelCase")]
pub struct Accelerator {
    /// The extended resource of the device, such as `nvidia.com/gpu`, `amd.com/gpu` or a MIG slice. A toleration of the taint of the same name
    /// follows from it. When left out, `deviceClass` names the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 3, max = 128))]
    pub resource: Option<String>,

    /// Devices a pod, 1 to 16. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub count: Option<u32>,

    /// Labels that a node must carry. Default: `nvidia.com/gpu.present: "true"` for the domain nvidia.com, none for others. At most 16.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub node_labels: BTreeMap<String, LabelValue>,

    /// The DeviceClass to claim a device of, by dynamic resource allocation. When left out, `resource` names the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub device_class: Option<String>,

    /// What happens where no such node is to be had. Default: None, the pods wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// What happens where no node with the accelerator is to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
#[schemars(description = "")]
pub enum Fallback {
    /// The pods stay Pending.
    None,
    /// The model is served on CPUs meanwhile.
    #[serde(rename = "CPU")]
    #[strum(serialize = "CPU")]
    Cpu,
}
