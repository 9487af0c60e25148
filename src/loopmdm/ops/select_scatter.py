"""select_scatter: rank the positions of each sequence, take a prefix, write its tokens; remasking and ends included."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, nearest, whole
from .contract import Op
from .native import watched
from .select_topk import ranking

RULES = ("top_k", "threshold", "factor", "sum")
_UNIT = 2.0**36  # costs of "sum" are whole numbers of 1 / _UNIT, at most _MOST each
_MOST, _LONGEST = 2**44, 2**18


class Step(NamedTuple):
    """What `select_scatter` wrote.

    tokens int64, masked bool, done bool [B]: the tensors that were given, updated; revealed, remasked: bool [B, T].
    """

    tokens: Tensor
    masked: Tensor
    done: Tensor
    revealed: Tensor
    remasked: Tensor


def select_scatter(
    scores: Tensor,
    proposed: Tensor,
    tokens: Tensor,
    masked: Tensor,
    eligible: Tensor,
    k: Tensor,
    *,
    mask_id: int,
    rule: str = "top_k",
    bound: Tensor | None = None,
    remask: bool = False,
    again: Tensor | None = None,
    eos: Tensor | None = None,
    ends: Tensor | None = None,
    done: Tensor | None = None,
    impl: str = "auto",
) -> Step:
    """The writing half of an unmasking step, in place and without asking the host.

    In each sequence the eligible masked positions are ranked as by `select_topk`: larger scores first, NaN last,
    equal ones by lower index. The n-th is revealed while n <= k or the rule holds for it, and nothing behind the first
    one that is not:

        top_k       never more than k (MaskGIT, Chang et al. 2022, section 3.2; LLaDA, Nie et al. 2025)
        threshold   score >= bound, in fp32 (Fast-dLLM, arXiv 2505.22618)
        factor      score >= 1 - bound / (n + 1), as (1 - score) (n + 1) <= bound in float64 (Fast-dLLM's factor)
        sum         the sum of -score over those before it <= bound (EB-Sampler, arXiv 2505.24857, with score
                    -entropy), each rounded up to a multiple of 2^-36 and at most 256, scores above 0 counting 0

    A rule with k = 1 takes at least one. A masked position whose proposed token is below 0 is not eligible.

    Args:
        scores: fp32 [B, T]; proposed: int64 [B, T], the token of each position if it is revealed.
        tokens: int64 [B, T]; masked: bool [B, T], positions to be filled. Both are written.
        eligible: bool [B, T]. Where `remask` is off only its masked positions are ranked.
        k: int64 [B], any value.
        mask_id: what remasking writes.
        rule: one of the four; bound: float64 [B], of every rule but top_k. Below 0 or NaN: factor and sum never hold.
        remask: rank the filled eligible positions too, and mask those that are not taken.
        again: bool [B, T], filled positions to mask in any case.
        eos: int64 [E], ids that end a sequence; ends: bool [B, T], where they count.
        done: bool [B], sequences left alone; written True where an EOS has nothing masked before it, or where nothing
            is masked any more and there is neither `remask` nor `again`. None is a new one.
        impl: "auto", "torch", "cpp" (CPU) or "cuda".

    Returns:
        Step(tokens, masked, done, revealed, remasked); the first three are the tensors given.

    Raises:
        InputError: a wrong dtype, shape or device, an unknown rule, one without its bound, `eos` without `ends`, "sum"
            on more than 2^18 positions, or an `impl` that cannot run here.
    """
    _check(scores, proposed, tokens, masked, eligible, k, rule, bound, again, eos, ends, done)
    if whole("mask_id", mask_id, -(2**63)) >= 2**63:
        raise InputError(f"mask_id is {mask_id}; it must be below 2^63")
    if done is None:
        done = masked.new_zeros(masked.shape[:1], dtype=torch.bool)
    if bound is None:
        bound = torch.zeros_like(k, dtype=torch.float64)
    if eos is None:
        eos = k[:0]
    args = (scores, proposed, tokens, masked, eligible, k, bound, eos, again, ends, done, rule, mask_id, remask, impl)
    if impl == "torch":
        revealed, remasked = _reference(*args)
    elif watched(scores, proposed, tokens, masked, eligible):
        revealed, remasked = _select_scatter(*args)
    else:  # the op's own dispatch takes ten times as long as what it calls
        revealed, remasked = _run(*args)
        torch.autograd.graph.increment_version((tokens, masked, done))
    return Step(tokens, masked, done, revealed, remasked)


def _check(
    scores: Tensor,
    proposed: Tensor,
    tokens: Tensor,
    masked: Tensor,
    eligible: Tensor,
    k: Tensor,
    rule: str,
    bound: Tensor | None,
    again: Tensor | None,
    eos: Tensor | None,
    ends: Tensor | None,
    done: Tensor | None,
) -> None:
    if not isinstance(rule, str):
        raise InputError(f"rule is a {type(rule).__name__}; it must be one of {', '.join(RULES)}")
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}{nearest(rule, RULES)}")
    if bound is None and rule != "top_k":
        raise InputError(f"rule {rule!r} needs a bound, float64 [B]")
    if (eos is None) != (ends is None):
        raise InputError("eos and ends come together: the ids that end a sequence, and where they count")
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        found = list(scores.shape) if isinstance(scores, Tensor) else repr(scores)
        raise InputError(f"scores is {found}; select_scatter takes a float32 tensor [B, T]")
    shape, rows = tuple(scores.shape), tuple(scores.shape[:1])
    if rule == "sum" and shape[1] > _LONGEST:
        raise InputError(f"there are {shape[1]} positions; rule 'sum' takes at most {_LONGEST}")
    ids = (eos.numel(),) if isinstance(eos, Tensor) else (1,)
    optional = ("bound", "again", "eos", "ends", "done")
    wanted: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("scores", scores, torch.float32, shape),
        ("proposed", proposed, torch.int64, shape),
        ("tokens", tokens, torch.int64, shape),
        ("masked", masked, torch.bool, shape),
        ("eligible", eligible, torch.bool, shape),
        ("k", k, torch.int64, rows),
        ("bound", bound, torch.float64, rows),
        ("again", again, torch.bool, shape),
        ("eos", eos, torch.int64, ids),
        ("ends", ends, torch.bool, shape),
        ("done", done, torch.bool, rows),
    ]
    for name, x, dtype, size in wanted:
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is {x!r}; it must be a tensor")
        if x.dtype != dtype or tuple(x.shape) != size:
            kind, want = (str(d).removeprefix("torch.") for d in (x.dtype, dtype))
            raise InputError(f"{name} is {kind} {list(x.shape)}; it must be {want} {list(size)}")
        if x.device != scores.device:
            raise InputError(f"{name} is on {x.device} and scores on {scores.device}; move them to one device")
    for name, x in (("tokens", tokens), ("masked", masked), ("done", done)):
        if x is not None and not x.is_contiguous():
            raise InputError(f"{name} is written in place and must be contiguous")


def _reference(
    scores: Tensor,
    proposed: Tensor,
    tokens: Tensor,
    masked: Tensor,
    eligible: Tensor,
    k: Tensor,
    bound: Tensor,
    eos: Tensor,
    again: Tensor | None,
    ends: Tensor | None,
    done: Tensor,
    rule: str,
    mask_id: int,
    remask: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    T, busy = scores.shape[1], ~done[:, None]
    column = torch.arange(T, device=scores.device)
    ranked = eligible & torch.where(masked, proposed >= 0, remask)
    order = ranking(scores, ranked)  # [B, T], position at each rank
    n = column + 1
    holds = (n <= k[:, None]) | _HOLDS[rule](scores.gather(1, order), n, bound[:, None])
    take = (holds & (column < ranked.sum(1, keepdim=True))).long().cumprod(1).bool()
    picked = torch.zeros_like(masked).scatter(1, order, take)
    show = picked & masked & busy
    hide = ranked & ~picked & ~masked & busy
    if again is not None:
        hide |= again & ~masked & busy
    tokens.copy_(torch.where(show, proposed, tokens).masked_fill_(hide, mask_id))
    masked.copy_(masked & ~show | hide)
    over = ~masked.any(1) if not remask and again is None else torch.zeros_like(done)
    if ends is not None and T:
        first_end = torch.where(ends & ~masked & torch.isin(tokens, eos), column, T).min(1).values
        over |= first_end < torch.where(masked, column, T).min(1).values
    done |= over
    return show, hide


def _sum_holds(values: Tensor, n: Tensor, bound: Tensor) -> Tensor:
    costs = torch.where(values < 0, (-values.double() * _UNIT).ceil().clamp(max=_MOST), 0.0).long()
    before = costs.cumsum(1) - costs
    return (bound >= 0) & (values >= torch.finfo(torch.float32).min) & (before.double() <= bound * _UNIT)


_HOLDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "top_k": lambda values, n, bound: torch.zeros_like(values, dtype=torch.bool),
    "threshold": lambda values, n, bound: values >= bound.float(),
    "factor": lambda values, n, bound: (bound >= 0) & ((1 - values.double()) * (n + 1) <= bound),
    "sum": _sum_holds,
}


def _run(
    scores: Tensor,
    proposed: Tensor,
    tokens: Tensor,
    masked: Tensor,
    eligible: Tensor,
    k: Tensor,
    bound: Tensor,
    eos: Tensor,
    again: Tensor | None,
    ends: Tensor | None,
    done: Tensor,
    rule: str,
    mask_id: int,
    remask: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows, cols = scores.shape
    chosen = OP.choose(impl, scores.device, scores.dtype, rows=rows, cols=cols).impl
    if chosen == "torch" or scores.numel() == 0:
        return _reference(
            scores, proposed, tokens, masked, eligible, k, bound, eos, again, ends, done, rule, mask_id, remask, impl
        )
    native = importlib.import_module("loopmdm._C")

    revealed, remasked = torch.empty_like(masked), torch.empty_like(masked)
    given = [scores, proposed, eligible, again, ends, k, bound, eos]
    read = [x if x is None else x.contiguous() for x in given]
    pointers = [0 if x is None else x.data_ptr() for x in (*read, tokens, masked, revealed, remasked, done)]
    where = (pointers, rows, cols, mask_id, len(eos), RULES.index(rule), remask)
    if chosen == "cpp":
        native.select_scatter_cpu(*where, torch.get_num_threads())
    else:
        native.select_scatter_cuda(*where, scores.device.index, torch.cuda.current_stream(scores.device).cuda_stream)
    return revealed, remasked


_select_scatter = torch.library.custom_op("loopmdm::select_scatter", _run, mutates_args=("tokens", "masked", "done"))


@_select_scatter.register_fake
def _(
    scores: Tensor,
    proposed: Tensor,
    tokens: Tensor,
    masked: Tensor,
    eligible: Tensor,
    k: Tensor,
    bound: Tensor,
    eos: Tensor,
    again: Tensor | None,
    ends: Tensor | None,
    done: Tensor,
    rule: str,
    mask_id: int,
    remask: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(masked), torch.empty_like(masked)


def _problem(rule: str, bounds: tuple[float, ...], **options: bool) -> Callable[..., dict[str, Any]]:
    def example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
        shape = (5, 1237)
        scores = torch.rand(shape, generator=rng).mul(64).round().div(64)  # coarse, so that ties decide
        scores = -scores if rule == "sum" else scores
        for value in (float("nan"), float("inf"), float("-inf"), -0.0):
            scores[torch.rand(shape, generator=rng) < 0.02] = value
        flags = {"masked": 0.7, "eligible": 0.8, **{name: 0.1 for name in ("again", "ends") if options.get(name)}}
        made = {name: torch.rand(shape, generator=rng) < share for name, share in flags.items()}
        made["masked"][3, :400] = False  # so that its EOS has nothing masked before it
        made["done"] = torch.tensor([False, False, True, False, False])
        made |= {"tokens": torch.randint(0, 50, shape, generator=rng), "scores": scores}
        made |= {"proposed": torch.randint(-1, 50, shape, generator=rng)}
        made |= {"k": torch.tensor([0, 1, 3, 300, 5000]), "bound": torch.tensor(bounds, dtype=torch.float64)}
        if "ends" in made:
            made["eos"] = torch.tensor([3, 4, 49])
        moved = {name: x.to(device) for name, x in made.items()}
        return {**moved, "rule": rule, "mask_id": 50, "remask": options.get("remask", False)}

    return example


OP = Op(
    name="select_scatter",
    call=select_scatter,
    examples=(
        _problem("top_k", (0.0, 1.0, 2.0, 3.0, 4.0), remask=True, ends=True),
        _problem("threshold", (0.9, 0.5, 0.1, -1.0, 2.0), again=True),
        _problem("factor", (1.0, 8.0, 3.0, 40.0, 0.0)),
        _problem("sum", (0.1, 30.0, 1e9, 0.0, -1.0), ends=True),
    ),
    impls=("torch", "cpp", "cuda"),
    dtypes=(torch.float32,),
    tolerance={torch.float32: 0.0},
)
