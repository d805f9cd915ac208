"""Non-linear adapters regressed on a block's tokens: what closed form cannot give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.adapters.linear import Linear
from toolkit.adapters.nonlinear import NonLinear

HELD_BACK = 8  # one token in eight decides when to stop
STEPS, BATCH, RATE = 300, 1024, 3e-3
BENT, STRAIGHT = 4.0, 30.0  # where a SiLU is nearly a line, and where it is one


@dataclass(frozen=True)
class Tokens:
    """States and what is to be added to them, `[n, d]` each."""

    states: Tensor
    targets: Tensor

    @classmethod
    def join(cls, parts: Sequence["Tokens"]) -> "Tokens":
        return cls(
            torch.cat([part.states for part in parts]), torch.cat([part.targets for part in parts])
        )


def match(start: Linear, tokens: Tokens, seed: int = 0, steps: int = STEPS) -> NonLinear:
    """Return the non-linear adapter of the linear fit `start`'s rank that regresses `tokens` best.

    ``up σ(down h + a) + b`` with a SiLU is linear where its input is large, so a shift `a` into
    that range gives the linear fit: nearly, from where Adam goes on, or as exactly as precision
    lets it. Of the latter and Adam's steps the one with the least error on tokens held back is
    kept: never worse than the linear fit there.
    """
    adapter, straight = (_shifted(start, tokens.states, shift) for shift in (BENT, STRAIGHT))
    generator = torch.Generator().manual_seed(seed)
    device = tokens.states.device
    order = torch.randperm(len(tokens.states), generator=generator).to(device)
    n_back = max(1, len(order) // HELD_BACK)
    back = Tokens(tokens.states[order[:n_back]], tokens.targets[order[:n_back]])
    used = order[n_back:]
    scale = float(tokens.targets.square().mean()) or 1.0
    adapter.requires_grad_(True)
    with torch.enable_grad():
        optimiser = torch.optim.Adam(adapter.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        best = (_error(straight, back), _copied(straight))
        if (error := _error(adapter, back)) < best[0]:
            best = (error, _copied(adapter))
        for step in range(1, steps + 1):
            drawn = torch.randint(len(used), (min(BATCH, len(used)),), generator=generator)
            rows = used[drawn.to(device)]
            loss = (adapter(tokens.states[rows]) - tokens.targets[rows]).square().mean() / scale
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 20 == 0 and (error := _error(adapter, back)) < best[0]:
                best = (error, _copied(adapter))
    adapter.load_state_dict(best[1])
    return adapter.requires_grad_(False)


def _shifted(start: Linear, states: Tensor, shift: float) -> NonLinear:
    """Return the linear map through SiLUs that work where they are nearly straight.

    Inner values are scaled to a spread of 1 and shifted, say by 4: silu(4 + x) is nearly
    3.93 + 1.05 x.
    """
    assert start.down is not None
    inner = states @ start.down.T
    mean, spread = inner.mean(0), inner.std(0).clamp_min(1e-6)
    down = start.down / spread[:, None]
    point = torch.tensor(shift, dtype=states.dtype)
    gate = point.sigmoid()
    value, slope = point * gate, gate * (1 + point * (1 - gate))
    up = start.up * (spread / slope)
    bias = start.up @ mean - up.sum(1) * value
    if start.bias is not None:
        bias = bias + start.bias
    return NonLinear(up, down, shift - mean / spread, bias)


@torch.no_grad()
def _error(adapter: NonLinear, tokens: Tokens) -> float:
    return float((adapter(tokens.states) - tokens.targets).square().sum())


def _copied(adapter: NonLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
