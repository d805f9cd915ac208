"""What all peers share: the task's files, the statistics of arrays, and the report.

It reads nothing of the toolkit, so that it runs in any environment with torch and numpy.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

LOCATIONS = ("pre_mlp", "post_mlp", "post_block")
RIDGE = 1e-4  # of the mean variance of a state's coordinates, as the toolkit's fits
Place = tuple[int, str]
Arrays = dict[Place, list[np.ndarray]]
Row = tuple[int, str, float, float]  # layer, location, trace of the covariance, share explained


def task() -> tuple[Path, Path, list[torch.Tensor]]:
    """Folders of the base and the tuned model, and batches of token ids `[8, length]`."""
    folder, n_batches = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]))
    ids = torch.from_numpy(np.load(folder / "tokens.npy"))[:n_batches]
    return folder / "base", folder / "tuned", list(ids)


def report(version: str, work: Callable[[], list[Row]], warm_up: Callable[[], object]) -> None:
    """Print seconds and peak memory of ``work()`` as JSON. Loading and a first pass are before."""
    warm_up()
    gc.collect()
    loaded = resident()
    started = time.perf_counter()
    rows = work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"version": version, "seconds": seconds, "loaded": loaded, "peak": peak, "rows": rows}
    print(json.dumps(found))


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def counted(states: torch.Tensor) -> np.ndarray:
    """The states of all tokens but each document's first, `[n, d]` float32."""
    return states[:, 1:].reshape(-1, states.shape[-1]).float().numpy()


def analysed(base: Arrays, tuned: Arrays, fit: Callable | None = None) -> Iterator[Row]:
    """The rows from both models' states; arrays are given up as they are used."""
    for layer, location in sorted(base):
        x = np.concatenate(base.pop((layer, location)))
        delta = np.concatenate(tuned.pop((layer, location))) - x
        trace, share = (fit or by_products)(x.astype(np.float64), delta.astype(np.float64))
        yield layer, location, trace, share


def by_products(x: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """Trace of t's covariance, and the share of E‖t‖² that the best linear fit from x explains."""
    n, energy = len(x), float(np.square(t).sum() / len(t))
    x, t = x - x.mean(0), t - t.mean(0)
    return by_moments(x.T @ x / n, t.T @ x / n, t.T @ t / n, energy)


def by_moments(
    xx: np.ndarray, tx: np.ndarray, tt: np.ndarray, energy: float
) -> tuple[float, float]:
    """The same from covariances."""
    d = len(xx)
    ridged = xx + RIDGE * np.trace(xx) / d * np.eye(d)
    weight = np.linalg.solve(ridged, tx.T).T
    left = np.trace(tt) - 2 * np.vdot(weight, tx) + np.vdot(weight @ xx, weight)
    return float(np.trace(tt)), 1 - float(left) / energy


def by_numpy(x: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """The same by what one reaches for first: ``np.cov`` and ``np.linalg.lstsq``."""
    n, d = x.shape
    covariance = np.cov(t.T, bias=True)
    middle = x - x.mean(0)
    penalty = np.sqrt(n * RIDGE * np.square(middle).sum() / n / d) * np.eye(d)
    centred = t - t.mean(0)
    rows, targets = np.vstack([middle, penalty]), np.vstack([centred, np.zeros((d, d))])
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
    left = np.square(centred - middle @ weight).sum()
    return float(np.trace(covariance)), 1 - float(left / np.square(t).sum())
