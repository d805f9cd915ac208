"""A pair: the base model, the tuned model and their tokenizer, proven to be comparable."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from toolkit.documents.corpus import Corpus, Reading
from toolkit.errors import InputError, refused
from toolkit.models.loading import (
    dtype_name,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
    parse_dtype,
    plain_folder,
)
from toolkit.models.locations import (
    BRANCHES,
    causal_lm,
    of_blocks,
    resolve,
)
from toolkit.models.offload import Offload, offloaded, state_tensors
from toolkit.models.peft_adapter import WroteToBaseError, is_adapter, with_adapter
from toolkit.models.readable import Readers
from toolkit.models.runner import BlockRunner
from toolkit.models.verify import prove
from toolkit.models.vocabulary import LeftOut, share_vocabulary
from toolkit.runtime import html
from toolkit.runtime.check import Check
from toolkit.runtime.console import quiet_transformers


@dataclass
class ModelPair:
    """Two models of one shape with one tokenizer; make one with `load` or `from_models`.

    `unavailable` says why a location does not apply to this family; `checks` holds what was proved
    when the pair was made; `left_out` what one model has for tokens that the other lacks.
    """

    base: nn.Module
    tuned: nn.Module
    tokenizer: Any
    base_runner: BlockRunner = field(repr=False)
    tuned_runner: BlockRunner = field(repr=False)
    base_name: str = "base"
    tuned_name: str = "tuned"
    checks: list[Check] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list, repr=False)

    @classmethod
    def load(
        cls,
        base: str | Path,
        tuned: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device = "cpu",
        offload: bool = False,
    ) -> "ModelPair":
        """Load both halves: a hub id, a folder, a ``.gguf`` file or a packaged model's name.

        `tuned` may be a folder with a PEFT adapter of `base`; the weights are then held once. With
        `offload` a block's weights are read from disk when the block is reached. Raises InputError
        where the two cannot be compared, and says what differs first.
        """
        if isinstance(dtype, str):
            dtype = parse_dtype(dtype, "dtype")
        with quiet_transformers():
            read = _offloaded if offload else _in_memory
            if is_adapter(tuned):
                base_model, ours = read(base, dtype, device)
                try:
                    tuned_model, theirs = with_adapter(base_model, ours, base, Path(tuned))
                except WroteToBaseError:
                    base_model, ours = read(base, dtype, device)
                    tuned_model, theirs = with_adapter(base_model, ours, base, Path(tuned), False)
            else:
                compare_configs(load_config(base), load_config(tuned), own_vocabularies=True)
                base_model, ours = read(base, dtype, device)
                tuned_model, theirs = read(tuned, dtype, device)
            tokenizer = shared_tokenizer(base, tuned)
            left_out = share_vocabulary(base_model, tuned_model)
        pair = cls.from_models(
            base_model, tuned_model, tokenizer, str(base), str(tuned), (ours, theirs)
        )
        pair.left_out = left_out
        return pair

    @classmethod
    def from_models(
        cls,
        base: nn.Module,
        tuned: nn.Module,
        tokenizer: Any,
        base_name: str = "base",
        tuned_name: str = "tuned",
        offloads: tuple[Offload | None, Offload | None] = (None, None),
    ) -> "ModelPair":
        """A pair of models in memory. Both are put into evaluation mode.

        `offloads` bring the weights of models whose blocks have none.
        """
        compare_configs(base.config, tuned.config)
        ours, theirs = (dtype_name(next(model.parameters()).dtype) for model in (base, tuned))
        if ours != theirs:
            raise InputError(
                f"the base is in {ours} and the fine-tune in {theirs}: give one precision "
                "for both, such as --dtype float32"
            )
        _compare_shapes(base, tuned)
        base_runner, tuned_runner = _runner(base, offloads[0]), _runner(tuned, offloads[1])
        checks, refused = prove(base_runner, tuned_runner)
        return cls(
            base,
            tuned,
            tokenizer,
            base_runner,
            tuned_runner,
            base_name,
            tuned_name,
            checks,
            base_runner.sites.unavailable | refused,
        )

    @property
    def pad_id(self) -> int:
        """The token that pads: the tokenizer's, where the models have it."""
        return self._readers.pad_id

    @property
    def branches(self) -> tuple[str, ...]:
        """The locations where deltas are taken, of `BRANCHES` those that this family has."""
        return tuple(name for name in BRANCHES if name not in self.unavailable)

    @property
    def n_layers(self) -> int:
        return self.base_runner.sites.n_layers

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.base_runner.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.base.parameters()).dtype

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """The fingerprints of the base and the tuned model, taken once."""
        ours = state_tensors(self.base, self.base_runner.offload)
        return fingerprint(ours), fingerprint(state_tensors(self.tuned, self.tuned_runner.offload))

    def corpus(self, documents: "Iterable[Any] | Corpus", **reading: Unpack[Reading]) -> Corpus:
        """Tokenise `documents` for this pair; a corpus comes back as it is, on the pair's device.

        `reading` are the arguments of `Corpus.of`.
        """
        if isinstance(documents, Corpus):
            corpus = documents.on(self.device)
        else:
            corpus = Corpus.of(documents, self.tokenizer, self.device, **reading)
        return self._readers.checked(corpus)

    def require_prompts(
        self, prompts: Sequence[Sequence[int]], n_new: int, whose: str = "the data"
    ) -> None:
        """Raise InputError unless both models read `prompts` and `n_new` tokens after each.

        `whose` says in the message where the prompts come from.
        """
        self._readers.require_prompts(prompts, n_new, whose)

    @cached_property
    def _readers(self) -> Readers:
        """Both models, as what reads tokens."""
        return Readers((self.base_runner.model, self.tuned_runner.model), self.tokenizer)

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep the weights of block `layer` of both models in memory."""
        with self.base_runner.resident(layer), self.tuned_runner.resident(layer):
            yield

    @property
    def n_parameters(self) -> int:
        """How many parameters the base model has."""
        return sum(parameter.numel() for parameter in self.base.parameters())

    def _repr_html_(self) -> str:
        lacking = ", ".join(f"{name} ({reason})" for name, reason in self.unavailable.items())
        found = {
            "model": f"{type(self.base).__name__}, {self.n_layers} blocks of width {self.d_model}",
            "parameters": self.n_parameters,
            "precision": f"{dtype_name(self.dtype)} on {self.device}",
            "checks": ", ".join(f"{check.name}: {check.status}" for check in self.checks),
            "not applicable": lacking or None,
        }
        shown = {name: value for name, value in found.items() if value}
        return html.card(f"{self.base_name} → {self.tuned_name}", html.facts(shown))


def _runner(model: nn.Module, offload: Offload | None) -> BlockRunner:
    with refused(f"a {type(causal_lm(model)).__name__} cannot be run"):
        return BlockRunner(model.eval(), resolve(model), offload)


def _in_memory(source: str | Path, dtype: Any, device: Any) -> tuple[nn.Module, None]:
    return load_model(source, dtype, device), None


def _offloaded(source: str | Path, dtype: Any, device: Any) -> tuple[nn.Module, Offload]:
    return offloaded(model_folder(source), dtype, device)


def shared_tokenizer(base: str | Path, tuned: str | Path) -> Any:
    """The tuned model's tokenizer, which must agree with base's; base's where it has none."""
    ours = load_tokenizer(base)
    folder = Path(plain_folder(tuned))
    has_own = not folder.is_dir() or any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    if not has_own:
        return ours
    theirs = load_tokenizer(tuned)
    compare_tokenizers(ours, theirs)
    return theirs


def compare_tokenizers(base: Any, tuned: Any) -> None:
    """Raise InputError at the first token or id that means something else to the other tokenizer.

    Either may have tokens that the other has not.
    """
    ours, theirs = base.get_vocab(), tuned.get_vocab()
    for token in sorted(ours.keys() & theirs.keys(), key=ours.__getitem__):
        if ours[token] != theirs[token]:
            raise InputError(
                f"the tokenizers differ: {token!r} is token {ours[token]} of base and "
                f"{theirs[token]} of tuned; deltas need the same tokens on both sides"
            )
    named, renamed = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    for index in sorted(named.keys() & renamed.keys()):
        if named[index] != renamed[index]:
            raise InputError(
                f"the tokenizers differ at token {index}: base has {named[index]!r}, tuned has "
                f"{renamed[index]!r}; deltas need the same tokens on both sides"
            )


def compare_configs(base: Any, tuned: Any, own_vocabularies: bool = False) -> None:
    """Raise InputError at the first size in which two models differ."""
    names = ["model_type", "num_hidden_layers", "hidden_size", "intermediate_size"]
    names += ["num_attention_heads", "num_key_value_heads"]
    for name in names if own_vocabularies else [*names, "vocab_size"]:
        ours, theirs = (of_blocks(config.get_text_config(), name) for config in (base, tuned))
        if ours != theirs:
            hint = (
                "; load them with ModelPair.load, which keeps the tokens that both have"
                if name == "vocab_size"
                else "; give two models of one architecture and size"
            )
            raise InputError(f"the models differ in {name}: base {ours}, tuned {theirs}{hint}")


def _compare_shapes(base: nn.Module, tuned: nn.Module) -> None:
    if base is not causal_lm(tuned) and hasattr(tuned, "get_base_model"):
        return  # a PEFT model: built from base
    ours = {name: tuple(p.shape) for name, p in base.state_dict().items()}
    theirs = {name: tuple(p.shape) for name, p in tuned.state_dict().items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"the models differ at {name}: base {ours.get(name)}, tuned {theirs.get(name)}"
            )
