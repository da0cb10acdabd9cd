//! Pictures too large to be held whole: overlapping tiles, cross-faded.
//!
//! Like `tiled_decode` of diffusers 0.42.1 (`autoencoder_kl.py`), neighbours overlap by a quarter of a tile or more and fade
//! linearly into each other. Unlike it all tiles have the same size, spread evenly, so that no sliver at the edge is decoded with
//! the statistics of a few pixels. Tiling is not exact: group norms and attention see one tile instead of the whole picture.

use candle_core::Tensor;

use crate::Result;

/// Tiles along one axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Axis {
    starts: Vec<usize>,
    size: usize,
    fade: usize,
}

impl Axis {
    /// Tiles of `size` (at least 4) over `length`; one tile if it covers all.
    pub(super) fn new(length: usize, size: usize) -> Self {
        if length <= size {
            return Self { starts: vec![0], size: length, fade: 0 };
        }
        let fade = size / 4;
        let gaps = (length - size).div_ceil(size - fade);
        Self { starts: (0..=gaps).map(|i| i * (length - size) / gaps).collect(), size, fade }
    }

    /// The same tiles in a space `zoom` times as fine.
    fn finer(&self, zoom: usize) -> Self {
        Self { starts: self.starts.iter().map(|start| start * zoom).collect(), size: self.size * zoom, fade: self.fade * zoom }
    }

    /// The same tiles in a space `zoom` times as coarse. All of them must lie on its grid.
    fn coarser(&self, zoom: usize) -> Self {
        Self { starts: self.starts.iter().map(|start| start / zoom).collect(), size: self.size / zoom, fade: self.fade / zoom }
    }

    /// Joins tiles along `dim`: each up to the middle of its overlap with the next, where the two fade over.
    fn join(&self, tiles: &[Tensor], dim: usize) -> Result<Tensor> {
        let (mut parts, mut from) = (Vec::new(), 0);
        for (i, tile) in tiles.iter().enumerate() {
            let Some(next) = tiles.get(i + 1) else {
                parts.push(tile.narrow(dim, from - self.starts[i], self.starts[i] + self.size - from)?);
                break;
            };
            let (begin, end) = (self.starts[i + 1], self.starts[i] + self.size);
            let fade = begin + (end - begin - self.fade) / 2;
            parts.push(tile.narrow(dim, from - self.starts[i], fade - from)?);
            let old = tile.narrow(dim, fade - self.starts[i], self.fade)?;
            let new = next.narrow(dim, fade - begin, self.fade)?;
            let mut shape = [1; 4];
            shape[dim] = self.fade;
            let weight: Vec<f32> = (0..self.fade).map(|i| (i as f32 + 0.5) / self.fade as f32).collect();
            let weight = Tensor::from_vec(weight, &shape, old.device())?.to_dtype(old.dtype())?;
            parts.push((&old + (new - &old)?.broadcast_mul(&weight)?)?);
            from = fade + self.fade;
        }
        Tensor::cat(&parts, dim)
    }
}

/// Whether sizes grow or shrink on the way through.
#[derive(Debug, Clone, Copy)]
pub(super) enum Zoom {
    In(usize),
    Out(usize),
}

/// `through` applied to tiles of x `(b, c, y, x)` of at most `size` by `size`, joined. With `Zoom::Out(n)` the sizes of x and of
/// the tiles are multiples of 4 n.
pub(super) fn tiled(x: &Tensor, size: usize, zoom: Zoom, through: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    // Tiles of a picture are placed on the grid of its latents.
    let grid = match zoom {
        Zoom::In(_) => 1,
        Zoom::Out(n) => n,
    };
    let place = |length: usize| Axis::new(length / grid, size / grid);
    let (rows, columns) = (place(height).finer(grid), place(width).finer(grid));
    let out = |axis: &Axis| match zoom {
        Zoom::In(n) => axis.finer(n),
        Zoom::Out(n) => axis.coarser(n),
    };
    let row = |y: &usize| {
        let strip = x.narrow(2, *y, rows.size)?;
        let tile = |x: &usize| through(&strip.narrow(3, *x, columns.size)?.contiguous()?);
        out(&columns).join(&columns.starts.iter().map(tile).collect::<Result<Vec<_>>>()?, 3)
    };
    out(&rows).join(&rows.starts.iter().map(row).collect::<Result<Vec<_>>>()?, 2)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn tiles_cover_everything_and_overlap_by_a_quarter() {
        for size in [4, 8, 12, 64] {
            for length in 1..300 {
                let axis = Axis::new(length, size);
                assert_eq!(axis.starts[0], 0);
                assert_eq!(axis.starts.last().unwrap() + axis.size, length);
                for pair in axis.starts.windows(2) {
                    assert!(pair[1] > pair[0] && pair[1] + axis.fade <= pair[0] + axis.size, "{size} {length} {axis:?}");
                }
            }
        }
    }

    #[test]
    fn tiles_of_the_identity_are_the_identity() {
        let x = Tensor::randn(0f32, 1.0, (2, 3, 45, 52), &Device::Cpu).unwrap();
        for size in [8, 16, 20, 44, 64] {
            let y = tiled(&x, size, Zoom::In(1), |x| Ok(x.clone())).unwrap();
            let apart = (y - &x).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(apart < 1e-6, "{size}: {apart}");
        }
    }

    #[test]
    fn sizes_follow_the_zoom() {
        let x = Tensor::zeros((1, 1, 96, 160), DType::F32, &Device::Cpu).unwrap();
        let finer = tiled(&x, 64, Zoom::In(2), |x| x.upsample_nearest2d(2 * x.dim(2)?, 2 * x.dim(3)?)).unwrap();
        assert_eq!(finer.dims(), [1, 1, 192, 320]);
        let coarser = tiled(&x, 64, Zoom::Out(8), |x| x.avg_pool2d(8)).unwrap();
        assert_eq!(coarser.dims(), [1, 1, 12, 20]);
    }
}
