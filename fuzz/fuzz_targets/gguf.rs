#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ferrotune_model::source::read_gguf_through(bytes);
});
