"""lora_kit: LoRA and fine-tuning for Stable Diffusion."""
