//! The one place that calls the `gemm` crate: C = [C +] A·B on strided views of slices.
//!
//! Hides raw pointers and strides. The order of summation of `gemm` for one output element is: for each block of k
//! of at most 512, a run of fused multiply-adds over k from zero, then added to C. It does not depend on the number
//! of threads. It holds on the general path only; `linear` says how it keeps calls on that path.

use gemm::Parallelism;

/// A matrix inside a slice: element (i, j) is `data[offset + i * rs + j * cs]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub offset: usize,
    pub rs: usize,
    pub cs: usize,
}

impl<'a> View<'a> {
    /// Rows of `stride` elements, starting at `offset`.
    pub fn rows(data: &'a [f32], offset: usize, stride: usize) -> Self {
        Self { data, offset, rs: stride, cs: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { rs: self.cs, cs: self.rs, ..self }
    }

    fn check(&self, rows: usize, cols: usize, name: &str) {
        let last = self.offset + (rows - 1) * self.rs + (cols - 1) * self.cs;
        assert!(
            last < self.data.len(),
            "matmul: {name} [{rows}, {cols}] reaches element {last} of {}",
            self.data.len()
        );
    }
}

/// Row-major destination with `stride` elements between rows.
pub(crate) struct Target<'a> {
    pub data: &'a mut [f32],
    pub offset: usize,
    pub stride: usize,
}

/// c[m, n] = scale · a[m, k] · b[k, n], added to what c held when `accumulate`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn multiply(
    c: Target<'_>,
    a: View<'_>,
    b: View<'_>,
    m: usize,
    n: usize,
    k: usize,
    scale: f32,
    accumulate: bool,
    threads: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    let last = c.offset + (m - 1) * c.stride + n - 1;
    assert!(
        last < c.data.len() && c.stride >= n,
        "matmul: result [{m}, {n}] reaches element {last} of {}",
        c.data.len()
    );
    if k == 0 {
        if !accumulate {
            for i in 0..m {
                c.data[c.offset + i * c.stride..][..n].fill(0.0);
            }
        }
        return;
    }
    a.check(m, k, "left side");
    b.check(k, n, "right side");
    let parallelism = if threads { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: `check` and the assertion above put the last (hence every) element that `gemm` may touch inside the
    // three slices (all strides are non-negative); `c.data` is borrowed mutably, so it overlaps neither input, and
    // its rows do not overlap each other (`stride >= n`).
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data.as_mut_ptr().add(c.offset),
            1,
            c.stride as isize,
            accumulate,
            a.data.as_ptr().add(a.offset),
            a.cs as isize,
            a.rs as isize,
            b.data.as_ptr().add(b.offset),
            b.cs as isize,
            b.rs as isize,
            1.0f32,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
