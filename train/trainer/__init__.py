"""Training: the loop, the step and its optimizer, the losses, checkpoints, signals."""
