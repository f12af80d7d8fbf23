//! What was measured, as JSON and as tables.

use std::fmt;

use comfy_table::Table;
use plimsoll_package::units::display_size;
use serde::Serialize;

use crate::bench::load::Served;
use crate::bench::process::median;

/// What a server did with a piece of work: medians of the rounds.
#[derive(Serialize)]
pub(super) struct Row {
    work: String,
    server: String,
    #[serde(flatten)]
    served: Served,
    /// Median, round by round, of its requests a second to those of the first server of this work.
    of_first: f64,
    /// The same to those of ONNX Runtime in process, where there is one connection.
    of_in_process: Option<f64>,
}

impl Row {
    pub(super) fn new(work: &str, server: &str, rounds: &[Served], of_first: f64, of_in_process: Option<f64>) -> Self {
        let of = |value: fn(&Served) -> f64| median(rounds.iter().map(value).collect());
        Self {
            work: work.to_owned(),
            server: server.to_owned(),
            served: Served {
                rps: of(|served| served.rps),
                p50_us: of(|served| served.p50_us),
                p99_us: of(|served| served.p99_us),
                failed: rounds.iter().map(|served| served.failed).sum(),
            },
            of_first,
            of_in_process,
        }
    }
}

/// How a server starts.
#[derive(Serialize)]
pub(super) struct Start {
    pub server: String,
    /// From the start of its process to the first answer to an inference, in seconds; the median.
    pub seconds: f64,
    /// Resident after the load, in bytes, its children included.
    pub resident_bytes: u64,
    /// The same without the model's file.
    pub over_model_bytes: u64,
}

/// What a soak showed, minute by minute.
#[derive(Serialize)]
pub(super) struct Minute {
    pub minute: u32,
    #[serde(flatten)]
    pub served: Served,
    pub resident_bytes: u64,
}

#[derive(Default, Serialize)]
pub(super) struct Results {
    pub load: Vec<Row>,
    pub start: Vec<Start>,
    pub soak: Vec<Minute>,
}

fn display_micros(micros: f64) -> String {
    match micros {
        micros if micros.is_nan() => "-".to_owned(),
        micros if micros < 1e4 => format!("{micros:.0} µs"),
        micros => format!("{:.1} ms", micros / 1e3),
    }
}

/// A table of Markdown, as the documents have it.
fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Option<Table> {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(header);
    table.add_rows(rows);
    (!table.is_empty()).then_some(table)
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let served = |served: &Served| {
            let rps = if served.rps < 1000.0 {
                format!("{:.1}", served.rps)
            } else {
                format!("{:.0}", served.rps)
            };
            [
                rps,
                display_micros(served.p50_us),
                display_micros(served.p99_us),
                served.failed.to_string(),
            ]
        };
        let load = self.load.iter().map(|row| {
            let in_process = row.of_in_process.map_or_else(String::new, |ratio| format!("{ratio:.3}x"));
            let ratios = [format!("{:.2}x", row.of_first), in_process];
            [&[row.work.clone(), row.server.clone()], &ratios[..], &served(&row.served)].concat()
        });
        let start = self.start.iter().map(|row| {
            let (all, over) = (display_size(row.resident_bytes), display_size(row.over_model_bytes));
            vec![row.server.clone(), format!("{:.3} s", row.seconds), all, over]
        });
        let soak = self.soak.iter().map(|row| {
            [
                &[row.minute.to_string()],
                &served(&row.served)[..],
                &[display_size(row.resident_bytes)],
            ]
            .concat()
        });
        let tables = [
            table(
                &[
                    "work",
                    "server",
                    "of the first",
                    "of in process",
                    "requests/s",
                    "p50",
                    "p99",
                    "failed",
                ],
                load,
            ),
            table(
                &["server", "start to the first answer", "resident after load", "over the model"],
                start,
            ),
            table(&["minute", "requests/s", "p50", "p99", "failed", "resident"], soak),
        ];
        tables.iter().flatten().try_for_each(|table| writeln!(f, "\n{table}"))
    }
}
