"""What the package knows of a codebase: how to recognise its layers and how its checkpoints map to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import LoopConfig, ModelConfig
from ..errors import InputError
from .layer import Layout

State = dict[str, Tensor]


class Unfit(ValueError):
    """A module of a known name that the family's layer cannot replace; the message says why."""


@dataclass(frozen=True)
class Part:
    """One tensor of ours and the tensors of theirs that it is made of, one below the other.

    Attributes:
        ours, theirs: names inside a layer, or in the whole model.
        kind: "" (rows as they are), "qkv" (q, k, v), "qkv_interleaved" (by query group) or "halves" (gate, up).
    """

    ours: str
    theirs: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Family:
    """A codebase whose models can be patched and whose checkpoints can be converted.

    Attributes:
        name: "mdlm", "llada", "dream" or "smdm".
        blocks: class names of its layers.
        layout: a layer of it -> its `Layout`; raises `Unfit`.
        forward: replaces the layer's forward, of the same signature.
        required: names of parameters that every such layer has.
        batched: arguments of that forward whose first dimension may be the batch -> their number of dimensions.
        head, final_norm, embedding: paths, with alternatives, of the head, the last norm and the embedding table in a
            whole model. Hidden states are what enters the head, without one (tied weights) what leaves the last norm.
        mask_id: id of [MASK] of its published models; None where it is the last of the vocabulary.
        logit_shift: 1 if the token at i is read at i - 1.
        time_input: whether the model's forward takes the noise level as its second argument.
        layer_prefix: name of layer i in a checkpoint, to be formatted with i.
        groups, group_size: where layers may lie in groups, their names by group and place in it, and the setting that
            says how many a group has.
        layer_parts, parts: tensors of a layer and of the whole model.
        prefixes: what checkpoints may put before every name.
        ignored: ends of names of buffers without a counterpart.
        extra_rows: rows of the embedding that the head does not have (the mask of SMDM).
        to_config, from_config: the codebase's configuration, as a dict, to ours and back.
    """

    name: str
    blocks: tuple[str, ...]
    layout: Callable[[Any], Layout]
    forward: Callable[..., Any]
    required: tuple[str, ...]
    batched: Mapping[str, int]
    head: tuple[str, ...]
    final_norm: tuple[str, ...]
    embedding: tuple[str, ...]
    layer_prefix: str
    layer_parts: tuple[Part, ...]
    parts: tuple[Part, ...]
    to_config: Callable[[Mapping[str, Any]], ModelConfig]
    from_config: Callable[[ModelConfig], dict[str, Any]]
    mask_id: int | None = None
    logit_shift: int = 0
    time_input: bool = False
    prefixes: tuple[str, ...] = field(default=())
    ignored: tuple[str, ...] = field(default=())
    extra_rows: int = 0
    groups: str = ""
    group_size: str = ""

    def to_ours(self, state: Mapping[str, Tensor], config: ModelConfig) -> State:
        """Their tensors (any prefix of `prefixes`) -> those of `LoopMDM(config)`; copies only where parts are joined.

        Raises:
            InputError: a tensor that is missing, unknown or of another shape.
        """
        state = self.stripped(state)
        out: State = {}
        used: set[str] = set()
        for ours, theirs, kind in self._pairs(config):
            if not any(name in state for name in theirs):
                continue  # a bias that this model has not, or a tied head
            missing = [name for name in theirs if name not in state]
            if missing:
                raise InputError(f"the {self.name} checkpoint has {theirs[0]} but not {missing[0]}")
            used.update(theirs)
            tensors = [state[name] for name in theirs]
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            out[ours] = _ordered(joined, config, kind, back=False)
        left = sorted(name for name in state if name not in used and not name.endswith(self.ignored))
        if left:
            raise InputError(f"the {self.name} checkpoint has {left[0]}, which its layout does not know")
        if self.extra_rows and "lm_head.weight" in out:
            # the mask has no logit there: a row of zeros, which is never read (the mask is suppressed)
            head = out["lm_head.weight"]
            out["lm_head.weight"] = torch.cat((head, head.new_zeros(self.extra_rows, head.shape[1])))
        if config.tie_word_embeddings and "embed.weight" in out:
            out["lm_head.weight"] = out["embed.weight"]
        return out

    def to_theirs(self, state: Mapping[str, Tensor], config: ModelConfig, group_size: int = 1) -> State:
        """The tensors of a `LoopMDM(config)` under their names, without prefix; looped layers once.

        With `group_size` > 1 layers lie in groups.
        """
        out: State = {}
        for ours, theirs, kind in self._pairs(config, group_size):
            if ours not in state or (ours == "lm_head.weight" and config.tie_word_embeddings):
                continue
            tensor = _ordered(state[ours], config, kind, back=True)
            if ours == "lm_head.weight" and self.extra_rows:
                tensor = tensor[: -self.extra_rows]
            if len(theirs) == 1:
                out[theirs[0]] = tensor
            else:
                for name, piece in zip(theirs, tensor.split(_sizes(config, kind, tensor)), strict=True):
                    out[name] = piece.clone()
        return out

    def stripped(self, state: Mapping[str, Tensor]) -> State:
        """The tensors without the prefix that all of them share, layers of groups counted through."""
        prefix = self.prefix(state)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if not self.groups:
            return state
        grouped = re.compile(re.escape(self.groups).replace(r"\{\}", r"(\d{1,6})"))
        found = {name: match for name in state if (match := grouped.match(name))}
        size = 1 + max((int(match[2]) for match in found.values()), default=0)
        names = {
            name: self.layer_prefix.format(int(match[1]) * size + int(match[2])) + name[match.end() :]
            for name, match in found.items()
        }
        out = {names.get(name, name): tensor for name, tensor in state.items()}
        if len(out) != len(state):
            raise InputError(f"the {self.name} checkpoint holds a layer twice, in groups and alone")
        return out

    def prefix(self, state: Mapping[str, Any]) -> str:
        """What all names begin with, if it is one of `prefixes`."""
        return next((p for p in self.prefixes if state and all(name.startswith(p) for name in state)), "")

    def _pairs(self, config: ModelConfig, group_size: int = 1) -> list[tuple[str, tuple[str, ...], str]]:
        pairs = [(part.ours, part.theirs, part.kind) for part in self.parts]
        for i, ours in enumerate(layer_names(config)):
            grouped = self.groups and group_size > 1
            theirs = self.groups.format(*divmod(i, group_size)) if grouped else self.layer_prefix.format(i)
            pairs += [
                (f"{ours}.{part.ours}", tuple(theirs + name for name in part.theirs), part.kind)
                for part in self.layer_parts
            ]
        return pairs


def layer_names(config: ModelConfig) -> list[str]:
    """Names of the layers of `LoopMDM(config)` in order, as in its state dict."""
    names = [f"prelude.{i}" for i in range(config.loop.start)]
    names += [f"loop.layers.{i}" for i in range(config.loop.length)]
    at, end = 0, config.loop.start + config.loop.length
    for start, length in (*config.loop.also, (config.num_hidden_layers, 0)):
        names += [f"coda.{at + i}" for i in range(start - end)]
        at += start - end
        names += [f"coda.{at}.layers.{i}" for i in range(length)]
        at, end = at + bool(length), start + length
    return names


def unlooped(layers: int) -> LoopConfig:
    """The looped block of a model that was trained without one: S = 1, to be chosen by `relooped`."""
    start = min(1, layers - 1)
    return LoopConfig(start=start, length=min(2, layers - start), max_loops=1)


def _sizes(config: ModelConfig, kind: str, tensor: Tensor) -> list[int]:
    if kind == "halves":
        return [len(tensor) // 2] * 2
    hd, G = config.head_dim or 0, config.num_key_value_heads or 0
    return [config.num_attention_heads * hd, G * hd, G * hd]


def _ordered(tensor: Tensor, config: ModelConfig, kind: str, back: bool) -> Tensor:
    if kind != "qkv_interleaved":
        return tensor
    H, G, hd = config.num_attention_heads, config.num_key_value_heads or 0, config.head_dim or 0
    rest, share = tensor.shape[1:], H // G
    if len(tensor) != (H + 2 * G) * hd:
        raise InputError(f"qkv has {len(tensor)} rows; {H} heads and {G} groups of {hd} need {(H + 2 * G) * hd}")
    if back:
        q, k, v = tensor.split((H * hd, G * hd, G * hd))
        parts = (q.view(G, share, hd, *rest), k.view(G, 1, hd, *rest), v.view(G, 1, hd, *rest))
        return torch.cat(parts, dim=1).reshape(tensor.shape)
    q, k, v = tensor.view(G, share + 2, hd, *rest).split((share, 1, 1), dim=1)
    return torch.cat([part.reshape(-1, *rest) for part in (q, k, v)])


def value(config: Any, *names: str, default: Any = ...) -> Any:
    """The first of these settings that a configuration has, be it a mapping or an object; dots go inside."""
    for name in names:
        at = config
        for part in name.split("."):
            at = at.get(part, ...) if isinstance(at, Mapping) else getattr(at, part, ...)
            if at is ...:
                break
        if at is not ...:
            return at
    if default is ...:
        raise InputError(f"the configuration has no {' or '.join(names)}")
    return default


def refuse(config: Any, family: str, **expected: Any) -> None:
    """Raise unless each of these settings, where the configuration has it and not None, is among the values given.

    A dunder in a name is a dot: `rope_scaling__type`.
    """
    for name, allowed in expected.items():
        name = name.replace("__", ".")
        found = value(config, name, default=None)
        if found is not None and found not in allowed:
            raise InputError(f"the {family} configuration has {name} = {found!r}, which a LoopMDM does not compute")


def fits(condition: bool, why: str) -> None:
    """Raise `Unfit` unless `condition` holds."""
    if not condition:
        raise Unfit(why)
