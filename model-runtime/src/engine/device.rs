//! What a model is computed on.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// A device, and ONNX Runtime's provider for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU by its number, with CUDA.
    Cuda(u16),
    /// An NVIDIA GPU by its number, with TensorRT, and with CUDA for what TensorRT does not know.
    TensorRt(u16),
    /// The processor, with OpenVINO.
    OpenVino,
}

/// What is no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device; write cpu, cuda:NUMBER, tensorrt:NUMBER or openvino")]
pub struct DeviceError(String);

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(written: &str) -> Result<Self, DeviceError> {
        let (name, number) = written
            .split_once(':')
            .map_or((written, None), |(name, number)| (name, Some(number)));
        let number = number.map(str::parse).transpose().map_err(|_| DeviceError(written.to_owned()))?;
        match (name, number) {
            ("cpu", None) => Ok(Self::Cpu),
            ("cuda", number) => Ok(Self::Cuda(number.unwrap_or(0))),
            ("tensorrt", number) => Ok(Self::TensorRt(number.unwrap_or(0))),
            ("openvino", None) => Ok(Self::OpenVino),
            _ => Err(DeviceError(written.to_owned())),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::TensorRt(number) => write!(f, "tensorrt:{number}"),
            Self::OpenVino => f.write_str("openvino"),
        }
    }
}

impl Device {
    /// The number of NVIDIA's GPU that it is.
    #[must_use]
    pub fn gpu(self) -> Option<u16> {
        match self {
            Self::Cuda(number) | Self::TensorRt(number) => Some(number),
            Self::Cpu | Self::OpenVino => None,
        }
    }

    /// Whether it is a GPU.
    #[must_use]
    pub fn is_gpu(self) -> bool {
        self.gpu().is_some()
    }

    /// The libraries of ONNX Runtime's providers that it needs, which lie beside ONNX Runtime's own.
    fn providers(self) -> &'static [&'static str] {
        match self {
            Self::Cpu => &[],
            Self::Cuda(_) => &["libonnxruntime_providers_cuda.so"],
            Self::TensorRt(_) => &["libonnxruntime_providers_tensorrt.so", "libonnxruntime_providers_cuda.so"],
            Self::OpenVino => &["libonnxruntime_providers_openvino.so"],
        }
    }

    /// Whether ONNX Runtime at `library` has what the device needs.
    ///
    /// # Errors
    /// In words, with what is missing and where to get it: ONNX Runtime itself would say no more than that it cannot open a file.
    pub(super) fn check(self, library: &Path) -> Result<(), String> {
        let folder = library.parent().unwrap_or(Path::new("."));
        let missing = self.providers().iter().find(|name| !folder.join(name).is_file());
        missing.map_or(Ok(()), |name| {
            let package = if self == Self::OpenVino {
                "onnxruntime-openvino"
            } else {
                "onnxruntime-gpu"
            };
            Err(format!(
                "device {self} needs {name} beside {}, which is not there; take ONNX Runtime's library from the package {package}",
                library.display()
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for written in ["cpu", "cuda:0", "cuda:3", "tensorrt:1", "openvino"] {
            assert_eq!(written.parse::<Device>().unwrap().to_string(), written);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert!(Device::TensorRt(1).is_gpu() && !Device::Cpu.is_gpu());
        for written in ["gpu", "cuda:x", "cpu:1", ""] {
            let text = written.parse::<Device>().unwrap_err().to_string();
            assert!(text.contains(&format!("`{written}` is no device")), "{text}");
        }
    }

    #[test]
    fn what_a_device_lacks_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libonnxruntime.so");
        assert_eq!(Device::Cpu.check(&library), Ok(()));
        let text = Device::TensorRt(0).check(&library).unwrap_err();
        assert!(
            text.contains("libonnxruntime_providers_tensorrt.so") && text.contains("onnxruntime-gpu"),
            "{text}"
        );
        std::fs::write(dir.path().join("libonnxruntime_providers_tensorrt.so"), "").unwrap();
        assert!(
            Device::TensorRt(0)
                .check(&library)
                .unwrap_err()
                .contains("libonnxruntime_providers_cuda.so")
        );
        std::fs::write(dir.path().join("libonnxruntime_providers_cuda.so"), "").unwrap();
        assert_eq!(Device::TensorRt(0).check(&library), Ok(()));
    }
}
