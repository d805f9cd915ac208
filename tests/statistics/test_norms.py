"""Mean norms per token."""

import numpy as np
import pytest
import torch

from tests.support.properties import assert_reducible
from toolkit.statistics import NormSums


def vectors(n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return {("base", "pre_mlp"): draw(), ("delta_free", "post_block"): draw()}


def test_keeps_the_contract_of_accumulators():
    updates = [(vectors(n, seed=n),) for n in (4, 1, 0, 9, 30, 2)]
    assert_reducible(NormSums, updates, state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_mean_of_the_norms(dtype):
    """E‖v‖, not ‖Ev‖ and not sqrt(E‖v‖²); summed in float64."""
    sums, shards = NormSums(), [vectors(n, n, dtype) for n in (3, 20)]
    for shard in shards:
        sums.update(shard)
    result = sums.result()
    assert result.n == 23
    for key, mean in result.mean.items():
        rows = np.concatenate([s[key].double().numpy() for s in shards])
        assert mean == pytest.approx(np.mean([np.linalg.norm(r) for r in rows]), rel=1e-6)
        assert mean > 1.2 * np.linalg.norm(rows.mean(0))


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        NormSums().result()
