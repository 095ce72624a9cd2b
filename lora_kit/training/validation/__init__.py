"""What a run measures and draws of itself: held-out losses, intervals, drift, pictures, the verdict."""
