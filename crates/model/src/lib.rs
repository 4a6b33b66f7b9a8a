//! One decoder by spec, the families that fill a spec in, and the files weights come from.
