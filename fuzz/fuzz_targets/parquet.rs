#![no_main]

// The Parquet and Arrow crates panic on some damaged files, which the readers catch; what they don't catch still aborts.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    ferrotune_data::readers::read_through("f.parquet", bytes);
});
