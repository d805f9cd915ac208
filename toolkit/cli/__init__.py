"""The command line: arguments, help texts and what is printed; everything else is in `jobs`.

`main` has `diagnose`, `demo` and `weights`, `steer` what trains, fits and judges adapters, `distil`
what improves them through the network, `figures` redraws the figures, and `options` the types of
arguments that commands share.
"""

__all__ = ["distil", "figures", "main", "options", "steer"]
