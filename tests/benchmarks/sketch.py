"""How far spectra and fits from a random projection are from the exact ones.

    python tests/benchmarks/sketch.py [--documents 20] [--layers 0 10 20 29] [--widths 64 128 256]

One march over the pair that ships feeds the exact sums and sketches of several widths. Errors are
the largest over blocks, locations and modes: of ``relative_rms`` and ``k50`` relative, of shares
explained on held-out documents absolute.
"""

import argparse
import time

import torch
from record import write

from toolkit import ModelPair
from toolkit.diagnosis.block_statistics import BlockStatistics
from toolkit.diagnosis.survey import analyse
from toolkit.documents.batches import make_batches
from toolkit.documents.documents import read_documents
from toolkit.documents.tokens import encode_all
from toolkit.lockstep.march import March
from toolkit.runtime.lapack import quiet_openblas
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped


@torch.no_grad()
@quiet_openblas()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    args = parser.parse_args()
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    documents = read_documents(shipped(PROMPTS))[: args.documents]
    batches = make_batches(encode_all(documents, pair.tokenizer))
    march = March(pair.base_runner, pair.tuned_runner, batches, pair.branches)
    widths = [None, *args.widths]
    seconds = dict.fromkeys(widths, 0.0)
    nbytes = dict.fromkeys(widths, 0)
    found = {width: [] for width in widths}
    for layer in march.layers():
        sums = {width: BlockStatistics(pair.branches, (), sketch=width) for width in widths}
        for step in march.steps(layer):
            for width in widths if layer in args.layers else ():
                started = time.perf_counter()
                sums[width].update(step)
                seconds[width] += time.perf_counter() - started
        if layer in args.layers:
            for width in widths:
                found[width].append(analyse(layer, sums[width]).rows)
                products = [m._product for m in sums[width].moments.values()]
                nbytes[width] = sum(p.nbytes for part in products for p in part.values())
        march.advance(layer, {})

    def errors(width):
        spectra, fits, seen = {"relative_rms": 0.0, "k50": 0.0}, {}, 1.0
        for ours, exact in zip(found[width], found[None], strict=True):
            for a, b in zip(ours["spectrum"], exact["spectrum"], strict=True):
                for name in spectra:
                    spectra[name] = max(spectra[name], abs(a[name] / b[name] - 1))
            for a, b in zip(ours["linear_fit"], exact["linear_fit"], strict=True):
                gap = abs(a["explained_heldout"] - b["explained_heldout"])
                fits[b["rank"]] = max(fits.get(b["rank"], 0.0), gap)
            for row in ours["sketch"]:
                seen = min(seen, row["state"], row["delta"])
        return spectra, fits, seen

    rows = []
    for width in args.widths:
        spectra, fits, seen = errors(width)
        rows.append(
            {
                "width": width,
                "time of the sums": round(seconds[width] / seconds[None], 2),
                "their memory": round(nbytes[width] / nbytes[None], 2),
                "least variance seen": round(seen, 3),
                "relative_rms": f"{spectra['relative_rms']:.1e}",
                "k50": f"{spectra['k50']:.2f}",
                **{f"explained, rank {r}": f"{fits[r]:.3f}" for r in (0, 1, 8, 32, "full")},
            }
        )
    note = (
        f"against exact sums; SmolLM2 (d = 576) and its LoRA, {args.documents} documents, blocks "
        f"{', '.join(map(str, args.layers))}; largest errors"
    )
    write("sketch", "Sketched moments", rows, note)


if __name__ == "__main__":
    main()
