"""Keeps the checkout off sys.path: `python -m pytest` puts it there, and with it a top-level `kernels`."""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
