//! What passed, failed and was skipped.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::progress::{phase, run_logged};

/// The count of checks and tests.
#[derive(Default)]
pub(super) struct Tally {
    /// How many passed.
    pub(super) passed: usize,
    /// What failed, a line each.
    pub(super) failed: Vec<String>,
    /// What was not run, and why.
    skipped: Vec<String>,
}

impl Tally {
    /// Counts a failure and shows it at once.
    pub(super) fn fail(&mut self, what: String) {
        eprintln!("FAILED {what}");
        self.failed.push(what);
    }

    /// Counts something that was not run.
    pub(super) fn skip(&mut self, what: String) {
        eprintln!("skipped {what}");
        self.skipped.push(what);
    }

    /// Runs a `cargo test` and counts its tests by its own summaries.
    ///
    /// # Errors
    /// Where it fails without naming a failed test: it did not compile.
    pub(super) fn cargo_test(&mut self, what: &str, command: &mut Command, log: &Path) -> Result<()> {
        let result = phase(what, |bar| run_logged(command, log, bar));
        let output = fs::read_to_string(log).unwrap_or_default();
        let failed_before = self.failed.len();
        for line in output.lines() {
            if let Some(summary) = line.strip_prefix("test result: ") {
                self.passed += count(summary, "passed");
            } else if let Some(name) = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED")) {
                self.failed.push(format!("{what}: {name}"));
            }
        }
        match result {
            Ok(()) => Ok(()),
            Err(error) if self.failed.len() == failed_before => Err(error),
            Err(_) => {
                let failures = output.find("\nfailures:\n").map_or(output.as_str(), |start| &output[start..]);
                eprintln!("{failures}\nThe whole log is in {}.", log.display());
                Ok(())
            }
        }
    }

    /// Runs a `go test -v` and counts its tests.
    ///
    /// # Errors
    /// Where it fails without naming a failed test: it did not compile.
    pub(super) fn go_test(&mut self, what: &str, command: &mut Command, log: &Path) -> Result<()> {
        let result = phase(what, |bar| run_logged(command, log, bar));
        let output = fs::read_to_string(log).unwrap_or_default();
        let (passed, failed) = go_tests(&output);
        self.passed += passed;
        match result {
            Err(error) if failed.is_empty() => return Err(error),
            Err(error) => eprintln!("{error:#}"),
            Ok(()) => {}
        }
        self.failed.extend(failed.into_iter().map(|name| format!("{what}: {name}")));
        Ok(())
    }

    /// Prints what was skipped and what failed, and the line that sums it up. That line names what failed, too: of a long log, often the last
    /// line is all that is kept.
    pub(super) fn print(&self) {
        for skipped in &self.skipped {
            println!("skipped: {skipped}");
        }
        for failed in &self.failed {
            println!("failed: {}", failed.lines().next().unwrap_or_default());
        }
        println!("{}", self.summary());
    }

    fn summary(&self) -> String {
        let skipped = if self.skipped.is_empty() {
            String::new()
        } else {
            format!(", {} skipped", self.skipped.len())
        };
        let names: Vec<&str> = self.failed.iter().filter_map(|failed| failed.lines().next()).collect();
        let failed = if names.is_empty() {
            String::new()
        } else {
            format!(": {}", names.join("; "))
        };
        format!("{} passed, {} failed{skipped}{failed}", self.passed, self.failed.len())
    }
}

/// The number before `word` in a summary such as `ok. 12 passed; 0 failed; ...`.
fn count(summary: &str, word: &str) -> usize {
    let words: Vec<&str> = summary.split_whitespace().collect();
    let found = words.windows(2).find(|pair| pair[1].trim_end_matches(';') == word);
    found.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

/// How many tests of a `go test -v` passed, and which failed; a test's own parts are not counted.
fn go_tests(output: &str) -> (usize, Vec<String>) {
    let ended = |verdict: &'static str| output.lines().filter_map(move |line| line.strip_prefix(verdict));
    let failed = ended("--- FAIL: ").map(|rest| rest.split(' ').next().unwrap_or(rest).to_owned());
    (ended("--- PASS: ").count(), failed.collect())
}

#[cfg(test)]
mod tests {
    use super::{Tally, count, go_tests};

    #[test]
    fn the_tests_of_go_are_read_without_their_parts() {
        let output = "=== RUN   TestA\n    --- PASS: TestA/part (0.00s)\n--- PASS: TestA (0.01s)\n--- FAIL: TestB (0.00s)\nFAIL\n";
        assert_eq!(go_tests(output), (1, vec!["TestB".to_owned()]));
    }

    #[test]
    fn the_last_line_counts_and_names_what_failed() {
        let mut tally = Tally {
            passed: 2,
            ..Tally::default()
        };
        assert_eq!(tally.summary(), "2 passed, 0 failed");
        tally.skip("the demo".to_owned());
        tally.fail("Go: a test\nand its words".to_owned());
        assert_eq!(tally.summary(), "2 passed, 1 failed, 1 skipped: Go: a test");
    }

    #[test]
    fn the_counts_of_libtest_are_read() {
        let summary = "FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.61s";
        assert_eq!((count(summary, "passed"), count(summary, "failed")), (12, 3));
    }
}
