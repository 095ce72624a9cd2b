"""How a frozen layer is computed in a training step: what adapters and networks both stand on."""
