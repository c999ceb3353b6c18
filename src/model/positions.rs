//! M-RoPE positions: where each token of a conversation stands on the time, height and width axes.
//!
//! Text runs on with the same number on all three axes. The tokens of an image that starts at `s` have time `s`, height
//! `s + row`, width `s + column` of the merged grid; what follows starts one past the greatest. It must be run over the
//! whole conversation, every image of every turn (spec 4.5). This is also where placeholder tokens and grids are held
//! against each other: both are made from one grid, and a mismatch is an error here, not a wrong picture later.
//!
//! Source: Qwen2-VL (arXiv:2409.12191) section 2.1; the arithmetic of transformers' `get_rope_index` for still images.

use anyhow::{Result, bail, ensure};

use super::config::Config;
use crate::geometry::Grid;

/// Positions of some tokens and the number the next token starts at.
#[derive(Clone, Debug, PartialEq)]
pub struct Positions {
    /// Time, height, width.
    pub axes: [Vec<i32>; 3],
    pub next: i32,
}

impl Positions {
    pub fn as_slices(&self) -> [&[i32]; 3] {
        [&self.axes[0], &self.axes[1], &self.axes[2]]
    }
}

/// Positions of a whole conversation, `grids` being its images in order.
pub fn positions(ids: &[u32], grids: &[Grid], config: &Config) -> Result<Positions> {
    positions_from(0, ids, grids, config)
}

/// Positions of tokens that continue a conversation whose next position is `start`.
///
/// # Example
/// Four tokens of text, vision-start, a merged grid of 2 × 3, vision-end, one token of text, from 0:
/// time `0 1 2 3 4 5 5 5 5 5 5 8 9`, height `0 1 2 3 4 5 5 5 6 6 6 8 9`, width `0 1 2 3 4 5 6 7 5 6 7 8 9`, next 10.
pub fn positions_from(start: i32, ids: &[u32], grids: &[Grid], config: &Config) -> Result<Positions> {
    let merge = config.vision.merge as u32;
    let mut axes = [(); 3].map(|_| Vec::with_capacity(ids.len()));
    let mut next = start;
    let mut grids = grids.iter().enumerate();
    let mut row = 0;
    while row < ids.len() {
        ensure!(
            ids[row] != config.ids.video_pad,
            "token {row} is a video placeholder (id {}); only still images are supported",
            config.ids.video_pad
        );
        if ids[row] != config.ids.image_pad {
            axes.iter_mut().for_each(|axis| axis.push(next));
            next += 1;
            row += 1;
            continue;
        }
        let Some((image, grid)) = grids.next() else {
            bail!("token {row} is an image placeholder (id {}) but no image is left for it", ids[row]);
        };
        check_grid(grid, merge, image)?;
        let tokens = grid.tokens(merge);
        let pads = ids[row..].iter().take(tokens).take_while(|id| **id == config.ids.image_pad).count();
        ensure!(
            pads == tokens,
            "image {image} has {tokens} tokens (grid {}x{}x{}, merge {merge}) but {pads} placeholders stand at token {row}",
            grid.t,
            grid.h,
            grid.w
        );
        for y in 0..(grid.h / merge) as i32 {
            for x in 0..(grid.w / merge) as i32 {
                axes[0].push(next);
                axes[1].push(next + y);
                axes[2].push(next + x);
            }
        }
        next += (grid.h.max(grid.w) / merge) as i32;
        row += tokens;
    }
    let left = grids.count();
    ensure!(left == 0, "{left} of the images have no placeholder tokens (id {})", config.ids.image_pad);
    Ok(Positions { axes, next })
}

/// A grid this model can take: one frame, sides that are multiples of the merge.
pub fn check_grid(grid: &Grid, merge: u32, image: usize) -> Result<()> {
    ensure!(
        grid.t == 1 && grid.h > 0 && grid.w > 0 && grid.h.is_multiple_of(merge) && grid.w.is_multiple_of(merge),
        "image {image} has a grid of {}x{}x{} patches (frames, rows, columns); expected 1 frame and sides that are multiples of {merge}",
        grid.t,
        grid.h,
        grid.w
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::presets;
    use super::*;

    fn ids(config: &Config, runs: &[usize]) -> Vec<u32> {
        // text, image, text, image, ... lengths; an image is framed by its start and end.
        let mut out = Vec::new();
        for (i, &n) in runs.iter().enumerate() {
            if i % 2 == 0 {
                out.extend(std::iter::repeat_n(50, n));
            } else {
                out.push(config.ids.vision_start);
                out.extend(std::iter::repeat_n(config.ids.image_pad, n));
                out.push(config.ids.vision_end);
            }
        }
        out
    }

    /// The vector of spec 4.5, and that a conversation read in two parts gives the same numbers.
    #[test]
    fn worked_example() {
        let config = presets::nano(100);
        let ids = ids(&config, &[4, 6, 1]);
        let p = positions(&ids, &[Grid { t: 1, h: 4, w: 6 }], &config).unwrap();
        assert_eq!(p.axes[0], [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 8, 9]);
        assert_eq!(p.axes[1], [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 8, 9]);
        assert_eq!(p.axes[2], [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]);
        assert_eq!(p.next, 10);
        assert_eq!(p.next - ids.len() as i32, -3);

        let a = positions(&ids[..5], &[], &config).unwrap();
        let b = positions_from(a.next, &ids[5..], &[Grid { t: 1, h: 4, w: 6 }], &config).unwrap();
        for axis in 0..3 {
            assert_eq!([&a.axes[axis][..], &b.axes[axis][..]].concat(), p.axes[axis]);
        }
    }

    #[test]
    fn placeholders_and_grids_must_agree() {
        let config = presets::nano(100);
        let grid = Grid { t: 1, h: 4, w: 6 };
        let err = |ids: &[u32], grids: &[Grid]| positions(ids, grids, &config).unwrap_err().to_string();
        assert!(err(&ids(&config, &[2, 5]), &[grid]).contains("has 6 tokens"));
        assert!(err(&ids(&config, &[2, 7]), &[grid]).contains("no image is left"));
        assert!(err(&ids(&config, &[2]), &[grid]).contains("have no placeholder"));
        assert!(err(&ids(&config, &[2, 6]), &[Grid { t: 1, h: 3, w: 6 }]).contains("grid of 1x3x6"));
        assert!(err(&[config.ids.video_pad], &[]).contains("video"));
    }
}
