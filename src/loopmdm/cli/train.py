"""`loopmdm train`: train a LoopMDM on text files."""

from __future__ import annotations

import argparse
import dataclasses
from typing import get_args, get_type_hints

from .common import INTERRUPTED, Parser, described, model_options, numbers, overrides


def options(parser: Parser) -> None:
    from ..lab.train import Recipe

    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="UTF-8 text files")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument("--tokenizer", default="char", help="char (default), byte or bpe")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids of a bpe tokenizer, at most (default 4096)")
    model_options(parser, "tiny-llama")
    parser.add_argument("--length", type=int, default=128, help="tokens a window (default 128)")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help="(default: a tenth of the run)")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="(default: as --eval-every)")
    parser.add_argument("--eval-loops", metavar="S,S,...", help="S of evaluations (default: 1, 2, 4, ... S_max)")
    parser.add_argument("--eval-windows", type=int, default=128, help="validation windows, at most (default 128)")
    parser.epilog = (
        "The defaults suit long runs. Minutes on a CPU go further with: --optimizer muon --lr 2e-3 --matrix-lr 0.01 "
        "--objective masked_mean --ema 0.98 --length 64 --set initializer_range=0.3"
    )
    recipe = parser.add_argument_group("recipe")
    texts = described(Recipe)
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        kind = next(t for t in (get_args(hints[field.name]) or (hints[field.name],)) if t is not type(None))
        shown = "" if field.default is None else f" (default {field.default})"
        recipe.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar=kind.__name__.upper(),
            help=texts.get(field.name, "").replace("%", "%%") + shown,
        )


def run(options: argparse.Namespace) -> int:
    from ..lab import text_run
    from ..lab.train import Recipe

    recipe = Recipe(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe)})
    made = text_run.train(
        options.data,
        options.out,
        recipe,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        preset_name=options.preset,
        overrides=overrides(options.set),
        length=options.length,
        eval_every=options.eval_every,
        save_every=options.save_every,
        eval_loops=numbers("eval-loops", options.eval_loops) if options.eval_loops is not None else None,
        eval_windows=options.eval_windows,
    )
    return 0 if made.step == made.steps else INTERRUPTED
