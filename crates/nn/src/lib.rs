//! Differentiable pieces, each with its forward and its backward side by side.

mod mlp;
mod norm;
mod rope;

pub use mlp::Activation;
pub use norm::NormKind;
pub use rope::Rope;
