"""The study: what bias-aware fine-tuning of one block does beside plain fine-tuning, calibration and LoRA."""
