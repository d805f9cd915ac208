"""LAPACK's reduction of a symmetric matrix to a tridiagonal one, for several matrices at a time.

SciPy's own wrapper holds the interpreter's lock while LAPACK works; the same routine called through
the pointer that ``scipy.linalg.cython_lapack`` exports does not, so that threads run side by side.
"""

import ctypes
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from scipy.linalg import cython_lapack
from threadpoolctl import ThreadpoolController

_BLOCK = 64  # columns that dsytrd and dormqr work on together


def tridiagonalise(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``Q T Qᵀ`` of the upper triangle of `symmetric` (float64, rows contiguous), overwritten.

    Returns T's diagonal `[d]` and off-diagonal `[d − 1]`, and the reflectors of Q: the matrix that
    holds them, columns contiguous, in LAPACK's form for a lower triangle, and their scales.
    """
    d = len(symmetric)
    diagonal, off, scales = np.empty(d), np.empty(max(d - 1, 1)), np.empty(max(d - 1, 1))
    work, size, length = np.empty(_BLOCK * d), ctypes.c_int(d), ctypes.c_int(_BLOCK * d)
    info, side = ctypes.c_int(0), ctypes.c_char(b"L")  # by columns, rows' upper is lower
    _dsytrd(
        ctypes.byref(side), ctypes.byref(size), symmetric.ctypes.data, ctypes.byref(size),
        diagonal.ctypes.data, off.ctypes.data, scales.ctypes.data, work.ctypes.data,
        ctypes.byref(length), ctypes.byref(info),
    )  # fmt: skip
    return diagonal, off[: d - 1], symmetric.T, scales[: d - 1]


@contextmanager
def one_thread_each() -> Iterator[Executor]:
    """Workers, as many as torch has threads, whose own BLAS and torch calls use one thread each.

    For many matrices of a size at which one factorisation gains nothing from threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet_openblas(), ThreadPoolExecutor(threads) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet_openblas() -> Iterator[None]:
    """Keep SciPy's BLAS from threads of its own, which spin between calls and slow torch's."""
    with ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        yield


def _pointer(name: str) -> int:
    capsule = cython_lapack.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))


_dsytrd = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 10)(_pointer("dsytrd"))
