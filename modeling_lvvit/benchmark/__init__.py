"""Speed, memory and FLOPs of models, training steps and data paths, side by side in one run."""
