"""`loopmdm schedule`: fill a table of S by noise level for a budget of FLOPs."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from .common import Parser, si, table
from .eval import check_numbers, check_outputs, data_options, loop_counts, pm


def options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a run's folder, or the model/ in it")
    data_options(parser)
    parser.add_argument(
        "--budget", type=float, default=0.5, help="FLOPs, as a share of those of the largest S everywhere (default 0.5)"
    )
    parser.add_argument("--bins", type=int, default=8, help="of t, the share of masked tokens (default 8)")
    parser.add_argument("--loops", metavar="S,S,...", help="S to choose from (default: 1, 2, 4, ... S_max)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the table goes (default: depth.json beside the model, for sample --loops auto)",
    )


def run(options: argparse.Namespace) -> int:
    if not 0 < options.budget <= 1:
        raise InputError(
            f"--budget is {options.budget}; it is a share of the FLOPs of the largest S, above 0 and at most 1"
        )
    check_outputs(options.out)
    check_numbers(options, "samples", "bins")
    from ..lab import budget, evaluate, measured
    from ..lab.sample import load, model_folder
    from ..sampling.depth import DEPTH_FILE

    model, tokenizer = load(options.folder)
    top = model.max_loops
    loops = loop_counts(options) or [S for S in evaluate.default_loops(top) if top >= S]
    loops = sorted(loops)
    if len(loops) < 2:
        raise InputError(f"there is only S = {loops[0]} to choose from; a table needs at least two")
    text = measured.read(options.folder, model, tokenizer, options.data, length=options.length, limit=options.windows)
    cost = [model.forward_flops(text.length, S) for S in loops]
    budget.check(len(text.windows), cost, options.budget)
    evaluate.place(model)
    print("\n".join(text.describe()), flush=True)
    profile = evaluate.time_profile(model, text, loops, options.bins, samples=options.samples, seed=options.seed)
    made = budget.spend(profile, cost, options.budget)
    print(
        f"NELBO given t (t = 1: all masked), nats a token, {options.samples} corruptions a window and bin, the same "
        "for every S:\n"
    )
    print(_table(evaluate.time_rows(profile), made.table.loops))
    print(
        f"\nChosen on half of the windows for {options.budget:.0%} of the FLOPs of S = {loops[-1]}; on the other half:"
    )
    print(_verdict(made, cost, loops, text.length))
    if not made.sure:
        name, _, gain, error = made.same_cost
        print(
            f"Warning: the table's gain over constant S of the same cost, {pm(gain, error)}, is inside the error; "
            f"constant S ({name}) does as well here."
        )
    path = options.out or model_folder(options.folder) / DEPTH_FILE
    made.table.save(
        path,
        budget=options.budget,
        held_out=made.facts(),
        measured_on=text.facts(),
        settings={"samples": options.samples, "seed": options.seed, "loops": loops, "bins": options.bins},
    )
    print(f"\nWrote {path}" + ("" if options.out else f"; use it: loopmdm sample {options.folder} --loops auto"))
    return 0


def _table(by_time: dict[str, Any], chosen: Any) -> str:
    first, *rest = by_time["loops"]
    cells = [("t", f"S = {first}", *(f"gain at {S}" for S in rest), "chosen S")]
    for b, row in enumerate(by_time["nats"]):
        gains = (pm(by_time["gain"][b][i], by_time["gain_error"][b][i], 3) for i in range(1, len(by_time["loops"])))
        low, high = by_time["edges"][b : b + 2]
        cells.append((f"{low:.3f}-{high:.3f}", pm(row[0], by_time["error"][b][0], 3), *gains, str(chosen[b])))
    return table(cells)


def _verdict(made: Any, cost: list[float], loops: list[int], length: int) -> str:
    top = max(cost) / length
    cells = [("", "FLOPs a token", "NELBO, nats a token", "gain of the table")]
    cells.append(("the table", f"{si(made.share * top)} ({made.share:.0%})", pm(made.nelbo, made.error), ""))
    for (name, nelbo, gain, error), flops in ((made.same_cost, made.share * top), (made.deepest, top)):
        cells.append((name, si(flops), f"{nelbo:.4f}", pm(gain, error)))
    return table(cells)
