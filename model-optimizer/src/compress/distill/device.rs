//! What trains: the processor, or a CUDA device where the optimiser is built with the feature `cuda`.

use candle_core::{Device, DeviceLocation};
use plimsoll_package::recipe::DistillDevice;

use crate::failure::{Failure, FailureReason, failure};

/// The device that is `asked` for.
///
/// # Errors
/// [`FailureReason::Unsupported`] where that is CUDA, and the optimiser is built without it or there is no such device.
pub(super) fn find(asked: DistillDevice) -> Result<Device, Failure> {
    match asked {
        DistillDevice::Cpu => Ok(Device::Cpu),
        DistillDevice::Auto => Ok(cuda().unwrap_or(Device::Cpu)),
        DistillDevice::Cuda => cuda().map_err(|why| {
            let message = format!("optimize.recipe: distill: device is Cuda, and {why}; write Auto or Cpu");
            failure(FailureReason::Unsupported, message)
        }),
    }
}

/// The first CUDA device, or in words why there is none.
fn cuda() -> Result<Device, String> {
    if !cfg!(feature = "cuda") {
        return Err("this optimiser is built without CUDA (its feature `cuda`)".into());
    }
    Device::new_cuda(0).map_err(|error| {
        let error = error.to_string();
        format!("there is no CUDA device here: {}", error.lines().next().unwrap_or_default())
    })
}

/// The device for people.
pub(super) fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu if cfg!(feature = "cuda") => "the processor".into(),
        DeviceLocation::Cpu => "the processor (built without CUDA)".into(),
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    }
}

#[cfg(all(test, not(feature = "cuda")))]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_the_processor_trains_and_a_recipe_that_insists_is_refused() {
        for asked in [DistillDevice::Auto, DistillDevice::Cpu] {
            assert!(find(asked).unwrap().is_cpu());
        }
        let refused = find(DistillDevice::Cuda).unwrap_err();
        assert_eq!(refused.reason, FailureReason::Unsupported);
        assert_eq!(
            refused.message,
            "optimize.recipe: distill: device is Cuda, and this optimiser is built without CUDA (its feature `cuda`); write Auto or Cpu"
        );
        assert_eq!(name(&Device::Cpu), "the processor (built without CUDA)");
    }
}
