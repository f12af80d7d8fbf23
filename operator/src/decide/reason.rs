//! The reasons of conditions, which are also those of Events and the label of the metric.

use std::fmt;
use std::str::FromStr;

use plimsoll_package::report::FailureReason;
use strum::IntoEnumIterator as _;

/// Why a condition is as it is; the variant's name is what people read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::EnumIter)]
pub enum Reason {
    /// The artifact exists, within its budget.
    Optimized,
    /// The artifact is being made or looked for.
    Optimizing,
    /// Pods are on their way.
    RollingOut,
    /// All that is asked for serves.
    Serving,
    /// No pods are asked for.
    ScaledToZero,
    /// `spec.paused` keeps it from going on.
    Paused,
    /// No replica of any revision is ready.
    NoReadyReplica,
    /// The spec asks for what this version does not do.
    Unsupported,
    /// An object that the model needs belongs to somebody else.
    NameTaken,
    /// The apiserver refuses an object.
    WriteRefused,
    /// The Job took longer than it may.
    DeadlineExceeded,
    /// The rollout made no progress for longer than it may.
    ProgressDeadlineExceeded,
    /// No node takes the pod.
    Unschedulable,
    /// A node cannot pull an image, or the artifact.
    ImageUnavailable,
    /// A node cannot make a container.
    ContainerNotCreated,
    /// The runtime ended.
    RuntimeFailed,
    /// A step of the optimisation failed so.
    #[strum(disabled)]
    Failed(FailureReason),
}

impl Reason {
    /// Whether this is bad news.
    #[must_use]
    pub fn is_bad(self) -> bool {
        match self {
            Self::Optimized | Self::Optimizing | Self::RollingOut | Self::Serving | Self::ScaledToZero | Self::Paused => false,
            Self::NoReadyReplica
            | Self::Unsupported
            | Self::NameTaken
            | Self::WriteRefused
            | Self::DeadlineExceeded
            | Self::ProgressDeadlineExceeded
            | Self::Unschedulable
            | Self::ImageUnavailable
            | Self::ContainerNotCreated
            | Self::RuntimeFailed
            | Self::Failed(_) => true,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Failed(reason) => reason.into(),
            reason => reason.into(),
        })
    }
}

/// No reason that this version knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no reason of a condition")]
pub struct Unknown(String);

impl FromStr for Reason {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        let of_failures = FailureReason::iter().map(Self::Failed);
        let found = Self::iter().chain(of_failures).find(|reason| reason.to_string() == text);
        found.ok_or_else(|| Unknown(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_guide_knows_every_reason() {
        let guide = include_str!("../../../docs/troubleshooting.md");
        for reason in Reason::iter() {
            assert!(
                guide.contains(&format!("`{reason}`")),
                "docs/troubleshooting.md does not mention {reason}"
            );
        }
    }

    #[test]
    fn a_reason_is_read_back_as_it_was_written() {
        for reason in Reason::iter().chain(FailureReason::iter().map(Reason::Failed)) {
            assert_eq!(reason.to_string().parse::<Reason>().unwrap().to_string(), reason.to_string());
        }
        assert_eq!("BudgetExceeded".parse(), Ok(Reason::Failed(FailureReason::BudgetExceeded)));
        assert!("Sunny".parse::<Reason>().is_err());
    }
}
