"""Any masked diffusion LM as a `Denoiser`, so that generate, nelbo, likelihood and the rest take it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.denoiser import check_mask, few, spread
from ..model.depth import Depth, check_over
from ..model.packed import Recast
from .family import Family, value
from .layer import Patched, at_once, only
from .passes import Pass, current, during, remember
from .patching import families, is_ours, recognise, shared_of
from .splice import asking, layers_of, loops_of

Call = Callable[..., Any]


class Peer(nn.Module):
    """A `Denoiser` around a model of another codebase; made by `as_denoiser`, whose arguments it has as attributes.

    The model runs up to its head and no further: what enters the head is the hidden state, and callers run the head
    where they need it.
    """

    takes_depth = True
    takes_rows = True

    def __init__(
        self,
        model: nn.Module,
        *,
        call: Call,
        mask_id: int,
        pad_id: int,
        suppressed_ids: tuple[int, ...],
        logit_shift: int,
        max_length: int | None,
        head: nn.Module | None,
        last: nn.Module | None,
        table: Callable[[nn.Module], tuple[Tensor, Tensor | None]],
        padding: str,
        timed: bool,
        source: Recast[nn.Module] | None = None,
        origin: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.mask_id, self.pad_id = model, mask_id, pad_id
        self.suppressed_ids, self.logit_shift, self.max_length = suppressed_ids, logit_shift, max_length
        self._call, self._table, self._taps = call, table, (head, last)  # a tuple, so as not to register them twice
        self.padding, self.timed, self._source = padding, timed, source
        # what a copy in another dtype was made of, and its Parameters then
        self._origin = None if origin is None else (origin, tuple(origin.parameters()))
        self.vocab_size = max(table(model)[0].shape[0], mask_id + 1)
        layers = [module for module in model.modules() if is_ours(module)]
        self._layer: tuple[nn.Module, ...] = tuple(layers[-1:])
        self._rows_hold: bool | None = None
        self._flops: dict[tuple[int, float, frozenset[int]], float] = {}

    @property
    def max_loops(self) -> int:
        """S of the looped layers (`loopify`) where it is one number, else 1."""
        loops = loops_of(self.model if self._origin is None else self._origin[0])
        num_loops = current().of(loops[0])[0] if loops else 1
        return num_loops if isinstance(num_loops, int) else 1

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | Tensor | Depth | None = None,
        sigma: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> the head's input [B, T, D] in the head's dtype; 0 at padding.

        With rows, bool [B, T], only there, and perhaps 0 elsewhere: a patched last layer works on these alone.
        """
        if input_ids.dim() != 2 or input_ids.dtype.is_floating_point:
            raise InputError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; expected integers [B, T]")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise InputError(f"attention_mask is {list(attention_mask.shape)}, input_ids is {list(input_ids.shape)}")
        if rows is not None and (rows.dtype != torch.bool or rows.shape != input_ids.shape):
            raise InputError(f"rows is {rows.dtype} {list(rows.shape)}; it must be bool {list(input_ids.shape)}")
        if attention_mask is not None:
            check_mask(attention_mask)
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and bool(real.all()):
            real = None
        if sigma is None or not self.timed:
            sigma = torch.zeros(1, device=input_ids.device)  # one row: modulated layers fold it into their norms
        if real is not None:  # padding goes behind: rounded rotary tables make positions more than relative
            order = (~real).byte().argsort(dim=-1, stable=True)
            input_ids, real = input_ids.gather(1, order), real.gather(1, order)
            rows = rows if rows is None else rows.gather(1, order)
        index = few(rows) if rows is not None and self._last_takes_rows() else None
        now = self._pass(num_loops, input_ids, real)
        with (
            during(now),
            contextlib.nullcontext() if index is None else only(self._layer[0], index),
            contextlib.nullcontext() if self._source is None else _inference(input_ids.device),
            _stopping(*self._taps, now),
        ):
            try:
                self._call(self.model, input_ids, real if self.padding == "argument" else None, sigma)
            except _Reached as reached:
                hidden = reached.hidden
                remember(hidden, now)
            else:
                raise InputError(
                    "the model's forward did not come to its head; pass head= or call= to as_denoiser (and compile its "
                    "layers, not the whole model, whose compiled code does not stop there)"
                )
        hidden = hidden.to(self.head()[0].dtype)
        if index is not None and hidden.shape[1] < input_ids.shape[1]:
            hidden = spread(hidden, index, input_ids.shape[1])
        if real is None:
            return hidden
        hidden = hidden.masked_fill(~real[..., None], 0.0)
        return hidden.gather(1, order.argsort(-1)[..., None].expand_as(hidden))

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self._table(self.model)

    def forward_flops(self, length: int, num_loops: float) -> float:
        """2 a token and parameter of the head and of the layers (known ones, S times where looped), and attention."""
        looped = frozenset(id(layer) for loop in loops_of(self.model) for layer in loop.layers)
        key = (length, num_loops, looped)
        if key in self._flops:
            return self._flops[key]
        layers = [m for m in self.model.modules() if is_ours(m) or recognise(m) is not None]
        total = 2.0 * self.head()[0].numel() * length
        for layer in layers:
            weights = [p for p in layer.parameters() if p.dim() == 2]
            D = max((p.shape[1] for p in weights), default=0)
            once = 2.0 * sum(p.numel() for p in weights) * length + 4.0 * length * length * D
            total += once * (num_loops if id(layer) in looped else 1)
        self._flops = {key: total}  # one step's, which mostly is the next one's too
        return total

    def eval(self) -> Self:
        """Also refreshes a copy in another dtype, so that every `generate` reads the weights as they are then."""
        self.refresh()
        return super().eval()

    def refresh(self) -> None:
        """Take the model's present weights, S and way with padding into the copy in `dtype`, if there is one.

        Raises:
            InputError: the model has other Parameters (`load_state_dict(assign=True)`) or looped runs than then.
        """
        if self._source is not None:
            self._follow()
            self._source.refresh()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The weights stay as they are for a while: constant modulation is worked out once."""
        shares = shared_of(self.model.modules())
        for shared in shares:
            shared.held = {}
        try:
            yield
        finally:
            for shared in shares:
                shared.held = None

    def _watched(self, num_loops: object, ids: Tensor, real: Tensor | None) -> Tensor | None:
        rule = num_loops.early_exit if isinstance(num_loops, Depth) else None
        if rule is None or check_over(getattr(rule, "over", "sequence")) == "sequence":
            return real
        masked = ids == self.mask_id
        return masked if real is None else masked & real

    def _last_takes_rows(self) -> bool:
        """Whether the model's last layer may work on some positions alone: nothing but norm and head come behind it.

        Asked of a model of four tokens once, since its forward is not ours.
        """
        looped = (layer for loop in loops_of(self.model) for layer in loop.layers)
        last = self._layer[0] if self._layer else self
        if self.training or not is_ours(last) or any(last is layer for layer in looped):
            return False
        if self._rows_hold is None:
            ids = torch.arange(4, device=self.head()[0].device)[None] % self.vocab_size
            rows = torch.tensor([[False, True, False, True]], device=ids.device)
            loops = 1 if loops_of(self.model) else None
            self._rows_hold = False
            with torch.no_grad():
                want = self.hidden(ids, None, loops)[rows]
                self._rows_hold = True
                try:
                    got = self.hidden(ids, None, loops, rows=rows)[rows]
                    self._rows_hold = bool((got - want).norm() <= 0.02 * want.norm())
                except Exception:  # whatever the model does with what it did not expect
                    self._rows_hold = False
        return self._rows_hold

    def _pass(self, num_loops: int | Tensor | Depth | None, ids: Tensor, real: Tensor | None) -> Pass:
        """The S of each looped run, and padding to be hidden from patched layers."""
        now = asking(self.model, num_loops, self._watched(num_loops, ids, real), settle=True)
        if real is None or self.padding == "argument":
            return replace(now, mask=None)
        if not any(is_ours(module) for module in self.model.modules()):
            raise InputError("this model's layers take no padding mask; patch it, or sample sequences of one length")
        return replace(now, mask=(real | ~real.any(-1, keepdim=True))[:, None, None, :])

    def _follow(self) -> None:
        """Take the S and the way with padding that the model of a copy has by now."""
        assert self._origin is not None
        model, tensors = self._origin
        theirs, mine = loops_of(model), loops_of(self.model)
        runs = [[(loop.start, len(loop.layers)) for loop in loops] for loops in (theirs, mine)]
        if runs[0] != runs[1] or any(a is not b for a, b in zip_longest(model.parameters(), tensors)):
            raise InputError(
                "the model got other Parameters or looped runs after it was copied for dtype=; call as_denoiser again"
            )
        for loop, copied in zip(theirs, mine, strict=True):
            copied.num_loops, copied.damping = loop.num_loops, loop.damping
        for name, module in model.named_modules():
            if is_ours(module):
                record: Patched = self.model.get_submodule(name)._loopmdm  # type: ignore[assignment]
                record.shared.ignore_padding = module._loopmdm.shared.ignore_padding


class _Reached(BaseException):
    """Not an Exception: a codebase's own `except Exception` must not catch it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextlib.contextmanager
def _inference(device: torch.device) -> Iterator[None]:
    """A copy in another dtype has no gradients to give, and its dtype takes autocast's place."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _stopping(head: nn.Module | None, last: nn.Module | None, now: Pass) -> Iterator[None]:
    """End a forward pass at the head's input, or without a head module at the last norm's output.

    Other threads' passes go on.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if current() is now:
            raise _Reached(args[0])

    def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if current() is now:
            raise _Reached(out)

    handle = head.register_forward_pre_hook(before) if head is not None else last.register_forward_hook(after)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


def as_denoiser(
    model: nn.Module,
    *,
    mask_id: int | None = None,
    pad_id: int | None = None,
    suppressed_ids: tuple[int, ...] | None = None,
    logit_shift: int | None = None,
    max_length: int | None = None,
    time_conditioning: bool | None = None,
    head: str | None = None,
    call: Call | None = None,
    dtype: torch.dtype | None = None,
) -> Peer:
    """A model of another codebase as a `Denoiser`. It is not copied, except for `dtype`. What torch.compile made of a
    whole model is not used, since it cannot stop at the head; compiled layers are. In training do not combine compiled
    layers with gradient checkpointing where there is padding or an S for the call: what is computed again lacks them.

    For a patched (or merely recognised) model of a known family every argument has a default; for another module give
    `head`, `mask_id` and, unless it is called as model(input_ids), `call`.

    Args:
        mask_id: id of [MASK]; by default the model's configuration's, its family's, or the last id.
        pad_id: id that fills positions outside a sequence; by default the configuration's, or the mask.
        suppressed_ids: ids never predicted; by default the mask.
        logit_shift: 1 if the token at i is read at i - 1.
        max_length: longest sequence; None is unbounded.
        time_conditioning: whether the noise level is passed on; otherwise it is zero, and modulated layers fold it. By
            default what the configuration says, else False (MDLM).
        head: path of the vocabulary projection, an nn.Linear that reads the last hidden state.
        call: (model, input_ids, attention_mask or None, sigma [1 or B]) -> anything, how to run the model.
        dtype: run the layers' and the head's projections on a copy of their weights in this dtype (a patched model
            only); residual stream and norms keep theirs. Every `generate` refreshes the copy.

    Raises:
        InputError: no head or mask id is known, or `dtype` for a model that is not patched.
    """
    model = getattr(model, "_orig_mod", model)
    family = _family(model)
    config = getattr(model, "config", None)
    for name in ("scale_logits", "final_logit_softcapping"):
        if _setting(config, name):
            raise InputError(f"{type(model).__name__} has {name}, which would come after the head and be left out")
    origin = None
    if dtype is not None:
        if not any(is_ours(module) for module in model.modules()):
            raise InputError("dtype needs a patched model: call loopmdm.patch(model) first")
        source = _cast(model, dtype, head or (family.head if family else ()))
        origin, model = model, source.copy
    else:
        source = None
    module = _find(model, (head,) if head else family.head if family else ())
    last = _find(model, family.final_norm) if family else None
    if module is None and last is None:
        raise InputError(f"where is the head of {type(model).__name__}? pass head='path.to.its.linear'")
    tables = () if family is None else family.embedding

    def table(model: nn.Module) -> tuple[Tensor, Tensor | None]:
        if module is not None:
            return module.weight, getattr(module, "bias", None)
        weight = _find(model, tables)
        assert isinstance(weight, Tensor)
        return weight, None

    rows = table(model)[0].shape[0]
    if mask_id is None and family is not None and family.name == "mdlm":
        mask_id = _setting(model, "mask_index")  # the Lightning module's, where its tokenizer has a mask token
    if mask_id is None:
        mask_id = _setting(config, "mask_token_id", "mask_index", "mask_id")
    if mask_id is None and family is not None:
        published = family.mask_id
        mask_id = published if published is not None and published < rows else rows - 1 + family.extra_rows
    if mask_id is None:
        raise InputError(f"what is the mask id of {type(model).__name__}? pass mask_id=")
    if pad_id is None:
        pad_id = _setting(config, "pad_token_id")
    if time_conditioning is None:
        time_conditioning = bool(_setting(config, "time_conditioning"))
    if suppressed_ids is None:
        suppressed_ids = (mask_id,) if mask_id < rows else ()
    patched = any(is_ours(part) for part in model.modules())
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return Peer(
        model,
        call=call or (_timed if family is not None and family.time_input else _plain),
        mask_id=mask_id,
        pad_id=mask_id if pad_id is None else pad_id,
        suppressed_ids=suppressed_ids,
        logit_shift=(family.logit_shift if family else 0) if logit_shift is None else logit_shift,
        max_length=max_length,
        head=module,
        last=last,
        table=table,
        padding="layers" if patched or not (call or takes_mask) else "argument",
        timed=time_conditioning,
        source=source,
        origin=origin,
    )


def _plain(model: nn.Module, ids: Tensor, mask: Tensor | None, sigma: Tensor) -> Any:
    extra: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    if "use_cache" in inspect.signature(model.forward).parameters:
        extra["use_cache"] = False
    return model(ids, **extra)


def _timed(model: nn.Module, ids: Tensor, mask: Tensor | None, sigma: Tensor) -> Any:
    return model(ids, sigma)


def _family(model: nn.Module) -> Family | None:
    for module in model.modules():
        if is_ours(module):
            return families()[module._loopmdm.family]  # type: ignore[union-attr, index]
        found = recognise(module)
        if found is not None:
            return found
    return None


def _find(model: nn.Module, paths: tuple[str, ...]) -> Any:
    """What the first of these paths leads to, below any wrapper's prefix; None if none does."""
    for prefix in ("", "module.", "backbone."):
        for path in paths:
            at: Any = model
            for part in (prefix + path).split("."):
                at = getattr(at, part, None)
            if at is not None:
                return at
    return None


def _setting(config: object, *names: str) -> Any:
    return value(config, *names, default=None)


def _cast(model: nn.Module, dtype: torch.dtype, head: str | tuple[str, ...]) -> Recast[nn.Module]:
    """A copy of the model whose projections are in `dtype`; everything else is the same Parameter objects."""
    head_module = _find(model, (head,) if isinstance(head, str) else head)
    called: list[tuple[nn.Linear, int]] = []
    inner: list[nn.Linear] = []
    # what a layer itself calls may be packed, what lies inside a wrapper (LoRA) may not
    for layer in layers_of(model):
        record: Patched = layer._loopmdm  # type: ignore[assignment]
        layout = record.layout
        paths = (*layout.qkv, layout.out, *layout.up, layout.down)
        both = layout.up if layout.activation == "swiglu" and len(layout.up) == 1 else ()  # gate and up in one
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name != layout.modulation:
                if name in paths:
                    called.append((module, 2 if name in both else 1))
                else:
                    inner.append(module)
    if isinstance(head_module, nn.Linear) and not any(head_module.weight is p for p in _embeddings(model)):
        inner.append(head_module)
    made = Recast(model, called, inner, dtype)
    for layer in layers_of(made.copy):
        at_once(layer)
    return made


def _embeddings(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
