"""The model as found, and its per-token loss at any weights.

The caller's module is never written to: other weights are swapped in for the length of one forward pass by
`torch.func.functional_call`, and its training flags are put back when the run ends.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.func import functional_call

from devinterp.engine.batch import IDS, Batch, only_counted
from devinterp.engine.seeds import stream_seed
from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError, got

LossFn = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch as `Batch.given` has it"""


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the batch's targets, in float32 nats, 0 where there is none: shape (batch, token_pos).

    Of a causal model every token given those before it: its targets are one token further on than its logits.
    """
    logits = logits_of(model, batch)[:, : batch.targets.shape[1]]
    targets = batch.targets.to(logits.device)  # of a model on several devices that of its last layer
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return nn.functional.cross_entropy(flat, targets.reshape(-1), reduction="none").view(targets.shape)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a Hugging Face, TransformerLens or custom model: shape (batch, token, vocabulary)."""
    output = call(model, batch, {"labels"} if encodes(model) else set())
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        fix = "Wrap the model, or pass loss_fn=(model, input_ids) -> per-token loss (batch, seq-1)."
        raise InputTypeError(
            got("model", f"output {shown}", "logits (batch, token, vocabulary) or an object with .logits", fix)
        )
    tokens = batch.columns["labels" if encodes(model) else "input_ids"].shape[1]
    if logits.shape[1] != tokens:
        fix = "Wrap the model, or pass a loss_fn."
        raise InputValueError(got("model", f"logits of {logits.shape[1]} positions", f"one for each of {tokens} tokens", fix))
    return logits


def call(model: nn.Module, batch: Batch, besides: set[str]) -> Any:
    """The model's output on the columns that are its inputs, and on those named besides."""
    columns = {name: column for name, column in batch.columns.items() if name not in {"input_ids", "labels"} - besides}
    ids = batch.columns["input_ids"]
    columns |= {name: batch.derived[name] for name in ("position_ids",) if name in batch.derived}
    columns.pop("input_ids", None)
    if "use_cache" in inspect.signature(model.forward).parameters:
        columns["use_cache"] = False  # type: ignore[assignment]
    return model(ids, **columns)


def encodes(model: nn.Module) -> bool:
    """Whether it is an encoder with a decoder, which takes the labels as inputs too."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class _LossModule(nn.Module):
    """Lets `functional_call` swap weights under a loss function that takes the model as an argument."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor]):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


@dataclass(frozen=True)
class _OfCaller:
    """A loss function of the caller's, on batches. Its losses may be one for each row: then these have one position."""

    loss_fn: LossFn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = self.loss_fn(model, batch.given)
        if batch.form != IDS and losses.dim() == 1:
            losses = losses[:, None]
        return only_counted(losses, batch.counted)


class Checkpoint:
    """A model as found: its parameters and buffers on the device, and its loss at these or other weights."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, device: torch.device, train_mode: bool = False):
        # another device gets its own copy: some models (TransformerLens) keep the device in their configuration
        self.model = model if _device_of(model) == device else copy.deepcopy(model).to(device)
        self.device, self.train_mode, self.loss_fn = device, train_mode, loss_fn
        with torch.inference_mode(False):  # tensors made inside it could not be differentiated by
            self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
            self._buffers = {f"model.{name}": b.detach().clone() for name, b in self.model.named_buffers()}
        self._frozen = {f"model.{name}": p for name, p in self.parameters.items()}
        self._module = _LossModule(self.model, _OfCaller(loss_fn) if loss_fn else token_losses)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Training flags as the run needs them; as they were, afterwards. Autograd on, whatever the caller has set."""
        flags = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.train(self.train_mode)
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for module, training in flags:
                module.training = training

    def buffers(self) -> dict[str, Tensor]:
        """The buffers for one chain: in train_mode a fresh copy, since forward passes write to them."""
        return {name: b.clone() for name, b in self._buffers.items()} if self.train_mode else self._buffers

    def losses(self, moved: Mapping[str, Tensor], batch: Batch, buffers: Mapping[str, Tensor], seed: int | str = 0) -> Tensor:
        """Losses, float32, shape (batch, token_pos), with the parameters in `moved` in place of the model's own.

        Those that do not count are 0.

        `seed` is for the dropout of `train_mode`; the global generators are put back.
        """
        state = {**self._frozen, **{f"model.{name}": tensor for name, tensor in moved.items()}, **buffers}
        losses: Tensor = self._call(self._module, state, batch, seed).float()
        return losses

    @torch.no_grad()
    def raw_losses(self, batch: Batch) -> Any:
        """What the caller's loss function returns at the checkpoint, whatever it is."""
        loss_fn = self.loss_fn
        if loss_fn is None:
            raise ValueError("there is no loss function to be called")
        module = _LossModule(self.model, lambda model, given: loss_fn(model, given.given))
        return self._call(module, {**self._frozen, **self.buffers()}, batch, 0)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits at the checkpoint itself, shape (batch, token, vocabulary)."""
        logits: Tensor = self._call(_LossModule(self.model, logits_of), {**self._frozen, **self.buffers()}, batch, 0)
        return logits

    def _call(self, module: nn.Module, state: Mapping[str, Tensor], batch: Batch, seed: int | str) -> Any:
        every_gpu = range(torch.cuda.device_count())  # manual_seed reaches all of them
        with torch.random.fork_rng(every_gpu) if self.train_mode else nullcontext():
            if self.train_mode:
                torch.manual_seed(stream_seed("dropout", seed) % 2**63)
            result: Any = functional_call(module, dict(state), (batch,))
        return result.to(self.device) if isinstance(result, Tensor) else result

    def detached(self) -> dict[str, Tensor]:
        """The parameters as new tensors on the same memory: `requires_grad` set on them leaves the caller's alone."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @cached_property
    def digest_as_found(self) -> str:
        """`digest()` when first asked; a suite asks for it once per run."""
        return self.digest()

    def digest(self) -> str:
        """Fingerprint of all weights and buffers. Against accident, not attack."""
        total = xxhash.xxh3_128()
        for name, tensor in (*self.parameters.items(), *self._buffers.items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def placed(self, batch: Batch) -> Batch:
        """The batch on the model's device."""
        return batch.each(lambda tensor: tensor.to(self.device))


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def is_spread(model: nn.Module) -> bool:
    """Whether it lies on several devices, as `device_map` of transformers loads it. Its batches go to the first of them."""
    return len({p.device for p in model.parameters()}) > 1


def check_model(model: Any) -> None:
    """What can be seen without a forward pass: placement, dtypes, finite weights."""
    if not isinstance(model, nn.Module):
        fix = "Load it first, for example with AutoModelForCausalLM.from_pretrained."
        raise InputTypeError(got("model", type(model), "a torch.nn.Module", fix))
    devices = {p.device for p in model.parameters()}
    if not devices:
        raise InputValueError(got("model", type(model).__name__, "a module with parameters", "It has none to sample."))
    if torch.device("meta") in devices:
        raise InputValueError(got("model", "parameters on the meta device", "loaded weights", "Load the checkpoint."))
    if len({device.type for device in devices}) > 1:
        listed = sorted(map(str, devices))
        fix = "Load it without device_map, or on enough GPUs that none of it is offloaded."
        raise InputValueError(got("model", f"on devices {listed}", "on one device, or on several of one kind", fix))
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            fix = "Load it unquantised: no gradient passes through such a module."
            raise InputValueError(got("model", f"quantised module {name!r}", "made of floating-point modules", fix))
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise InputValueError(got("model", f"lazy parameter {name!r}", "initialised", "Run one forward pass first."))
        if p.is_floating_point() and p.element_size() > 1 and not torch.isfinite(p).all():
            fix = "This checkpoint is damaged; take another."
            raise InputValueError(got("model", f"{name!r} with NaN or infinite weights", "finite", fix))


def check_device(model: nn.Module, device: Any) -> torch.device:
    """The device asked for; otherwise the model's own, or a GPU where there is one."""
    own = _device_of(model)
    if is_spread(model):
        if device is not None:
            fix = "Leave it out: the model stays where it is, and its chains run one after another in this process."
            raise InputValueError(got("device", str(device), "None for a model on several devices", fix))
        return own
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if own.type == "cpu" and torch.cuda.is_available() else own
    count = torch.cuda.device_count()
    available = ["cpu"] + [f"cuda:{i}" for i in range(count)] + (["mps"] if torch.backends.mps.is_available() else [])
    message = got("device", device, f"one of {available}", "Try device=None, which chooses one.")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputValueError(message) from error
    if chosen.type == "cuda" and chosen.index is None and count:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if str(chosen) not in available and chosen != own:
        raise InputValueError(message)
    return chosen


@contextmanager
def explained(argument: str, fix: str) -> Iterator[None]:
    """Whatever the caller's own code raises, said as an error of this argument."""
    try:
        yield
    except DevinterpInputError:
        raise
    except Exception as error:
        raise InputValueError(
            f"{argument}: failed on a batch of the dataset with {type(error).__name__}: {error}. {fix}"
        ) from error
