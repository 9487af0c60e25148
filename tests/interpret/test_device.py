"""Triton launches on the current CUDA device, wherever the tensors are: an op makes their device the current one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm.ops.contract import all_ops

from .harness import need_interpreter

need_interpreter()


@pytest.mark.parametrize("name", [name for name, op in all_ops().items() if "triton" in op.impls])
def test_every_launch_is_on_the_device_of_its_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    current: list[torch.device] = []
    launched: list[bool] = []

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.device = tensor.device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    run = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {a.device for a in args if isinstance(a, torch.Tensor)}
        launched.append(bool(current) and given == {current[-1]})
        return run(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    op = all_ops()[name]
    op.run(op.examples[0], "triton", torch.device("cpu"), torch.float32)
    assert launched and all(launched)
