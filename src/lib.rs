pub mod data;
pub mod geometry;
pub mod image;
pub mod synth;
