"""What a LoopMDM is made of: `ModelConfig`, `LoopConfig`, and the named presets.

Field names are Hugging Face's where it has one. A configuration is a frozen, validated value that
travels as `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError, integer, nearest

ACTIVATIONS = ("swiglu", "gelu_tanh", "gelu", "relu2")
BOUNDARIES = ("plain", "anchored")
CHOICES = {
    "hidden_act": ACTIVATIONS,
    "norm": ("rmsnorm", "layernorm"),
    "qk_norm": ("none", "before_rope", "after_rope"),
    "positions": ("rope", "learned", "both", "none"),
    "rope_layout": ("half", "interleaved"),
    "rope_dtype": ("float32", "input"),
    "rope_table_dtype": ("float32", "bfloat16"),
    "modulation": ("none", "adaln"),
}


@dataclass(frozen=True)
class LoopConfig:
    """Which layers are looped, and how.

    Layers [0, start) are the prelude, [start, start + length) the looped block, the rest the coda.

    Attributes:
        start: first looped layer, zero-based (the paper's a; default 1).
        length: number of looped layers (the paper's n; default 2).
        max_loops: S_max of training, and the S of evaluation and sampling when none is given.
        boundary: what happens between visits. "plain": nothing (the paper). "anchored":
            x <- RMSNorm(x + x0) * g with x0 the prelude's output and g one learned gain.
        also: further looped blocks, (start, length) each, in order and apart from one another. Each is visited S
            times too; anchored, its x0 is its own input and its gain its own.
    """

    start: int = 1
    length: int = 2
    max_loops: int = 12
    boundary: str = "plain"
    also: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "also", _runs(self.also))
        _typed(self, "loop.")
        if self.start < 0 or self.length < 1:
            raise InputError(
                f"the looped block starts at layer {self.start} with length {self.length}; "
                "start must be at least 0 and length at least 1"
            )
        check_loops(self.max_loops, "max_loops")
        _one_of("loop.boundary", self.boundary, BOUNDARIES)
        end = self.start + self.length
        for start, length in self.also:
            if start < end or length < 1:
                raise InputError(
                    f"loop.also has {length} layers from layer {start} on; each further looped block needs at least "
                    f"one layer and starts after the one before it, here at layer {end} or later"
                )
            end = start + length

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of every looped block."""
        return ((self.start, self.length), *self.also)

    @property
    def num_layers(self) -> int:
        """Looped layers of all looped blocks (n)."""
        return sum(length for _, length in self.runs)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a (looped) masked diffusion language model.

    Attributes:
        vocab_size: number of token ids, the mask id included.
        mask_token_id: the absorbing [MASK]; None means the last id.
        pad_token_id: fills positions that no sequence owns; None means the mask id.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: d, L, H, f.
            L counts distinct layers; depth applied is L + (S - 1) * loop.num_layers.
        num_key_value_heads: fewer than H for grouped-query attention; None means H.
        head_dim: None means d / H.
        hidden_act: "swiglu" (gated), "gelu_tanh", "gelu" or "relu2".
        norm, norm_eps, norm_weight, norm_bias: "rmsnorm" or "layernorm", computed in fp32.
        qkv_bias, attention_out_bias, mlp_bias, head_bias: which projections have a bias.
        qk_norm: per-head RMSNorm on q and k: "none", "before_rope" or "after_rope".
        positions: "rope", "learned", "both" or "none".
        rope_theta, rope_layout, rope_sign, rope_dtype: base; "half" or "interleaved" pairs; +1 or -1
            for the direction of rotation; "float32" or "input" for the dtype that q and k rotate in.
        rope_table_dtype: "float32", or "bfloat16" for sines and cosines rounded to it (SMDM).
        max_position_embeddings: longest sequence (the size of the learned table; a bound otherwise).
        modulation: "none", or "adaln" for DiT's six-way shift/scale/gate from a conditioning vector.
        cond_dim: width of the conditioning vector.
        time_conditioning: feed sigma to the conditioning; off, sigma is zero and modulation constant.
        tie_word_embeddings: the head reads the embedding's weight.
        logit_shift: 1 for a model that reads the token at i from position i - 1, as Dream does.
        dropout: on both residual branches, in training.
        residual_in_fp32: keep the residual stream in fp32 whatever the parameters' dtype.
        zero_init_output: start attention-out and MLP-down at zero, so that every block starts as the
            identity (with "adaln" the zero gates do that and these keep a fan-in initialisation).
        initializer_range: standard deviation of new embeddings. It sets the scale that the residual branches
            and the anchored boundary compete with: small models want 0.3 to 1.
        loop: the looped block.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    hidden_act: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_weight: bool = True
    norm_bias: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: str = "none"
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_layout: str = "half"
    rope_sign: int = 1
    rope_dtype: str = "float32"
    rope_table_dtype: str = "float32"
    max_position_embeddings: int = 1024
    modulation: str = "none"
    cond_dim: int = 128
    time_conditioning: bool = False
    tie_word_embeddings: bool = False
    logit_shift: int = 0
    dropout: float = 0.0
    residual_in_fp32: bool = True
    zero_init_output: bool = True
    initializer_range: float = 0.02
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        _typed(self, "")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "head_dim",
            "max_position_embeddings",
            "cond_dim",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.vocab_size < 2:
            raise InputError(f"vocab_size is {self.vocab_size}; beside the mask it must hold at least one token")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name, options in CHOICES.items():
            _one_of(name, getattr(self, name), options)
        if self.mask_token_id is None:
            object.__setattr__(self, "mask_token_id", self.vocab_size - 1)
        if self.pad_token_id is None:
            object.__setattr__(self, "pad_token_id", self.mask_token_id)
        for name in ("mask_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise InputError(f"{name} is {getattr(self, name)}, outside the vocabulary of {self.vocab_size}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one, or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:  # type: ignore[operator]
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.positions in ("rope", "both") and self.head_dim % 2:  # type: ignore[operator]
            raise InputError(f"head_dim {self.head_dim} is odd; rotary positions rotate pairs")
        if self.logit_shift not in (0, 1):
            raise InputError(f"logit_shift is {self.logit_shift}; it must be 0 or 1")
        if self.rope_sign not in (1, -1):
            raise InputError(f"rope_sign is {self.rope_sign}; it must be 1 or -1")
        if not self.initializer_range > 0:
            raise InputError(f"initializer_range is {self.initializer_range}; it must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout}; it must be in [0, 1)")
        for start, length in self.loop.runs:
            if start + length > self.num_hidden_layers:
                raise InputError(
                    f"the looped block covers layers {start}..{start + length - 1}, "
                    f"but the model has {self.num_hidden_layers} layers (0..{self.num_hidden_layers - 1})"
                )

    @property
    def gated(self) -> bool:
        return self.hidden_act == "swiglu"

    def depth(self, num_loops: int) -> int:
        """Layers applied at S = num_loops: L + (S - 1) * n."""
        return self.num_hidden_layers + (num_loops - 1) * self.loop.num_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        data = dataclasses.asdict(self)
        data["loop"]["also"] = [list(run) for run in self.loop.also]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s form; an unknown key is an error that names the nearest known one."""
        loop = data.get("loop", {})
        if isinstance(loop, Mapping):
            loop = LoopConfig(**_known(LoopConfig, loop, "loop."))
        known = _known(cls, data, "")
        missing = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory and f.name not in known]
        if missing:
            raise InputError(f"the configuration lacks {', '.join(missing)}")
        return cls(**{**known, "loop": loop})

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; keys of `LoopConfig` are accepted beside the model's own (and `loop`)."""
        loop_fields = {f.name for f in dataclasses.fields(LoopConfig)}
        data = self.to_dict()
        if "vocab_size" in changes:  # the mask moves with the end of the vocabulary unless it is given
            data["mask_token_id"] = data["pad_token_id"] = None
        if changes.keys() & {"hidden_size", "num_attention_heads"}:
            data["head_dim"] = None
        if "num_attention_heads" in changes:
            data["num_key_value_heads"] = None
        fields, loop = {key: changes.pop(key) for key in loop_fields & changes.keys()}, changes.pop("loop", self.loop)
        if isinstance(loop, LoopConfig):
            loop = dataclasses.asdict(loop)
        if isinstance(loop, Mapping):
            loop = {**loop, **fields}
        return ModelConfig.from_dict({**data, **changes, "loop": loop})


def check_loops(num_loops: int, name: str = "num_loops") -> int:
    """Return a valid loop count S as an int, or raise InputError."""
    found = integer(num_loops)
    if found is None or found < 1:
        raise InputError(f"{name} is {num_loops!r}; the looped block is visited a whole number of times, at least once")
    return found


_WORDS = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false", "None": "null"}
_TYPES: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "None": type(None),
    "LoopConfig": LoopConfig,
    "tuple[tuple[int, int], ...]": tuple,
}


def _runs(value: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of whole numbers, from lists (JSON) or tuples."""
    pairs = value if isinstance(value, (list, tuple)) else [value]
    for pair in pairs:
        whole = isinstance(pair, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
        if not whole or len(pair) != 2:
            raise InputError(f"loop.also is {value!r}; it must be a list of [start, length], as [[6, 2], [9, 1]]")
    return tuple((int(start), int(length)) for start, length in pairs)


def _typed(config: LoopConfig | ModelConfig, prefix: str) -> None:
    """Refuse a field that is not of its annotated type, as a hand-written config.json may hold."""
    for spec in dataclasses.fields(config):
        value, kinds = getattr(config, spec.name), str(spec.type).split(" | ")
        if "int" in kinds and integer(value) is not None:  # NumPy's become Python's
            value = integer(value)
            object.__setattr__(config, spec.name, value)
        fits = any(isinstance(value, _TYPES[kind]) for kind in kinds)
        if not fits or (isinstance(value, bool) and "bool" not in kinds):
            expected = " or ".join(_WORDS.get(kind, f"a {kind}") for kind in kinds)
            raise InputError(f"{prefix}{spec.name} is {value!r}; it must be {expected}")


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise InputError(f"{name} is {value!r}{nearest(str(value), options)}")


def _known(cls: type, data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    for key in data:
        if key not in names:
            raise InputError(f"unknown configuration key {prefix + str(key)!r}{nearest(str(key), names)}")
    return dict(data)


def _dit(**overrides: Any) -> ModelConfig:
    """The paper's backbone, MDLM's "small": layer norm without bias, GELU-tanh MLP with biases, adaLN."""
    base = {
        "vocab_size": 50258,  # GPT-2 and the mask
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu_tanh",
        "norm": "layernorm",
        "mlp_bias": True,
        "head_bias": True,
        "modulation": "adaln",
        "dropout": 0.1,
    }
    return ModelConfig(**{**base, **overrides})


def _llama(layers: int, heads: int, width: int, ffn: int, **overrides: Any) -> ModelConfig:
    """SMDM's and LLaDA's backbone: RMSNorm, SwiGLU, no biases, no time input."""
    base = {
        "vocab_size": 32001,  # the Llama-2 vocabulary and the mask
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
    }
    return ModelConfig(**{**base, **overrides})


PRESETS: dict[str, ModelConfig] = {
    "paper-170m": _dit(),
    "smdm-6m": _llama(6, 4, 256, 1024),
    "smdm-19m": _llama(8, 6, 384, 1536),
    "smdm-34m": _llama(8, 8, 512, 2048),
    "smdm-113m": _llama(12, 12, 768, 3072),
    "smdm-170m": _llama(18, 12, 768, 3072),
    "smdm-206m": _llama(16, 14, 896, 3584),
    "smdm-1028m": _llama(20, 14, 1792, 7168),
    "tiny-dit": _dit(
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        cond_dim=32,
        max_position_embeddings=256,
        dropout=0.0,
        initializer_range=0.3,
        loop=LoopConfig(max_loops=6),
    ),
    "tiny-llama": _llama(
        4,
        4,
        96,
        256,
        vocab_size=257,
        max_position_embeddings=256,
        initializer_range=0.3,
        loop=LoopConfig(max_loops=4, boundary="anchored"),
    ),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset by name, with any field of `ModelConfig` or `LoopConfig` overridden."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name].replace(**overrides) if overrides else PRESETS[name]
