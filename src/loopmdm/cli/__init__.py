"""The command line: one module a command, each with `options(parser)` and `run(options) -> exit status`.

A command's module is imported when it is called, so that `--help` costs nothing. Bad input is one sentence and exit
status 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import InputError, nearest
from .common import BAD_INPUT, FAILED, INTERRUPTED, Parser

EXTRAS = {
    "accelerate": "train",
    "tokenizers": "train",
    "rich": "train",
    "tensorboard": "train",
    "matplotlib": "plot",
    "transformers": "hf",
}
COMMANDS = {
    "demo": "train a small model and watch it denoise, loop by loop",
    "train": "train a LoopMDM on text files",
    "eval": "measure a model: likelihood by S and by noise level, and its samples",
    "schedule": "fill a model's table of S by noise level, for a budget of FLOPs",
    "sample": "print text from a trained model",
    "convert": "turn another codebase's checkpoint into a LoopMDM folder, or back",
    "flops": "parameters, FLOPs and FLOPs-matched steps of a model",
    "info": "what was built, what was found, and what each op uses here",
    "selfcheck": "compare every implementation of every op with torch on this machine",
    "bench": "run the benchmarks and show them; compare two runs",
    "tune": "time every implementation of every op against torch here, and keep what is faster",
}


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


def _run(parser: Parser, argv: Sequence[str]) -> int:
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    return int(options.run(options))


def _build(command: str) -> Parser:
    from .. import __version__

    parser = Parser(prog="loopmdm", description="Looped-depth masked diffusion language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"loopmdm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if name == command:
            module = import_module(f".{name}", __name__)
            module.options(sub)
            sub.set_defaults(run=module.run)
    return parser
