"""Saving and loading: config.json and model.safetensors in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import InputError

MODEL_TYPE = "loopmdm"
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"


class Checkpoint(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="loopmdm",
    tags=["masked-diffusion", "looped-transformer"],
):
    """A module built from one `ModelConfig` that can be saved, loaded and pushed to the Hub."""

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> str | None:
        """Write config.json, model.safetensors and a model card into a folder, and push them to the Hub if asked.

        The replacement of model.safetensors is what makes a save count: a save that fails or is killed before it leaves
        the former checkpoint, one after it the new one, also where the two configurations differ.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        card = {k: kwargs.pop(k) for k in ("model_card_kwargs",) if k in kwargs}
        with TemporaryDirectory(dir=target, prefix=".save-") as staging:
            self._write(Path(staging), target / CONFIG_FILE)
            if not (target / CARD_FILE).exists():
                self.generate_model_card(**card.get("model_card_kwargs") or {}).save(Path(staging, CARD_FILE))
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                with open(Path(staging, name), "rb+") as file:
                    os.fsync(file.fileno())  # on the disk before it replaces anything
            for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
                if Path(staging, name).exists():
                    os.replace(Path(staging, name), target / name)
        sync_folder(target)
        return self.push_to_hub(repo_id or target.resolve().name, **card, **kwargs) if push_to_hub else None

    def _write(self, folder: Path, former: Path) -> None:
        """The two files; the weights also name the configuration that they came with and the one that they replace."""
        text = json.dumps({"model_type": MODEL_TYPE, **self.config.to_dict()}, indent=2) + "\n"
        metadata = {"format": "pt"}
        if former.is_file() and former.read_bytes() != text.encode():
            metadata |= {"config": text, "replaces": hashlib.sha256(former.read_bytes()).hexdigest()}
        state = {name: tensor.detach().contiguous() for name, tensor in _named_once(self).items()}
        try:
            save_file(state, folder / WEIGHTS_FILE, metadata)
        except SafetensorError as error:  # the library's name for a full disk, too
            raise OSError(f"cannot write {WEIGHTS_FILE}: {error}") from error
        (folder / CONFIG_FILE).write_text(text)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """A saved model from a folder or a Hub repository, in evaluation mode and fp32.

        Args:
            pretrained_model_name_or_path: a folder, or "owner/name" on the Hub.
            map_location: device of the result.
            revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub.hf_hub_download`.
            options: what the class takes beside a configuration and config.json does not hold (a `LoopMDM`'s boundary).

        Raises:
            InputError: no checkpoint there, a damaged or foreign one, or weights that do not fit config.json.
        """
        folder = Path(pretrained_model_name_or_path)

        def locate(name: str) -> Path:
            if folder.is_dir():
                if not (folder / name).is_file():
                    raise InputError(f"{folder} has no {name}; it is not a LoopMDM checkpoint")
                return folder / name
            try:
                found = hf_hub_download(
                    str(pretrained_model_name_or_path),
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            except (OSError, HFValidationError, EntryNotFoundError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise InputError(
                    f"{folder} is not a folder, and {name} could not be had from the Hub ({reason})"
                ) from error
            return Path(found)

        config, weights = locate(CONFIG_FILE), locate(WEIGHTS_FILE)
        model = cls(_unfinished(config, weights) or read_config(config), **options)
        load_weights(model, weights, map_location)
        return model.to(map_location).eval()


def _named_once(model: nn.Module) -> dict[str, Tensor]:
    """The state under the first name of each tensor: a tied head or a boundary that several blocks share has more."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def read_config(path: Path) -> ModelConfig:
    """Read a LoopMDM config.json; a foreign or damaged one is an InputError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(data, dict) or data.pop("model_type", None) != MODEL_TYPE:
        raise InputError(f"{path} is not a LoopMDM configuration (its model_type is not {MODEL_TYPE!r})")
    return ModelConfig.from_dict(data)


def _unfinished(config: Path, weights: Path) -> ModelConfig | None:
    """The configuration that weights brought along, if config.json is still the one that they were to replace."""
    try:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
        former = hashlib.sha256(config.read_bytes()).hexdigest()
    except (SafetensorError, OSError):
        return None  # reading them in earnest says what is wrong
    if metadata.get("replaces") != former:
        return None
    brought = json.loads(metadata["config"])
    del brought["model_type"]
    return ModelConfig.from_dict(brought)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_weights(model: Checkpoint, path: Path, device: str = "cpu") -> None:
    """Load a safetensors file into the model; nothing changes unless every key and shape fits."""
    try:
        state = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error})") from None
    want = _named_once(model)
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        raise InputError(
            f"{path} does not fit its configuration: {len(missing)} tensors missing {missing[:1]}, "
            f"{len(extra)} unknown {extra[:1]}"
        )
    for key, value in want.items():
        if state[key].shape != value.shape:
            raise InputError(f"{path}: {key} is {list(state[key].shape)}, the configuration says {list(value.shape)}")
    model.load_state_dict(state, strict=False)  # without the further names of shared tensors
