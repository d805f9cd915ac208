"""Fitting adapters without a gradient through a model.

`closed_form` fits block by block as the march passes, `from_moments` makes an adapter of sums over
tokens, and `regression` is what closed form cannot give: a non-linear adapter on a block's tokens.
"""

from toolkit.fitting.closed_form import Plan, fit_adapters
from toolkit.fitting.from_moments import adapter_from, loreft_from

__all__ = ["Plan", "adapter_from", "fit_adapters", "loreft_from"]
