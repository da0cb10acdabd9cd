//! y += a b on the CPU for a small inner size, as a LoRA's factors have it: y is read and written once, b stays in cache.
//!
//! A general product packs both factors anew for every few rows of y, which takes longer than the arithmetic of a rank of 16.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

/// Rows of y, and vectors of each row, whose sums stay in registers: 12 of 16, with one for a and two for b.
pub(super) const ROWS: usize = 6;
const VECTORS: usize = 2;

/// Columns of y that a caller should work on at a time: with [`ROWS`] rows they stay in the first-level cache, beside their part of b.
pub(super) const COLUMNS: usize = 512;

/// Widest vector, in values.
const LANES: usize = 16;

/// b `(k, m)` in panels of a few columns, each `(k, width)` and in one piece: rows of b lie a multiple of 4 KB apart, which a cache
/// cannot keep side by side.
#[derive(Debug)]
pub(super) struct Packed {
    values: Vec<f32>,
    k: usize,
    m: usize,
    width: usize,
}

impl Packed {
    pub(super) fn new(b: &[f32], k: usize, m: usize) -> Self {
        let width = VECTORS * Arch::new().dispatch(Lanes);
        let mut values = vec![0.0; m.div_ceil(width) * k * width];
        for (panel, to) in values.chunks_exact_mut((k * width).max(1)).enumerate() {
            let columns = panel * width..m.min((panel + 1) * width);
            for (i, to) in to.chunks_exact_mut(width).enumerate() {
                to[..columns.len()].copy_from_slice(&b[i * m..][columns.clone()]);
            }
        }
        Self { values, k, m, width }
    }

    /// y `(n, columns)` += a `(n, k)` b's columns, which begin at a multiple of [`COLUMNS`]. Each value is summed over k in its order,
    /// whatever n is, so the result does not depend on how rows and columns are shared out.
    pub(super) fn add_product(&self, a: &[f32], y: &mut [f32], columns: Range<usize>) {
        debug_assert!(columns.start.is_multiple_of(COLUMNS) && columns.end <= self.m);
        if self.k > 0 && !columns.is_empty() {
            Arch::new().dispatch(Onto { b: self, a, y, columns });
        }
    }
}

/// y += x, value by value.
pub(super) fn add(x: &[f32], y: &mut [f32]) {
    Arch::new().dispatch(Add { x, y });
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

struct Add<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(self.x), S::as_mut_simd_f32s(self.y));
        y.iter_mut().zip(x).for_each(|(y, x)| *y = simd.add_f32s(*y, *x));
        y_rest.iter_mut().zip(x_rest).for_each(|(y, x)| *y += x);
    }
}

struct Onto<'a> {
    b: &'a Packed,
    a: &'a [f32],
    y: &'a mut [f32],
    columns: Range<usize>,
}

impl WithSimd for Onto<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { b, a, y, columns } = self;
        let (k, m, width) = (b.k, columns.len(), b.width);
        let panels = &b.values[columns.start / width * k * width..columns.end.div_ceil(width) * k * width];
        let tiled = y.len() / m / ROWS * ROWS;
        let (a_tiled, a_rest) = a.split_at(tiled * k);
        // Column by column, so that a tile reads on without asking where a row ends.
        let (y_tiles, y_rest) = y.split_at_mut(tiled * m);
        for (y, a) in y_tiles.chunks_exact_mut(ROWS * m).zip(a_tiled.chunks_exact(ROWS * k)) {
            let a: Vec<[f32; ROWS]> = turned(a, k);
            for (panel, b) in panels.chunks_exact(k * width).enumerate() {
                tile(simd, y, &a, b, [m, panel * width]);
            }
        }
        for (y, a) in y_rest.chunks_exact_mut(m).zip(a_rest.chunks_exact(k)) {
            let a: Vec<[f32; 1]> = turned(a, k);
            for (panel, b) in panels.chunks_exact(k * width).enumerate() {
                tile(simd, y, &a, b, [m, panel * width]);
            }
        }
    }
}

/// The columns of R rows of a.
fn turned<const R: usize>(a: &[f32], k: usize) -> Vec<[f32; R]> {
    (0..k).map(|i| std::array::from_fn(|row| a[row * k + i])).collect()
}

/// R rows and one panel's columns, from `column` on, of y `(R, m)` += a b, with the columns of a and the rows of the panel.
///
/// Written with indices of constant range, so that the sums are registers from beginning to end.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "see above")]
fn tile<S: Simd, const R: usize>(simd: S, y: &mut [f32], a: &[[f32; R]], b: &[f32], [m, column]: [usize; 2]) {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
    let (b, _) = S::as_simd_f32s(b);
    let (b, _) = b.as_chunks::<VECTORS>();
    for (a, b) in a.iter().zip(b) {
        for row in 0..R {
            let a = simd.splat_f32s(a[row]);
            for v in 0..VECTORS {
                sums[row][v] = simd.mul_add_f32s(a, b[v], sums[row][v]);
            }
        }
    }
    let width = VECTORS * S::F32_LANES;
    let whole = column + width <= m;
    for row in 0..R {
        let y = &mut y[row * m + column..(row + 1) * m];
        if whole {
            let (y, _) = S::as_mut_simd_f32s(&mut y[..width]);
            for v in 0..VECTORS {
                y[v] = simd.add_f32s(y[v], sums[row][v]);
            }
        } else {
            // The last panel has columns that y has not.
            let mut last = [0f32; VECTORS * LANES];
            let (vectors, _) = S::as_mut_simd_f32s(&mut last[..width]);
            vectors[..VECTORS].copy_from_slice(&sums[row]);
            y.iter_mut().zip(&last).for_each(|(y, sum)| *y += sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..n).map(|_| 2.0 * random.f32() - 1.0).collect()
    }

    #[test]
    fn the_product_is_added_whatever_the_sizes() {
        for (n, k, m) in [(1, 1, 1), (6, 16, 32), (7, 3, 33), (13, 5, 700), (20, 17, 31), (3, 0, 5), (0, 4, 5)] {
            let (a, b, y) = (values(n * k, 1), values(k * m, 2), values(n * m, 3));
            let mut got = y.clone();
            Packed::new(&b, k, m).add_product(&a, &mut got, 0..m);
            for (at, got) in got.iter().enumerate() {
                let (row, column) = (at / m, at % m);
                let sum: f64 = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * m + column])).sum();
                assert!((f64::from(*got) - f64::from(y[at]) - sum).abs() < 1e-5, "{n} {k} {m}: {row}, {column}");
            }
        }
    }

    #[test]
    fn rows_do_not_depend_on_their_neighbours() {
        let (k, m) = (9, 77);
        let (a, b) = (values(20 * k, 1), Packed::new(&values(k * m, 2), k, m));
        let mut whole = values(20 * m, 3);
        let mut parts = whole.clone();
        b.add_product(&a, &mut whole, 0..m);
        for (from, to) in [(0, 1), (1, 8), (8, 20)] {
            b.add_product(&a[from * k..to * k], &mut parts[from * m..to * m], 0..m);
        }
        assert!(whole.iter().zip(&parts).all(|(a, b)| a.to_bits() == b.to_bits()));
        let (mut sum, x) = (values(100, 4), values(100, 5));
        let before = sum.clone();
        add(&x, &mut sum);
        assert!((0..100).all(|i| sum[i] == before[i] + x[i]));
    }
}
