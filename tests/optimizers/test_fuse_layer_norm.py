"""fuse-layer-norm: layer norm and RMS norm in their spellings; near misses stay as they are and are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graphs import assert_same_answers, change, random_x, small_graph

RANDOM = np.random.default_rng(3)
CONSTANTS = {
    "last": np.array([-1]),
    "third": np.array([2]),
    "second": np.array([1]),
    "epsilon": np.float32(1e-5),
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "half": np.float32(0.5),
    "minus_half": np.float32(-0.5),
    "gamma": RANDOM.standard_normal(32).astype(np.float32),
    "beta": RANDOM.standard_normal(32).astype(np.float32),
    "matrix": RANDOM.standard_normal((1, 1, 32)).astype(np.float32),
}
FEEDS = [{"x": 2 + random_x(*shape)} for shape in ((1, 1, 32), (2, 7, 32), (3, 20, 32))]

CENTRED = "u = ReduceMean(x, last) d = Sub(x, u)"
LAYER_NORM = {
    "Pow, Sqrt, Div": f"{CENTRED} p = Pow(d, two) m = ReduceMean(p, last) v = Add(m, epsilon) r = Sqrt(v) "
    "n = Div(d, r) g = Mul(n, gamma) y = Add(g, beta)",
    "Mul, operands the other way round": f"{CENTRED} p = Mul(d, d) m = ReduceMean(p, third) v = Add(epsilon, m) "
    "r = Sqrt(v) n = Div(d, r) g = Mul(gamma, n) y = Add(beta, g)",
    "Reciprocal": f"{CENTRED} p = Mul(d, d) m = ReduceMean(p, last) v = Add(m, epsilon) r = Sqrt(v) "
    "i = Reciprocal(r) n = Mul(d, i) g = Mul(n, gamma) y = Add(g, beta)",
    "Pow -0.5": f"{CENTRED} p = Pow(d, two) m = ReduceMean(p, last) v = Add(m, epsilon) i = Pow(v, minus_half) "
    "n = Mul(i, d) g = Mul(n, gamma) y = Add(g, beta)",
    "the difference twice": f"{CENTRED} e = Sub(x, u) p = Pow(e, two) m = ReduceMean(p, last) v = Add(m, epsilon) "
    "r = Sqrt(v) n = Div(d, r) g = Mul(n, gamma) y = Add(g, beta)",
    "no beta": f"{CENTRED} p = Pow(d, two) m = ReduceMean(p, last) v = Add(m, epsilon) r = Sqrt(v) n = Div(d, r) "
    "y = Mul(n, gamma)",
}
RMS_NORM = {
    "Reciprocal": "p = Pow(x, two) m = ReduceMean(p, last) v = Add(m, epsilon) r = Sqrt(v) i = Reciprocal(r) "
    "n = Mul(x, i) y = Mul(gamma, n)",
    "Div": "p = Mul(x, x) m = ReduceMean(p, last) v = Add(epsilon, m) r = Pow(v, half) n = Div(x, r) y = Mul(n, gamma)",
    "one divided by": "p = Pow(x, two) m = ReduceMean(p, third) v = Add(m, epsilon) r = Sqrt(v) i = Div(one, r) "
    "n = Mul(i, x) y = Mul(n, gamma)",
}


@pytest.mark.parametrize("form", LAYER_NORM)
def test_layer_norm(form: str, tmp_path: Path) -> None:
    result = change("fuse-layer-norm", small_graph(LAYER_NORM[form], weights=CONSTANTS), tmp_path)
    assert result.graph.operators() == {"LayerNormalization": 1}
    (norm,) = result.graph.model.graph
    assert norm.attributes["axis"].as_int() == -1
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert result.graph.model.opset_imports[""] == 18
    assert (result.changes, result.notes) == (1, ("fused 1 of 1 normalizations as LayerNormalization",))
    assert_same_answers(tmp_path, FEEDS)


def test_axes_as_an_attribute_before_opset_18(tmp_path: Path) -> None:
    body = LAYER_NORM["Pow, Sqrt, Div"]
    body = body.replace("ReduceMean(x, last)", "ReduceMean<axes=[-1]>(x)")
    body = body.replace("ReduceMean(p, last)", "ReduceMean<axes=[2]>(p)")
    result = change("fuse-layer-norm", small_graph(body, weights=CONSTANTS, opset=14, ir_version=7), tmp_path)
    assert result.graph.operators() == {"LayerNormalization": 1}
    assert result.graph.model.opset_imports[""] >= 17
    assert_same_answers(tmp_path, FEEDS)


@pytest.mark.parametrize("form", RMS_NORM)
def test_rms_norm(form: str, tmp_path: Path) -> None:
    result = change("fuse-layer-norm", small_graph(RMS_NORM[form], weights=CONSTANTS), tmp_path)
    assert result.graph.operators() == {"RMSNormalization": 1}
    assert result.graph.model.opset_imports[""] == 23
    assert result.graph.model.ir_version >= 11
    assert_same_answers(tmp_path, FEEDS)


def test_an_addition_that_is_no_beta_stays(tmp_path: Path) -> None:
    body = LAYER_NORM["no beta"].replace("y = Mul(n, gamma)", "g = Mul(n, gamma) y = Add(g, x)")
    result = change("fuse-layer-norm", small_graph(body, weights=CONSTANTS), tmp_path)
    assert result.graph.operators() == {"Add": 1, "LayerNormalization": 1}
    assert_same_answers(tmp_path, FEEDS)


def changed(*replacements: tuple[str, str]) -> str:
    body = LAYER_NORM["Pow, Sqrt, Div"]
    for old, new in replacements:
        assert old in body
        body = body.replace(old, new)
    return body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (changed(("ReduceMean(p, last)", "ReduceMean(p, second)")), "not over the last axis alone"),
        (changed(("Mul(n, gamma)", "Mul(n, x)")), "constant of shape (32,)"),
        (changed(("Mul(n, gamma)", "Mul(n, matrix)")), "constant of shape (32,)"),
        (changed(("Div(d, r)", "Div(x, r)")), "nothing is divided"),
        (changed(("Div(d, r)", "Div(r, d)")), "nothing is divided"),
        (changed(("Sqrt(v)", "Exp(v)")), "nothing is divided"),
        (changed(("g = Mul(n, gamma) y = Add(g, beta)", "g = Mul(n, gamma) y = Add(g, n)")), "constant of shape (32,)"),
    ],
)
def test_near_misses_stay_and_are_told(body: str, reason: str, tmp_path: Path) -> None:
    graph = small_graph(body, weights=CONSTANTS)
    before = graph.operators()
    result = change("fuse-layer-norm", graph, tmp_path)
    assert result.graph.operators() == before
    assert result.graph.model.opset_imports[""] == 18
    assert result.notes[0] == "fused 0 of 1 normalizations as LayerNormalization"
    assert result.notes[1].startswith("nearest miss: ReduceMean")
    assert reason in result.notes[1]


def test_a_third_power_is_no_candidate(tmp_path: Path) -> None:
    result = change("fuse-layer-norm", small_graph(changed(("two", "three")), weights=CONSTANTS), tmp_path)
    assert (result.changes, result.notes) == (0, ())


def test_a_mean_over_another_axis_makes_it_an_rms_norm_of_the_difference(tmp_path: Path) -> None:
    graph = small_graph(changed(("ReduceMean(x, last)", "ReduceMean(x, second)")), weights=CONSTANTS)
    result = change("fuse-layer-norm", graph, tmp_path)
    assert result.graph.operators() == {"Add": 1, "RMSNormalization": 1, "ReduceMean": 1, "Sub": 1}
    assert_same_answers(tmp_path, FEEDS[1:])
