"""Looped-depth masked diffusion language models: a thin torch layer over fused kernels.

    model = loopmdm.LoopMDM.from_preset("paper-170m")
    loss  = loopmdm.nelbo(model, tokens).loss
    out   = loopmdm.generate(model, prompt, max_new_tokens=256, steps=64, num_loops=12)

Names load on first use, so that importing the package costs next to nothing.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

__version__ = _version("loopmdm")

_HOME = {
    "POLICIES": "sampling.policies",
    "PRESETS": "config",
    "Denoiser": "model.denoiser",
    "Depth": "model.depth",
    "DepthTable": "sampling.depth",
    "Generation": "sampling.generation",
    "InputError": "errors",
    "LoopConfig": "config",
    "LoopMDM": "model.lm",
    "LoopedBlock": "model.loop",
    "ModelConfig": "config",
    "Move": "sampling.state",
    "NELBOLoss": "diffusion",
    "Policy": "sampling.state",
    "Ranked": "sampling.state",
    "RelativeChange": "model.depth",
    "State": "sampling.state",
    "compact": "ops.compact",
    "generate": "sampling.engine",
    "likelihood": "diffusion",
    "loopify": "adapters",
    "nelbo": "diffusion",
    "nelbo_by_time": "diffusion",
    "patch": "adapters",
    "report": "adapters",
    "residual_norm": "ops.residual_norm",
    "rolling": "diffusion",
    "select_scatter": "ops.select_scatter",
    "select_topk": "ops.select_topk",
    "sft": "diffusion",
    "unmask_from_logits": "sampling.unmask",
    "unmask_step": "sampling.unmask",
    "unpatch": "adapters",
}

if TYPE_CHECKING:
    from . import adapters as adapters
    from .adapters import loopify as loopify
    from .adapters import patch as patch
    from .adapters import report as report
    from .adapters import unpatch as unpatch
    from .config import PRESETS as PRESETS
    from .config import LoopConfig as LoopConfig
    from .config import ModelConfig as ModelConfig
    from .diffusion import NELBOLoss as NELBOLoss
    from .diffusion import likelihood as likelihood
    from .diffusion import nelbo as nelbo
    from .diffusion import nelbo_by_time as nelbo_by_time
    from .diffusion import rolling as rolling
    from .diffusion import sft as sft
    from .errors import InputError as InputError
    from .model.denoiser import Denoiser as Denoiser
    from .model.depth import Depth as Depth
    from .model.depth import RelativeChange as RelativeChange
    from .model.lm import LoopMDM as LoopMDM
    from .model.loop import LoopedBlock as LoopedBlock
    from .ops.compact import compact as compact
    from .ops.residual_norm import residual_norm as residual_norm
    from .ops.select_scatter import select_scatter as select_scatter
    from .ops.select_topk import select_topk as select_topk
    from .sampling.depth import DepthTable as DepthTable
    from .sampling.engine import generate as generate
    from .sampling.generation import Generation as Generation
    from .sampling.policies import POLICIES as POLICIES
    from .sampling.state import Move as Move
    from .sampling.state import Policy as Policy
    from .sampling.state import Ranked as Ranked
    from .sampling.state import State as State
    from .sampling.unmask import unmask_from_logits as unmask_from_logits
    from .sampling.unmask import unmask_step as unmask_step


def __getattr__(name: str) -> object:
    if name == "adapters":
        return _import_module(".adapters", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'loopmdm' has no attribute {name!r}")
    value = getattr(_import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "adapters"})
