"""What the card itself gives: bytes a second from its memory, and float16 multiplications and additions."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from card import Card
from record import Record

ROOF = "roof"


def measure(record: Record, card: Card, *, tiny: bool) -> None:
    """Adds GB/s of reading (the better of a sum and a matrix-vector product) and copying, and TFLOP/s of a square product."""
    if not record.has_time(ROOF):
        return
    side = 128 if tiny else 8192
    with record.attempt("roof, memory"):
        _memory(record, card, 2**20 if tiny else 2**32, side)
    card.free()
    with record.attempt("roof, products"):
        one, other = (torch.randn(side, side, dtype=torch.float16, device=card.name) for _ in range(2))
        seconds = _best(card, lambda: torch.mm(one, other), repeats=5)
        record.add(ROOF, f"float16 product of {side} x {side}, random", "torch", TFLOPps=2 * side**3 / seconds / 1e12)
    card.free()


def _memory(record: Record, card: Card, size: int, side: int) -> None:
    data = torch.ones(size // 2, dtype=torch.float16, device=card.name)
    matrix, vector = data.view(-1, side), torch.ones(side, dtype=torch.float16, device=card.name)
    wide = data.view(torch.float32)
    readers: dict[str, Callable[[], object]] = {"sum": wide.sum, "mv": lambda: torch.mv(matrix, vector)}
    rates = {name: size / _best(card, call) / 1e9 for name, call in readers.items()}
    fastest = max(rates, key=lambda name: rates[name])
    record.add(ROOF, "memory, read", "torch", GBps=rates[fastest], by=fastest)
    target = torch.empty_like(data)
    record.add(ROOF, "memory, copy", "torch", GBps=2 * size / _best(card, lambda: target.copy_(data)) / 1e9)


def read_rate(record: Record) -> float | None:
    """GB/s of reading, where it was measured."""
    return next((float(row["GBps"]) for row in record.find(ROOF, "memory, read")), None)


def product_rate(record: Record) -> float | None:
    """TFLOP/s, where they were measured."""
    return next((float(row["TFLOPps"]) for row in record.figures if "TFLOPps" in row and row["of"] == ROOF), None)


def _best(card: Card, call: Callable[[], object], *, repeats: int = 10, tries: int = 3) -> float:
    """Seconds of a call, the best of a few tries of several calls each."""
    call()
    card.wait()
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        card.wait()
        found.append((time.perf_counter() - start) / repeats)
    return min(found)
