// Made by `cargo xtask kernels`, to be taken in by `include!`.

// Name, architecture, PTX. 75 is for compute capability 7.5 and what is newer; 901 is 90a, for 9.0 alone.
static MODULES: &[(&str, u32, &str)] = &[
    ("activation", 75, include_str!("activation.sm_75.ptx")),
    ("activation", 80, include_str!("activation.sm_80.ptx")),
    ("attention_backward.16", 75, include_str!("attention_backward.16.sm_75.ptx")),
    ("attention_backward.32", 75, include_str!("attention_backward.32.sm_75.ptx")),
    ("attention_backward.64", 75, include_str!("attention_backward.64.sm_75.ptx")),
    ("attention_backward.80", 75, include_str!("attention_backward.80.sm_75.ptx")),
    ("attention_backward.96", 75, include_str!("attention_backward.96.sm_75.ptx")),
    ("attention_backward.128", 75, include_str!("attention_backward.128.sm_75.ptx")),
    ("attention_backward.256", 75, include_str!("attention_backward.256.sm_75.ptx")),
    ("attention_backward.16", 80, include_str!("attention_backward.16.sm_80.ptx")),
    ("attention_backward.32", 80, include_str!("attention_backward.32.sm_80.ptx")),
    ("attention_backward.64", 80, include_str!("attention_backward.64.sm_80.ptx")),
    ("attention_backward.80", 80, include_str!("attention_backward.80.sm_80.ptx")),
    ("attention_backward.96", 80, include_str!("attention_backward.96.sm_80.ptx")),
    ("attention_backward.128", 80, include_str!("attention_backward.128.sm_80.ptx")),
    ("attention_backward.256", 80, include_str!("attention_backward.256.sm_80.ptx")),
    ("attention_forward.16", 75, include_str!("attention_forward.16.sm_75.ptx")),
    ("attention_forward.32", 75, include_str!("attention_forward.32.sm_75.ptx")),
    ("attention_forward.64", 75, include_str!("attention_forward.64.sm_75.ptx")),
    ("attention_forward.80", 75, include_str!("attention_forward.80.sm_75.ptx")),
    ("attention_forward.96", 75, include_str!("attention_forward.96.sm_75.ptx")),
    ("attention_forward.128", 75, include_str!("attention_forward.128.sm_75.ptx")),
    ("attention_forward.256", 75, include_str!("attention_forward.256.sm_75.ptx")),
    ("attention_forward.16", 80, include_str!("attention_forward.16.sm_80.ptx")),
    ("attention_forward.32", 80, include_str!("attention_forward.32.sm_80.ptx")),
    ("attention_forward.64", 80, include_str!("attention_forward.64.sm_80.ptx")),
    ("attention_forward.80", 80, include_str!("attention_forward.80.sm_80.ptx")),
    ("attention_forward.96", 80, include_str!("attention_forward.96.sm_80.ptx")),
    ("attention_forward.128", 80, include_str!("attention_forward.128.sm_80.ptx")),
    ("attention_forward.256", 80, include_str!("attention_forward.256.sm_80.ptx")),
    ("cross_entropy", 75, include_str!("cross_entropy.sm_75.ptx")),
    ("cross_entropy", 80, include_str!("cross_entropy.sm_80.ptx")),
    ("elementwise", 75, include_str!("elementwise.sm_75.ptx")),
    ("elementwise", 80, include_str!("elementwise.sm_80.ptx")),
    ("embedding", 75, include_str!("embedding.sm_75.ptx")),
    ("embedding", 80, include_str!("embedding.sm_80.ptx")),
    ("matmul", 75, include_str!("matmul.sm_75.ptx")),
    ("matmul", 80, include_str!("matmul.sm_80.ptx")),
    ("nf4", 75, include_str!("nf4.sm_75.ptx")),
    ("nf4", 80, include_str!("nf4.sm_80.ptx")),
    ("norm", 75, include_str!("norm.sm_75.ptx")),
    ("norm", 80, include_str!("norm.sm_80.ptx")),
    ("optimizer", 75, include_str!("optimizer.sm_75.ptx")),
    ("optimizer", 80, include_str!("optimizer.sm_80.ptx")),
    ("rope", 75, include_str!("rope.sm_75.ptx")),
    ("rope", 80, include_str!("rope.sm_80.ptx")),
];

// Architecture, the CUDA that a driver must know to load its files, as cuDriverGetVersion counts, and
// the first Linux driver that does.
#[allow(dead_code)]
static DRIVERS: &[(u32, u32, &str)] = &[
    (75, 10020, "440.33"),
    (80, 11000, "450.51.05"),
];
