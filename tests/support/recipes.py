"""The scripts of data/recipes/ as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_recipe(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "data" / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
