//! The line of waiting requests: by priority, and within a priority in turns among clients, so that none can crowd out the others.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;

/// Who sent a request: the address of the peer. All that comes over a Unix socket is one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Client(pub(crate) Option<IpAddr>);

/// What waits, and in which order it is served.
#[derive(Debug)]
pub(super) struct Line<T> {
    /// Lower numbers go first.
    levels: BTreeMap<u32, Level<T>>,
    length: usize,
}

#[derive(Debug)]
struct Level<T> {
    /// Clients with something waiting, the next one to be served first.
    turns: VecDeque<Client>,
    waiting: HashMap<Client, VecDeque<T>>,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            levels: BTreeMap::new(),
            length: 0,
        }
    }
}

impl<T> Line<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(super) fn push(&mut self, priority: u32, client: Client, item: T) {
        let level = self.levels.entry(priority).or_insert_with(|| Level {
            turns: VecDeque::new(),
            waiting: HashMap::new(),
        });
        let waiting = level.waiting.entry(client).or_default();
        if waiting.is_empty() {
            level.turns.push_back(client);
        }
        waiting.push_back(item);
        self.length += 1;
    }

    /// Takes the next one in order of which `wanted` holds. Of each client only the one that waits longest is looked at, so that a
    /// client's requests keep their order.
    pub(super) fn take(&mut self, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let mut taken = None;
        for (&priority, level) in &mut self.levels {
            let next = (0..level.turns.len()).find(|&turn| level.waiting[&level.turns[turn]].front().is_some_and(&wanted));
            if let Some(turn) = next {
                taken = Some((priority, level.take(turn)));
                break;
            }
        }
        let (priority, item) = taken?;
        if self.levels[&priority].turns.is_empty() {
            self.levels.remove(&priority);
        }
        self.length -= 1;
        item
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.levels.values().flat_map(|level| level.waiting.values().flatten())
    }
}

impl<T> Level<T> {
    fn take(&mut self, turn: usize) -> Option<T> {
        let client = self.turns.remove(turn)?;
        let waiting = self.waiting.get_mut(&client)?;
        let item = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&client);
        } else {
            self.turns.push_back(client);
        }
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> Client {
        Client(Some(IpAddr::from([10, 0, 0, last])))
    }

    fn drain(mut line: Line<&'static str>) -> Vec<&'static str> {
        std::iter::from_fn(|| line.take(|_| true)).collect()
    }

    #[test]
    fn clients_take_turns_and_each_keeps_its_order() {
        let mut line = Line::default();
        for item in ["a1", "a2", "a3", "a4"] {
            line.push(0, client(1), item);
        }
        line.push(0, client(2), "b1");
        line.push(0, client(3), "c1");
        line.push(0, client(2), "b2");
        assert_eq!(line.iter().count(), 7);
        assert_eq!(drain(line), ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]);
    }

    #[test]
    fn a_lower_number_goes_first() {
        let mut line = Line::default();
        line.push(2, client(1), "later");
        line.push(1, client(2), "sooner");
        assert_eq!(drain(line), ["sooner", "later"]);
    }

    #[test]
    fn what_is_not_wanted_keeps_its_place() {
        let mut line = Line::default();
        line.push(0, client(1), "other");
        line.push(0, client(1), "mine-but-behind");
        line.push(0, client(2), "mine");
        assert_eq!(line.take(|item| item.starts_with("mine")), Some("mine"));
        assert_eq!(line.take(|item| item.starts_with("mine")), None);
        assert!(!line.is_empty());
        assert_eq!(drain(line), ["other", "mine-but-behind"]);
    }
}
