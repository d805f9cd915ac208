"""The laptop's table: a tiny Llama on ListOps, and every method beside its full fine-tune."""

from toolkit.tasks import ListOps

TASK = ListOps(max_depth=2, max_args=3, worked=True, prompt="{expression} =")
