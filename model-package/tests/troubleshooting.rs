//! The user's guide knows every reason that a failure can have.

use plimsoll_package::report::FailureReason;
use strum::IntoEnumIterator as _;

#[test]
fn every_reason_of_a_failure_has_its_line_in_the_guide_and_says_whether_it_is_tried_again() {
    let guide = include_str!("../../docs/troubleshooting.md");
    for reason in FailureReason::iter() {
        let retried = if reason.is_transient() { "yes" } else { "no" };
        let row = format!("| `{reason}` | {retried} |");
        assert!(guide.contains(&row), "docs/troubleshooting.md has no row that begins with {row}");
    }
}
