"""Example programs: an image classification training script, and a study of network depth."""
