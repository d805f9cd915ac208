"""A base model, the same with adapters, and a fine-tune, on one task's test questions."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.task import Example, Task, chance
from toolkit.evaluation.accuracy import bootstrap, correct, prompts_of
from toolkit.evaluation.reference import Reference
from toolkit.models.loading import load_model, load_tokenizer, parse_dtype
from toolkit.models.pair import ModelPair
from toolkit.runtime.console import quiet_transformers
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import versions

KL_PROMPTS, KL_TOKENS = 64, 32


# many parameters: they are the options of `oracle steer eval`
def judge(
    base: str,
    task_files: tuple[str, Path | None, Path | None],
    adapters: Sequence[Path] = (),
    tuned: str | None = None,
    n: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    shown: bool = True,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Accuracy with its 95 % interval and, with `tuned`, the divergence from it, of each model."""
    precision = parse_dtype(dtype)
    task = make_task(*task_files)
    test = task.examples("test", n)
    by_constant = _chance(task, task_files, test)
    loaded = {str(path): Adapters.from_pretrained(path) for path in adapters}
    with quiet_transformers():
        if tuned:
            pair = ModelPair.load(base, tuned, precision, device)
            model, tokenizer = pair.base, pair.tokenizer
        else:
            model = load_model(base, precision, device)
            tokenizer = load_tokenizer(base)
    who: list[tuple[str, Any, Callable[[], Any]]] = [("base", model, nullcontext)]
    for name, found in loaded.items():
        who.append((name, model, partial(steer, model, found)))
    reference = None
    if tuned:
        who.append(("tuned", pair.tuned, nullcontext))
        prompts = prompts_of(tokenizer, test[:KL_PROMPTS])
        reference = Reference(pair.tuned, tokenizer, prompts, min(KL_TOKENS, task.new_tokens), None)
    rows, plain, base_kl = [], [], None
    total = len(who) * -(-len(test) // batch_size)
    with progress("asking", total, shown) as advance:
        for name, asked, context in who:
            with context():
                right = correct(asked, tokenizer, task, test, batch_size, advance)
                kl = reference.divergence(asked) if reference else None
            base_kl = base_kl or kl
            low, high = bootstrap(right)
            share = recovered(kl, base_kl)[0] if kl is not None and base_kl is not None else None
            plain.append({"who": name, "accuracy": float(right.mean()), "low": low, "high": high,
                          "kl": kl.mean if kl else None, "recovered": share})  # fmt: skip
            rows.append((name, f"{right.mean():.3f}", f"{low:.3f} to {high:.3f}",
                         f"{kl.mean:.3f}" if kl else "", f"{share:.3f}" if kl else ""))  # fmt: skip
    return {
        "rows": rows,
        "results": plain,
        "task": task.name,
        "questions": len(test),
        "chance": by_constant,
        "base": base,
        "tuned": tuned,
        "parameters": {name: found.parameters for name, found in loaded.items()},
        "versions": versions(),
    }


def _chance(
    task: Task, task_files: tuple[str, Path | None, Path | None], test: Sequence[Example]
) -> float:
    """Of the most frequent training answer; of the test's own, where no other file is given."""
    _, train_file, test_file = task_files
    only_test = test_file is not None and train_file is None
    return chance(test if only_test else task.examples("train", 2000), test)
