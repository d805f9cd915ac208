"""What must hold before any number is believed, tested on one short batch when a pair is made."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from toolkit.documents.batches import Batch
from toolkit.errors import InputError, one_line, refused
from toolkit.models.deltas import wide
from toolkit.models.generation import (
    WITHOUT_CACHE,
    Generated,
    Prompts,
    continuation_logits,
    greedy,
    make_prompts,
    prefill,
    whole_logits,
)
from toolkit.models.hooks import Carried, capture, constant, replace
from toolkit.models.locations import BRANCHES, n_embeddings
from toolkit.models.runner import BlockRunner
from toolkit.runtime.check import Check, check

FEW_TOKENS = 0.05  # that may differ where experts are nearly equal and rounding chooses
CERTIFIED_TOKENS = 8  # generated from each prompt


@torch.no_grad()
def prove(base: BlockRunner, tuned: BlockRunner) -> tuple[list[Check], dict[str, str]]:
    """Prove the three identities and the march's own, for the base and the tuned model.

    Returns the checks, and the locations that the model refuses in fact, with the reason. Raises
    InputError where a model cannot be run block by block at all.
    """
    with refused(f"a {type(base.model).__name__} cannot be followed block by block"):
        return _proofs(base, tuned)


def _proofs(base: BlockRunner, tuned: BlockRunner) -> tuple[list[Check], dict[str, str]]:
    batch = _short_batch(base)
    checks: list[Check] = []
    unavailable: dict[str, str] = {}
    for name, blocks in (("base", base), ("tuned", tuned)):
        checks += [_hidden_states(name, blocks, batch), _write_back(name, blocks, batch)]
        checks += [proof(name, blocks, batch) for proof in (_march, _causal, _cached)]
        residual = _residual(name, blocks, batch)
        checks.append(residual)
        lacking = blocks.sites.unavailable.keys() & set(BRANCHES)
        if residual.status != "passed" and not lacking:
            unavailable |= dict.fromkeys(("pre_mlp", "post_mlp"), residual.detail)
    return checks, unavailable


def _short_batch(runner: BlockRunner) -> Batch:
    """Two rows of random tokens, of which the second is padded."""
    model = runner.model
    n_tokens = n_embeddings(model)
    ids = torch.randint(n_tokens, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    device = model.get_input_embeddings().weight.device
    keys = torch.zeros(int(mask.sum()), dtype=torch.float64)
    return Batch(ids.to(device), mask.to(device), mask.to(device), keys, held_out=False)


def _forward(runner: BlockRunner, batch: Batch, **kwargs):
    mask = batch.mask.long()
    return runner.model(input_ids=batch.ids, attention_mask=mask, use_cache=False, **kwargs)


def _hidden_states(name: str, runner: BlockRunner, batch: Batch) -> Check:
    with capture(runner.sites.leaving) as states:
        own = _forward(runner, batch, output_hidden_states=True).hidden_states
    # The last of the model's own states is normed already; every other must be a block's output.
    same = all(torch.equal(states[str(i)], own[i + 1]) for i in range(runner.sites.n_layers - 1))
    title = f"captured states ({name})"
    if same:
        return Check(title, "passed", "block outputs equal the model's own hidden states")
    return Check(
        title,
        "not applicable",
        "what this family lists as hidden states are not its blocks' outputs; the march's identity "
        "is what proves those",
    )


def _write_back(name: str, runner: BlockRunner, batch: Batch) -> Check:
    sites = {
        f"{location}.{layer}": site
        for (location, layer), site in runner.sites.at.items()
        if location not in runner.sites.unavailable
    }
    with capture(sites) as states:
        plain = _forward(runner, batch).logits
    with ExitStack() as stack:
        for key, site in sites.items():
            stack.enter_context(replace(site, constant(states[key])))
        written = _forward(runner, batch).logits
    return check(
        f"write-back ({name})",
        torch.equal(plain, written),
        "writing every captured value back changes no output bit",
    )


def _march(name: str, runner: BlockRunner, batch: Batch) -> Check:
    with capture(runner.sites.outputs) as own:
        own_logits = _forward(runner, batch).logits
    hidden, carried = runner.embed(batch), Carried()
    same = True
    for layer in range(runner.sites.n_layers):
        call = runner.call(layer, batch)
        hidden, _ = runner.run(layer, call, hidden, (), carried=carried)
        same &= _equal(hidden, own[str(layer)])
    same &= _equal(runner.logits(batch, hidden, carried), own_logits)
    if not same:
        raise InputError(
            f"a {type(runner.model).__name__} cannot be followed block by block: run one by one, "
            "its blocks do not give the model's own states"
        )
    return Check(
        f"march identity ({name})", "passed", "marching reproduces the model's states and logits"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare to the last bit; what overflows is said later, where its precision is known."""
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _causal(name: str, runner: BlockRunner, batch: Batch) -> Check:
    """Check that predictions depend on no later token, and on no other row or its padding."""

    def logits(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return runner.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    said = _for_itself(name, runner, batch, logits)
    return Check(f"each document for itself ({name})", "passed", said)


@torch.no_grad()
def prove_on_documents(name: str, runner: BlockRunner, batch: Batch) -> Check:
    """Prove the same on two of the run's own documents, `batch`: sparse attention selects there.

    By the last states, which are much smaller than logits. One token in twenty may differ: between
    experts that are nearly equal, rounding chooses.
    """

    def states(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        output = runner.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return output.last_hidden_state

    said = _for_itself(name, runner, batch, states, allowed=FEW_TOKENS)
    return Check(f"these documents for themselves ({name})", "passed", said)


def _for_itself(
    name: str,
    runner: BlockRunner,
    batch: Batch,
    read: Callable[..., Tensor],
    allowed: float = 0.0,
) -> str:
    """Say how far what is `read` differs where documents are alone, cut short and padded.

    `batch` has two rows, each padded on the right; on the left, logits are compared. Raises
    InputError where more than the `allowed` share of tokens differ by more than sums in another
    order do.
    """
    together = read(batch.ids, batch.mask.long())
    lengths = batch.mask.sum(1).tolist()
    long = max(range(2), key=lengths.__getitem__)
    short = 1 - long
    rows = [(long, lengths[long] * 2 // 3), (long, lengths[long]), (short, lengths[short])]
    given = [batch.ids[i : i + 1, :n] for i, n in rows]
    alone = [read(ids)[0] for ids in given]
    ends = [runner.model(input_ids=ids, use_cache=False).logits[0, -1:] for ids in given[1:]]
    padded = make_prompts([ids[0].tolist() for ids in given[1:]], 0, batch.ids.device)
    one = Generated(batch.ids[:, :1], torch.ones_like(batch.mask[:, :1]))
    last = whole_logits(runner.model, padded, one)[:, 0]  # padded on the left, as prompts are
    pairs = [(together[i, :n], a) for (i, n), a in zip(rows, alone, strict=True)]
    pairs += [(ours[None], theirs) for ours, theirs in zip(last, ends, strict=True)]
    worst = torch.cat([_differences(a, b) for a, b in pairs])
    bound = _tolerance(together.dtype)
    off = int((worst > bound).sum())
    if off > allowed * len(worst):
        raise InputError(
            f"the {name} model's predictions depend on later tokens or on other documents of a "
            f"batch (at {off} of {len(worst)} tokens they differ, by up to {worst.max():.1e} of "
            "their size): it cannot be followed in batches"
        )
    agree = "alone, cut short and in a padded batch they agree to "
    if off:
        return f"{agree}{bound:.0e} at all but {off} of {len(worst)} tokens"
    return f"{agree}{worst.max():.1e} (bound {bound:.0e})"


@torch.no_grad()
def certify(name: str, model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int) -> Check:
    """Check that `model` reads `prompts` alone, in a padded batch and through its cache alike.

    By the logits of the tokens that it generates from them through its cache, one by one. One in
    twenty may differ, as in `prove_on_documents`.
    """
    device = next(model.parameters()).device
    together = make_prompts(prompts, pad_id, device)
    start = prefill(model, together)
    own, cached = greedy(model, together, start, CERTIFIED_TOKENS, ())
    padded = whole_logits(model, together, own)
    alone = torch.cat(
        [
            whole_logits(model, make_prompts([prompt], pad_id, device), _row_of(own, row))
            for row, prompt in enumerate(prompts)
        ]
    )
    ways = {"in a padded batch": padded}
    if start.cache is not None:
        ways["through the cache"] = cached
    bound, off, words = _tolerance(alone.dtype), 0, []
    for way, logits in ways.items():
        worst = _differences(logits, alone)
        off += int((~(worst <= bound)).sum())  # NaN is off too
        words.append(f"{way} to {float(worst.max()):.1e}")
    n = len(ways) * own.ids.numel()
    return check(
        f"prompts alone, padded and cached ({name})",
        off <= FEW_TOKENS * n,
        f"logits agree with those of each prompt alone {' and '.join(words)} of the largest "
        f"(bound {bound:.0e}; {off} of {n} are beyond it)",
    )


def _row_of(generated: Generated, row: int) -> Generated:
    return Generated(generated.ids[row : row + 1], generated.counted[row : row + 1])


def _cached(name: str, runner: BlockRunner, batch: Batch) -> Check:
    """Find out whether the model's cache goes on as whole passes do; else it is not used."""
    model = runner.model
    prompts = Prompts(batch.ids[:, :8], batch.mask[:, :8])
    read = Generated(batch.ids[:, 8:], torch.ones(2, 4, dtype=torch.bool))
    whole = whole_logits(model, prompts, read)
    try:
        found = continuation_logits(model, prompts, prefill(model, prompts), read)
        worst, reason = _difference(found, whole), ""
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        worst, reason = float("inf"), f" ({one_line(error)})"
    bound, title = _tolerance(whole.dtype), f"cached passes ({name})"
    if worst <= bound:
        return Check(title, "passed", f"with a cache logits agree with whole passes to {worst:.1e}")
    WITHOUT_CACHE.add(model)
    how = f"differ by {worst:.1e} of their size" if math.isfinite(worst) else "are not to be had"
    return Check(
        title,
        "not applicable",
        f"with a cache logits {how}{reason}: every token is read anew, without one",
    )


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return float(_differences(a, b).max())


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Return each token's largest difference, relative to the largest entry of all, `[...]`."""
    return (wide(a) - wide(b)).abs().amax(-1) / wide(b).abs().max().clamp_min(1e-30)


def _tolerance(dtype: torch.dtype) -> float:
    """Return how far logits may differ by the order of sums: some thousand roundings."""
    return 4096 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 0.1


def _residual(name: str, runner: BlockRunner, batch: Batch) -> Check:
    title = f"residual identity ({name})"
    for location in BRANCHES:
        if location in runner.sites.unavailable:
            return Check(title, "not applicable", runner.sites.unavailable[location])
    worst = 0.0
    hidden, carried = runner.embed(batch), Carried()
    for layer in range(runner.sites.n_layers):
        call = runner.call(layer, batch)
        output, states = runner.run(layer, call, hidden, BRANCHES, carried=carried)
        parts = wide(hidden) + wide(states["pre_mlp"]) + wide(states["post_mlp"])
        worst = max(worst, float((parts - wide(output)).abs().max() / wide(output).abs().max()))
        hidden = output
    bound = 16 * torch.finfo(hidden.dtype).eps
    how = (
        "resid_pre + pre_mlp + post_mlp = post_block, up to "
        f"{worst:.1e} of the largest entry (rounding: {bound:.1e})"
    )
    if worst <= bound:
        return Check(title, "passed", how)
    reason = "something else is added to the stream, or a branch is scaled on its way there"
    return Check(title, "not applicable", f"{reason}: {how} does not hold")
