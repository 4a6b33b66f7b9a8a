//! Drives the program as a user does: one binary for all of it.

mod checkpoints;
mod command_line;
mod config;
mod data;
mod debug;
mod doctor;
mod evaluation;
mod experts;
mod export;
mod export_gguf;
mod further;
mod llama_factory;
mod push;
mod quickstart;
mod run;
mod saved_modules;
mod smollm2;
mod train;
mod util;
