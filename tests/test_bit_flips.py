"""A flipped bit in a chunk raises when the chunk is read, or changes nothing: it never becomes another number."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr
from forged import finished


def outcomes(store: Path, bits: int) -> Counter[str]:
    """Flip bits of every byte of every chunk file, one at a time; `bits` of each byte, in turn."""
    counts: Counter[str] = Counter()
    for file in sorted(path for path in store.rglob("*") if path.is_file() and path.name != "zarr.json"):
        array = zarr.open_array(store / file.relative_to(store).parts[0], mode="r")
        whole, expected = file.read_bytes(), np.asarray(array[...]).tobytes()
        for at in range(len(whole)):
            for number in range(bits):
                flipped = bytearray(whole)
                flipped[at] ^= 1 << (at + number) % 8
                file.write_bytes(flipped)
                try:
                    read = np.asarray(array[...]).tobytes()
                except Exception:
                    counts["raised"] += 1
                else:
                    counts["equal" if read == expected else "changed"] += 1
        file.write_bytes(whole)
        counts["files"] += 1
        counts["bytes"] += len(whole)
    print(dict(counts))
    return counts


def test_a_flip_in_every_byte_raises_or_changes_nothing(tmp_path):
    counts = outcomes(finished(tmp_path), bits=1)
    assert counts["changed"] == 0
    assert counts["raised"] + counts["equal"] == counts["bytes"] > 1000
    assert counts["raised"] > 0.95 * counts["bytes"]


@pytest.mark.slow
def test_every_flip_raises_or_changes_nothing(tmp_path):
    counts = outcomes(finished(tmp_path), bits=8)
    assert counts["changed"] == 0
    assert counts["raised"] + counts["equal"] == 8 * counts["bytes"]
    assert counts["raised"] > 0.95 * 8 * counts["bytes"]
