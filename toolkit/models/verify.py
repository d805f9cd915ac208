"""What must hold before any number is believed, tested on one short batch when a pair is made."""

from contextlib import ExitStack

import torch

from toolkit.documents.batches import Batch
from toolkit.models.deltas import wide
from toolkit.models.hooks import capture, constant, replace
from toolkit.models.locations import BRANCHES, n_embeddings
from toolkit.models.runner import BlockRunner
from toolkit.runtime.check import Check, check


@torch.no_grad()
def prove(base: BlockRunner, tuned: BlockRunner) -> tuple[list[Check], dict[str, str]]:
    """Prove the three identities and the march's own, for the base and the tuned model.

    Returns the checks, and the locations that the model refuses in fact, with the reason.
    """
    batch = _short_batch(base)
    checks: list[Check] = []
    refused: dict[str, str] = {}
    for name, blocks in (("base", base), ("tuned", tuned)):
        checks += [_hidden_states(name, blocks, batch), _write_back(name, blocks, batch)]
        checks.append(_march(name, blocks, batch))
        residual = _residual(name, blocks, batch)
        checks.append(residual)
        if residual.status == "failed":
            refused |= dict.fromkeys(("pre_mlp", "post_mlp"), residual.detail)
    return checks, refused


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
    with capture(runner.sites.outputs) as states:
        own = _forward(runner, batch, output_hidden_states=True).hidden_states
    # The last of the model's own states is normed already; every other must be a block's output.
    same = all(torch.equal(states[str(i)], own[i + 1]) for i in range(runner.sites.n_layers - 1))
    return check(
        f"captured states ({name})", same, "block outputs equal the model's own hidden states"
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
    hidden = runner.embed(batch)
    same = True
    for layer in range(runner.sites.n_layers):
        hidden, _ = runner.run(layer, runner.call(layer, batch), hidden, ())
        same &= torch.equal(hidden, own[str(layer)])
    same &= torch.equal(runner.logits(batch, hidden), own_logits)
    return check(
        f"march identity ({name})", same, "marching reproduces the model's states and logits"
    )


def _residual(name: str, runner: BlockRunner, batch: Batch) -> Check:
    title = f"residual identity ({name})"
    for location in BRANCHES:
        if location in runner.sites.unavailable:
            return Check(title, "not applicable", runner.sites.unavailable[location])
    worst = 0.0
    hidden = runner.embed(batch)
    for layer in range(runner.sites.n_layers):
        output, states = runner.run(layer, runner.call(layer, batch), hidden, BRANCHES)
        parts = wide(hidden) + wide(states["pre_mlp"]) + wide(states["post_mlp"])
        worst = max(worst, float((parts - wide(output)).abs().max() / wide(output).abs().max()))
        hidden = output
    bound = 16 * torch.finfo(hidden.dtype).eps
    return check(
        title,
        worst <= bound,
        "resid_pre + pre_mlp + post_mlp = post_block, up to "
        f"{worst:.1e} of the largest entry (rounding: {bound:.1e})",
    )
