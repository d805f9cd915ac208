"""What a run costs, before it runs: operations, bytes and time as formulas, and a plan of them."""

from toolkit.planning.estimate import RunPlan, plan
from toolkit.planning.free_memory import require_memory
from toolkit.planning.shapes import ModelShape
from toolkit.planning.workload import BatchShape, Workload

__all__ = ["BatchShape", "ModelShape", "RunPlan", "Workload", "plan", "require_memory"]
