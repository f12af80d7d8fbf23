//! Metrics of the GPU, asked of NVIDIA's driver (NVML) whenever they are scraped.

use std::fmt;
use std::sync::atomic::AtomicU64;

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device as NvmlDevice, Nvml};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Unit;

use crate::engine::Device;

/// The GPU that a model is computed on.
pub(super) struct Gpu {
    nvml: Nvml,
    number: u32,
    labels: Labels,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    gpu: u32,
    uuid: String,
    name: String,
}

/// A gauge: its name, what it tells, its unit, and how it is asked for.
type Asked = (
    &'static str,
    &'static str,
    Option<Unit>,
    fn(&NvmlDevice<'_>) -> Result<f64, NvmlError>,
);

const GAUGES: [Asked; 3] = [
    ("gpu_memory", "Memory of the GPU", Some(Unit::Bytes), |gpu| {
        Ok(gpu.memory_info()?.total as f64)
    }),
    (
        "gpu_memory_used",
        "Memory of the GPU that is taken, by all that use it",
        Some(Unit::Bytes),
        |gpu| Ok(gpu.memory_info()?.used as f64),
    ),
    (
        "gpu_utilization_ratio",
        "Share of the driver's last sampling period in which something ran on the GPU, 0 to 1",
        None,
        |gpu| Ok(f64::from(gpu.utilization_rates()?.gpu) / 100.0),
    ),
];

impl Gpu {
    /// `None`, with a warning, where the device is no GPU of NVIDIA's or its driver does not tell.
    pub(super) fn of(device: Device) -> Option<Self> {
        let number = u32::from(device.gpu()?);
        let gpu = Nvml::init().and_then(|nvml| {
            let gpu = nvml.device_by_index(number)?;
            let labels = Labels {
                gpu: number,
                uuid: gpu.uuid()?,
                name: gpu.name()?,
            };
            Ok(Self { nvml, number, labels })
        });
        gpu.inspect_err(|error| tracing::warn!(%device, %error, "there are no metrics of the GPU"))
            .ok()
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.labels.fmt(f)
    }
}

impl Collector for Gpu {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Ok(gpu) = self.nvml.device_by_index(self.number) else {
            return Ok(());
        };
        for (name, help, unit, ask) in &GAUGES {
            // What a GPU does not tell, as a slice of one does not its utilisation, is left out.
            let Ok(value) = ask(&gpu) else { continue };
            let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
            family.get_or_create(&self.labels).set(value);
            family.encode(encoder.encode_descriptor(name, help, unit.as_ref(), family.metric_type())?)?;
        }
        Ok(())
    }
}
