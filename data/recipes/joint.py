"""Makes data/tiny-listops/joint: LoRA and a post-block adapter trained together.

    python data/recipes/joint.py

Rank 4 of both beside LoRA of rank 4, with and without the overlap of their output subspaces in the
loss.
"""

from pathlib import Path

from toolkit.jobs.comparison import TableRequest, make_table
from toolkit.training.methods import Method

OUT = Path(__file__).parent.parent / "tiny-listops" / "joint"
METHODS = (
    Method("LoRA r=4", "lora", rank=4),
    Method("LoRA r=4 and post-block r=4", "joint", "post_block", 4),
    Method("LoRA r=4 and post-block r=4, orthogonal", "joint", "post_block", 4, orthogonal=1.0),
)


def main() -> None:
    frame, _ = make_table(TableRequest(methods=METHODS), OUT, range(2), workers=1)
    shown = ["method", "parameters", "learning_rate", "accuracy", "accuracy_low", "kl"]
    print(frame[shown].to_string(index=False))


if __name__ == "__main__":
    main()
