"""Other codebases' models, in place: `patch` runs their layers with our ops, `loopify` visits a run of them S times.

    loopmdm.patch(model)                                       # same Parameters, same state_dict keys; report, unpatch
    loopmdm.loopify(model, start=8, length=2, num_loops=4)     # set_num_loops, looping, save_loops, load_loops
    denoiser = loopmdm.adapters.as_denoiser(model)             # for generate, nelbo and the rest

One file a family holds the codebase's own layer class under its own name, constructor and keys (`mdlm.DDiTBlock`,
`duo.DDiTBlock`, `llada.LLaDALlamaBlock`, `dream.DreamDecoderLayer`, `smdm.Block`) and its `FAMILY` record; `layer.py`
computes them all. docs/adapters.md adds a family.
"""

from .denoiser import Peer as Peer
from .denoiser import as_denoiser as as_denoiser
from .family import Family as Family
from .family import Part as Part
from .layer import Layout as Layout
from .parity import check_parity as check_parity
from .patching import families as families
from .patching import patch as patch
from .patching import register as register
from .patching import report as report
from .patching import unpatch as unpatch
from .splice import load_loops as load_loops
from .splice import loopify as loopify
from .splice import looping as looping
from .splice import save_loops as save_loops
from .splice import set_num_loops as set_num_loops
from .splice import unloopify as unloopify
