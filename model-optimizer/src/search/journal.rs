//! What a search measured so far, line by line in a file: a search that was cut off goes on from there.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use plimsoll_package::recipe::{Quantize, Technique};
use serde::{Deserialize, Serialize};

use super::exploration::Layer;
use super::front::Judged;

/// A line of the file, as JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Line {
    /// The first one: what the search is of.
    Search(String),
    Judged(Box<Judged>),
    Swept(Box<Swept>),
}

/// A layer that was quantised alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Swept {
    /// How.
    pub quantize: Quantize,
    /// Its nodes.
    pub nodes: Vec<String>,
    /// What it lost; `None` of one that the scheme leaves alone.
    pub layer: Option<Layer>,
    /// The time that this took, in milliseconds.
    pub took_ms: f64,
}

/// What was measured so far.
pub struct Journal {
    file: File,
    judged: Vec<Judged>,
    swept: Vec<Swept>,
}

impl Journal {
    /// Opens the journal at `path` of a search that `key` stands for; of another one nothing is kept, nor is a last line that is not whole.
    ///
    /// # Errors
    /// Where the disk does not take or give it.
    pub fn open(path: &Path, key: &str) -> io::Result<Self> {
        let json = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        let (mut judged, mut swept, mut known, mut length) = (Vec::new(), Vec::new(), false, 0);
        let lines = json.split_inclusive(|byte| *byte == b'\n');
        for line in lines.take_while(|line| line.ends_with(b"\n")) {
            match serde_json::from_slice(line) {
                Ok(Line::Search(of)) if of == key && length == 0 => known = true,
                Ok(Line::Judged(one)) if known => judged.push(*one),
                Ok(Line::Swept(one)) if known => swept.push(*one),
                _ => break,
            }
            length += line.len();
        }
        let file = File::options().create(true).append(true).open(path)?;
        file.set_len(length as u64)?;
        let mut journal = Self { file, judged, swept };
        if !known {
            journal.write(&Line::Search(key.to_owned()))?;
        }
        Ok(journal)
    }

    /// Every recipe that was judged, in order.
    #[must_use]
    pub fn judged(&self) -> &[Judged] {
        &self.judged
    }

    /// Every layer that was quantised alone, in order.
    #[must_use]
    pub fn swept(&self) -> &[Swept] {
        &self.swept
    }

    /// What was measured of `recipe`.
    #[must_use]
    pub fn find(&self, recipe: &[Technique]) -> Option<&Judged> {
        self.judged.iter().find(|judged| judged.candidate.recipe == recipe)
    }

    /// Time that all this took, in milliseconds.
    #[must_use]
    pub fn took_ms(&self) -> f64 {
        let judged = self.judged.iter().map(|judged| judged.took_ms);
        judged.chain(self.swept.iter().map(|swept| swept.took_ms)).sum()
    }

    /// Records a recipe.
    ///
    /// # Errors
    /// Where the disk does not take it.
    pub fn add(&mut self, judged: Judged) -> io::Result<()> {
        let line = Line::Judged(Box::new(judged));
        self.write(&line)?;
        if let Line::Judged(judged) = line {
            self.judged.push(*judged);
        }
        Ok(())
    }

    /// Records a layer.
    ///
    /// # Errors
    /// Where the disk does not take it.
    pub fn add_swept(&mut self, swept: Swept) -> io::Result<()> {
        let line = Line::Swept(Box::new(swept));
        self.write(&line)?;
        if let Line::Swept(swept) = line {
            self.swept.push(*swept);
        }
        Ok(())
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut json = serde_json::to_vec(line)?;
        json.push(b'\n');
        self.file.write_all(&json)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_package::recipe::{Prune, QuantizeScheme};
    use plimsoll_package::report::front::{Candidate, Outcome};

    fn judged(percent: u32) -> Judged {
        let prune = Prune {
            amount: Some(format!("{percent}%").parse().unwrap()),
            ..Prune::default()
        };
        Judged {
            candidate: Candidate {
                recipe: vec![Technique {
                    prune: Some(prune),
                    ..Technique::default()
                }],
                size: Some(1),
                size_layer: Some(1),
                metric: None,
                fidelity: None,
                latency: None,
                latency_ratio: None,
                outcome: Outcome::Failed,
                why: None,
            },
            limits: vec![],
            engines: vec![],
            latency: None,
            took_ms: 10.0,
        }
    }

    #[test]
    fn what_was_cut_off_goes_on_and_another_search_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, "one").unwrap();
        journal.add(judged(10)).unwrap();
        let swept = Swept {
            quantize: Quantize::of(QuantizeScheme::Int4),
            nodes: vec!["head".into()],
            layer: None,
            took_ms: 5.0,
        };
        journal.add_swept(swept.clone()).unwrap();
        journal.add(judged(20)).unwrap();
        drop(journal);
        // The process was killed while it wrote its last line.
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();

        let mut journal = Journal::open(&path, "one").unwrap();
        assert_eq!(journal.judged(), [judged(10)]);
        assert_eq!(journal.swept(), [swept]);
        assert_eq!(journal.took_ms(), 15.0);
        journal.add(judged(20)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);

        assert!(Journal::open(&path, "another").unwrap().judged().is_empty());
        assert!(Journal::open(&path, "one").unwrap().judged().is_empty());
    }
}
