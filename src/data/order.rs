//! The order in which rows are visited: every row once an epoch, shuffled anew each time.
//!
//! What must stay true: the order follows from (seed, epoch) alone, so the state of a run is three numbers and resuming
//! needs nothing else; the permutation is rebuilt, never stored.

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Endless indices `0..rows`, a fresh permutation each epoch.
///
/// ```
/// use foveate::data::Order;
/// let mut order = Order::new(3, 42).unwrap();
/// let mut first: Vec<usize> = (0..3).map(|_| order.next_row()).collect();
/// first.sort();
/// assert_eq!(first, [0, 1, 2]);
/// assert_eq!(order.epoch, 1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub seed: u64,
    pub epoch: u64,
    /// Rows of this epoch already given.
    pub position: usize,
    pub rows: usize,
    #[serde(skip)]
    permutation: Vec<u32>,
}

impl Order {
    /// # Errors
    /// No rows to order, or more than 2^32.
    pub fn new(rows: usize, seed: u64) -> Result<Order> {
        Order { seed, epoch: 0, position: 0, rows, permutation: Vec::new() }.checked()
    }

    /// A state that was saved, for a data set that has `rows` rows now.
    ///
    /// # Errors
    /// The set changed its number of rows since, so the state means nothing.
    pub fn resume(self, rows: usize) -> Result<Order> {
        ensure!(
            self.rows == rows,
            "resuming: the data had {} rows when the run was saved and has {rows} now, expected the same data",
            self.rows
        );
        self.checked()
    }

    fn checked(self) -> Result<Order> {
        ensure!(self.rows > 0, "ordering the data: there are no rows, expected at least one");
        ensure!(
            u32::try_from(self.rows).is_ok(),
            "ordering the data: {} rows are too many, expected fewer than 4294967296",
            self.rows
        );
        ensure!(
            self.position <= self.rows,
            "resuming: position {} is past the {} rows of the data",
            self.position,
            self.rows
        );
        Ok(self)
    }

    /// The next row's index.
    pub fn next_row(&mut self) -> usize {
        if self.permutation.len() != self.rows {
            self.shuffle();
        }
        if self.position >= self.rows {
            // Only a saved state may stand at the end of an epoch.
            self.advance();
        }
        let row = self.permutation[self.position] as usize;
        self.position += 1;
        if self.position == self.rows {
            self.advance();
        }
        row
    }

    fn advance(&mut self) {
        self.epoch += 1;
        self.position = 0;
        self.shuffle();
    }

    fn shuffle(&mut self) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.epoch);
        self.permutation = (0..self.rows as u32).collect();
        self.permutation.shuffle(&mut rng);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_differ_and_a_saved_state_goes_on_where_it_was() {
        let mut order = Order::new(50, 9).unwrap();
        let first: Vec<usize> = (0..50).map(|_| order.next_row()).collect();
        for _ in 0..20 {
            order.next_row();
        }
        let saved = serde_json::to_string(&order).unwrap();
        let rest: Vec<usize> = (0..100).map(|_| order.next_row()).collect();
        let mut again = serde_json::from_str::<Order>(&saved).unwrap().resume(50).unwrap();
        assert_eq!((0..100).map(|_| again.next_row()).collect::<Vec<_>>(), rest);
        assert_ne!(first, rest[30..80]); // epoch 2 is not epoch 0 again
        assert!(serde_json::from_str::<Order>(&saved).unwrap().resume(51).is_err());
        assert!(Order::new(0, 1).is_err());
    }
}
