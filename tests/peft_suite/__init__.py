"""PEFT's own released tests, run with `SliceFineConfig` (and, as a control, with stock LoRA)."""
