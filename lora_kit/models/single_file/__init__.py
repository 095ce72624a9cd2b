"""Single-file checkpoints: opening one, telling what it is by its tensors, and naming them as diffusers does."""
