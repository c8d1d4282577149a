"""Histograms that grow, and the ranges that are chosen from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from calibrating import calibrated
from small_graphs import small_graph

from onnxpress.calibration import Histogram
from onnxpress.errors import RecipeError
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import Distribution
from onnxpress.optimizers.calibrated_range import METHODS, chosen_range
from onnxpress.optimizers.rounding import rounded_uint8


def counted(numbers: np.ndarray, parts: int = 40) -> Distribution:
    histogram = Histogram()
    for part in np.array_split(numbers.astype(np.float32), parts):
        assert histogram.add(part, counted=True)
    return histogram.distribution()


def choose(numbers: np.ndarray, method: str, percentile: float = 99.99) -> tuple[float, float]:
    return chosen_range(counted(numbers), method, percentile=percentile, rounding=rounded_uint8)


def squared_error(numbers: np.ndarray, found: tuple[float, float]) -> float:
    return float(np.mean((rounded_uint8(numbers, *found) - numbers) ** 2))


def test_a_growing_histogram_is_that_of_all_numbers() -> None:
    numbers = np.random.default_rng(0).standard_normal(50_000) * np.geomspace(1e-3, 30, 50_000)
    found = counted(numbers)
    whole = np.histogram(numbers.astype(np.float32), bins=len(found.counts), range=(-found.limit, found.limit))[0]
    assert found.counts.sum() == len(numbers)
    assert np.abs(np.cumsum(found.counts) - np.cumsum(whole)).max() <= 2  # numbers that lie on an edge
    assert (found.low, found.high) == (np.float32(numbers.min()), np.float32(numbers.max()))
    largest = np.abs(numbers).max()
    assert largest <= found.limit * 1.0001 < 2.001 * largest
    assert len(found.counts) == 8192


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["normal", "relu", "constant", "zeros", "negative", "tiny"])
def test_ranges_lie_within_what_was_seen(method: str, kind: str) -> None:
    normal = np.random.default_rng(0).standard_normal(20_000)
    numbers = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "constant": np.full(100, 3.0),
        "zeros": np.zeros(100),
        "negative": -np.abs(normal) - 1,
        "tiny": normal * 1e-38,
    }[kind]
    low, high = choose(numbers, method)
    assert numbers.astype(np.float32).min() <= low <= high <= numbers.astype(np.float32).max() or method == "percentile"
    assert np.isfinite(rounded_uint8(numbers, low, high)).all() or kind == "tiny"


def test_outliers_are_cut_off_by_all_methods_but_min_max() -> None:
    random = np.random.default_rng(0)
    numbers = np.concatenate([random.standard_normal(200_000), [40.0, -25.0]])
    assert choose(numbers, "min-max") == (-25, 40)
    for method in ("percentile", "entropy"):
        low, high = choose(numbers, method)
        assert -6 < low < -3
        assert 3 < high < 6
    assert squared_error(numbers, choose(numbers, "mse")) < 0.7 * squared_error(numbers, (-25, 40))


@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
def test_mse_is_near_the_least_error_of_all_ranges(scale: float) -> None:
    numbers = scale * np.random.default_rng(1).laplace(size=100_000)
    best = min(
        squared_error(numbers, (share * numbers.min(), other * numbers.max()))
        for share in np.linspace(0.2, 1, 25)
        for other in np.linspace(0.2, 1, 25)
    )
    assert squared_error(numbers, choose(numbers, "mse")) < 1.03 * best


@pytest.mark.parametrize("kind", ["away from 0", "hardly ever negative", "next to 0"])
def test_entropy_keeps_most_of_what_is_seen(kind: str) -> None:
    """A range with one bin in it has no divergence at all; and the bins at 0 are left out, on both sides."""
    normal = np.random.default_rng(0).standard_normal(20_000 if kind == "away from 0" else 200_000)
    numbers = {
        "away from 0": 1 / (1 + np.exp(-normal)),
        "hardly ever negative": np.append(np.maximum(normal, 0), -1e-5),
        "next to 0": normal * (1 + np.vectorize(math.erf)(2 * normal / math.sqrt(2))),  # a GELU
    }[kind]
    found = chosen_range(counted(numbers, 1), "entropy", percentile=99.99, rounding=rounded_uint8)
    assert np.mean((numbers >= found[0]) & (numbers <= found[1])) > 0.99
    assert squared_error(numbers, found) < 2 * squared_error(numbers, choose(numbers, "min-max"))


def test_entropy_cuts_off_what_is_far_away() -> None:
    numbers = np.append(np.random.default_rng(0).standard_normal(20_000), 3000)
    assert choose(numbers, "entropy")[1] < 1000


def test_percentile_keeps_its_share() -> None:
    numbers = np.linspace(-1, 1, 100_001)
    low, high = choose(numbers, "percentile", percentile=95)
    assert low == pytest.approx(-0.9, abs=1e-3)
    assert high == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("name", ["int8", "int8-qdq", "fp8-qdq"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(RecipeError, match="min-max, percentile, entropy, mse"):
        make_pass(name, {"calibration": "median"})
    with pytest.raises(RecipeError, match="90 to 100"):
        make_pass(name, {"percentile": 20.0, "calibration": "percentile"})
    with pytest.raises(RecipeError, match="percentile is read where calibration is percentile, and it is 'mse'"):
        make_pass(name, {"percentile": 95, "calibration": "mse"})
    assert make_pass(name, {"percentile": 95, "calibration": "percentile"}) == make_pass(
        name, {"percentile": 95.0, "calibration": "percentile"}
    )
    with pytest.raises(RecipeError, match="below 1"):
        make_pass(name, {"smooth": 1.0})


@pytest.mark.parametrize("method", METHODS)
def test_the_int8_pass_takes_the_chosen_range(method: str, tmp_path: Path) -> None:
    """One input far outside: min-max loses the rest to it."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((32, 32)).astype(np.float32)
    graph = small_graph("y = MatMul(x, w)", weights={"w": weight})
    samples = [{"x": random.standard_normal((1, 64, 32)).astype(np.float32)} for _ in range(40)]
    samples[3]["x"][0, 0, 0] = 200
    result = make_pass("int8", {"calibration": method}).apply(graph, calibrated(samples, tmp_path))
    scale = result.graph.model.graph.initializers["x_scale"].const_value
    assert scale is not None
    step = float(scale.numpy())
    whole = (200 + max(-sample["x"].min() for sample in samples)) / 255
    if method == "min-max":
        assert step == pytest.approx(whole)
    elif method == "mse":  # to cut 200 off costs more than coarse steps do
        assert 0.5 * whole < step <= 1.0001 * whole
    else:
        assert step < 0.1 * whole


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    graph = small_graph("y = MatMul(x, w)", weights={"w": np.ones((32, 32), np.float32)})
    bad = np.ones((1, 4, 32), np.float32)
    bad[0, 2, 5] = np.nan
    for name in ("int8", "int8-qdq"):
        with pytest.raises(RecipeError, match="x of the graph is not finite"):
            make_pass(name).apply(graph.clone(), calibrated([{"x": bad}], tmp_path))
        with pytest.raises(RecipeError, match="No calibration inputs"):
            make_pass(name).apply(graph.clone(), calibrated([], tmp_path))
