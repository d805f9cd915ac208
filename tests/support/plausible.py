"""Tables with values like those of a 135M model, for what draws and words them."""

import io

import numpy as np
import pandas as pd

from toolkit.tables.spec import specs
from toolkit.tables.table import Table

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, "full")
LOCATIONS = ("pre_mlp", "post_mlp", "post_block")
D_MODEL, PARAMETERS = 576, 134_515_008


def frames(n_layers: int = 30, n_tokens: int = 32) -> dict[str, pd.DataFrame]:
    """All tables with values like those of a 135M model tuned on arithmetic."""
    random = np.random.default_rng(0)
    depth = np.linspace(0, 1, n_layers)
    rows: dict[str, list[dict]] = {name: [] for name in specs()}
    for layer, t in enumerate(depth):
        rows["norms"] += _norms(layer, t, random)
        rows["spectrum"] += _spectrum(layer, t, random)
        rows["noise"] += _noise(layer, t)
        rows["linear_fit"] += _fits(layer, random)
        down, gate = 0.2 + 0.3 * t + random.normal(0, 0.03), 0.36 - 0.15 * t
        rest = 1e-5 * 10 ** random.normal(0, 0.3)
        rows["first_order"].append(
            {"layer": layer, "down": down, "gate": gate, "up": 1 - down - gate, "remainder": rest,
             "relative_change": 0.05 + 0.1 * t}
        )  # fmt: skip
        rows["reachability"] += _reach(layer, t, random)
        rows["shared_reach"] += _shared(layer, random)
        rows["forced_reach"] += _forced(layer, t)
        rows["normalisation"].append(
            {"layer": layer, "norm_gain": 0.95, "radial_gain": 1e-6 * (1 + t), "post_gain": 1.0,
             "attention_share": 0.4 - 0.3 * t, "n_tokens": 8}
        )  # fmt: skip
        rows["inner_pair"] += _pair(layer, t)
        rows["first_order_scale"] += _scales(layer, down, gate, rest)
        rows["mlp_fit"] += _mlp_fits(layer, t)
        rows["weights"] += _weights(layer, random)
    for name, scale in (("base", 0.6), ("recommended", 0.02), ("runner-up", 0.025)):
        rows["distributions"].append(_distributions(name, scale))
    rows["tokens"] += _tokens(random)
    rows["prompts"] += _prompts(random)
    for candidate in candidates(n_layers):
        rows["steerability"].append(candidate)
        rows["sequential_kl"] += _curves(candidate, n_tokens, random)
    rows["task"] += _task()
    rows["response_loss"] += _losses()
    rows["elsewhere"] += _elsewhere()
    rows["cross_fitted"] += _cross_fitted()
    return {name: Table.of(name, found).frame for name, found in rows.items()}


MODELS = ("base", "tuned", "recommended", "runner-up")


def _task():
    for model, right, kept, gained in zip(
        MODELS, (24, 68, 64, 51), (1, 0.75, 0.7, 0.8), (0, 1, 0.84, 0.5), strict=True
    ):
        share, apart = right / 200, (right - 68) / 200
        yield {"model": model, "accuracy": share, "accuracy_low": share - 0.06,
               "accuracy_high": share + 0.06, "difference": apart, "difference_low": apart - 0.05,
               "difference_high": apart + 0.05, "kept": kept, "kept_of": 24, "gained": gained,
               "gained_of": 50, "right": right, "n_questions": 200, "left_out": 3}  # fmt: skip


def _losses():
    for model, loss in zip(MODELS, (1.31, 0.92, 0.95, 1.0), strict=True):
        apart = loss - 0.92
        yield {"model": model, "loss": loss, "loss_sem": 0.05, "difference": apart,
               "difference_sem": apart / 9, "closed": 1 - apart / 0.39, "closed_sem": 0.02,
               "n_documents": 24, "n_tokens": 2911}  # fmt: skip


def _elsewhere():
    for file, size in (("own prompts", 0.87), ("elsewhere.jsonl", 0.21)):
        for model, left in zip(MODELS, (1, 0, 0.06, 0.1), strict=True):
            share = 1 - left
            yield {"file": file, "model": model, "kl": size * left, "kl_sem": size * left / 8,
                   "kl_base": size * share, "kl_base_sem": size * share / 8, "recovered": share,
                   "recovered_sem": 0.02, "recovered_low": share - 0.045,
                   "recovered_high": share + 0.045, "n_prompts": 12, "n_tokens": 380}  # fmt: skip


def _cross_fitted():
    for location, shares in (("pre_mlp", (0.26, 0.44, 0.52)), ("post_mlp", (0.41, 0.91, 0.97)),
                             ("post_block", (-1.4, 0.92, 0.98))):  # fmt: skip
        for rank, share in zip((0, 8, 32), shares, strict=True):
            yield {"location": location, "kind": "linear" if rank else "vector", "rank": rank,
                   "recovered": share, "recovered_sem": 0.008, "recovered_low": share - 0.016,
                   "recovered_high": share + 0.016, "kl": 0.6 * (1 - share), "base_kl": 0.6,
                   "n_prompts": 120}  # fmt: skip


def _norms(layer, t, random):
    for of, size in (("base", 30), ("tuned", 30.1), ("delta_free", 2 + 9 * t), ("delta_forced", 2)):
        share = 0.45 + 0.25 * t + random.normal(0, 0.04) * (of != "tuned")
        attention, mlp = size * (1 - share), size * share
        block = size * (1 + 10 * t)
        yield {"layer": layer, "of": of, "pre_mlp": attention, "post_mlp": mlp,
               "post_block": block, "mlp_share": share}  # fmt: skip


def _noise(layer, t):
    for location in LOCATIONS:
        for mode, size in (("free", 4e-3 * (1 + 3 * t)), ("forced", 4e-3)):
            yield {"layer": layer, "location": location, "mode": mode, "n_tokens": 250,
                   "noise_rms": 33 * size, "noise_relative": size,
                   "noise_norm": 30 * size}  # fmt: skip


def _spectrum(layer, t, random):
    for place, location in enumerate(LOCATIONS):
        for mode in ("free", "forced"):
            k = int(60 + 40 * place + 30 * t + random.normal(0, 8) - 30 * (mode == "free"))
            size = (0.03 + 0.15 * t) / (1 + 4 * (mode == "forced")) * (1 + place / 2)
            yield {"layer": layer, "location": location, "mode": mode, "n_tokens": 9000,
                   "rms": 10 * size, "relative_rms": size, "mean_share": 0.2,
                   "participation_ratio": 20.0, "entropy_rank": 60.0, "k50": k // 6, "k90": k,
                   "k95": 2 * k, "k99": 3 * k}  # fmt: skip


def _fits(layer, random):
    for source in LOCATIONS:
        for mode, target in (("free", "own"), ("forced", "own"), ("forced", "block")):
            for rank in RANKS:
                steps = 10 if rank == "full" else np.log2(1 + rank)
                top = 0.9 if source != "pre_mlp" else 0.5
                value = top * (0.2 + 0.8 * (1 - np.exp(-steps / 2))) + random.normal(0, 0.03)
                yield {"layer": layer, "source": source, "target": target, "mode": mode,
                       "rank": rank, "explained_fit": value + 0.01,
                       "explained_heldout": value}  # fmt: skip


def _reach(layer, t, random):
    for target, hard in (("down", 1.0), ("exact", 0.7)):
        for budget in (0.01, 0.03, 0.1, 0.3, 1.0):
            middle = hard * np.exp(-budget * 60 * (1.1 - t)) * 10 ** random.normal(0, 0.02)
            yield {"layer": layer, "target": target, "budget": budget,
                   "residual_q25": 0.8 * middle, "residual_median": middle,
                   "residual_q75": min(1, 1.2 * middle), "nonlinear_residual_median": middle,
                   "min_norm_median": float("inf") if layer == 1 else 0.4,
                   "rank_median": 576.0, "n_tokens": 8}  # fmt: skip


def _shared(layer, random):
    for place, target, top in (("mlp_in", "down", 0.3), ("mlp_in", "exact", 0.6),
                               ("pre_mlp", "block", 0.5), ("post_mlp", "block", 0.8),
                               ("post_block", "block", 0.85)):  # fmt: skip
        after = place.startswith("post")
        for rank, share in ((0, 0.2), (1, 0.5), (8, 0.95), (32, 1.0), ("full", 1.0)):
            value = top * share + random.normal(0, 0.02)
            yield {"layer": layer, "location": place, "target": target, "rank": rank,
                   "explained_fit": value + 0.05, "explained_heldout": value,
                   "explained_heldout_sem": None if after else 0.03,
                   "nonlinear_heldout": value - 0.02, "size": None if after else 0.05,
                   "n_fit": None if after else 256,
                   "n_heldout": None if after else 128}  # fmt: skip


def _forced(layer, t):
    places = [("pre_mlp", None, "down", 0.6), ("pre_mlp", None, "exact", 0.7)]
    places += [("pre_mlp", None, "block", 0.8), ("post_mlp", None, "block", 0.7)]
    places += [("post_block", None, "block", 0.7)]
    places += [("heads", head, "block", 0.1 + 0.02 * head) for head in range(9)]
    for location, head, target, top in places:
        for budget in (0.01, 0.03, 0.1, 0.3, 1.0):
            share = top * min(1.0, (budget * (2 - t)) ** 0.3)
            left = (1 - share) ** 0.5
            yield {"layer": layer, "location": location, "head": head, "target": target,
                   "budget": budget, "explained": share, "residual_q25": 0.9 * left,
                   "residual_median": left, "residual_q75": min(1.0, 1.1 * left),
                   "nonlinear_residual_median": left, "n_tokens": 8}  # fmt: skip


def _pair(layer, t):
    for rank, share in ((0, 0.02), (1, 0.1), (8, 0.3), (32, 0.35), ("full", 0.4)):
        value = share * (1 - 0.3 * t)
        yield {"layer": layer, "rank": rank, "explained_fit": value, "explained_heldout": value,
               "explained_heldout_sem": 0.01, "residual_q25": 0.7, "residual_median": 0.8,
               "residual_q75": 0.9, "size_median": 0.05, "n_tokens": 128}  # fmt: skip


def _scales(layer, down, gate, rest):
    for scale in (0.25, 0.5, 1.0, 2.0, 4.0):
        yield {"layer": layer, "scale": scale, "down": down, "gate": gate, "up": 1 - down - gate,
               "remainder": rest * scale**2, "relative_change": 0.1 * scale,
               "n_tokens": 384}  # fmt: skip


def _mlp_fits(layer, t):
    for rank, share in ((0, 0.1), (1, 0.3), (8, 0.8), (32, 0.85), ("full", 0.8)):
        yield {"layer": layer, "source": "mlp_out", "target": "down", "rank": rank,
               "explained_fit": share + 0.02, "explained_heldout": share}  # fmt: skip
    yield {"layer": layer, "source": "mlp_in", "target": "mlp_out", "rank": "full",
           "explained_fit": 0.9 - 0.4 * t, "explained_heldout": 0.8 - 0.4 * t}  # fmt: skip


def _weights(layer, random):
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                   "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
        size = np.exp(random.normal(0, 0.3))
        yield {"layer": layer, "module": module, "rows": 576, "columns": 576, "norm_2": size,
               "norm_fro": 1.5 * size, "relative": 0.01, "rank": 8, "stable_rank": 2.2,
               "k90": 4 + layer % 3, "outside": 0.0}  # fmt: skip


def _distributions(name, scale):
    nats = {"kl": 1.0, "sampled_kl": 1.1, "reverse_kl": 1.3}
    nats |= {"sequence_kl": 32.0, "reverse_sequence_kl": 38.0}
    shares = {"agreement": 1 - scale / 3, "total_variation": scale / 3, "exact": 0.5 - scale / 2}
    values = {column: scale * value for column, value in nats.items()} | shares
    errors = {f"{column}_sem": value / 6 for column, value in values.items()}
    return {"model": name, "phase": "all", "n_prompts": 24, "n_samples": 24, "n_tokens": 700,
            "top_tenth": 0.6, "first_difference": 7.5, **values, **errors}  # fmt: skip


def _tokens(random):
    for of, scale in (("changed", 3.0), ("left", 0.2)):
        for place in range(1, 41):
            size = scale / place**0.5
            words = ", ".join(f'" <b>{i}</b>" {0.6 / (i + 1):.3f}' for i in range(5))
            yield {"of": of, "place": place, "prompt": int(random.integers(24)),
                   "token_index": int(random.integers(32)), "token": '"\\n"', "phase": "answer",
                   "nats": size, "share": 0.06 / place**0.5, "n_tokens": 700,
                   "context": f'"she has {place} <script>alert(1)</script>\\n eggs"',
                   "next_tuned": words, "next_base": words, "next_steered": words}  # fmt: skip


def _prompts(random):
    sizes = np.exp(random.normal(0, 0.6, 24))
    for prompt, size in enumerate(sizes):
        yield {"prompt": prompt, "text": f'"How many eggs has <i>{prompt}</i> hens?"',
               "n_tokens": 29, "base": 18 * size, "base_share": size / sizes.sum(),
               "steered": 0.6 * size, "steered_share": size / sizes.sum()}  # fmt: skip


def candidates(n_layers: int) -> list[dict]:
    """Rows of steerability, with the figures measured on a real pair."""
    rows = [_candidate("", "none", None, "", "all", 0.0, 0.0, 0)]
    rows.append(_candidate("post_block", "oracle", None, "", "all", 1.0, 0.0, 0))
    known = {
        ("forced", "post_block"): {0: 0.41, 8: 0.916, 32: 0.974},
        ("forced", "post_mlp"): {0: 0.41, 8: 0.913, 32: 0.973},
        ("forced", "pre_mlp"): {0: 0.26, 8: 0.44, 32: 0.52},
        ("sequential", "post_block"): {0: -0.85, 8: 0.978, 32: 0.983},
        ("sequential", "pre_mlp"): {0: 0.42, 8: 0.941},
        ("sequential", "post_mlp"): {8: 0.96},
        ("free", "post_block"): {0: -2.5, 8: -4.8, 32: -6.2, "full": -10.5},
    }
    for (fit, location), by_rank in known.items():
        for rank, value in by_rank.items():
            kind = "linear" if rank else "vector"
            rows.append(_candidate(location, kind, rank, fit, "all", value, 0.012, n_layers))
    for rank, value in ((8, 0.61), (32, 0.79)):
        row = _candidate("", "lora", None, "metric", "all", value, 0.02, n_layers)
        inner = 2 * rank * D_MODEL + D_MODEL
        rows.append({**row, "target": f"steering {rank}", "parameters": n_layers * inner})
    for layer in range(n_layers):
        value = 0.1 + 0.35 * layer / n_layers
        rows.append(_candidate("post_block", "linear", 8, "free", layer, value, 0.03, 1))
    return rows


def _candidate(location, kind, rank, fit, layers, recovered, sem, n_blocks):
    inner = D_MODEL if rank == "full" else 2 * (rank or 0)
    parameters = n_blocks * (D_MODEL * inner + D_MODEL)
    return {"location": location, "kind": kind, "rank": rank, "fit": fit, "layers": layers,
            "parameters": parameters, "parameters_percent": 100 * parameters / PARAMETERS,
            "kl": 0.6 * (1 - recovered), "kl_sem": 0.02, "recovered": recovered,
            "recovered_sem": sem, "kl_own": None, "kl_own_sem": None,
            "target": "own" if kind in ("vector", "linear") else ""}  # fmt: skip


def _curves(candidate, n_tokens, random):
    labels = {name: candidate[name] for name in ("location", "kind", "rank", "fit", "layers")}
    for forcing in ("tuned", "own") if candidate["layers"] == "all" else ("tuned",):
        for index in range(n_tokens):
            mean = max(candidate["kl"], 1e-13) * 10 ** random.normal(0, 0.25)
            mean *= 1 if forcing == "tuned" else 1 + index / 4
            yield {**labels, "forcing": forcing, "token_index": index, "kl_mean": mean,
                   "kl_sem": mean / 4, "n_prompts": 20,
                   "target": candidate["target"]}  # fmt: skip


def reread(frame: pd.DataFrame) -> pd.DataFrame:
    """Written as CSV and read back."""
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)))
