"""A Jupyter kernel, used as a notebook uses it: cells run in turn, and can be interrupted."""

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jupyter_client.manager import KernelManager
from nbformat.v4 import output_from_msg

from tests.support.forked import forked_kernels
from toolkit import ModelPair
from toolkit.models.loading import fingerprint

ROOT = Path(__file__).parents[2]
OUTPUTS = ("display_data", "error", "execute_result", "stream")
LOOKS = 0.01  # seconds between two looks at whether to interrupt
PATIENCE = 300  # seconds without a word from the kernel


class Kernel:
    """A kernel that runs in the repository until `stop`."""

    def __init__(self) -> None:
        self._manager = KernelManager(kernel_name="python3")
        with forked_kernels():
            self._manager.start_kernel(cwd=str(ROOT))
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE)

    def stop(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def run(self, cell: str, interrupt_when: Callable[[], bool] | None = None) -> list[Any]:
        """The cell's outputs as a notebook saves them; it is interrupted once, if ever it is."""
        asked = self._client.execute(cell)
        outputs: list[Any] = []
        places: dict[str, int] = {}
        heard = time.monotonic()
        while True:
            if interrupt_when and interrupt_when():
                self._manager.interrupt_kernel()
                interrupt_when = None
            try:
                message = self._client.get_iopub_msg(timeout=LOOKS)
            except queue.Empty:
                assert time.monotonic() - heard < PATIENCE, f"no end of {cell!r}: {outputs}"
                continue
            heard = time.monotonic()
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return outputs
            name = content.get("transient", {}).get("display_id")
            if kind == "update_display_data":
                outputs[places[name]].data = content["data"]
            elif kind in OUTPUTS:
                places[name] = len(outputs)
                outputs.append(output_from_msg(message))

    def value(self, expression: str) -> str:
        """Return the value of `expression`, in words."""
        (output,) = self.run(expression)
        assert output.output_type == "execute_result", output
        return output.data["text/plain"]


def state_of(pair: ModelPair) -> dict[str, Any]:
    """Describe what must stay of a pair's models: weights, hooks, modes, and their logits."""
    ids = torch.arange(1, 9)[None]
    found = {}
    for name, model in (("base", pair.base), ("tuned", pair.tuned)):
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        found[name] = {
            "weights": fingerprint(sorted(model.state_dict().items())),
            "hooks": [len(hooks) for m in model.modules() for hooks in hooks_of(m)],
            "own forward": ["forward" in vars(m) for m in model.modules()],
            "training": any(m.training for m in model.modules()),
            "gradients": any(p.requires_grad for p in model.parameters()),
            "logits": logits.double().sum().item(),
        }
    return found


def hooks_of(module: torch.nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks
