//! What can come of a case.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    Passed,
    Type,
    Rank,
    Operator,
    Load,
    Run,
    Panicked,
    Crashed,
    Hung,
    Differs,
    Unmeasured,
}

/// Every outcome, the best first, with its name in results and its meaning on the page.
pub(super) const OUTCOMES: [(Outcome, &str, &str); 11] = [
    (Outcome::Passed, "passed", "the outputs are the recorded ones"),
    (
        Outcome::Type,
        "type",
        "not loaded: an input or output is a sequence, map or optional, or of an element type that the protocol or the engine does not have",
    ),
    (Outcome::Rank, "rank", "not loaded: an input has no shape"),
    (
        Outcome::Operator,
        "operator",
        "refused: the engine does not have the operator, or not in that version or for that type",
    ),
    (Outcome::Load, "load", "refused at load for another reason"),
    (Outcome::Run, "run", "refused when it was run"),
    (Outcome::Panicked, "panicked", "the engine panicked; one request is lost"),
    (Outcome::Crashed, "crashed", "the process ended"),
    (Outcome::Hung, "hung", "no answer within 30 s"),
    (Outcome::Differs, "differs", "the outputs are not the recorded ones"),
    (Outcome::Unmeasured, "unmeasured", "newer than what is recorded of this engine"),
];

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = OUTCOMES
            .iter()
            .find(|(outcome, ..)| outcome == self)
            .map_or("", |(_, name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for Outcome {
    type Err = ();

    fn from_str(written: &str) -> Result<Self, ()> {
        let found = OUTCOMES.iter().find(|(_, name, _)| *name == written);
        found.map(|(outcome, ..)| *outcome).ok_or(())
    }
}
