"""A language model whose large weights stay in half precision is the one that they are in float32, in PyTorch and as a graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import save_decoder

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters import Exported, export, find, half_weights, share_weights, transformers_model
from onnxpress.exporters.half_weights import HalfWeights, put_weights, stored_half
from onnxpress.exporters.tasks import find_task
from onnxpress.exporters.transformers_model import fitting_dtype
from onnxpress.graph import Widened
from onnxpress.optimizers.targets import target
from onnxpress.parity import Parity
from onnxpress.workbench import Workbench

pytestmark = pytest.mark.newest

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def saved_in_half(folder: Path, name: str, dtype: torch.dtype, **more: Any) -> Path:
    file = save_decoder(folder, name, **more) / "model.safetensors"
    weights = {key: weight.to(dtype) for key, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def in_half(folder: Path, dtype: torch.dtype) -> Exported:
    return export(dataclasses.replace(find(folder), dtype=dtype))


# Tied and untied, stored as (in, out), with norms of an offset and buffers of their own, with states, and with parts that are views.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen2", "bfloat16"),
        ("qwen3", "float16"),
        ("gpt2", "bfloat16"),
        ("gemma3", "bfloat16"),
        ("gemma4", "bfloat16"),
        ("qwen3.5", "float16"),
    ],
)
def test_weights_in_half_precision_answer_as_in_float32(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_weights, "_LARGE", 4000)
    folder = saved_in_half(tmp_path / "model", name, HALVES[dtype])
    whole, half = export(folder), in_half(folder, HALVES[dtype])
    assert f"large weights stayed in {dtype} while it was built: memory does not hold them in float32" in half.notes
    ids = np.arange(3, 40)
    answers: list[Any] = [one.reference.logits(ids, [5, 36]) for one in (whole, half)]  # type: ignore[attr-defined]
    assert np.array_equal(*answers)

    bench = Workbench(tmp_path / "work", target("cpu"), measure=False)
    module: torch.nn.Module = half.reference.module  # type: ignore[attr-defined]
    share_weights(module, half.graph, bench.write_weights)
    assert {weight.dtype for weight in module.parameters()} == {torch.float32, HALVES[dtype]}
    again: Any = half.reference.logits(ids, [5, 36])  # type: ignore[attr-defined]
    # Weights that lie otherwise in memory are summed in another order: differences of 2e-6 were seen, of logits up to 3.
    np.testing.assert_allclose(again, answers[0], rtol=1e-5, atol=1e-5)
    constants = [
        {key: value.const_value for key, value in one.graph.model.graph.initializers.items()} for one in (whole, half)
    ]
    assert constants[0].keys() == constants[1].keys()
    for key, constant in constants[0].items():
        other = constants[1][key]
        assert constant is not None
        assert other is not None
        assert other.dtype == constant.dtype
        assert np.array_equal(other.numpy(), constant.numpy()), key
    widened = [constant for constant in constants[1].values() if isinstance(constant, Widened)]
    assert len(widened) > 8
    assert half.graph.weight_bytes() == whole.graph.weight_bytes()
    saved = sum(constant.nbytes // 2 for constant in widened)
    file = (tmp_path / "work" / "weights.data").stat().st_size
    assert file < half.graph.weight_bytes() - saved + 4096 * len(constants[1])

    session = bench.open(half.graph)
    assert Parity(half).check(session)


def test_a_layer_that_fails_has_its_weight_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_weights, "_LARGE", 100)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).bfloat16()
    kept = [layer.weight for layer in model if isinstance(layer, torch.nn.Linear)]
    HalfWeights(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(1, 3))
    assert [layer.weight for layer in model if isinstance(layer, torch.nn.Linear)] == kept
    assert [weight.dtype for weight in model.parameters()] == [torch.bfloat16, torch.float32] * 2
    with torch.inference_mode():
        inside = model(torch.ones(1, 8))
    assert torch.equal(model(torch.ones(1, 8)), inside)


def test_layers_in_layers_do_not_share_the_memory_that_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 8))
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.inner(x), self.weight)

    monkeypatch.setattr(half_weights, "_LARGE", 100)
    torch.manual_seed(0)
    model, x = Outer().half(), torch.randn(3, 8)
    expected = torch.nn.functional.linear(
        torch.nn.functional.linear(x, model.inner.weight.float(), model.inner.bias.float()), model.weight.float()
    )
    HalfWeights(model)
    assert torch.equal(model(x), expected)


def test_buffers_that_were_rounded_are_made_anew() -> None:
    """One that several modules have, and one that the files gave."""

    def made() -> torch.nn.Module:
        model, shared = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), torch.tensor(0.1)
        for layer in model:
            layer.register_buffer("factor", shared, persistent=False)
        model.register_buffer("loaded", torch.tensor(3.0))
        return model

    model = made().bfloat16()
    model.loaded.fill_(0.3)  # type: ignore[operator, union-attr]
    with half_weights.without_parameters():
        skeleton = made()
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}
    half_weights.widen_buffers(model, skeleton)
    found = dict(model.named_buffers(remove_duplicate=False))
    assert {name: buffer.dtype for name, buffer in found.items()} == dict.fromkeys(found, torch.float32)
    assert found["0.factor"] == found["1.factor"] == torch.tensor(0.1)
    assert found["loaded"] == torch.tensor(0.3, dtype=torch.bfloat16).float()
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_how_weights_are_stored(tmp_path: Path) -> None:
    assert stored_half(tmp_path) is None
    file = tmp_path / "model.safetensors"
    for dtypes, found in (
        (("bfloat16", "bfloat16"), torch.bfloat16),
        (("float16", "float16"), torch.float16),
        (("float32", "float32"), None),
        (("bfloat16", "float32"), None),
        (("bfloat16", "float16"), None),
    ):
        tensors = {str(index): torch.zeros(2, dtype=getattr(torch, dtype)) for index, dtype in enumerate(dtypes)}
        save_file({**tensors, "count": torch.zeros(1, dtype=torch.int64)}, file)
        assert stored_half(tmp_path) == found
    file.write_bytes(b"are no weights")
    assert stored_half(tmp_path) is None


def test_constants_that_are_made_of_weights_are_refused() -> None:
    """Their numbers are not there while a model is traced."""
    memory, half = np.zeros((8, 16), np.float32), torch.ones(8, 16, dtype=torch.float16)
    for part in (memory[2:, :12], memory.reshape(16, 8)):
        value = ir.Value(name="part", const_value=ir.Tensor(part))
        model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)
        with pytest.raises(ConversionError, match="part is a part of a weight"):
            put_weights(model, {memory.ctypes.data: half})
    value = ir.Value(name="whole", const_value=ir.Tensor(memory.T))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)
    put_weights(model, {memory.ctypes.data: half})
    assert value.const_value is not None
    assert np.array_equal(value.const_value.numpy(), np.ones((16, 8)))


def test_half_precision_is_for_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_model, "_PROCESS_TAKES", 0)
    folder = saved_in_half(tmp_path / "model", "llama", torch.bfloat16, hidden_size=256)
    found = find(folder)
    weights = (folder / "model.safetensors").stat().st_size // 2

    def fits(free: float, *, half: bool = True) -> torch.dtype:
        return fitting_dtype(folder, find_task(found.task), found.config, int(free), half=half)

    assert fits(4.5 * weights) == torch.float32
    assert fits(3 * weights) == torch.bfloat16
    with pytest.raises(
        SourceError, match=r"without pruning or an adapter\) keeps them in bfloat16, and takes 0\.0 GiB\. Build it"
    ):
        fits(3 * weights, half=False)
    with pytest.raises(
        SourceError,
        match=r"takes 0\.0 GiB of memory, and 0\.0 in bfloat16, as it is stored, and 0\.0 GiB are free\. Build it",
    ):
        fits(weights)

    monkeypatch.setattr(transformers_model, "_SMALLEST_STACK", 1000)
    other = saved_in_half(tmp_path / "experts", "qwen3-moe", torch.bfloat16)
    config = find(other).config
    with pytest.raises(SourceError, match=r"free\. Build it on a machine with more"):
        fitting_dtype(
            other, find_task(found.task), config, 3 * (other / "model.safetensors").stat().st_size // 2, half=True
        )


def test_what_half_precision_is_not_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_weights, "_LARGE", 1000)
    folder = saved_in_half(tmp_path / "model", "mamba2", torch.bfloat16)
    with pytest.raises(ConversionError, match=r"stayed in half precision, .* build it on a machine with more memory"):
        in_half(folder, torch.bfloat16)
