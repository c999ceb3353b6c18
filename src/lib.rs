pub mod geometry;
pub mod image;
