"""A user's arrays: what is refused, and a convolution network that is built, judged by labels and calibrated on them."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

import onnxpress
from onnxpress import module_workload
from onnxpress.errors import BudgetError, RecipeError
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.module_workload import ModuleWorkload
from onnxpress.runtime.session import Session
from onnxpress.sample_arrays import check_arrays, read_arrays

SIGNATURE = Signature(
    task="module",
    inputs=(
        TensorSpec(name="image", dtype="float32", shape=("batch", 1, 8, 8)),
        TensorSpec(name="kind", dtype="int64", shape=("batch", "length"), bounds=(0, 4)),
    ),
    outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", 10)),),
    axes={"batch": (1, 64), "length": (1, 3)},
)


def good(count: int = 6) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "image": random.standard_normal((count, 1, 8, 8)).astype(np.float32),
        "kind": random.integers(0, 5, (count, 2)),
        "labels": random.integers(0, 10, count).astype(np.uint8),
    }


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_both_kinds_of_files_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"samples{suffix}"
    np.savez(path, **good()) if suffix == ".npz" else save_file(good(), path)
    found = read_arrays(path, SIGNATURE)
    assert len(found) == found.calls() == 6
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, good()["labels"])
    np.testing.assert_array_equal(found.call(2, 3)["kind"], good()["kind"][2:5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "has kind; the model takes image, kind"),
        ({"pixels": np.zeros((6, 2))}, "has image, kind, pixels"),
        ({"image": np.zeros((6, 1, 8, 8))}, "image is float64 of shape"),
        ({"image": np.zeros((6, 1, 9, 8), np.float32)}, r"takes float32 of shape \(samples, 1, 8, 8\)"),
        ({"image": np.zeros((6, 64), np.float32)}, r"takes float32 of shape \(samples, 1, 8, 8\)"),
        ({"kind": np.zeros((6, 4), np.int64)}, "kind is int64 of shape"),
        ({"kind": np.full((6, 2), 5)}, "kind goes from 5 to 5; the model takes 0 to 4"),
        ({"image": np.full((6, 1, 8, 8), np.nan, np.float32)}, "not finite"),
        ({"image": np.zeros((5, 1, 8, 8), np.float32)}, "unequal or no samples"),
        ({"labels": np.zeros(5, np.int64)}, "unequal or no samples"),
        ({"labels": np.int64(3)}, "unequal or no samples"),
        ({"labels": np.zeros((6, 2), np.int64)}, "they are whole numbers, one class a sample"),
        ({"labels": np.zeros(6, np.float32)}, "they are whole numbers, one class a sample"),
        ({name: array[:0] for name, array in good().items()}, "unequal or no samples"),
        ({"image": np.array([object()] * 6)}, "cannot be read as arrays of numbers"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    arrays = {name: array for name, array in {**good(), **change}.items() if array is not None}
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(RecipeError, match=said):
        read_arrays(path, SIGNATURE)


def test_samples_may_be_whole_calls_where_inputs_share_no_batch_axis(tmp_path: Path) -> None:
    """Speech with a state whose batch is not its first axis, and the rate as a single number."""
    rate = TensorSpec(name="rate", dtype="int64", shape=())
    signature = dataclasses.replace(SIGNATURE, inputs=(*SIGNATURE.inputs, rate))
    rows = {name: array for name, array in good().items() if name != "labels"}
    for rates in (np.int64(16000), np.full(6, 16000)):
        np.savez(tmp_path / "rows.npz", **rows, rate=rates)
        with pytest.raises(RecipeError, match=r"rate is a single number, .* give each input one axis more"):
            read_arrays(tmp_path / "rows.npz", signature)
    whole = {name: np.stack([array, array]) for name, array in rows.items()}
    np.savez(tmp_path / "whole.npz", **whole, rate=np.array([8000, 16000]))
    found = read_arrays(tmp_path / "whole.npz", signature)
    assert (len(found), found.calls(), found.whole) == (2, 2, True)
    call = found.call(1, 5)
    assert {name: array.shape for name, array in call.items()} == {"image": (6, 1, 8, 8), "kind": (6, 2), "rate": ()}
    assert call["rate"] == 16000
    np.savez(tmp_path / "labelled.npz", **whole, rate=np.array([8000, 16000]), labels=np.array([1, 2]))
    with pytest.raises(RecipeError, match="labels go with rows of inputs"):
        read_arrays(tmp_path / "labelled.npz", signature)
    whole["kind"] = whole["kind"][..., [0, 0, 0, 0]]
    np.savez(tmp_path / "long.npz", **whole, rate=np.array([8000, 16000]))
    with pytest.raises(RecipeError, match=r"takes int64 of shape \(samples, batch, length\)"):
        read_arrays(tmp_path / "long.npz", signature)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for name, said in (
        ("text.npz", "cannot be read as arrays"),
        ("text.safetensors", r"not a readable safetensors file: .*longer than the file\.$"),
    ):
        (tmp_path / name).write_text("hello")
        with pytest.raises(RecipeError, match=said):
            read_arrays(tmp_path / name, SIGNATURE)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(RecipeError, match=r"one array without a name.*numpy\.savez"):
        read_arrays(tmp_path / "one.npz", SIGNATURE)
    halves = {"image": torch.zeros(6, 1, 8, 8, dtype=torch.bfloat16)}
    safetensors.torch.save_file(halves, tmp_path / "halves.safetensors")
    with pytest.raises(RecipeError, match=r"tensor image is BF16, which numpy does not have\.$"):
        read_arrays(tmp_path / "halves.safetensors", SIGNATURE)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("image.txt", "hello")
    with pytest.raises(RecipeError, match=r"other\.npz"):
        read_arrays(tmp_path / "other.npz", SIGNATURE)
    (tmp_path / "samples.csv").write_text("text\nhello\n")
    with pytest.raises(RecipeError, match=r"give \.npz"):
        read_arrays(tmp_path / "samples.csv", SIGNATURE)


def test_what_is_read_is_in_this_machines_byte_order_and_may_be_written_to(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "samples.npz",
        **{name: array.astype(array.dtype.newbyteorder(">")) for name, array in good().items()},
    )
    save_file(good(), tmp_path / "samples.safetensors")
    for name in ("samples.npz", "samples.safetensors"):
        for key, array in read_arrays(tmp_path / name, SIGNATURE).inputs.items():
            np.testing.assert_array_equal(array, good()[key])
            assert array.dtype.isnative
            assert array.flags.writeable  # torch warns of others


def test_labels_alone_are_no_shared_samples(tmp_path: Path) -> None:
    for name, key in (("one.npz", "image"), ("other.npz", "picture")):
        np.savez(tmp_path / name, **{key: good()["image"], "labels": good()["labels"]})
    check_arrays(tmp_path / "one.npz", tmp_path / "other.npz")


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    files = {}
    for name, changed in {
        "whole": good(6),
        "part": {name: array[4:] for name, array in good(6).items()},
        "wrong": {**good(6), "labels": np.arange(5, 11)},
        "alike": {**good(6), "labels": np.full(6, 7)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **changed)
        files[name] = read_arrays(tmp_path / f"{name}.npz", SIGNATURE)
    given: dict[str, Any] = {"signature": SIGNATURE, "example": {}}
    with pytest.raises(RecipeError, match="2 samples are both in"):
        ModuleWorkload(**given, evaluation=files["whole"], calibration=files["part"])
    with pytest.raises(RecipeError, match="labels go from 5 to 10; scores has scores for the classes 0 to 9"):
        ModuleWorkload(**given, evaluation=files["wrong"])
    with pytest.raises(RecipeError, match=r"All samples that judge have the label 7, .*at least two different ones"):
        ModuleWorkload(**given, evaluation=files["alike"])
    maps = dataclasses.replace(SIGNATURE.outputs[0], shape=("batch", 10, 8, 8))
    given["signature"] = dataclasses.replace(SIGNATURE, outputs=(maps,))
    with pytest.raises(RecipeError, match="Labels go with an output of scores"):
        ModuleWorkload(**given, evaluation=files["whole"])


def test_choices_count_where_samples_are_given(tmp_path: Path) -> None:
    """Of random inputs they are near ties."""
    samples = {name: array for name, array in good(6).items() if name != "labels"}
    np.savez(tmp_path / "samples.npz", **samples)
    given: dict[str, Any] = {"signature": SIGNATURE, "example": samples}
    one, other = ([{"scores": np.eye(10)[[index]] * 0.5 + 0.05} for index in order] for order in ((1, 2, 3), (1, 2, 4)))
    evaluation = read_arrays(tmp_path / "samples.npz", SIGNATURE)
    assert ModuleWorkload(**given, evaluation=evaluation).metrics(one, other)["top1_agreement"] == pytest.approx(2 / 3)
    assert "top1_agreement" not in ModuleWorkload(**given).metrics(one, other)


def test_a_fixed_batch_takes_multiples(tmp_path: Path) -> None:
    inputs = (TensorSpec(name="image", dtype="float32", shape=(3, 1, 8, 8)),)
    signature = dataclasses.replace(SIGNATURE, inputs=inputs)
    np.savez(tmp_path / "six.npz", image=good(6)["image"])
    np.savez(tmp_path / "seven.npz", image=good(7)["image"])
    found = read_arrays(tmp_path / "six.npz", signature)
    assert found.calls() == 2
    np.testing.assert_array_equal(found.call(1)["image"], good(6)["image"][3:])
    with pytest.raises(RecipeError, match="7 samples, and the model takes 3 at a time"):
        read_arrays(tmp_path / "seven.npz", signature)


class Digits(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(12)
        self.second = torch.nn.Conv2d(12, 12, 3, padding=1)
        self.head = torch.nn.Linear(12, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(image)))
        x = torch.relu(x + self.second(x))
        return self.head(torch.nn.functional.max_pool2d(x, 2).mean((2, 3)))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A trained network, and test.npz, train.npz and unlabelled.npz in a folder."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: threads cost more than they bring
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32)
    images, first = np.unique(images, axis=0, return_index=True)
    labels = labels[first]
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order].astype(np.int64)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    given, wanted = torch.from_numpy(images[400:]), torch.from_numpy(labels[400:])
    for _ in range(6):
        for part in torch.randperm(len(given)).split(64):
            loss = torch.nn.functional.cross_entropy(model(given[part]), wanted[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "test.npz", image=images[:400], labels=labels[:400])
    np.savez(folder / "unlabelled.npz", image=images[:400])
    np.savez(folder / "train.npz", image=images[400:], labels=labels[400:])
    return model.eval(), folder


def build(digits: tuple[torch.nn.Module, Path], out: Path, **options: Any) -> Any:
    model, _ = digits
    example = (torch.rand(4, 1, 8, 8) * 16,)
    return onnxpress.build(
        model, example_inputs=example, out=out, target="cpu", precision="int8-qdq", measure=False, **options
    )


def test_a_network_is_judged_by_its_labels(digits: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, folder = digits
    artifact = build(digits, tmp_path / "out", file=str(folder / "test.npz"), calibration=str(folder / "train.npz"))
    export, *_, quantized = artifact.manifest.ledger
    assert export["metric"] == "accuracy"
    assert export["quality"] > 75
    assert "evaluated on 400 samples of test.npz" in export["notes"]
    assert quantized["pass"] == "int8-qdq"
    assert quantized["status"] == "kept"
    assert quantized["quality"] >= export["quality"] - 1
    assert quantized["metrics"]["variance_kept"] > 0.99
    assert artifact.manifest.precision == "int8-qdq"
    with np.load(folder / "test.npz") as test:
        scores = onnxpress.load(artifact.path).run({"image": test["image"]})["output_0"]
        accuracy = 100 * float((scores.argmax(axis=1) == test["labels"]).mean())
    assert accuracy == pytest.approx(quantized["quality"], abs=1e-3)


def test_an_onnx_file_is_judged_by_arrays_without_labels(digits: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, folder = digits
    first = onnxpress.build(
        digits[0], example_inputs=(torch.rand(4, 1, 8, 8),), out=tmp_path / "fp32", precision="fp32", measure=False
    )
    files = {"file": str(folder / "unlabelled.npz"), "calibration": str(folder / "train.npz")}
    source = str(first.path / "model.onnx")
    options: dict[str, Any] = {"target": "cpu", "precision": "int8-qdq", "measure": False, **files}
    artifact = onnxpress.build(source, out=tmp_path / "out", passes={"int8-qdq": {"calibration": "mse"}}, **options)
    row = artifact.manifest.ledger[-1]
    assert row["metric"] == "variance_kept"
    assert row["quality"] > 0.99
    operators = {node.op_type for node in onnx.load(artifact.path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_what_wrong_calibration_costs_is_found(digits: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    """Calibrated on inputs of a hundredth of the real ones' size, layers cut most of what they read off: the gate sees it.

    Only a graph with all layers in float would keep the budget, and that is no int8: it is not passed off as one.
    """
    _, folder = digits
    with np.load(folder / "train.npz") as train:
        np.savez(tmp_path / "dark.npz", image=train["image"] / 100)
    with pytest.raises(BudgetError, match=r"int8-qdq was asked for and cannot be kept: over the budget: accuracy \d+"):
        build(digits, tmp_path / "out", file=str(folder / "test.npz"), calibration=str(tmp_path / "dark.npz"))
    assert not (tmp_path / "out").exists()


def test_columns_do_not_go_with_arrays(digits: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, folder = digits
    with pytest.raises(RecipeError, match="columns"):
        build(digits, tmp_path / "out", file=str(folder / "test.npz"), columns={"text": "a"})


def test_a_graph_without_anything_to_quantize_is_an_error_where_that_was_asked_for(tmp_path: Path) -> None:
    given: dict[str, Any] = {"example_inputs": (torch.rand(4, 8),), "target": "cpu", "measure": False}
    built = onnxpress.build(torch.nn.Softmax(dim=1), out=tmp_path / "all", keep_all=True, **given)
    assert built.manifest.ledger[-1]["reason"] == "nothing to change"
    with pytest.raises(
        BudgetError,
        match=r"finds nothing to change: no Conv, MatMul or Gemm.*float32 weights\. Choose another --precision\.$",
    ):
        onnxpress.build(torch.nn.Softmax(dim=1), out=tmp_path / "out", precision="int8-qdq", **given)


def test_what_else_could_be_tried_is_said(tmp_path: Path) -> None:
    given: dict[str, Any] = {"example_inputs": (torch.rand(4, 3, 8, 8),), "target": "cpu", "measure": False}
    with pytest.raises(BudgetError, match=r"0 linear layers.*--precision \(int8-qdq is the one for convolutions\)\.$"):
        onnxpress.build(torch.nn.Conv2d(3, 8, 3), out=tmp_path / "out", precision="int8", **given)
    with pytest.raises(
        BudgetError, match=r"judged by random inputs: give it real ones with --calibration and --eval\."
    ):
        onnxpress.build(torch.nn.Conv2d(3, 8, 3), out=tmp_path / "out", precision="int8-qdq", budget=0.9999999, **given)


def test_large_answers_are_judged_on_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers of the original are in memory, and batches are of few rows then."""
    network = torch.nn.Conv2d(1, 4, 3, padding=1)  # inputs of 1 KiB, answers of 4
    monkeypatch.setattr(module_workload, "_KEPT_BYTES", 80 * 2**10)
    monkeypatch.setattr(module_workload, "_CALL_BYTES", 15 * 2**10)
    batches = []
    run = Session.run

    def counted(session: Session, feeds: Any) -> Any:
        batches.append(len(feeds["input"]))
        return run(session, feeds)

    monkeypatch.setattr(Session, "run", counted)
    example = (torch.randn(1, 1, 16, 16),)
    options: dict[str, Any] = {"precision": "int8-qdq", "budget": "0.5", "target": "cpu", "measure": False}
    artifact = onnxpress.build(network, example_inputs=example, out=tmp_path / "out", **options)
    assert (
        "answers are compared with the original's on 20 calls of 1 samples, as each gives 0.0 MB"
        in artifact.manifest.ledger[0]["notes"]
    )
    assert max(batches) == 3
