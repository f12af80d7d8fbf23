//! The types of the conditions.

/// The conditions of a ModelDeployment and a ModelRevision. `Ready`, `Reconciling` and `Stalled` follow kstatus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, strum::Display, strum::IntoStaticStr, strum::EnumIter)]
pub enum ConditionType {
    /// At this generation, the digest in status answered a probe inference on every replica.
    Ready,
    /// The operator is working towards this generation.
    Reconciling,
    /// The operator cannot go on until the spec, or what it names, changes.
    Stalled,
    /// The artifact of this generation exists and is within its budget.
    Optimized,
    /// Some revision serves, be it an older one.
    Available,
    /// All replicas are of the revision of this generation.
    RolledOut,
}
