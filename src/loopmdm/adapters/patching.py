"""patch: run the layers of a model from another codebase with this package's ops, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import MethodType
from typing import TypeVar

from torch import nn

from ..errors import InputError
from ..ops import native
from ..ops.contract import Choice
from ..ops.residual_norm import OP
from ..ops.rotary_attention import OP as ATTENTION
from . import dream, llada, mdlm, smdm
from .family import Family, Unfit
from .layer import Layout, Patched, Shared

Model = TypeVar("Model", bound=nn.Module)

_FAMILIES = {family.name: family for family in (mdlm.FAMILY, llada.FAMILY, dream.FAMILY, smdm.FAMILY)}


def families() -> dict[str, Family]:
    """The known families by name."""
    return dict(_FAMILIES)


def register(family: Family) -> None:
    """Make `patch` and `loopify` recognise another family (docs/adapters.md); the last one of a name counts."""
    _FAMILIES[family.name] = family


def patch(model: Model, *, ignore_padding: bool = False) -> Model:
    """Run the layers of `model` with this package's ops, on CPU or GPU and without flash-attn.

    Only the layers' `forward` is replaced: modules, Parameter objects, state_dict keys, optimizers and EMA copies
    stay as they are, and so do hooks on layers and on projections, which are called as modules (LoRA and quantised
    ones included); hooks on other modules inside a layer do not run, which a warning says. Autocast is respected. Wrap
    in DDP or FSDP, or compile, afterwards; patch again what was pickled whole. Layers that are ours already are left
    alone.

    Args:
        model: a model of a known family; recognised by the class names and parameter names of its layers, without
            importing its code.
        ignore_padding: ignore the padding mask that the model passes to its layers, as LLaDA does.

    Returns:
        model itself.

    Raises:
        InputError: no layer is recognised, or one differs from what its family's layers are. Nothing was changed then.
    """
    found: list[tuple[nn.Module, Family, Layout]] = []
    shared = Shared(ignore_padding=ignore_padding)
    ours: list[nn.Module] = []
    strangers: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if is_ours(module):
            ours.append(module)
            continue
        family = recognise(module)
        if family is None:
            strangers.append((name, type(module).__name__))
            continue
        if _replaced(module):
            raise InputError(
                f"{name} ({type(module).__name__}) has a forward put in place of its own; take that off first"
            )
        try:
            found.append((module, family, family.layout(module)))
        except (Unfit, InputError, AttributeError, TypeError, KeyError) as error:
            raise InputError(
                f"{name} looks like a {type(module).__name__} of {family.name}, but {error}; docs/adapters.md shows "
                "how to describe such a layer; nothing was changed"
            ) from error
    if not found and not ours:
        raise unknown(model)
    for name, cls in strangers:
        if any(cls in family.blocks for _, family, _ in found):
            raise InputError(
                f"{name} is a {cls} with other parameters than the rest; docs/adapters.md shows how to describe such a "
                "layer; nothing was changed"
            )
    for module in ours:
        module._loopmdm.shared.ignore_padding = ignore_padding  # type: ignore[union-attr]
    for module, family, layout in found:
        module._loopmdm = Patched(family.name, layout, shared, in_place=True)  # type: ignore[assignment]
        wire(module)
    return model


def unpatch(model: Model) -> Model:
    """Give every layer that `patch` changed its own forward again; returns the model."""
    for module in model.modules():
        record = module.__dict__.get("_loopmdm")
        if record is not None and record.in_place:
            del module._loopmdm
            wire(module)
    return model


def report(model: nn.Module) -> str:
    """What was recognised in a model, what runs there, and what is looped; several lines."""
    kinds: dict[tuple[str, str, bool, Layout | None], list[str]] = {}
    loops: list[str] = []
    for name, module in model.named_modules():
        record, family = module.__dict__.get("_loopmdm"), recognise(module)
        if record is not None and is_ours(module):
            key = (record.family, type(module).__name__, record.in_place, record.layout)
            kinds.setdefault(key, []).append(name)
        elif family is not None:
            kinds.setdefault((family.name, type(module).__name__, False, None), []).append(name)
        if "_loopmdm_loop" in module.__dict__:
            loops.append(f"loop: {module._loopmdm_loop}")
    if not kinds:
        return str(unknown(model))
    lines = []
    for (family_name, cls, in_place, layout), names in kinds.items():
        where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        state = "not patched" if layout is None else "patched" if in_place else "ours by construction"
        lines.append(f"{family_name}: {len(names)} {cls} ({where}), {state}")
        if layout is not None:
            lines += [f"  {line}" for line in _runs(model.get_submodule(names[0]), layout)]
    return "\n".join(lines + loops)


def _runs(block: nn.Module, layout: Layout) -> list[str]:
    weight = next(block.parameters())
    dim, below = weight.shape[-1], native.level_below_4()
    centred = int(layout.norm == "layernorm")
    norm = OP.choose(
        "auto",
        weight.device,
        weight.dtype,
        numbers=1024 * dim,
        rows=1024,
        dim=dim,
        centred=centred,
        level_below_4=below,
    )
    attention = Choice("torch", {}, "F.scaled_dot_product_attention")
    if weight.is_cpu:
        attention = ATTENTION.choose(
            "auto", weight.device, weight.dtype, tokens=1024, head_dim=layout.head_dim, level_below_4=below
        )
    heads = f"{layout.heads} heads of {layout.head_dim}"
    if layout.groups != layout.heads:
        heads += f" over {layout.groups} key/value heads"
    parts = [f"{layout.norm} eps {layout.eps:g}", layout.activation, heads]
    parts.append(f"rotary {layout.rope_layout}, turned in {layout.rope_dtype}")
    if layout.qk_norm != "none":
        parts.append(f"q and k normed {layout.qk_norm}")
    if layout.modulation:
        parts.append("adaLN, folded into the norms where its conditioning is one row")
    record: Patched = block._loopmdm  # type: ignore[assignment]
    padding = "ignored, as the codebase does" if record.shared.ignore_padding else "honoured"
    causal = ", causal where no mask is given" if layout.causal else ""
    return [
        "; ".join(parts),
        f"residual_norm: {norm.impl} ({norm.why})",
        f"attention: {attention.impl} ({attention.why}){causal}; padding {padding}",
    ]


def recognise(module: nn.Module) -> Family | None:
    """The family whose layer this module is, by class name and parameter names."""
    name = type(module).__name__
    for family in reversed(_FAMILIES.values()):
        if name in family.blocks:
            held = {key.replace(".base_layer", "") for key, _ in module.named_parameters() if ".lora_" not in key}
            known = {tensor for part in family.layer_parts for tensor in part.theirs}
            if held.issuperset(family.required) and held <= known:
                return family
    return None


def is_ours(module: nn.Module) -> bool:
    """Whether the layer runs on this package's ops, patched or by construction.

    A pickled layer keeps its record and loses the replaced forward: it is not ours until it is patched again.
    """
    record = module.__dict__.get("_loopmdm")
    if record is None or not record.in_place:
        return record is not None
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return forward in (_driven, _FAMILIES[record.family].forward)


def _replaced(module: nn.Module) -> bool:
    """Whether someone else has put a forward in place of the module's own."""
    forward = module.__dict__.get("forward")
    ours = (type(module).forward, _driven, *(family.forward for family in _FAMILIES.values()))
    return forward is not None and getattr(forward, "__func__", None) not in ours


def wire(layer: nn.Module) -> None:
    """Set the layer's forward to what its records say: a loop's driver, the family's forward, or its own."""
    record, loop = layer.__dict__.get("_loopmdm"), layer.__dict__.get("_loopmdm_loop")
    layer.__dict__.pop("forward", None)
    if loop is not None:
        layer.forward = MethodType(_driven, layer)
    elif record is not None and record.in_place:
        layer.forward = MethodType(_FAMILIES[record.family].forward, layer)


def own_forward(layer: nn.Module) -> MethodType:
    """What the layer itself computes, without a loop and without hooks."""
    record = layer.__dict__.get("_loopmdm")
    if record is not None and record.in_place:
        return MethodType(_FAMILIES[record.family].forward, layer)
    return MethodType(type(layer).forward, layer)


def _driven(self: nn.Module, *args: object, **kwargs: object) -> object:
    return self._loopmdm_loop.drive(args, kwargs)  # type: ignore[operator, union-attr]


def unknown(model: nn.Module) -> InputError:
    """The sentence for a model without a layer that is known."""
    seen = Counter(
        type(child).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for child in module
    )
    names = [name for name, _ in seen.most_common(4)]
    names = names or sorted({type(module).__name__ for module in model.modules() if next(module.children(), None)})[:4]
    blocks = ", ".join(name for family in _FAMILIES.values() for name in family.blocks)
    return InputError(
        f"no layer of {type(model).__name__} is one that loopmdm knows (seen: {', '.join(names) or 'none'}; known: "
        f"{blocks}, each with its codebase's parameter names); docs/adapters.md shows how to add one; "
        "nothing was changed"
    )


def shared_of(modules: Iterable[nn.Module]) -> list[Shared]:
    """The `Shared` records of the layers among some modules, each once."""
    records: list[Shared] = [module.__dict__["_loopmdm"].shared for module in modules if is_ours(module)]
    return list({id(record): record for record in records}.values())
