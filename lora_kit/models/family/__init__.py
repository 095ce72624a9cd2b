"""One class for each model family, and what only they need: masks, low-resolution pictures, inputs to draw from."""
