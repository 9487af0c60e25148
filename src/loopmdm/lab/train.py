"""Training: one loop for every task, on accelerate.

S, t, masks and data are functions of (seed, step, global sample index), and each objective is normalised over
the whole step, so a step does not depend on how many processes or micro-batches share it. Dropout is the exception:
it draws from torch's generator, another one on each process.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import random
from ..config import ModelConfig, check_loops
from ..diffusion import NELBO, T_MIN, nelbo
from ..errors import InputError, nearest
from ..model.flops import training_flops
from ..model.lm import LoopMDM
from .optim import DECAYS, OPTIMIZERS, averaged, build_optimizers, rate

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = Callable[[int, Tensor], Tensor]
"""(step, global sample indices [b]) -> clean tokens int64 [b, T]."""


TOKENIZER_FILE = "tokenizer.json"
CHOICES = {
    "optimizer": OPTIMIZERS,
    "decay": DECAYS,
    "objective": ("nelbo", "masked_mean"),
    "precision": ("no", "bf16", "fp16"),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences a step, over all processes and micro-batches.
        accumulate: micro-batches a step on each process.
        optimizer: "adamw" with lr, or "muon" with matrix_lr on weight matrices and lr elsewhere.
        lr: AdamW's peak rate.
        matrix_lr: Muon's peak rate.
        warmup: linear warm-up, steps.
        decay: "constant", "linear" or "cosine", down to 0 over the last decay_share of the steps.
        decay_share: see decay, in [0, 1].
        clip: gradient-norm bound.
        ema: decay of the weight average that is evaluated and saved; 0 keeps the raw weights.
        objective: "nelbo", or "masked_mean", the mean over all masked tokens of the step (`loopmdm.nelbo`).
        t_start: upper end of t at first; it grows to 1 over the first t_ramp of the steps.
        t_ramp: see t_start, a share in [0, 1].
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
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                raise InputError(f"{name} is {getattr(self, name)!r}{nearest(str(getattr(self, name)), options)}")
        if self.warmup < 0:
            raise InputError(f"warmup is {self.warmup}; it must be at least 0")
        for name in ("decay_share", "t_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must be in [0, 1)")
        if not T_MIN < self.t_start <= 1:
            raise InputError(f"t_start is {self.t_start}; it must be above {T_MIN} and at most 1")
        if self.loops is not None:
            check_loops(self.loops, "loops")
        random.signed(self.seed)

    def t_range(self, step: int) -> tuple[float, float]:
        ramp = self.t_ramp * self.steps
        share = min(1.0, step / ramp) if ramp else 1.0
        return (T_MIN, self.t_start + (1 - self.t_start) * share)


@dataclass
class Progress:
    """State of a run, passed to `on_step` after every step.

    Attributes:
        step, steps: steps done, and how many there will be.
        result: of this process's last micro-batch.
        nelbo: NELBO estimate of the whole step, nats a token.
        flops: training FLOPs so far, all processes.
        seconds: since training began, `on_step` included.
        learning_rate: AdamW's, of this step.
        average: what `fit` would return now; in training mode when there is no EMA.
    """

    step: int
    steps: int
    result: NELBO
    nelbo: float
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


def accelerator_for(recipe: Recipe, config: ModelConfig) -> Accelerator:
    """The engine that `fit` makes unless it is given one: CUDA if there is any, else CPU; DDP under a launcher.

    Raises:
        InputError: a precision that this device cannot do.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # At S = 1 an anchored boundary is not visited, so its gain has no gradient in that step.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=config.loop.boundary != "plain")
    try:
        return Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    except ValueError as error:
        raise InputError(f"precision {recipe.precision!r} cannot be used here: {error}") from None


def micro_batch(recipe: Recipe, processes: int) -> int:
    """Sequences a micro-batch; a batch size that processes and micro-batches do not divide is an InputError."""
    if recipe.batch_size % (processes * recipe.accumulate):
        raise InputError(
            f"batch_size {recipe.batch_size} is not a multiple of processes x accumulate = "
            f"{processes} x {recipe.accumulate}"
        )
    return recipe.batch_size // (processes * recipe.accumulate)


def fit(
    model: LoopMDM,
    batch: Batch,
    recipe: Recipe,
    *,
    on_step: Callable[[Progress], None] | None = None,
    accelerator: Accelerator | None = None,
) -> LoopMDM:
    """Train `model` in place and return its weight average (the model itself without EMA).

    Ctrl-C abandons the step in progress; what was learnt so far is returned.

    Raises:
        InputError: a batch size that processes and micro-batches do not divide; a loss or gradient that is not
            finite (before it reaches the weights).
    """
    accelerator = accelerator or accelerator_for(recipe, model.config)
    micro = micro_batch(recipe, accelerator.num_processes)
    first = accelerator.process_index * recipe.accumulate * micro
    model.to(accelerator.device).train()
    optimizers = build_optimizers(model, recipe.optimizer, recipe.lr, recipe.matrix_lr)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    prepared = accelerator.prepare(_Loss(model), *optimizers)
    loss_module, optimizers = prepared[0], list(prepared[1:])
    average = averaged(model, recipe.ema) if recipe.ema else None
    if model.config.dropout and accelerator.num_processes > 1:  # else every process would drop the same units
        torch.manual_seed(recipe.seed + accelerator.process_index)

    def current() -> LoopMDM:
        return model if average is None else cast(LoopMDM, average.module)

    flops, started = 0.0, time.perf_counter()
    try:
        for step in range(recipe.steps):
            multiplier = rate(step / recipe.steps, step, recipe.warmup, recipe.decay, recipe.decay_share)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = lr * multiplier
            bound, masked = 0.0, 0
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
                with nullcontext() if last else accelerator.no_sync(loss_module):
                    result = loss_module(tokens, options)
                    share = _share(recipe, result, tokens)
                    accelerator.backward(result.loss * (share / recipe.accumulate))
                bound += float(result.nelbo) / recipe.accumulate
                masked += result.masked_tokens
            if accelerator.num_processes > 1:
                sums = torch.tensor([bound, masked], dtype=torch.float64, device=accelerator.device)
                bound, masked = accelerator.reduce(sums).tolist()
                bound /= accelerator.num_processes
            if recipe.objective == "masked_mean":
                _scale_gradients(model, recipe.batch_size * tokens.shape[1] / max(1, masked))
            norm = float(accelerator.clip_grad_norm_(model.parameters(), recipe.clip))
            # fp16's scaler lets gradients overflow: it then skips the step and scales down
            if not math.isfinite(bound) or not (math.isfinite(norm) or accelerator.scaler is not None):
                what = f"loss became {bound}" if not math.isfinite(bound) else f"gradient's norm became {norm}"
                raise InputError(f"the {what} at step {step + 1}; lower the learning rate")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if average is not None:
                average.update_parameters(model)
            flops += recipe.batch_size * training_flops(model.config, tokens.shape[1], result.num_loops)
            if on_step is not None:
                seconds = time.perf_counter() - started
                lr = recipe.lr * multiplier
                on_step(Progress(step + 1, recipe.steps, result, bound, flops, seconds, lr, current()))
    except KeyboardInterrupt:
        pass
    return current().eval()


def _share(recipe: Recipe, result: NELBO, tokens: Tensor) -> float:
    """What turns a micro-batch's mean over masked tokens into its sum over a constant; 1 for the NELBO.

    How many tokens the whole step masks is known only after its last micro-batch; `_scale_gradients` puts
    that number in the constant's place.
    """
    return result.masked_tokens / tokens.numel() if recipe.objective == "masked_mean" else 1.0


def _scale_gradients(model: nn.Module, factor: float) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


class RunFolder:
    """Where a run leaves what it made: `metrics.jsonl` (no clock in it), `timing.jsonl`, `recipe.json`, `model/`.

    Raises:
        InputError: the folder exists and is not empty, or cannot be made.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any]) -> None:
        self.path = self.check(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}") from None

    @staticmethod
    def check(path: str | Path) -> Path:
        """The path, if a run may be put there; nothing is made."""
        path = Path(path)
        try:
            if path.exists() and any(path.iterdir()):
                raise InputError(f"{path} already holds a run; name another folder or remove it")
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
        return path

    def log(self, **values: Any) -> None:
        self._append("metrics.jsonl", values)

    def clock(self, **values: Any) -> None:
        self._append("timing.jsonl", values)

    def save(self, model: LoopMDM, tokenizer: Any = None, name: str = "model") -> Path:
        """Write a checkpoint that `LoopMDM.from_pretrained` reads; each file appears whole or not at all."""
        folder = self.path / name
        model.save_pretrained(folder)
        if tokenizer is not None:
            partial = folder / f".tokenizer.{os.getpid()}.tmp"
            partial.write_text(tokenizer.to_str(), encoding="utf-8")
            os.replace(partial, folder / TOKENIZER_FILE)
        return folder

    def write_results(self, results: Mapping[str, Any]) -> None:
        (self.path / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(values) + "\n")
