"""A result as a tidy table that can draw itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

COLUMNS = {
    "norms": "layer of pre_mlp post_mlp post_block mlp_share",
    "spectrum": "layer location mode n_tokens rms relative_rms mean_share participation_ratio "
    "entropy_rank k50 k90 k95 k99",
    "noise": "layer location mode n_tokens noise_rms noise_relative noise_norm",
    "linear_fit": "layer source target mode rank explained_fit explained_heldout",
    "sequential_kl": "location kind rank fit layers forcing token_index kl_mean kl_sem n_prompts",
    "steerability": "location kind rank fit layers parameters parameters_percent kl kl_sem "
    "recovered recovered_sem kl_own kl_own_sem",
    "first_order": "layer down gate up remainder relative_change",
    "reachability": "layer target budget residual_q25 residual_median residual_q75 "
    "nonlinear_residual_median min_norm_median rank_median n_tokens",
    "shared_reach": "layer location target rank explained_fit explained_heldout "
    "explained_heldout_sem nonlinear_heldout size n_fit n_heldout",
    "forced_reach": "layer location head target budget explained residual_q25 residual_median "
    "residual_q75 nonlinear_residual_median n_tokens",
    "normalisation": "layer norm_gain radial_gain post_gain attention_share n_tokens",
    "inner_pair": "layer rank explained_fit explained_heldout explained_heldout_sem residual_q25 "
    "residual_median residual_q75 size_median n_tokens",
    "first_order_scale": "layer scale down gate up remainder relative_change n_tokens",
    "mlp_fit": "layer source target rank explained_fit explained_heldout",
    "weights": "layer module rows columns norm_2 norm_fro relative rank stable_rank k90 outside",
}


@dataclass(frozen=True)
class Table:
    """One of the run's tables: its name and its `frame`, one row per observation.

    The run of one that was not `measured` was made before there was such a table.
    """

    name: str
    frame: pd.DataFrame
    measured: bool = True

    @classmethod
    def of(cls, name: str, rows: Sequence[dict[str, Any]]) -> "Table":
        """The table `name` with its columns in the contract's order."""
        return cls(name, pd.DataFrame(rows, columns=COLUMNS[name].split()))

    @classmethod
    def absent(cls, name: str) -> "Table":
        """The table `name` of a run that has none."""
        return cls(name, cls.of(name, []).frame, measured=False)

    def plot(self, noise: "Table | None" = None) -> Any:
        """A matplotlib figure; where it shows how large deltas are, with `noise` drawn in."""
        from toolkit.tables import drawing as draw
        from toolkit.tables import plot

        drawn = {"noise": noise.frame} if noise and self.name in plot.WITH_NOISE else {}
        empty = draw.NOT_APPLICABLE if self.measured else draw.NOT_MEASURED
        return plot.PLOTS[self.name](self.frame, empty=empty, **drawn)
