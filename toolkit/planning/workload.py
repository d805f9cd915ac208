"""What is asked of a run, in numbers: what its cost is counted from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """`rows` documents (or prompts) of `length` tokens with padding, `counted` of which count."""

    rows: int
    length: int
    counted: int = 0
    held_out: bool = False

    @property
    def n(self) -> int:
        """Tokens, with padding."""
        return self.rows * self.length


@dataclass(frozen=True)
class Workload:
    """Hold what is asked of a run, in numbers.

    batches: of documents. prompts: rounds of prompts, their lengths before anything is said.
    steered: the location of each adapter that is fitted sequentially. everywhere: candidates that
    steer all blocks, no steering among them. talking: of those, and of the tuned model, how many
    say their own tokens (None: all). single: whether one is tried in each block alone. sketch:
    width of the projections through which moments are seen (None: exact). adapter: entries of a
    LoRA's factors in all blocks (None: the tuned half has weights of its own). weights: low-rank
    changes of the weights are made. first_look: there is a look at a few documents beforehand.
    search: ranks are looked for that hold a bound. reporting: rounds of the prompts that report.
    answered: batches of their documents. elsewhere: rounds of the prompts from other files.
    questions: rounds of a task's questions, answered with `answer_tokens` each. folds: of the
    documents, whose prompts, in rounds (`fold_prompts`), judge `fold_maps` maps a fold.
    """

    batches: tuple[BatchShape, ...]
    prompts: tuple[BatchShape, ...]
    steered: tuple[str, ...]
    everywhere: int
    single: bool
    new_tokens: int = 32
    sample: int = 8
    shared_sample: int = 256
    sketch: int | None = None
    adapter: int | None = None
    talking: int | None = None
    weights: bool = False
    first_look: bool = False
    search: bool = False
    reporting: tuple[BatchShape, ...] = ()
    answered: tuple[BatchShape, ...] = ()
    elsewhere: tuple[BatchShape, ...] = ()
    questions: tuple[BatchShape, ...] = ()
    answer_tokens: int = 0
    folds: int = 0
    fold_prompts: tuple[BatchShape, ...] = ()
    fold_maps: int = 0

    def counted(self, held_out: bool) -> int:
        """Counted tokens of one side."""
        return sum(batch.counted for batch in self.batches if batch.held_out == held_out)
