"""How much memory a step takes, told before anything is loaded."""
