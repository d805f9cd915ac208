"""How near a steered model comes to the tuned one, and which adapters to choose.

Candidates stand in for fine-tuning; `compare` generates with them and measures the divergence from
the tuned model; the rest chooses: a recommendation, the best of several fits, the smallest ranks.
Everything here is judged on prompts of held-out documents.
"""

from toolkit.evaluation.best_of import best_fit
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.compare import Evaluation, evaluate
from toolkit.evaluation.rank_search import RankSearch, smallest_ranks
from toolkit.evaluation.recommend import Recommendation, recommend

__all__ = [
    "NONE",
    "ORACLE",
    "Candidate",
    "Evaluation",
    "RankSearch",
    "Recommendation",
    "best_fit",
    "evaluate",
    "recommend",
    "smallest_ranks",
]
