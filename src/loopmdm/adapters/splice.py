"""loopify: visit a run of a trained model's layers S times, whatever its code.

Layers stay registered where they are. The last layer of the run drives the loop: its forward runs itself, then the
whole run S - 1 more times with the arguments that it received. So keys, modules and S = 1 are untouched, and the
codebase's own forward does not know. Forward hooks of the last layer see the loop's result, once; those of the others
every visit.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import check_loops
from ..errors import InputError, number, whole
from ..model.depth import Depth, apart, check_over, planned, stops
from .passes import Loops, Pass, current, during, recomputing, remember
from .patching import _replaced, is_ours, own_forward, recognise, unknown, wire

Model = TypeVar("Model", bound=nn.Module)

CACHES = ("layer_past", "layers_past", "past_key_value", "past_key_values", "use_cache")
FORMAT = 1


class Loop:
    """The settings of one looped run of layers, and its driver."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        start: int,
        num_loops: Loops,
        damping: float,
        batched: Mapping[str, int] | None,
    ) -> None:
        self.layers, self.start, self.damping, self.batched = list(layers), start, damping, batched
        self.num_loops: Loops = num_loops
        self.first = next(iter(inspect.signature(own_forward(self.layers[-1])).parameters))

    def __str__(self) -> str:
        end = self.start + len(self.layers) - 1
        run = f"layer {end}" if len(self.layers) == 1 else f"layers {self.start}..{end}"
        damping = "" if self.damping == 1 else f", damped by {self.damping:g}"
        return f"{run}, S = {self.num_loops!r}{damping}"

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a looped model cannot be pickled whole; save its state_dict, and its loops with save_loops, and call "
            "load_loops on the model that you build anew"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Loop:
        memo[id(self)] = twin = object.__new__(Loop)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def drive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = own_forward(self.layers[-1])(*args, **kwargs)
        now = current()
        asked, positions = now.of(self)
        if callable(asked):
            if recomputing():
                raise InputError(
                    "gradient checkpointing computes this layer again, and a schedule cannot be asked twice for the S "
                    "of a pass; checkpoint with use_reentrant=False, or set a number (set_num_loops)"
                )
            asked = asked()
            now = now.with_loop(self, asked, positions)
        if not (isinstance(asked, int) and asked == 1):
            out = self._visits(out, asked, positions, args, kwargs)
        remember(out, now)
        return out

    def _visits(
        self, out: Any, asked: Loops, positions: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._refuse_caches(args, kwargs)
        x = out[0] if isinstance(out, tuple) else out
        loops, depth = planned(asked, 1, len(x))  # type: ignore[arg-type]
        if isinstance(loops, Tensor):
            (last,), visits = apart(_Walk(self, x, depth, positions, args, kwargs), loops)
            assert last is not None
            x, depth.visits = last, visits.to(x.device)
        else:
            x = self._together(x, loops, depth, args, kwargs)
        if isinstance(asked, Depth):
            asked.visits = torch.full((len(x),), loops, device=x.device) if isinstance(loops, int) else depth.visits
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def _together(self, x: Tensor, loops: int, depth: Depth, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if depth.every:
            raise InputError("a loopified model does not keep every visit's output; leave out Depth.every")
        cut = max(0, loops - (depth.backprop_loops or loops))
        for k in range(1, loops + 1):
            if k > 1:
                with torch.no_grad() if k <= cut else nullcontext():
                    x = self._visit(x, args, kwargs, depth.checkpoint)
            if k == cut:
                x = x.detach()
        return x

    def _visit(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], recompute: bool = False) -> Tensor:
        if recompute and torch.is_grad_enabled():
            return checkpoint(self._again, current(), x, args, kwargs, use_reentrant=False)
        before = x
        for layer in self.layers:
            call = own_forward(layer) if layer is self.layers[-1] else layer
            out = call(x, *args[1:], **kwargs) if args else call(**{**kwargs, self.first: x})
            x = out[0] if isinstance(out, tuple) else out
        return x if self.damping == 1 else torch.lerp(before, x, self.damping)

    def _again(self, now: Pass, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with during(now):
            return self._visit(x, args, kwargs)

    def _refuse_caches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.bound(args, kwargs)
        for name in CACHES:
            if given.get(name) is not None and given[name] is not False:
                raise InputError(
                    f"a looped run of layers cannot keep a key/value cache, and {name} is given; call the model with "
                    "use_cache=False and no past_key_values"
                )

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        names = inspect.signature(own_forward(self.layers[-1])).parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}


class _Walk:
    """The sequences of one pass that have not left the loop; a `depth.Walk`. Visit 1 is over when it begins."""

    def __init__(
        self,
        loop: Loop,
        x: Tensor,
        depth: Depth,
        positions: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.loop, self.depth, self.x, self.now = loop, depth, x, current()
        self.previous: Tensor | None = None
        self.batched, self.positions = self._batched(), positions
        if depth.early_exit is not None and positions is None:
            over = check_over(getattr(depth.early_exit, "over", "sequence"))
            if over == "masked":
                raise InputError("an exit rule over the masked positions needs as_denoiser, which knows them")
        self.names = list(inspect.signature(own_forward(loop.layers[-1])).parameters)[: len(args)]
        self.args, self.kwargs = args, kwargs

    def _batched(self) -> Mapping[str, int]:
        if self.loop.batched is not None:
            return self.loop.batched
        layer = self.loop.layers[-1]
        family = recognise(layer)
        if family is None:
            raise InputError(
                f"which arguments of {type(layer).__name__} are batched is not known, so its sequences must make equal "
                "visits; pass loopify(batched={name: number of dimensions})"
            )
        return family.batched

    def visit(self, k: int) -> None:
        if k > 1:
            self.previous = self.x
            with during(self.now):
                self.x = self.loop._visit(self.x, self.args, self.kwargs, self.depth.checkpoint)
        remember(self.x, self.now)  # its rows of the mask

    def stops(self, k: int) -> Tensor | None:
        rule = self.depth.early_exit
        if rule is None or self.previous is None:
            return None  # the run's input, to which visit 1 would compare, was not kept
        return stops(rule, self.previous, self.x, k, self.positions)

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.x.device)
        self.x = self.x[rows]
        self.args = tuple(self._pick(name, part, rows) for name, part in zip(self.names, self.args, strict=True))
        self.kwargs = {name: self._pick(name, part, rows) for name, part in self.kwargs.items()}
        self.positions = None if self.positions is None else self.positions[rows]
        self.now = replace(self.now, mask=_rows(self.now.mask, rows, 4))

    def _pick(self, name: str, part: Any, rows: Tensor) -> Any:
        return _rows(part, rows, self.batched[name]) if name in self.batched else part

    def output(self, rows: Tensor | None) -> tuple[Tensor, ...]:
        return (self.x if rows is None else self.x[rows.to(self.x.device)],)


def _rows(part: Any, rows: Tensor, dims: int) -> Any:
    if isinstance(part, tuple):
        return tuple(_rows(piece, rows, dims) for piece in part)
    return part[rows] if isinstance(part, Tensor) and part.dim() == dims and part.shape[0] > 1 else part


def loopify(
    model: Model,
    start: int,
    length: int,
    num_loops: Loops = 1,
    *,
    damping: float = 1.0,
    layers: Sequence[nn.Module] | None = None,
    batched: Mapping[str, int] | None = None,
) -> Model:
    """Visit layers [start, start + length) of a model S times. At S = 1 the model is bit for bit what it was.

    Args:
        model: patched or not.
        num_loops: S; integers [B], an S a sequence; a `Depth` (exits, truncated backprop, checkpointing); or a schedule
            without arguments that is called once a pass for its S. An exit rule is asked after visits 2..S - 1.
        damping: beta of x <- x + beta (f(x) - x) in every visit after the first: 1 is the plain loop, less is for
            models that were not trained with one.
        layers: the layers in order, for a model that is not of a known family: called as layer(x, ...) they return x
            or a tuple that starts with it.
        batched: for such a model and an S a sequence, the arguments of a layer whose first dimension is the batch, with
            their numbers of dimensions.

    Returns:
        model itself.

    Raises:
        InputError: layers that the model does not have or that are looped already, layers of different signatures, a
            damping outside (0, 1]. While S > 1, calls with a key/value cache are refused.
    """
    layers = layers_of(model) if layers is None else list(layers)
    whole("start", start, 0), whole("length", length)
    if start + length > len(layers):
        raise InputError(f"layers {start}..{start + length - 1} are wanted, but the model has {len(layers)}")
    if not 0 < number("damping", damping) <= 1:
        raise InputError(f"damping is {damping}; it must be above 0 and at most 1")
    run = layers[start : start + length]
    signatures = {(type(layer), str(inspect.signature(own_forward(layer)))) for layer in run}
    if len(signatures) > 1:
        names = ", ".join(sorted({f"{cls.__name__}{signature}" for cls, signature in signatures}))
        raise InputError(
            f"the looped layers must be of one class and signature; layers {start}..{start + length - 1} are {names}"
        )
    for loop in loops_of(model):
        if any(layer is other for layer in run for other in loop.layers):
            raise InputError(f"{loop} is looped already; take it off first (unloopify)")
    last = run[-1]
    if _replaced(last):
        raise InputError(f"{type(last).__name__} has a forward put in place of its own; take that off first")
    last._loopmdm_loop = Loop(run, start, _checked(num_loops), damping, batched)  # type: ignore[assignment]
    wire(last)
    return model


def unloopify(model: Model) -> Model:
    """Take every loop off; returns the model."""
    for module in model.modules():
        if module.__dict__.pop("_loopmdm_loop", None) is not None:
            wire(module)
    return model


def set_num_loops(model: nn.Module, num_loops: Loops) -> None:
    """Set the S of every looped run (`loopify`) from now on."""
    for loop in _some(model):
        loop.num_loops = _checked(num_loops)


@contextmanager
def looping(model: nn.Module, num_loops: Loops | None, positions: Tensor | None = None) -> Iterator[None]:
    """Set the S of every looped run for a while, in this thread; None leaves it.

    Activation checkpointing sees it too, of calls of `model` itself.

    Args:
        positions: bool [B, T] that an exit rule looks at; None is all.
    """
    now = asking(model, num_loops, positions)

    def called(module: nn.Module, args: object, out: object) -> None:
        if current() is now:  # not another thread's call
            remember(out, now)

    handle = model.register_forward_hook(called)
    try:
        with during(now):
            yield
    finally:
        handle.remove()


def asking(model: nn.Module, num_loops: Loops | None, positions: Tensor | None = None, settle: bool = False) -> Pass:
    """This thread's pass with another S in every looped run of a model, None: with the one that it has.

    With `settle` schedules are asked for theirs.
    """
    loops = loops_of(model)
    if num_loops is not None and not loops and not (isinstance(num_loops, int) and num_loops == 1):
        _some(model)
    if isinstance(num_loops, Depth) and len(loops) > 1:
        raise InputError(f"a Depth needs one looped run of layers; this model has {len(loops)}")
    now = current()
    for loop in loops:
        asked = now.of(loop)[0] if num_loops is None else _checked(num_loops)
        now = now.with_loop(loop, asked() if settle and callable(asked) else asked, positions)
    return now


def save_loops(model: nn.Module, path: str | Path) -> None:
    """Write how the model is looped to a JSON file, beside the checkpoint, which does not know.

    Raises:
        InputError: no loop, or an S that is not one whole number.
    """
    loops = _some(model)
    for loop in loops:
        if not isinstance(loop.num_loops, int):
            raise InputError("only a whole number S can be saved; set one with set_num_loops first")
    rows = [
        {"start": loop.start, "length": len(loop.layers), "num_loops": loop.num_loops, "damping": loop.damping}
        for loop in loops
    ]
    layer = type(loops[0].layers[0]).__name__
    text = json.dumps({"format": FORMAT, "layer": layer, "loops": rows}, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_loops(model: Model, path: str | Path, *, layers: Sequence[nn.Module] | None = None) -> Model:
    """Loop a model as `save_loops` wrote it down; returns the model.

    Raises:
        InputError: no such file, another format, or loops that the model cannot have. No loop is left then.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        kind, rows = data["format"], [(r["start"], r["length"], r["num_loops"], r["damping"]) for r in data["loops"]]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file of loop settings ({error})") from error
    if kind != FORMAT:
        raise InputError(f"{path} has format {kind!r}; this version reads {FORMAT}")
    known = layers_of(model) if layers is None else list(layers)
    if known and type(known[0]).__name__ != data.get("layer"):
        raise InputError(f"{path} loops layers of {data.get('layer')!r}; this model has {type(known[0]).__name__!r}")
    try:
        for start, length, num_loops, damping in rows:
            loopify(model, start, length, num_loops, damping=damping, layers=known)
    except InputError:
        unloopify(model)
        raise
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers in order: those of a known family."""
    found = [module for module in model.modules() if is_ours(module) or recognise(module) is not None]
    if not found:
        raise unknown(model)
    return found


def loops_of(model: nn.Module) -> list[Loop]:
    """The loops of a model, in order."""
    return [module._loopmdm_loop for module in model.modules() if "_loopmdm_loop" in module.__dict__]  # type: ignore[misc]


def _some(model: nn.Module) -> list[Loop]:
    loops = loops_of(model)
    if not loops:
        raise InputError(f"{type(model).__name__} has no looped layers, so it has no S; call loopify first")
    return loops


def _checked(num_loops: Loops) -> Loops:
    if isinstance(num_loops, (Tensor, Depth)) or callable(num_loops):
        return num_loops
    return check_loops(num_loops)
