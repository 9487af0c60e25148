"""Training: one loop for every task, on accelerate.

S, t, masks and data are functions of (seed, step, global sample index), and each objective is normalised over
the whole step, so a step does not depend on how many processes or micro-batches share it. Dropout is the exception:
it draws from torch's generator, another one on each process. All that a run needs to go on exactly is in
`Trainer.state_dict`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..config import ModelConfig, check_loops
from ..diffusion import NELBO, NELBOLoss, sample_loops
from ..errors import InputError
from ..model.flops import inverse_flops_loops, training_flops
from ..model.lm import LoopMDM
from .corpus import Sequences
from .optim import SpikeGuard, averaged, build_optimizers, rate
from .recipe import Recipe
from .run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Batch", "Progress", "Recipe", "RunFolder", "Sequences", "Trainer", "fit"]


Batch = Callable[[int, Tensor], Tensor | Sequences]
"""(step, global sample indices [b]) -> clean tokens int64 [b, T], or `Sequences`."""


PATIENCE = timedelta(days=1)
"""How long processes wait for one another: the main one tokenises and evaluates alone."""
WHOLE = "training runs on one process or as DDP (torchrun), since its optimizers and weight average need whole tensors"


@dataclass
class Progress:
    """State of a run, passed to `on_step` after every step.

    Attributes:
        step, steps: steps done, and how many there will be.
        result: of this process's last micro-batch.
        nelbo: NELBO estimate of the whole step, nats a token.
        grad_norm: of the whole step, before clipping.
        skipped: updates skipped so far.
        flops: training FLOPs so far, all processes.
        seconds: since training began, `on_step` included.
        learning_rate: AdamW's, of this step.
        average: what `fit` would return now; in training mode when there is no EMA.
        last: no step follows, since this was the recipe's last one or since `stop` asked.
    """

    step: int
    steps: int
    result: NELBO
    nelbo: float
    grad_norm: float
    skipped: int
    flops: float
    seconds: float
    learning_rate: float
    average: LoopMDM
    last: bool


def accelerator_for(recipe: Recipe, config: ModelConfig) -> Accelerator:
    """The engine that `fit` makes unless it is given one: CUDA if there is any, else CPU; DDP under a launcher.

    Raises:
        InputError: a precision that this device cannot do; a launcher that asks for more than DDP.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    # At S = 1 an anchored boundary is not visited, so its gain has no gradient in that step; nor has, behind a
    # truncated backward pass, what comes before the looped block.
    unused = config.loop.boundary != "plain" or recipe.backprop_loops is not None
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused), InitProcessGroupKwargs(timeout=PATIENCE)]
    try:
        engine = Accelerator(
            mixed_precision=recipe.precision,
            cpu=not torch.cuda.is_available(),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else the environment's
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        raise InputError(f"precision {recipe.precision!r} cannot be used here: {error}") from None
    except ImportError as error:  # of what the launcher asked for
        raise InputError(f"{WHOLE}: {error}") from None
    return _whole(engine)


def _whole(engine: Accelerator) -> Accelerator:
    """The engine, if every process of it holds all parameters."""
    kind = engine.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InputError(f"{WHOLE}; this is {kind}")
    return engine


def micro_batch(recipe: Recipe, processes: int) -> int:
    """Sequences a micro-batch; a batch size that processes and micro-batches do not divide is an InputError."""
    if recipe.batch_size % (processes * recipe.accumulate):
        raise InputError(
            f"batch_size {recipe.batch_size} is not a multiple of processes x accumulate = "
            f"{processes} x {recipe.accumulate}"
        )
    return recipe.batch_size // (processes * recipe.accumulate)


class Trainer:
    """A model in training: `run` takes it from `step` to the recipe's last one.

    Args:
        model: trained in place.
        recipe: how.
        accelerator: None makes one (`accelerator_for`).
        loops: S of each step, a function of the step's number; None is the recipe's `loops` or `loop_distribution`.
        length: tokens a sequence, which p(S) proportional to 1 / F(S) depends on; None is the model's
            max_position_embeddings.

    Attributes:
        step: steps done.
        flops: training FLOPs so far, all processes.
        seconds: time that training had taken when this process took over.
        guard: which updates are skipped.

    Raises:
        InputError: a batch size that processes and micro-batches do not divide, a precision that cannot be had, an
            accelerator that shards the parameters.
    """

    def __init__(
        self,
        model: LoopMDM,
        recipe: Recipe,
        *,
        accelerator: Accelerator | None = None,
        loops: Callable[[int], int] | None = None,
        length: int | None = None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.accelerator = _whole(accelerator) if accelerator else accelerator_for(recipe, model.config)
        self.micro = micro_batch(recipe, self.accelerator.num_processes)
        self.length = length or model.config.max_position_embeddings
        self.loops = loops or self._recipe_loops()
        model.to(self.accelerator.device).train()
        optimizers = build_optimizers(
            model, recipe.optimizer, recipe.lr, recipe.matrix_lr, recipe.weight_decay, recipe.beta2
        )
        self.peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
        prepared = self.accelerator.prepare(NELBOLoss(model), *optimizers)
        self.loss, self.optimizers = prepared[0], list(prepared[1:])
        self.averaged = averaged(model, recipe.ema) if recipe.ema else None
        self.guard = SpikeGuard(recipe.spike_guard)
        self.step, self.flops, self.seconds = 0, 0.0, 0.0
        if model.config.dropout and self.accelerator.num_processes > 1:  # else all would drop the same units
            torch.manual_seed(recipe.seed + self.accelerator.process_index)

    @property
    def average(self) -> LoopMDM:
        """The weight average, or the model itself without EMA."""
        return self.model if self.averaged is None else cast(LoopMDM, self.averaged.module)

    def run(
        self,
        batch: Batch,
        on_step: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train up to the recipe's last step, or to the end of the step in which `stop` says so on any process.

        Raises:
            InputError: the loss or the gradient was not finite, or `spike_guard` skipped, in several steps in a row.
        """
        started = time.perf_counter() - self.seconds
        while self.step < self.recipe.steps:
            multiplier = self._set_rate()
            result, bound, stopping = self._gradients(batch, stop)
            norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
            self._update(bound, norm)
            self.step += 1
            last = stopping or self.step == self.recipe.steps
            if on_step is not None:
                seconds, lr = time.perf_counter() - started, self.recipe.lr * multiplier
                on_step(
                    Progress(
                        self.step,
                        self.recipe.steps,
                        result,
                        bound,
                        norm,
                        self.guard.skipped,
                        self.flops,
                        seconds,
                        lr,
                        self.average,
                        last,
                    )
                )
            if last:
                break

    def state_dict(self) -> dict[str, Any]:
        """All that the run needs to go on, and a generator's state from each process; every process must call it."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "flops": self.flops,
            "model": self.model.state_dict(),
            "average": self.averaged.state_dict() if self.averaged is not None else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": scaler.state_dict() if scaler is not None else None,
            "guard": self.guard.state_dict(),
            "generators": gather_object([_generators()]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from `state_dict`'s result; returns a sentence for whatever will not be exactly as it would have been.

        Raises:
            InputError: the state of another model or recipe.
        """
        try:
            self.model.load_state_dict(state["model"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["average"])
            for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(held)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.guard.load_state_dict(state["guard"])
            self.step, self.flops = int(state["step"]), float(state["flops"])
            generators = state["generators"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"the checkpoint does not fit this run's settings ({reason})") from None
        if len(generators) == self.accelerator.num_processes:
            _set_generators(generators[self.accelerator.process_index])
            return []
        if self.model.config.dropout:
            torch.manual_seed(self.recipe.seed + self.step + self.accelerator.process_index)
            return [
                f"the run had {len(generators)} processes and has {self.accelerator.num_processes} now, so other units "
                "are dropped than would have been"
            ]
        return []

    def _recipe_loops(self) -> Callable[[int], int]:
        recipe, top = self.recipe, self.model.config.loop.max_loops
        if recipe.loops is not None:
            fixed = recipe.loops
            return lambda step: fixed
        distribution: int | Mapping[int, float] = top
        if recipe.loop_distribution == "inverse_flops":
            distribution = inverse_flops_loops(self.model.config, self.length, top)
        return lambda step: sample_loops(distribution, recipe.seed, step)

    def _set_rate(self) -> float:
        recipe = self.recipe
        multiplier = rate(self.step / recipe.steps, self.step, recipe.warmup, recipe.decay, recipe.decay_share)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * multiplier
        return multiplier

    def _gradients(self, batch: Batch, stop: Callable[[], bool] | None) -> tuple[NELBO, float, bool]:
        """Those of the whole step; returns the last micro-batch's result, the step's NELBO and whether to stop.

        Micro-batches differ in how many tokens they mask, or count. Each one's mean is turned into its sum over a
        constant here; the whole step's number takes the constant's place when it is known.
        """
        recipe, accelerator, step = self.recipe, self.accelerator, self.step
        first = accelerator.process_index * recipe.accumulate * self.micro
        loops = check_loops(self.loops(step), "loops")
        # A token count is measured in sequences, so that one full micro-batch is exactly 1.
        unit = self.micro * (self.length if recipe.average == "token" else 1)
        bound, counted, terms, flops = 0.0, 0, 0, 0.0
        for part in range(recipe.accumulate):
            index = first + part * self.micro + torch.arange(self.micro)
            tokens, masks = _unpacked(batch(step, index), accelerator.device)
            options = {
                **masks,
                "num_loops": loops,
                "seed": recipe.seed,
                "step": step,
                "index": index,
                "global_batch": recipe.batch_size,
                "t_range": recipe.t_range(step),
                "schedule": recipe.schedule,
                "objective": recipe.objective,
                "average": recipe.average,
                "depth": recipe.depth,
            }
            last = part == recipe.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.loss):
                result = self.loss(tokens, **options)
                here, share = _counts(recipe, result, tokens, masks)
                accelerator.backward(result.loss * (share / unit / recipe.accumulate))
            bound += float(result.nelbo) * here
            counted, terms = counted + here, terms + share
            flops += self.micro * training_flops(
                self.model.config,
                tokens.shape[1],
                loops,
                grad_loops=recipe.backprop_loops,
                recompute=recipe.checkpoint_loops,
                every=recipe.deep_supervision,
            )
        stopping = float(stop is not None and stop())
        if accelerator.num_processes > 1:
            sums = torch.tensor(
                [bound, counted, terms, flops, stopping], dtype=torch.float64, device=accelerator.device
            )
            bound, counted, terms, flops, stopping = accelerator.reduce(sums).tolist()
        self.flops += flops
        factor = unit * recipe.accumulate * accelerator.num_processes / max(1, terms)
        if factor != 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        return result, bound / max(1, counted), stopping > 0

    def _update(self, bound: float, norm: float) -> None:
        """Apply the gradients to the weights and the weights to their average, unless the guard refuses."""
        scaler = self.accelerator.scaler
        # fp16's gradients may overflow: the step is skipped and the scaler scales down, which is no sign of divergence
        overflow = scaler is not None and math.isfinite(bound) and not math.isfinite(norm)
        why = None if overflow else self.guard.refuses(bound, norm)
        if why is None and not overflow:
            for optimizer in self.optimizers:
                # not the wrapper's own step, which would let the scaler forget the gradients of the next optimizer
                optimizer.step() if scaler is None else scaler.step(optimizer.optimizer)
            if self.averaged is not None:
                self.averaged.update_parameters(self.model)
        if scaler is not None:
            scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.guard.exhausted:
            raise InputError(
                f"{why} at step {self.step + 1}, the {self.guard.in_a_row}th update in a row that had to be skipped; "
                "lower the learning rate"
            )


def fit(
    model: LoopMDM,
    batch: Batch,
    recipe: Recipe,
    *,
    on_step: Callable[[Progress], None] | None = None,
    accelerator: Accelerator | None = None,
    loops: Callable[[int], int] | None = None,
) -> LoopMDM:
    """Train `model` in place and return its weight average (the model itself without EMA).

    Ctrl-C abandons the step in progress; what was learnt so far is returned. To stop and go on later, see `Trainer`.

    Args:
        loops: S of each step, a function of the step's number (the same on every process); None is the recipe's.

    Raises:
        InputError: a batch size that processes and micro-batches do not divide; a loss or gradient that is not
            finite, several steps in a row (none of them reaches the weights).
    """
    trainer = Trainer(model, recipe, accelerator=accelerator, loops=loops)
    with suppress(KeyboardInterrupt):
        trainer.run(batch, on_step)
    return trainer.average.eval()


def _unpacked(batch: Tensor | Sequences, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens, and what `nelbo` takes beside them."""
    if isinstance(batch, Tensor):
        return batch.to(device), {}
    names = ("attention_mask", "maskable", "document_ids")
    given = {name: getattr(batch, name) for name in names}
    return batch.tokens.to(device), {name: mask.to(device) for name, mask in given.items() if mask is not None}


def _counts(recipe: Recipe, result: NELBO, tokens: Tensor, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Counted tokens of a micro-batch, and how many terms its loss is the mean of."""
    counted = torch.ones_like(tokens, dtype=torch.bool)
    for name in ("attention_mask", "maskable"):
        counted = counted & masks[name].bool() if name in masks else counted
    terms = counted if recipe.objective == "nelbo" else result.corruption.mask
    return int(counted.sum()), int(terms.sum() if recipe.average == "token" else terms.any(-1).sum())


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
