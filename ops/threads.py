"""Threads for numba kernels that release the GIL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_threads(kernel: Callable[..., None], count: int, *args: Any) -> None:
    """Run a kernel for a number of tasks; each of torch's threads takes the next task when it is free.

    Threads live for one call: a pool kept in the module would be dead, and hang, in a forked data-loading worker.

    Args:
        kernel: Called as `kernel(task, *args)`. It releases the GIL and writes only what its task owns.
        count: Number of tasks, numbered from 0.
        args: Further arguments, the same for every task.
    """
    tasks = iter(range(count))

    def work() -> None:
        for task in tasks:
            kernel(task, *args)

    helpers = min(torch.get_num_threads(), count) - 1
    if helpers < 1:
        work()
        return
    with ThreadPoolExecutor(helpers) as pool:
        futures = [pool.submit(work) for _ in range(helpers)]
        work()
        for future in futures:
            future.result()
