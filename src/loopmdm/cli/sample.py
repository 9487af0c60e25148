"""`loopmdm sample`: print text from a trained model."""

from __future__ import annotations

import argparse

from .common import Parser, si


def options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a run's folder, or the model/ in it")
    parser.add_argument("--prompt", default="", help="text that every sample starts with")
    parser.add_argument("--max-new-tokens", type=int, help="(default 128, or as many as the model has room for)")
    parser.add_argument("--num-samples", type=int, default=1, help="(default 1)")
    parser.add_argument("--steps", type=int, default=64, help="denoising steps (default 64)")
    parser.add_argument(
        "--loops", type=int, metavar="S", help="visits of the looped block (default: the model's S_max)"
    )
    parser.add_argument("--policy", default="ancestral", help="ancestral (default) or confidence")
    parser.add_argument("--temperature", type=float, help="of the tokens (default: the policy's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default 0)")


def run(options: argparse.Namespace) -> int:
    from ..lab import text_run

    texts, made = text_run.sample(
        options.folder,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        steps=options.steps,
        num_loops=options.loops,
        policy=options.policy,
        temperature=options.temperature,
        seed=options.seed,
    )
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {i + 1}, seed {options.seed + i}")
        print(text_run.printable(text))
    mean = sum(made.loops_per_step) / len(made.loops_per_step)
    print(
        f"\n{made.generated} tokens, {made.tokens_per_second:,.0f} tokens/s, nfe {made.nfe}, mean loops {mean:.2f}, "
        f"{si(made.flops)}FLOP"
    )
    return 0
