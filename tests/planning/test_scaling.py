"""The table of needs: its shapes, its jobs and its hours."""

from pathlib import Path

import pytest

from tests.support import tiny
from toolkit.planning import operations as cost
from toolkit.planning.scaling import (
    Machine,
    bytes_read,
    hours,
    needs,
    read_shapes,
    stage_seconds,
    workload_of_size,
)
from toolkit.planning.shapes import ModelShape
from toolkit.planning.stages import ANALYSES

SHAPES = Path(__file__).parents[2] / "data" / "model-shapes.csv"
# As the models' own pages and files say.
PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}


def test_shapes_have_the_models_parameters():
    assert {name: s.parameters for name, s in read_shapes(SHAPES).items()} == PARAMETERS


@pytest.fixture(scope="module")
def shape():
    return ModelShape.of_config(tiny.FAMILIES["llama"]())


def test_a_job_has_the_tokens_that_are_asked_for(shape):
    work, _ = workload_of_size(shape, tokens=2000, length=20, prompts=3)
    assert sum(batch.n for batch in work.batches) == 2000
    assert work.counted(False) == 80 * 19
    assert work.counted(True) == 20 * 19
    assert [(p.rows, p.length) for p in work.prompts] == [(3, 5)]


def test_hours_add_up(shape):
    work, _ = workload_of_size(shape, tokens=2000, length=20)
    stages = cost.run(shape, work)
    host = sum(s.operations for s in stages if s.kind in ANALYSES)
    models = sum(s.operations for s in stages) - host
    machine = Machine(products=2e9, linear_algebra=1e9, disk=1e6)
    assert hours(shape, work, machine, 2) * 3600 == pytest.approx(models / 2e9 + host / 1e9)
    more = hours(shape, work, machine, 2, offload=True) - hours(shape, work, machine, 2)
    assert more * 3600 == pytest.approx(bytes_read(shape, work, 2) / 1e6)


def test_a_gpu_does_products_and_decompositions_at_rates_of_their_own(shape):
    work, _ = workload_of_size(shape, tokens=2000, length=20)
    machine = Machine(products=2e9, linear_algebra=1e8, disk=1e6, exact=1e9, memory=1e7)
    seconds = stage_seconds(shape, work, machine, size=2)
    stages = {stage.name: stage for stage in cost.run(shape, work)}
    spectra = stages["spectra and fits"]
    expected = (spectra.operations - spectra.decomposed) / 1e9 + spectra.decomposed / 1e8
    assert seconds["spectra and fits"] == pytest.approx(expected)
    assert seconds["moments"] == pytest.approx(stages["moments"].operations / 1e9)
    for name in ("replacement: token by token", "close look: token by token"):
        assert stages[name].passes > 0
        assert seconds[name] == pytest.approx(2 * shape.parameters * stages[name].passes / 1e7)
    assert all(0 <= stage.decomposed <= stage.operations for stage in stages.values())


def test_needs_grow_with_the_model_and_shrink_with_offloading():
    shapes = read_shapes(SHAPES)
    few = {name: shapes[name] for name in ("SmolLM2-135M", "Llama-3.2-1B")}
    table = needs(few, 65536, Machine(1e14, 2e11, 2e9))
    for column in ("weights", "streams", "statistics", "memory", "disk", "hours"):
        assert table[column].is_monotonic_increasing, column
    assert (table.memory_offloaded < table.memory).all()
    assert (table.hours_offloaded > table.hours).all()
