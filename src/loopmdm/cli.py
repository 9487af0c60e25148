"""The command line: `loopmdm info | selfcheck | flops | train | sample | demo`.

Imports are inside the commands, so that `--help` costs nothing. Bad input is one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

from .config import PRESETS, LoopConfig, ModelConfig, check_loops, preset
from .errors import InputError, nearest

EXTRAS = {"accelerate": "train", "tokenizers": "train", "rich": "train", "tensorboard": "train", "matplotlib": "demo"}
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 (selfcheck failed), 2 (bad input), 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # libgomp's threads spin while they wait. With a core taken by someone else that doubled a training step (0.87 s
    # against 0.51 s on two cores) and bought nothing on idle ones. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a narrow terminal encoding must not end a run
    command = next((word for word in argv if not word.startswith("-")), "")
    try:
        if command and command not in COMMANDS:
            raise InputError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
        status = _run(_build(command), argv)
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"loopmdm: {error}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = "demo" if command == "demo" else EXTRAS[package]
        print(f'loopmdm: this needs {package}; pip install "loopmdm[{extra}]"', file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("loopmdm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print(f"loopmdm: {error}", file=sys.stderr)
        return BAD_INPUT


def _run(parser: _Parser, argv: Sequence[str]) -> int:
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    return int(options.run(options))


def _build(command: str) -> _Parser:
    from . import __version__

    parser = _Parser(prog="loopmdm", description="Looped-depth masked diffusion language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"loopmdm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (summary, options, run) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        sub.set_defaults(run=run)
        if name == command:  # train's options are read off a class whose module imports torch
            options(sub)
    return parser


def _info_options(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def _info(options: argparse.Namespace) -> int:
    import json

    from . import info

    found = info.collect()
    print(json.dumps(found, indent=2) if options.json else info.render(found), end="\n" if options.json else "")
    return 0


def _selfcheck_options(parser: _Parser) -> None:
    pass


def _selfcheck(options: argparse.Namespace) -> int:
    import torch

    from .ops.contract import all_ops, unavailable

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    rows: list[tuple[str, ...]] = [("op", "impl", "device", "dtype", "deviation", "allowed", "verdict")]
    verdicts = []
    for name, op in sorted(all_ops().items()):
        for impl in op.impls:
            for device in devices if impl != "torch" else ():
                reason = unavailable(impl, device)
                if reason is not None:
                    verdicts.append("not run")
                    rows.append((name, impl, str(device), "", "", "", f"not run: {reason}"))
                    continue
                for dtype in op.dtypes:
                    allowed = op.tolerance.get(dtype, 0.0)
                    try:
                        gap = op.deviation(impl, device, dtype)
                    except Exception as error:  # whatever a kernel dies of is the finding
                        gap, verdict = float("nan"), f"failed: {type(error).__name__}: {error}".partition("\n")[0]
                    else:
                        verdict = "ok" if gap <= allowed else "failed"
                    verdicts.append(verdict.partition(":")[0])
                    kind = str(dtype).removeprefix("torch.")
                    rows.append((name, impl, str(device), kind, f"{gap:.1e}", f"{allowed:.0e}", verdict))
    print(_table(rows))
    counts = {kind: verdicts.count(kind) for kind in ("ok", "failed", "not run")}
    print(f"\nagainst torch: {counts['ok']} ok, {counts['failed']} failed, {counts['not run']} not run")
    return FAILED if counts["failed"] else 0


def _flops_options(parser: _Parser) -> None:
    _model_options(parser, "paper-170m")
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


def _flops(options: argparse.Namespace) -> int:
    import torch

    from .model.flops import (
        inverse_flops_loops,
        matched_steps,
        mean_loops,
        token_flops,
        training_flops,
        uniform_loops,
    )
    from .model.lm import LoopMDM

    config = _configuration(options)
    for name in ("length", "baseline_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least 1")
    top, length, convention = config.loop.max_loops, options.length, options.convention
    loops = _numbers("loops", options.loops) if options.loops else sorted({1, (top + 1) // 2, top})
    rows: list[tuple[str, ...]] = [("S", "layers applied", "FLOPs a token, forward", "training FLOPs a sequence")]
    for S in loops:
        check_loops(S, "loops")
        token, sequence = token_flops(config, length, S, convention), training_flops(config, length, S, convention)
        rows.append((str(S), str(config.depth(S)), _si(token), _si(sequence)))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LoopMDM(config).parameters())
    first, last = config.loop.start, config.loop.start + config.loop.length - 1
    print(
        f"{options.preset}: {parameters:,} parameters, {config.num_hidden_layers} layers of which "
        f"{first}..{last} are looped; {length} tokens, convention {convention}\n"
    )
    print(_table(rows))
    print(f"\nSteps that cost the FLOPs of {options.baseline_steps:,} steps of the same model unlooped (S = 1):")
    uniform, inverse = uniform_loops(top), inverse_flops_loops(config, length, top, convention)
    for label, distribution in ((f"S ~ U{{1..{top}}}", uniform), ("p(S) ∝ 1/F(S)", inverse)):
        steps = matched_steps(config, length, options.baseline_steps, distribution, convention)
        print(f"  {label}, mean {mean_loops(distribution):.3f}: {steps:,}")
    return 0


def _train_options(parser: _Parser) -> None:
    from .lab.train import Recipe

    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="UTF-8 text files")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument("--tokenizer", default="char", help="char (default), byte or bpe")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids of a bpe tokenizer, at most (default 4096)")
    _model_options(parser, "tiny-llama")
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
    texts = _described(Recipe)
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


def _train(options: argparse.Namespace) -> int:
    from .lab import text_run
    from .lab.train import Recipe

    recipe = Recipe(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe)})
    made = text_run.train(
        options.data,
        options.out,
        recipe,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        preset_name=options.preset,
        overrides=_overrides(options.set),
        length=options.length,
        eval_every=options.eval_every,
        save_every=options.save_every,
        eval_loops=_numbers("eval-loops", options.eval_loops) if options.eval_loops is not None else None,
        eval_windows=options.eval_windows,
    )
    return 0 if made.step == made.steps else INTERRUPTED


def _sample_options(parser: _Parser) -> None:
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


def _sample(options: argparse.Namespace) -> int:
    from .lab import text_run

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
        f"{_si(made.flops)}FLOP"
    )
    return 0


def _demo_options(parser: _Parser) -> None:
    parser.add_argument("--task", help="sudoku, text or addition (default: sudoku, then text)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="your own text for the text act")
    parser.add_argument("--compare", action="store_true", help="train an unlooped model with the same FLOPs too")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training steps (default 1.0)")
    parser.add_argument("--out", metavar="DIR", help="a new folder (default: runs/demo-TIME)")


def _demo(options: argparse.Namespace) -> int:
    from .lab import demo

    demo.run(
        task=options.task,
        data=options.data,
        compare=options.compare,
        seed=options.seed,
        scale=options.scale,
        out=options.out,
    )
    return 0


Command = tuple[str, Callable[[_Parser], None], Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, Command] = {
    "demo": ("train a small model and watch it denoise, loop by loop", _demo_options, _demo),
    "train": ("train a LoopMDM on text files", _train_options, _train),
    "sample": ("print text from a trained model", _sample_options, _sample),
    "flops": ("parameters, FLOPs and FLOPs-matched steps of a model", _flops_options, _flops),
    "info": ("what was built, what was found, and what each op uses here", _info_options, _info),
    "selfcheck": (
        "compare every implementation of every op with torch on this machine",
        _selfcheck_options,
        _selfcheck,
    ),
}


def _model_options(parser: _Parser, default: str) -> None:
    parser.add_argument("--preset", default=default, help=f"one of {', '.join(PRESETS)} (default {default})")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any field of ModelConfig or LoopConfig, as max_loops=6 boundary=anchored",
    )


def _configuration(options: argparse.Namespace) -> ModelConfig:
    return preset(options.preset, **_overrides(options.set))


def _overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE words as values of the fields' types; `loop.` before a key of LoopConfig may be left out."""
    hints = get_type_hints(ModelConfig) | get_type_hints(LoopConfig)
    del hints["loop"]
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().removeprefix("loop.")
        if not equals:
            raise InputError(f"--set takes KEY=VALUE, not {pair!r}")
        if key not in hints:
            raise InputError(f"unknown configuration key {key!r}{nearest(key, hints)}")
        found[key] = _value(key, text.strip(), get_args(hints[key]) or (hints[key],))
    return found


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


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--{name} is {text!r}; it must be whole numbers with commas between, as 1,2,4") from None


def _described(cls: type) -> dict[str, str]:
    """Descriptions of a dataclass's fields, from the Attributes section of its docstring."""
    section = (cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _si(number: float) -> str:
    """1.234e9 -> '1.23 G'."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.0f} "


if __name__ == "__main__":
    sys.exit(main())
