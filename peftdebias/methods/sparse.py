"""Sparse fine-tuning by lottery ticket: only the k weights of the base that move most are trained. Ansell et al. 2022, arXiv 2110.07560.

    1  train every weight of the encoder but the LayerNorms, pulled towards the start:  loss + 0.1 * sum |theta - theta_0| / N
    2  keep the k weights with the largest |theta - theta_0|, exactly k
    3  rewind to theta_0
    4  train only those k, pulled alike; the module is the differences at these places

N counts the encoder's parameters. A base moves at rates at which k values hardly do: `first_rate` lowers the first stage's alone (the paper has one rate). While all weights train, a tied masked-LM decoder is a frozen copy; later the embedding's delta acts on the input side
only. In its second stage the optimizer holds k values, not the base. Additive: it merges and folds.

The room: this file, sites.py (sparse_add_ref), optimizer.py, kernels/fused/sparse.py and adamw.py, tests/test_sparse.py, tests/kernel_checks/check_sparse.py, bench/cases_sparse.py. Left out: training the
heads, dynamic choice of the weights.
"""

import dataclasses
import warnings
from collections.abc import Iterable

import numpy
import torch
from torch import Tensor
from torch.nn import Parameter

from ..encoder import Model, parameter_at
from ..errors import AdapterError, ConfigError
from ..files import wrong_numbers
from ..sites import TABLES, EncoderConfig, linear_sites, parameter_size
from . import Method, base_parameters, expect_tensors, finite

SHARE = 0.01
PIECE = 2 ** 17  # values that a CPU takes at once: between the passes over them they stay in its cache


def largest(moved: list[numpy.ndarray], k: int) -> list[numpy.ndarray]:
    """Flat indices (int64, ascending) into each array of the k largest values of all of them together; of equal ones at the edge the first count.

    moved: arrays of any length, values >= 0. Raises ConfigError where k is more than there are.
    """
    values = numpy.concatenate([m.ravel() for m in moved])
    if not 1 <= k <= len(values):
        raise ConfigError(f"sparse k: expected 1 to {len(values)}, the weights there are, got {k}")
    edge = numpy.partition(values, len(values) - k)[len(values) - k]
    above = numpy.flatnonzero(values > edge)
    chosen = numpy.sort(numpy.concatenate([above, numpy.flatnonzero(values == edge)[:k - len(above)]]))
    ends = numpy.cumsum([m.size for m in moved])
    return [part - start for part, start in zip(numpy.split(chosen, numpy.searchsorted(chosen, ends[:-1])), [0, *ends[:-1]])]


@torch.no_grad()
def pull(strength: float, parameters: Iterable[Parameter], start: Iterable[Tensor]) -> None:
    """Adds to every parameter's gradient that of strength * sum |p - start|, in place; it is 0 for a value that is where it started. The sum itself nobody asks for."""
    for p, origin in zip(parameters, start, strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        at_once = p.numel() if p.is_cuda else PIECE
        for gradient, values, there in zip(*(t.view(-1).split(max(1, at_once)) for t in (p.grad, p.detach(), origin))):
            gradient.add_((values - there).sign_(), alpha=strength)


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """k: how many weights are kept; None is 1 % of the base's parameters. l1: strength of the pull towards the start, in both stages. first_rate: learning rate
    of the first stage, as a share of the second's, in (0, 1]."""

    k: int | None = None
    l1: float = 0.1
    first_rate: float = 1.0

    def __post_init__(self):
        if self.k is not None and self.k < 1:
            raise ConfigError(f"sparse k: expected at least 1, got {self.k}")
        finite("sparse l1", self.l1, least=0)
        if not 0 < self.first_rate <= 1:
            raise ConfigError(f"sparse first_rate: expected more than 0, up to 1, got {self.first_rate}")


def _sites(encoder_config: EncoderConfig) -> tuple[str, ...]:
    linears = linear_sites(encoder_config)
    return (*TABLES, *linears, *(site + ".bias" for site in linears))


class Sparse(Method):
    """`layers.3.attention.query` [k_site] values at flat `indices` int64 [k_site], for every weight, bias and table that has some; none before it has learnt."""

    name = "sparse"
    Config = SparseConfig
    mergeable = True
    foldable = True
    size = "k"
    cap = "there are no more weights to choose from"

    def __init__(self, config: SparseConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        if config.k is None:
            self.config = dataclasses.replace(config, k=round(SHARE * base_parameters(encoder_config)))
        if self.config.k > (there := self.most(encoder_config)):
            raise ConfigError(f"sparse k: expected at most {there}, the weights there are, got {self.config.k}")
        self.indices: dict[str, Tensor] = {}

    @classmethod
    def parameters_for(cls, config: SparseConfig, encoder_config: EncoderConfig) -> int:
        return config.k

    @classmethod
    def capped(cls, config: SparseConfig, encoder_config: EncoderConfig, max_length: int) -> SparseConfig:
        """No more than there are."""
        return dataclasses.replace(config, k=min(config.k, cls.most(encoder_config)))

    @staticmethod
    def most(encoder_config: EncoderConfig) -> int:
        """How many weights there are to choose from."""
        return sum(parameter_size(encoder_config, site) for site in _sites(encoder_config))

    def count(self) -> int:
        """Parameters, known before it has learnt."""
        return self.config.k

    def file_bytes(self) -> int:
        return 8 * self.config.k  # an int32 index beside every float32 value

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return _sites(encoder_config)

    def delta(self, site: str) -> tuple[Tensor, Tensor] | None:
        if site not in self.values:
            return None
        if self.indices[site].device != self.values[site].device:
            self.indices[site] = self.indices[site].to(self.values[site].device)
        return self.indices[site], self.values[site]

    def learn(self, model: Model, loop) -> object:
        places = {site: parameter_at(model, site) for site in self.sites(model.config)}
        whole = {name: parameter for name, parameter, _ in places.values()}
        start = {name: p.detach().clone() for name, p in whole.items()}
        strength = self.config.l1 / base_parameters(model.config)
        try:
            with model.frozen_decoder():
                loop(whole, lambda: pull(strength, whole.values(), start.values()), rate=self.config.first_rate)
            with torch.no_grad():
                moved = [(parameter[rows] - start[name][rows]).abs().flatten().float().cpu().numpy() for name, parameter, rows in places.values()]
            found = list(largest(moved, self.config.k))
        finally:
            with torch.no_grad():
                for name, parameter in whole.items():
                    parameter.copy_(start[name])
        if still := sum(int((distance[chosen] == 0).sum()) for distance, chosen in zip(moved, found)):
            warnings.warn(f"sparse: {still} of the {self.config.k} weights that are kept did not move in the first stage, so nothing chose them; expected a higher lr or first_rate, "
                          "or a smaller k", stacklevel=2)
        for site, chosen in zip(places, found):
            if len(chosen):
                self.indices[site] = torch.from_numpy(chosen)
                self.values[site] = Parameter(torch.zeros(len(chosen), dtype=places[site][1].dtype, device=places[site][1].device))
        zeros = [torch.zeros_like(v) for v in self.values.values()]
        return loop(self.parameters(), lambda: pull(strength, self.values.values(), zeros))

    def keeps(self, name: str) -> bool:
        """The LayerNorms, as while it learnt (the paper's setting for both phases)."""
        return name.startswith("encoder.") and ".norm." in name

    def state(self) -> dict[str, Tensor]:
        saved = {f"{site}.values": v for site, v in super().state().items()}
        return saved | {f"{site}.indices": self.indices[site].cpu().to(torch.int32) for site in self.values}

    @torch.inference_mode(False)
    def load(self, state: dict[str, Tensor]) -> None:
        expect_tensors("sparse adapter", state)
        known = set(self.sites(self.encoder_config))
        found = {name.removesuffix(".values"): tensor for name, tensor in state.items() if name.endswith(".values")}
        for site, values in found.items():
            indices = state.get(f"{site}.indices")
            if site not in known or indices is None or indices.shape != values.shape or values.dim() != 1:
                raise AdapterError(f"sparse adapter, {site}: expected values and indices of one length for a weight of the base, got something else")
            if wrong := wrong_numbers(values, torch.float32):
                raise AdapterError(f"sparse adapter, {site}: {wrong}")
            if indices.dtype not in (torch.int32, torch.int64):
                raise AdapterError(f"sparse adapter, {site}: expected indices in int32 or int64, got {str(indices.dtype).removeprefix('torch.')}")
            size = parameter_size(self.encoder_config, site)
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
                raise AdapterError(f"sparse adapter, {site}: expected indices from 0 to {size - 1}, got {int(indices.min())} to {int(indices.max())}")
            if (indices[1:] <= indices[:-1]).any():
                raise AdapterError(f"sparse adapter, {site}: expected ascending indices, each once, got some that are not")
        if len(state) != 2 * len(found) or sum(map(len, found.values())) != self.config.k:
            raise AdapterError(f"sparse adapter: expected {self.config.k} values, got {sum(map(len, found.values()))} in {len(state)} tensors")
        self.indices = {site: state[f"{site}.indices"].long() for site in found}
        self.values = {site: Parameter(values.clone()) for site, values in found.items()}
