"""What a benchmark case is made of: a size, a setting, the work of one provider, the providers, and what must be equal.

It is the vocabulary, and leaves out the work itself (cases.py: ceilings; cases_steps.py, cases_hub.py, cases_sparse.py: steps; cases_kernels.py, cases_encoder.py,
cases_adamw.py, cases_attention.py, cases_native.py: one op each) and what becomes of it (lineup.py, equality.py, measure.py).
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from peftdebias import lowered
from peftdebias.encoder import EncoderConfig

RANK = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """A base model. repeats: how often a provider is timed by default; batches: how many go into one pass of a step."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocab: int = 30522
    positions: int = 512
    repeats: int = 7
    batches: int = 8

    def encoder_config(self, dropout: float) -> EncoderConfig:
        return EncoderConfig(kind="bert", layers=self.layers, hidden=self.hidden, heads=self.heads, feed_forward=self.feed_forward, vocab=self.vocab,
                             max_positions=self.positions, dropout=dropout, attention_dropout=dropout, classifier_dropout=dropout)


SIZES = {
    "micro": Size(2, 28, 2, 60, vocab=97, positions=128, repeats=2, batches=2),  # for the tests
    "tiny": Size(2, 128, 2, 512, repeats=15),
    "small": Size(4, 256, 4, 1024, repeats=7),
    "base": Size(12, 768, 12, 3072, repeats=3, batches=4),
    "minilm": Size(6, 384, 12, 1536, repeats=5),  # the shape of MiniLM-L6-H384 (Wang et al. 2020, arXiv 2002.10957)
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a builder may depend on. x: the value on the case's x axis. folder: a scratch folder that the providers of one size share.

    precision: float32, bf16 (autocast), or float64 (the truth that bf16 is held against). stand_in: where a kernel cannot run, its plain twin takes its place
    (dry runs only). sequences, longest: texts a batch, tokens a text at most. batches: None takes the size's number.
    """

    size_name: str
    x: float
    folder: Path
    device: torch.device = torch.device("cpu")
    precision: str = "float32"
    sequences: int = 16
    longest: int = 128
    dropout: float = 0.1
    batches: int | None = None
    seed: int = 0
    stand_in: bool = False

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    @property
    def number(self) -> int:
        """Batches in one pass of a step."""
        return self.batches or self.size.batches

    @property
    def config(self) -> EncoderConfig:
        return self.size.encoder_config(self.dropout)


@dataclasses.dataclass
class Work:
    """One provider, ready to run. run: one pass, `steps` steps or calls. results: the tensors that must equal those of the other providers, by name,
    computed without dropout and without changing anything; they are detached.

    tokens: valid tokens, flops, bytes (read and written): of one pass; 0 where they say nothing. extra: goes into the rows' extra_config.
    roof: (flops, bytes) of each stretch of work that cannot overlap another, at the least: its time is no less than the sum of the larger of the two at the
    measured ceilings. limit: what else bounds it, in words, from how it is built. held: what must live as long as the work. save: writes into a folder what is kept of a
    trained module. capture: of a pass, what a CUDA graph can hold, where that is not all of `run`. state: bytes of optimizer state that the builder made already, where
    others make theirs in the first step. most: a step that no pass holds and that takes more memory than all of them, as training meets it now and then.
    """

    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    steps: int = 1
    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    roof: tuple[tuple[float, float], ...] = ()
    limit: str = ""
    extra: dict = dataclasses.field(default_factory=dict)
    held: object = None
    save: Callable[[Path], object] | None = None
    capture: Callable[[], object] | None = None
    state: int = 0
    most: Callable[[], object] | None = None


@dataclasses.dataclass(frozen=True)
class Provider:
    """needs: libraries it imports, kernels: Triton ops it calls, native: ops of csrc; without them it is not measured. compiled: only with --compile. bf16: only with --bf16, on a CPU.
    compared: whether it computes what the others do (a library's dropout draws another mask). python: the interpreter of its process, where that is not this one (compare.py). precisions: where it is
    measured and compared; nothing is any. only_on: the one kind of device where it takes part. refuses: device -> why it cannot be measured there, or nothing."""

    build: Callable[[Setting], Work]
    needs: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    compiled: bool = False
    bf16: bool = False
    compared: bool = True
    python: str | None = None
    precisions: tuple[str, ...] = ()
    only_on: str = ""
    refuses: Callable[[str], str] = lambda device: ""

    def takes(self, precision: str) -> bool:
        return precision in (self.precisions or (precision,))


@dataclasses.dataclass(frozen=True)
class Case:
    """providers: by name; the first is the baseline of the ratios, the first that is compared that of the equality check.

    bound: (name, expected) -> the largest allowed max|difference| of that tensor in float32. sized: whether the work depends on the base model.
    rounded: whether bf16 is checked as well, against float64 (equality.check_rounded).
    """

    name: str
    mode: str
    what: str
    providers: dict[str, Provider]
    x_name: str
    x_values: tuple[float, ...]
    bound: Callable[[str, Tensor], float]
    sized: bool = True
    rounded: bool = False

    @property
    def baseline(self) -> str:
        return next(iter(self.providers))


def output_bound(name: str, expected: Tensor) -> float:
    """float32: 2e-6 * max(1, max|x|). Most gradients are far below 1, where that would pass anything: tensors called "gradient" must also keep to
    5e-5 of their own largest value."""
    largest = float(expected.abs().max())
    bound = 2e-6 * max(1.0, largest)
    return min(bound, 5e-5 * largest) if "gradient" in name else bound


def autocast(setting: Setting):
    return lowered.autocast(setting.device, setting.precision)


def quiet() -> None:
    """transformers writes progress, load reports and its own deprecations to the terminal; a table is enough."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
