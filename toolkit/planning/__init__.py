"""What a run costs, before it runs: operations, bytes and time as formulas, and a plan of them.

`shapes` and `workload` say what is asked for in numbers, `operations` and `memory` are the
formulas, `timing` measures this machine for some seconds, `estimate` puts them together for one
run, `scaling` for pairs of any size, and `free_memory` refuses a run that does not fit.
"""

from toolkit.planning.estimate import RunPlan, plan
from toolkit.planning.free_memory import require_memory
from toolkit.planning.shapes import ModelShape
from toolkit.planning.workload import BatchShape, Workload

__all__ = ["BatchShape", "ModelShape", "RunPlan", "Workload", "plan", "require_memory"]
