"""The model, readable in ten minutes: block.py (one layer), loop.py (layers visited S times), lm.py (the whole)."""
