"""Experiments on the post's theory: each file is one question, asked of tiny or of real models.

Errors and how they grow, post-block replicas of post-MLP adapters, MLPs that cannot write
everything, where steered states drift, what was published, and whether a
diagnosis predicts what training achieves.
"""

__all__ = [
    "block_gain",
    "deficient_mlp",
    "drift",
    "error_growth",
    "published",
    "replication",
    "replication_cost",
    "validity",
]
