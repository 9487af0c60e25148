"""`loopmdm sample`: print text from a trained model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import InputError
from .common import Parser, si


def options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a run's folder, or the model/ in it")
    parser.add_argument("--prompt", default="", help="text that every sample starts with")
    parser.add_argument("--max-new-tokens", type=int, help="(default 128, or as many as the model has room for)")
    parser.add_argument("--num-samples", type=int, default=1, help="(default 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 64, or what an adaptive policy takes)")
    parser.add_argument(
        "--loops",
        default=None,
        metavar="S",
        help="visits of the looped block (default: the model's S_max); auto: the table of `loopmdm schedule`",
    )
    parser.add_argument(
        "--early-exit",
        type=float,
        metavar="TAU",
        help="end a sequence's visits once one changes it by less (relative norm)",
    )
    parser.add_argument("--policy", default="ancestral", help=_policies())
    parser.add_argument("--temperature", type=float, help="of the tokens (default: the policy's own)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--block-length", type=int, help="fill blocks of so many tokens from left to right")
    parser.add_argument("--cfg-scale", type=float, help="classifier-free guidance against the model without the prompt")
    parser.add_argument("--stop", action="store_true", help="end each sample at the first end of a document")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default 0)")
    parser.add_argument("--watch", action="store_true", help="show the denoising (on a terminal)")
    parser.add_argument("--pace", type=float, help="with --watch: seconds a step stays, at least (default 0.05)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..lab import sample
    from ..lab.watch import printable

    if options.pace is not None and not options.watch:
        raise InputError("--pace goes with --watch")
    pace = 0.05 if options.pace is None else options.pace
    if not 0 <= pace <= 10:
        raise InputError(f"--pace is {pace}; it must be between 0 and 10 seconds a step")
    texts, made = sample.sample(
        options.folder,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        num_loops=_loops(options.loops),
        early_exit=options.early_exit,
        stop=options.stop,
        policy=options.policy,
        watch=Console(highlight=False, markup=False) if options.watch and not options.json else None,
        pace=pace,
        steps=options.steps,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        block_length=options.block_length,
        cfg_scale=options.cfg_scale,
        seed=options.seed,
    )
    mean = sum(made.loops_per_step) / len(made.loops_per_step)
    if options.json:
        rows = zip(texts, made.sequences(), strict=True)
        found: dict[str, Any] = {
            "samples": [{"seed": options.seed + i, "text": t, "tokens": ids} for i, (t, ids) in enumerate(rows)],
            "generated": made.generated,
            "nfe": made.nfe,
            "loops_per_step": made.loops_per_step,
            "flops": made.flops,
        }
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {i + 1}, seed {options.seed + i}")
        print(printable(text))
    print(
        f"\n{made.generated} tokens, {made.tokens_per_second:,.0f} tokens/s, nfe {made.nfe}, mean loops {mean:.2f}, "
        f"{si(made.flops)}FLOP"
    )
    return 0


def _policies() -> str:
    """The names of all policies; a peer's name for one stands behind it."""
    from ..sampling.policies import POLICIES

    names: dict[type, list[str]] = {}
    for name, kind in POLICIES.items():
        names.setdefault(kind, []).append(name)
    shown = (f"{first} ({', '.join(others)})" if others else first for first, *others in names.values())
    return f"which positions a step reveals (default ancestral): {', '.join(shown)}; arguments follow as threshold:0.8"


def _loops(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--loops is {text!r}; it must be a whole number, or auto for the model's own table") from None
