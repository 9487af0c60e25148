"""Sampling: policies.py and remask.py choose positions, filters.py draws tokens, engine.py runs the denoising steps."""
