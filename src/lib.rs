pub mod chat;
pub mod geometry;
pub mod image;
