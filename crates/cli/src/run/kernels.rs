//! Which kernels a run launches, so that the driver compiles them while weights are read. One that is missing here
//! is compiled when it is asked for: the first step then takes longer, nothing else.

use ferrotune_model::BuildOptions;
use ferrotune_model::spec::ModelSpec;
use ferrotune_tensor::{DType, Loading};

/// What the decoder is built for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Training,
    Generation,
}

/// Has them compiled; none without a GPU.
pub(super) fn load_kernels(spec: &ModelSpec, computing: &BuildOptions, purpose: Purpose) -> Option<Loading> {
    let gpu = computing.device.gpu()?;
    let mut modules: Vec<String> =
        ["elementwise", "embedding", "nf4", "norm", "rope"].map(str::to_string).to_vec();
    let (others, of_heads): (&[&str], &[&str]) = match purpose {
        Purpose::Training => (
            &[
                "activation",
                "cross_entropy",
                "low_rank",
                "low_rank_backward",
                "low_rank_forward",
                "optimizer",
            ],
            &["attention_forward", "attention_backward"],
        ),
        Purpose::Generation => {
            (&["activation", "low_rank", "row"], &["attention_forward", "attention_decoding"])
        }
    };
    modules.extend(others.iter().map(|it| it.to_string()));
    let mut head_dims: Vec<usize> = spec.layers.iter().map(|it| it.attention.head_dim).collect();
    head_dims.sort_unstable();
    head_dims.dedup();
    modules.extend(of_heads.iter().flat_map(|it| head_dims.iter().map(move |dim| format!("{it}.{dim}"))));
    let mut wanted: Vec<(String, Option<DType>)> = Vec::new();
    for module in modules {
        wanted.extend([Some(computing.dtype), None].map(|dtype| (module.clone(), dtype)));
    }
    if computing.dtype != DType::F32 {
        // Trained numbers are f32 on every device.
        wanted.extend(["elementwise", "optimizer"].map(|it| (it.to_string(), Some(DType::F32))));
    }
    Some(gpu.load_in_background(&wanted))
}
