"""fuse-convolutions on small graphs: what goes into weights, what must not, and the answers, which stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_graphs import assert_same_answers, change, random_x, small_graph

CONV = "Conv<kernel_shape=[3,3], pads=[1,1,1,1]>"
IMAGE = "float[batch,8,9,11] x"
OUT = "float[batch,8,9,11] y"


def weights(**shapes: tuple[int, ...]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        name: (random.uniform(0.5, 1.5, shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)
        for name, shape in shapes.items()
    }


def pressed(
    body: str,
    folder: Path,
    *,
    inputs: str = IMAGE,
    outputs: str = OUT,
    shape: tuple[int, ...] = (8, 9, 11),
    **sizes: Any,
) -> tuple[dict[str, int], int]:
    """Operators after the pass and what it counts; answers are compared, alone and in a batch."""
    graph = small_graph(body, inputs=inputs, outputs=outputs, weights=weights(**sizes))
    result = change("fuse-convolutions", graph, folder)
    assert_same_answers(folder, [{"x": random_x(count, *shape)} for count in (1, 3)], tolerance=2e-5)
    return dict(result.graph.operators()), result.changes


@pytest.mark.parametrize(
    ("behind", "left"),
    [
        ("y = Mul(c, s)", {"Conv": 1}),
        ("y = Mul(s, c)", {"Conv": 1}),
        ("y = Div(c, s)", {"Conv": 1}),
        ("y = Sub(c, s)", {"Conv": 1}),
        ("y = Sub(s, c)", {"Conv": 1}),
        ("a = Mul(c, s) b = Add(a, t) y = Mul(b, one)", {"Conv": 1}),
        ("r = Relu(c) y = Mul(r, s)", {"Conv": 1, "Relu": 1, "Mul": 1}),
        ("a = Mul(c, s) y = Add(a, c)", {"Conv": 1, "Mul": 1, "Add": 1}),
        ("y = Mul(c, rows)", {"Conv": 1, "Mul": 1}),
        ("y = Mul(c, columns)", {"Conv": 1, "Mul": 1}),
    ],
)
@pytest.mark.parametrize("bias", ["", ", bias"])
def test_numbers_of_channels_behind_a_convolution(behind: str, left: dict[str, int], bias: str, tmp_path: Path) -> None:
    sizes = {"w": (8, 8, 3, 3), "bias": (8,), "s": (8, 1, 1), "t": (1, 8, 1, 1), "one": (), "rows": (9, 1)}
    sizes["columns"] = (11,)
    operators, changes = pressed(f"c = {CONV}(x, w{bias}) {behind}", tmp_path, **sizes)
    assert operators == left
    assert changes == behind.count("=") + 1 - sum(left.values())


def test_a_quotient_by_a_convolution_stays(tmp_path: Path) -> None:
    graph = small_graph(
        f"c = {CONV}(x, w) y = Div(s, c)", inputs=IMAGE, outputs=OUT, weights=weights(w=(8, 8, 3, 3), s=(8, 1, 1))
    )
    assert change("fuse-convolutions", graph, tmp_path).changes == 0


def test_as_many_columns_as_channels_are_no_channels(tmp_path: Path) -> None:
    sizes = {"w": (11, 8, 3, 3), "s": (11,)}
    body = f"c = {CONV}(x, w) y = Mul(c, s)"
    assert pressed(body, tmp_path, outputs="float[batch,11,9,11] y", **sizes) == ({"Conv": 1, "Mul": 1}, 0)


@pytest.mark.parametrize("grouped", [1, 4])
def test_a_number_that_adds_an_axis_stays(grouped: int, tmp_path: Path) -> None:
    body = f"c = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group={grouped}>(x, w) y = Mul(c, s)"
    sizes = {"w": (8, 8 // grouped, 3, 3), "s": (1, 1, 8, 1, 1)}
    operators, _ = pressed(body, tmp_path, outputs="float[one,batch,8,9,11] y", **sizes)
    assert operators == {"Conv": 1, "Mul": 1}


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        ("h = MatMul(x, w) y = Mul(h, s)", {"MatMul": 1}),
        ("h = MatMul(x, w) i = Add(h, b) y = Div(i, s)", {"MatMul": 1, "Add": 1}),
        ("t = Transpose<perm=[1,0]>(w) h = MatMul(x, t) y = Mul(s, h)", {"Transpose": 1, "MatMul": 1}),
        ("h = MatMul(x, w) i = Relu(h) y = Mul(i, s)", {"MatMul": 1, "Relu": 1, "Mul": 1}),
        ("h = MatMul(x, w) i = Mul(h, s) j = MatMul(i, w) y = Add(j, h)", {"MatMul": 2, "Mul": 1, "Add": 1}),
    ],
)
def test_layer_scales_behind_linear_layers(layer: str, left: dict[str, int], tmp_path: Path) -> None:
    inputs, outputs = "float[batch,length,16] x", "float[batch,length,16] y"
    sizes = {"w": (16, 16), "b": (16,), "s": (16,)}
    assert pressed(layer, tmp_path, inputs=inputs, outputs=outputs, shape=(5, 16), **sizes)[0] == left


def test_a_layer_scale_behind_a_gemm(tmp_path: Path) -> None:
    inputs, outputs = "float[batch,16] x", "float[batch,12] y"
    body = "h = Gemm<transB=1>(x, w, b) y = Mul(h, s)"
    sizes = {"w": (12, 16), "b": (12,), "s": (12,)}
    assert pressed(body, tmp_path, inputs=inputs, outputs=outputs, shape=(16,), **sizes) == ({"Gemm": 1}, 1)


@pytest.mark.parametrize(
    ("wide", "narrow", "fused"),
    [
        ("kernel_shape=[3,3], pads=[1,1,1,1]", "kernel_shape=[1,1]", True),
        ("kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]", "kernel_shape=[1,1], strides=[2,2]", True),
        ("kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,1]", "kernel_shape=[1,1], strides=[2,1]", True),
        ("kernel_shape=[3,3], pads=[2,2,2,2], dilations=[2,2]", "kernel_shape=[1,1]", True),
        ("kernel_shape=[5,3], pads=[2,1,2,1]", "kernel_shape=[3,3], pads=[1,1,1,1]", True),
        ("kernel_shape=[3,3], pads=[0,2,2,0]", "kernel_shape=[1,1]", True),  # the corner, not the centre
        ("kernel_shape=[5,5], pads=[4,4,4,4], dilations=[2,2]", "kernel_shape=[3,3], pads=[1,1,1,1]", False),
        ("kernel_shape=[3,1], pads=[1,0,1,0]", "kernel_shape=[1,3], pads=[0,1,0,1]", False),  # neither holds the other
    ],
)
@pytest.mark.parametrize("operator", ["Add", "Sub"])
def test_branches_of_one_input(wide: str, narrow: str, fused: bool, operator: str, tmp_path: Path) -> None:
    def shape(attributes: str) -> tuple[int, ...]:
        kernel = attributes.split("kernel_shape=[")[1].split("]")[0]
        return (8, 8, *map(int, kernel.split(",")))

    body = f"a = Conv<{wide}>(x, w, b) c = Conv<{narrow}>(x, v) y = {operator}(c, a)"
    sizes = {"w": shape(wide), "v": shape(narrow), "b": (8,)}
    operators, changes = pressed(body, tmp_path, outputs="float[batch,8,h,w1] y", **sizes)
    assert operators == ({"Conv": 1} if fused else {"Conv": 2, operator: 1})
    assert changes == int(fused)


def test_what_else_keeps_branches_apart(tmp_path: Path) -> None:
    sizes = {"w": (8, 8, 3, 3), "v": (8, 8, 1, 1), "d": (8, 1, 1, 1)}
    for body, left in (
        (f"a = {CONV}(x, w) r = Relu(x) c = Conv<kernel_shape=[1,1]>(r, v) y = Add(a, c)", 2),  # another input
        (f"a = {CONV}(x, w) c = Conv<kernel_shape=[1,1]>(x, v) s = Add(a, c) y = Mul(s, c)", 2),  # read twice
        (f"a = {CONV}(x, w) c = Conv<kernel_shape=[1,1], group=8>(x, d) y = Add(a, c)", 2),  # other groups
        (f"a = {CONV}(x, w) y = Add(a, a)", 1),
    ):
        assert pressed(body, tmp_path, **sizes)[0]["Conv"] == left


ZERO, ONE = np.float32(0), np.float32(1)


@pytest.mark.parametrize(
    ("pad", "attributes", "fused"),
    [
        ("Pad(x, all)", "kernel_shape=[3,3]", True),
        ("Pad(x, all, zero)", "kernel_shape=[3,3], pads=[1,0,0,2]", True),
        ("Pad(x, two, zero, axes)", "kernel_shape=[3,3], strides=[2,2]", True),
        ('Pad<mode="constant">(x, two, , axes)', "kernel_shape=[3,3]", True),
        ("Pad(x, all, one)", "kernel_shape=[3,3]", False),
        ('Pad<mode="edge">(x, all)', "kernel_shape=[3,3]", False),
        ("Pad(x, less)", "kernel_shape=[3,3]", False),
        ("Pad(x, rows)", "kernel_shape=[3,3]", False),
        ("Pad(x, all)", 'kernel_shape=[3,3], auto_pad="SAME_UPPER"', False),
    ],
)
def test_zeros_around_an_image(pad: str, attributes: str, fused: bool, tmp_path: Path) -> None:
    amounts = {"all": [0, 0, 1, 2, 0, 0, 3, 0], "less": [0, 0, -1, 0, 0, 0, 0, 0], "rows": [1, 0, 0, 0, 0, 0, 0, 0]}
    amounts |= {"two": [1, 2, 3, 0], "axes": [2, -1]}
    constants = {name: np.array(numbers) for name, numbers in amounts.items()} | {"zero": ZERO, "one": ONE}
    body = f"p = {pad} y = Conv<{attributes}>(p, w, b)"
    graph = small_graph(
        body, inputs=IMAGE, outputs="float[b1,8,h,w1] y", weights=weights(w=(8, 8, 3, 3), b=(8,)) | constants
    )
    result = change("fuse-convolutions", graph, tmp_path)
    assert_same_answers(tmp_path, [{"x": random_x(count, 8, 9, 11)} for count in (1, 3)])
    assert dict(result.graph.operators()) == ({"Conv": 1} if fused else {"Pad": 1, "Conv": 1})


@pytest.mark.newest  # ONNX Runtime 1.30 puts zeros that a MaxPool alone reads into its padding, which is minus infinity
def test_zeros_that_others_read_too_stay_for_them(tmp_path: Path) -> None:
    body = "p = Pad(x, a) c = Conv<kernel_shape=[2,2]>(p, w) m = MaxPool<kernel_shape=[2,2]>(p) y = Add(c, m)"
    constants = {"a": np.array([0, 0, 0, 0, 0, 0, 1, 1])}
    graph = small_graph(body, inputs=IMAGE, outputs=OUT, weights=weights(w=(8, 8, 2, 2)) | constants)
    result = change("fuse-convolutions", graph, tmp_path)
    assert_same_answers(tmp_path, [{"x": random_x(2, 8, 9, 11)}])
    assert result.changes == 1
    assert result.graph.operators()["Pad"] == 1


def test_padding_as_attributes_stays(tmp_path: Path) -> None:
    body = "p = Pad<pads=[0,0,1,1,0,0,1,1]>(x) y = Conv<kernel_shape=[3,3]>(p, w)"
    graph = small_graph(body, inputs=IMAGE, outputs=OUT, weights=weights(w=(8, 8, 3, 3)), opset=9)
    assert change("fuse-convolutions", graph, tmp_path).changes == 0


NORM = "n = BatchNormalization<epsilon=0.01>(x, ns, nb, nm, nv)"
STATISTICS = {"ns": (8,), "nb": (8,), "nm": (8,), "nv": (8,)}


@pytest.mark.parametrize(
    ("total", "operators"),
    [
        (f"{NORM} y = Add(a, n)", {"Conv": 1}),
        (f"{NORM} y = Sub(n, a)", {"Conv": 1}),
        ("y = Add(x, a)", {"Conv": 1}),
        (f"{NORM} c = Conv<kernel_shape=[1,1], group=8>(x, v) s = Add(a, c) t = Add(s, n) y = Add(t, x)", {"Conv": 1}),
        (f"{NORM} s = Sub(a, n) g = Mul(s, l) y = Add(x, g)", {"Conv": 1, "Mul": 1, "Add": 1}),
    ],
)
def test_a_norm_and_the_input_beside_channels_by_themselves(
    total: str, operators: dict[str, int], tmp_path: Path
) -> None:
    """As MobileOne and FastViT have them."""
    body = f"a = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>(x, w, b) {total}"
    sizes = {"w": (8, 1, 3, 3), "v": (8, 1, 1, 1), "b": (8,), "l": (8, 1, 1), **STATISTICS}
    assert pressed(body, tmp_path, **sizes)[0] == operators


@pytest.mark.parametrize("other", [f"{NORM} y = Add(a, n)", "y = Add(a, x)"])
def test_they_stay_beside_a_convolution_over_channels(other: str, tmp_path: Path) -> None:
    operators, _ = pressed(f"a = {CONV}(x, w) {other}", tmp_path, w=(8, 8, 3, 3), **STATISTICS)
    assert operators["Add"] == 1


def test_a_weight_that_others_read_stays(tmp_path: Path) -> None:
    body = f"a = {CONV}(x, w) m = Mul(a, s) c = {CONV}(m, w) y = Mul(c, s)"
    assert pressed(body, tmp_path, w=(8, 8, 3, 3), s=(8, 1, 1)) == ({"Conv": 2, "Mul": 2}, 0)


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose<perm=[1,0]>(w) h = MatMul(x, t) i = Mul(h, s) j = MatMul(i, t) y = Add(j, i)",
        "h = MatMul(x, w) i = Mul(h, s) j = Transpose<perm=[1,0]>(w) k = MatMul(i, j) y = Add(k, i)",
        "h = MatMul(x, w) y = Mul(h, one)",  # as language models have
    ],
)
def test_a_matrix_that_others_read_stays(body: str, tmp_path: Path) -> None:
    inputs, outputs = "float[batch,length,16] x", "float[batch,length,16] y"
    sizes = {"w": (16, 16), "s": (16,), "one": ()}
    assert pressed(body, tmp_path, inputs=inputs, outputs=outputs, shape=(5, 16), **sizes)[1] == 0


@pytest.mark.parametrize("factor", [1 / 32768, 1e-12, 1e6])
@pytest.mark.parametrize(
    ("body", "sizes"),
    [(f"c = {CONV}(x, w) y = Mul(c, s)", {"w": (8, 8, 3, 3)}), ("c = MatMul(x, v) y = Mul(c, s)", {"v": (11, 11)})],
)
def test_factors_that_float16_would_feel_stay(body: str, sizes: dict[str, Any], factor: float, tmp_path: Path) -> None:
    given = weights(**sizes)
    shape = (8, 1, 1) if "w" in given else (11,)
    given["s"] = np.full(shape, factor, np.float32)
    graph = small_graph(body, inputs=IMAGE, outputs=OUT, weights=given)
    assert change("fuse-convolutions", graph, tmp_path).changes == 0


@pytest.mark.parametrize(
    ("body", "also"),
    [
        (f"c = {CONV}(x, w, b) y = Mul(c, s)", "float[8,8,3,3] w"),
        (f"c = {CONV}(x, w, b) y = Mul(c, s)", "float[8] b"),
        ("c = MatMul(x, v) y = Mul(c, t)", "float[11,11] v"),
    ],
)
def test_weights_that_are_answers_too_stay(body: str, also: str, tmp_path: Path) -> None:
    """An initializer may be an output of the graph."""
    given = weights(w=(8, 8, 3, 3), b=(8,), s=(8, 1, 1), v=(11, 11), t=(11,))
    read = {
        name: array
        for name, array in given.items()
        if name in body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    graph = small_graph(body, inputs=IMAGE, outputs=f"{OUT}, {also}", weights=read)
    change("fuse-convolutions", graph, tmp_path)
    assert_same_answers(tmp_path, [{"x": random_x(2, 8, 9, 11)}], tolerance=2e-5)


def test_a_norm_with_numbers_for_each_place_stays(tmp_path: Path) -> None:
    body = "a = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>(x, w) n = BatchNormalization<spatial=0>(x, s, s, s, s) y = Add(a, n)"
    given = weights(w=(8, 1, 3, 3), s=(8, 9, 11))
    graph = small_graph(body, inputs=IMAGE, outputs=OUT, weights=given, opset=7)
    assert change("fuse-convolutions", graph, tmp_path).changes == 0
