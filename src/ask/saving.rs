//! What `ask --save DIR` leaves: each view as the model saw it, and each picture with what was looked at and named drawn on it.
//!
//! What must stay true: a file is there whole or not at all, also when the process is asked to end meanwhile ([`writing`]).

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::geometry::{BBox, View};
use crate::image::{self, Picture, RgbImage};

/// Of the regions that were shown closer, and of the boxes of an answer.
const LOOKED: image::Color = [255, 64, 32];
const NAMED: image::Color = [0, 200, 80];

static WRITING: Mutex<()> = Mutex::new(());

/// Held while a file is written: who wants to end the process waits for it.
pub fn writing() -> MutexGuard<'static, ()> {
    WRITING.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Saving {
    dir: PathBuf,
    views: usize,
    /// One JSON object a file, in order.
    pub files: Vec<Value>,
}

impl Saving {
    /// # Errors
    /// The place is taken by a file.
    pub fn into(dir: &Path) -> Result<Saving> {
        ensure!(
            dir.is_dir() || !dir.exists(),
            "--save takes a folder, and this is a file; choose another name: {}",
            dir.display()
        );
        Ok(Saving { dir: dir.to_owned(), views: 0, files: Vec::new() })
    }

    /// Views that were saved.
    pub fn views(&self) -> usize {
        self.views
    }

    /// The next view, as it was shown.
    pub fn view(&mut self, picture: &Picture, view: &View) -> Result<PathBuf> {
        let path = self.write(format!("view-{}.png", self.views + 1), &image::show(picture, view)?)?;
        self.views += 1;
        self.files.push(json!({"file": path, "region": view.region, "size": view.size}));
        Ok(path)
    }

    /// Picture `k` (from 0) with boxes in its own pixels: those looked at in red, those of the answer in green.
    pub fn marked(&mut self, k: usize, picture: &Picture, looked: &[BBox], named: &[BBox]) -> Result<PathBuf> {
        let mut marked = picture.as_image().clone();
        let thickness = (picture.size().width.max(picture.size().height) / 300).max(2);
        for (boxes, color) in [(looked, LOOKED), (named, NAMED)] {
            boxes.iter().for_each(|region| image::draw_box(&mut marked, region, color, thickness));
        }
        let path = self.write(format!("marked-{}.jpg", k + 1), &marked)?;
        self.files.push(json!({"file": path}));
        Ok(path)
    }

    fn write(&self, name: String, picture: &RgbImage) -> Result<PathBuf> {
        let _writing = writing();
        std::fs::create_dir_all(&self.dir).with_context(|| format!("making the folder {}", self.dir.display()))?;
        let path = self.dir.join(name);
        image::save(picture, &path)?;
        Ok(path)
    }
}
