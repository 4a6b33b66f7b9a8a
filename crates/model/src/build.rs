//! ModelSpec + a source of weights → Decoder.

use ferrotune_nn::{
    Attention, DenseWeight, Embedding, Experts, FeedForward, Head, Linear, Mlp, Norm, Part, Weight,
};
use ferrotune_tensor::{DType, Device, Error, Precision, Result, Tensor};

use crate::block::{Block, Sublayer};
use crate::decoder::{Decoder, Recompute};
use crate::source::{Stored, WeightSource};
use crate::spec::{AttentionSpec, LayerSpec, LinearSpec, MlpSpec, ModelSpec, NormPlaces, QkNorm, names};

/// A projection that is to be made.
#[derive(Clone, Debug)]
pub struct PartSpec {
    /// Canonical name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Rows of its weight.
    pub out_features: usize,
    /// Columns of its weight.
    pub in_features: usize,
}

/// Decides how a projection is stored and whether it is adapted; its stored weight has been checked.
pub type MakePart<'a> = dyn FnMut(&PartSpec, Stored) -> Result<Part> + 'a;

/// How the rest of the model is held.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Of all products but adapters'.
    pub precision: Precision,
    /// What activations are computed in.
    pub dtype: DType,
    /// Where everything is held.
    pub device: Device,
}

/// Builds the decoder, one projection after the other, so that at most one is whole at a time.
///
/// # Errors
/// When a tensor is missing, of the wrong shape or damaged.
pub fn build(
    spec: &ModelSpec,
    weights: &dyn WeightSource,
    options: BuildOptions,
    make_part: &mut MakePart,
) -> Result<Decoder> {
    let mut builder = Builder { spec, weights, options, make_part };
    let embedding = builder.table(names::EMBEDDING)?;
    let head_weight = (!spec.tie_word_embeddings).then(|| builder.table(names::HEAD)).transpose()?;
    let layers = spec.layers.iter().enumerate();
    let blocks = layers.map(|(index, layer)| builder.block(index, layer)).collect::<Result<Vec<_>>>()?;
    Ok(Decoder {
        embedding: Embedding { table: embedding, scale: spec.embedding_scale, vectors_to: None },
        neftune_noise_alpha: 0.0,
        recompute: vec![Recompute::Keep; blocks.len()],
        blocks,
        norm: builder.norm(names::FINAL_NORM.trim_end_matches(".weight"), spec.hidden_size)?,
        head: Head { scale: spec.logit_scale, softcap: spec.logit_softcap },
        head_weight,
        dtype: builder.options.dtype,
    })
}

struct Builder<'a, 'b> {
    spec: &'a ModelSpec,
    weights: &'a dyn WeightSource,
    options: BuildOptions,
    make_part: &'a mut MakePart<'b>,
}

impl Builder<'_, '_> {
    fn check(&self, name: &str, expected: (usize, usize)) -> Result<()> {
        let got = self.weights.shape(name)?;
        let what = format!("{}: tensor `{name}`", self.weights.path().display());
        Error::check_shape(&what, expected, got)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.check(name, (1, len))?;
        self.weights.get_f32(name)?.to_device(&self.options.device)
    }

    /// A table of token vectors; with bf16 products it is kept in bf16.
    fn table(&self, name: &str) -> Result<DenseWeight> {
        self.check(name, (self.spec.vocab_size, self.spec.hidden_size))?;
        let value = self.weights.get(name)?.into_dense()?;
        let BuildOptions { precision, dtype, device } = &self.options;
        let value = match (device, precision) {
            (Device::Cuda(_), _) => value.to_device_as(device, *dtype)?,
            (Device::Cpu, Precision::Bf16) => value.cast(DType::BF16)?,
            (Device::Cpu, Precision::Full) => value,
        };
        self.weights.forget(name);
        Ok(DenseWeight { value: value.into(), precision: *precision })
    }

    fn norm(&self, module: &str, group: usize) -> Result<Norm> {
        let bias = self.spec.norm.bias.then(|| self.vector(&format!("{module}.bias"), group)).transpose()?;
        let bias = bias.map(Into::into);
        let weight = self.vector(&format!("{module}.weight"), group)?;
        Ok(Norm { kind: self.spec.norm.kind, weight: weight.into(), bias, eps: self.spec.norm.eps })
    }

    fn block(&mut self, index: usize, layer: &LayerSpec) -> Result<Block> {
        let linears = layer.linears(self.spec.hidden_size);
        let places = layer.norms.names();
        let attention = self.attention(index, &layer.attention, &linears)?;
        let mlp = self.feed_forward(index, &layer.mlp, &linears)?;
        let shared = layer.norms == NormPlaces::Shared;
        let (norm_in, attention_in) =
            if shared { (places.attention_in, None) } else { (None, places.attention_in) };
        Ok(Block {
            norm_in: self.norm_at(index, norm_in)?,
            attention: self.sublayer(index, attention_in, attention, places.attention_out)?,
            mlp: self.sublayer(index, places.mlp_in, mlp, places.mlp_out)?,
            residual: layer.residual,
            residual_scale: layer.residual_scale,
        })
    }

    fn sublayer<Body>(
        &self,
        index: usize,
        norm_in: Option<&str>,
        body: Body,
        norm_out: Option<&str>,
    ) -> Result<Sublayer<Body>> {
        Ok(Sublayer {
            norm_in: self.norm_at(index, norm_in)?,
            body,
            norm_out: self.norm_at(index, norm_out)?,
        })
    }

    fn norm_at(&self, index: usize, part: Option<&str>) -> Result<Option<Norm>> {
        part.map(|part| self.norm(&names::module(index, part), self.spec.hidden_size)).transpose()
    }

    fn attention(&mut self, index: usize, it: &AttentionSpec, linears: &[LinearSpec]) -> Result<Attention> {
        let qk_norm = |part: &str, row: usize| -> Result<Option<Norm>> {
            let name = names::module(index, part);
            match it.qk_norm {
                QkNorm::None => Ok(None),
                QkNorm::PerHead => self.norm(&name, it.head_dim).map(Some),
                QkNorm::WholeRow => self.norm(&name, row).map(Some),
            }
        };
        let (q_norm, k_norm) =
            (qk_norm(names::Q_NORM, it.q_width())?, qk_norm(names::K_NORM, it.kv_width())?);
        Ok(Attention {
            qkv: self.linear(index, linears, &[names::Q, names::K, names::V])?,
            o: self.linear(index, linears, &[names::O])?,
            q_norm,
            k_norm,
            rope: it.rope.clone(),
            num_attention_heads: it.num_attention_heads,
            num_key_value_heads: it.num_key_value_heads,
            head_dim: it.head_dim,
            scale: it.scale,
            window: it.window,
            softcap: it.softcap,
            precision: self.options.precision,
        })
    }

    fn feed_forward(&mut self, index: usize, it: &MlpSpec, linears: &[LinearSpec]) -> Result<FeedForward> {
        let Some(experts) = it.experts else {
            return Ok(FeedForward::Dense(self.mlp(index, it, linears, |part| part.to_string())?));
        };
        let router = names::weight(index, names::ROUTER);
        self.check(&router, (experts.num_experts, self.spec.hidden_size))?;
        let mut value = self.weights.get(&router)?.into_dense()?;
        if let Device::Cuda(_) = self.options.device {
            value = value.to_device_as(&self.options.device, self.options.dtype)?;
        }
        let one = |expert| self.mlp(index, it, linears, |part| names::of_expert(expert, part));
        Ok(FeedForward::Experts(Box::new(Experts {
            experts: (0..experts.num_experts).map(one).collect::<Result<_>>()?,
            // A token's experts hang on it: rounding could change them.
            router: DenseWeight { value: value.into(), precision: Precision::Full },
            num_experts_per_tok: experts.num_experts_per_tok,
            normalised: experts.normalised,
        })))
    }

    fn mlp(
        &mut self,
        index: usize,
        it: &MlpSpec,
        linears: &[LinearSpec],
        name: impl Fn(&str) -> String,
    ) -> Result<Mlp> {
        let (gate, up, down) = (name(names::GATE), name(names::UP), name(names::DOWN));
        let gate_up: &[&str] = if it.gated { &[&gate, &up] } else { &[&up] };
        Ok(Mlp {
            gate_up: self.linear(index, linears, gate_up)?,
            down: self.linear(index, linears, &[&down])?,
            activation: it.activation,
        })
    }

    /// The named projections side by side.
    fn linear(&mut self, index: usize, linears: &[LinearSpec], parts: &[&str]) -> Result<Linear> {
        let part = |it: &LinearSpec| -> Result<Part> {
            let weight = names::weight(index, &it.part);
            self.check(&weight, (it.out_features, it.in_features))?;
            let spec = PartSpec {
                name: names::module(index, &it.part),
                out_features: it.out_features,
                in_features: it.in_features,
            };
            let in_context =
                |error: Error| Error::file(self.weights.path(), format!("tensor `{weight}`: {error}"));
            let mut part = (self.make_part)(&spec, self.weights.get(&weight)?).map_err(in_context)?;
            self.weights.forget(&weight);
            if it.bias {
                part.bias = Some(self.vector(&names::bias(index, &it.part), it.out_features)?.into());
            }
            Ok(part)
        };
        let wanted = linears.iter().filter(|it| parts.contains(&it.part.as_str()));
        Ok(Linear::new(wanted.map(part).collect::<Result<_>>()?))
    }
}

/// A projection with a frozen weight as it is stored and no adapter; on a GPU in the type of its
/// activations.
///
/// # Errors
/// When the device has no room.
pub fn dense_part(spec: &PartSpec, stored: Stored, options: &BuildOptions) -> Result<Part> {
    let mut value = stored.into_dense()?;
    match (&options.device, options.precision) {
        (Device::Cuda(_), _) => value = value.to_device_as(&options.device, options.dtype)?,
        // Products would round it anyway, each time.
        (Device::Cpu, Precision::Bf16) => value = value.cast(DType::BF16)?,
        (Device::Cpu, Precision::Full) => {}
    }
    let weight: Box<dyn Weight> = Box::new(DenseWeight { value: value.into(), precision: options.precision });
    Ok(Part { name: spec.name.clone(), weight, bias: None, adapter: None })
}
