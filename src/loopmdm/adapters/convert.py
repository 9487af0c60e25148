"""Checkpoints of other codebases -> folders that `LoopMDM.from_pretrained` reads, and back; bit for bit.

Names and row orders change, numbers and dtypes do not. The result is a model without loops (S = 1), which `relooped`
gives some. Files are read as `weights.py` and `unpickle.py` do: nothing in them is run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError, nearest
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config, sync_folder
from ..model.lm import LoopMDM
from .family import Family, State
from .patching import families
from .weights import Lazy, Weights, open_weights, read_json, safetensors_file

SOURCE_FILE = "source.json"
"""What a converted folder remembers of where it came from, for the way back."""
APART = ("dropout", "zero_init_output", "initializer_range", "pad_token_id", "residual_in_fp32", "rope_dtype")
"""Fields that training or rounding alone depends on: a codebase has its own."""
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did: family, `weights` ("ema" or "raw"), tensors and bytes written, where, configuration."""

    family: str
    weights: str
    tensors: int
    bytes: int
    out: Path
    config: ModelConfig


def family(name: str) -> Family:
    """The `Family` record of a codebase by name; those added by `register` too."""
    known = families()
    if name not in known:
        raise InputError(f"unknown codebase {name!r}{nearest(name, known)}")
    return known[name]


def to_loopmdm(
    checkpoint: str | Path,
    out: str | Path,
    source: str,
    *,
    weights: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mask_id: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert a codebase's checkpoint to a LoopMDM folder.

    Args:
        checkpoint: .safetensors, an index of shards, .bin, .pt, .pth or a Lightning .ckpt, or the folder of one.
        out: folder to be made; it appears complete or not at all.
        source: "mdlm" (DUO and ReMDM too), "llada", "dream", "smdm", or a registered family.
        weights: "ema" or "raw"; None is the moving average where the file has one.
        config: the codebase's configuration, a JSON file or a mapping; None takes the Lightning file's
            hyper-parameters or the config.json beside the weights.
        mask_id: id of [MASK]; None is the configuration's, without one the last.
        progress: called while tensors are read.

    Raises:
        InputError: `out` exists, a checkpoint that is damaged, hostile or does not fit its configuration.
    """
    record = family(source)
    if weights not in (None, "ema", "raw"):
        raise InputError(f"weights is {weights!r}; it must be 'ema' or 'raw'")
    with _new_folder(out) as staging:
        opened = open_weights(checkpoint)
        if weights is None:
            weights = "raw" if opened.shadow is None else "ema"
        tensors = _averaged(opened, record) if weights == "ema" else opened.tensors
        shapes = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in tensors.items()}
        stripped = record.stripped(shapes)
        theirs = _settings(opened, record, stripped, config)
        if mask_id is not None:
            theirs["mask_token_id"] = mask_id
        ours = _config(record, theirs)
        if mask_id not in (None, ours.mask_token_id):
            raise InputError(f"mask_id is {mask_id}; a {source} model of this configuration has {ours.mask_token_id}")
        if ours.num_hidden_layers > len(tensors):
            raise InputError(f"the configuration has {ours.num_hidden_layers} layers, the file {len(tensors)} tensors")
        with _blaming(record), torch.device("meta"):
            model = LoopMDM(ours)
        _check_fit(record.to_ours(shapes, ours), model)  # what does not fit is refused before a number has been read
        state = record.to_ours(_read(tensors, progress), ours)
        _adopt(model, state)
        model.save_pretrained(staging)
        note = {"family": source, "weights": weights, "prefix": record.prefix(shapes), "config": theirs}
        (staging / SOURCE_FILE).write_text(json.dumps(note, indent=2) + "\n")
        _copy_text(opened.folder, staging)
    return Converted(source, weights, len(state), sum(t.nbytes for t in state.values()), Path(out), ours)


def from_loopmdm(
    folder: str | Path,
    out: str | Path,
    target: str,
    *,
    progress: Progress | None = None,
) -> Converted:
    """Convert a LoopMDM folder to a codebase's checkpoint: config.json and model.safetensors under its names.

    A folder that came from that codebase gets back the configuration and the prefix of names that it came with. The
    codebase knows no loops: what is written computes what the model does at S = 1.

    Raises:
        InputError: `out` exists, no LoopMDM there, or one that the codebase cannot express.
    """
    record, folder = family(target), Path(folder)
    with _new_folder(out) as staging:
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(f"{folder} has no {CONFIG_FILE}; it is not a LoopMDM checkpoint")
        config = read_config(folder / CONFIG_FILE)
        if config.logit_shift != record.logit_shift:
            raise InputError(
                f"{target} reads logits shifted by {record.logit_shift}, this model by {config.logit_shift}"
            )
        if config.loop.boundary != "plain" and config.loop.max_loops > 1:
            raise InputError(f"the model has {config.loop.boundary} loops, whose gains have no place in {target}")
        note = read_json(folder / SOURCE_FILE) if (folder / SOURCE_FILE).is_file() else {}
        note = note if note.get("family") == target and isinstance(note.get("config"), dict) else {}
        settings = note.get("config")
        if settings is None or _changed(_config(record, settings), config):
            settings = record.from_config(config)  # the model has changed since, or was never theirs
            for name in _changed(_config(record, settings), config):
                if name not in APART:
                    raise InputError(f"{target} cannot express this model's {name} = {getattr(config, name)!r}")
        state = _read(safetensors_file(folder / WEIGHTS_FILE), progress)
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["embed.weight"]
        size = settings.get(record.group_size, 1)
        size = size if isinstance(size, int) and size > 1 else 1
        theirs = {**record.to_theirs(state, config, size), **_tables(record, config)}
        theirs = {f"{note.get('prefix', '')}{name}": tensor.contiguous() for name, tensor in theirs.items()}
        (staging / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        try:
            save_file(theirs, staging / WEIGHTS_FILE, {"format": "pt"})
        except SafetensorError as error:  # the library's name for a full disk, too
            raise OSError(f"cannot write {WEIGHTS_FILE}: {error}") from error
        _copy_text(folder, staging)
    written = sum(tensor.nbytes for tensor in theirs.values())
    return Converted(target, note.get("weights", "raw"), len(theirs), written, Path(out), config)


@contextmanager
def _new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that takes the name `out` at the end, and vanishes if anything goes wrong before."""
    out = Path(out)
    if out.is_symlink() or out.exists():
        raise InputError(f"{out} is already there; name a folder that is to be made")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield staging
        for file in staging.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)
        sync_folder(staging)
        os.rename(staging, out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _settings(
    opened: Weights, record: Family, shapes: State, config: str | Path | Mapping[str, Any] | None
) -> dict[str, Any]:
    """The codebase's configuration; a vocabulary that it leaves to its tokenizer is the embedding's."""
    if isinstance(config, Mapping):
        found = dict(config)
    elif config is not None:
        found = read_json(Path(config))
    elif opened.settings:
        inner = opened.settings.get("config")
        found = inner if isinstance(inner, dict) else opened.settings
    elif (opened.folder / CONFIG_FILE).is_file():
        found = read_json(opened.folder / CONFIG_FILE)
    else:
        raise InputError(f"{opened.folder} has no {CONFIG_FILE}; give the {record.name} configuration with --config")
    table = next(
        (shapes[name + end] for name in record.embedding for end in ("", ".weight") if name + end in shapes), None
    )
    if table is not None:
        found.setdefault("vocab_size", table.shape[0] - record.extra_rows)
    return found


def _config(record: Family, settings: Mapping[str, Any]) -> ModelConfig:
    """The codebase's configuration as ours."""
    with _blaming(record):
        return record.to_config(settings).replace(logit_shift=record.logit_shift)


@contextmanager
def _blaming(record: Family) -> Iterator[None]:
    """What fails here fails for a setting of a wrong kind or size."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the {record.name} configuration has a setting that does not fit ({why})") from error


def _averaged(opened: Weights, record: Family) -> dict[str, Lazy]:
    """The moving average under the parameters' names: it is a list in parameter order, buffers left out."""
    if opened.shadow is None:
        raise InputError(f"{opened.folder} holds no moving average; convert it with --weights raw")
    names = [name for name in opened.tensors if not name.endswith(record.ignored)]
    if len(names) != len(opened.shadow):
        raise InputError(f"the moving average has {len(opened.shadow)} tensors for {len(names)} parameters")
    for name, tensor in zip(names, opened.shadow, strict=True):
        if tensor.shape != opened.tensors[name].shape:
            raise InputError(
                f"the moving average has {list(tensor.shape)} for {name} {list(opened.tensors[name].shape)}"
            )
    return dict(zip(names, opened.shadow, strict=True))


def _check_fit(state: State, model: LoopMDM) -> None:
    want = model.state_dict()
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        what = f"lacks what becomes {missing[0]}" if missing else f"has what becomes {extra[0]}"
        raise InputError(f"the checkpoint {what}, against its configuration")
    for name, tensor in want.items():
        if state[name].shape != tensor.shape:
            got, said = list(state[name].shape), list(tensor.shape)
            raise InputError(f"the checkpoint gives {name} the shape {got}, its configuration {said}")
        if not state[name].is_floating_point():
            raise InputError(f"the checkpoint has {name} in {state[name].dtype}; quantised weights are not converted")


def _adopt(model: LoopMDM, state: State) -> LoopMDM:
    """The tensors become the model's parameters, in their own dtypes."""
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    return model


def _changed(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields in which two configurations differ, but for those that no codebase's configuration holds."""
    unread = {"loop", "logit_shift"} | ({"cond_dim"} if b.modulation == "none" else set())
    return [name for name, value in b.to_dict().items() if name not in unread and a.to_dict()[name] != value]


def _tables(record: Family, config: ModelConfig) -> State:
    """Buffers that the codebase saves: MDLM's rotary frequencies."""
    if record.name != "mdlm":
        return {}
    steps = torch.arange(0, config.head_dim or 0, 2).float()
    return {"rotary_emb.inv_freq": 1.0 / (config.rope_theta ** (steps / (config.head_dim or 1)))}


def _read(tensors: Mapping[str, Lazy], progress: Progress | None) -> dict[str, Tensor]:
    total, done, out = sum(lazy.nbytes for lazy in tensors.values()), 0, {}
    for name, lazy in tensors.items():
        out[name] = lazy.read()
        done += lazy.nbytes
        if progress is not None:
            progress(name, done, total)
    return out


def _copy_text(source: Path, target: Path) -> None:
    """The tokenizer's files go along."""
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
