"""What a march leaves of one block, in memory and on disk, so that an interrupted one goes on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.kinds import KINDS
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.adapters.weight_change import WeightFit
from toolkit.analysis.low_rank_change import LowRank
from toolkit.fitting.spec import FitSpec
from toolkit.models.runner import BlockRunner
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.records import write_json, write_tensors

Row = dict[str, Any]
Place = tuple[int, str]  # a block, and the name of a module in it


@dataclass
class BlockResult:
    """Hold what is kept of one block: rows by table, adapters by spec, pieces of its weights."""

    layer: int
    rows: dict[str, list[Row]] = field(default_factory=dict)
    adapters: dict[FitSpec, Adapter] = field(default_factory=dict)
    pieces: dict[WeightFit, dict[Place, LowRank]] = field(default_factory=dict)

    def add(
        self,
        rows: Mapping[str, Sequence[Row]] | None = None,
        adapters: Mapping[FitSpec, Adapter] | None = None,
    ) -> None:
        """Add rows of tables, each with this block's number, and adapters."""
        for name, some in (rows or {}).items():
            self.rows.setdefault(name, []).extend({"layer": self.layer, **row} for row in some)
        self.adapters |= adapters or {}


@dataclass(frozen=True)
class KeptMarch:
    """The folder of one march: its streams, and what each passed block gave.

    A process that is killed at any moment leaves the last finished block, from which any number of
    `processes` go on.
    """

    folder: Path
    processes: Processes = ALONE

    @property
    def started(self) -> bool:
        """Tell whether a block was passed already."""
        return self._progress.is_file()

    def open(self) -> None:
        """Make the folder."""
        self.processes.from_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def passed(self) -> list[BlockResult]:
        """Read the results of the blocks that were passed already."""
        if not self.started:
            return []
        return [self._read(layer) for layer in range(json.loads(self._progress.read_text()))]

    def to_go_on_from(self, runner: BlockRunner) -> list[BlockResult]:
        """Read the same, or nothing where an unfinished march has to begin anew.

        What blocks leave for later ones beside the hidden state is not kept.
        """
        found = self.passed()
        return [] if runner.carries and len(found) < runner.sites.n_layers else found

    def finished(self, result: BlockResult) -> None:
        """Keep the result of a block that every stream has passed."""
        self.processes.wait()
        self.processes.from_first(lambda: self._write(result))

    def drop_streams(self) -> None:
        """Remove the streams of a march that has passed every block."""
        self.processes.wait()
        if self.processes.first:
            for path in self.folder.glob("*.stream*"):
                path.unlink()

    @property
    def _progress(self) -> Path:
        return self.folder / "passed.json"

    def _write(self, result: BlockResult) -> None:
        stem = self.folder / f"block-{result.layer:04}"
        kept = {
            "rows": result.rows,
            "adapters": [asdict(spec) for spec in result.adapters],
            "configs": [adapter.config for adapter in result.adapters.values()],
        }
        write_json(kept, stem.with_suffix(".json"))
        tensors = {
            f"{spec.name}|{name}": tensor.detach().contiguous()
            for spec, adapter in result.adapters.items()
            for name, tensor in adapter.state_dict().items()
        } | {
            f"{_PIECES}|{fit}|{module}|{part}": tensor.contiguous()
            for fit, found in result.pieces.items()
            for (_, module), piece in found.items()
            for part, tensor in vars(piece).items()
        }
        write_tensors(tensors, stem.with_suffix(".safetensors"))
        write_json(result.layer + 1, self._progress)

    def _read(self, layer: int) -> BlockResult:
        stem = self.folder / f"block-{layer:04}"
        kept = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(stem.with_suffix(".safetensors"))
        specs = [FitSpec.from_json(fields) for fields in kept["adapters"]]
        # A run that was interrupted before configurations were kept has vectors and linear maps.
        configs = kept.get("configs") or [None] * len(specs)
        adapters = {}
        for spec, config in zip(specs, configs, strict=True):
            own = {
                name.split("|")[1]: tensor
                for name, tensor in tensors.items()
                if name.split("|")[0] == spec.name
            }
            adapters[spec] = _rebuilt(spec, config, own)
        return BlockResult(layer, kept["rows"], adapters, _pieces(layer, tensors))


_PIECES = "pieces"  # begins the names of tensors that no adapter has


def _pieces(layer: int, tensors: dict[str, Any]) -> dict[WeightFit, dict[Place, LowRank]]:
    parts: dict[Any, dict[Place, dict[str, Any]]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{_PIECES}|"):
            _, fit, module, part = name.split("|")
            parts.setdefault(fit, {}).setdefault((layer, module), {})[part] = tensor
    return {
        fit: {place: LowRank(**piece) for place, piece in found.items()}
        for fit, found in parts.items()
    }


def _rebuilt(spec: FitSpec, config: dict[str, Any] | None, tensors: dict[str, Any]) -> Adapter:
    if spec.kind == "vector":
        return FixedVector(tensors["bias"])
    if spec.kind == "linear":
        return Linear(tensors["up"], tensors.get("down"), tensors["bias"])
    adapter = KINDS[spec.kind].identity(**(config or {}))
    adapter.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    return adapter
