"""Where two models that should be the same first differ: `check_parity(peer, ours, ids)`.

Both models run on the same tokens. In a second pass every layer of ours is given what the peer's layer was given, so
that each layer is judged by itself, and inside it each stage that a transformer layer has:

    norm before attention -> qkv projection -> attention -> output projection -> norm before the MLP
    -> MLP's first projection -> activation -> MLP's last projection

Stages are found from the linear layers that run, in order, those of one input belonging together. Projections are
compared as sets of numbers at each position, since codebases lay q, k, v, gate and up out differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.denoiser import evaluating
from ..model.lm import LoopMDM
from ..ops.contract import on_torch

STAGES = (
    ("norm before attention", "qkv projection"),
    ("attention", "output projection"),
    ("norm before the MLP", "MLP's first projection"),
    ("activation", "MLP's last projection"),
)
LOOK_AT = {
    "embeddings": "tokens, positions, a scale of the embedding, its dtype",
    "norm before attention": "the norm's kind, eps and weight; modulation and its order",
    "qkv projection": "weights and biases of q, k and v",
    "attention": "rotation (layout, base, sign, dtype), norms of q and k and their place, mask, order of q, k and v",
    "output projection": "its weight and bias",
    "norm before the MLP": "the first residual (gate, dtype); the norm's kind, eps and weight",
    "MLP's first projection": "weights and biases",
    "activation": "the activation; gate and up exchanged",
    "MLP's last projection": "its weight and bias",
    "output": "the second residual (gate, dtype)",
    "final norm": "the norm's kind, eps and weight; a modulation before the head",
    "logits": "the head's weight and bias, tied or not; a scale of the logits",
}
ULPS = 42
"""Default tolerance in units of the dtype's epsilon, relative to the root mean square: 5e-6 in fp32."""

Call = Callable[[Any, Tensor], Any]


@dataclass(frozen=True)
class Place:
    """One place of the comparison: its name, the error as the models run, and the error that arises at this place.

    Errors are largest absolute differences over the root mean square of the peer's values; None where one of the
    models does not show the place.
    """

    name: str
    error: float | None
    own: float | None


@dataclass(frozen=True)
class Parity:
    """The result of `check_parity`.

    Attributes:
        places: in the order of computation.
        tolerance: what `own` is held against.
        first: name of the first place whose own error is larger; None if there is none.
        logits: error of the logits as the models run; None if not compared.
    """

    places: tuple[Place, ...]
    tolerance: float
    first: str | None
    logits: float | None

    @property
    def equal(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        def cell(value: float | None) -> str:
            return "-" if value is None else f"{value:.1e}"

        layer = (self.first or "").partition(":")[0]
        rows = [p for p in self.places if p.name.startswith(f"{layer}:") or p.name.partition(": ")[2] in ("", "output")]
        width = max(len(place.name) for place in rows)
        lines = [f"{'place':{width}}  as run   by itself"]
        for place in rows:
            mark = "  <- first difference" if place.name == self.first else ""
            lines.append(f"{place.name:{width}}  {cell(place.error):7}  {cell(place.own)}{mark}")
        if self.first is None:
            return "\n".join([*lines, f"equal within {self.tolerance:.1e}"])
        what = LOOK_AT[self.first.rpartition(": ")[2]]
        return "\n".join([*lines, f"they first differ at {self.first!r}; look at: {what}"])


@dataclass
class _Seen:
    """What one pass showed: layer inputs and outputs, linear layers inside each, the head's input, logits."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    linears: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    final: Tensor | None = None
    logits: Tensor | None = None


@torch.no_grad()
def check_parity(
    peer: nn.Module,
    ours: nn.Module,
    ids: Tensor,
    *,
    peer_call: Call | None = None,
    ours_call: Call | None = None,
    peer_layers: Sequence[nn.Module] | None = None,
    ours_layers: Sequence[nn.Module] | None = None,
    tolerance: float | None = None,
    show: bool = True,
) -> Parity:
    """Run two models that should compute the same and name the place where they first differ.

    Meant for fp32 or float64 weights: bf16 hides small mistakes (a wrong eps) below its rounding.

    Args:
        peer: the model that is right, any module with a list of transformer layers.
        ours: the model to check: a LoopMDM (run at S = 1), a patched copy of the peer, or any other module.
        ids: integers [B, T], some of them the mask.
        peer_call, ours_call: how to run them, (model, ids) -> logits, an object with `.logits`, or a tuple of logits
            first; None is `model(ids)`. For example `lambda m, x: m(x, torch.zeros(len(x)))` for MDLM's noise level.
        peer_layers, ours_layers: their layers in order; None is the longest ModuleList.
        tolerance: for each place by itself, relative; None is 42 epsilons of the peer's dtype.
        show: print a table: every layer's output, and the stages of the layer where they first differ.

    Returns:
        A `Parity`; the models are left as they were.

    Raises:
        InputError: no layers found, or different numbers of them.
    """
    theirs, mine = list(peer_layers or _layers(peer)), list(ours_layers or _layers(ours))
    if len(theirs) != len(mine):
        raise InputError(f"the peer has {len(theirs)} layers and ours {len(mine)}; give peer_layers and ours_layers")
    # on torch's own operations: whether it is the same model is the question, not how a kernel rounds
    with on_torch(), evaluating(peer), evaluating(ours):  # type: ignore[arg-type]
        want = _run(peer, theirs, ids, peer_call)
        free = _run(ours, mine, ids, ours_call)
        for name, seen in (("the peer", want), ("ours", free)):
            if len(seen.outputs) != len(mine):
                raise InputError(
                    f"of {name} {len(seen.outputs)} of {len(mine)} layers ran in order; name those that do"
                )
        led = _run(ours, mine, ids, ours_call, lead=want)
    if tolerance is None:
        tolerance = ULPS * torch.finfo(want.outputs[0].dtype).eps
    places = _places(ours, want, free, led)
    first = next((p.name for p in places if p.own is not None and not p.own <= tolerance), None)
    result = Parity(tuple(places), tolerance, first, places[-1].error if places[-1].name == "logits" else None)
    if show:
        print(result)
    return result


def _places(ours: nn.Module, want: _Seen, free: _Seen, led: _Seen) -> list[Place]:
    def place(name: str, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> None:
        places.append(Place(name, _error(a, b), _error(a, c)))

    places: list[Place] = []
    place("embeddings", want.inputs[0], free.inputs[0], free.inputs[0])
    for i in range(len(want.inputs)):
        stages = [_stages(seen.linears[i], seen.inputs[i]) for seen in (want, free, led)]
        if all(len(stage) == len(STAGES) for stage in stages):
            for (into, outof), a, b, c in zip(STAGES, *stages, strict=True):
                place(f"layer {i}: {into}", a[0], b[0], c[0])
                place(f"layer {i}: {outof}", a[1], b[1], c[1])
        place(f"layer {i}: output", want.outputs[i], free.outputs[i], led.outputs[i])
    if want.final is not None and free.final is not None:
        place("final norm", want.final, free.final, led.final)
    if want.logits is not None and free.logits is not None:
        place("logits", *_common(want.logits, free.logits, _forced(ours, want, led)))
    return places


def _forced(ours: nn.Module, want: _Seen, led: _Seen) -> Tensor | None:
    """Our head on the peer's final states, where the two can be had apart; else the logits after the peer's layers."""
    head = getattr(ours, "head", None)
    if want.final is None or not callable(head) or isinstance(head, nn.Module):
        return led.logits
    weight, bias = head()
    return nn.functional.linear(want.final.to(weight.dtype), weight, bias)


def _common(*logits: Tensor | None) -> tuple[Tensor | None, ...]:
    """The columns that all have and none suppresses (-inf, or MDLM's -1e6)."""
    present = [x for x in logits if x is not None]
    width = min(x.shape[-1] for x in present)
    kept = torch.stack([(x[..., :width] > -1e5).flatten(0, -2).all(0) for x in present]).all(0)
    return tuple(None if x is None else x[..., :width][..., kept] for x in logits)


def _error(want: Tensor | None, got: Tensor | None) -> float | None:
    if want is None or got is None:
        return None
    if want.numel() != got.numel():
        return float("inf")
    a, b = want.double().flatten(), got.double().flatten()
    worst, scale = (a - b).abs().max(), a.square().mean().sqrt()
    return float("inf") if not torch.isfinite(worst) else float(worst / scale) if scale else float(worst > 0)


def _stages(calls: list[tuple[Tensor, Tensor]], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Linear layers one after the other, those of one input joined: (input, sorted outputs) of each."""
    rows = x.numel() // x.shape[-1]
    groups: list[tuple[Tensor, list[Tensor]]] = []
    for into, out in calls:
        if into.numel() != rows * into.shape[-1]:
            continue  # of the conditioning, say
        if groups and groups[-1][0].shape == into.shape and torch.equal(groups[-1][0], into):
            groups[-1][1].append(out)
        else:
            groups.append((into, [out]))
    flat = [(into.reshape(rows, -1), torch.cat([o.reshape(rows, -1) for o in outs], -1)) for into, outs in groups]
    return [(into, out.sort(-1).values) for into, out in flat]


def _run(model: nn.Module, layers: list[nn.Module], ids: Tensor, call: Call | None, lead: _Seen | None = None) -> _Seen:
    """One pass with hooks; with `lead` every layer, and what follows the last, is given what the peer's was given."""
    seen = _Seen()
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.enter_context(_watched(layer, i, seen, lead, last=i == len(layers) - 1))
        inside = {id(m) for layer in layers for m in layer.modules()}
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]

        def head_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(seen.outputs) == len(layers) and args[0].shape[:-1].numel() == ids.numel():
                seen.final = args[0].detach().reshape(*ids.shape, -1)

        for module in heads:
            stack.callback(module.register_forward_pre_hook(head_hook).remove)
        if isinstance(model, LoopMDM) and call is None:
            out = model(ids, num_loops=1)
        else:
            out = model(ids) if call is None else call(model, ids)
    if isinstance(out, Tensor) or not hasattr(out, "logits"):
        out = out[0] if isinstance(out, tuple) else out
        seen.logits = out.detach() if isinstance(out, Tensor) else None
    else:
        seen.logits = out.logits.detach()
    if isinstance(getattr(out, "hidden", None), Tensor):
        seen.final = out.hidden.detach()
    return seen


@contextmanager
def _watched(layer: nn.Module, i: int, seen: _Seen, lead: _Seen | None, last: bool) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(seen.inputs) != i:
            return None  # a further visit of a looped layer
        if lead is not None:
            given = lead.inputs[i]
            if args:
                args = (given.to(args[0].dtype), *args[1:])
            else:
                name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
                kwargs = {**kwargs, name: given.to(kwargs[name].dtype)}
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        seen.inputs.append(x.detach().clone())
        seen.linears.append([])
        return args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if len(seen.outputs) != i:
            return None
        x = output[0] if isinstance(output, tuple) else output
        seen.outputs.append(x.detach().clone())
        if lead is None or not last:
            return None
        given = lead.outputs[i].to(x.dtype)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    def linear(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if len(seen.outputs) == i and len(seen.linears) == i + 1:
            seen.linears[i].append((args[0].detach().clone(), output.detach().clone()))

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
        *(m.register_forward_hook(linear) for m in layer.modules() if isinstance(m, nn.Linear)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, LoopMDM):
        return list(model.layers)
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no ModuleList of layers; give peer_layers or ours_layers")
    return max(lists, key=len)
