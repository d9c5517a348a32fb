"""The loop that one writes by hand: SGLD with per-token losses of observables at every draw, one chain after another."""

import copy
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    logits = output.logits if hasattr(output, "logits") else output
    return cross_entropy(logits.transpose(1, 2)[..., :-1], ids[:, 1:], reduction="none")


def sample(
    model: nn.Module, data: Tensor, observables: Mapping[str, Tensor], path: str, *, masks: Mapping[str, Tensor] | None, seed: int,
    lr: float, n_beta: float, localization: float, num_init_loss_batches: int, batch_size: int, num_chains: int, num_draws: int,
) -> None:  # fmt: skip
    """Every chain sees the same batches, in an order that repeats."""
    device = next(model.parameters()).device
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    batches = data[order].split(batch_size)
    held = {name: rows.to(device).split(batch_size) for name, rows in observables.items()}
    with torch.no_grad():
        init = torch.stack([losses_of(model, ids.to(device)).mean() for ids in batches[:num_init_loss_batches]]).mean()
    stored: dict[str, list] = {"sampling": [], **{name: [] for name in held}}
    for chain in range(num_chains):
        torch.manual_seed(seed + chain)
        moved = copy.deepcopy(model)
        if hasattr(moved, "config"):
            moved.config.use_cache = False
        for name, parameter in moved.named_parameters():
            parameter.requires_grad_(masks is None or name in masks)
        moving = [
            (parameter, parameter.detach().clone(), None if masks is None else masks[name].to(device))
            for name, parameter in moved.named_parameters()
            if parameter.requires_grad
        ]
        for step in range(num_draws):
            losses = losses_of(moved, batches[step % len(batches)].to(device))
            losses.mean().backward()
            with torch.no_grad():
                for parameter, anchor, mask in moving:
                    drift = n_beta * parameter.grad + localization * (parameter - anchor)
                    move = -lr / 2 * drift + lr**0.5 * torch.randn_like(parameter)
                    parameter.add_(move if mask is None else move * mask)
                    parameter.grad = None
                stored["sampling"].append(losses.cpu().numpy())
                for name, rows in held.items():
                    stored[name].append(np.concatenate([losses_of(moved, ids).cpu().numpy() for ids in rows]))
    arrays = {name: np.stack(rows) for name, rows in stored.items()}
    assert all(np.isfinite(rows).all() for rows in arrays.values()), "a chain has diverged"
    np.savez(path, init=init.cpu(), **arrays)


def head_masks(model: nn.Module, restriction: str, num_heads: int) -> dict[str, Tensor]:
    """Of a head "l0h1" of a GPT-NeoX, which fuses queries, keys and values head by head."""
    layer, head = map(int, re.findall(r"\d+", restriction))
    attention = model.get_submodule(f"gpt_neox.layers.{layer}.attention")
    width = attention.dense.in_features // num_heads
    fused, own = slice(3 * width * head, 3 * width * (head + 1)), slice(width * head, width * (head + 1))
    places = {"query_key_value.weight": fused, "query_key_value.bias": fused, "dense.weight": (slice(None), own)}
    masks = {}
    for name, place in places.items():
        mask = torch.zeros_like(attention.get_parameter(name), dtype=torch.bool)
        mask[place] = True
        masks[f"gpt_neox.layers.{layer}.attention.{name}"] = mask
    return masks
