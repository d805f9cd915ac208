"""Analyses: statistics or plain callables in, small frozen results out. No model is seen here.

Each file is one formula with its definition, units, assumptions and source in the docstring, so
that it can be tested on matrices whose answer is known.
"""

from toolkit.analysis.divergence import Divergences, Predictions, kl_divergence, recovered
from toolkit.analysis.first_order import FirstOrder
from toolkit.analysis.linear_fit import LinearFit, Rank, fit_linear
from toolkit.analysis.reachability import Reach, reach
from toolkit.analysis.spectrum import Spectrum, spectrum

__all__ = [
    "Divergences",
    "FirstOrder",
    "LinearFit",
    "Predictions",
    "Rank",
    "Reach",
    "Spectrum",
    "fit_linear",
    "kl_divergence",
    "reach",
    "recovered",
    "spectrum",
]
