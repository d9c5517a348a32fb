"""What a chunk's file says that it decodes to, without decoding it: Zstandard frames (RFC 8878, section 3.1.1)."""

from typing import BinaryIO

MAGIC = b"\x28\xb5\x2f\xfd"
LONGEST_HEADER = 18
RAW, RLE, COMPRESSED = range(3)


def decoded_size(file: BinaryIO, size: int) -> int | None:
    """Bytes that the one frame of this file decodes to; None where the file is anything but one frame that says so.

    Frames may follow one another in a file, and a decoder decodes them all: that the first one ends with the file is found
    by going from block to block. The decoder holds the frame to what it says.
    """
    header = file.read(LONGEST_HEADER)
    if len(header) < 6 or not header.startswith(MAGIC):
        return None
    descriptor = header[4]
    single_segment = bool(descriptor & 0x20)
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if width == 0 or _end(file, start + width) + (4 if descriptor & 4 else 0) != size:
        return None
    return int.from_bytes(header[start : start + width], "little") + (256 if width == 2 else 0)


def _end(file: BinaryIO, at: int) -> int:
    """Where the last block ends that begins here; -1 where there is none."""
    while True:
        file.seek(at)
        block = int.from_bytes(file.read(3), "little")
        if (kind := block >> 1 & 3) > COMPRESSED or not block:
            return -1
        at += 3 + (1 if kind == RLE else block >> 3)
        if block & 1:
            return at
