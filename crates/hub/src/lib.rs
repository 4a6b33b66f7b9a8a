//! A model's name to local files: folders, the model cache, hub downloads.
