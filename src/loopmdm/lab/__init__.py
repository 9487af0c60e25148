"""Recipes: data, tasks, training, the demo. Behind the extras `train` and `plot`, and the command line."""
