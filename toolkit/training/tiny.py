"""The laptop's table: a tiny Llama on ListOps, and every method beside its full fine-tune.

The base model was pretrained from nothing on two operators, the tuned one fine-tuned on all four;
both ship (``data/recipes/tiny_listops.py`` made them). Methods stand beside others of like size.
"""

from toolkit.documents.documents import Document
from toolkit.documents.tasks.listops import ListOps
from toolkit.models.pair import ModelPair
from toolkit.runtime.shipped import shipped
from toolkit.training.methods import Method

NAME = "tiny-listops"
TASK = ListOps(max_depth=2, max_args=3, worked=True, prompt="{expression} =", digits=0.6)
# A model of a million parameters learns at larger rates than the published ones for billions.
N_TRAIN = 20_000
RATES = {"sft": (1e-3, 2e-3), "lora": (3e-3, 1e-2), "steering": (1e-2, 3e-2)}

METHODS = (
    Method("base", "none"),
    Method("fine-tune that ships", "tuned"),
    Method("SFT", "sft"),
    Method("LoRA r=8", "lora", rank=8),
    Method("ReFT r=8 (post-MLP)", "loreft", "post_mlp", 8),
    Method("post-MLP linear r=8", "linear", "post_mlp", 8),
    Method("pre-MLP linear r=8", "linear", "pre_mlp", 8),
    Method("post-block non-linear r=8", "nonlinear", "post_block", 8),
    Method("post-block linear r=8", "linear", "post_block", 8),
    Method("LoFIT", "head_vector", "heads"),
    Method("post-block vector", "vector", "post_block"),
    Method("JoLA", "gated_heads", "heads"),
    Method("post-block r=1", "linear", "post_block", 1),
    Method("post-block r=8, fitted", "linear", "post_block", 8, start="sequential", trained=False),
    Method("post-block r=8, fitted, trained", "linear", "post_block", 8, start="sequential"),
)


def tiny_pair() -> ModelPair:
    """Return the two models, from where they ship."""
    folder = shipped(NAME)
    return ModelPair.load(folder / "base", folder / "tuned")


def tiny_documents(n: int = 250) -> list[Document]:
    """The task's first `n` validation questions with their answers: the fine-tune saw none."""
    return [Document(prompt=e.prompt, response=e.response) for e in TASK.examples("validation", n)]
