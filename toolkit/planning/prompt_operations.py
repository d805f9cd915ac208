"""Count what reading prompts and generating from them costs: in the comparison, in the close look,
and for what is looked at beside the documents.
"""

from dataclasses import dataclass, replace

from toolkit.evaluation.candidates import group_size
from toolkit.planning.shapes import ModelShape
from toolkit.planning.stages import Stage, block_pass, head, scores
from toolkit.planning.workload import BatchShape, Workload

LOGIT = 10  # operations of one logit in a divergence: two exponentials, sums, a product
# Of those that generate, the tuned model and the base, which has batches of the same size.
BY_THEMSELVES = 2
LOOKED_AT = 4  # in the close look: tuned, base, recommended and runner-up
# Distributions: how often a prompt is read, a continuation is read after it, and one is generated.
# The tuned model reads its answers, its sample and three of others; each other model the answers
# and both samples. All sample, and three are greedy besides.
N_PROMPTS_READ, N_CONTINUATIONS_READ = 4, 14
N_SAID = 2  # times that each model but the tuned one generates there
N_GENERATED = 1 + N_SAID * (LOOKED_AT - 1)
N_LOGITS = 12  # of a token: the comparison's three, and three models' forward, back and variation


@dataclass(frozen=True)
class _Once:
    """Count one model's operations on a round of prompts.

    prompt: reading the prompts. continuation: reading known tokens after them, from the cache, in
    one pass. generated: making the same tokens one by one.
    """

    prompt: float
    continuation: float
    generated: float

    @classmethod
    def of(cls, shape: ModelShape, prompts: BatchShape, n: int) -> "_Once":
        """Count those of `n` tokens after each of `prompts`; the last one is not read."""
        rows, length = prompts.rows, prompts.length
        tokens = sum(2.0 * block.matrices * rows * (n - 1) for block in shape.blocks)
        context = shape.n_layers * rows * scores(shape, n - 1, length + n - 1)
        growing = rows * scores(shape, 1, 1) * ((n - 1) * length + n * (n - 1) / 2)
        logits = head(shape, rows * (n - 1))
        return cls(
            sum(block_pass(shape, block, prompts) for block in shape.blocks) + head(shape, rows),
            tokens + context + logits,
            tokens + shape.n_layers * growing + logits,
        )


def replacement(
    shape: ModelShape, work: Workload, name: str = "replacement", known: bool = False
) -> list[Stage]:
    """Generation and replacement, for each round of prompts.

    The tuned model, and every candidate in all blocks, reads the prompts and the tuned model's
    tokens; some of them say their own one by one. Tuned model and oracle read prompts and tokens in
    one pass each (unless it is `known` what they gave); so does, where one is tried in single
    blocks, the base model, and each from its block on.
    """
    reading, n = work.everywhere + 1, work.new_tokens
    talking = _talking(work)
    singles = shape.n_layers if work.single else 0
    plain = 0 if known else 3 if work.single else 2
    read = said = logits = 0.0
    for prompts in work.prompts:
        once = _Once.of(shape, prompts, n)
        whole = BatchShape(prompts.rows, prompts.length + n - 1)
        read += reading * (once.prompt + once.continuation)
        said += talking * once.generated
        for place, block in enumerate(shape.blocks):
            starts = place + 1 if singles else 0  # candidates that start here or before
            read += (plain + starts) * block_pass(shape, block, whole)
        read += head(shape, prompts.rows * (plain + singles) * n)
        logits += prompts.rows * n * shape.vocabulary * (work.everywhere + talking + singles)
    return [
        Stage(f"{name}: reading", "block", read),
        Stage(
            f"{name}: token by token",
            "decode",
            said,
            passes=_sayings(work) * (n - 1),
        ),
        Stage(f"{name}: divergences", "logit", LOGIT * logits),
    ]


def _talking(work: Workload) -> int:
    """Count the models that say their own tokens."""
    return work.everywhere + 1 if work.talking is None else work.talking


def _sayings(work: Workload) -> int:
    """Count how often tokens are made one by one: by tuned, by base, and by groups of others."""
    alone, others = min(_talking(work), BY_THEMSELVES), _talking(work) - BY_THEMSELVES
    return sum(alone + n_groups(others, prompts) for prompts in work.prompts)


def rows_of_a_token(work: Workload) -> int:
    """Return for how many rows a pass makes a token in the comparison, on average."""
    rows = _talking(work) * sum(prompts.rows for prompts in work.prompts)
    return max(1, round(rows / max(_sayings(work), 1)))


def n_side_by_side(work: Workload, prompts: BatchShape) -> int:
    """Count the candidates that generate in one batch, from copies of `prompts`, at most."""
    return max(1, min(group_size(prompts.rows), _talking(work) - BY_THEMSELVES))


def n_groups(n: int, prompts: BatchShape) -> int:
    """Count the groups in which `n` candidates generate from `prompts`."""
    return -(-max(n, 0) // group_size(prompts.rows))


def _close_sayings(work: Workload) -> int:
    """Count how often the close look makes tokens one by one."""
    return sum(1 + N_SAID * n_groups(LOOKED_AT - 1, prompts) for prompts in work.reporting)


def close_look(shape: ModelShape, work: Workload) -> list[Stage]:
    """The comparison of base and two candidates on prompts that report, and their distributions.

    Each model also reads the documents that report once more, for the loss of their responses.
    """
    if not work.reporting:
        return []
    n, name = work.new_tokens, "close look"
    asked = replace(work, prompts=work.reporting, everywhere=LOOKED_AT - 1, talking=0, single=False)
    compared, *_, logits = replacement(shape, asked, name)
    read, said = compared.operations, 0.0
    for prompts in work.reporting:
        once = _Once.of(shape, prompts, n)
        read += N_PROMPTS_READ * once.prompt + N_CONTINUATIONS_READ * once.continuation
        said += N_GENERATED * once.generated
    for batch in work.answered:
        passes = sum(block_pass(shape, block, batch) for block in shape.blocks)
        read += LOOKED_AT * (passes + head(shape, batch.n))
    return [
        replace(compared, operations=read),
        Stage(
            f"{name}: token by token",
            "decode",
            said,
            passes=_close_sayings(work) * (n - 1),
        ),
        replace(logits, operations=N_LOGITS / (LOOKED_AT - 1) * logits.operations),
    ]


def elsewhere(shape: ModelShape, work: Workload) -> list[Stage]:
    """Prompts from other files, and once more those that report: each model reads them and the
    tuned model's tokens, the tuned model once more; from other files it generates them first.
    """
    if not work.elsewhere:
        return []
    read = said = logits = 0.0
    for index, prompts in enumerate((*work.elsewhere, *work.reporting)):
        once = _Once.of(shape, prompts, work.new_tokens)
        read += (LOOKED_AT + 1) * (once.prompt + once.continuation)
        said += once.generated if index < len(work.elsewhere) else 0.0
        logits += 2.0 * LOOKED_AT * prompts.rows * work.new_tokens * shape.vocabulary
    passes = len(work.elsewhere) * (work.new_tokens - 1)
    return [
        Stage("elsewhere: reading", "block", read),
        Stage("elsewhere: token by token", "decode", said, passes=passes),
        Stage("elsewhere: divergences", "logit", LOGIT * logits),
    ]


def questions(shape: ModelShape, work: Workload) -> list[Stage]:
    """A task's questions: each model reads them and generates an answer of the greatest length."""
    if not work.questions:
        return []
    each = [_Once.of(shape, prompts, work.answer_tokens) for prompts in work.questions]
    passes = len(each) * LOOKED_AT * (work.answer_tokens - 1)
    said = LOOKED_AT * sum(once.generated for once in each)
    return [
        Stage("questions: reading", "block", LOOKED_AT * sum(once.prompt for once in each)),
        Stage("questions: token by token", "decode", said, passes=passes),
    ]


def judged_by_folds(work: Workload) -> Workload:
    """Return what is compared by folds as a comparison: only the tuned model generates."""
    return replace(
        work, prompts=work.fold_prompts, everywhere=work.fold_maps + 1, talking=1, single=False
    )


def forward_passes(shape: ModelShape, work: Workload) -> float:
    """Count passes in generation, all comparisons and close look, whatever their numbers of tokens.

    Each runs through the blocks once; one that starts at block l counts for the share of them.
    """
    compared = (work, judged_by_folds(work))
    return sum(_comparing_passes(shape, some) for some in compared) + _looking_passes(work)


def _comparing_passes(shape: ModelShape, work: Workload) -> float:
    others = max(_talking(work) - BY_THEMSELVES, 0)
    reading = sum(work.everywhere + 1 - others + n_groups(others, p) for p in work.prompts)
    singles = (shape.n_layers + 1) / 2 if work.single else 0
    plain = len(work.prompts) * ((3 if work.single else 2) + singles)
    return 2 * reading + _sayings(work) * (work.new_tokens - 1) + plain


def _looking_passes(work: Workload) -> int:
    """Count the passes of the close look, and of what is looked at beside the documents."""
    compared = 2 * LOOKED_AT + 2
    generated = _close_sayings(work) * (work.new_tokens - 1)
    each = compared + N_PROMPTS_READ + N_CONTINUATIONS_READ
    found = len(work.reporting) * each + generated + len(work.answered) * LOOKED_AT
    found += len(work.questions) * LOOKED_AT * work.answer_tokens
    if work.elsewhere:
        rounds = len(work.elsewhere) + len(work.reporting)
        found += 2 * (LOOKED_AT + 1) * rounds + len(work.elsewhere) * (work.new_tokens - 1)
    return found
