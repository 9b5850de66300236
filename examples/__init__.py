"""Programs to start from: a training script, and a study of depth."""
