"""fuse-gelu: every spelling of both forms becomes one operator; near misses stay as they are and are named."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from small_graphs import assert_same_answers, change, random_x, small_graph

ROOT = np.float32(math.sqrt(2))
TANH = np.float32(math.sqrt(2 / math.pi))
CONSTANTS = {
    "root": ROOT,
    "root_inverse": np.float32(1 / ROOT),
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "half": np.float32(0.5),
    "half_vector": np.array([0.5], np.float32),
    "tanh_scale": TANH,
    "cubic": np.float32(0.044715),
    "both": np.float32(0.044715) * TANH,
    "wrong": np.float32(1.5),
    "nearly": np.float32(0.046),
}
FEEDS = [{"x": random_x(*shape, scale=3)} for shape in ((1, 1, 32), (2, 7, 32), (3, 20, 32))]

ERF = {
    "as PyTorch writes it": "u = Div(x, root) e = Erf(u) a = Add(e, one) h = Mul(half, a) y = Mul(x, h)",
    "half at the end": "u = Div(x, root) e = Erf(u) a = Add(e, one) p = Mul(x, a) y = Mul(p, half)",
    "half at the start": "n = Mul(half, x) u = Mul(root_inverse, x) e = Erf(u) a = Add(one, e) y = Mul(a, n)",
    "divided by two": "u = Mul(x, root_inverse) e = Erf(u) a = Add(one, e) p = Mul(a, x) y = Div(p, two)",
    "constant of one element": "u = Div(x, root) e = Erf(u) a = Add(e, one) h = Mul(a, half_vector) y = Mul(h, x)",
}
TANH_FORMS = {
    "Pow": """c = Pow(x, three) k = Mul(c, cubic) i = Add(x, k) s = Mul(tanh_scale, i) t = Tanh(s) a = Add(one, t)
        h = Mul(half, x) y = Mul(h, a)""",
    "products": """q = Mul(x, x) c = Mul(q, x) k = Mul(cubic, c) i = Add(k, x) s = Mul(i, tanh_scale) t = Tanh(s)
        a = Add(t, one) h = Mul(a, half) y = Mul(x, h)""",
    "factored": """q = Mul(x, x) k = Mul(q, cubic) i = Add(k, one) s = Mul(x, tanh_scale) m = Mul(s, i) t = Tanh(m)
        a = Add(t, one) p = Mul(x, a) y = Mul(half, p)""",
    "expanded": """c = Pow(x, three) k = Mul(c, both) s = Mul(x, tanh_scale) i = Add(s, k) t = Tanh(i) a = Add(t, one)
        p = Mul(a, x) y = Mul(p, half)""",
}


@pytest.mark.parametrize("form", ERF)
def test_erf_forms(form: str, tmp_path: Path) -> None:
    result = change("fuse-gelu", small_graph(ERF[form], weights=CONSTANTS), tmp_path)
    assert result.graph.operators() == {"Gelu": 1}
    (gelu,) = result.graph.model.graph
    assert gelu.attributes["approximate"].as_string() == "none"
    assert result.changes == 1
    assert result.notes == ("fused 1 of 1 Erf or Tanh + 1 as Gelu",)
    assert_same_answers(tmp_path, FEEDS)


@pytest.mark.parametrize("form", TANH_FORMS)
def test_tanh_forms(form: str, tmp_path: Path) -> None:
    result = change("fuse-gelu", small_graph(TANH_FORMS[form], weights=CONSTANTS), tmp_path)
    assert result.graph.operators() == {"Gelu": 1}
    (gelu,) = result.graph.model.graph
    assert gelu.attributes["approximate"].as_string() == "tanh"
    assert_same_answers(tmp_path, FEEDS)


def test_a_scaled_x_is_still_x(tmp_path: Path) -> None:
    body = "z = Mul(x, wrong) u = Div(z, root) e = Erf(u) a = Add(e, one) h = Mul(half, a) y = Mul(z, h)"
    result = change("fuse-gelu", small_graph(body, weights=CONSTANTS), tmp_path)
    assert result.graph.operators() == {"Gelu": 1, "Mul": 1}
    assert_same_answers(tmp_path, FEEDS)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("u = Div(x, wrong) e = Erf(u) a = Add(e, one) h = Mul(half, a) y = Mul(x, h)", "coefficients"),
        ("u = Div(x, root) e = Erf(u) a = Add(e, one) h = Mul(wrong, a) y = Mul(x, h)", "0.5 * x"),
        ("u = Div(x, root) e = Erf(u) a = Add(e, one) y = Mul(x, a)", "0.5 * x"),
        ("r = Relu(x) u = Div(r, root) e = Erf(u) a = Add(e, one) h = Mul(half, a) y = Mul(x, h)", "polynomial"),
        ("u = Div(x, root) e = Erf(u) a = Add(e, one) h = Mul(half, a) y = Div(x, h)", "divisor"),
        ("u = Div(x, root) e = Erf(u) a = Add(e, one) h = Mul(half, a) m = Mul(x, h) y = Add(m, a)", "0.5 * x"),
        (
            "c = Pow(x, three) k = Mul(c, nearly) i = Add(x, k) s = Mul(tanh_scale, i) t = Tanh(s) a = Add(one, t) "
            "h = Mul(half, x) y = Mul(h, a)",
            "coefficients",
        ),
        (
            "c = Pow(x, two) k = Mul(c, cubic) i = Add(x, k) s = Mul(tanh_scale, i) t = Tanh(s) a = Add(one, t) "
            "h = Mul(half, x) y = Mul(h, a)",
            "polynomial",
        ),
    ],
)
def test_near_misses_stay_and_are_told(body: str, reason: str, tmp_path: Path) -> None:
    graph = small_graph(body, weights=CONSTANTS)
    before = graph.operators()
    result = change("fuse-gelu", graph, tmp_path)
    assert result.changes == 0
    assert result.graph.operators() == before
    assert result.graph.model.opset_imports[""] == 18
    assert result.notes[0] == "fused 0 of 1 Erf or Tanh + 1 as Gelu"
    assert result.notes[1].startswith("nearest miss: ")
    assert reason in result.notes[1]


def test_constants_that_an_input_overrides_are_not_constants(tmp_path: Path) -> None:
    graph = small_graph(ERF["as PyTorch writes it"], inputs="float[batch,length,32] x, float root", weights=CONSTANTS)
    assert change("fuse-gelu", graph, tmp_path).changes == 0


def test_a_lone_tanh_is_no_candidate(tmp_path: Path) -> None:
    result = change("fuse-gelu", small_graph("y = Tanh(x)"), tmp_path)
    assert (result.changes, result.notes) == (0, ())


def test_the_output_of_the_graph_keeps_its_name_and_readers(tmp_path: Path) -> None:
    body = ERF["as PyTorch writes it"] + " z = Relu(y)"
    outputs = "float[batch,length,32] y, float[batch,length,32] z"
    result = change("fuse-gelu", small_graph(body, outputs=outputs, weights=CONSTANTS), tmp_path)
    assert [value.name for value in result.graph.model.graph.outputs] == ["y", "z"]
    assert result.graph.operators() == {"Gelu": 1, "Relu": 1}
    assert_same_answers(tmp_path, FEEDS)
