"""`loopmdm convert`: another codebase's checkpoint to a LoopMDM folder, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ..errors import InputError
from .common import Parser, si

CODEBASES = "mdlm (DUO and ReMDM too), llada, dream or smdm"


def options(parser: Parser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a weights file, an index of shards, or their folder")
    parser.add_argument("out", metavar="OUT", help="the folder to be made")
    parser.add_argument("--from", dest="source", metavar="CODEBASE", help=f"what CKPT comes from: {CODEBASES}")
    parser.add_argument("--to", dest="target", metavar="CODEBASE", help="what a LoopMDM folder CKPT is written for")
    parser.add_argument(
        "--weights", metavar="ema|raw", help="which weights (default: the moving average where the file has one)"
    )
    parser.add_argument("--config", metavar="JSON", help="the codebase's configuration (default: what lies with CKPT)")
    parser.add_argument("--mask-id", type=int, metavar="ID", help="of the mask, where the configuration lacks it")


def run(options: argparse.Namespace) -> int:
    from ..adapters.convert import from_loopmdm, to_loopmdm

    if (options.source is None) == (options.target is None):
        raise InputError("give --from CODEBASE or --to CODEBASE, one of them; see `loopmdm convert --help`")
    if options.source is not None:
        done = to_loopmdm(
            options.checkpoint,
            options.out,
            options.source,
            weights=options.weights,
            config=options.config,
            mask_id=options.mask_id,
            progress=_progress(),
        )
    else:
        for name in ("weights", "config", "mask_id"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} goes with --from; a LoopMDM folder brings its own")
        done = from_loopmdm(options.checkpoint, options.out, options.target, progress=_progress())
    print(f"{done.out}: {done.tensors} tensors, {si(done.bytes)}B, {done.weights} weights of {done.family}")
    if options.source is not None:
        print("It has no loops yet (S = 1); `model.relooped(start=, length=, max_loops=)` gives it some.")
    elif done.config.loop.max_loops > 1:
        print(f"{done.family} knows no loops: this is the model at S = 1.")
    return 0


def _progress() -> Callable[[str, int, int], None]:
    """A line that counts bytes on a terminal, a line for each tenth elsewhere."""
    tenth = -1

    def show(name: str, done: int, total: int) -> None:
        nonlocal tenth
        live, now = sys.stderr.isatty(), 10 * done // max(total, 1)
        if live:
            print(f"\r\x1b[K{si(done)}B of {si(total)}B  {name}"[:100], end="", file=sys.stderr, flush=True)
            if done == total:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        elif now > tenth:
            tenth = now
            print(f"read {si(done)}B of {si(total)}B", file=sys.stderr)

    return show
