"""`loopmdm info`: what was built, what was found, and what each op uses here."""

from __future__ import annotations

import argparse

from .common import Parser


def options(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(options: argparse.Namespace) -> int:
    import json

    from .. import info

    found = info.collect()
    print(json.dumps(found, indent=2) if options.json else info.render(found), end="\n" if options.json else "")
    return 0
