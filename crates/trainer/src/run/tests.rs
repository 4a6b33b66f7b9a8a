use ferrotune_data::{BatchOptions, Batches, Sample};
use ferrotune_nn::{Context, HeadPass, Parameter};
use ferrotune_tensor::Tensor;

use super::*;
use crate::{NextToken, ParameterGroups, ScheduleKind, StateMemory};

/// One number whose gradient is the mean of the tokens; it takes `memory` passes without running out.
struct Frugal {
    p: Parameter,
    memory: std::cell::Cell<usize>,
}

impl LanguageModel for Frugal {
    type Saved = f32;
    fn forward(&self, _: &Context, tokens: &[u32]) -> Result<(Tensor, f32)> {
        if self.memory.get() == 0 {
            return Err(Error::OutOfMemory {
                device: "a small card".into(),
                wanted: 2,
                allocated: 1,
                total: 2,
            });
        }
        self.memory.set(self.memory.get() - 1);
        let mean = tokens.iter().sum::<u32>() as f32 / tokens.len() as f32;
        Ok((Tensor::from_vec(1, 1, vec![0.0f32])?, mean))
    }
    fn hidden(&self, ctx: &Context, tokens: &[u32]) -> Result<Tensor> {
        Ok(self.forward(ctx, tokens)?.0)
    }
    fn log_probs(&self, _: &Tensor, targets: &[u32], _: &[f64]) -> Result<HeadPass> {
        Ok(HeadPass { logp: vec![-1.0; targets.len()], correct: vec![false; targets.len()], dhidden: None })
    }
    fn head_backward(&mut self, hidden: &Tensor, targets: &[u32], _: &[f64]) -> Result<HeadPass> {
        Ok(HeadPass { dhidden: Some(hidden.try_clone()?), ..self.log_probs(hidden, targets, &[])? })
    }
    fn backward(&mut self, _: &Context, saved: f32, _: Tensor) -> Result<()> {
        self.p.grad.values_mut::<f32>()?[0] += saved;
        Ok(())
    }
    fn parameters(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.p]
    }
}

struct Hooks {
    spared: usize,
    most: usize,
}

impl RunHooks<Frugal> for Hooks {
    fn save_model(&mut self, _: &mut Frugal, _: &Path) -> Result<()> {
        Ok(())
    }
    fn load_model(&mut self, _: &mut Frugal, _: &Path) -> Result<()> {
        Ok(())
    }
    fn report(&mut self, _: &StepReport) -> Result<Control> {
        Ok(Control::Continue)
    }
    fn spare_memory(&mut self, model: &mut Frugal, _: &Error) -> bool {
        self.spared += 1;
        model.memory.set(1000);
        self.spared <= self.most
    }
}

fn run(memory: usize, most: usize) -> (Result<Summary>, Vec<f32>, usize) {
    let settings = Settings {
        output_dir: std::env::temp_dir(),
        schedule: Schedule {
            kind: ScheduleKind::Linear,
            learning_rate: 0.1,
            warmup_steps: 0,
            total_steps: 4,
        },
        train_batch_size: 1,
        num_train_epochs: 1,
        evaluation: None,
        gradient_accumulation_steps: 2,
        max_grad_norm: 0.0,
        seed: 1,
        loss_scale: LossScale::none(),
        logging_steps: 1,
        save_steps: 0,
        save_total_limit: None,
        deadline: None,
        identity: Vec::new(),
    };
    let samples = (1..=8).map(|n| Sample { tokens: vec![n; 3], trained: vec![true; 3], ..Sample::default() });
    let options = BatchOptions {
        per_device_train_batch_size: 1,
        packing: false,
        cutoff_len: 8,
        seed: 3,
        shuffle: true,
        group_by_length: 0,
    };
    let mut batches = Batches::new(samples.collect(), options).unwrap();
    let p = Parameter::new("p", Tensor::from_vec(1, 1, vec![1.0f32]).unwrap()).unwrap();
    let mut model = Frugal { p, memory: memory.into() };
    let mut optimizer =
        crate::AdamW::new(0.9, 0.99, 1e-8, ParameterGroups::with_decay(0.0), StateMemory::Device);
    let mut hooks = Hooks { spared: 0, most };
    let summary = train(&settings, None, &mut model, &mut batches, &NextToken, &mut optimizer, &mut hooks);
    (summary, model.p.value.to_f32().unwrap(), hooks.spared)
}

#[test]
fn a_step_that_runs_out_of_memory_is_taken_again_with_less() {
    let (whole, expected, spared) = run(1000, 0);
    assert_eq!((whole.unwrap().steps, spared), (4, 0));
    // In the middle of the second step, one of its two batches being done.
    let (summary, got, spared) = run(3, 1);
    assert_eq!((summary.unwrap().steps, got, spared), (4, expected, 1));
    assert!(matches!(run(3, 0).0, Err(Error::OutOfMemory { .. })));
}
