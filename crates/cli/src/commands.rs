//! The verbs, one file each.

pub mod chat;
pub mod data;
pub mod debug;
pub mod doctor;
pub mod export;
pub mod model;
pub mod predict;
pub mod push;
pub mod runs;
pub mod train;
pub mod watch;
