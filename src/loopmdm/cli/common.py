"""What the commands share: the parser, values of `--set`, tables and units."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

from ..config import PRESETS, LoopConfig, ModelConfig, preset
from ..errors import InputError, nearest

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors like all others."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """None are left over: a command says itself what it does not know, and what may have been meant."""
        namespace, strange = super().parse_known_args(args, namespace)
        if strange:
            close = difflib.get_close_matches(strange[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(strange)}" + (f", perhaps {close[0]}" if close else ""))
        return namespace, strange

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def model_options(parser: Parser, default: str, *, absent: bool = False) -> None:
    """--preset and --set; with `absent`, what is not given leaves no attribute."""
    parser.add_argument(
        "--preset",
        default=argparse.SUPPRESS if absent else default,
        help=f"one of {', '.join(PRESETS)} (default {default})",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=argparse.SUPPRESS if absent else [],
        metavar="KEY=VALUE",
        help="any field of ModelConfig or LoopConfig, as max_loops=6 boundary=anchored",
    )


def configuration(options: argparse.Namespace) -> ModelConfig:
    return preset(options.preset, **overrides(options.set))


def overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE words as values of the fields' types; `loop.` before a key of LoopConfig may be left out."""
    hints = get_type_hints(ModelConfig) | get_type_hints(LoopConfig)
    del hints["loop"]
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().removeprefix("loop.")
        if not equals:
            raise InputError(f"--set takes KEY=VALUE, not {pair!r}")
        if key not in hints:
            raise InputError(f"unknown configuration key {key!r}{nearest(key, hints)}")
        if key == "also":
            found[key] = _runs(text.strip())
        else:
            found[key] = _value(key, text.strip(), get_args(hints[key]) or (hints[key],))
    return found


def _runs(text: str) -> tuple[tuple[int, ...], ...]:
    """ "6:2,9:1" -> ((6, 2), (9, 1)), the further looped blocks; "" or "none" -> ()."""
    if text.lower() in ("", "none", "null"):
        return ()
    try:
        return tuple(tuple(int(number) for number in run.split(":")) for run in text.split(","))
    except ValueError:
        raise InputError(f"also is {text!r}; it must be START:LENGTH with commas between, as 6:2,9:1") from None


def _value(key: str, text: str, kinds: tuple[type, ...]) -> Any:
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise InputError(f"{key} is {text!r}; it must be true or false")
        return words[text.lower()]
    kind = next(k for k in kinds if k is not type(None))
    try:
        return kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{key} is {text!r}; it must be {expected}") from None


def numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--{name} is {text!r}; it must be whole numbers with commas between, as 1,2,4") from None


def described(cls: type) -> dict[str, str]:
    """Descriptions of a dataclass's fields, from the Attributes section of its docstring."""
    section = (cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def si(number: float) -> str:
    """1.234e9 -> '1.23 G'."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.0f} "
