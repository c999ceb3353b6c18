//! foveate teaches vision-language models where to look.

pub mod chat;
pub mod geometry;
pub mod image;
pub mod model;
