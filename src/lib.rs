
pub mod objective;
