//! Rows of any data set to conversations, to text, to marked tokens, to packed batches.
