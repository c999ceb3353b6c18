//! Memory for large arrays: [`OnLines`], an allocator for programs that use these kernels, and [`Rows`], arrays that are cleared by the
//! tasks that fill them.

use rayon::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, with large blocks on cache lines: the C library aligns to 16 bytes, and then every load of a wide vector
/// touches two lines, which costs a product up to a seventh of its time (LOG.md).
pub struct OnLines;

/// Bytes of a cache line and of a wide vector.
pub(crate) const LINE: usize = 64;
/// Bytes from which on a block is worth it.
const LARGE: usize = 4096;

/// The block that holds such a block: its start is moved to a line, and how far stands before it.
fn around(layout: Layout) -> Option<Layout> {
    let holds = layout.size() >= LARGE && layout.align() <= LINE;
    holds.then(|| Layout::from_size_align(layout.size() + LINE, size_of::<usize>() * 2).ok()).flatten()
}

/// # Safety
/// `block` holds `LINE` bytes more than are asked for and is aligned to two words, or null.
unsafe fn on_line(block: *mut u8) -> *mut u8 {
    if block.is_null() {
        return block;
    }
    // Two words at least, so there is room for one before the line.
    let shift = LINE - block.addr() % LINE;
    // SAFETY: shift is at most LINE, and what stands before the line is at least a word, aligned like one.
    unsafe {
        let start = block.add(shift);
        start.cast::<usize>().sub(1).write(shift);
        start
    }
}

// SAFETY: every block comes from the system's allocator and goes back to it with the layout that it was asked for: which of the two
// ways a block went depends on its layout alone.
unsafe impl GlobalAlloc for OnLines {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match around(layout) {
            // SAFETY: `around` leaves room for the shift.
            Some(around) => unsafe { on_line(System.alloc(around)) },
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match around(layout) {
            // SAFETY: as above; the shift is written before the block that is handed out.
            Some(around) => unsafe { on_line(System.alloc_zeroed(around)) },
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match around(layout) {
            // SAFETY: a block of this layout was made by `on_line`, which left the shift before it.
            Some(around) => unsafe { System.dealloc(block.sub(block.cast::<usize>().sub(1).read()), around) },
            // SAFETY: the caller's promise.
            None => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: `size` is a possible one for this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if around(layout).is_none() && around(new).is_none() {
            // SAFETY: the caller's promise.
            return unsafe { System.realloc(block, layout, size) };
        }
        // SAFETY: both blocks hold at least the smaller size, and the old one is given up only when the new one is there.
        unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                std::ptr::copy_nonoverlapping(block, to, layout.size().min(size));
                self.dealloc(block, layout);
            }
            to
        }
    }
}

/// An array whose chunks are cleared one by one, each by the task that fills it and while that task's core holds it. Clearing all of
/// a large array first, on one thread, costs a pass over the memory that the others wait for.
pub struct Rows<T> {
    data: Vec<T>,
    len: usize,
    cleared: AtomicUsize,
}

/// A chunk that has not been cleared yet.
pub struct Chunk<'a, T> {
    data: &'a mut [MaybeUninit<T>],
    cleared: &'a AtomicUsize,
}

impl<T: Copy + Default + Send> Rows<T> {
    pub fn new(len: usize) -> Rows<T> {
        Rows { data: Vec::with_capacity(len), len, cleared: AtomicUsize::new(0) }
    }

    /// All of it in chunks of `size`, the last one shorter.
    pub fn chunks(&mut self, size: usize) -> impl IndexedParallelIterator<Item = Chunk<'_, T>> {
        *self.cleared.get_mut() = 0;
        let cleared = &self.cleared;
        self.data.spare_capacity_mut()[..self.len].par_chunks_mut(size).map(move |data| Chunk { data, cleared })
    }

    /// # Panics
    /// Where a chunk was not cleared.
    pub fn done(mut self) -> Vec<T> {
        assert_eq!(*self.cleared.get_mut(), self.len, "memory: numbers cleared, of all");
        // SAFETY: `chunks` hands out each number once and counts anew each time, and a chunk is used up by clearing it: so when the
        // counts agree every number has been written.
        unsafe { self.data.set_len(self.len) };
        self.data
    }
}

impl<'a, T: Copy + Default> Chunk<'a, T> {
    /// The chunk, all zeros.
    pub fn clear(self) -> &'a mut [T] {
        self.data.iter_mut().for_each(|x| _ = x.write(T::default()));
        self.cleared.fetch_add(self.data.len(), Ordering::Relaxed);
        // SAFETY: just written, and `MaybeUninit<T>` has the layout of `T`.
        unsafe { &mut *(std::ptr::from_mut(self.data) as *mut [T]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_blocks_lie_on_lines_and_keep_what_they_hold() {
        let at = |size: usize, align: usize| Layout::from_size_align(size, align).unwrap();
        for (small, large) in [(16, LARGE), (LARGE - 1, 1 << 20), (LARGE, LARGE + 1)] {
            for align in [1, 16, LINE, 4096] {
                // SAFETY: blocks are written and read within their sizes, and given back with their layouts.
                unsafe {
                    let block = OnLines.alloc(at(small, align));
                    (0..small).for_each(|i| block.add(i).write(i as u8));
                    let block = OnLines.realloc(block, at(small, align), large);
                    assert!(block.addr().is_multiple_of(LINE.max(align)), "{small} {large} {align}");
                    assert!((0..small).all(|i| block.add(i).read() == i as u8));
                    (0..large).for_each(|i| block.add(i).write(i as u8));
                    let block = OnLines.realloc(block, at(large, align), small);
                    assert!((0..small).all(|i| block.add(i).read() == i as u8));
                    OnLines.dealloc(block, at(small, align));
                    let block = OnLines.alloc_zeroed(at(large, align));
                    assert!((0..large).all(|i| block.add(i).read() == 0));
                    OnLines.dealloc(block, at(large, align));
                }
            }
        }
    }

    #[test]
    fn rows_are_cleared_by_chunks() {
        for (len, size) in [(0, 4), (3, 4), (8, 4), (9, 4)] {
            let mut rows = Rows::<f32>::new(len);
            rows.chunks(size).enumerate().for_each(|(i, chunk)| chunk.clear().iter_mut().for_each(|x| *x += i as f32));
            let expected: Vec<f32> = (0..len).map(|i| (i / size) as f32).collect();
            assert_eq!(rows.done(), expected);
        }
    }

    #[test]
    #[should_panic(expected = "numbers cleared")]
    fn rows_that_were_not_cleared_are_not_handed_out() {
        let mut rows = Rows::<f32>::new(10);
        rows.chunks(4).enumerate().filter(|(i, _)| *i != 1).for_each(|(_, chunk)| _ = chunk.clear());
        rows.done();
    }
}
