"""Fitting adapters without a gradient through a model.

`spec` says what is fitted, `fit_statistics` gathers what one fit needs of a block and makes its
adapter, `closed_form` fits many specs in one march, `block_result` keeps what a march has finished.
`from_moments` has the closed forms, `regression` what they cannot give: a non-linear adapter.
"""

from toolkit.fitting.block_result import BlockResult, KeptMarch
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.fit_statistics import FitStatistics
from toolkit.fitting.from_moments import adapter_from, loreft_from
from toolkit.fitting.spec import FitSpec

__all__ = [
    "BlockResult",
    "FitSpec",
    "FitStatistics",
    "KeptMarch",
    "adapter_from",
    "fit_adapters",
    "loreft_from",
]
