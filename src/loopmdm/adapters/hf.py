"""LoopMDM in Hugging Face transformers: importing this module registers model type "loopmdm".

    import loopmdm.adapters.hf
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)     # a LoopMDM's own folder, or one saved here
    trainer = transformers.Trainer(model, args, data_collator=DiffusionCollator(model.config), ...)

The model inside is `model.model`, a `LoopMDM`: `nelbo`, `generate` and the rest take it, and its own `save_pretrained`
writes the folder that `LoopMDM.from_pretrained` reads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .. import random
from ..config import LoopConfig, ModelConfig, preset
from ..diffusion.loss import T_MIN, corrupt, cross_entropies, sample_loops, stratified_times
from ..diffusion.schedule import Schedule, build_schedule
from ..errors import InputError
from ..model.block import Block, Norm
from ..model.checkpoint import MODEL_TYPE
from ..model.denoiser import document_numbers
from ..model.lm import LoopMDM
from ..model.loop import Anchored

IGNORED = -100
"""Label of a position that is not counted."""
FIELDS = tuple(spec.name for spec in dataclasses.fields(ModelConfig))


class LoopMDMConfig(PretrainedConfig):
    """A `ModelConfig` as transformers keeps one; the same names, `loop` being a dictionary.

    Raises:
        InputError: what `ModelConfig` refuses.
    """

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        base = preset("tiny-llama").to_dict() if not given else {}
        if isinstance(given.get("loop"), LoopConfig):
            given["loop"] = dataclasses.asdict(given["loop"])
        values = ModelConfig.from_dict({**base, **given}).to_dict()
        super().__init__(**{k: values[k] for k in ("pad_token_id", "tie_word_embeddings")}, **kwargs)
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> LoopMDMConfig:
        return cls(**config.to_dict())

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict({name: getattr(self, name) for name in FIELDS})

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything: a folder does not depend on this version's defaults."""
        return self.to_dict()


class LoopMDMPreTrainedModel(PreTrainedModel):
    """What the two models share."""

    config_class = LoopMDMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # so that Trainer averages over accumulation steps itself
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"model.lm_head.weight": "model.embed.weight"}  # noqa: RUF012
    _supports_sdpa = True
    model: LoopMDM

    def __init__(self, config: LoopMDMConfig) -> None:
        super().__init__(config)
        self.model = LoopMDM(config.model_config())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Block, LoopMDM)):
            module.reset_parameters()
        elif isinstance(module, (Norm, Anchored)) and module.weight is not None:
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.lm_head = value  # type: ignore[assignment]


class LoopMDMModel(LoopMDMPreTrainedModel):
    """For `AutoModel`: final hidden states."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | None = None,
        sigma: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor]:
        """ids [B, T] -> `last_hidden_state` [B, T, D], after the final norm."""
        out = BaseModelOutput(last_hidden_state=self.model.hidden(input_ids, attention_mask, num_loops, sigma))
        return out if return_dict is not False else out.to_tuple()


class LoopMDMForMaskedLM(LoopMDMPreTrainedModel):
    """For `AutoModelForMaskedLM` and `Trainer`."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_loops: int | Tensor | None = None,
        sigma: Tensor | None = None,
        t: Tensor | None = None,
        schedule: Schedule | str = "linear",
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predict the clean token at every position.

        Args:
            input_ids: [B, T], masked positions holding the mask id.
            attention_mask: bool or 0/1 [B, T].
            labels: [B, T], the clean ids of the positions to be counted, -100 elsewhere.
            num_loops: S; None is the configuration's `max_loops`.
            sigma: noise level [B] of a time-conditioned model; None is that of `t` where `t` is given.
            t: [B] in (0, 1], the times that the masks were drawn at.
            schedule: of `t`.

        Returns:
            `loss`, with labels. Without `t` it is the mean cross-entropy of the counted positions in nats (what every
            MaskedLM of transformers returns); with `t` their cross-entropies weighted by w(t) (1/t for the linear
            schedule), divided by the number of tokens: the NELBO in nats a token, `loopmdm.nelbo`'s estimate.
            `logits` [B, T, V] in fp32, suppressed ids at -inf; None in training with labels, where only counted rows
            reach the head.

        Raises:
            InputError: what `LoopMDM.forward` refuses; a label that the model never predicts (checked on CPU).
        """
        if isinstance(num_loops, Tensor) and num_loops.dim() == 0:
            num_loops = int(num_loops)
        build = build_schedule(schedule)
        if t is not None and sigma is None:
            sigma = build.sigma(t)
        out = self.model(input_ids, attention_mask, num_loops, sigma)
        loss = None if labels is None else self._loss(out.hidden, input_ids, attention_mask, labels, t, build)
        logits = out.logits if labels is None or not self.training else None
        result = MaskedLMOutput(loss=loss, logits=logits)
        return result if return_dict is not False else result.to_tuple()

    def _loss(
        self,
        hidden: Tensor,
        ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        t: Tensor | None,
        schedule: Schedule,
    ) -> Tensor:
        if labels.shape != ids.shape:
            raise InputError(f"labels is {list(labels.shape)}, input_ids is {list(ids.shape)}; they must agree")
        rows = labels != IGNORED
        if labels.device.type == "cpu":
            wrong = [n for n in labels[rows].unique().tolist() if n in self.model.suppressed_ids or n < 0]
            if wrong:
                raise InputError(f"labels holds {wrong[0]}, which the model never predicts; {IGNORED} is not counted")
        numbers = document_numbers(attention_mask, None)
        if t is None:
            return cross_entropies(self.model, hidden, labels, rows, numbers=numbers)[0] / rows.sum().clamp(min=1)
        weights = schedule.weight(t)[rows.nonzero()[:, 0]].to(torch.promote_types(hidden.dtype, torch.float32))
        tokens = ids.numel() if attention_mask is None else attention_mask.sum()
        return cross_entropies(self.model, hidden, labels, rows, weights, numbers=numbers)[0] / tokens


class DiffusionCollator:
    """Batches for `Trainer`: sequences of ids -> masked `input_ids`, `labels`, the times `t` and one S.

    Numbers are functions of (seed, batch, process, row), never of torch's generator. Data-loader workers count batches
    for themselves: with more than one, or with `persistent_workers=False`, they begin again each epoch.

    Args:
        config: of the model; its mask and pad ids and `max_loops` are read.
        seed: of masks, times and S.
        num_loops: S ~ U{1..max_loops} where None, or a whole number.
        objective: "nelbo" passes `t` on, so that the loss is the NELBO; "masked_mean" does not.
        schedule: name of the noise schedule that masks are drawn by; the model's forward takes it too.
    """

    def __init__(
        self,
        config: LoopMDMConfig | ModelConfig,
        *,
        seed: int = 0,
        num_loops: int | None = None,
        objective: str = "nelbo",
        schedule: str = "linear",
    ) -> None:
        self.config = config.model_config() if isinstance(config, LoopMDMConfig) else config
        if objective not in ("nelbo", "masked_mean"):
            raise InputError(f"objective is {objective!r}; it must be 'nelbo' or 'masked_mean'")
        self.seed, self.num_loops, self.objective, self.schedule = random.signed(seed), num_loops, objective, schedule
        self.calls = 0

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Examples: lists or tensors of ids, or dictionaries with `input_ids`. Right-padded to the longest."""
        rows = [torch.as_tensor(e["input_ids"] if isinstance(e, dict) else e, dtype=torch.int64) for e in examples]
        length = max(len(row) for row in rows)
        mask_id, pad_id = self.config.mask_token_id or 0, self.config.pad_token_id or 0
        clean = torch.stack([nn.functional.pad(row, (0, length - len(row)), value=pad_id) for row in rows])
        real = torch.stack([torch.arange(length) < len(row) for row in rows])
        worker, B = get_worker_info(), len(rows)
        batch = self.calls if worker is None else self.calls * worker.num_workers + worker.id
        self.calls += 1
        processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        index = rank * B + torch.arange(B)
        t = stratified_times(index, processes * B, self.seed, batch, (T_MIN, 1.0))
        made = corrupt(
            clean, mask_id, t, seed=self.seed, step=batch, index=index, maskable=real, schedule=self.schedule
        )
        loops = self.num_loops or sample_loops(self.config.loop.max_loops, self.seed, batch)
        out: dict[str, Any] = {
            "input_ids": made.tokens,
            "attention_mask": real.long(),
            "labels": clean.masked_fill(~made.mask, IGNORED),
            "num_loops": torch.tensor(loops),
        }
        return {**out, "t": t} if self.objective == "nelbo" else out


AutoConfig.register(MODEL_TYPE, LoopMDMConfig, exist_ok=True)
AutoModel.register(LoopMDMConfig, LoopMDMModel, exist_ok=True)
AutoModelForMaskedLM.register(LoopMDMConfig, LoopMDMForMaskedLM, exist_ok=True)
