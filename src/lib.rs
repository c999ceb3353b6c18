pub mod geometry;
pub mod model;
