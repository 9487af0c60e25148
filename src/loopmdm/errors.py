"""The one exception that means "your input, not our bug"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one sentence: what was wrong, what was expected, what to do.

    The command line prints the message alone and exits with status 2; library users may catch
    it as the `ValueError` it is.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `known`, or the whole list if none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(options)}"
