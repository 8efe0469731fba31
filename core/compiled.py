"""The one way a function is compiled by numba: without the GIL, and kept on disk where a folder can be written.

numba keeps compiled functions beside their source, or in a folder of the user. A container or a service often can write neither, and then
numba refuses to import the function at all. Here such a process keeps them in a folder of its own below the system's temporary folder;
where that fails too, every process compiles again. Both give one warning and the same numbers.

Read next: `ops/cpu/`, whose kernels are compiled with it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

from .private_folder import private_folder

_Function = TypeVar("_Function", bound=Callable[..., Any])
_TOLD_IN = "UPCYCLE3D_CACHE_WARNED"  # child processes inherit it, so that workers do not warn again
_notes: list[str] = []


def compiled(**options: Any) -> Callable[[_Function], _Function]:
    """Compile a function on its first call, without the GIL, and keep the result on disk where that is possible.

    Args:
        **options: Further options of `numba.njit`, such as `fastmath`.

    Returns:
        A decorator.
    """

    def decorate(function: _Function) -> _Function:
        kernel = numba.njit(nogil=True, **options)(function)
        if not hasattr(kernel, "enable_caching"):  # NUMBA_DISABLE_JIT: the plain function
            return kernel  # type: ignore[no-any-return]
        cache = find_cache(function)
        if cache is not None:
            kernel._cache = cache
        return kernel  # type: ignore[no-any-return]

    return decorate


def compiles() -> bool:
    """Whether kernels are compiled. `NUMBA_DISABLE_JIT=1` lets them run as plain Python, for a debugger."""
    settings: Any = numba.config
    return not settings.DISABLE_JIT


def find_cache(function: Callable[..., Any]) -> FunctionCache | None:
    """Find a place for a compiled function: numba's own choice, else a private folder in the temporary folder, else none.

    Args:
        function: The function.

    Returns:
        Its cache; None where nothing can be written.
    """
    try:
        return _ForgivingCache(function)
    except (RuntimeError, OSError):  # numba: no locator available
        pass
    folder = private_folder()
    if folder is not None:
        settings: Any = numba.config
        before = settings.CACHE_DIR
        settings.CACHE_DIR = str(folder)
        try:
            cache = _ForgivingCache(function)
        except (RuntimeError, OSError):
            pass
        else:
            _note(
                f"compiled kernels are kept in {folder}, because neither the package nor the user's cache folder can be written; "
                "set NUMBA_CACHE_DIR to a folder that lasts"
            )
            return cache
        finally:
            settings.CACHE_DIR = before
    _note(
        "compiled kernels cannot be kept, so every process spends about a minute on compiling them: neither the package, the user's cache "
        "folder nor the temporary folder can be written; set NUMBA_CACHE_DIR to a folder that can"
    )
    return None


def take_cache_warning() -> str | None:
    """Take the sentence about the cache that a command has yet to print.

    Returns:
        The sentence, once; None where everything is as usual.
    """
    return _notes.pop() if _notes else None


def _note(text: str) -> None:
    if _TOLD_IN in os.environ:
        return
    os.environ[_TOLD_IN] = "1"
    if __name__.removesuffix("core.compiled") + "tools" in sys.modules:  # a command, which prints it as its own warning
        _notes.append(text)
    else:
        warnings.warn(text, UserWarning, stacklevel=2)


class _ForgivingCache(FunctionCache):  # type: ignore[misc]
    """A damaged file in the cache, or a full disk, costs time and nothing else."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever a damaged file raises while it is read
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # the disk is full, or the index is damaged: the next process compiles again
            return
