"""What `loopmdm sample` does: load a run, and make text with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from ..errors import InputError
from ..model.checkpoint import CONFIG_FILE, MODEL_TYPE
from ..model.depth import RelativeChange
from ..model.lm import LoopMDM
from ..sampling.depth import DEPTH_FILE, DepthTable
from ..sampling.engine import Generation, Loops, generate
from .data import TOKENIZER_FILE, decode, encode, load_tokenizer
from .watch import watching

NEW_TOKENS = 128
AUTO = "auto"
"""The S of a model's own depth table."""


def model_folder(folder: str | Path) -> Path:
    """The folder that holds the weights: a run's `model/`, or the folder itself.

    Raises:
        InputError: there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give one that `loopmdm train` made")
    if not (path / CONFIG_FILE).exists() and (path / "model" / CONFIG_FILE).exists():
        return path / "model"
    return path


def is_run(folder: str | Path) -> bool:
    """Whether there is a LoopMDM in a folder: a run's, or the model/ in it."""
    try:
        config = json.loads((model_folder(folder) / CONFIG_FILE).read_text())
    except (InputError, OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def load(folder: str | Path) -> tuple[LoopMDM, Tokenizer]:
    """Model and tokenizer from a run's folder or from the `model/` in it.

    Ids that the tokenizer does not have (a vocabulary is often padded) are suppressed.

    Raises:
        InputError: no checkpoint there, a damaged or foreign one, or a tokenizer with more ids than the model.
    """
    path = model_folder(folder)
    model = LoopMDM.from_pretrained(path)
    if not (path / TOKENIZER_FILE).is_file():
        raise InputError(f"{path} has no {TOKENIZER_FILE}; text needs the tokenizer that the model learnt with")
    tokenizer = load_tokenizer(path)
    size = tokenizer.get_vocab_size()
    if size > model.vocab_size:
        raise InputError(
            f"the tokenizer has {size} ids and the model {model.vocab_size}; they do not belong together, since a "
            "model needs an id for each of its tokenizer's"
        )
    known = (model.mask_id, eos_id(model, tokenizer))
    model.suppressed_ids = (model.mask_id, *(i for i in range(size, model.vocab_size) if i not in known))
    return model, tokenizer


def eos_id(model: LoopMDM, tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, where the ids are the tokenizer's, it and the mask, as in training; else None."""
    size = tokenizer.get_vocab_size()
    return size if size + 2 == model.vocab_size == model.mask_id + 1 else None


def depth_table(folder: str | Path) -> DepthTable:
    """The depth table beside a model's weights."""
    path = model_folder(folder)
    if not (path / DEPTH_FILE).is_file():
        raise InputError(f"{path} has no {DEPTH_FILE}; `loopmdm schedule` measures the model and makes one")
    return DepthTable.load(path / DEPTH_FILE)


def sample(
    folder: str | Path,
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
    num_loops: int | str | None = None,
    early_exit: float | None = None,
    stop: bool = False,
    policy: str = "ancestral",
    watch: Console | None = None,
    pace: float = 0.0,
    **options: Any,
) -> tuple[list[str], Generation]:
    """Texts that start with the prompt, and how they came about; sample i is drawn with seed + i.

    Args:
        max_new_tokens: None is 128, or as many as the model's length leaves room for.
        num_loops: S; "auto" is the model's own depth table; None is S_max.
        early_exit: tau of a `RelativeChange`.
        stop: end each sample at the first end of a document.
        watch: shows the denoising on this console if it is a terminal, at least `pace` seconds a step.
        options: see `loopmdm.generate`.

    Raises:
        InputError: as `load`, a prompt that the tokenizer cannot spell or that is too long, or a bad option.
    """
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; it must be at least 1")
    if isinstance(num_loops, str) and num_loops != AUTO:
        raise InputError(f"num_loops is {num_loops!r}; it must be a whole number or {AUTO!r}")
    if early_exit is not None:
        options["early_exit"] = RelativeChange(early_exit)
    model, tokenizer = load(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    end = eos_id(model, tokenizer)
    if stop and end is None:
        raise InputError(f"{folder} has no end of a document to stop at; only what `loopmdm train` made has one")
    ids = encode(tokenizer, prompt)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(NEW_TOKENS, model.config.max_position_embeddings - len(ids)))
    if isinstance(num_loops, str):
        depth: Loops = depth_table(folder)
    else:
        depth = model.max_loops if num_loops is None else num_loops
    with watching(watch, tokenizer, model.mask_id, end, pace) as view:
        made = generate(
            model,
            [ids] * num_samples,
            max_new_tokens=max_new_tokens,
            num_loops=view.noting(depth, options.get("steps"), early_exit is not None),
            policy=policy,
            eos_id=end if stop else None,
            on_step=view,
            **{name: value for name, value in options.items() if value is not None},
        )
    made.seconds -= view.seconds
    return [decode(tokenizer, row, end, model.mask_id) for row in made.sequences()], made
