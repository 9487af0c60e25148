"""Saving and loading: config.json and model.safetensors in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

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

        Each file appears whole or not at all, the weights before the configuration: a save that fails before the first
        of them leaves a former checkpoint as it was.
        """
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        card = {k: kwargs.pop(k) for k in ("model_card_kwargs",) if k in kwargs}
        # The mixin deletes config.json before it writes anything, so it works in a folder of its own.
        with TemporaryDirectory(dir=target, prefix=".save-") as staging:
            super().save_pretrained(staging, **card)
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                with open(Path(staging, name), "rb+") as file:
                    os.fsync(file.fileno())  # on the disk before it replaces anything
                os.replace(Path(staging, name), target / name)
            if not (target / CARD_FILE).exists():
                os.replace(Path(staging, CARD_FILE), target / CARD_FILE)
        return self.push_to_hub(repo_id or target.resolve().name, **card, **kwargs) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {k: v.contiguous() for k, v in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, save_directory / WEIGHTS_FILE, {"format": "pt"})
        config = {"model_type": MODEL_TYPE, **self.config.to_dict()}
        (save_directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A saved model from a folder or a Hub repository, in evaluation mode and fp32.

        Args:
            pretrained_model_name_or_path: a folder, or "owner/name" on the Hub.
            map_location: device of the result.
            revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub.hf_hub_download`.

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

        model = cls(read_config(locate(CONFIG_FILE)))
        load_weights(model, locate(WEIGHTS_FILE), map_location)
        return model.to(map_location).eval()


def read_config(path: Path) -> ModelConfig:
    """Read a LoopMDM config.json; a foreign or damaged one is an InputError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(data, dict) or data.pop("model_type", None) != MODEL_TYPE:
        raise InputError(f"{path} is not a LoopMDM configuration (its model_type is not {MODEL_TYPE!r})")
    return ModelConfig.from_dict(data)


def load_weights(model: Checkpoint, path: Path, device: str = "cpu") -> None:
    """Load a safetensors file into the model; nothing changes unless every key and shape fits."""
    try:
        state = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error})") from None
    want = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del want["lm_head.weight"]
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        raise InputError(
            f"{path} does not fit its configuration: {len(missing)} tensors missing {missing[:1]}, "
            f"{len(extra)} unknown {extra[:1]}"
        )
    for key, value in want.items():
        if state[key].shape != value.shape:
            raise InputError(f"{path}: {key} is {list(state[key].shape)}, the configuration says {list(value.shape)}")
    model.load_state_dict(state, strict=not model.config.tie_word_embeddings)
