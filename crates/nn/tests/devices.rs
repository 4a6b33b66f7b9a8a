//! Each operation on a GPU against the same operation on the CPU in f64, on sizes that divide no tile.
//! Where there is no GPU these tests do nothing and say so. With FERROTUNE_TEST_SMALL only small sizes are
//! tried, for tools that slow a GPU down a thousand times.

use ferrotune_nn::check::seeded;
use ferrotune_nn::{
    Activation, Attention, Context, DenseWeight, Embedding, Experts, Head, Layer, Linear, Mlp, Norm,
    NormKind, Part, Rope, Weight,
};
use ferrotune_tensor::{DType, Device, Operand, Precision, Tensor, multiply};

/// The GPU and a type that activations can have on it.
struct Arm {
    gpu: Device,
    dtype: DType,
    /// The most that a row may be off, relative to its norm.
    tolerance: f64,
}

/// The sizes to try of these, small ones first.
fn sizes<T: Copy>(small: usize, all: &[T]) -> Vec<T> {
    let count = if std::env::var_os("FERROTUNE_TEST_SMALL").is_some() { small } else { all.len() };
    all[..count].to_vec()
}

fn arms() -> Vec<Arm> {
    let Some(gpu) = Device::each().into_iter().find(|it| it.gpu().is_some()) else {
        eprintln!("skipped: there is no GPU here; `cargo xtask gpu-test` says how to run this on one");
        return Vec::new();
    };
    let bf16 = gpu.gpu().is_some_and(|it| it.has_bf16());
    [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 1.6e-2)]
        .into_iter()
        .filter(|(dtype, _)| *dtype != DType::BF16 || bf16)
        .map(|(dtype, tolerance)| Arm { gpu: gpu.clone(), dtype, tolerance })
        .collect()
}

impl Arm {
    /// The numbers rounded to this arm's type: on the GPU, and in f64 on the CPU.
    fn both(&self, values: &Tensor) -> (Tensor, Tensor) {
        let rounded = values.try_clone().unwrap().cast(DType::F32).unwrap().cast(self.dtype).unwrap();
        let wide = rounded.try_clone().unwrap().cast(DType::F32).unwrap().cast(DType::F64).unwrap();
        (rounded.to_device(&self.gpu).unwrap(), wide)
    }

    fn random(&self, rows: usize, cols: usize, seed: u64) -> (Tensor, Tensor) {
        let mut values = seeded(rows, cols, seed);
        values.scale(2.0).unwrap();
        self.both(&values)
    }

    /// The same weight on the GPU and on the CPU.
    fn weights(&self, values: &Tensor) -> (DenseWeight, DenseWeight) {
        let (there, _) = self.both(values);
        let here = there.to_cpu().unwrap();
        let weight = |value: Tensor| DenseWeight { value: value.into(), precision: Precision::Full };
        (weight(there), weight(here))
    }

    fn linears(&self, values: &Tensor) -> (Linear, Linear) {
        let (there, here) = self.weights(values);
        let linear = |weight: DenseWeight| {
            Linear::new(vec![Part { name: "w".into(), weight: Box::new(weight), bias: None, adapter: None }])
        };
        (linear(there), linear(here))
    }

    #[track_caller]
    fn check(&self, what: &str, got: &Tensor, expected: &Tensor) {
        assert_eq!(got.shape(), expected.shape(), "{what}");
        let (width, got) = (expected.cols().max(1), got.to_f32().unwrap());
        let expected = expected.values::<f64>().unwrap();
        let norm = |row: &[f64]| row.iter().map(|it| it * it).sum::<f64>().sqrt();
        let rows = expected.len() / width;
        let usual = norm(expected) / (rows.max(1) as f64).sqrt();
        let mut worst: f64 = 0.0;
        for (got, expected) in got.chunks(width).zip(expected.chunks(width)) {
            let off: Vec<f64> = got.iter().zip(expected).map(|(a, b)| f64::from(*a) - b).collect();
            let error = norm(&off) / norm(expected).max(0.1 * usual).max(1e-30);
            worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
        }
        eprintln!("{what:<60} {:<5} {worst:.1e}", self.dtype.as_str());
        assert!(
            worst <= self.tolerance,
            "{what} in {:?}: a row is off by {worst:.1e} of its norm",
            self.dtype
        );
    }
}

/// Forward and backward of a layer on both devices.
#[track_caller]
fn check_layer<L: Layer>(arm: &Arm, what: &str, there: &mut L, here: &mut L, x: &Tensor, starts: Vec<usize>) {
    let (x_there, x_here) = arm.both(x);
    let (ctx_there, ctx_here) = (Context::new(starts.clone()), Context::new(starts));
    let (y_there, saved_there) = there.forward(&ctx_there, &x_there).unwrap();
    let (y_here, saved_here) = here.forward(&ctx_here, &x_here).unwrap();
    arm.check(&format!("{what}, forward"), &y_there, &y_here);
    let (dy_there, dy_here) = arm.both(&seeded(y_here.rows(), y_here.cols(), 77));
    let dx_there = there.backward(&ctx_there, &x_there, saved_there, dy_there).unwrap();
    let dx_here = here.backward(&ctx_here, &x_here, saved_here, dy_here).unwrap();
    arm.check(&format!("{what}, backward"), &dx_there, &dx_here);
}

#[test]
fn products() {
    for arm in arms() {
        for (m, n, k) in sizes(
            3,
            &[(1, 1, 1), (3, 65, 17), (130, 16, 300), (257, 384, 129), (64, 1000, 640), (512, 512, 2048)],
        ) {
            let (a, a_here) = arm.random(m, k, 1);
            let (b, b_here) = arm.random(k, n, 2);
            let (bt, bt_here) = arm.random(n, k, 3);
            let (at, at_here) = arm.random(k, m, 4);
            let op = Operand::new;
            let pairs = [
                ("a·b", op(&a), op(&b), op(&a_here), op(&b_here)),
                ("a·bᵀ", op(&a), op(&bt).transposed(), op(&a_here), op(&bt_here).transposed()),
                ("aᵀ·b", op(&at).transposed(), op(&b), op(&at_here).transposed(), op(&b_here)),
            ];
            for (name, a, b, a_here, b_here) in pairs {
                for out in [arm.dtype, DType::F32] {
                    let (old, old_here) = arm.random(m, n + 5, 5);
                    let mut c = old.cast(out).unwrap();
                    let mut c_here = old_here;
                    multiply(Precision::Full, 0.5, a.clone(), b.clone(), 1.0, &mut c, 3..3 + n).unwrap();
                    multiply(
                        Precision::Full,
                        0.5,
                        a_here.clone(),
                        b_here.clone(),
                        1.0,
                        &mut c_here,
                        3..3 + n,
                    )
                    .unwrap();
                    arm.check(&format!("{name} {m}×{n}×{k} into {out:?}"), &c, &c_here);
                }
            }
        }
    }
}

#[test]
fn norms() {
    for arm in arms() {
        for (rows, width, group) in
            [(1, 7, 7), (5, 576, 576), (33, 3072, 3072), (3, 16384, 16384), (19, 320, 64), (4, 2049, 2049)]
        {
            for kind in [NormKind::Rms, NormKind::Layer] {
                let weight = seeded(1, group, 3).cast(DType::F32).unwrap();
                let bias = (kind == NormKind::Layer).then(|| seeded(1, group, 4).cast(DType::F32).unwrap());
                let on = |device: &Device| {
                    let place = |it: &Tensor| it.try_clone().unwrap().to_device(device).unwrap();
                    {
                        let bias = bias.as_ref().map(|it| place(it).into());
                        let mut norm = Norm { kind, weight: place(&weight).into(), bias, eps: 1e-5 };
                        norm.weight.train("norm.weight").unwrap();
                        norm
                    }
                };
                let (mut there, mut here) = (on(&arm.gpu), on(&Device::Cpu));
                let (x, x_here) = arm.random(rows, width, 8);
                let what = format!("{kind:?} norm {rows}×{width}/{group}");
                arm.check(
                    &format!("{what}, forward"),
                    &there.forward(&x).unwrap(),
                    &here.forward(&x_here).unwrap(),
                );
                let (dy, dy_here) = arm.random(rows, width, 9);
                let (dx, dx_here) =
                    (there.backward(&x, dy).unwrap(), here.backward(&x_here, dy_here).unwrap());
                arm.check(&format!("{what}, backward"), &dx, &dx_here);
                let dw_here = here.weight.grad_mut().unwrap().try_clone().unwrap().cast(DType::F64).unwrap();
                arm.check(&format!("{what}, weight"), there.weight.grad_mut().unwrap(), &dw_here);
            }
        }
    }
}

#[test]
fn mlps() {
    for arm in arms() {
        for (rows, width, inner) in [(1, 16, 24), (67, 64, 96), (130, 40, 1000)] {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                for gated in [true, false] {
                    let mut scaled = seeded(inner * (1 + usize::from(gated)), width, 1);
                    scaled.scale(4.0 / (width as f64).sqrt()).unwrap();
                    let part = |half: usize| {
                        let values =
                            scaled.values::<f64>().unwrap()[half * inner * width..][..inner * width].to_vec();
                        arm.linears(&Tensor::from_vec(inner, width, values).unwrap())
                    };
                    let (mut gate_up, mut gate_up_here) = part(0);
                    if gated {
                        let (up, up_here) = part(1);
                        gate_up.parts.extend(up.parts);
                        gate_up_here.parts.extend(up_here.parts);
                    }
                    let (down, down_here) = arm.linears(&seeded(width, inner, 2));
                    let mut there = Mlp { gate_up, down, activation };
                    let mut here = Mlp { gate_up: gate_up_here, down: down_here, activation };
                    let what = format!("mlp {rows}×{width}×{inner} {activation:?} gated {gated}");
                    check_layer(&arm, &what, &mut there, &mut here, &seeded(rows, width, 3), vec![0, rows]);
                }
            }
        }
    }
}

/// The fourth of the experts is never used.
#[test]
fn experts() {
    for arm in arms() {
        for (rows, width, inner, count, k, normalised) in sizes(
            3,
            &[
                (1, 16, 24, 5, 2, true),
                (67, 64, 96, 9, 3, false),
                (130, 40, 100, 70, 8, true),
                (300, 33, 7, 4, 1, false),
            ],
        ) {
            let mut scores = seeded(count, width, 5);
            scores.scale(2.0).unwrap();
            scores.values_mut::<f64>().unwrap()[3 * width] = -100.0;
            let (mut there, mut here) = (Vec::new(), Vec::new());
            for expert in 0..count as u64 {
                let random = |rows: usize, cols: usize, part: u64| {
                    let mut values = seeded(rows, cols, 10 * expert + part);
                    values.scale(4.0 / (cols as f64).sqrt()).unwrap();
                    arm.linears(&values)
                };
                let ((mut gate_up, mut gate_up_here), up, down) =
                    (random(inner, width, 6), random(inner, width, 7), random(width, inner, 8));
                gate_up.parts.extend(up.0.parts);
                gate_up_here.parts.extend(up.1.parts);
                there.push(Mlp { gate_up, down: down.0, activation: Activation::Silu });
                here.push(Mlp { gate_up: gate_up_here, down: down.1, activation: Activation::Silu });
            }
            let layer = |value: Tensor, experts: Vec<Mlp>| {
                let mut router = DenseWeight { value: value.into(), precision: Precision::Full };
                router.train("router").unwrap();
                Experts { router, experts, num_experts_per_tok: k, normalised }
            };
            let (router, router_here) = arm.both(&scores);
            let (mut there, mut here) = (layer(router, there), layer(router_here, here));
            let what = format!("{k} of {count} experts {rows}×{width}×{inner}");
            let mut x = seeded(rows, width, 3);
            x.values_mut::<f64>().unwrap().iter_mut().step_by(width).for_each(|it| *it = 1.0);
            check_layer(&arm, &what, &mut there, &mut here, &x, vec![0, rows]);
            // Made of differences of what was rounded.
            let loose = Arm { tolerance: 4.0 * arm.tolerance, gpu: arm.gpu.clone(), dtype: arm.dtype };
            let (got, expected) =
                (there.router.value.grad_mut().unwrap(), here.router.value.grad_mut().unwrap());
            loose.check(&format!("{what}, router"), got, expected);

            // Again, and with less kept: the same bits.
            let (ctx, (x, _)) = (Context::new(vec![0, rows]), arm.both(&x));
            let (y, kept) = there.forward(&ctx, &x).unwrap();
            let (y_again, _) = there.forward(&ctx, &x).unwrap();
            assert_eq!(y.to_f32().unwrap(), y_again.to_f32().unwrap(), "{what}");
            let recomputed = there.recompute(&ctx, &x).unwrap();
            let gradients = [kept, recomputed].map(|saved| {
                there.router.value.grad_mut().unwrap().set_zero().unwrap();
                let (dy, _) = arm.both(&seeded(rows, width, 77));
                let dx = there.backward(&ctx, &x, saved, dy).unwrap();
                [dx.to_f32().unwrap(), there.router.value.grad_mut().unwrap().to_f32().unwrap()]
            });
            assert_eq!(gradients[0], gradients[1], "{what}");
        }
    }
}

fn identity(n: usize) -> Tensor {
    let values = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
    Tensor::from_vec(n, n, values).unwrap()
}

#[test]
fn attention() {
    for arm in arms() {
        for head_dim in sizes(4, &[16, 64, 80, 256, 32, 96, 128]) {
            for (heads, kv_heads, window, softcap) in [
                (4, 2, None, None),
                (3, 1, Some(37), None),
                (2, 2, None, Some(5.0)),
                (4, 1, Some(64), Some(3.0)),
            ] {
                let width = (heads + 2 * kv_heads) * head_dim;
                // Projections that change nothing: what is compared is attention itself.
                let ((qkv, qkv_here), (o, o_here)) =
                    (arm.linears(&identity(width)), arm.linears(&identity(heads * head_dim)));
                let norm = |device: &Device| Norm {
                    kind: NormKind::Rms,
                    weight: Tensor::from_vec(1, head_dim, vec![1.5f32; head_dim])
                        .unwrap()
                        .to_device(device)
                        .unwrap()
                        .into(),
                    bias: None,
                    eps: 1e-6,
                };
                let layer = |qkv: Linear, o: Linear, device: &Device| Attention {
                    qkv,
                    o,
                    q_norm: (heads == 3).then(|| norm(device)),
                    k_norm: (heads == 3).then(|| norm(device)),
                    rope: Some(Rope { interleaved: heads == 2, ..Rope::new(10000.0, head_dim) }),
                    num_attention_heads: heads,
                    num_key_value_heads: kv_heads,
                    head_dim,
                    scale: 1.0 / (head_dim as f64).sqrt(),
                    window,
                    softcap,
                    precision: Precision::Full,
                };
                let (mut there, mut here) = (layer(qkv, o, &arm.gpu), layer(qkv_here, o_here, &Device::Cpu));
                let starts = sizes(4, &[0, 1, 8, 71, 135, 200, 330]);
                let rows = starts[starts.len() - 1];
                let what = format!(
                    "attention D {head_dim} H {heads} K {kv_heads} window {window:?} cap {softcap:?}"
                );
                let mut x = seeded(rows, width, 6);
                x.scale(4.0).unwrap();
                check_layer(&arm, &what, &mut there, &mut here, &x, starts);
            }
        }
    }
}

/// Causal attention without norms, windows or caps.
fn plain_attention(
    qkv: Linear,
    o: Linear,
    heads: (usize, usize),
    head_dim: usize,
    rope: Option<Rope>,
) -> Attention {
    Attention {
        qkv,
        o,
        q_norm: None,
        k_norm: None,
        rope,
        num_attention_heads: heads.0,
        num_key_value_heads: heads.1,
        head_dim,
        scale: 0.125,
        window: None,
        softcap: None,
        precision: Precision::Full,
    }
}

/// One sequence of 32k tokens: forward against the CPU, backward against the same in f32.
#[test]
fn attention_over_a_long_sequence() {
    let rows = sizes(1, &[512, 32_768])[..].last().copied().unwrap_or(512);
    let (head_dim, mut dx_f32) = (64, None);
    for arm in arms() {
        let (qkv, qkv_here) = arm.linears(&identity(3 * head_dim));
        let (o, o_here) = arm.linears(&identity(head_dim));
        let layer = |qkv: Linear, o: Linear| plain_attention(qkv, o, (1, 1), head_dim, None);
        let (mut there, here) = (layer(qkv, o), layer(qkv_here, o_here));
        let mut x = seeded(rows, 3 * head_dim, 6);
        x.scale(4.0).unwrap();
        let (x, x_here) = arm.both(&x);
        let ctx = Context::new(vec![0, rows]);
        let (y, saved) = there.forward(&ctx, &x).unwrap();
        arm.check("32k tokens, forward", &y, &here.forward(&Context::new(vec![0, rows]), &x_here).unwrap().0);
        let (dy, _) = arm.both(&seeded(rows, head_dim, 77));
        let dx = there.backward(&ctx, &x, saved, dy).unwrap();
        let expected = dx_f32.get_or_insert_with(|| dx.to_cpu().unwrap().cast(DType::F64).unwrap());
        // x and dy were rounded to the type: what is compared has that error too.
        let twice = Arm { tolerance: 2.0 * arm.tolerance, ..arm };
        twice.check("32k tokens, backward", &dx, expected);
    }
}

/// So many blocks that one owns dk and dv of all the heads that share them.
#[test]
fn attention_over_many_sequences() {
    let sequences = sizes(1, &[8, 256])[..].last().copied().unwrap_or(8);
    let (tokens, heads, kv_heads, head_dim) = (16, 4, 2, 64);
    let width = (heads + 2 * kv_heads) * head_dim;
    for arm in arms() {
        let (qkv, qkv_here) = arm.linears(&identity(width));
        let (o, o_here) = arm.linears(&identity(heads * head_dim));
        let layer = |qkv: Linear, o: Linear| plain_attention(qkv, o, (heads, kv_heads), head_dim, None);
        let (mut there, mut here) = (layer(qkv, o), layer(qkv_here, o_here));
        let (x, x_here) = arm.both(&seeded(sequences * tokens, width, 8));
        let starts: Vec<usize> = (0..=sequences).map(|it| it * tokens).collect();
        let (ctx, ctx_here) = (Context::new(starts.clone()), Context::new(starts));
        let (_, saved) = there.forward(&ctx, &x).unwrap();
        let (_, saved_here) = here.forward(&ctx_here, &x_here).unwrap();
        let (dy, dy_here) = arm.both(&seeded(sequences * tokens, heads * head_dim, 78));
        let dx = there.backward(&ctx, &x, saved, dy).unwrap();
        let expected = here.backward(&ctx_here, &x_here, saved_here, dy_here).unwrap();
        arm.check("many sequences, backward", &dx, &expected);
    }
}

#[test]
fn no_rows_at_all() {
    for arm in arms() {
        let (width, head_dim) = (3 * 64, 64);
        let (qkv, _) = arm.linears(&identity(width));
        let (o, _) = arm.linears(&identity(head_dim));
        let mut attention = plain_attention(qkv, o, (1, 1), head_dim, Some(Rope::new(10000.0, head_dim)));
        let (x, _) = arm.both(&seeded(0, width, 1));
        let ctx = Context::new(vec![0]);
        let (y, saved) = attention.forward(&ctx, &x).unwrap();
        assert_eq!(y.shape(), (0, head_dim));
        let dx = attention.backward(&ctx, &x, saved, y).unwrap();
        assert_eq!(dx.shape(), (0, width));
        let (mut table, _) = arm.weights(&seeded(300, width, 1));
        let head = Head { scale: 1.0, softcap: None };
        assert!(head.with_gradient(&mut table, &x, &[], &[]).unwrap().logp.is_empty());
    }
}

#[test]
fn decoding_gives_what_the_whole_pass_gives() {
    for arm in arms() {
        let (heads, kv_heads, head_dim, rows) = (4, 2, 64, 150);
        let width = (heads + 2 * kv_heads) * head_dim;
        let (qkv, _) = arm.linears(&identity(width));
        let (o, _) = arm.linears(&identity(heads * head_dim));
        let layer = plain_attention(qkv, o, (heads, kv_heads), head_dim, Some(Rope::new(10000.0, head_dim)));
        let (x, _) = arm.random(rows, width, 5);
        let whole = layer.forward(&Context::new(vec![0, rows]), &x).unwrap().0.to_f32().unwrap();
        let mut cache = Default::default();
        let mut pieces = Vec::new();
        for piece in [0..70, 70..71, 71..72, 72..150] {
            let mut part = x.empty_like(piece.len(), width).unwrap();
            part.write_block((0, 0), &x, (piece.clone(), 0..width)).unwrap();
            let ctx = Context { first_position: piece.start, ..Context::new(vec![0, piece.len()]) };
            pieces.extend(layer.step(&ctx, &part, &mut cache).unwrap().to_f32().unwrap());
        }
        let whole = Tensor::from_vec(rows, heads * head_dim, whole).unwrap().cast(DType::F64).unwrap();
        arm.check("decoding", &Tensor::from_vec(rows, heads * head_dim, pieces).unwrap(), &whole);
    }
}

#[test]
fn embedding_and_head() {
    for arm in arms() {
        for (rows, width, vocab, softcap) in sizes(
            2,
            &[(1, 8, 11, None), (37, 64, 1003, Some(10.0)), (70, 48, 128_256, None), (5, 40, 262_144, None)],
        ) {
            let (table, table_here) = arm.weights(&seeded(vocab, width, 1));
            let tokens: Vec<u32> = (0..rows as u32).map(|i| i * 7919 % vocab as u32).collect();
            let mut embedding = Embedding { table, scale: 2.0, vectors_to: None };
            let mut embedding_here = Embedding { table: table_here, scale: 2.0, vectors_to: None };
            let what = format!("embedding {rows}×{width} of {vocab}");
            let x = embedding.forward(&tokens, arm.dtype).unwrap();
            arm.check(&what, &x, &embedding_here.forward(&tokens, DType::F64).unwrap());

            let head = Head { scale: 1.5, softcap };
            let (table, table_here) = (&mut embedding.table, &mut embedding_here.table);
            let (hidden, hidden_here) = arm.random(rows, width, 2);
            let targets: Vec<u32> = (0..rows as u32).map(|i| i * 104_729 % vocab as u32).collect();
            // Some rows aren't trained on.
            // In f16 small gradients would be lost: there the loss is scaled.
            let scale = if arm.dtype == DType::F16 { 1024.0 } else { 1.0 } / rows as f64;
            let dlogp: Vec<f64> = (0..rows).map(|i| if i % 3 == 1 { 0.0 } else { -scale }).collect();
            let got = head.with_gradient(table, &hidden, &targets, &dlogp).unwrap();
            let expected = head.with_gradient(table_here, &hidden_here, &targets, &dlogp).unwrap();
            let logp = |it: &[f64]| Tensor::from_vec(1, rows, it.to_vec()).unwrap();
            let what = format!("head {rows}×{width}×{vocab}");
            arm.check(&format!("{what}, log p"), &logp(&got.logp), &logp(&expected.logp));
            arm.check(&format!("{what}, gradient"), &got.dhidden.unwrap(), &expected.dhidden.unwrap());
            let nothing = head.with_gradient(table, &hidden, &targets, &vec![0.0; rows]).unwrap();
            assert!(nothing.dhidden.unwrap().to_f32().unwrap().iter().all(|it| *it == 0.0));
            for it in [&mut embedding, &mut embedding_here] {
                it.table.value.train("model.embed_tokens.weight").unwrap();
            }
            embedding.backward(&tokens, &hidden).unwrap();
            embedding_here.backward(&tokens, &hidden_here).unwrap();
            let (there, here) = (embedding.table.value.grad_mut(), embedding_here.table.value.grad_mut());
            let here = here.unwrap().try_clone().unwrap().cast(DType::F64).unwrap();
            arm.check(&format!("embedding's gradient {rows}×{width}×{vocab}"), there.unwrap(), &here);
        }
    }
}

#[test]
fn element_wise() {
    for arm in arms() {
        for n in [1, 77, 4096, 100_003] {
            let ((mut a, mut a_here), (b, b_here)) = (arm.random(1, n, 1), arm.random(1, n, 2));
            a.add_scaled(0.25, &b).unwrap();
            a_here.add_scaled(0.25, &b_here).unwrap();
            a.scale(1.5).unwrap();
            a_here.scale(1.5).unwrap();
            arm.check(&format!("1.5·(a + b/4) of {n}"), &a, &a_here);
            for other in [DType::F32, DType::F16, DType::BF16] {
                if other == DType::BF16 && !arm.gpu.gpu().unwrap().has_bf16() {
                    continue;
                }
                let there = b.try_clone().unwrap().cast(other).unwrap().to_f32().unwrap();
                let here = b.to_cpu().unwrap().cast(other).unwrap().to_f32().unwrap();
                assert_eq!(there, here, "cast of {n} from {:?} to {other:?}", arm.dtype);
            }
            let mut offloaded = b.try_clone().unwrap();
            offloaded.offload().unwrap();
            offloaded.restore().unwrap();
            assert_eq!(offloaded.to_f32().unwrap(), b.to_f32().unwrap());
        }
    }
}
