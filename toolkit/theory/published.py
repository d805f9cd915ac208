"""What was published: the models' shapes, and how sure accuracies are."""

from scipy.stats import binomtest
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

# The models of the post's tables, from their cards.
CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama-3.2-1B": LlamaConfig(
        num_hidden_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "gemma-3-1b": Gemma3TextConfig(
        num_hidden_layers=26,
        hidden_size=1152,
        intermediate_size=6912,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
    ),
    "Qwen3-4B": Qwen3Config(
        num_hidden_layers=36,
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
# Questions of the standard test or validation sets, on which such tables are usually made.
QUESTIONS = {"boolq": 3270, "winogrande": 1267, "gsm8k": 1319}
CHANCE = {"winogrande": 0.5}  # of tasks whose published accuracies come near it


def half_width(task: str, percent: float) -> float | None:
    """Half of a 95 % Wilson interval, in percent, if the standard set was used; None: not known."""
    if (n := QUESTIONS.get(task)) is None:
        return None
    interval = binomtest(round(n * percent / 100), n).proportion_ci(method="wilson")
    return 50 * (interval.high - interval.low)


def is_chance(task: str, percent: float) -> bool:
    """Return whether such an accuracy cannot be told from chance (a binomial test at 5 %)."""
    if task not in CHANCE:
        return False
    n = QUESTIONS[task]
    return bool(binomtest(round(n * percent / 100), n, CHANCE[task]).pvalue > 0.05)


def published_cell(task: str, percent: float) -> str:
    """A published accuracy with its half-width, and a star where it may be chance."""
    mark = "*" if is_chance(task, percent) else ""
    half = half_width(task, percent)
    return f"{percent:.1f}{mark}" + ("" if half is None else f" ± {half:.1f}")
