"""The definitions, slowly: one document at a time, unpadded, uncached, in float64 numpy.

Nothing here knows the toolkit. States are read by plain hooks on modules that are named by hand,
and everything after them is linear algebra as it stands in a textbook.
"""

from tests.support.textbook.activations import (
    ACTIVATION_OF,
    ACTIVATIONS,
    gelu_tanh,
    gelu_tanh_slope,
    normal_cdf,
    normal_pdf,
    sigmoid,
)
from tests.support.textbook.book import Textbook
from tests.support.textbook.definitions import (
    BRANCHES,
    BUDGETS,
    RANKS,
    SHARED_RANKS,
    Array,
    Map,
    to_numpy,
)
from tests.support.textbook.fits import explained, fit, spectrum
from tests.support.textbook.forced_reach import (
    Tokens,
    branch_targets,
    forced_reach,
    mlp_input,
    normalisation,
)
from tests.support.textbook.generation import curve, greedy, kl, log_softmax, mean_nats, ratio_sem
from tests.support.textbook.mlp import Matrices, first_order, inner_pair, jacobian, mlp_terms
from tests.support.textbook.modules import (
    WITH_A_TAIL,
    attention_projection,
    branch_modules,
    heads_output,
    mlp_input_module,
    mlp_output,
    per_token_jacobian,
    sublayer,
)
from tests.support.textbook.passes import Seen, run, run_first_input
from tests.support.textbook.reachability import (
    budgeted,
    damped,
    min_norm,
    reachability,
    residual_by_svd,
)
from tests.support.textbook.weights import weight_row, weights

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_OF",
    "BRANCHES",
    "BUDGETS",
    "RANKS",
    "SHARED_RANKS",
    "WITH_A_TAIL",
    "Array",
    "Map",
    "Matrices",
    "Seen",
    "Textbook",
    "Tokens",
    "attention_projection",
    "branch_modules",
    "branch_targets",
    "budgeted",
    "curve",
    "damped",
    "explained",
    "first_order",
    "fit",
    "forced_reach",
    "gelu_tanh",
    "gelu_tanh_slope",
    "greedy",
    "heads_output",
    "inner_pair",
    "jacobian",
    "kl",
    "log_softmax",
    "mean_nats",
    "min_norm",
    "mlp_input",
    "mlp_input_module",
    "mlp_output",
    "mlp_terms",
    "normal_cdf",
    "normal_pdf",
    "normalisation",
    "per_token_jacobian",
    "ratio_sem",
    "reachability",
    "residual_by_svd",
    "run",
    "run_first_input",
    "sigmoid",
    "spectrum",
    "sublayer",
    "to_numpy",
    "weight_row",
    "weights",
]
