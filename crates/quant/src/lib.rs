//! Weights stored in few bits: NF4 as bitsandbytes lays it out.
