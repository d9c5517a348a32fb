"""What travels to worker processes: a small message, and beside it a file of tensors that they map into memory.

A message is carried by whoever runs the workers (loky, Dask, `concurrent.futures`); nothing here is pickled to a file. The
model goes as it is, with placeholders for its weights; whatever else holds the model, its modules or large arrays goes with
marks in their place, and is put together again around the model that was rebuilt there.
"""

import copy
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from devinterp.engine.checkpoint import Checkpoint, LossFn, check_device
from devinterp.engine.observables import Observable
from devinterp.engine.rows import Rows
from devinterp.engine.selection import Selection
from devinterp.errors import DevinterpError, StorageError

ALIGNMENT = 64
"""Bytes; that of torch's own memory: operators on tensors that lie otherwise can differ in their last digits"""
SMALL = 4096
"""Bytes of an array that stays in the message"""


class Origin(Protocol):
    """Where a checkpoint is loaded from, by any process (`origin.py`)."""

    def load(self) -> nn.Module: ...


@dataclass(frozen=True)
class TensorAt:
    """Mark of a tensor in the file."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    follows: bool
    """it lay on the checkpoint's device, and will again"""
    is_array: bool = False


@dataclass(frozen=True)
class ModuleAt:
    """Mark of a module of the model."""

    name: str


@dataclass(frozen=True)
class SelectionAt:
    """Mark of a selection: what it adds to the model's parameters."""

    indices: dict[str, Any]


@dataclass(frozen=True)
class DatasetAt:
    """Mark of a dataset that lay in memory."""

    folder: Path


@dataclass(frozen=True)
class CheckpointAt:
    """Mark of the checkpoint itself."""


@dataclass(frozen=True)
class Skeleton:
    """A model with placeholders for its parameters and buffers, and where these are."""

    model: nn.Module
    parameters: dict[str, tuple[TensorAt, bool]]
    """with `requires_grad`; of tied weights every name"""
    buffers: dict[str, TensorAt]

    def built(self, tensors: "Tensors") -> nn.Module:
        model = copy.deepcopy(self.model)  # between threads nothing is pickled, and each needs its own
        tied: dict[int, nn.Parameter] = {}
        for name, (at, requires_grad) in self.parameters.items():
            if at.start not in tied:
                tied[at.start] = nn.Parameter(tensors[at], requires_grad=requires_grad)
            _put(model, name, tied[at.start])
        for name, at in self.buffers.items():
            _put(model, name, tensors[at])
        return model


@dataclass(frozen=True)
class Message:
    """Anything that was made around a checkpoint, as it travels."""

    content: Any
    model: Skeleton | Origin
    loss_fn: LossFn | None
    train_mode: bool
    digest: str
    """of the checkpoint's weights and buffers"""
    device_type: str
    """noise of a CPU is not that of a GPU"""
    file: Path

    def opened(self, device: str | torch.device | None) -> tuple[Any, Checkpoint]:
        """The content, around the checkpoint on a device of this process (None = the best one).

        Raises:
            StorageError: the file cannot be seen from here.
            DevinterpError: the device, or the checkpoint loaded here, is another one.
        """
        there = check_device(nn.Module(), device)
        if there.type != self.device_type:
            raise DevinterpError(
                f"the worker on {platform.node()!r} would compute on {there}, the run is one of {self.device_type!r} devices. "
                "Workers of a run must have devices of one kind; or name it: device='cpu'."
            )
        tensors = Tensors(self.file)
        model = self.model.built(tensors) if isinstance(self.model, Skeleton) else self.model.load()
        checkpoint = Checkpoint(model.to(there), self.loss_fn, there, self.train_mode)
        if checkpoint.digest_as_found != self.digest:
            raise DevinterpError(
                "a worker has loaded other weights than those of the run. Did the checkpoint change on its way? Make the same "
                "call again."
            )
        return filled(self.content, checkpoint, tensors), checkpoint


@dataclass(frozen=True)
class Answer:
    """What a worker has made around the checkpoint, as it travels back."""

    content: Any
    file: Path

    def filled_around(self, checkpoint: Checkpoint) -> Any:
        return filled(self.content, checkpoint, Tensors(self.file))


class Tensors:
    """The tensors of a file, mapped into memory: they are read when they are looked at, and shared by all who look."""

    def __init__(self, file: Path):
        if not file.is_file():
            raise StorageError(
                f"the worker on {platform.node()!r} does not see {str(file)!r}, which the run is read from. Workers need the "
                "file system of output_path."
            )
        size = file.stat().st_size
        self._bytes = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)

    def __getitem__(self, at: TensorAt) -> Tensor:
        size = int(np.prod(at.shape, dtype=np.int64)) * at.dtype.itemsize
        return (
            self._bytes[at.start : at.start + size].view(at.dtype).view(at.shape)
            if size
            else torch.empty(at.shape, dtype=at.dtype)
        )


class Sender:
    """Writes the file while messages are made around one checkpoint."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, origin: Origin | None = None, device_type: str | None = None):
        self.folder, self.checkpoint, self.origin = folder, checkpoint, origin
        self.device_type = device_type or checkpoint.device.type
        self.file = folder / "tensors"
        self._names = {module: name for name, module in checkpoint.model.named_modules()}
        self._known: dict[int, tuple[TensorAt, Any]] = {}
        """with the tensor itself, so that no other takes its place in memory"""
        self._datasets: dict[int, tuple[DatasetAt, Any]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._out: BinaryIO = open(self.file, "wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()

    def message(self, content: Any) -> Message:
        checkpoint = self.checkpoint
        return Message(
            self.stripped(content),
            self._model,
            checkpoint.loss_fn,
            checkpoint.train_mode,
            checkpoint.digest_as_found,
            self.device_type,
            self.file,
        )

    def answer(self, content: Any) -> Answer:
        return Answer(self.stripped(content), self.file)

    @property
    def _model(self) -> Skeleton | Origin:
        return self.origin or self._skeleton

    @cached_property
    def _skeleton(self) -> Skeleton:
        return self._skeleton_of(self.checkpoint.model)

    def _skeleton_of(self, model: nn.Module) -> Skeleton:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        # deepcopy takes what it finds in its memo for copies already made
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in parameters.values()
        }
        memo |= {id(b): torch.empty_like(b, device="meta") for b in buffers.values()}
        return Skeleton(
            copy.deepcopy(model, memo),
            {name: (self._tensor(p.detach(), p), p.requires_grad) for name, p in parameters.items()},
            {name: self._tensor(b.detach(), b) for name, b in buffers.items()},
        )

    def stripped(self, thing: Any, is_data: bool = False) -> Any:
        """With marks in place of everything that is the model's or large."""
        if isinstance(thing, Checkpoint):
            return CheckpointAt()
        if isinstance(thing, nn.Module):
            return ModuleAt(self._names[thing])
        if isinstance(thing, Selection):
            return SelectionAt({piece.name: self.stripped(piece.index) for piece in thing.pieces})
        if isinstance(thing, Tensor):
            return self._tensor(thing, thing, follows=not is_data)
        if isinstance(thing, np.ndarray) and thing.nbytes > SMALL and thing.dtype.kind in "iufb":
            return self._tensor(torch.from_numpy(np.ascontiguousarray(thing)), thing, is_array=True)
        if type(thing).__module__.partition(".")[0] == "datasets" and hasattr(thing, "save_to_disk"):
            return self._dataset(thing)
        # data stays where it is until a batch of it is placed
        is_data = is_data or isinstance(thing, Rows | Observable)
        return _walked(thing, lambda part: self.stripped(part, is_data))

    def _tensor(self, tensor: Tensor, owner: Any, is_array: bool = False, follows: bool = True) -> TensorAt:
        if id(owner) not in self._known:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            follows = follows and tensor.device == self.checkpoint.device
            start = self._write(content.data)
            self._known[id(owner)] = TensorAt(start, tensor.dtype, tuple(tensor.shape), follows, is_array), owner
        return self._known[id(owner)][0]

    def _write(self, content: memoryview) -> int:
        try:
            self._out.write(bytes(-self._out.tell() % ALIGNMENT))
            start = self._out.tell()
            self._out.write(content)
        except OSError as error:
            raise StorageError(
                error.errno,
                "no room for the weights that worker processes are to read. Free some, point TMPDIR or output_path to a larger "
                "disk, or take chains_together='sequential'",
                str(self.file),
            ) from error
        return start

    def _dataset(self, dataset: Any) -> Any:
        """One that lies in files travels by their names."""
        if dataset.cache_files or dataset.data.nbytes <= SMALL:
            return dataset
        if id(dataset) not in self._datasets:
            folder = self.folder / f"dataset-{len(self._datasets)}"
            with _without_bars():
                dataset.save_to_disk(folder)
            self._datasets[id(dataset)] = DatasetAt(folder), dataset
        return self._datasets[id(dataset)][0]


def filled(thing: Any, checkpoint: Checkpoint, tensors: Tensors) -> Any:
    """The reverse of `Sender.stripped`, around another process's checkpoint."""
    if isinstance(thing, CheckpointAt):
        return checkpoint
    if isinstance(thing, ModuleAt):
        return checkpoint.model.get_submodule(thing.name)
    if isinstance(thing, SelectionAt):
        indices = {name: filled(index, checkpoint, tensors) for name, index in thing.indices.items()}
        return Selection.of_indices(checkpoint.parameters, indices)
    if isinstance(thing, TensorAt):
        tensor = tensors[thing]
        return tensor.numpy() if thing.is_array else tensor.to(checkpoint.device) if thing.follows else tensor
    if isinstance(thing, DatasetAt):
        from datasets import load_from_disk

        return load_from_disk(thing.folder)
    return _walked(thing, lambda part: filled(part, checkpoint, tensors))


def _walked(thing: Any, change: Any) -> Any:
    """Plain containers and dataclasses with their parts changed; all else as it is."""
    if type(thing) in (tuple, list, frozenset):
        return type(thing)(change(part) for part in thing)
    if isinstance(thing, Mapping) and type(thing) is dict:
        return {key: change(part) for key, part in thing.items()}
    if is_dataclass(thing) and not isinstance(thing, type):
        made = object.__new__(type(thing))
        for item in fields(thing):  # without what was computed from them and kept
            object.__setattr__(made, item.name, change(getattr(thing, item.name)))
        return made
    return thing


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of datasets for the length of the block: there is one for the whole run."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)
