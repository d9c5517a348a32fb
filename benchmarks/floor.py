"""Seconds of the matrix products that a draw cannot avoid, each timed alone as torch.mm (or bmm) on one thread."""

import time
from collections import Counter

import torch
from workloads import BATCH, Workload

Product = tuple[str, int, int, int, int]
"""(operand that lies transposed: "", "a", "b"), how many at once, rows, inner, columns"""


def floor(workload: Workload, cores: int, device: str = "cpu") -> float:
    """Seconds per draw of one chain, with all cores at work. The last token of a sequence has no loss and needs no pass.

    A full run: every linear layer forward, and backward for input and weights. A run of one head: its own products, those of
    the layers above forward and backward for their input, and the vocabulary. What lies below or beside it does not change.
    """
    products = draw_of_all(workload) if not workload.restrictions else draw_of_head(workload, int(workload.restrictions[0][1]))
    return sum(count * seconds(product, device) for product, count in products.items()) / cores


def draw_of_all(w: Workload) -> Counter[Product]:
    found: Counter[Product] = Counter()
    for passes, backward in batches(w):
        for _ in range(w.layers):
            for width_in, width_out in block(w):
                linear(found, w, width_in, width_out, passes, backward, backward)
            attention(found, w, w.heads, passes, backward)
        linear(found, w, w.hidden, w.vocabulary, passes, backward, backward)
    return found


def draw_of_head(w: Workload, layer: int) -> Counter[Product]:
    found: Counter[Product] = Counter()
    width = w.hidden // w.heads
    for passes, backward in batches(w):
        linear(found, w, w.hidden, 3 * width, passes, False, backward)
        attention(found, w, 1, passes, backward)
        linear(found, w, width, w.hidden, passes, backward, backward)
        for _ in range(layer + 1, w.layers):
            for width_in, width_out in block(w):
                linear(found, w, width_in, width_out, passes, backward, False)
            attention(found, w, w.heads, passes, backward)
        linear(found, w, w.hidden, w.vocabulary, passes, backward, False)
    return found


def batches(w: Workload) -> list[tuple[int, bool]]:
    """(how many, whether with a backward pass)"""
    return [(1, True), (sum(w.observables.values()), False)]


def block(w: Workload) -> list[tuple[int, int]]:
    return [(w.hidden, 3 * w.hidden), (w.hidden, w.hidden), (w.hidden, 4 * w.hidden), (4 * w.hidden, w.hidden)]


def linear(
    found: Counter[Product], w: Workload, inner: int, outer: int, passes: int, for_input: bool, for_weight: bool
) -> None:
    rows = BATCH * (w.tokens - 1)
    found["b", 1, rows, inner, outer] += passes
    if for_input:
        found["", 1, rows, outer, inner] += passes
    if for_weight:
        found["a", 1, outer, rows, inner] += passes


def attention(found: Counter[Product], w: Workload, heads: int, passes: int, backward: bool) -> None:
    """Scores and values forward; backward two products of either shape."""
    times, length, width = BATCH * heads, w.tokens - 1, w.hidden // w.heads
    found["b", times, length, width, length] += passes * (2 if backward else 1)  # scores; gradient of the probabilities
    found["", times, length, length, width] += passes * (2 if backward else 1)  # values; gradient of the queries
    if backward:
        found["a", times, length, length, width] += 2 * passes  # gradients of keys and values


def seconds(product: Product, device: str) -> float:
    """Best of several, and of at least a fifth of a second."""
    transposed, times, rows, inner, columns = product
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = (
        torch.randn(times, inner, rows, device=device).mT
        if transposed == "a"
        else torch.randn(times, rows, inner, device=device)
    )
    b = (
        torch.randn(times, columns, inner, device=device).mT
        if transposed == "b"
        else torch.randn(times, inner, columns, device=device)
    )
    multiply = torch.bmm
    if times == 1:
        a, b, multiply = a[0], b[0], torch.mm
    out = multiply(a, b)
    best, begun, tried = float("inf"), time.perf_counter(), 0
    while tried < 5 or time.perf_counter() - begun < 0.2:
        wait(device)
        started = time.perf_counter()
        multiply(a, b, out=out)
        wait(device)
        best, tried = min(best, time.perf_counter() - started), tried + 1
    torch.set_num_threads(threads)
    return best


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
