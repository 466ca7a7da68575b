"""Disks that die, fail, or stop at a given call: what the tests of the store put under it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recovery.disk import Disk

CALLS = (
    *("create", "write", "fsync", "fdatasync", "close", "link", "unlink", "mkdir", "rmdir"),
    "fsync_folder",
)


def state(step: int) -> dict[str, Any]:
    """Return a state whose every part tells its step; one array never changes."""
    return {
        "weights": np.arange(20_000.0) + step,
        "frozen": np.arange(20_000.0),
        "small": np.full(5, step),
        "step": step,
    }


def assert_is_state(found: dict[str, Any], step: int) -> None:
    """Check that a state is that of the step, in every byte."""
    expected = state(step)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


class CountingDisk(Disk):
    """Calls `_before(k, name, arguments)` ahead of its k-th call; counts from 1."""

    def __init__(self) -> None:
        self.calls = 0
        self.names: list[str] = []

    def _before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None:
        pass


def _counted(name: str) -> Callable[..., Any]:
    def call(self: CountingDisk, *arguments: Any) -> Any:
        self.calls += 1
        self.names.append(name)
        self._before(self.calls, name, arguments)
        return getattr(Disk, name)(self, *arguments)

    return call


for _name in CALLS:
    setattr(CountingDisk, _name, _counted(_name))


class FatalDisk(CountingDisk):
    """Gets SIGKILL ahead of its k-th call, and half way through if that is a write."""

    def __init__(self, k: int, folder: Path) -> None:
        super().__init__()
        self._k = k
        self._folder = folder

    def _before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None:
        if k == self._k:
            if name == "write":
                descriptor, data, offset = arguments
                half = memoryview(data).cast("B")
                os.pwrite(descriptor, half[: len(half) // 2], offset)
            (self._folder / "killed").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)


class FailingDisk(CountingDisk):
    """Fails its k-th call with an error number; with `for_good` all after it as well.

    The system takes half of what it is asked to write, and is asked again.
    """

    def __init__(self, k: int, code: int, *, for_good: bool = False) -> None:
        super().__init__()
        self._k = k
        self._code = code
        self._for_good = for_good
        self.failed: list[str] = []

    def _before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None:
        if (k == self._k or (self._for_good and k > self._k)) and name != "close":
            self.failed.append(name)
            if name == "write":
                descriptor, data, offset = arguments
                os.pwrite(descriptor, memoryview(data).cast("B")[:3], offset)
            raise OSError(self._code, os.strerror(self._code))

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().write_some(descriptor, data[: (len(data) + 1) // 2], offset)
