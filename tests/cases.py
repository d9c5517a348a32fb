"""Tiny models, losses and datasets."""

import itertools
import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from devinterp.engine.batch import Batch
from devinterp.engine.batches import Batches
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.forward import Forward
from devinterp.engine.observables import check_observables
from devinterp.engine.rows import check_rows
from devinterp.engine.selection import Selection, check_masks
from devinterp.engine.settings import Settings
from devinterp.engine.trials import find_objective
from devinterp.engine.walker import Plan, Walker

GOOD = {"lr": 1e-3, "n_beta": 10.0, "localization": 1.0, "num_chains": 2, "num_draws": 2, "batch_size": 4,
        "num_init_loss_batches": 1, "progress": False}  # fmt: skip
"""Settings of a run of milliseconds"""
NAN, INF = math.nan, math.inf


class TinyLM(nn.Module):
    """Embedding, a tanh layer, output: returns bare logits."""

    def __init__(self, vocabulary: int = 11, hidden: int = 8, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, hidden)
            self.mix = nn.Linear(hidden, hidden)
            self.out = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(ids))))


class Weights(nn.Module):
    """Only a vector w; the loss function does the rest."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.w = nn.Parameter(start.clone())


class DeepLinear(nn.Module):
    """Product of matrices at its deepest point: every layer is a padded identity of the given rank.

    Inputs are the rows sqrt(d) e_i, whose second moment is the identity: the full batch has the population loss.
    """

    def __init__(self, widths: tuple[int, ...], rank: int):
        super().__init__()
        layers = [torch.zeros(out, into) for into, out in itertools.pairwise(widths)]
        for layer in layers:
            layer[:rank, :rank] = torch.eye(rank)
        self.layers = nn.ParameterList([nn.Parameter(layer) for layer in layers])
        self.register_buffer("inputs", widths[0] ** 0.5 * torch.eye(widths[0]))
        self.register_buffer("targets", self._product(self.inputs).detach().clone())

    def _product(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x @ layer.T
        return x

    def forward(self, rows: Tensor) -> Tensor:
        return 0.5 * (self._product(self.inputs[rows]) - self.targets[rows]).square().sum(-1, keepdim=True)


def by_row(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss function of models that take row numbers, given as length-2 `input_ids`."""
    return model(ids[:, 0])


def quadratic(h: float, centre: float = 0.0) -> Any:
    """Loss sum h/2 (w - centre)^2, the same for every sequence."""

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        energy = 0.5 * h * (model.w.float() - centre).square().sum()
        return energy.expand(ids.shape[0], ids.shape[1] - 1)

    return loss_fn


def curved(h: Tensor) -> Any:
    """Loss sum h_i/2 w_i^2, the same for every sequence."""

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        return (0.5 * h * model.w.square()).sum().expand(ids.shape[0], ids.shape[1] - 1)

    return loss_fn


def linear(slope: float) -> Any:
    """Loss slope * sum w, the same for every sequence."""

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        return (slope * model.w.float().sum()).expand(ids.shape[0], ids.shape[1] - 1)

    return loss_fn


def rows(count: int) -> Dataset:
    """Row numbers as length-2 sequences, for losses by row."""
    return Dataset.from_dict({"input_ids": [[i, 0] for i in range(count)]})


def random_tokens(count: int = 64, length: int = 6, vocabulary: int = 11, seed: int = 0) -> Dataset:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (count, length))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def batch_of(ids: Any) -> Batch:
    """Token sequences as they go through a model."""
    ids = torch.as_tensor(ids)
    return Batch({"input_ids": ids}, derived={"targets": ids[:, 1:]})


def plan_of(
    model: nn.Module, dataset: Dataset, loss_fn: Any = None, masks: Any = None, observables: Any = None, **settings: Any
) -> Plan:
    """A plan as `sample` makes it, without a store."""
    chosen = Settings(**({"lr": 1e-3, "n_beta": 1.5, "batch_size": 1} | settings))
    own = loss_fn is not None
    data = check_rows("dataset", dataset, chosen.batch_size, has_loss_fn=own)
    seen = check_observables(observables or {}, data, chosen.batch_size, chosen.batches_per_draw, chosen.obs_seed, own)
    checkpoint = Checkpoint(model, loss_fn, torch.device("cpu"), chosen.train_mode)
    objective = find_objective(checkpoint, data, chosen.batch_size, seen)
    selection = Selection.of(checkpoint.parameters, check_masks(model, masks))
    sampler = chosen.sampler(1.0 if chosen.lr == "auto" else float(chosen.lr))
    batches = Batches.of(data, objective, chosen)
    return Plan(chosen, sampler, Forward(checkpoint), selection, batches, tuple(map(objective.observed, seen)))


def autoregressive(rng: np.random.Generator, rho: float, *shape: int) -> np.ndarray:
    """Stationary Gaussian series of variance 1 along the second axis, with autocorrelation rho^k."""
    x = rng.standard_normal(shape)
    for t in range(1, shape[1]):
        x[:, t] = rho * x[:, t - 1] + (1 - rho**2) ** 0.5 * x[:, t]
    return x


def walk(plan: Plan, steps: int, chain: int = 0) -> np.ndarray:
    """The weights of a chain after so many steps."""
    walker = Walker(plan, chain)
    for t in range(steps):
        walker.differentiate(t)
        walker.step()
    return walker.weights[0].numpy()
