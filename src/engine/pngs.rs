//! Views as PNG of exactly the pixels that were shown, for engines that are servers.
//!
//! What must stay true: a view is sent in the size that the server's processor leaves as it is, so that it becomes the same patches there as
//! here.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};

use super::Frontend;
use crate::episode::Placed;
use crate::geometry::smart_resize;
use crate::image::encode_png;

/// PNG bytes kept, of views that several sequences show: the first look of a group, and everything from sampling to the update.
const PNG_BYTES: usize = 512 << 20;

/// The same file, region and size.
pub type View = (Arc<Path>, [u64; 4], (u32, u32));

pub fn view_of(placed: &Placed) -> View {
    let r = placed.view.region;
    (placed.path.clone(), [r.x1, r.y1, r.x2, r.y2].map(f64::to_bits), (placed.view.size.width, placed.view.size.height))
}

/// Views as PNG, each made once while there is room.
pub struct Pngs {
    pub frontend: Frontend,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    pngs: HashMap<View, Arc<Vec<u8>>>,
    /// Of all of them.
    bytes: usize,
}

impl Pngs {
    pub fn new(frontend: Frontend) -> Pngs {
        Pngs { frontend, kept: Mutex::default() }
    }

    /// A view, exactly as the model is to see it.
    ///
    /// # Errors
    /// A picture that cannot be read, and a view that the model's own processor would resize once more.
    pub fn of(&self, placed: &Placed) -> Result<Arc<Vec<u8>>> {
        let view = view_of(placed);
        if let Some(png) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pngs.get(&view) {
            return Ok(png.clone());
        }
        let size = placed.view.size;
        let budget = self.frontend.processor.budget;
        let resized = smart_resize(size, budget)?;
        ensure!(
            resized == size,
            "a view of {size} pixels would be resized to {resized} by the model's processor, which takes {} to {} pixels, and its tokens \
             would not be those that were counted; set task.min_pixels and task.max_pixels within these bounds: {}",
            budget.min_pixels,
            budget.max_pixels,
            placed.path.display()
        );
        let png = Arc::new(encode_png(&self.frontend.pictures.show(&placed.path, &placed.view)?)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.bytes + png.len() > PNG_BYTES {
            *kept = Kept::default();
        }
        kept.bytes += png.len();
        kept.pngs.insert(view, png.clone());
        Ok(png)
    }
}
