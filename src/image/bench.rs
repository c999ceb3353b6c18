//! The times of the picture path on one file, for `foveate bench image`.

use super::{Processor, decode, patches, show, show_from_file};
use crate::geometry::{BBox, Budget, View};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Medians in milliseconds of decoding the file, showing the whole at the budget, showing a crop of its middle (half of each side) from the
/// decoded picture and from the file, and cutting the patches of the first. Each is repeated for about half a second, at least three times.
///
/// # Errors
/// A file or budget that cannot be used.
pub fn bench_image(path: &Path, budget: Budget) -> Result<Value> {
    let picture = decode(path)?;
    let original = picture.size();
    let whole = View::whole(0, original, budget)?;
    let (w, h) = (f64::from(whole.size.width), f64::from(whole.size.height));
    let crop = whole.crop(BBox::new(w / 4.0, h / 4.0, w * 0.75, h * 0.75), original, budget)?;
    let processor = Processor { budget, patch: budget.factor / 2, ..Processor::default() };
    let shown = show(&picture, &whole)?;
    let cut = patches(&shown, &processor)?;
    let times = [
        median(|| decode(path).map(drop))?,
        median(|| show(&picture, &whole).map(drop))?,
        median(|| show(&picture, &crop).map(drop))?,
        median(|| show_from_file(path, &crop).map(drop))?,
        median(|| patches(&shown, &processor).map(drop))?,
    ];
    let [decode_ms, whole_ms, crop_ms, crop_from_file_ms, patches_ms] = times;
    Ok(json!({
        "path": path.display().to_string(),
        "threads": rayon::current_num_threads(),
        "original": [original.width, original.height],
        "shown": [whole.size.width, whole.size.height],
        "crop_region": crop.region,
        "crop_shown": [crop.size.width, crop.size.height],
        "patches": cut.grid.patches(),
        "tokens": cut.grid.tokens(processor.merge),
        "decode_ms": decode_ms,
        "show_whole_ms": whole_ms,
        "show_crop_ms": crop_ms,
        "show_crop_from_file_ms": crop_from_file_ms,
        "patches_ms": patches_ms,
    }))
}

fn median(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 3 || (begin.elapsed() < Duration::from_millis(500) && times.len() < 1000) {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
