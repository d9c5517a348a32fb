"""The matrix of influences as blocks: both sides by sequence number, standardised a block at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from devinterp.analysis.influence_errors import errors_of_products, lagged
from devinterp.analysis.moments import Floats, products, spans, standardised
from devinterp.analysis.uncertainty import FEWEST_DRAWS
from devinterp.engine.settings import choice, integer, switch
from devinterp.errors import InputTypeError, InputValueError, StoreError, got
from devinterp.store.matrices import check_new_path
from devinterp.store.traces import Numbers, Traces

BLOCK_BYTES = 2**25
"""Bound on one block of the result; and on standardised traces, beyond which they are read again for each block"""


@dataclass(frozen=True)
class Options:
    """The options of `compute_bif`, checked before anything is read."""

    correlation_method: str = "token"
    reduce_chain_dimension_method: str = "stack"
    loss_keys: Any = "all"
    batch_index_range_1: Any = "all"
    batch_index_range_2: Any = "all"
    average_tokenwise_bif: bool = False
    compute_covariance: bool = False
    batch_size: int = 32
    device: Any = None
    center: str = "all"
    sign: str = "correlation"
    queries: Any = None
    top_k: int | None = None
    output_path: Any = None
    on_diverged: str = "raise"
    errors: bool = False

    def __post_init__(self) -> None:
        choice("token", "sequence")("correlation_method", self.correlation_method)
        choice("stack", "mean")("reduce_chain_dimension_method", self.reduce_chain_dimension_method)
        choice("all", "chain")("center", self.center)
        choice("correlation", "bif")("sign", self.sign)
        choice("raise", "drop")("on_diverged", self.on_diverged)
        switch("average_tokenwise_bif", self.average_tokenwise_bif)
        switch("compute_covariance", self.compute_covariance)
        switch("errors", self.errors)
        integer(1)("batch_size", self.batch_size)
        if self.top_k is not None:
            integer(1)("top_k", self.top_k)
        if self.average_tokenwise_bif and self.correlation_method == "sequence":
            fix = "A sequence has one trace; take correlation_method='token'."
            raise InputValueError(got("average_tokenwise_bif", True, "False with correlation_method='sequence'", fix))
        if self.queries is not None and (self.average_tokenwise_bif or not _is_all(self.batch_index_range_2)):
            fix = "For whole sequences take batch_index_range_2 without queries."
            allowed = "None with average_tokenwise_bif or batch_index_range_2"
            raise InputValueError(got("queries", self.queries, allowed, fix))
        if self.output_path is not None:
            if self.top_k is not None or self.queries is not None:
                fix = "Such a result is small: write it with to_zarr."
                raise InputValueError(got("output_path", str(self.output_path), "None with queries or top_k", fix))
            check_new_path(self.output_path)
        self.torch_device()

    @property
    def per_token(self) -> bool:
        """Whether the result has an entry for single tokens."""
        return self.correlation_method == "token" and not self.average_tokenwise_bif

    @property
    def layers(self) -> tuple[str, ...]:
        """The arrays of the result that have an entry for every pair."""
        return ("influences", "influences_sem") if self.errors else ("influences",)

    def torch_device(self) -> torch.device:
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            if (chosen := torch.empty(0, device=self.device).device).type == "meta":
                raise RuntimeError("nothing can be computed there")
            return chosen
        except (RuntimeError, TypeError, AssertionError) as error:
            raise InputValueError(got("device", self.device, "'cpu' or an available GPU", "Try device=None.")) from error


@dataclass(frozen=True)
class Series:
    """Standardised traces, shape (series, observations), and what their errors need of them."""

    z: Tensor
    lags: Tensor | None

    def __getitem__(self, chosen: slice | Tensor) -> "Series":
        return Series(self.z[chosen], None if self.lags is None else self.lags[chosen])


@dataclass
class Sides:
    """The two sides of the matrix of influences: sequences by number, and single traces of the second side for queries."""

    traces: Traces
    options: Options
    constant: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options, traces = self.options, self.traces
        self.groups = traces.groups if options.center == "chain" else 1
        if traces.observations - self.groups < 1:
            raise StoreError(
                f"the samples have {traces.observations} observations of each loss in {self.groups} group(s): a covariance "
                "needs more. Sample more draws."
            )
        if options.errors and traces.ds.sizes["draw"] < FEWEST_DRAWS:
            fix = f"Sample {FEWEST_DRAWS} or more draws."
            raise InputValueError(got("errors", True, f"False with {traces.ds.sizes['draw']} draws per chain", fix))
        self.rows = _sequence_numbers("batch_index_range_1", options.batch_index_range_1, traces.num_sequences)
        self.columns = _sequence_numbers("batch_index_range_2", options.batch_index_range_2, traces.num_sequences)
        if options.top_k is not None and options.queries is None:  # each pair once
            self.rows, self.columns = np.unique(self.rows), np.unique(self.columns)
        self.query_positions: Numbers | None = None
        if options.queries is not None:
            self.columns, self.query_positions = _check_queries(options.queries, traces)
        across = self.length**2 if self.query_positions is None else self.length
        self.block = max(1, min(options.batch_size, int((BLOCK_BYTES / (16 if options.errors else 4) / across) ** 0.5)))

    @property
    def length(self) -> int:
        """Rows of the matrix per sequence."""
        return 1 if self.options.average_tokenwise_bif else self.traces.length

    @property
    def num_constant(self) -> int:
        return sum(int(flags.sum()) for flags in self.constant.values())

    def blocks(self) -> Iterator[tuple[slice, slice, Floats]]:
        """Pieces of the matrix: which rows and columns (as sequences or queries), and all layers of their traces' products."""
        for rows in spans(len(self.rows), self.block):
            left = self._row(rows)
            for columns in spans(len(self.columns), self.block):
                layers = [layer.float().cpu().numpy() for layer in self._layers(left, self._column(columns))]
                yield rows, columns, np.stack(layers) if len(layers) > 1 else layers[0][None]

    def _layers(self, rows: Series, columns: Series) -> Iterator[Tensor]:
        """As `Options.layers` names them."""
        product = products(rows.z, columns.z, self.options.compute_covariance)
        yield -product if self.options.sign == "bif" else product
        if rows.lags is not None and columns.lags is not None:
            fixed_scale = self.options.compute_covariance or self.options.average_tokenwise_bif
            yield errors_of_products(rows.z, columns.z, rows.lags, columns.lags, product, not fixed_scale)

    @property
    def num_blocks(self) -> int:
        return -(-len(self.rows) // self.block) * -(-len(self.columns) // self.block)

    def _row(self, rows: slice) -> Series:
        same = self.query_positions is None and np.array_equal(self.rows, self.columns)
        return self._column(rows) if same and self._kept_columns is not None else self._load(self.rows[rows])

    def _column(self, columns: slice) -> Series:
        if self._kept_columns is not None:
            step = 1 if self.query_positions is not None else self.length
            return self._kept_columns[columns.start * step : columns.stop * step]
        return self._queried(self._load(self.columns[columns]), columns)

    @cached_property
    def _kept_columns(self) -> Series | None:
        size = len(self.options.layers) * self.traces.length * self.traces.observations * 4
        if len(self.columns) * size > BLOCK_BYTES:
            return None
        return self._queried(self._load(self.columns), slice(None))

    def _queried(self, loaded: Series, columns: slice) -> Series:
        """Of whole sequences, the traces that were asked for."""
        if self.query_positions is None:
            return loaded
        positions = self.query_positions[columns]
        return loaded[torch.as_tensor(np.arange(len(positions)) * self.traces.length + positions, device=loaded.z.device)]

    def _load(self, sequences: Numbers) -> Series:
        device = self.options.torch_device()
        read = torch.as_tensor(self.traces.read(sequences), device=device)
        left_out = self._left_out(sequences, device)
        if not (torch.isfinite(read).all(1) | left_out).all():
            raise StoreError("the samples hold losses of observables that are not finite. Look at them; drop those chains.")
        z, constant = standardised(read, self.options.compute_covariance, self.groups)
        flags = (constant & ~left_out).cpu().numpy().reshape(len(sequences), self.traces.length)
        self.constant.update(zip(sequences.tolist(), flags, strict=True))
        if self.options.average_tokenwise_bif:  # the mean of products over both tokens is the product of the means
            z[left_out] = 0
            count = (~left_out).view(len(sequences), -1, 1).sum(1)
            z = (z.view(len(sequences), self.traces.length, -1).sum(1, dtype=torch.float64) / count).to(z.dtype)
        return Series(z, lagged(z, self.traces.groups) if self.options.errors else None)

    def _left_out(self, sequences: Numbers, device: torch.device) -> Tensor:
        """Traces of losses that do not count: NaN throughout. A sequence as a whole always counts."""
        counted = self.traces.counted
        if counted is None or self.traces.sequence_level:
            return torch.zeros(len(sequences) * self.traces.length, dtype=torch.bool, device=device)
        return ~torch.as_tensor(counted[sequences], device=device).flatten()


def _is_all(value: Any) -> bool:
    return isinstance(value, str) and value == "all"


def _sequence_numbers(argument: str, given: Any, count: int) -> Numbers:
    if _is_all(given):
        return np.arange(count)
    allowed = f"'all' or a list of sequence numbers in [0, {count - 1}]"
    try:
        numbers = np.asarray(list(given))
    except TypeError as error:
        raise InputTypeError(got(argument, given, allowed, "Try range(10).")) from error
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise InputTypeError(got(argument, given, allowed, "Try range(10)."))
    if numbers.min() < 0 or numbers.max() >= count:
        raise InputValueError(got(argument, given, allowed, f"The observables have {count} sequences in all."))
    return numbers.astype(np.int64)


def _check_queries(given: Any, traces: Traces) -> tuple[Numbers, Numbers | None]:
    """Sequence numbers of the queries, and for tokens their positions from 0."""
    if traces.sequence_level:
        return _sequence_numbers("queries", given, traces.num_sequences), None
    first, last = traces.first_position, traces.first_position + traces.length - 1
    allowed = f"pairs (sequence in [0, {traces.num_sequences - 1}], target_position in [{first}, {last}])"
    try:
        pairs = np.asarray([tuple(pair) for pair in given])
    except (TypeError, ValueError) as error:
        raise InputTypeError(got("queries", given, allowed, "Try [(0, 1)].")) from error
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise InputTypeError(got("queries", given, allowed, "Try [(0, 1)]."))
    limits = (0, first), (traces.num_sequences - 1, last)
    if (pairs < limits[0]).any() or (pairs > limits[1]).any():
        raise InputValueError(got("queries", given, allowed, f"target_position counts from {first}."))
    sequences, positions = pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64) - first
    counted = traces.counted
    if counted is not None and not (there := counted[sequences, positions]).all():
        fix = "It is padding, or its label is -100."
        raise InputValueError(got("queries", tuple(pairs[~there][0].tolist()), "a position whose loss counts", fix))
    return sequences, positions
