//! A model's parameters as forward passes read them: all of them as f32 in memory, or the matrices as bf16 where they lie in the
//! checkpoint's files.
//!
//! Training needs the first, one flat array beside its gradients. Where nothing is trained the second takes half of the memory, in pages that
//! the system reads when they are needed and can drop again. What must stay true: bf16 is widened exactly and in the same products, so
//! both give the same bits.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use foveate_kernels::matrix::{Compute, Matrix, Numbers};
use memmap2::Mmap;

use super::checkpoint::Hold;
use super::layout::{Arena, Entry, Layout};

/// The parameters of a model.
#[derive(Clone, Debug)]
pub enum Weights {
    Memory(Arena),
    Mapped(Arc<Mapped>),
}

impl Weights {
    pub fn layout(&self) -> &Arc<Layout> {
        match self {
            Weights::Memory(arena) => &arena.layout,
            Weights::Mapped(mapped) => &mapped.layout,
        }
    }

    pub fn values(&self) -> Values<'_> {
        match self {
            Weights::Memory(arena) => arena.data.as_slice().into(),
            Weights::Mapped(mapped) => Values { store: Store::Mapped(mapped), compute: Compute::F32 },
        }
    }

    /// The array of all parameters, for what a forward pass does not do: gradients, updates, checkpoints.
    ///
    /// # Errors
    /// The weights are mapped.
    pub fn arena(&self) -> Result<&Arena> {
        match self {
            Weights::Memory(arena) => Ok(arena),
            Weights::Mapped(_) => bail!(READ_ONLY),
        }
    }

    /// # Errors
    /// The weights are mapped.
    pub fn arena_mut(&mut self) -> Result<&mut Arena> {
        match self {
            Weights::Memory(arena) => Ok(arena),
            Weights::Mapped(_) => bail!(READ_ONLY),
        }
    }

    pub fn hold(&self) -> Hold {
        match self {
            Weights::Memory(_) => Hold::Memory,
            Weights::Mapped(_) => Hold::Mapped,
        }
    }

    /// How they are held, as a person reads it.
    pub fn held(&self) -> &'static str {
        match self {
            Weights::Memory(_) => "f32 in memory",
            Weights::Mapped(_) => "bf16, mapped from the files",
        }
    }
}

const READ_ONLY: &str =
    "the weights are mapped from their files and can only be read; open the model with model.weights = \"memory\"";

impl From<Arena> for Weights {
    fn from(arena: Arena) -> Weights {
        Weights::Memory(arena)
    }
}

/// Parameters by their places in the layout, and how products over them are computed.
#[derive(Clone, Copy)]
pub struct Values<'a> {
    store: Store<'a>,
    pub(super) compute: Compute,
}

#[derive(Clone, Copy)]
enum Store<'a> {
    Memory(&'a [f32]),
    Mapped(&'a Mapped),
}

impl<'a> Values<'a> {
    pub fn computed(self, compute: Compute) -> Values<'a> {
        Values { compute, ..self }
    }

    /// A matrix, or some of its rows.
    pub fn matrix(self, place: &Range<usize>) -> Matrix<'a> {
        let matrix = match self.store {
            Store::Memory(data) => Matrix::from(&data[place.clone()]),
            Store::Mapped(mapped) => mapped.get(place),
        };
        matrix.computed(self.compute)
    }

    /// What is no matrix: the weights of a norm, a bias, the patch embedding.
    pub fn vector(self, place: &Range<usize>) -> &'a [f32] {
        match self.matrix(place).numbers {
            Numbers::F32(values) => values,
            Numbers::Bf16(_) => unreachable!("only matrices stay in their files"),
        }
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(data: &'a [f32]) -> Values<'a> {
        Values { store: Store::Memory(data), compute: Compute::F32 }
    }
}

/// Whether a tensor may stay in its file: the matrices do, which are all but a thousandth of a model.
pub fn is_matrix(entry: &Entry) -> bool {
    entry.shape.len() == 2
}

/// Bytes of a model whose matrices stay in their files.
pub fn mapped_bytes(layout: &Layout) -> u64 {
    layout.entries.iter().map(|e| e.range.len() as u64 * if is_matrix(e) { 2 } else { 4 }).sum()
}

/// Matrices in bf16 where they lie in the checkpoint's files, and all else widened in memory.
#[derive(Debug)]
pub struct Mapped {
    pub layout: Arc<Layout>,
    files: Vec<Mmap>,
    /// One for each entry of the layout, in its order.
    places: Vec<Place>,
    small: Vec<f32>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub enum Place {
    /// Bytes of a file.
    File { file: usize, bytes: Range<usize> },
    /// Values of `small`.
    Memory(Range<usize>),
}

impl Mapped {
    /// # Panics
    /// Where the places are not those of the layout's tensors, which is a fault of the reader.
    pub(super) fn new(layout: &Arc<Layout>, files: Vec<Mmap>, places: Vec<Place>, small: Vec<f32>) -> Mapped {
        assert_eq!(places.len(), layout.entries.len(), "a place for each tensor");
        for (entry, place) in layout.entries.iter().zip(&places) {
            let (there, values) = match place {
                Place::File { file, bytes } => (files[*file].len() >= bytes.end, bytes.len() / 2),
                Place::Memory(range) => (small.len() >= range.end, range.len()),
            };
            assert!(there && values == entry.range.len(), "{} lies at {place:?}", entry.name);
        }
        Mapped { layout: layout.clone(), files, places, small }
    }

    /// With more tensors behind those of its layout, in memory.
    pub(super) fn beside(mut self, adapted: &Arc<Layout>, others: &[f32]) -> Mapped {
        let offset = self.small.len();
        let behind = self.layout.len;
        self.small.extend_from_slice(others);
        let new = &adapted.entries[self.places.len()..];
        let place = |entry: &Entry| entry.range.start - behind + offset..entry.range.end - behind + offset;
        self.places.extend(new.iter().map(|entry| Place::Memory(place(entry))));
        Mapped::new(adapted, self.files, self.places, self.small)
    }

    fn get(&self, place: &Range<usize>) -> Matrix<'_> {
        // Entries cover the layout without gaps, and what is asked for lies within one of them.
        let entries = &self.layout.entries;
        let i = entries.partition_point(|entry| entry.range.end <= place.start);
        let within = place.start - entries[i].range.start..place.end - entries[i].range.start;
        match &self.places[i] {
            Place::File { file, bytes } => {
                let (values, _) = self.files[*file][bytes.clone()].as_chunks::<2>();
                Matrix::from(values).part(within)
            }
            Place::Memory(range) => Matrix::from(&self.small[range.clone()]).part(within),
        }
    }
}
