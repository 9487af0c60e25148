"""LoopMDM: prelude, looped block, coda.

h      = prelude(embed(x_t))         layers [0, a)
h      = loop(h), S visits           layers [a, a+n)
logits = head(coda(h))               layers [a+n, L)
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, preset
from ..errors import InputError
from ..ops.rotate import rope_table
from .block import Block, Context, Norm, modulate, through
from .checkpoint import Checkpoint
from .denoiser import check_mask, document_numbers, few, spread, starts, suppress
from .depth import Depth, check_over, planned
from .flops import forward_flops
from .fused import Fused
from .loop import Anchored, Boundary, LoopedBlock
from .packed import PACKED, Packed, Recast, at_once


class Output:
    """What `LoopMDM.forward` returns.

    Attributes:
        hidden: [B, T, D], after the final norm (the head's input).
        loops: S of this pass; int64 [B], the visits of each sequence, where they may differ (an S a sequence, an exit).
        logits: [B, T, V] in fp32, computed when first read; suppressed ids (the mask) are -inf.
    """

    def __init__(self, hidden: Tensor, loops: int | Tensor, model: LoopMDM) -> None:
        self.hidden, self.loops = hidden, loops
        self._model = model
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            weight, bias = self._model.head()
            self._logits = suppress(F.linear(self.hidden, weight, bias), self._model.suppressed_ids)
        return self._logits


class LoopMDM(Checkpoint):
    """A masked diffusion LM whose early layers are visited S times (arXiv 2605.26106).

    A `Denoiser`: `nelbo`, `generate` and the rest take it as it is. Parameters do not depend on S.

    They call `hidden`, so `torch.compile(model)` is without effect on them; these are not:

        model.hidden = torch.compile(model.hidden)
        for layer in model.layers: layer.compile()

    The first makes a graph of each S and runs eagerly past eight of them, unless torch._dynamo.config.recompile_limit
    is raised; a deep copy of the model would still run the original. The second serves every S.

    Args:
        config: architecture.
        boundary: any callable in place of what `config.loop.boundary` names (`LoopedBlock`). It is no part of
            config.json, which then says "plain": `from_pretrained(..., boundary=...)` puts it back, its weights loaded.
    """

    takes_depth = True
    takes_rows = True
    max_length: int | None
    suppressed_ids: tuple[int, ...]

    def __init__(self, config: ModelConfig, boundary: Boundary | None = None) -> None:
        super().__init__(config if boundary is None else config.replace(boundary="plain"))
        config = self.config
        D = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, D)
        if config.positions in ("learned", "both"):
            self.position_embed = nn.Embedding(config.max_position_embeddings, D)
        if config.modulation == "adaln":
            self.sigma_embed = SigmaEmbedding(config.cond_dim)
            self.final_modulation = nn.Linear(config.cond_dim, 2 * D)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.loop.start))
        self.loop = LoopedBlock(config, boundary)
        self.coda, end = nn.ModuleList(), config.loop.start + config.loop.length
        for start, length in (*config.loop.also, (config.num_hidden_layers, 0)):
            self.coda.extend(Block(config) for _ in range(start - end))
            if length:
                self.coda.append(LoopedBlock(config, boundary, length))
            end = start + length
        self.final_norm = Norm(config)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=config.head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.reset_parameters()

        self.mask_id, self.pad_id = config.mask_token_id or 0, config.pad_token_id or 0
        self.vocab_size, self.max_length = config.vocab_size, config.max_position_embeddings
        self.suppressed_ids, self.logit_shift = (self.mask_id,), config.logit_shift
        self.max_loops = config.loop.max_loops

    def reset_parameters(self) -> None:
        for name in ("embed", "position_embed"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name).weight, std=self.config.initializer_range)
        if self.config.modulation == "adaln":
            nn.init.zeros_(self.final_modulation.weight)
            nn.init.zeros_(self.final_modulation.bias)
        if not self.config.tie_word_embeddings:
            nn.init.zeros_(self.lm_head.weight)
        if self.lm_head.bias is not None:
            nn.init.zeros_(self.lm_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | Tensor | Depth | None = None,
        sigma: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Output:
        """Predict the clean token at every position.

        Args:
            input_ids: integer [B, T], masked positions holding `mask_id`.
            attention_mask: bool or 0/1 [B, T], 1 on real tokens; padding may be left or right. Hidden states of
                padding are 0.
            num_loops: S >= 1; integers [B], an S for each sequence; a `Depth` (early exit, truncated backprop,
                checkpointing, deep supervision); None is `max_loops`.
            sigma: noise level -log(alpha_t), [B] or a scalar, finite; read only with `config.time_conditioning`.
            document_ids: integer [B, T] for packed rows: tokens attend within their own id, positions restart.
                A document is one run of equal ids.

        Raises:
            InputError: wrong shapes, S < 1, more tokens than `max_position_embeddings`, a floating attention_mask, ids
                outside the vocabulary or a sigma that is not finite (checked on CPU; on CUDA that would cost a
                synchronisation); a `Depth` that asks for what
                cannot go together, with several looped blocks an exit or truncated backprop.
        """
        request = Depth(num_loops) if isinstance(num_loops, Tensor) else num_loops
        hidden = self.hidden(input_ids, attention_mask, request, sigma, document_ids)
        loops = request.num_loops if isinstance(request, Depth) else request
        if isinstance(request, Depth) and (isinstance(loops, Tensor) or request.early_exit is not None):
            loops = request.visits
        return Output(hidden, self.max_loops if loops is None else loops, self)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | Tensor | Depth | None = None,
        sigma: Tensor | None = None,
        document_ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, but only the final hidden states [B, T, D].

        Args:
            rows: bool [B, T], where they will be read; elsewhere they may then be 0. The last layer works there alone.
        """
        self._check(input_ids, attention_mask, document_ids)
        if rows is not None and (rows.dtype != torch.bool or rows.shape != input_ids.shape):
            raise InputError(f"rows is {rows.dtype} {list(rows.shape)}; it must be bool {list(input_ids.shape)}")
        loops, depth = planned(num_loops, self.max_loops, len(input_ids))
        self._check_depth(depth)
        positions, mask = _layout(input_ids, attention_mask, document_ids)
        watched = self._watched(depth, input_ids, attention_mask)
        context = Context(self._rope(positions), mask, self._condition(sigma, input_ids.device), watched)
        x = self.embed(input_ids)
        if self.config.positions in ("learned", "both"):
            x = x + self.position_embed(positions)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = through(self.prelude, x, context)
        x = self.loop(x, depth if isinstance(num_loops, (Depth, Tensor)) else loops, context)
        if depth.every:
            depth.outputs = [
                self._read(h, k, context, depth, attention_mask) for k, h in enumerate(depth.outputs, start=1)
            ]
            x = depth.outputs[-1]
        else:
            x = self._read(x, loops, context, depth, attention_mask, few(rows))
        if isinstance(num_loops, Depth):
            num_loops.visits, num_loops.outputs = depth.visits, depth.outputs
        return x

    def _read(
        self,
        x: Tensor,
        loops: int | Tensor,
        context: Context,
        depth: Depth,
        attention_mask: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The looped block's output -> final hidden states; further looped blocks make `loops` visits.

        rows: int64 [B, R], where they will be read.
        """
        tokens = x.shape[1]
        run: list[nn.Module] = []
        for layer in self.coda:
            if isinstance(layer, LoopedBlock):
                x = layer(through(run, x, context), Depth(loops, checkpoint=depth.checkpoint), context)
                run = []
            else:
                run.append(layer)
        x = self._final(through(run, x, context, rows), context)
        if rows is not None and x.shape[1] < tokens:
            x = spread(x, rows, tokens)
        return x if attention_mask is None else x * attention_mask.to(x.dtype)[..., None]

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.lm_head.weight, self.lm_head.bias

    def forward_flops(self, length: int, num_loops: float) -> float:
        return forward_flops(self.config, length, num_loops)

    def fused(self, dtype: torch.dtype | None = None, impl: str = "auto", attention_impl: str | None = None) -> Fused:
        """The model as it is now, for inference through the fused ops: a `Denoiser` as `generate` takes one.

        Arguments and errors are those of `model.fused.Fused`.
        """
        return Fused(self, dtype, impl, attention_impl)

    def packed(self, dtype: torch.dtype | None = None) -> Self:
        """The model as it is now for inference on a CPU: the layers' projections laid out for its product.

        Another LoopMDM, which shares all other tensors with this one. After the weights changed make a new one; it
        cannot be saved or trained.

        Args:
            dtype: of the layers' projections and the head, such as `torch.bfloat16`; None keeps this model's. Norms,
                embeddings and a head that is tied to them keep theirs.
        """
        gated = 2 if self.config.gated else 1
        projections = (
            (m, gated if m is layer.mlp.up else 1)
            for layer in self.layers
            for m in (layer.attn.qkv, layer.attn.out, layer.mlp.up, layer.mlp.down)
        )
        head = () if self.config.tie_word_embeddings else (self.lm_head,)
        made = Recast(self, projections, head, dtype).copy
        at_once(made.layers)
        return made

    def relooped(
        self,
        start: int | None = None,
        length: int | None = None,
        max_loops: int | None = None,
        boundary: str | Boundary | None = None,
        also: tuple[tuple[int, int], ...] | None = None,
    ) -> Self:
        """The same layers with another choice of looped ones: retrofits a loop to a trained model.

        At S = 1 the result equals this model at S = 1 bit for bit, whatever the boundary. Both models hold the same
        Parameter objects; the gain of an anchored boundary that was not there before starts at 1.

        Args:
            start, length, max_loops, also: fields of `LoopConfig`; None keeps this model's. `also` is dropped where
                start or length is given and it is not.
            boundary: "plain", "anchored" or a callable; None keeps this model's.

        Raises:
            InputError: layers that the model does not have, an unknown boundary.
        """
        if also is None and (start is not None or length is not None):
            also = ()
        changes: dict[str, Any] = {"start": start, "length": length, "max_loops": max_loops, "also": also}
        changes = {key: value for key, value in changes.items() if value is not None}
        own = self.loop.boundary if self.config.loop.boundary == "plain" else None
        if isinstance(boundary, str):
            changes["boundary"], own = boundary, None
        elif boundary is not None:
            if not callable(boundary):
                raise InputError(f"boundary is {boundary!r}; it must be a name or a callable (x, x0, k) -> x")
            own = boundary
        with torch.device("meta"):
            twin = type(self)(self.config.replace(**changes), own)
        weight = self.embed.weight
        for module in twin.modules():
            if isinstance(module, Anchored) and module is not own:
                module.weight = nn.Parameter(torch.ones_like(weight[0], requires_grad=False))
        parts = [name for name, _ in self.named_children() if name not in ("prelude", "loop", "coda")]
        pairs = [(getattr(self, name), getattr(twin, name)) for name in parts]
        pairs += zip(self.layers, twin.layers, strict=True)
        pairs += [
            (old.boundary, new.boundary)
            for old, new in zip(self.looped_blocks, twin.looped_blocks, strict=False)
            if isinstance(old.boundary, Anchored) and isinstance(new.boundary, Anchored)
        ]
        for source, target in pairs:
            _share(source, target)
        for name in ("mask_id", "pad_id", "max_length", "suppressed_ids", "logit_shift"):
            setattr(twin, name, getattr(self, name))
        if max_loops is None:
            twin.max_loops = self.max_loops
        return twin.train(self.training)

    @property
    def layers(self) -> list[Block]:
        """All distinct layers in order."""
        runs = (part.layers if isinstance(part, LoopedBlock) else [part] for part in self._parts())
        return [layer for run in runs for layer in run]  # type: ignore[misc]

    @property
    def looped_blocks(self) -> list[LoopedBlock]:
        """`loop` and, with `config.loop.also`, those inside the coda."""
        return [part for part in self._parts() if isinstance(part, LoopedBlock)]

    def _parts(self) -> list[nn.Module]:
        return [*self.prelude, self.loop, *self.coda]

    def _check_depth(self, depth: Depth) -> None:
        for name in ("early_exit", "backprop_loops"):
            if self.config.loop.also and getattr(depth, name) is not None:
                raise InputError(f"{name} needs a model with one looped block; this one has {len(self.looped_blocks)}")

    def _watched(self, depth: Depth, ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The positions that the pass's exit rule is to look at, bool [B, T] or None for all."""
        if depth.early_exit is None:
            return None
        real = None if attention_mask is None else attention_mask.bool()
        if check_over(getattr(depth.early_exit, "over", "sequence")) == "sequence":
            return real
        masked = ids == self.mask_id
        return masked if real is None else masked & real

    def _final(self, x: Tensor, context: Context) -> Tensor:
        h = self.final_norm(x, out_dtype=self.lm_head.weight.dtype)[1]
        if context.cond is not None:
            shift, scale = self.final_modulation(context.cond)[:, None].chunk(2, dim=-1)
            h = modulate(h, shift, scale).to(h.dtype)
        return h

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.positions not in ("rope", "both"):
            return None
        c = self.config
        return rope_table(positions, c.head_dim or 0, c.rope_theta, c.rope_sign, c.rope_table_dtype)

    def _condition(self, sigma: Tensor | None, device: torch.device) -> Tensor | None:
        if self.config.modulation != "adaln":
            return None
        if not self.config.time_conditioning:
            return F.silu(self.sigma_embed(torch.zeros(1, device=device)))
        if sigma is None:
            raise InputError("this model is conditioned on time; pass sigma, the noise level -log(alpha_t), [B]")
        sigma = torch.as_tensor(sigma, device=device).reshape(-1)
        if device.type == "cpu" and not torch.compiler.is_compiling() and not bool(sigma.isfinite().all()):
            raise InputError(
                "sigma is not finite; where it is infinite at t = 1, give the noise schedule an eps above 0"
            )
        return F.silu(self.sigma_embed(sigma))

    def _check(self, ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> None:
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise InputError(f"input_ids is {ids.dtype} {list(ids.shape)}; expected integers [B, T]")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise InputError(
                f"{ids.shape[1]} tokens are more than max_position_embeddings = {self.config.max_position_embeddings}"
            )
        for name, other in (("attention_mask", attention_mask), ("document_ids", document_ids)):
            if other is None:
                continue
            if not isinstance(other, Tensor):
                raise InputError(f"{name} is a {type(other).__name__}; it must be a tensor like input_ids")
            if other.shape != ids.shape:
                raise InputError(f"{name} is {list(other.shape)}, input_ids is {list(ids.shape)}; they must agree")
        if attention_mask is not None:
            check_mask(attention_mask)
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LoopMDM:
        """A new model from a preset (`loopmdm.PRESETS`), any configuration field overridden."""
        return cls(preset(name, **overrides))


class SigmaEmbedding(nn.Module):
    """Noise level -> conditioning vector: 256 sinusoids, Linear, SiLU, Linear (DiT's timestep embedder)."""

    SINUSOIDS = 256

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(self.SINUSOIDS, cond_dim), nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma: Tensor) -> Tensor:  # [B] -> [B, C]
        half = self.SINUSOIDS // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=sigma.device, dtype=torch.float32) / half)
        angle = sigma[:, None].float() * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(wave)))


def _share(source: nn.Module, target: nn.Module) -> None:
    """Put the Parameter objects of a module into another one of the same make."""
    for a, b in zip(source.modules(), target.modules(), strict=True):
        if isinstance(a, Packed):
            raise InputError(PACKED)
        for name, parameter in a.named_parameters(recurse=False):
            setattr(b, name, parameter)


def _layout(ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions ([T], or [B, T] where sequences start elsewhere) and the attention mask ([B, 1, 1 or T, T] or None)."""
    T = ids.shape[1]
    steps = torch.arange(T, device=ids.device)
    numbers = document_numbers(attention_mask, document_ids)
    if numbers is None:
        return steps, None
    if document_ids is None:
        real = numbers == 0
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        # A sequence of padding alone would leave its queries with no key at all: it may look at itself.
        visible = real | ~real.any(-1, keepdim=True)
        return positions, visible[:, None, None, :]
    return steps - starts(numbers), (numbers[:, None, :, None] == numbers[:, None, None, :])
