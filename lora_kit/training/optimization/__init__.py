"""Optimizers with their states, learning rates, limits on updates, and averaged weights."""
