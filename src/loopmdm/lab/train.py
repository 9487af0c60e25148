"""Training: one loop for every task, on accelerate.

S, t, masks and data are functions of (seed, step, global sample index), so a step does not depend on how
many processes or micro-batches share it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..diffusion import NELBO, T_MIN, nelbo
from ..errors import InputError
from ..model.flops import training_flops
from ..model.lm import LoopMDM
from .optim import averaged, build_optimizers, rate

Batch = Callable[[int, Tensor], Tensor]
"""(step, global sample indices [b]) -> clean tokens int64 [b, T]."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences a step, over all processes and micro-batches.
        accumulate: micro-batches a step on each process.
        optimizer, lr, matrix_lr: "adamw" with lr, or "muon" with matrix_lr on weight matrices and lr elsewhere.
        warmup, decay, decay_share: linear warm-up steps; "constant", "linear" or "cosine" decay over the last share.
        clip: gradient-norm bound.
        ema: decay of the weight average that is evaluated and saved; 0 keeps the raw weights.
        objective: "nelbo" or "masked_mean", see `loopmdm.nelbo`.
        t_start, t_ramp: the upper end of t grows from t_start to 1 over the first t_ramp share of training.
        loops: S of every step; None draws S ~ U{1..max_loops}.
        seed: of everything random.
        precision: accelerate's "no", "bf16" or "fp16".
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-4
    matrix_lr: float = 0.02
    warmup: int = 100
    decay: str = "linear"
    decay_share: float = 0.4
    clip: float = 1.0
    ema: float = 0.999
    objective: str = "nelbo"
    t_start: float = 1.0
    t_ramp: float = 0.0
    loops: int | None = None
    seed: int = 0
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "matrix_lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must be in [0, 1)")
        if not T_MIN < self.t_start <= 1 or not 0 <= self.t_ramp <= 1:
            raise InputError(f"t_start is {self.t_start} and t_ramp {self.t_ramp}; both lie in [0, 1], t_start above 0")

    def t_range(self, step: int) -> tuple[float, float]:
        ramp = self.t_ramp * self.steps
        share = min(1.0, step / ramp) if ramp else 1.0
        return (T_MIN, self.t_start + (1 - self.t_start) * share)


@dataclass
class Progress:
    """State of a run, passed to `on_step` after every step."""

    step: int
    steps: int
    result: NELBO
    flops: float
    seconds: float
    learning_rate: float
    average: LoopMDM


class _Loss(nn.Module):
    """nelbo as a forward pass, so that DDP's hooks see it."""

    def __init__(self, model: LoopMDM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, options: Mapping[str, Any]) -> NELBO:
        return nelbo(self.model, tokens, **options)


def fit(
    model: LoopMDM,
    batch: Batch,
    recipe: Recipe,
    *,
    on_step: Callable[[Progress], None] | None = None,
    accelerator: Accelerator | None = None,
) -> LoopMDM:
    """Train `model` in place and return its weight average (the model itself without EMA).

    Ctrl-C ends training after the step in progress; what was learnt so far is returned.

    Raises:
        InputError: a batch size that processes and micro-batches do not divide; a loss that is not finite.
    """
    accelerator = accelerator or Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available())
    shares = accelerator.num_processes * recipe.accumulate
    if recipe.batch_size % shares:
        raise InputError(
            f"batch_size {recipe.batch_size} is not a multiple of processes x accumulate = "
            f"{accelerator.num_processes} x {recipe.accumulate}"
        )
    micro = recipe.batch_size // shares
    first = accelerator.process_index * recipe.accumulate * micro
    model.to(accelerator.device).train()
    optimizers = build_optimizers(model, recipe.optimizer, recipe.lr, recipe.matrix_lr)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    prepared = accelerator.prepare(_Loss(model), *optimizers)
    loss_module, optimizers = prepared[0], list(prepared[1:])
    average = averaged(model, recipe.ema) if recipe.ema else None

    flops, started = 0.0, time.perf_counter()
    for step in range(recipe.steps):
        multiplier = rate(step / recipe.steps, step, recipe.warmup, recipe.decay, recipe.decay_share)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * multiplier
        try:
            for part in range(recipe.accumulate):
                index = first + part * micro + torch.arange(micro)
                tokens = batch(step, index).to(accelerator.device)
                options = {
                    "num_loops": recipe.loops,
                    "seed": recipe.seed,
                    "step": step,
                    "index": index,
                    "global_batch": recipe.batch_size,
                    "t_range": recipe.t_range(step),
                    "objective": recipe.objective,
                }
                last = part == recipe.accumulate - 1
                with _sync(accelerator, loss_module, last), accelerator.autocast():
                    result = loss_module(tokens, options)
                    accelerator.backward(result.loss / recipe.accumulate)
            if not math.isfinite(float(result.loss.detach())):
                raise InputError(f"the loss became {float(result.loss.detach())} at step {step}; lower the learning rate")
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if average is not None:
                average.update_parameters(model)
            flops += recipe.batch_size * training_flops(model.config, tokens.shape[1], result.num_loops)
            if on_step is not None:
                current = model if average is None else average.module
                seconds = time.perf_counter() - started
                on_step(Progress(step + 1, recipe.steps, result, flops, seconds, recipe.lr * multiplier, current))
        except KeyboardInterrupt:
            break
    return (model if average is None else average.module).eval()


def _sync(accelerator: Accelerator, module: nn.Module, last: bool) -> Any:
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(module)


class RunFolder:
    """Where a run leaves what it made: `metrics.jsonl` (no clock in it), `timing.jsonl`, `recipe.json`, `model/`.

    Raises:
        InputError: the folder exists and is not empty, or cannot be made.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any]) -> None:
        self.path = Path(path)
        try:
            if self.path.exists() and any(self.path.iterdir()):
                raise InputError(f"{self.path} already holds a run; name another folder or remove it")
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}") from None

    def log(self, **values: Any) -> None:
        self._append("metrics.jsonl", values)

    def clock(self, **values: Any) -> None:
        self._append("timing.jsonl", values)

    def save(self, model: LoopMDM, tokenizer: Any = None, name: str = "model") -> Path:
        """Write a checkpoint that `LoopMDM.from_pretrained` reads; each file appears whole or not at all."""
        folder = self.path / name
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(values) + "\n")


