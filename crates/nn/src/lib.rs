//! Differentiable pieces, each with its forward and its backward side by side.
