"""Which fast paths a run may take: each is compared with the plain forward pass on moved weights before it is used.

Losses and their gradient must agree to float tolerance, a replayed prefix bit by bit. What differs, or fails, is dropped; the
log says which paths run.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from devinterp.engine.batch import Batch, mean_loss
from devinterp.engine.checkpoint import Checkpoint
from devinterp.engine.forward import Forward
from devinterp.engine.observables import Observable
from devinterp.engine.prefix import find_prefix, record
from devinterp.engine.seeds import noise_generator
from devinterp.engine.selection import Selection
from devinterp.engine.vocabulary import find_head
from devinterp.engine.walker import Plan, Walker

logger = logging.getLogger("devinterp")

ROWS = 4
"""Sequences on which paths are compared"""
STIRRED = 0.02
"""Moved weights of a proof: each weight changed by about this share of the root mean square"""
SMALL_LOGITS = 2**20
"""Logits of a batch up to this many fit a cache: taking them in chunks gains nothing"""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-3
LOSS_TOLERANCE_HALF, GRADIENT_TOLERANCE_HALF = 2e-2, 1e-1

Found = TypeVar("Found")


def find_forward(
    checkpoint: Checkpoint, selection: Selection, batch: Batch, *, reuse_prefix: bool, compiled: bool, precision: str | None
) -> Forward:
    """The fastest way to the losses of this model on such batches that was proven equal to the plain one."""
    forward = Forward(checkpoint, precision=precision)
    if checkpoint.train_mode:  # dropout and running statistics: nothing is constant
        return forward
    proof = Proof(checkpoint, selection, batch)
    if compiled:
        whole = replace(forward, compiled=True)
        return whole if proof.accepts(whole, "compiled losses") else forward
    if proof.rows_are_independent():
        forward = replace(forward, rows_joined=True)
    if checkpoint.loss_fn is None and proof.logits_per_row * len(batch) > SMALL_LOGITS:
        head = attempt("losses without whole logits", lambda: find_head(checkpoint, proof.batch[:1]))
        if head is not None and proof.accepts(replace(forward, head=head), "losses without whole logits"):
            forward = replace(forward, head=head)
    if reuse_prefix:
        moving = [piece.name for piece in selection.pieces]
        prefix = attempt("reuse of frozen modules", lambda: find_prefix(checkpoint, moving, proof.batch))
        if prefix is not None and proof.accepts_prefix(replace(forward, prefix=prefix)):
            forward = replace(forward, prefix=prefix)
    return forward


def attempt(what: str, find: Callable[[], Found | None]) -> Found | None:
    """A search that may fail on a model unlike any that was thought of: then the plain path is taken."""
    try:
        found = find()
    except Exception as error:
        logger.info("%s: not used, since looking for it failed with %s: %s", what, type(error).__name__, error)
        return None
    if found is None:
        logger.debug("%s: none found for this model and these weights", what)
    return found


class Proof:
    """The plain forward pass at moved weights, and whether another agrees with it."""

    def __init__(self, checkpoint: Checkpoint, selection: Selection, batch: Batch):
        self.plain, self.selection = Forward(checkpoint), selection
        self.batch = checkpoint.placed(batch[:ROWS])
        half = all(p.element_size() < 4 for p in checkpoint.parameters.values() if p.is_floating_point())
        self.loss_tolerance = LOSS_TOLERANCE_HALF if half else LOSS_TOLERANCE
        self.gradient_tolerance = GRADIENT_TOLERANCE_HALF if half else GRADIENT_TOLERANCE
        self.weights = selection.initial()
        rng = noise_generator(selection.device, "proof")
        size = STIRRED * (self.weights.square().mean().sqrt().item() + 1e-3)
        for block in selection.blocks(2**20):
            part = self.weights[block.where]
            part += size * torch.randn(part.shape, generator=rng, dtype=part.dtype, device=part.device)

    @property
    def logits_per_row(self) -> int:
        logits = self.plain.checkpoint.logits(self.batch[:1])
        return int(logits.shape[-1] * self.batch.targets.shape[1])

    def accepts(self, forward: Forward, what: str) -> bool:
        """Whether losses and gradient of another path are the plain ones, to rounding."""
        try:
            worst, slope = self._difference(forward)
        except Exception as error:
            logger.info("%s: not used, since a trial failed with %s: %s", what, type(error).__name__, error)
            return False
        good = worst <= self.loss_tolerance and slope <= self.gradient_tolerance
        used = "used" if good else "not used"
        logger.info("%s: %s, difference from the plain ones %.1e, of the gradient %.1e", what, used, worst, slope)
        return good

    def _difference(self, forward: Forward) -> tuple[float, float]:
        plain, plain_shadows, size = self._differentiated(self.plain)
        losses, shadows, _ = self._differentiated(forward)
        worst = ((losses - plain).abs() / plain.abs().clamp(min=1)).max().item()
        slope = (shadows - plain_shadows).abs().max().item() / size if size else float(shadows.any())
        return (worst, slope) if worst == worst and slope == slope else (float("inf"), float("inf"))

    def _differentiated(self, forward: Forward) -> tuple[Tensor, Tensor, float]:
        """Losses; the gradient as a random projection of each piece (one vector at a time in memory); and its norm."""
        leaves = self.selection.leaves(self.weights)
        losses = forward.losses(self.selection.place(leaves), self.batch, forward.checkpoint.buffers())
        gradients = torch.autograd.grad(mean_loss(losses, self.batch.counted), leaves, allow_unused=True)
        shadows, squares = [], 0.0
        rng = noise_generator(self.selection.device, "projection")
        for leaf, gradient in zip(leaves, gradients, strict=True):
            flat = torch.zeros_like(leaf).reshape(-1) if gradient is None else gradient.reshape(-1)
            signs = torch.randint(0, 2, flat.shape, generator=rng, device=flat.device, dtype=torch.int8)
            shadows.append((flat * (2 * signs - 1)).sum(dtype=torch.float64))
            squares += flat.square().sum(dtype=torch.float64).item()
        return losses.detach(), torch.stack(shadows), squares**0.5

    @torch.no_grad()
    def accepts_prefix(self, forward: Forward) -> bool:
        """Whether a replay, twice, equals the pass without one bit by bit."""
        what, prefix, checkpoint = "reuse of frozen modules", forward.prefix, forward.checkpoint
        if prefix is None:
            return False
        try:
            moved = self.selection.place(self.selection.leaves(self.weights))
            whole = replace(forward, prefix=None).losses(moved, self.batch, checkpoint.buffers())
            recorded = record(checkpoint, prefix.modules, prefix.needed, {prefix.closed_by}, self.batch)
            again = [forward.losses(moved, self.batch, checkpoint.buffers(), recorded=recorded) for _ in range(2)]
        except Exception as error:
            logger.info("%s: not used, since a trial failed with %s: %s", what, type(error).__name__, error)
            return False
        good = all(torch.equal(losses, whole) for losses in again)
        said = "used, equal bit by bit" if good else "not used, losses differ"
        logger.info("%s: %s (%d modules)", what, said, len(prefix.modules))
        return good

    @torch.no_grad()
    def rows_are_independent(self) -> bool:
        """Whether rows have the same losses alone as together."""
        if len(self.batch) < 2:
            return False
        buffers = self.plain.checkpoint.buffers()
        together, *apart = (self.plain.losses({}, batch, buffers) for batch in (self.batch, self.batch[:1], self.batch[1:]))
        return _agree(together, torch.cat(apart), self.loss_tolerance)


def steps_together(plan: Plan) -> bool:
    """Whether two chains in one vmap do what each does alone: a step, and the losses after it."""
    what = "chains in one vmap"
    try:
        together, alone = Walker(plan, 0, 1), [Walker(plan, chain) for chain in (0, 1)]
        for walker in (together, *alone):
            walker.differentiate(0)
            walker.step()
        losses, observed = together.differentiate(1), together.observe()
        apart, seen = torch.cat([w.differentiate(1) for w in alone]), [w.observe() for w in alone]
    except Exception as error:
        logger.info("%s: not used, since a trial failed with %s: %s", what, type(error).__name__, error)
        return False
    pairs = [(losses, apart), *((observed[name], torch.cat([one[name] for one in seen])) for name in observed)]
    size = together.gradient.norm().item()
    slope = (together.gradient - torch.cat([w.gradient for w in alone])).norm().item() / (size or 1.0)
    good = all(_agree(a, b, LOSS_TOLERANCE) for a, b in pairs) and slope <= GRADIENT_TOLERANCE
    logger.info("%s: %s, difference of the gradient %.1e", what, "used" if good else "not used, losses differ", slope)
    return good


def _agree(losses: Tensor, plain: Tensor, tolerance: float) -> bool:
    return bool(((losses - plain).abs() <= tolerance * plain.abs().clamp(min=1)).all())


@torch.no_grad()
def precision_error(forward: Forward, observables: tuple[Observable, ...], rows: int) -> dict[str, dict[str, float]]:
    """What the reduced precision of observables' forward passes does to their losses at the checkpoint, in nats."""
    found, full = {}, replace(forward, precision=None)
    for observable in observables:
        batch = forward.checkpoint.placed(observable.batch[:rows])
        exact = full.losses({}, batch, forward.checkpoint.buffers())
        with forward.observing():
            rounded = forward.losses({}, batch, forward.checkpoint.buffers())
        error = (rounded - exact).double()
        error = error if batch.counted is None else error[batch.counted]
        found[observable.name] = {
            "largest": error.abs().max().item(),
            "root_mean_square": error.square().mean().sqrt().item(),
            "mean": error.mean().item(),
        }
    return found
