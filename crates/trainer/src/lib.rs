//! The training step, objectives, optimizers, schedules, checkpoints and reports.
//!
//! A trainer sees a model only through [`LanguageModel`](ferrotune_nn::LanguageModel): how a model is
//! saved comes in through [`RunHooks`], and what happens goes out as [`StepReport`] values.

mod checkpoint;
mod evaluation;
mod history;
mod lock;
mod log;
mod loss_scale;
mod objective;
mod optimizer;
mod run;
mod schedule;
mod step;
mod tensorboard;

pub use checkpoint::{
    Newest, RunState, checkpoints, clear_leftovers, discard, newest_checkpoint, read_state, verify_checkpoint,
};
pub use evaluation::{Best, EvalReport, Evaluation, Metric, evaluate};
pub use lock::{LOCK_FILE, RunLock};
pub use log::{LogWriter, Window};
pub use loss_scale::LossScale;
pub use objective::{Loss, NextToken, Objective};
pub use optimizer::{
    Adafactor, AdamW, AdamW8bit, Lion, Move, Muon, OnHost, Optimizer, ParameterGroups, Rule, Sgd, State,
    StateMemory,
};
pub use run::{Control, Ending, RunHooks, Settings, StepReport, Summary, train};
pub use schedule::{Plateau, Ramp, Schedule, ScheduleKind};
pub use step::{Skipped, StepOutcome, StepSettings, optimizer_step};
pub use tensorboard::EventWriter;
