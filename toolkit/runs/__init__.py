"""Several finished runs of one base model beside each other: fine-tunes, checkpoints, seeds.

`finished` reads their folders, `recovery` says what is recovered by place and size beside how far
each fine-tune went, `overlap` how alike the leading directions of their deltas are, `transfer` what
the adapters of one recover of another. `side_by_side` puts them together, in a `comparison`, and
writes tables and `page`. No model is opened but for the transfer.
"""

from toolkit.runs.comparison import RunComparison
from toolkit.runs.side_by_side import compare_runs, write_comparison

__all__ = ["RunComparison", "compare_runs", "write_comparison"]
