#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ferrotune_model::source::read_safetensors_through(bytes);
});
