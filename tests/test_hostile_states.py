"""States of chains made to hurt: whatever bytes lie there, with a digest that fits, they are tensors or they are refused."""

import random

import pytest
import torch

from devinterp.store.durable import digest_of, write_tensors
from devinterp.store.folder import Part, Progress

NAME = "state-1.safetensors"
WORDS = (b"F64", b"BF16", b"F8_E4M3", b"[-1]", b"[9999999999999]", b"18446744073709551615", b"{}", b"null", b"\x00", b"\xff",
         b'"__metadata__":', b"[[[[", b"1e9", b"0")  # fmt: skip
LENGTHS = (0, 1, 2**31, 2**63 - 1, 2**64 - 1)


def mutated(rng: random.Random, good: bytes, header: int) -> bytes:
    """Bytes of the header changed, the file cut, the header's length a lie, or a word put into it."""
    content = bytearray(good)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(8 + header)] = rng.randrange(256)
        case 1:
            del content[rng.randrange(len(content)) :]
        case 2:
            length = rng.choice([*LENGTHS, header - 1, header + 1, len(content), rng.getrandbits(64)])
            content[:8] = length.to_bytes(8, "little")
        case 3:
            word, start = rng.choice(WORDS), rng.randrange(8, 8 + header)
            end = start + rng.randrange(8)
            content[start:end] = word
            if rng.random() < 0.7:
                content[:8] = (header + len(word) - (end - start)).to_bytes(8, "little")
    return bytes(content)


@pytest.mark.parametrize("count", [pytest.param(1000, id="some"), pytest.param(200_000, id="many", marks=pytest.mark.slow)])
def test_hostile_bytes_are_tensors_or_refused(tmp_path, count):
    path, part, rng = tmp_path / NAME, Part(tmp_path, tmp_path), random.Random(0)
    tensors = {"weights": torch.randn(2, 5), "v": torch.arange(6), "rng": torch.zeros(9, dtype=torch.uint8)}
    write_tensors(path, tensors)
    good, read = path.read_bytes(), 0
    assert part.state(Progress((0,), state=NAME, state_digest=digest_of(path))) is not None
    for _ in range(count):
        path.write_bytes(mutated(rng, good, int.from_bytes(good[:8], "little")))
        state = part.state(Progress((0,), state=NAME, state_digest=digest_of(path)))
        if state is not None:
            read += 1
            assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) <= len(good)
    print(f"\n{count} mutated states: {count - read} refused, {read} read as tensors within their size")
    assert read < 0.1 * count
