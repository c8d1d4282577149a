"""Compares a graph with the PyTorch original on inputs of several shapes, and says where they differ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import ParityError, SourceError
from onnxpress.exporters.exported import Exported
from onnxpress.manifest import Arrays, Runnable, Signature, TensorSpec
from onnxpress.masked import largest_unmasked, mask_size

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Named inputs."""

    name: str
    feeds: Arrays


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """How far one output is from the original's in one case. max_rel is max_abs over the original's largest value."""

    case: str
    output: str
    max_abs: float
    max_rel: float


# Summing in another order was measured to cost 1e-6 for a sentence encoder of 6 layers, and up to 9e-6 for tiny models of large random
# weights. The floor keeps outputs near zero from asking for more than float32 has.
_RELATIVE, _FLOOR = 5e-5, 0.1
_RELATIVE_HALF = 8e-3  # float16 rounds each result to 5e-4 of it, and a network of it several times
_NEAR_TIES = 1e-4  # share of integers and booleans (classes of pixels) that may be others, where two were as good
_LOOKED_AT = 2**16  # numbers of an example, by which others like it are drawn
_SEEDS: tuple[int, ...] = (0, 1)  # of random inputs
# Models without a table of positions take thousands of tokens, where the original's attention alone needs gigabytes.
LONGEST_CASE = 1024


class ParityCheck:
    """The original's answers to all cases, computed once, to hold any number of graphs against.

    Text models: `text_cases`. Modules: `module_cases`, less those whose shapes the original itself refuses. `notes`
    says what was not compared.
    """

    def __init__(self, exported: Exported) -> None:
        reference, signature = exported.reference, exported.graph.signature
        self.notes: tuple[str, ...] = ()
        self._signature = signature
        self._answered: list[tuple[Case, Arrays]] = []
        if signature.task != "module":
            options = exported.options
            cases = text_cases(
                signature, pad_token_id=options["pad_token_id"], closing_token_id=options.get("closing_token_id")
            )
            try:
                self._answered = [(case, reference.run(case.feeds)) for case in cases]
            except Exception as error:  # whatever a model raises for tokens that it does not take
                raise ParityError(
                    f"{exported.name} itself refuses random tokens, by which its graph would be compared with it: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if signature.axes["length"][1] > LONGEST_CASE:
                self.notes = (f"lengths over {LONGEST_CASE} were not compared with the original",)
            if any(_hangs_on_padding(reference, case, answer, signature.outputs) for case, answer in self._answered):
                self.notes += (
                    "the original's answers to a text hang on the padding beside it: in a batch they are others than alone",
                )
            return
        first, *others = module_cases(signature, exported.example)
        self._answered.append((first, reference.run(first.feeds)))
        for case in others:
            try:
                self._answered.append((case, reference.run(case.feeds)))
            except Exception as error:  # whatever a module raises when a shape does not suit it
                self.notes += (f"the original refuses {case.name} ({type(error).__name__})",)
        for sizes in exported.sizes:
            case = _module_case(signature, exported.example, sizes, _SEEDS[0])
            case = replace(case, name=f"{case.name}, for which forward may go another way")
            with suppress(Exception):  # of sizes that do not suit it there is nothing to compare
                self._answered.append((case, reference.run(case.feeds)))

    @cached_property
    def _masks(self) -> dict[str, float]:
        """From which size on numbers of an output are masks, by all cases."""
        return {
            name: mask_size([answer[name] for _, answer in self._answered])
            for name, first in self._answered[0][1].items()
            if np.issubdtype(first.dtype, np.floating)
        }

    def check(self, candidate: Runnable) -> list[ParityRow]:
        """One row a case and output; raises ParityError at the first that differs.

        Of outputs with the axes (batch, length) only real tokens are compared: what stands at padding is nobody's
        answer.
        """
        rows: list[ParityRow] = []
        for case, expected in self._answered:
            found = candidate.run(case.feeds)
            for output in self._signature.outputs:
                masks = self._masks.get(output.name, math.inf)
                rows.append(_compare(case, output, expected[output.name], found[output.name], masks))
        return rows


def _hangs_on_padding(reference: Runnable, case: Case, answer: Arrays, outputs: Sequence[TensorSpec]) -> bool:
    """Whether a padded text's answers are others when it is run alone, without its padding."""
    lengths = case.feeds["attention_mask"].sum(axis=1)
    row = int(lengths.argmin())
    if lengths[row] == lengths.max():
        return False
    alone = reference.run({name: array[row : row + 1, : lengths[row]] for name, array in case.feeds.items()})
    for output in outputs:
        real = answer[output.name][row : row + 1]
        if "length" in output.shape:
            real = real[:, : lengths[row]]
        if np.abs(real - alone[output.name]).max() > 10 * allowed_difference(float(np.abs(real).max())):
            return True
    return False


def allowed_difference(largest: float, *, half: bool = False) -> float:
    """How far an output of float32, or float16, may be from the original's, of which the largest absolute value is given."""
    return (_RELATIVE_HALF if half else _RELATIVE) * max(_FLOOR, largest)


def text_cases(signature: Signature, *, pad_token_id: int, closing_token_id: int | None = None) -> list[Case]:
    """Random tokens: one text and three, of one token, of two, of a middle length and of the longest, padded and not.

    The longest come as one text and as a padded three, or pair where each token is answered with a vocabulary: that
    would be gigabytes. closing_token_id: at the end of each text; where none is padded, at its beginning too; and nowhere else.
    """
    longest = min(signature.axes["length"][1], LONGEST_CASE)
    middle = min(64, (longest + 1) // 2)
    shapes = {(batch, length): _SEEDS for batch in (1, 3) for length in (1, middle)}
    shapes |= {(1, 2): _SEEDS[:1]} if longest > 2 else {}
    shapes |= {(1, longest): _SEEDS[:1], (2 if signature.task == "fill-mask" else 3, longest): _SEEDS[-1:]}
    return [
        _text_case(signature, batch, length, padded, pad_token_id, closing_token_id, seed)
        for (batch, length), tried in shapes.items()
        for seed, padded in itertools.product(tried, (False, True))
        if not padded or (batch > 1 and length > 1)  # a text alone has no padding
    ]


def module_cases(signature: Signature, example: Arrays) -> list[Case]:
    """The example, and random arrays like it: of its shape, with symbolic axes one longer, and with the smallest batch."""
    sizes = {
        axis: size
        for spec in signature.inputs
        for axis, size in zip(spec.shape, example[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }
    longer = {axis: min(size + 1, signature.axes[axis][1]) for axis, size in sizes.items()}
    least = {**sizes, "batch": signature.axes["batch"][0]} if "batch" in sizes else sizes
    tried = [sizes, longer, least]
    distinct = [size for index, size in enumerate(tried) if size not in tried[:index]]
    drawn = [_module_case(signature, example, size, seed) for seed, size in itertools.product(_SEEDS, distinct)]
    return [Case(name="the example", feeds=example), *drawn]


def drawn_like(
    example: Array,
    shape: Sequence[int],
    bounds: tuple[int, int] | None,
    random: np.random.Generator,
    *,
    name: str = "",
) -> Array:
    """Random numbers as the example's are, of a shape that differs in its sizes alone.

    Where it holds two numbers (a mask): rows of it, so that none hides everything, their last numbers repeated where more are asked for;
    where it is all 1 and its name ends with mask: some ones in each row and zeros behind them.
    Floats: normal, of its mean and spread; where it repeats numbers those that it has; where all have one sign (logarithms are taken of
    some inputs) between its own, or around it where each row is the same single number. Integers lie within bounds, or the example's;
    where it holds one alone, those of 8 bits are of any size if it can be an image. Booleans of one value: both, where a row is one.
    """
    own = np.sort(example.ravel()[:: max(1, example.size // _LOOKED_AT)])
    distinct = len(np.unique(own))
    mask = distinct == 2 <= len(own) // 2 or (example.dtype == np.bool_ and example.ndim > 1)
    if mask and bounds is None:
        rows = random.integers(0, len(example), shape[0])
        others = zip(shape[1:], example.shape[1:], strict=True)
        return np.asarray(example[np.ix_(rows, *(np.minimum(np.arange(size), known - 1) for size, known in others))])
    if name.lower().rstrip("s_0123456789").endswith("mask") and example.dtype != np.bool_ and (own == 1).all():
        axis = max((axis for axis, size in enumerate(shape) if axis and size > 1), default=None)
        if axis is None:
            return np.ones(shape, example.dtype)
        lengths = random.integers(1, shape[axis] + 1, [*shape[:axis], *shape[axis + 1 :]])
        return np.moveaxis(np.arange(shape[axis]) < lengths[..., None], -1, axis).astype(example.dtype)
    if example.dtype == np.bool_:
        return np.asarray(random.random(shape) < 0.5)
    if not np.issubdtype(example.dtype, np.floating):
        low, high = bounds or (int(example.min()), int(example.max()))
        if low == high and bounds is None and example.dtype.itemsize == 1 and example.ndim > 2:
            low, high = np.iinfo(example.dtype).min, np.iinfo(example.dtype).max
        return np.asarray(random.integers(low, high + 1, shape)).astype(example.dtype)
    own = own.astype(np.float64)
    if distinct > 1 and (distinct <= len(own) // 2 or not np.isfinite(own).all()):
        drawn = own[random.integers(0, len(own), shape)]
    elif distinct > 1 and own[0] * own[-1] >= 0:
        places = random.random(shape) * (len(own) - 1)
        below = np.floor(places).astype(np.int64)
        drawn = own[below] + (places - below) * (own[below + 1] - own[below])
    elif distinct == 1 and own[0] and example.size == (len(example) if example.ndim else 1):
        drawn = own[0] * random.uniform(0.5, 1.5, shape)
    else:
        drawn = random.standard_normal(shape) * (own.std() or 1.0) + own.mean()
    return np.asarray(drawn).astype(example.dtype)


def _text_case(
    signature: Signature, batch: int, length: int, padded: bool, pad_token_id: int, closing: int | None, seed: int
) -> Case:
    rng = np.random.default_rng((seed, batch, length))
    lengths = np.full(batch, length)
    if padded:
        lengths[1:] = rng.integers(1, length, batch - 1)
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)  # (batch, length)
    feeds: dict[str, Array] = {"attention_mask": mask}
    for spec in signature.inputs:
        if spec.name == "attention_mask":
            continue
        assert spec.bounds is not None
        tokens = rng.integers(spec.bounds[0], spec.bounds[1] + 1, (batch, length))
        if spec.name == "input_ids":
            # A real token is never the padding token: some models count positions by comparing with it.
            apart = [pad_token_id] if closing is None else [pad_token_id, closing]
            tokens[np.isin(tokens, apart)] = next(
                token for token in itertools.count(spec.bounds[0]) if token not in apart
            )
            if closing is not None:
                tokens[np.arange(batch), lengths - 1] = closing
                tokens[:, 0] = tokens[:, 0] if padded else closing
            tokens[mask == 0] = pad_token_id
        else:
            tokens[mask == 0] = 0
        feeds[spec.name] = tokens
    name = f"batch {batch}, length {length}{', padded' if padded else ''}, seed {seed}"
    return Case(name=name, feeds={spec.name: feeds[spec.name] for spec in signature.inputs})


def _module_case(signature: Signature, example: Arrays, sizes: Mapping[str, int], seed: int) -> Case:
    rng = np.random.default_rng((seed, *sizes.values()))
    feeds: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        feeds[spec.name] = drawn_like(example[spec.name], shape, spec.bounds, rng, name=spec.name)
    where = ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "fixed shapes"
    return Case(name=f"{where}, seed {seed}", feeds=feeds)


def _compare(case: Case, output: TensorSpec, expected: Array, found: Array, masks: float) -> ParityRow:
    """masks: from which size on numbers are masks."""
    if expected.shape != found.shape:
        raise ParityError(
            f"Output {output.name} has the shape {found.shape} where the original's has {expected.shape} ({case.name}). The "
            f"graph is wrong: do not use it."
        )
    if output.shape[1:2] == ("length",) and "attention_mask" in case.feeds:
        real = case.feeds["attention_mask"].astype(bool)
        expected, found = expected[real], found[real]
    exact = not np.issubdtype(expected.dtype, np.floating)
    one, other = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    if np.isnan(one).any():
        raise SourceError(
            f"The original's output {output.name} holds numbers that are none (NaN) for {case.name}, so that nothing can be compared with it."
        )
    infinite = np.isinf(one) & (one == other)  # masked logits
    one[infinite] = other[infinite] = 0
    sizes, half = np.abs(one), expected.dtype == np.float16
    masked = (sizes >= masks) & np.isfinite(one)
    largest = largest_unmasked(one, masks)
    difference = np.abs(one - other)
    # What is masked has to be as near by its own size, and hides nothing.
    difference[masked] *= max(_FLOOR, largest) / sizes[masked]
    max_abs = float(difference.max(initial=0.0))
    row = ParityRow(
        case=case.name,
        output=output.name,
        max_abs=max_abs,
        max_rel=max_abs / largest if largest else 0.0,
    )
    allowed = 0.0 if exact else allowed_difference(largest, half=half)
    if exact and np.mean(one != other) <= _NEAR_TIES:
        return row
    if not max_abs <= allowed:  # also where either side is not a number
        raise ParityError(
            f"Output {output.name} does not answer like the original for {case.name} (shape {found.shape}): it differs by "
            f"up to {max_abs:.3g} (relative {row.max_rel:.3g}), where {allowed:.3g} is allowed. "
            "Do not use the graph, and report the model as one that does not convert."
        )
    return row
