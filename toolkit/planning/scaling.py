"""What a pair of a given size needs, without its documents: the table of ``docs/scaling.md``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import LlamaConfig

from toolkit.diagnosis.options import Options
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.planning import operations
from toolkit.planning.estimate import workload_of
from toolkit.planning.memory import disk, memory, streams
from toolkit.planning.prompt_operations import forward_passes
from toolkit.planning.shapes import ModelShape
from toolkit.planning.stages import ANALYSES, Stage
from toolkit.planning.workload import Workload

GIB = 2.0**30


@dataclass(frozen=True)
class Machine:
    """Operations a second of a machine, and bytes a second.

    products: of the models, in their precision. linear_algebra: of decompositions in float64. disk:
    bytes a second from where weights are kept. exact: of products in float32 and float64, which
    statistics and analyses take where the models are (None: statistics run at `products`, and
    analyses on a CPU, all of them at `linear_algebra`). memory: bytes a second of the weights'
    memory, all of which each pass reads that generates one token (None: it is not counted).
    """

    products: float
    linear_algebra: float
    disk: float
    exact: float | None = None
    memory: float | None = None

    def seconds(self, stage: Stage, bytes_read: float = 0.0) -> float:
        """Return what `stage` takes; `bytes_read` is what it reads of weights in memory."""
        if stage.kind == "decode" and self.memory is not None:
            return max(stage.operations / self.products, bytes_read / self.memory)
        if stage.kind in ANALYSES:
            exact = self.exact or self.linear_algebra
            products = stage.operations - stage.decomposed
            return products / exact + stage.decomposed / self.linear_algebra
        listening = stage.kind in ("moments", "mlp")
        return stage.operations / (self.exact or self.products if listening else self.products)


def read_shapes(path: str | Path) -> dict[str, ModelShape]:
    """Return the shapes of the models of Llama's family in a table of configurations, by name."""
    frame = pd.read_csv(path).set_index("name")
    return {
        str(name): ModelShape.of_config(LlamaConfig(**fields))
        for name, fields in frame.to_dict("index").items()
    }


def workload_of_size(
    shape: ModelShape,
    tokens: int,
    length: int = 512,
    prompts: int = 16,
    adapter: int | None = None,
    options: Options | None = None,
) -> tuple[Workload, list[Any]]:
    """A run on `tokens` tokens in documents of `length`, one in five held out, prompts a quarter
    as long; and the ranks of all adapters that it fits.
    """
    documents = [
        Encoded((0,) * length, None, (0,) * (length // 4), i % 5 == 4)
        for i in range(max(tokens // length, 5))
    ]
    asked = options or Options(max_prompts=prompts)
    corpus = Corpus(tuple(documents), asked.positions, asked.batch_tokens)
    return workload_of(shape, corpus, asked, adapter)


def hours(
    shape: ModelShape, work: Workload, machine: Machine, size: int, offload: bool = False
) -> float:
    """The hours of all stages, and with `offload` ``bytes read / disk``."""
    seconds = sum(stage_seconds(shape, work, machine, size).values())
    if offload:
        seconds += bytes_read(shape, work, size) / machine.disk
    return seconds / 3600


def stage_seconds(
    shape: ModelShape, work: Workload, machine: Machine, size: int
) -> dict[str, float]:
    """Return the seconds of every stage, by its name, for models of `size` bytes a number."""
    weights = size * float(shape.parameters)
    return {s.name: machine.seconds(s, weights * s.passes) for s in operations.run(shape, work)}


def bytes_read(shape: ModelShape, work: Workload, size: int) -> float:
    """From disk, where blocks are read as they are reached: both halves once in the march, the
    blocks of one half at every forward pass of generation, replacement and close look.
    """
    blocks = size * sum(block.parameters for block in shape.blocks)
    halves = 2 if work.adapter is None else 1
    return blocks * (halves + forward_passes(shape, work))


def needs(
    shapes: dict[str, ModelShape], tokens: int, machine: Machine, size: int = 2
) -> pd.DataFrame:
    """One row a model: GiB of a pair with weights of its own in both halves, and hours."""
    rows = []
    for name, shape in shapes.items():
        work, ranks = workload_of_size(shape, tokens)
        held, offloaded = (memory(shape, work, size, ranks, offload) for offload in (False, True))
        parts = {part.name: part.bytes / GIB for part in held.parts}
        rows.append(
            {
                "model": name,
                "parameters": shape.parameters,
                "weights": parts["weights"],
                "streams": streams(shape, work, size) / GIB,
                "statistics": parts["sums"] + parts["moments"],
                "memory": held.peak / GIB,
                "memory_offloaded": offloaded.peak / GIB,
                "disk": disk(shape, work, size, ranks).total / GIB,
                "hours": hours(shape, work, machine, size),
                "hours_offloaded": hours(shape, work, machine, size, offload=True),
            }
        )
    return pd.DataFrame(rows)
