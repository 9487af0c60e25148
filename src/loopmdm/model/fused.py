"""A LoopMDM for inference through the fused ops: five launches a layer (`fused_layers`), weights folded once.

Time conditioning changes nothing of that: what modulation is for each sequence is worked out once a pass, not once a
visit, into vectors that the same kernels take (`fold.conditioned`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.residual_norm import residual_norm
from ..ops.spans import Spans, packed, spans_of
from .depth import Depth, planned
from .fold import conditioned
from .fused_layers import Layers, Run, Shared, Stream, blocks_of, check_inference, inference, layers_why_not
from .packed import PACKED, Packed

if TYPE_CHECKING:
    from .lm import LoopMDM


def why_not(model: LoopMDM) -> str | None:
    """Why a model cannot run through the fused ops, or None."""
    if any(isinstance(module, Packed) for module in model.modules()):
        return PACKED
    return layers_why_not(model.config, model.layers, model.looped_blocks)


class Fused(Layers):
    """A `Denoiser` that holds a model's folded weights and gives its hidden states, without gradients.

    Weights are folded here, once. After they changed (a training step, an average copied in) make a new one: the old
    one is then neither, since what folding leaves as it is are the model's own tensors, and the rest are copies. In the
    layers' own dtype copies are: qkv where positions rotate in halves and up of a SwiGLU (for the order of their rows),
    out and down under layer norm or modulation, unless that depends on time. In another dtype all four are, as many
    numbers as the layers. With time conditioning modulation is read from the model in each pass. Dropout is off.

    Results are the model's up to rounding, padding included (0). In 16 bits rotation, modulation and biases are applied
    in fp32, and so is the residual stream if the model has `residual_in_fp32`. Of weights that are 16-bit already only
    such copies of out and down are rounded a second time. Autocast is off within: `dtype` takes its place.

    For GPUs: on a CPU the model itself is faster.

    Args:
        model: any but what `why_not` names.
        dtype: of the projections' operands; the layers' by default. Hidden states have the head's dtype.
        impl: of every op: "auto", "torch", "triton" or "cublas" (both for bfloat16, float16 and float32). With "cublas"
            torch multiplies, the rest is "triton" where that runs, and attention "auto".
        attention_impl: any name that `ops.attention` takes, instead of `impl`.

    Raises:
        InputError: a model that cannot be fused, a dtype that is none.
    """

    takes_depth = True

    def __init__(
        self,
        model: LoopMDM,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        attention_impl: str | None = None,
    ) -> None:
        reason = why_not(model)
        if reason is not None:
            raise InputError(f"this model cannot be fused: {reason}")
        super().__init__(model.config, model.layers[0].mlp.up.weight, dtype, impl, attention_impl)
        self.mask_id, self.pad_id, self.vocab_size = model.mask_id, model.pad_id, model.vocab_size
        self.max_length, self.suppressed_ids, self.logit_shift = (
            model.max_length,
            model.suppressed_ids,
            model.logit_shift,
        )
        self.max_loops, self._model = model.max_loops, model
        with torch.no_grad():
            cond = None if self.config.time_conditioning else model._condition(None, model.embed.weight.device)
            self._runs = _linked([self._fold(part, cond) for part in model._parts()])
            self._final = _final(model, cond)

    @inference
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | Tensor | Depth | None = None,
        sigma: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> the head's input [B, T, D] in its dtype; arguments as those of `LoopMDM.forward`.

        sigma is read only with time conditioning. A `Depth` may hold an S, one a sequence, and an exit rule; a change
        within rounding of tau may stop a sequence in one of model and plan and not in the other. On CUDA, padding and
        documents make this wait for the device to be checked; while a graph is captured they are not.

        Raises:
            InputError: as the model, and: a sigma that is neither one number nor [B], a mask with holes in a sequence
                or document, a document that comes back later in its row, what only training has a use for (`every`,
                `backprop_loops`, `checkpoint`).
        """
        self._model._check(input_ids, attention_mask, document_ids)
        loops, depth = planned(num_loops, self.max_loops, len(input_ids))
        self._model._check_depth(depth)
        check_inference(depth)
        spans, positions = self._spans(input_ids, attention_mask, document_ids)
        watched = self._model._watched(depth, input_ids, attention_mask)
        shared = Shared(self._model._rope(positions), spans, watched)
        runs, final = self._runs, self._final
        if self.config.time_conditioning:
            runs, final = self._condition(sigma, input_ids)
        stream = self._enter(input_ids, positions, runs[0].layers[0].attn_gain, depth.early_exit is not None)
        for run in runs:
            if not run.looped:
                stream = self._visit(run, stream, shared, run.after)
                continue
            stream = self._loop(run, stream, shared, loops, depth)
            if isinstance(loops, Tensor) and run.again is not run.after and run is not runs[-1]:
                stream = self._open(stream.x, run.after, stream.mean)
        if isinstance(num_loops, Depth):
            num_loops.visits, num_loops.outputs = depth.visits, []
        h = self._close(stream.x, *final)
        return h if attention_mask is None else h * attention_mask.to(h.dtype)[..., None]

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self._model.head()

    def forward_flops(self, length: int, num_loops: float) -> float:
        return self._model.forward_flops(length, num_loops)

    def _condition(self, sigma: Tensor | None, ids: Tensor) -> tuple[list[Run], tuple[Tensor | None, Tensor | None]]:
        """The runs and the final norm's vectors, of each sequence by its sigma."""
        cond = self._model._condition(sigma, ids.device)
        assert cond is not None
        if len(cond) not in (1, len(ids)):
            raise InputError(
                f"sigma holds {len(cond)} numbers; it must be one, or one for each of {len(ids)} sequences"
            )
        cond, runs = cond.expand(len(ids), -1), []
        for run, part in zip(self._runs, self._model._parts(), strict=True):
            layers = zip(run.layers, blocks_of(part), strict=True)
            runs.append(run._replace(layers=[conditioned(f, layer, cond) for f, layer in layers]))
        return _linked(runs), _final(self._model, cond)

    def _close(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """The final norm; gain and bias [D], or [B, D] in a pass of their own."""
        norm, dtype = self._model.final_norm, self._model.lm_head.weight.dtype
        own = gain is not None and gain.dim() == 2
        vectors = (None, None) if own else (gain, bias)
        wide = torch.promote_types(dtype, torch.float32) if own else dtype
        h = residual_norm(x, None, *vectors, kind=norm.kind, eps=norm.eps, out_dtype=wide, impl=self.norm_impl)[1]
        if gain is not None and bias is not None and own:
            h = torch.addcmul(bias[:, None], h, gain[:, None]).to(dtype)
        return h

    def _spans(
        self, ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Spans | None, Tensor]:
        """Spans, and positions [T] or [B, T]: how far a token is from the start of its span."""
        check = not (ids.is_cuda and torch.cuda.is_current_stream_capturing())
        spans = spans_of(attention_mask, document_ids, check=check)
        steps = torch.arange(ids.shape[1], device=ids.device)
        if spans is None:
            return None, steps
        if document_ids is not None and check:
            _check_documents(document_ids, attention_mask)
        return packed(spans) if check and self._packs(*ids.shape) else spans, steps - spans.first

    def _enter(self, ids: Tensor, positions: Tensor, gain: Tensor | None, exits: bool) -> Stream:
        x = self._model.embed(ids)
        if self.config.positions in ("learned", "both"):
            x = x + self._model.position_embed(positions)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        keep = exits or any(run.eps is not None for run in self._runs)
        x = x if self.config.residual_in_fp32 else x.to(self.dtype)
        return self._centre(x, gain, keep)


def _linked(runs: list[Run]) -> list[Run]:
    """Runs that know what comes after them."""
    firsts = [run.layers[0].attn_gain for run in runs[1:]]
    return [run._replace(after=gain) for run, gain in zip(runs, (*firsts, None), strict=True)]


def _final(model: LoopMDM, cond: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gain and bias of the final norm with its modulation in them, [D], or of each of several sequences [B, D]."""
    norm = model.final_norm
    gain, bias = (None if p is None else p.detach().clone() for p in (norm.weight, norm.bias))
    if cond is None:
        return gain, bias
    shift, scale = model.final_modulation(cond).to(torch.promote_types(cond.dtype, torch.float32)).chunk(2, dim=-1)
    if not model.config.time_conditioning:
        shift, scale = shift[0], scale[0]
    gain = 1 + scale if gain is None else gain * (1 + scale)
    return gain, shift if bias is None else bias * (1 + scale) + shift


def _check_documents(documents: Tensor, attention_mask: Tensor | None) -> None:
    """Documents are runs: an id that comes back would be attended to by the model, and not here."""
    if not documents.numel():
        return
    real = torch.ones_like(documents, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    one = torch.where(real, 2 * documents.long(), -1)  # doubled, so that no document has padding's id
    runs = real[:, 0] + ((one[:, 1:] != one[:, :-1]) & real[:, 1:]).sum(1)
    ordered = one.sort(dim=1).values
    ids = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1) - (~real).any(1).long()
    if bool((runs != ids).any()):
        row = int((runs != ids).nonzero()[0])
        raise InputError(f"document_ids: an id comes back later in row {row}; a document is one run of equal ids")
