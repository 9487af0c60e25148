"""`loopmdm train`: train a LoopMDM on text, or go on with a run."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import InputError
from .common import Parser, described, model_options, numbers, overrides


def options(parser: Parser) -> None:
    """Options that are not given leave no trace, so that `--resume` can tell them from those that are."""
    from ..lab.recipe import Recipe

    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="text or .jsonl files (.xz, .gz, .bz2 too; FILE.jsonl#KEY for another key than text), folders, hf:NAME",
    )
    parser.add_argument("--out", metavar="DIR", help="a new folder for the run")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, exactly; with its settings")
    parser.add_argument("--valid", nargs="+", metavar="FILE", help="text to validate on (default: a part of the data)")
    parser.add_argument("--cache", metavar="DIR", help="where tokenised text lies, for several runs (default OUT/data)")
    parser.add_argument("--init", metavar="DIR", help="start from this saved model instead of a new one")
    parser.add_argument("--tokenizer", help="char (default), byte, bpe, or the path of a tokenizer.json")
    parser.add_argument("--vocab-size", type=int, help="ids of a bpe tokenizer, at most (default 4096)")
    parser.add_argument("--packing", help="stream (default), or documents: attention within each")
    parser.add_argument("--sft", action="store_true", help="fine-tune on answers: JSON lines, prompts are never masked")
    parser.add_argument("--prompt-key", metavar="KEY", help="of such lines (default prompt)")
    parser.add_argument("--answer-key", metavar="KEY", help="of such lines (default answer)")
    model_options(parser, "tiny-llama", absent=True)
    parser.add_argument("--length", type=int, help="tokens a window (default 128)")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help="(default: a tenth of the run)")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="(default: as --eval-every)")
    parser.add_argument("--eval-loops", metavar="S,S,...", help="S of evaluations (default: 1, 2, 4, ... S_max)")
    parser.add_argument("--eval-windows", type=int, help="validation windows, at most (default 128)")
    parser.add_argument("--keep", type=int, metavar="N", help="checkpoints that stay (default 2)")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write events for TensorBoard, in DIR/tensorboard"
    )
    parser.epilog = (
        "The defaults suit long runs. Minutes on a CPU go further with: --optimizer muon --lr 2e-3 --matrix-lr 0.01 "
        "--objective masked_mean --ema 0.98 --length 64 --set initializer_range=0.3. Ctrl-C, SIGTERM and SIGHUP let "
        "the step in progress end and save everything."
    )
    recipe = parser.add_argument_group("recipe")
    texts = described(Recipe)
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        kind = next(t for t in (get_args(hints[field.name]) or (hints[field.name],)) if t is not type(None))
        name, text = f"--{field.name.replace('_', '-')}", texts.get(field.name, "").replace("%", "%%")
        if kind is bool:
            recipe.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        shown = "" if field.default is None else f" (default {field.default})"
        recipe.add_argument(
            name, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text + shown
        )


def run(options: argparse.Namespace) -> int:
    from torch import distributed

    from ..lab import text_run
    from ..lab.data import TOKENIZERS
    from ..lab.recipe import Recipe

    given = {name: value for name, value in vars(options).items() if name != "run"}
    if "set" in given:
        given["set"] = overrides(given["set"])
    if "eval_loops" in given:
        given["eval_loops"] = numbers("eval-loops", given["eval_loops"])
    for name in ("data", "valid"):
        if name in given:
            given[name] = [_absolute(spec) for spec in given[name]]
    for name in ("cache", "init"):
        if name in given:
            given[name] = os.path.abspath(given[name])
    if given.get("tokenizer") not in (None, *TOKENIZERS) and os.path.exists(given["tokenizer"]):
        given["tokenizer"] = os.path.abspath(given["tokenizer"])
    if "resume" in given:
        made = _resume(given)
    else:
        missing = [f"--{name}" for name in ("data", "out") if name not in given]
        if missing:
            raise InputError(f"{' and '.join(missing)} must be given, or --resume; see `loopmdm train --help`")
        if given.get("sft"):
            given.setdefault("average", "sequence")  # as LLaDA fine-tunes
        if "init" in given:
            brought = [name for name in ("preset", "set", "tokenizer", "vocab_size") if name in given]
            if brought:
                name = brought[0].replace("_", "-")
                raise InputError(f"--init brings its own configuration and tokenizer; leave out --{name}")
        _refuse_idle(given)
        of_recipe = {f.name for f in dataclasses.fields(Recipe)}
        recipe = Recipe(**{name: value for name, value in given.items() if name in of_recipe})
        rest = {name: value for name, value in given.items() if name not in of_recipe | {"out"}}
        made = text_run.train(given["out"], recipe, text_run.Settings(**rest))
    if distributed.is_initialized():
        distributed.destroy_process_group()  # else its threads may outlive what they use, and abort the process
    return 0 if made.signal is None else 128 + made.signal


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """Refuse what was given and would change nothing beside the rest."""
    for name, counts, why in (
        ("t_start", given.get("t_ramp"), "without --t-ramp"),
        ("t_ramp", given.get("t_start", 1.0) != 1, "without --t-start"),
        ("vocab_size", given.get("tokenizer") == "bpe", "without --tokenizer bpe"),
        ("prompt_key", given.get("sft"), "without --sft"),
        ("answer_key", given.get("sft"), "without --sft"),
        ("matrix_lr", given.get("optimizer", "adamw") != "adamw", "without --optimizer muon"),
        ("decay_share", given.get("decay") != "constant", "with --decay constant"),
        ("loop_distribution", "loops" not in given, "with --loops"),
    ):
        if name in given and not counts:
            raise InputError(f"--{name.replace('_', '-')} does nothing {why}; leave it out")


def _resume(given: dict[str, Any]) -> Any:
    """Go on with a run; an option that it does not have already is refused."""
    from ..lab.run import read_recipe
    from ..lab.text_run import resume

    path = Path(given.pop("resume"))
    free = {name: given.pop(name) for name in ("steps", "keep") if name in given}
    held = read_recipe(path)
    for name, value in given.items():
        if name not in held or held[name] != value:
            had = f"has {held[name]!r}" if name in held else "does not take it"
            raise InputError(
                f"--{name.replace('_', '-')} {value!r} does not go with --resume {path}, whose run {had}; leave it out"
            )
    return resume(path, **free)


def _absolute(spec: str) -> str:
    """A run may go on from another folder than it began in."""
    return spec if spec.startswith("hf:") else os.path.abspath(spec)
