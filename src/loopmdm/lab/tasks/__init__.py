"""Tasks a small model can learn on a CPU: each gives training batches, a recipe and a way to score."""
