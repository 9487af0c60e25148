"""What tests/mutations.py counts as red."""

import signal
import subprocess

import pytest

from . import mutations


@pytest.mark.parametrize(
    ("status", "timeout", "problem"),
    [
        (1, False, ""),
        (0, False, "the tests stayed green"),
        (2, False, "pytest ended with status 2: no output"),
        (-signal.SIGSEGV, False, ""),
        (-signal.SIGKILL, False, "pytest was killed, perhaps for want of memory"),
        (None, False, "no test had failed after 300 s"),
        (None, True, ""),
        (1, True, ""),
    ],
)
def test_what_is_red(tmp_path, monkeypatch, status, timeout, problem):
    (tmp_path / "a.py").write_text("x = 1\n")
    copy = object.__new__(mutations.Copy)
    copy.root = tmp_path

    def pytest_(*_):
        assert (tmp_path / "a.py").read_text() == "x = 2\n"
        if status is None:
            raise subprocess.TimeoutExpired("pytest", mutations.LIMIT)
        return subprocess.CompletedProcess([], status, "", "")

    monkeypatch.setattr(copy, "pytest", pytest_)
    mutation = mutations.Mutation("a-1", "a.py", "x = 1", "x = 2", ("tests",), timeout=timeout)
    assert copy.try_out(mutation) == problem
    assert (tmp_path / "a.py").read_text() == "x = 1\n"


def test_a_build_that_does_not_end_is_no_red_test(tmp_path, monkeypatch):
    (tmp_path / "a.h").write_text("1")
    copy = object.__new__(mutations.Copy)
    copy.root = tmp_path

    def python(*_, **__):
        raise subprocess.TimeoutExpired("setup.py", mutations.LIMIT)

    monkeypatch.setattr(copy, "python", python)
    mutation = mutations.Mutation("a-1", "a.h", "1", "2", ("tests",), rebuild=True, timeout=True)
    assert copy.try_out(mutation) == "the build had not ended after 300 s"
