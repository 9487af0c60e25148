"""The one exception that means "your input, not our bug"."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class InputError(ValueError):
    """Bad input. The message is one sentence: what was wrong, what was expected, what to do.

    The command line prints the message alone and exits with status 2; library users may catch
    it as the `ValueError` it is.
    """


def nearest(name: object, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `known`, or the whole list if none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(options)}"


def shown(value: object) -> str:
    """Return the value's repr if it is short and one line, else its type and, where it has one, its shape."""
    text = repr(value)
    if len(text) <= 80 and "\n" not in text:
        return text
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" {list(shape)}")


def integer(value: Any) -> int | None:
    """A whole number, NumPy's too, as an int; None for anything else, True and False among it."""
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def whole(name: str, value: int, least: int = 1) -> int:
    """Return a whole number of at least `least` as an int, or raise InputError."""
    found = integer(value)
    if found is None or found < least:
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")
    return found


def number(name: str, value: float) -> float:
    """Return a finite number of at least 0, or raise InputError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise InputError(f"{name} is {shown(value)}; it must be a number of at least 0")
    return value
