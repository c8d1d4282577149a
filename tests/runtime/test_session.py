"""A session takes exactly what its signature says, answers from several threads, and names what is wrong with a file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_artifacts import DIM, MAX_LENGTH, SIGNATURE, save_embedder, weights

from onnxpress.errors import ArtifactError, InputError
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.runtime import CPU, Session
from onnxpress.runtime.replay import counts_as_it_goes


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(save_embedder(tmp_path / "model.onnx"), signature=SIGNATURE)


def feeds(batch: int = 2, length: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    ids = np.random.default_rng(0).integers(5, len(weights()), (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones((batch, length), np.int64)}


@pytest.mark.parametrize("counts", [True, False])
def test_operators_that_count_as_they_go_are_seen(counts: bool, tmp_path: Path) -> None:
    """A CUDA graph cannot hold them, though inputs and outputs have shapes that are known before."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]) if counts else helper.make_node("Cast", ["x"], ["places"], to=7),
        helper.make_node("ReduceSum", ["places"], ["y"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])]
    graph = helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", TensorProto.INT64, [])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    inner, _ = Session(tmp_path / "m.onnx")._opening.open(record_placement=True)
    assert counts_as_it_goes(inner) == counts


def test_answers(session: Session) -> None:
    given = feeds()
    assert session.input_names == ("input_ids", "attention_mask")
    assert session.output_names == ("embeddings",)
    assert session.providers == ("cpu",)
    assert session.fallback_note == ""
    expected = weights()[given["input_ids"]].mean(1)
    np.testing.assert_allclose(session.run(given)["embeddings"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(session.run(given)["embeddings"], session.run_on_one_thread(given)["embeddings"])


def test_takes_arrays_of_any_layout(session: Session) -> None:
    given = feeds(4, 6)
    expected = session.run(given)["embeddings"]
    strided = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in given.items()}
    columns = {name: np.asfortranarray(array) for name, array in given.items()}
    for other in (strided, columns):
        np.testing.assert_array_equal(session.run(other)["embeddings"], expected)


def test_bfloat16_is_float32_outside(tmp_path: Path) -> None:
    """Rounded to the nearest, ties to even, as PyTorch rounds; what is no number stays none."""
    values = (
        helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n"]),
        helper.make_tensor_value_info("same", TensorProto.BFLOAT16, ["n"]),
        helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["n"]),
    )
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "graph", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=11,
    )
    onnx.save(proto, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    assert session.signature.inputs[0].dtype == "bfloat16"
    random = np.random.default_rng(0)
    numbers = np.concatenate(
        [
            random.standard_normal(1000).astype(np.float32),
            random.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32),
            np.array([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, -np.inf, np.nan, 1e-45], np.float32),
        ]
    )
    expected = torch.from_numpy(numbers).bfloat16().float().numpy()
    for array in session.run({"x": numbers}).values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected)
    assert session.run({"x": numbers[:0]})["same"].shape == (0,)
    with pytest.raises(InputError, match=r"float64; the model takes x bfloat16 \[n\]: use .astype\(numpy.float32\)"):
        session.run({"x": np.ones(3)})


def test_uses_the_cores_this_process_may_use(session: Session) -> None:
    assert session.threads == len(os.sched_getaffinity(0))
    assert Session(session.path, providers=[CPU(threads=1)]).threads == 1


def test_names_the_provider_of_each_node(session: Session) -> None:
    placement = session.placement()
    assert set(placement.values()) == {"CPUExecutionProvider"}
    assert {"rows", "mean"} <= set(placement)


WRONG = {
    "missing": (lambda f: {"input_ids": f["input_ids"]}, "attention_mask"),
    "unknown": (lambda f: {**f, "token_type_ids": f["input_ids"]}, "token_type_ids"),
    "dtype": (lambda f: {**f, "input_ids": f["input_ids"].astype(np.int32)}, r"int32; the model takes .* int64"),
    "float": (lambda f: {**f, "input_ids": f["input_ids"] * 1.0}, "float64"),
    "list": (lambda f: {**f, "input_ids": f["input_ids"].tolist()}, "list; the model takes a numpy array"),
    "byte order": (lambda f: {**f, "input_ids": f["input_ids"].astype(">i8")}, "byte order"),
    "rank": (lambda f: {**f, "input_ids": f["input_ids"][0]}, r"shape \[4\]"),
    "lengths disagree": (lambda f: {**f, "attention_mask": f["attention_mask"][:, :3]}, "length 3 and input_ids has 4"),
    "batches disagree": (lambda f: {**f, "attention_mask": f["attention_mask"][:1]}, "batch 1 and input_ids has 2"),
    "too long": (lambda f: feeds(1, MAX_LENGTH + 1), f"length {MAX_LENGTH + 1}; the model takes 1 to {MAX_LENGTH}"),
    "too many": (lambda f: feeds(65, 2), "batch 65; the model takes 1 to 64"),
    "no rows": (lambda f: feeds(0, 2), "batch 0; the model takes 1 to 64"),
    "id too large": (lambda f: {**f, "input_ids": f["input_ids"] + 100}, "the model takes 0 to 21"),
    "id negative": (lambda f: {**f, "input_ids": f["input_ids"] - 100}, "the model takes 0 to 21"),
    "mask is no mask": (lambda f: {**f, "attention_mask": f["attention_mask"] * 2}, "values from 2 to 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_wrong_inputs(session: Session, case: str) -> None:
    change, message = WRONG[case]
    for run in (session.run, session.run_on_one_thread):
        with pytest.raises(InputError, match=message) as caught:
            run(change(feeds()))
        assert "\n" not in str(caught.value)


def test_refuses_a_wrong_fixed_dimension(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "fixed", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    session = Session(path)
    assert session.signature.inputs == (TensorSpec(name="x", dtype="float32", shape=("n", 3)),)
    with pytest.raises(InputError, match=r"shape \[2, 4\]; the model takes x float32 \[n, 3\]"):
        session.run({"x": np.zeros((2, 4), np.float32)})


def test_inputs_that_only_onnx_runtime_can_judge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loose = Signature(
        task="module",
        inputs=tuple(TensorSpec(name=spec.name, dtype="int64", shape=spec.shape) for spec in SIGNATURE.inputs),
        outputs=SIGNATURE.outputs,
    )
    session = Session(save_embedder(tmp_path / "model.onnx"), signature=loose)
    with pytest.raises(InputError, match=r"ONNX Runtime refuses the inputs \(input_ids \[2, 4\]"):
        session.run({**feeds(), "input_ids": np.full((2, 4), 10**6)})
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "garbage": bytes(range(256)) * 10,
        "text": b"this is no model",
    }


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "text"])
def test_names_a_damaged_model(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(ArtifactError, match=r"model\.onnx is corrupt or not a model"):
        Session(path)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_names_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        Session(tmp_path / "nothing.onnx")


def test_eight_threads_get_equal_answers(session: Session) -> None:
    given = feeds(16, 8)
    expected = session.run(given)["embeddings"]
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(run, given) for _ in range(20) for run in (session.run, session.run_on_one_thread)]
        for call in calls:
            np.testing.assert_array_equal(call.result()["embeddings"], expected)


def test_exact_products_of_signed_weights_on_every_cpu(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.full((64, 32), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["batch", 32])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "p.onnx")
    found = Session(tmp_path / "p.onnx", exact_products=True).run({"x": np.full((3, 64), 255, np.uint8)})["y"]
    np.testing.assert_array_equal(found, np.full((3, 32), 255 * 127 * 64))


def test_binding_reads_and_writes_the_same_arrays(session: Session) -> None:
    given, out = feeds(), np.zeros((2, DIM), np.float32)
    binding = session.binding()
    for name, array in given.items():
        binding.bind_input(name, array)
    binding.bind_output("embeddings", out)
    for shift in range(3):
        given["input_ids"][:] = 5 + shift
        assert binding.run()["embeddings"] is out
        np.testing.assert_allclose(out, np.stack([weights()[5 + shift]] * 2), rtol=0, atol=1e-6)


def test_binding_refuses_what_does_not_fit(session: Session) -> None:
    given = feeds()
    binding = session.binding()
    with pytest.raises(InputError, match="not contiguous"):
        binding.bind_input("input_ids", np.asfortranarray(given["input_ids"]))
    with pytest.raises(InputError, match="there are: embeddings"):
        binding.bind_output("logits", np.zeros((2, DIM), np.float32))
    binding.bind_input("input_ids", given["input_ids"])
    with pytest.raises(InputError, match="attention_mask"):
        binding.run()
    binding.bind_input("attention_mask", given["attention_mask"])
    binding.bind_output("embeddings", np.zeros((1, DIM), np.float32))
    with pytest.raises(InputError, match="refuses the bound arrays"):
        binding.run()
    given["input_ids"][0, 0] = 99
    with pytest.raises(InputError, match="values from"):
        binding.run()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((2, DIM), np.float64), "Unexpected output data type"),
        (np.zeros((2, DIM), ">f4"), "only a numpy array in this machine's byte order"),
        (np.frombuffer(bytes(8 * DIM), np.float32).reshape(2, DIM), "read-only"),
        ([[0.0] * DIM] * 2, "a list was bound to embeddings"),
    ],
    ids=["dtype", "byte order", "read-only", "list"],
)
def test_binding_refuses_an_output_that_cannot_receive(session: Session, out: Any, message: str) -> None:
    binding = session.binding()
    for name, array in feeds().items():
        binding.bind_input(name, array)

    def bind_and_run() -> None:
        binding.bind_output("embeddings", out)
        binding.run()

    with pytest.raises(InputError, match=message):
        bind_and_run()
