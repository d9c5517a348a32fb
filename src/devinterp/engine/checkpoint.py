"""The model as found, and its per-token loss at any weights.

The caller's module is never written to: other weights are swapped in for the length of one forward pass by
`torch.func.functional_call`, and its training flags are put back when the run ends.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.func import functional_call

from devinterp.engine.seeds import stream_seed
from devinterp.errors import DevinterpInputError, InputTypeError, InputValueError, got

LossFn = Callable[[nn.Module, Tensor], Tensor]


def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every token given those before it, in float32 nats: shape (batch, token_pos)."""
    logits = logits_of(model, ids)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="none").view(ids.shape[0], -1)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a Hugging Face, TransformerLens or custom model: shape (batch, token, vocabulary)."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    output = model(ids, use_cache=False) if takes_cache else model(ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        fix = "Wrap the model, or pass loss_fn=(model, input_ids) -> per-token loss (batch, seq-1)."
        raise InputTypeError(
            got("model", f"output {shown}", "logits (batch, token, vocabulary) or an object with .logits", fix)
        )
    return logits


class _LossModule(nn.Module):
    """Lets `functional_call` swap weights under a loss function that takes the model as an argument."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, ids: Tensor) -> Tensor:
        return self.loss_fn(self.model, ids)


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
        self._module = _LossModule(self.model, loss_fn or next_token_losses)

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

    def losses(self, moved: Mapping[str, Tensor], ids: Tensor, buffers: Mapping[str, Tensor], seed: int | str = 0) -> Tensor:
        """Per-token losses, float32, shape (batch, token_pos), with the parameters in `moved` in place of the model's own.

        `seed` is for the dropout of `train_mode`; the global generators are put back.
        """
        state = {**self._frozen, **{f"model.{name}": tensor for name, tensor in moved.items()}, **buffers}
        return self._call(self._module, state, ids, seed).float()

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits at the checkpoint itself, shape (batch, token, vocabulary)."""
        return self._call(_LossModule(self.model, logits_of), {**self._frozen, **self.buffers()}, ids, 0)

    def _call(self, module: nn.Module, state: Mapping[str, Tensor], ids: Tensor, seed: int | str) -> Tensor:
        every_gpu = range(torch.cuda.device_count())  # manual_seed reaches all of them
        with torch.random.fork_rng(every_gpu) if self.train_mode else nullcontext():
            if self.train_mode:
                torch.manual_seed(stream_seed("dropout", seed) % 2**63)
            result: Tensor = functional_call(module, dict(state), (ids,))
        return result

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

    def ids(self, rows: Any) -> Tensor:
        return torch.as_tensor(rows, device=self.device)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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
    if len(devices) > 1:
        listed = sorted(map(str, devices))
        raise InputValueError(got("model", f"on devices {listed}", "on one device", "Load it without device_map."))
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


def check_loss(checkpoint: Checkpoint, ids: Tensor, largest_id: int) -> None:
    """One batch through the model before the run: shape, dtype, gradient, determinism, and a model left alone."""
    argument = "model" if checkpoint.loss_fn is None else "loss_fn"
    if checkpoint.loss_fn is None:
        _check_vocabulary(checkpoint, ids, largest_id)
    before = checkpoint.digest() if checkpoint.loss_fn else ""
    with _explained(argument, "Run it once by hand on the first rows of the dataset."):
        leaves = {name: p.requires_grad_() for name, p in checkpoint.detached().items() if p.is_floating_point()}
        probe = checkpoint.losses(leaves, ids, checkpoint.buffers(), seed=0)
        differentiable = probe.requires_grad
        probe = probe.detach()
        again = checkpoint.losses(leaves, ids, checkpoint.buffers(), seed=0).detach()
    wanted = (ids.shape[0], ids.shape[1] - 1)
    if tuple(probe.shape) != wanted:
        fix = "Return one loss per predicted token (reduction='none')."
        raise InputValueError(got(argument, f"losses of shape {tuple(probe.shape)}", f"of shape {wanted}", fix))
    if not differentiable:
        fix = "Remove detach() or torch.no_grad() from it, and return floating-point losses."
        raise InputValueError(got(argument, "losses without a gradient", "differentiable in the weights", fix))
    if not torch.isfinite(probe).all():
        fix = "Look at the loss of the first sequences of the dataset at this checkpoint."
        raise InputValueError(got(argument, "NaN or infinite losses at the checkpoint", "finite", fix))
    if checkpoint.loss_fn and checkpoint.digest() != before:
        raise InputValueError(got("loss_fn", "changes the weights of the model", "free of side effects", "Use a copy."))
    if not torch.equal(probe, again):
        warnings.warn(
            f"{argument}: two calls on the same batch and weights differ, so this run cannot be repeated bit by bit.",
            UserWarning,
            stacklevel=2,
        )


def _check_vocabulary(checkpoint: Checkpoint, ids: Tensor, largest_id: int) -> None:
    """Ids beyond the vocabulary must not reach a GPU (the assert kills the process), so this forward takes zeros."""
    fix = f"Is it made for sequences of {ids.shape[1]} tokens? Try a smaller max_length, or a loss_fn."
    with _explained("model", fix):
        vocabulary = checkpoint.logits(torch.zeros_like(ids[:1])).shape[-1]
    if largest_id >= vocabulary:
        fix = "The dataset was made with another tokenizer than the model's."
        allowed = f"made of token ids below the model's vocabulary of {vocabulary}"
        raise InputValueError(got("dataset", f"token id {largest_id}", allowed, fix))


@contextmanager
def _explained(argument: str, fix: str) -> Iterator[None]:
    """Whatever the caller's own code raises, said as an error of this argument."""
    try:
        yield
    except DevinterpInputError:
        raise
    except Exception as error:
        raise InputValueError(
            f"{argument}: failed on a batch of the dataset with {type(error).__name__}: {error}. {fix}"
        ) from error
