"""One thread, no network, and which tests are slow; `tests/support/fixtures.py` has the rest."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels and commands that tests start share two cores with the other worker: threads would wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files that start processes or kernels, train, or make many runs: `make quick` leaves them out.
SLOW = {
    "broken_input", "comparison", "cross_fit", "deficient_mlp", "diagnose", "diagnose_reach",
    "diagnose_recovery", "diagnose_tables", "distilled", "distributions", "docs", "error_growth",
    "estimate", "every_kind", "families", "figures", "first_look", "free_memory", "grpo", "heap",
    "kernel", "killed", "known_answers", "main", "methods", "next_steps", "noise", "notebooks",
    "offload", "once", "output", "package", "page", "placement", "plot", "processes", "quantised",
    "recommend", "shared_work", "shipped", "shipped_runs", "side_by_side", "site", "steer",
    "table", "trainer", "tuners", "validity", "workspace",
}  # fmt: skip


def pytest_configure(config):
    """Load what tests share where they run: the process that only hands them out needs no torch."""
    if config.getoption("dist", "no") == "no":
        gc.disable()
        config.pluginmanager.import_plugin("tests.support.fixtures")


def pytest_collection_modifyitems(items):
    """Mark the tests of `SLOW` files."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


def pytest_collection_finish():
    """Garbage is looked for from here on, and not in what was imported: a tenth of all time."""
    gc.freeze()
    gc.enable()
