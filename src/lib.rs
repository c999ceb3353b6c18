
pub mod geometry;
pub mod image;
pub mod objective;
pub mod optim;
pub mod reward;
pub mod score;
