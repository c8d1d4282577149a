"""Experts of any layout become one operator, or stay as they were, with a note."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_decoders import ARCHITECTURES, CONTEXT, make_model, save_byte_tokenizer, save_decoder, step_on
from tiny_models import OnnxRunner, spread_weights
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.integrations.moe import use_experts_implementation

from onnxpress.exporters import DecoderParityCheck, Exported, ParityCheck, export
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.experts import ExpertsForm, Gate
from onnxpress.exporters.tasks import TASKS
from onnxpress.exporters.transformers_decoder import DecoderReference, export_causal_lm, export_decoder
from onnxpress.graph import Graph
from onnxpress.graph_files import save
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target
from onnxpress.runtime.session import Session

pytestmark = pytest.mark.newest

MOE = "com.microsoft::MoE"
SILU = Gate(alpha=1.0, beta=0.0, limit=math.inf)
Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def exported(model: Any, **options: Any) -> Graph:
    return export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT, **options)


def check(model: Any, graph: Graph, folder: Path) -> None:
    checked = Exported(name="experts", graph=graph, reference=DecoderReference(model), options={})
    DecoderParityCheck(checked).check(lambda: step_on(graph, folder))


def with_experts_of(
    model: Any, *, transposed: bool = False, interleaved: bool = False, bias: bool = False, gated: Activation = SILU
) -> Any:
    """The model with experts that are stored in another way, as transformers' interface allows it."""

    @use_experts_implementation(is_transposed=transposed, is_concatenated=not interleaved, has_bias=bias)
    class Experts(torch.nn.Module):
        def __init__(self, config: Any, experts: int, hidden: int, inner: int) -> None:
            super().__init__()
            self.num_experts = experts
            for name, out, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
                shape = (width, out) if transposed else (out, width)
                setattr(self, name, torch.nn.Parameter(torch.randn(experts, *shape) * 0.2))
                setattr(self, f"{name}_bias", torch.nn.Parameter(torch.randn(experts, out)) if bias else None)

        def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
            gate, up = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, dim=-1)
            return gated(gate, up)

        def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            answer = torch.zeros_like(x)
            for token, (chosen, shares) in enumerate(zip(index, weights, strict=True)):
                for expert, share in zip(chosen.tolist(), shares, strict=True):
                    one = x[token]
                    for name in ("gate_up_proj", "down_proj"):
                        weight, added = getattr(self, name)[expert], getattr(self, f"{name}_bias")
                        one = (weight.T if transposed else weight) @ one + (0 if added is None else added[expert])
                        one = self._apply_gate(one) if name == "gate_up_proj" else one
                    answer[token] += share * one
            return answer

    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp.experts = Experts(model.config, 4, 64, 96)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_becomes_the_operator(transposed: bool, interleaved: bool, bias: bool, tmp_path: Path) -> None:
    model = with_experts_of(make_model("mixtral"), transposed=transposed, interleaved=interleaved, bias=bias)
    forms = learn(model, positions=CONTEXT).experts
    assert set(forms.values()) == {ExpertsForm(transposed=transposed, interleaved=interleaved, gate=SILU)}
    graph = exported(model)
    assert graph.operators()[MOE] == 2
    check(model, graph, tmp_path)
    tokens = [np.random.default_rng(0).integers(0, 300, 12).tolist()]
    expected = step_on(graph, tmp_path).run(0, tokens).copy()
    pressed = make_pass("int8-weights").apply(graph, PassContext(target=target("cpu"))).graph
    found = step_on(pressed, tmp_path).run(0, tokens)
    assert np.square(found - expected).mean() < 0.2**2 * np.square(expected).mean()  # biases are where they were


def test_the_weights_are_there_once_and_named_after_their_module() -> None:
    model = make_model("qwen3-moe")
    graph = exported(model)
    nodes = [node for node in graph.model.graph if node.op_type == "MoE"]
    assert [node.name for node in nodes] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    gate_up = nodes[0].inputs[2]
    assert gate_up is not None
    assert isinstance(gate_up.const_value, ir.LazyTensor)  # no copy lies in memory
    stored = model.model.layers[0].mlp.experts.gate_up_proj.detach().numpy()
    np.testing.assert_array_equal(gate_up.const_value.numpy()[:, 0::2], stored[:, :32])
    np.testing.assert_array_equal(gate_up.const_value.numpy()[:, 1::2], stored[:, 32:])
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert graph.weight_bytes() <= weights + 2 * CONTEXT * 16 // 2 * 4 + 1024  # and cosines and sines


@pytest.mark.parametrize("gate", [
    Gate(alpha=1.702, beta=1.0, limit=7.0), Gate(alpha=1.0, beta=0.0, limit=0.25)
], ids=str)  # fmt: skip
def test_gates_are_told_from_their_answers(gate: Gate, tmp_path: Path) -> None:
    model = with_experts_of(make_model("mixtral"), gated=gate)
    assert {form and form.gate for form in learn(model, positions=CONTEXT).experts.values()} == {gate}
    graph = exported(model)
    check(model, graph, tmp_path)
    tokens = [np.random.default_rng(0).integers(0, 300, 12).tolist()]
    expected = step_on(graph, tmp_path).run(0, tokens).copy()
    pressed = make_pass("int8-weights").apply(graph, PassContext(target=target("cpu"))).graph
    assert pressed.operators()["com.microsoft::QMoE"] == 2
    found = step_on(pressed, tmp_path).run(0, tokens)
    assert np.square(found - expected).mean() < 0.01 * np.square(expected).mean()


def silu_within(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A limit behind the SiLU, which is no gate of the operator, and which the numbers of a forward pass do not meet."""
    return torch.nn.functional.silu(gate).clamp(max=1000.0) * up


@pytest.mark.parametrize("gated", [lambda gate, up: torch.nn.functional.gelu(gate) * up, silu_within])
def test_experts_that_fit_no_form_stay_as_the_model_computes_them(gated: Activation, tmp_path: Path) -> None:
    model = with_experts_of(make_model("mixtral"), gated=gated)
    assert set(learn(model, positions=CONTEXT).experts.values()) == {None}
    graph = exported(model)
    assert MOE not in graph.operators()
    check(model, graph, tmp_path)
    pressed = make_pass("int4-weights").apply(graph, PassContext(target=target("cpu"))).graph
    assert "com.microsoft::QMoE" not in pressed.operators()
    save(pressed, tmp_path / "pressed.onnx")
    Session(tmp_path / "pressed.onnx", signature=graph.signature)


def test_a_token_with_one_expert_twice_is_met_wherever_it_stands() -> None:
    class LastTokenTwice(torch.nn.Module):
        def __init__(self, router: torch.nn.Module) -> None:
            super().__init__()
            self.router = router

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found: list[torch.Tensor] = [part.clone() for part in self.router(x)]
            next(part for part in found if not part.is_floating_point())[-1] = 0  # which experts
            return tuple(found)

    model = make_model("mixtral")
    first, second = (layer.mlp for layer in model.model.layers)
    first.gate = LastTokenTwice(first.gate)
    forms = learn(model, positions=CONTEXT).experts
    assert forms[first.experts] is None
    assert forms[second.experts] is not None


@pytest.mark.parametrize(("activation", "uniform_steps", "note"), [
    ("silu", False, "2 mixtures of experts as MoE"),
    ("gelu", False, "2 mixtures of experts fit no operator here"),
    ("silu", True, "2 mixtures of experts fit no operator here"),
])  # fmt: skip
def test_what_became_of_the_experts_is_said(activation: str, uniform_steps: bool, note: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, "olmoe", hidden_act=activation)
    found = export_decoder(
        tmp_path,
        TASKS["text-generation"],
        AutoConfig.from_pretrained(tmp_path),
        trust_remote_code=False,
        max_length=None,
        adapter=None,
        hidden_states=False,
        uniform_steps=uniform_steps,
    )
    assert [line for line in found.notes if "mixtures" in line and line.startswith(note)]
    assert (MOE in found.graph.operators()) == ("as MoE" in note)


@pytest.mark.parametrize(("name", "on_cuda"), [("qwen3-moe", False), ("mixtral", False), ("mixtral", True)])
def test_a_classifier_of_experts(name: str, on_cuda: bool, tmp_path: Path) -> None:
    config = ARCHITECTURES[name]()
    config.num_labels, config.pad_token_id = 3, 0
    model = AutoModelForSequenceClassification.from_config(config)
    spread_weights(model)
    model.save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    before = model.config._experts_implementation
    found = export(tmp_path, emit_experts=not on_cuda)
    ParityCheck(found).check(OnnxRunner(found.graph.model, tmp_path))
    assert found.graph.operators().get(MOE, 0) == (0 if on_cuda else 2)
    assert [
        line for line in found.notes if line.startswith(f"2 mixtures of experts {'fit no' if on_cuda else 'as MoE'}")
    ]
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("precision", [None, "int8-weights", "int4-weights"])
@pytest.mark.parametrize("name", ["qwen3-moe", "glm4-moe"])
def test_padding_that_is_no_number_stays_in_its_place(name: str, precision: str | None, tmp_path: Path) -> None:
    """GroupQueryAttention leaves at padding what was in memory; here a token without numbers stands for that."""
    graph = exported(make_model(name))
    if precision is not None:
        graph = make_pass(precision).apply(graph, PassContext(target=target("cpu"))).graph
    poison = 7
    (table,) = [
        node.inputs[0 if node.op_type == "Gather" else 2]
        for node in graph.model.graph
        if node.op_type in ("Gather", "GatherBlockQuantized") and "embed_tokens" in str(node.inputs[0])
    ]
    assert table is not None
    assert table.const_value is not None
    numbers = table.const_value.numpy().copy()
    numbers[poison] = np.nan
    table.const_value = ir.tensor(numbers, name=table.name)
    save(graph, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", signature=graph.signature)
    feeds: dict[str, Any] = {
        spec.name: np.zeros((3, *(64 if axis == "capacity" else axis for axis in spec.shape[1:])), np.float32)
        for spec in graph.signature.inputs
        if spec.name.startswith("past_key_values")
    }
    counts = np.array([12, 1, 5], np.int32)
    feeds |= {"past_lengths": np.zeros(3, np.int32), "lengths": counts}
    answers = []
    for padding in (3, poison):
        ids = np.full((3, 12), padding)
        for row, count in enumerate(counts):
            ids[row, :count] = 20 + 13 * row + np.arange(count)
        every = np.concatenate([row * 12 + np.arange(count) for row, count in enumerate(counts)])
        answers.append(session.run(feeds | {"input_ids": ids, "logit_indices": every})["logits"].copy())
        last = session.run(feeds | {"input_ids": ids, "logit_indices": np.array([23])})["logits"]
        assert np.isnan(last).all() == (padding == poison)  # the padding is what it was meant to be
    assert np.isfinite(answers[1]).all()
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-5 * np.abs(answers[0]).max())
