//! Sizes of pictures as the model counts them. Only the patch grid lives here so far.

/// How many patches an image has: frames, rows and columns, before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Grid {
    pub t: u32,
    pub h: u32,
    pub w: u32,
}

impl Grid {
    /// Tokens the language model sees: `merge × merge` patches make one.
    pub fn tokens(&self, merge: u32) -> usize {
        self.t as usize * (self.h / merge) as usize * (self.w / merge) as usize
    }
}
