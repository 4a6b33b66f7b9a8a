//! Drives the program as a user does: one binary for all of it.

mod command_line;
mod config;
mod doctor;
mod util;
