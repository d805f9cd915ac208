"""How large the branches of a block are: the post's figure "MLP/(MLP+Attn)"."""

from dataclasses import dataclass

from toolkit.statistics import MeanNorms

OF = ("base", "tuned", "delta_free", "delta_forced")


@dataclass(frozen=True)
class BranchNorms:
    """Mean L2 norm per token of what one block adds to and leaves on the stream.

    `of` is base, tuned, delta_free or delta_forced. ``mlp_share = post_mlp / (pre_mlp +
    post_mlp)``: of a delta, how much of what fine-tuning changed in the block the MLP location
    covers. Norms do not add like vectors: the share says nothing of cancellation. A branch that
    the family lacks is None; a share of nothing is 0.
    """

    of: str
    pre_mlp: float | None
    post_mlp: float | None
    post_block: float | None
    mlp_share: float | None


def branch_norms(norms: MeanNorms) -> list[BranchNorms]:
    """One row for each `of` in `norms`."""
    return [_row(norms, of) for of in OF if any(key[0] == of for key in norms.mean)]


def _row(norms: MeanNorms, of: str) -> BranchNorms:
    attention, mlp = norms.mean.get((of, "pre_mlp")), norms.mean.get((of, "post_mlp"))
    share = None
    if attention is not None and mlp is not None:
        share = mlp / (attention + mlp) if attention + mlp else 0.0
    return BranchNorms(of, attention, mlp, norms.mean.get((of, "post_block")), share)
