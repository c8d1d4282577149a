"""Cuts files where their content says so, so that an update ships only the parts that changed.

A cut falls where a hash of the last 32 bytes has 18 zero bits: bytes put in or taken out move the cuts behind them with the content, and
all other parts keep their digests. Method: the gear hash of FastCDC (Xia et al., USENIX ATC 2016), computed for all places at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import IO

import numpy as np

SMALLEST, LARGEST = 2**16, 2**20  # bytes of a chunk; 2**18 in the mean
_WINDOW, _ZEROS = 32, 18
_READ = 2**22
# Any fixed numbers do; they are part of the format only in so far as other ones cut elsewhere.
_GEAR = np.frombuffer(b"".join(hashlib.sha256(b"onnxpress %d" % value).digest()[:4] for value in range(256)), "<u4")


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The parts of a file, in order; each has SMALLEST to LARGEST bytes, the last one perhaps fewer."""
    held = b""
    while block := file.read(_READ):
        held += block
        start = 0
        for cut in _cuts(held):
            while cut - start > LARGEST:
                yield held[start : start + LARGEST]
                start += LARGEST
            if cut - start >= SMALLEST:
                yield held[start:cut]
                start = cut
        # What is held on to may yet be cut by what follows; a cut needs the bytes before it, which stay with it.
        while len(held) - start > LARGEST:
            yield held[start : start + LARGEST]
            start += LARGEST
        held = held[start:]
    if held:
        yield held


def _cuts(data: bytes) -> list[int]:
    """Places behind which a cut may fall: where the hash of the 32 bytes before has zeros in front."""
    hashes = _GEAR[np.frombuffer(data, np.uint8)]
    reach = 1
    while reach < _WINDOW:  # the hash of twice as many bytes, from that of the half before and the half behind
        hashes[reach:] += hashes[:-reach].copy() << np.uint32(reach)
        reach *= 2
    return [int(place) + 1 for place in np.flatnonzero(hashes >> np.uint32(32 - _ZEROS) == 0)]
