"""Functions by their names, by which a resumed workflow finds them; and what tasks are called."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from hopcoll.errors import WorkflowError

__all__ = [
    "Named", "code_hash", "find_function", "generation_prefix", "iteration_name", "iteration_of",
    "owner_of", "reference_to",
]  # fmt: skip

#: The module as which a program's own file is loaded by somebody else.
_PROGRAM = "hopcoll_workflow_program"


class Named:
    """What may stand under a function's name in its place."""

    function: Callable[..., Any]


def reference_to(function: Callable[..., Any]) -> tuple[str, str, str | None]:
    """Return the module, the name in it, and the file where it is the program's own.

    Raises
    ------
    WorkflowError
        The function cannot be found by its name.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "")
    text = f"{module}.{name}"
    if module is None or "<" in name:
        raise WorkflowError(
            f"{text} cannot be found by its name when the workflow is resumed: make it a function "
            "of a module, not a lambda or a function inside another"
        )
    path = None
    if module == "__main__":
        path = getattr(sys.modules["__main__"], "__file__", None)
        if path is None:
            raise WorkflowError(
                f"{name} was typed in, and is not there when the workflow is resumed: put it into "
                "a file"
            )
        path = str(Path(path).resolve())
    found = _find(module, name)
    if (found.function if isinstance(found, Named) else found) is not function:
        raise WorkflowError(f"{text} is another function than the one that the task has")
    return module, name, path


def find_function(reference: tuple[str, str, str | None]) -> Callable[..., Any]:
    """Return the function that `reference_to` named.

    Raises
    ------
    WorkflowError
        It is not there any more.
    """
    module, name, path = reference
    try:
        if path is not None:
            module = _program(path).__name__
        else:
            importlib.import_module(module)
        found = _find(module, name)
    except (ImportError, AttributeError, KeyError, OSError) as error:
        raise WorkflowError(
            f"the task {name} of {path or module} is not there any more: {error}"
        ) from error
    function = found.function if isinstance(found, Named) else found
    return function  # type: ignore[no-any-return]


def _find(module: str, name: str) -> Any:
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _program(path: str) -> ModuleType:
    """The program's own file as a module: it may be what runs now."""
    main = sys.modules["__main__"]
    own = getattr(main, "__file__", None)
    if own is not None and str(Path(own).resolve()) == path:
        return main
    name = f"{_PROGRAM}_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def code_hash(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    hasher = hashlib.sha256()

    def add(one: CodeType) -> None:
        hasher.update(one.co_code)
        hasher.update(repr((one.co_names, one.co_varnames)).encode())
        for constant in one.co_consts:
            if isinstance(constant, CodeType):
                add(constant)
            elif isinstance(constant, frozenset):
                hasher.update(repr(sorted(map(repr, constant))).encode())
            else:
                hasher.update(repr(constant).encode())

    add(code)
    return hasher.hexdigest()[:16]


# Tasks


def owner_of(task: str) -> str | None:
    """The task whose continuation another is part of."""
    owner = task.rpartition("/")[0]
    if not owner:
        return None
    head, _, last = owner.rpartition("/")
    return head if last.startswith("~") and head else owner


def generation_prefix(owner: str, generation: int) -> str:
    """How the tasks of a continuation are called."""
    return f"{owner}/" if generation == 1 else f"{owner}/~{generation}/"


def iteration_name(loop: str, number: int) -> str:
    return f"{loop}[{number}]"


def iteration_of(task: str) -> tuple[str, int] | None:
    """The loop, and the number in it, of a task that is an iteration."""
    if not task.endswith("]"):
        return None
    loop, _, number = task[:-1].rpartition("[")
    return loop, int(number)
