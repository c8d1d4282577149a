"""Checkpoints whose weights are stored in fewer bits load as the numbers that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import make_model
from tiny_models import save_model

from onnxpress.errors import SourceError
from onnxpress.exporters.tasks import TASKS
from onnxpress.exporters.trainable import Head, load_trainable
from onnxpress.exporters.transformers_model import load_config, load_model

pytestmark = pytest.mark.newest

FOUR_BITS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # E2M1; the fourth bit is the sign


def save(model: Any, state: dict[str, torch.Tensor], stored: dict[str, Any] | None, folder: Path) -> None:
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    more = {} if stored is None else {"quantization_config": stored}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Any:
    config = load_config(folder, trust_remote_code=False)
    model, notes = load_model(folder, TASKS["text-generation"], config, trust_remote_code=False)
    assert notes == ()
    return model


def test_mxfp4(tmp_path: Path) -> None:
    model = make_model("gpt-oss")
    random = np.random.default_rng(0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, rows = state.pop(name).shape
        codes = torch.tensor(random.integers(0, 16, (experts, rows, width // 32, 32), dtype=np.uint8))
        exponents = torch.tensor(random.integers(-6, 0, (experts, rows, width // 32)))
        state[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        state[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        numbers = FOUR_BITS[codes.long() & 7] * torch.where(codes > 7, -1.0, 1.0) * 2.0 ** exponents[..., None]
        with torch.no_grad():
            model.get_parameter(name).copy_(numbers.reshape(experts, rows, width).mT)
    save(model, state, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tmp_path)
    assert_alike(load(tmp_path), model)


def test_fp8_in_blocks(tmp_path: Path) -> None:
    model = make_model("qwen3")
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name in [name for name in state if name.endswith("proj.weight")]:
        weight = state[name]
        blocks = tuple(-(-side // 32) for side in weight.shape)
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.001
        wide = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
        state[name] = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scales
        with torch.no_grad():
            model.get_parameter(name).copy_(state[name].float() * wide)
    stored = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    save(model, state, stored, tmp_path)
    assert_alike(load(tmp_path), model)


def test_fp8_with_one_scale_a_layer(tmp_path: Path) -> None:
    """As Ministral 3 has it, with scales for activations beside them."""
    model = make_model("qwen3")
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name in [name for name in state if name.endswith("proj.weight")]:
        scale = (state[name].abs().max() / 448).to(torch.bfloat16)
        state[name] = (state[name] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale
        state[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(0.02, dtype=torch.bfloat16)
        with torch.no_grad():
            model.get_parameter(name).copy_(state[name].float() * scale.float())
    stored = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    save(model, state, stored, tmp_path)
    assert_alike(load(tmp_path), model)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt", "not-heard-of"])
def test_other_forms_are_refused_before_any_weight_is_read(method: str, tmp_path: Path) -> None:
    save(make_model("llama"), {}, {"quant_method": method}, tmp_path)
    with pytest.raises(SourceError, match=rf"quantized \(form: {method}\); of such forms, mxfp4 and fp8 are read"):
        load(tmp_path)


def test_scales_that_nothing_reads_are_no_numbers_to_leave_out(tmp_path: Path) -> None:
    model = make_model("llama")
    state = {**model.state_dict(), "model.layers.0.mlp.up_proj.weight_scale": torch.ones(())}
    save(model, state, None, tmp_path)
    with pytest.raises(
        SourceError, match=r"up_proj\.weight_scale is among them, and config\.json does not say in which form"
    ):
        load(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(SourceError, match="form: ModelOpt's"):
        load(tmp_path)


def test_scales_of_activations_beside_numbers_that_were_unfolded_are_left_out(tmp_path: Path) -> None:
    model = make_model("qwen3")
    name = "model.layers.0.mlp.up_proj.weight"
    state = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    state[name] = state[name].to(torch.float8_e4m3fn)
    state |= {f"{name}_scale_inv": torch.ones(-(-state[name].shape[0] // 32), -(-state[name].shape[1] // 32))}
    state |= {"model.layers.0.mlp.up_proj.input_scale": torch.ones(())}
    stored = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic",
              "modules_to_not_convert": [key.removesuffix(".weight") for key in state if key.endswith("proj.weight") and key != name]}  # fmt: skip
    save(model, state, stored, tmp_path)
    config = load_config(tmp_path, trust_remote_code=False)
    found, notes = load_model(tmp_path, TASKS["text-generation"], config, trust_remote_code=False)
    assert torch.equal(found.get_parameter(name), state[name].float())
    assert notes == (
        "not of this model, and left out: 1 of the files' weights (model.layers.0.mlp.up_proj.input_scale)",
    )


def test_a_parameter_that_is_called_scales_is_no_sign_of_quantized_weights(tmp_path: Path) -> None:
    model = make_model("llama")
    save(model, model.state_dict() | {"model.adapter.scales": torch.ones(3)}, None, tmp_path)
    config = load_config(tmp_path, trust_remote_code=False)
    assert load_model(tmp_path, TASKS["text-generation"], config, trust_remote_code=False)[1]


def test_training_refuses_what_a_build_refuses(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert")
    head = Head(task="text-classification", labels=("a", "b"), problem_type="single_label_classification")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    for change, said in (
        ({f"{name}_scale": torch.ones(())}, "are quantized: .*weight_scale is among them"),
        ({name: torch.ones(7, 7)}, r"dense\.weight is \(7, 7\) in the files and \("),
    ):
        save_file(weights | change, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match=said):
            load_trainable(folder, head, seed=0)


def test_weights_that_the_model_does_not_have_are_said(tmp_path: Path) -> None:
    model = make_model("llama")
    more = {f"model.layers.0.self_attn.{name}_proj.bias": torch.ones(8) for name in "qkv"}
    save(model, model.state_dict() | more, None, tmp_path)
    config = load_config(tmp_path, trust_remote_code=False)
    _, notes = load_model(tmp_path, TASKS["text-generation"], config, trust_remote_code=False)
    assert notes == (
        "not of this model, and left out: 3 of the files' weights (model.layers.0.self_attn.k_proj.bias, …)",
    )


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    model = make_model("llama")
    shape = tuple(model.model.norm.weight.shape)
    save(model, model.state_dict() | {"model.norm.weight": torch.ones(3)}, None, tmp_path)
    with pytest.raises(SourceError) as caught:
        load(tmp_path)
    assert f"model.norm.weight is (3,) in the files and {shape} in the model" in str(caught.value)


def assert_alike(found: Any, expected: Any) -> None:
    weights = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == set(weights)
    for name, parameter in found.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, weights[name], rtol=1e-6, atol=0, msg=name)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        SourceError, match=r"damaged: model\.layers\.1\.mlp\.up_proj\.weight holds numbers that are not"
    ):
        load(tmp_path)
