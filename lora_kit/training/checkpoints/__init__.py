"""Checkpoints of a run: written whole, found again, resumed to the same bits."""
