"""A pruned graph and the PyTorch module made as small answer alike, and the module exports again, over many architectures."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_decoders import VOCABULARY, save_decoder
from tiny_models import VOCAB, save_model

from onnxpress.calibration import ActivationStream, activations
from onnxpress.errors import ConversionError
from onnxpress.exporters import Exported, export, original, resized
from onnxpress.manifest import Arrays, Signature
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.prune import PruneOptions, prune
from onnxpress.optimizers.targets import target
from onnxpress.parity import Parity
from onnxpress.pruned import Change, Pruned
from onnxpress.workbench import Workbench


def inputs(signature: Signature) -> Iterator[Arrays]:
    """Eight texts of 24 random tokens, one at a time, the cache empty."""
    for seed in range(8):
        random, feeds = np.random.default_rng(seed), {}
        for spec in signature.inputs:
            axes = {"batch": 1, "length": 24, "capacity": 24, "answers": 24}
            shape = [axes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            known = {
                "input_ids": random.integers(5, min(VOCAB, VOCABULARY), shape),
                "attention_mask": np.ones(shape, np.int64),
                "lengths": np.full(shape, 24, np.int32),
                "logit_indices": np.arange(24),
            }
            feeds[spec.name] = known.get(spec.name, np.zeros(shape, spec.dtype))
        yield feeds


def pruned(exported: Exported, bench: Workbench, **options: float) -> Pruned:
    graph = exported.graph.clone()
    for name in ("fold", "fuse-gelu", "fuse-layer-norm", "fuse-attention"):
        graph = make_pass(name).apply(graph, PassContext(target=target("cpu"))).graph
    given = partial(inputs, graph.signature)
    return prune(
        graph,
        PruneOptions(**options, multiple=1),
        stream=partial(ActivationStream, open_session=bench.open, inputs=given),
        activations=partial(activations, open_session=bench.open, inputs=given),
    )


def check(folder: Path, bench: Workbench, *kinds: str, **options: float) -> Pruned:
    """Prune the graph and the module: both, and the module exported again, give the same answers, which are other ones."""
    exported = export(folder)
    module = original(exported.reference)
    assert module is not None
    before = copy.deepcopy(module.state_dict())
    result = pruned(exported, bench, **options)
    for kind in kinds:
        assert any(note.startswith(f"{kind}:") for note in result.notes), result.notes
    smaller = resized(module, result)
    again = export(folder, instead=smaller)
    parity = Parity(again)  # 5e-5 of the largest answer, several shapes, padding, and 20 steps of a language model
    parity.check(bench.open(again.graph))
    parity.check(bench.open(result.graph))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items()), "left as it was"
    count = sum(parameter.numel() for parameter in smaller.parameters())
    assert count < sum(parameter.numel() for parameter in module.parameters())
    Parity(exported).check(bench.open(exported.graph))
    return result


ENCODERS = ("bert", "distilbert", "nomic-bert", "modernbert")
DECODERS = (
    "llama",
    "qwen3",
    "phi3",
    "phi",
    "gpt2",
    "gpt-neox",
    "gptj",
)  # each splits and turns its heads in another way


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", name)
    check(tmp_path / "model", Workbench(tmp_path, target("cpu")), "ffn", "heads", ffn=0.5, heads=1, layers=1)


def test_a_bias_for_each_head_that_all_layers_read(tmp_path: Path) -> None:
    """MPNet's: the same heads go from all layers, and columns from the table of biases."""
    result = check(save_model(tmp_path / "model", "mpnet"), Workbench(tmp_path, target("cpu")), "heads", heads=1)
    assert result.changes["encoder.relative_attention_bias.weight"].after.shape == (32, 3)


@pytest.mark.newest
def test_norms_over_all_heads(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "olmo2")
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    result = check(folder, Workbench(tmp_path, target("cpu")), "heads", heads=1)
    assert any("4 norms over all heads" in note for note in result.notes)
    assert result.changes["model.layers.0.self_attn.q_norm.weight"].after.shape == (32,)


def test_layers_that_share_their_weights(tmp_path: Path) -> None:
    """ALBERT's: one slice for all uses, in the graph and in the module."""
    check(
        save_model(tmp_path / "model", "albert"), Workbench(tmp_path, target("cpu")), "ffn", "heads", ffn=0.5, heads=1
    )


@pytest.mark.newest
@pytest.mark.parametrize("name", DECODERS)
def test_language_models(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path / "model", name)
    check(tmp_path / "model", Workbench(tmp_path, target("cpu")), "ffn", "heads", ffn=0.33, heads=1, layers=1)


@pytest.mark.newest
def test_caches_have_the_heads_that_stay(tmp_path: Path) -> None:
    exported = export(save_decoder(tmp_path / "model", "llama", num_hidden_layers=3))
    result = pruned(exported, Workbench(tmp_path, target("cpu")), heads=1, layers=1)
    caches = {spec.name: spec.shape for spec in result.graph.signature.inputs if "past_key" in spec.name}
    assert len(caches) == 4, "two layers are left, a key and a value each"
    assert {shape[1] for shape in caches.values()} == {1}, "of two key-value heads"


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_heads_that_stand_on_the_axis_of_rows(shared: bool, tmp_path: Path) -> None:
    """DeBERTa's; its positions go through the projections of queries and keys, or have their own."""
    folder = save_model(tmp_path / "model", "deberta-v2", share_att_key=shared)
    result = check(folder, Workbench(tmp_path, target("cpu")), "ffn", "heads", ffn=0.5, heads=1)
    widths = {name: change.after.shape for name, change in result.changes.items() if "_proj.weight" in name}
    assert set(widths.values()) == {(32, 24)}
    assert len(widths) == 2 * (3 if shared else 5)
    assert {lost.groups for lost in result.heads} == {3}


def test_a_model_with_a_head_on_top(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert", tf.AutoModelForSequenceClassification, num_labels=3)
    check(folder, Workbench(tmp_path, target("cpu")), "ffn", "heads", ffn=0.5, heads=0.5)


def test_equal_biases_that_the_graph_holds_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_model(tmp_path / "model", "bert")
    model: Any = tf.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.bias.zero_()
            layer.attention.self.key.bias.zero_()
    model.save_pretrained(folder)
    check(folder, Workbench(tmp_path, target("cpu")), "ffn", "heads", ffn=0.5, heads=1)


def test_a_constant_that_is_no_parameter(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4))
    exported = export(module, example_inputs=(torch.ones(2, 3),))
    result = Pruned(graph=exported.graph, changes={}, heads=(), layers=(), kept_layers=(), notes=())
    array = np.ones((3, 4), np.float32)
    for name, said in (
        ("nowhere.weight", "no parameter of Sequential"),
        ("0.weight", "not the parameter of that name"),
    ):
        wrong = dataclasses.replace(result, changes={name: Change(before=array, after=array)})
        with pytest.raises(ConversionError, match=said):
            resized(module, wrong)


class TwoBlocks(torch.nn.Module):
    """Residual blocks, whose first weights may be one parameter, or copies."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.ModuleList([torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)])
        self.down = torch.nn.ModuleList([torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)])
        if tied:
            self.up[1].weight, self.up[1].bias = self.up[0].weight, self.up[0].bias
        else:
            self.up[1].load_state_dict(self.up[0].state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def test_a_weight_that_layers_share_is_cut_for_both(tmp_path: Path) -> None:
    module = TwoBlocks(tied=True).eval()
    exported = export(module, example_inputs=(torch.randn(4, 32),))
    bench = Workbench(tmp_path, target("cpu"))
    result = pruned_rows(exported, bench, ffn=0.5)
    smaller: Any = resized(module, result)
    assert smaller.up[0].weight is smaller.up[1].weight
    assert smaller.up[1].out_features == 32
    feeds = next(rows_of(32))
    (answer,) = bench.open(result.graph).run(feeds).values()
    with torch.no_grad():
        np.testing.assert_allclose(answer, smaller(torch.from_numpy(feeds["x"])).numpy(), rtol=0, atol=1e-5)


def test_copies_are_refused(tmp_path: Path) -> None:
    module = TwoBlocks(tied=False).eval()
    before = module.up[0].weight.detach().numpy()
    change = Change(before=before, after=before[:32])
    graph = export(module, example_inputs=(torch.randn(4, 32),)).graph
    result = Pruned(graph=graph, changes={"up.0.weight": change}, heads=(), layers=(), kept_layers=(), notes=())
    with pytest.raises(ConversionError, match=r"up\.0\.weight and up\.1\.weight of TwoBlocks hold the same numbers"):
        resized(module, result)


@pytest.mark.newest
def test_copies_of_norms_are_refused(tmp_path: Path) -> None:
    exported = export(save_decoder(tmp_path / "model", "olmo2"))  # whose norms are all ones
    module = original(exported.reference)
    assert module is not None
    with pytest.raises(ConversionError, match=r"k_norm\.weight of Olmo2ForCausalLM hold the same numbers"):
        resized(module, pruned(exported, Workbench(tmp_path, target("cpu")), heads=1))


def test_channels_that_begin_alike_keep_their_own_biases(tmp_path: Path) -> None:
    module = TwoBlocks(tied=True).eval()
    with torch.no_grad():
        module.up[0].weight[:24] = 0
        module.up[0].bias[:24] = torch.randn(24)
    exported = export(module, example_inputs=(torch.randn(4, 32),))
    result = pruned_rows(exported, Workbench(tmp_path, target("cpu")), ffn=12)
    smaller: Any = resized(module, result)
    (stay,) = next(
        change.kept for name, change in result.changes.items() if re.fullmatch(r"up\..\.weight", name)
    ).values()
    assert np.count_nonzero(stay < 24) < 24
    np.testing.assert_array_equal(smaller.up[0].bias.detach(), module.up[0].bias.detach()[torch.from_numpy(stay)])
    feeds = next(rows_of(32))
    (answer,) = Workbench(tmp_path, target("cpu")).open(result.graph).run(feeds).values()
    with torch.no_grad():
        np.testing.assert_allclose(answer, smaller(torch.from_numpy(feeds["x"])).numpy(), rtol=0, atol=1e-5)


def pruned_rows(exported: Exported, bench: Workbench, **options: float) -> Pruned:
    """Of a module that takes rows of 32 numbers."""
    given = partial(rows_of, 32)
    return prune(
        exported.graph,
        PruneOptions(**options, multiple=1),
        stream=partial(ActivationStream, open_session=bench.open, inputs=given),
        activations=partial(activations, open_session=bench.open, inputs=given),
    )


def rows_of(width: int) -> Iterator[Arrays]:
    for seed in range(8):
        yield {"x": np.random.default_rng(seed).standard_normal((4, width)).astype(np.float32)}


def test_layers_that_begin_alike_are_cut_each_in_its_own_way(tmp_path: Path) -> None:
    """torch.nn.TransformerEncoder clones its layer: the graph holds biases of all once, and cut ones under whatever name."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    module = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    exported = export(module, example_inputs=(torch.randn(2, 10, 64),))
    bench = Workbench(tmp_path, target("cpu"))
    name = exported.graph.signature.inputs[0].name

    def given() -> Iterator[Arrays]:
        for seed in range(8):
            yield {name: np.random.default_rng(seed).standard_normal((2, 10, 64)).astype(np.float32)}

    graph = exported.graph.clone()
    for step in ("fold", "fuse-gelu", "fuse-layer-norm", "fuse-attention"):
        graph = make_pass(step).apply(graph, PassContext(target=target("cpu"))).graph
    result = prune(
        graph, PruneOptions(ffn=0.5),
        stream=partial(ActivationStream, open_session=bench.open, inputs=given),
        activations=partial(activations, open_session=bench.open, inputs=given),
    )  # fmt: skip
    smaller = resized(module, result)
    feeds = next(given())
    (answer,) = bench.open(result.graph).run(feeds).values()
    with torch.no_grad():
        np.testing.assert_allclose(answer, smaller(torch.from_numpy(feeds[name])).numpy(), rtol=0, atol=1e-5)
