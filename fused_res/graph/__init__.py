"""What a module's forward computes: a small intermediate representation, and the front ends that produce it."""
