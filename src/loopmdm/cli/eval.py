"""`loopmdm eval`: NELBO by S and by noise level, against another model, and generative perplexity."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..config import check_loops
from ..errors import InputError, nearest, whole
from ..random import signed
from .common import Parser, numbers, si, table

BOUNDS = ("count", "time")
PICTURES = (".png", ".pdf", ".svg")


def options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a run's folder, or the model/ in it")
    data_options(parser)
    parser.add_argument(
        "--loops", metavar="S,S,...", help="S to measure, paired with the first (default: 1, 2, 4, ... S_max, 2 S_max)"
    )
    parser.add_argument(
        "--bound",
        default="count",
        help="count (default: exact mask counts, the smaller error) or time (what training minimises)",
    )
    parser.add_argument(
        "--rolling", action="store_true", help="measure every token of the text once, instead of some windows"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        metavar="TOKENS",
        help="with --rolling: given from the window before (default 0)",
    )
    parser.add_argument("--by-time", action="store_true", help="also where in t the NELBO and the gain come from")
    parser.add_argument("--bins", type=int, help="of t with --by-time (default 8)")
    parser.add_argument("--compare", metavar="DIR", help="another model, measured on the same masks")
    parser.add_argument("--generate", type=int, metavar="N", help="also judge N samples at each S")
    parser.add_argument("--steps", type=int, help="denoising steps of the samples (default 64)")
    parser.add_argument(
        "--scorer", metavar="PATH", help="judge of the samples: a run's folder, or a Hugging Face causal language model"
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw it (.png, .pdf or .svg)")


def data_options(parser: Parser) -> None:
    """What `eval` and `schedule` measure on."""
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to measure on: files, folders, or a corpus folder's validation (default: what the run held out)",
    )
    parser.add_argument("--length", type=int, metavar="TOKENS", help="a window (default: as in training)")
    parser.add_argument("--windows", type=int, default=256, help="at most so many, spread evenly (default 256)")
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="corruptions a window (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of masks and samples (default 0)")


def run(options: argparse.Namespace) -> int:
    check_outputs(options.json, options.plot)
    for name, value, owner, given in (
        ("context", options.context or None, "rolling", options.rolling),
        ("bins", options.bins, "by-time", options.by_time),
        ("steps", options.steps, "generate N", options.generate is not None),
    ):
        if value is not None and not given:
            raise InputError(f"--{name} goes with --{owner}")
    options.bins = 8 if options.bins is None else options.bins
    options.steps = 64 if options.steps is None else options.steps
    check_numbers(options, "samples", "bins", "steps")
    if options.bound not in BOUNDS:
        raise InputError(f"--bound is {options.bound!r}{nearest(options.bound, BOUNDS)}")
    if options.generate is None and options.scorer is not None:
        raise InputError("--scorer judges samples; say how many with --generate N")
    if options.generate is not None and options.generate < 2:
        raise InputError(f"--generate is {options.generate}; at least 2 samples are needed for an error")
    if options.plot and Path(options.plot).suffix not in PICTURES:
        raise InputError(f"--plot ends in {', '.join(PICTURES)}, unlike {options.plot}")
    if options.plot:
        from ..lab import plots  # before anything is measured

    from ..lab import evaluate, measured
    from ..lab.sample import load
    from ..lab.score import build_scorer

    model, tokenizer = load(options.folder)
    scorer = build_scorer(options.scorer, seed=options.seed) if options.scorer else None
    loops = loop_counts(options) or evaluate.default_loops(model.max_loops)
    text = measured.read(
        options.folder,
        model,
        tokenizer,
        options.data,
        length=options.length,
        limit=options.windows,
        rolling=options.rolling,
        context=options.context,
    )
    if options.generate is not None and text.maskable is not None:
        raise InputError(f"--generate draws text from nothing, and {options.folder} answers prompts; leave it out")
    other, its_text = None, text
    if options.compare:
        other, its_tokenizer = load(options.compare)
        evaluate.check_comparable(tokenizer, its_tokenizer, options.folder, options.compare)
        if text.length > other.config.max_position_embeddings:
            raise InputError(
                f"a window is {text.length} tokens, more than the {other.config.max_position_embeddings} of "
                f"{options.compare}; give a shorter --length"
            )
        its_text = text.read_by(options.compare)
    device = evaluate.place(model)
    how = {"samples": options.samples, "seed": options.seed}
    report: dict[str, Any] = {
        "model": {
            "folder": str(options.folder),
            "parameters": sum(p.numel() for p in model.parameters()),
            "max_loops": model.max_loops,
        },
        "measured_on": text.facts(),
        "settings": {"bound": options.bound, **how, "device": device},
    }
    print(f"Model: {options.folder}, {report['model']['parameters']:,} parameters, S_max = {model.max_loops}.")
    print("\n".join(text.describe()))
    print(
        f"Likelihood bound ({options.bound}), {options.samples} corruptions a window, the same for every S; "
        "± one standard error over the windows. Lower is better, gain is above S = "
        f"{loops[0]}.\n"
    )
    found = evaluate.measure(model, text, loops, bound=options.bound, **how)
    report["rows"] = evaluate.loop_rows(model, text, found)
    print(_loop_table(report["rows"]), flush=True)
    if other is not None:
        evaluate.place(other)
        its = [S if other.max_loops > 1 else 1 for S in loops]
        unique = list(dict.fromkeys(its))
        theirs = evaluate.measure(other, its_text, unique, bound=options.bound, **how)
        rows = evaluate.compare_rows(found, theirs, its)
        said = {"packing": its_text.packing, "trained_on": its_text.trained_on}
        report["compare"] = {"folder": str(options.compare), **said, "rows": rows}
        packed = "" if its_text.packing == text.packing else f", which reads them with packing {its_text.packing}"
        print(f"\nAgainst {options.compare}{packed}, on the same masks (below 0: this model is better):")
        print("\n".join((*its_text.seen(), _compare_table(rows))))
    if options.by_time:
        profile = evaluate.time_profile(model, text, loops, options.bins, **how)
        report["by_time"] = evaluate.time_rows(profile)
        print(f"\nNELBO given t (t = 1: all masked), nats a token, and gain over S = {loops[0]}:")
        print(_time_table(report["by_time"]), flush=True)
    if options.generate:
        report["generated"] = evaluate.generated(
            model, tokenizer, text, loops, options.generate, steps=options.steps, scorer=scorer, seed=options.seed
        )
        print("\n" + _generated_text(report["generated"]))
    if options.json:
        write(Path(options.json), json.dumps(report, indent=2, allow_nan=False) + "\n")
        print(f"\nWrote {options.json}")
    if options.plot:
        plots.evaluation(Path(options.plot), report)
        print(f"{'' if options.json else chr(10)}Drew {options.plot}")
    return 0


def check_numbers(options: argparse.Namespace, *names: str) -> None:
    """What only counts later is checked before anything is measured."""
    signed(options.seed)
    for name in names:
        whole(f"--{name}", getattr(options, name))


def loop_counts(options: argparse.Namespace) -> list[int]:
    """S of --loops, each once; none if it is not given."""
    given = numbers("loops", options.loops) if options.loops is not None else []
    return list(dict.fromkeys(check_loops(S, "--loops") for S in given))


def check_outputs(*files: str | None) -> None:
    """A file that could not be written is said before anything is measured."""
    for name in files:
        if name is not None and not Path(name).absolute().parent.is_dir():
            raise InputError(f"there is no folder {Path(name).parent} to write {Path(name).name} into")
        if name is not None and Path(name).is_dir():
            raise InputError(f"{name} is a folder; a file name is needed")


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def pm(mean: float, error: float | None, digits: int = 4) -> str:
    """1.2345 ± 0.0012; ± ? where a single window has no error."""
    return f"{mean:.{digits}f} ± {'?' if error is None else f'{error:.{digits}f}'}"


def _loop_table(rows: list[dict[str, Any]]) -> str:
    cells = [("S", "layers", "FLOPs a token", "nats a token", "bits", "bits a character", "perplexity", "gain, nats")]
    for i, r in enumerate(rows):
        cells.append(
            (
                str(r["loops"]),
                str(r["layers"]),
                si(r["flops_per_token"]),
                pm(r["nats"], r["error"]),
                f"{r['bits']:.3f}",
                "" if r["bits_per_character"] is None else f"{r['bits_per_character']:.3f}",
                f"{r['perplexity']:,.2f}",
                pm(r["gain"], r["gain_error"]) if i else "",
            )
        )
    return table(cells)


def _compare_table(rows: list[dict[str, Any]]) -> str:
    cells = [("S", "the other's S", "its nats a token", "difference")]
    for r in rows:
        cells.append(
            (str(r["loops"]), str(r["other_loops"]), f"{r['other_nats']:.4f}", pm(r["difference"], r["error"]))
        )
    return table(cells)


def _time_table(by_time: dict[str, Any]) -> str:
    first, *rest = by_time["loops"]
    cells = [("t", f"S = {first}", *(f"gain at S = {S}" for S in rest))]
    for b, row in enumerate(by_time["nats"]):
        gains = (pm(by_time["gain"][b][i], by_time["gain_error"][b][i], 3) for i in range(1, len(by_time["loops"])))
        low, high = by_time["edges"][b : b + 2]
        cells.append((f"{low:.3f}-{high:.3f}", pm(row[0], by_time["error"][b][0], 3), *gains))
    return table(cells)


def _generated_text(found: dict[str, Any]) -> str:
    scored = found["scorer"] is not None
    judged = f"judged by {found['scorer']}" if scored else "not judged: give --scorer for a perplexity"
    head = [
        f"{found['samples']} samples of {found['length']} tokens at each S, {found['steps']} steps, "
        f"{found['policy']} policy; {judged}.",
        "A low perplexity with less entropy than the text's own is repetition, not quality.",
    ]
    names = (
        "",
        *(("perplexity", "nats a token") if scored else ()),
        "entropy, nats",
        "distinct-1",
        "-2",
        "-3",
        "FLOPs",
    )
    cells = [names]
    for r in found["rows"]:
        cells.append(
            (
                "the text" if r["loops"] is None else f"S = {r['loops']}",
                *((f"{r['perplexity']:,.2f}", pm(r["nats"], r["error"], 3)) if scored else ()),
                pm(r["entropy"], r["entropy_error"], 3),
                *(f"{r[f'distinct_{n}']:.3f}" for n in (1, 2, 3)),
                "" if r["flops"] is None else si(r["flops"]),
            )
        )
    return "\n".join((*head, table(cells)))
