"""`loopmdm flops`: parameters, FLOPs and FLOPs-matched steps of a model."""

from __future__ import annotations

import argparse

from ..config import check_loops
from ..errors import InputError
from .common import Parser, configuration, model_options, numbers, si, table


def options(parser: Parser) -> None:
    model_options(parser, "paper-170m")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence (default 1024)")
    parser.add_argument("--loops", help="values of S, as 1,6,12 (default: 1, half of S_max, S_max)")
    parser.add_argument(
        "--convention",
        default="head",
        help="what the vocabulary costs: head (default), head+embedding (the look-up counted as a matmul) or none",
    )
    parser.add_argument(
        "--baseline-steps", type=int, default=1_000_000, help="unlooped steps to match (default 1000000)"
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from ..model.flops import (
        inverse_flops_loops,
        matched_steps,
        mean_loops,
        token_flops,
        training_flops,
        uniform_loops,
    )
    from ..model.lm import LoopMDM

    config = configuration(options)
    for name in ("length", "baseline_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least 1")
    top, length, convention = config.loop.max_loops, options.length, options.convention
    loops = numbers("loops", options.loops) if options.loops else sorted({1, (top + 1) // 2, top})
    rows: list[tuple[str, ...]] = [("S", "layers applied", "FLOPs a token, forward", "training FLOPs a sequence")]
    for S in loops:
        check_loops(S, "loops")
        token, sequence = token_flops(config, length, S, convention), training_flops(config, length, S, convention)
        rows.append((str(S), str(config.depth(S)), si(token), si(sequence)))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LoopMDM(config).parameters())
    looped = ", ".join(f"{start}..{start + length - 1}" for start, length in config.loop.runs)
    print(
        f"{options.preset}: {parameters:,} parameters, {config.num_hidden_layers} layers of which "
        f"{looped} are looped; {length} tokens, convention {convention}\n"
    )
    print(table(rows))
    print(f"\nSteps that cost the FLOPs of {options.baseline_steps:,} steps of the same model unlooped (S = 1):")
    uniform, inverse = uniform_loops(top), inverse_flops_loops(config, length, top, convention)
    for label, distribution in ((f"S ~ U{{1..{top}}}", uniform), ("p(S) ∝ 1/F(S)", inverse)):
        steps = matched_steps(config, length, options.baseline_steps, distribution, convention)
        print(f"  {label}, mean {mean_loops(distribution):.3f}: {steps:,}")
    return 0
