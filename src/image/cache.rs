//! Decoded pictures kept by path, so that a picture asked for by every member of a group is decoded once.
//!
//! It hides who decodes, how much of a picture, and what is thrown out. What must stay true: at most the given number of bytes is kept; several
//! threads that ask for one picture at once cause one decoding; a view has the same pixels whether its picture was kept or not; and a file that
//! failed is tried again next time.

use super::{Picture, RgbImage, decode, show, show_from_file};
use crate::geometry::{Size, View};
use anyhow::Result;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Thread-safe; the least recently used picture goes first. Changes of a file on disk are not noticed.
pub struct PictureCache {
    limit: u64,
    inner: Mutex<Inner>,
    /// Of every picture that was asked for; never thrown out.
    sizes: Mutex<HashMap<PathBuf, Size>>,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<PathBuf, Slot>,
    /// Of those not kept, the ones of which one crop was cut from the file.
    cut: HashSet<PathBuf>,
    clock: u64,
    bytes: u64,
    stats: CacheStats,
}

struct Slot {
    /// Its own lock, held while decoding: others who want the same picture wait, others go on.
    picture: Arc<Mutex<Option<Arc<Picture>>>>,
    used: u64,
    /// 0 until decoded.
    bytes: u64,
}

/// What the cache did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    pub hits: u64,
    pub misses: u64,
    /// Pictures thrown out to keep within the limit.
    pub evicted: u64,
    /// Crops cut straight from the file of a picture that was no longer kept.
    pub cut: u64,
    pub pictures: usize,
    pub bytes: u64,
}

impl PictureCache {
    /// Keeps at most `bytes` of decoded pixels (3 bytes a pixel). 0 keeps nothing.
    pub fn new(bytes: u64) -> PictureCache {
        PictureCache { limit: bytes, inner: Mutex::default(), sizes: Mutex::default() }
    }

    /// The picture, decoded now or before.
    ///
    /// # Errors
    /// Those of [`decode`]; not remembered.
    pub fn get(&self, path: &Path) -> Result<Arc<Picture>> {
        let slot = {
            let mut inner = lock(&self.inner);
            inner.clock += 1;
            let now = inner.clock;
            let slot = inner.slots.entry(path.to_owned()).or_insert_with(|| Slot {
                picture: Arc::default(),
                used: 0,
                bytes: 0,
            });
            slot.used = now;
            Arc::clone(&slot.picture)
        };
        // Decoding must not use rayon: a worker waiting inside it could pick up another task that waits for this very lock.
        let mut held = lock(&slot);
        if let Some(picture) = held.as_ref() {
            lock(&self.inner).stats.hits += 1;
            return Ok(Arc::clone(picture));
        }
        let decoded = decode(path);
        let mut inner = lock(&self.inner);
        inner.stats.misses += 1;
        let picture = match decoded {
            Ok(picture) => Arc::new(picture),
            Err(error) => {
                inner.remove_if(path, &slot);
                return Err(error);
            }
        };
        *held = Some(Arc::clone(&picture));
        lock(&self.sizes).insert(path.to_owned(), picture.size());
        inner.keep(path, &slot, picture.rgb().len() as u64, self.limit);
        Ok(picture)
    }

    /// The size of the picture as shown. It is decoded to tell it, but only once: a picture whose features are known need not be opened again.
    ///
    /// # Errors
    /// Those of [`decode`]; not remembered.
    pub fn size(&self, path: &Path) -> Result<Size> {
        if let Some(size) = lock(&self.sizes).get(path) {
            return Ok(*size);
        }
        Ok(self.get(path)?.size())
    }

    /// What the model is shown of a picture, as [`show`]. A crop of a picture that was thrown out (a batch of large ones outgrows any limit between
    /// the turn that shows them whole and the one that looks closer) is cut from its file, without the rest of it; the second one decodes
    /// the whole again, for where two members of a group look others will.
    ///
    /// # Errors
    /// Those of [`decode`] and [`show`]; not remembered.
    pub fn show(&self, path: &Path, view: &View) -> Result<RgbImage> {
        if self.is_for_file(path, view) { show_from_file(path, view) } else { show(&*self.get(path)?, view) }
    }

    fn is_for_file(&self, path: &Path, view: &View) -> bool {
        let Some(size) = lock(&self.sizes).get(path).copied() else {
            return false;
        };
        let mut inner = lock(&self.inner);
        // Of more than half a picture, the whole costs little more.
        if inner.slots.contains_key(path) || view.region.area() > 0.5 * size.area() as f64 {
            return false;
        }
        let never_kept = 3 * size.area() > self.limit;
        if !never_kept && inner.cut.remove(path) {
            return false;
        }
        inner.cut.insert(path.to_owned());
        inner.stats.cut += 1;
        true
    }

    pub fn stats(&self) -> CacheStats {
        let inner = lock(&self.inner);
        let pictures = inner.slots.values().filter(|s| s.bytes > 0).count();
        CacheStats { pictures, bytes: inner.bytes, ..inner.stats }
    }
}

impl Inner {
    /// Forgets the slot, unless another has taken its place meanwhile.
    fn remove_if(&mut self, path: &Path, slot: &Arc<Mutex<Option<Arc<Picture>>>>) {
        if self.slots.get(path).is_some_and(|s| Arc::ptr_eq(&s.picture, slot))
            && let Some(gone) = self.slots.remove(path)
        {
            self.bytes -= gone.bytes;
        }
    }

    /// Counts a picture just decoded and throws out old ones until it fits; one larger than everything is not kept itself.
    fn keep(&mut self, path: &Path, slot: &Arc<Mutex<Option<Arc<Picture>>>>, bytes: u64, limit: u64) {
        if bytes > limit {
            self.remove_if(path, slot);
            return;
        }
        match self.slots.get_mut(path) {
            Some(s) if Arc::ptr_eq(&s.picture, slot) => s.bytes = bytes,
            _ => return,
        }
        self.bytes += bytes;
        while self.bytes > limit {
            let oldest = self
                .slots
                .iter()
                .filter(|(p, s)| s.bytes > 0 && p.as_path() != path)
                .min_by_key(|(_, s)| s.used)
                .map(|(p, _)| p.clone());
            let Some(gone) = oldest.and_then(|p| self.slots.remove(&p)) else {
                break;
            };
            self.bytes -= gone.bytes;
            self.stats.evicted += 1;
        }
    }
}

/// A panic elsewhere leaves these maps whole (nothing panics between two of their changes), so a poisoned lock is no reason to stop.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::save;
    use super::*;
    use crate::geometry::BBox;

    /// `n` pictures of 10 x 10 pixels, 300 bytes each.
    fn pictures(dir: &Path, n: usize) -> Vec<PathBuf> {
        (0..n)
            .map(|i| {
                let path = dir.join(format!("{i}.png"));
                save(&RgbImage::new(10, 10), &path).unwrap();
                path
            })
            .collect()
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let p = pictures(dir.path(), 3);
        let cache = PictureCache::new(700);
        let first = cache.get(&p[0]).unwrap();
        cache.get(&p[1]).unwrap();
        assert!(Arc::ptr_eq(&first, &cache.get(&p[0]).unwrap()));
        cache.get(&p[2]).unwrap(); // 900 bytes: picture 1 was used longest ago
        assert_eq!(cache.stats(), CacheStats { hits: 1, misses: 3, evicted: 1, cut: 0, pictures: 2, bytes: 600 });
        assert!(Arc::ptr_eq(&first, &cache.get(&p[0]).unwrap()));
        cache.get(&p[1]).unwrap();
        assert_eq!(cache.stats().misses, 4);
    }

    #[test]
    fn too_large_is_not_kept_and_failures_are_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let p = pictures(dir.path(), 1);
        let cache = PictureCache::new(299);
        cache.get(&p[0]).unwrap();
        cache.get(&p[0]).unwrap();
        assert_eq!(cache.stats(), CacheStats { misses: 2, ..CacheStats::default() });
        let late = dir.path().join("late.png");
        assert!(cache.get(&late).is_err());
        save(&RgbImage::new(2, 2), &late).unwrap();
        assert!(cache.get(&late).is_ok());
        assert_eq!(cache.stats().bytes, 12);
    }

    #[test]
    fn one_crop_of_a_picture_that_was_thrown_out_comes_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let ramp = |at: u8| RgbImage::from_fn(64, 48, |x, y| ::image::Rgb([x as u8 * 4, y as u8 * 5, at]));
        let p: Vec<PathBuf> = (0..2)
            .map(|i| {
                let path = dir.path().join(format!("{i}.jpg"));
                std::fs::write(&path, super::super::encode_jpeg(&ramp(i * 200), 90).unwrap()).unwrap();
                path
            })
            .collect();
        let view = |x2: f64| View { image: 0, region: BBox::new(5.0, 7.0, x2, 41.0), size: Size::new(28, 28) };
        let wanted = show(&decode(&p[0]).unwrap(), &view(37.0)).unwrap();
        let bytes = 3 * 64 * 48;

        let cache = PictureCache::new(bytes);
        let shown = |x2| cache.show(&p[0], &view(x2)).unwrap();
        assert!(shown(37.0) == wanted); // never seen: decoded and kept
        assert!(shown(37.0) == wanted);
        assert_eq!((cache.stats().misses, cache.stats().hits, cache.stats().cut), (1, 1, 0));
        cache.get(&p[1]).unwrap(); // throws the first out
        assert!(shown(37.0) == wanted);
        assert_eq!((cache.stats().misses, cache.stats().cut), (2, 1));
        assert!(shown(37.0) == wanted); // the second crop: whole, and kept again
        assert_eq!((cache.stats().misses, cache.stats().cut), (3, 1));
        cache.get(&p[1]).unwrap();
        shown(64.0); // most of the picture: whole
        assert_eq!((cache.stats().misses, cache.stats().cut), (5, 1));

        let cache = PictureCache::new(bytes - 1); // never kept, so every crop comes from the file
        cache.get(&p[0]).unwrap();
        for n in 1..4 {
            assert!(cache.show(&p[0], &view(37.0)).unwrap() == wanted);
            assert_eq!((cache.stats().misses, cache.stats().cut), (1, n));
        }
    }

    #[test]
    fn asked_for_by_many_at_once_it_is_decoded_once() {
        let dir = tempfile::tempdir().unwrap();
        let p = pictures(dir.path(), 2);
        let cache = PictureCache::new(1 << 20);
        std::thread::scope(|scope| {
            for i in 0..16 {
                let (cache, path) = (&cache, &p[i % 2]);
                scope.spawn(move || cache.get(path).unwrap());
            }
        });
        let stats = cache.stats();
        assert_eq!((stats.misses, stats.hits, stats.bytes), (2, 14, 600));
    }
}
