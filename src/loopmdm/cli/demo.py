"""`loopmdm demo`: train a small model and watch it denoise, loop by loop."""

from __future__ import annotations

import argparse

from .common import Parser


def options(parser: Parser) -> None:
    parser.add_argument("--task", help="sudoku, text or addition (default: sudoku, then text)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="your own text for the text act")
    parser.add_argument("--compare", action="store_true", help="train an unlooped model with the same FLOPs too")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training steps (default 1.0)")
    parser.add_argument("--out", metavar="DIR", help="a new folder (default: runs/demo-TIME)")


def run(options: argparse.Namespace) -> int:
    from ..lab import demo

    demo.run(
        task=options.task,
        data=options.data,
        compare=options.compare,
        seed=options.seed,
        scale=options.scale,
        out=options.out,
    )
    return 0
