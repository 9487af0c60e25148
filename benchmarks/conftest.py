"""When the benchmarks are timed, and what those of small ops share."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from .frame import keep_memory, measure

keep_memory()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    """After the tests, which set up and check, time all of it."""
    done = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")

    def say(line: str) -> None:
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(line)

    session.testsfailed += measure(say)
    return done


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For ops so small that a second thread mostly measures the wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
