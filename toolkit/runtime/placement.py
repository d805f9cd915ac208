"""Where analyses run: where the models are if float64 is fast there, and otherwise on the CPU.

Decompositions, fits and Jacobian products of a block are float64. A GPU for it (H100, H200) does
them many times faster than a CPU, most others more slowly; a short timing decides.
"""

import time

import torch
from torch import Tensor

from toolkit.runtime.processes import Processes

CPU = torch.device("cpu")
WIDTH = 1024  # of the matrices that are timed
_fast: dict[str, bool] = {}  # by type of device, once it is decided


def analysis_device(models: torch.device) -> torch.device:
    """Return where analyses of models on `models` run; decided once in a process.

    They run there where a product and a symmetric eigenvalue problem of width 1024 together take
    less time in float64 than on the CPU.
    """
    if models.type == "cpu":
        return models
    if models.type not in _fast:
        _fast[models.type] = is_fast(models)
    return models if _fast[models.type] else CPU


def decide_together(models: torch.device, processes: Processes) -> None:
    """Have all `processes` run their analyses where the first one does."""
    _fast[models.type] = processes.from_first(lambda: analysis_device(models) == models)


def decide_again() -> None:
    """Forget what was decided."""
    _fast.clear()


def is_fast(device: torch.device) -> bool:
    """Tell whether `device` does float64 linear algebra in less time than the CPU does."""
    try:
        there = _seconds(device)
    except (AssertionError, RuntimeError, TypeError):  # no such device here, or none with float64
        return False
    return there < _seconds(CPU)


def for_analyses(x: Tensor) -> Tensor:
    """Return `x` where analyses of what is on its device run."""
    return x.to(analysis_device(x.device))


def _seconds(device: torch.device) -> float:
    """Time a product and an eigenvalue problem on `device`, after one of each that warms up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(device)
    taken = 0.0
    for _ in range(2):
        started = time.perf_counter()
        float(torch.linalg.eigvalsh(x @ x.T)[-1])  # reading a number waits for the device
        taken = time.perf_counter() - started
    return taken
