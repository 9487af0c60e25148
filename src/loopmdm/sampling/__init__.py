"""Sampling: policies.py decides which positions are revealed, engine.py runs the denoising steps."""
