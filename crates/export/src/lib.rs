//! One file for each format a trained model leaves in.
