"""DUO (s-sahoo/duo): MDLM's block with another order of arguments, and without adaLN where the model says so."""

from __future__ import annotations

from . import mdlm


class DDiTBlock(mdlm.DDiTBlock):
    """DUO's block: `DDiTBlock(dim, n_heads, adaLN, cond_dim)`; else as `mdlm.DDiTBlock`."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        adaLN: bool,
        cond_dim: int | None = None,
        mlp_ratio: int = 4,
        dropout: float = 0.1,
        *,
        num_loops: int = 1,
    ) -> None:
        super().__init__(dim, n_heads, cond_dim, mlp_ratio, dropout, adaLN=adaLN, num_loops=num_loops)
