"""Sizes for which a module's forward may go another way than the one that was traced.

What Python code asks of sizes (`if h > w`) is answered for the example's when it is traced, and torch keeps what was answered as guards.
Most of them are about memory layouts and change nothing; so each is broken once, with sizes near the example's, and the answers are
compared with the original's. Source: torch.export, ExportedProgram's guards.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Sizes = Mapping[str, int]

_MOST = 12  # sizes that are tried
_LARGER, _LARGE = 4, 2**16  # times as many numbers as the example has, or so many, at most
_STEPS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17)


def sizes_that_break(
    guards: Sequence[str],
    shapes: Sequence[Sequence[int | str]],
    example: Sizes,
    axes: Mapping[str, tuple[int, int]],
) -> list[Sizes]:
    """For each guard that some sizes within the axes' ranges break, those nearest to the example's.

    guards: expressions over L["inputs"][i].size(). shapes: of the inputs, with names of symbolic axes. example: its size of each axis.
    """
    found: list[Sizes] = []
    own = _numbers(shapes, example)

    def distance(sizes: Sizes) -> tuple[int, int]:
        return sum(sizes[axis] != size for axis, size in example.items()), abs(_numbers(shapes, sizes) - own)

    most = max(_LARGER * own, _LARGE)
    candidates = sorted((one for one in _near(example, axes) if _numbers(shapes, one) <= most), key=distance)
    for guard in guards:
        if any(_holds(guard, shapes, sizes) is False for sizes in found):
            continue
        broken = next((sizes for sizes in candidates if _holds(guard, shapes, sizes) is False), None)
        if broken is not None:
            found.append(broken)
    return found[:_MOST]


def _near(example: Sizes, axes: Mapping[str, tuple[int, int]]) -> Iterator[Sizes]:
    """Sizes of which one or two are others than the example's; of one, multiples and thresholds as code asks for them, too."""
    values = {}
    for axis, size in example.items():
        low, high = axes[axis]
        wanted = {
            low,
            low + 1,
            size // 2,
            2 * size,
            3 * size,
            *(size + step for step in _STEPS),
            *(size - step for step in _STEPS),
        }
        wanted |= {other + step for other in example.values() for step in (-1, 0, 1)}
        values[axis] = sorted(value for value in wanted if low <= value <= high and value != size)
    for axis, some in values.items():
        low, high = axes[axis]
        farther = {*range(64 + 1), *(2**power + step for power in range(7, 11) for step in (0, 1))}
        allowed = {value for value in farther if low <= value <= high and value != example[axis]}
        yield from ({**example, axis: value} for value in sorted(allowed | set(some)))
    for one, other in itertools.combinations(values, 2):
        yield from ({**example, one: a, other: b} for a in values[one] for b in values[other])


def _numbers(shapes: Sequence[Sequence[int | str]], sizes: Sizes) -> int:
    return sum(math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in shape) for shape in shapes)


def _holds(guard: str, shapes: Sequence[Sequence[int | str]], sizes: Sizes) -> bool | None:
    """Whether a guard holds for sizes; None where it asks for something else than sizes."""
    inputs = [_Shape([sizes[axis] if isinstance(axis, str) else axis for axis in shape]) for shape in shapes]
    try:
        return bool(eval(_compiled(guard), {"__builtins__": {"max": max, "min": min}}, {"L": {"inputs": inputs}}))
    except Exception:  # strides, functions of torch's own
        return None


@functools.cache
def _compiled(guard: str) -> Any:
    return compile(guard, "a guard", "eval")


class _Shape:
    def __init__(self, shape: list[int]) -> None:
        self._shape = shape

    def size(self) -> Any:
        """As a tensor's."""
        return self._shape
