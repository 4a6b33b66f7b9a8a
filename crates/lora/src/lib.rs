//! Low-rank adapters: LoRA and rsLoRA, their initialisation, merge and PEFT names.
