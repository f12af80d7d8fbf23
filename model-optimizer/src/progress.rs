//! What is said while the optimiser works: JSON lines where a machine reads, progress bars where a person does.

use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

/// Least time between two progress lines of one activity.
const LINE_INTERVAL: Duration = Duration::from_millis(300);

/// Where messages go. Cloning shares it.
#[derive(Clone)]
pub struct Console(Arc<Kind>);

enum Kind {
    Json { step: Mutex<&'static str> },
    Terminal { bars: MultiProgress },
    Silent,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: &'a str,
    step: &'a str,
    message: &'a str,
    #[serde(flatten)]
    amount: Option<Amount<'a>>,
}

#[derive(Serialize)]
struct Amount<'a> {
    done: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    unit: &'a str,
}

impl Console {
    /// JSON lines on standard error.
    #[must_use]
    pub fn json() -> Self {
        Self(Arc::new(Kind::Json { step: Mutex::new("") }))
    }

    /// Bars on the terminal that is standard error.
    #[must_use]
    pub fn terminal() -> Self {
        Self(Arc::new(Kind::Terminal {
            bars: MultiProgress::new(),
        }))
    }

    /// Nothing at all.
    #[must_use]
    pub fn silent() -> Self {
        Self(Arc::new(Kind::Silent))
    }

    /// One for a step that runs beside another.
    #[must_use]
    pub fn beside(&self) -> Self {
        match &*self.0 {
            Kind::Json { .. } => Self::json(),
            Kind::Terminal { .. } | Kind::Silent => self.clone(),
        }
    }

    /// Names the step that later lines belong to.
    pub fn enter(&self, name: &'static str) {
        if let Kind::Json { step } = &*self.0 {
            *step.lock().unwrap_or_else(PoisonError::into_inner) = name;
        }
    }

    /// Says a sentence.
    pub fn info(&self, message: &str) {
        self.say("info", message);
    }

    /// Says what somebody should look at.
    pub fn warn(&self, message: &str) {
        self.say("warn", message);
    }

    /// Says why the step fails; a terminal's user hears it from the program's end instead.
    pub fn error(&self, message: &str) {
        if let Kind::Json { .. } = &*self.0 {
            self.say("error", message);
        }
    }

    fn say(&self, level: &str, message: &str) {
        match &*self.0 {
            Kind::Json { step } => write_line(*step.lock().unwrap_or_else(PoisonError::into_inner), level, message, None),
            // A closed terminal is no reason to stop.
            Kind::Terminal { bars } => drop(bars.println(message)),
            Kind::Silent => {}
        }
    }

    /// Begins an activity of `unit` (`bytes`, `samples`), whose progress is then reported.
    #[must_use]
    pub fn activity(&self, message: &str, unit: &'static str) -> Activity {
        let bar = match &*self.0 {
            Kind::Terminal { bars } => {
                let bar = bars.add(ProgressBar::no_length());
                let template = if unit == "bytes" {
                    "{msg:30} {wide_bar} {bytes}/{total_bytes}"
                } else {
                    "{msg:30} {wide_bar} {pos}/{len}"
                };
                bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.set_message(message.to_owned());
                Some(bar)
            }
            _ => None,
        };
        Activity {
            console: self.clone(),
            message: message.to_owned(),
            unit,
            bar,
            last: Mutex::new(None),
        }
    }
}

/// Something that goes on; its bar goes away with it.
pub struct Activity {
    console: Console,
    message: String,
    unit: &'static str,
    bar: Option<ProgressBar>,
    last: Mutex<Option<Instant>>,
}

impl Activity {
    /// Reports how much is done, and of how much where that is known.
    pub fn report(&self, done: u64, total: Option<u64>) {
        if let Some(bar) = &self.bar {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
        }
        if let Kind::Json { step } = &*self.console.0 {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = total == Some(done);
            if ended || last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                *last = Some(Instant::now());
                let step = *step.lock().unwrap_or_else(PoisonError::into_inner);
                write_line(
                    step,
                    "info",
                    &self.message,
                    Some(Amount {
                        done,
                        total,
                        unit: self.unit,
                    }),
                );
            }
        }
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn write_line(step: &str, level: &str, message: &str, amount: Option<Amount<'_>>) {
    let line = Line {
        time: jiff::Timestamp::now().to_string(),
        level,
        step,
        message,
        amount,
    };
    if let Ok(mut json) = serde_json::to_vec(&line) {
        json.push(b'\n');
        // In one write, so that lines of several processes do not mix; a closed log is no reason to stop.
        let _ = std::io::stderr().lock().write_all(&json);
    }
}
