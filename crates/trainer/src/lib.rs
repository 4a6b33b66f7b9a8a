//! The training step, objectives, optimizers, schedules, checkpoints and reports.
