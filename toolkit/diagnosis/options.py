"""What a run can be asked for."""

from dataclasses import dataclass

from toolkit.documents.corpus import Reading
from toolkit.documents.tokens import MAX_LENGTH, POSITIONS, Positions
from toolkit.errors import InputError
from toolkit.evaluation.rank_search import require_bound

LEAST_SKETCH = 64
DISTIL_STEPS = 300  # by default where there is a GPU


@dataclass(frozen=True)
class Options:
    """Hold what a run can be asked for.

    positions: which tokens count: all, response or last. max_length: tokens a document is cut at.
    new_tokens: tokens generated a prompt. max_prompts: at most so many held-out prompts (None:
    all). sample: tokens a block that are looked at one by one (reachability; 0: none).
    shared_sample: tokens a block on which one steering map before the MLP is fitted for all (half
    as many judge it; 0: none). max_kl: look for the smallest ranks that bring the steered model
    within so many nats a token of the tuned one (None: do not). recover: the recovery that the
    answer's adapters are to reach. distil: steps for which adapters at every place are distilled
    (0: they are not, and closed form's figures are a floor). folds: deal all documents into so many
    folds, and judge forced maps on each fold's prompts by maps that are fitted on the other folds
    (0: do not). batch_tokens: tokens a batch.
    sketch: width of a random projection through which spectra and fits are seen (None: exact).
    seed: of the samples.
    """

    positions: Positions = "all"
    max_length: int = MAX_LENGTH
    new_tokens: int = 32
    max_prompts: int | None = None
    sample: int = 8
    shared_sample: int = 256
    max_kl: float | None = None
    recover: float = 0.9
    distil: int = 0
    folds: int = 0
    batch_tokens: int = 2048
    sketch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise InputError(f"positions is {self.positions!r}: expected {', '.join(POSITIONS)}")
        for name in ("max_length", "new_tokens", "batch_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} is {getattr(self, name)}: expected 2 or more")
        if min(self.sample, self.shared_sample) < 0 or (
            self.max_prompts is not None and self.max_prompts < 1
        ):
            raise InputError("sample and shared_sample must be 0 or more, max_prompts 1 or more")
        if self.sketch is not None and self.sketch < LEAST_SKETCH:
            raise InputError(
                f"sketch is {self.sketch}: expected {LEAST_SKETCH} dimensions or more, twice the "
                "largest rank that is fitted"
            )
        if not 0 < self.recover < 1 or self.distil < 0:
            raise InputError(
                f"recover is {self.recover} and distil {self.distil}: expected a share between 0 "
                "and 1, and a number of steps"
            )
        if self.folds < 0 or self.folds == 1:
            raise InputError(
                f"folds (--cross-fit) is {self.folds}: expected 2 or more, or 0 for none"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}: expected a whole number from 0 to 2^32 - 1")
        if self.max_kl is not None:
            require_bound(self.max_kl)

    @property
    def reading(self) -> Reading:
        """How documents become tokens and batches."""
        return {
            "max_length": self.max_length,
            "positions": self.positions,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
        }
