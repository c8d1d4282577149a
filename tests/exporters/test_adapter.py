"""LoRA adapters: merged as peft would, or refused with the model unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_decoders import ARCHITECTURES, make_model, save_decoder

from onnxpress.errors import SourceError
from onnxpress.exporters import export
from onnxpress.exporters.adapter import merge_adapter

LAYER = "model.layers.1.self_attn.q_proj"


def save_adapter(
    folder: Path,
    more: dict[str, torch.Tensor] | None = None,
    *,
    layer: str = LAYER,
    width: int = 64,
    rank: int = 4,
    **config: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"base_model.model.{layer}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"base_model.model.{layer}.lora_B.weight": torch.randn(64, rank, generator=generator),
    }
    weights |= {f"base_model.model.{name}": tensor for name, tensor in (more or {}).items()}
    save_file(weights, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_merged_model_answers_as_base_and_adapter_side_by_side(
    tmp_path: Path, stabilized: bool, scale: float
) -> None:
    adapter = save_adapter(tmp_path / "adapter", use_rslora=stabilized)
    base, merged = make_model("llama"), make_model("llama")
    note = merge_adapter(merged, adapter)
    assert note == "LoRA adapter of rank 4 merged into 1 layers"

    down, up = load_file(adapter / "adapter_model.safetensors").values()

    def beside(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + scale * (inputs[0] @ down.T @ up.T)

    ids = torch.arange(30)[None]
    with torch.no_grad(), base.get_submodule(LAYER).register_forward_hook(beside):
        expected = base(input_ids=ids).logits
    with torch.no_grad():
        # Float32 sums in another order; logits go to 5.2, and 6e-5 was seen with AVX512.
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-5)
        assert not torch.allclose(make_model("llama")(input_ids=ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize(
    "before", ["model.language_model.", "language_model.model.", "model.", "model.vision_tower.", ""]
)
def test_a_language_model_is_found_where_it_lies(tmp_path: Path, before: str) -> None:
    whole = torch.full((64,), 2.0)
    more = {f"{before}layers.0.input_layernorm.weight": whole}
    adapter = save_adapter(tmp_path / "adapter", more, layer=f"{before}layers.1.self_attn.q_proj")
    seeing = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Mistral3Config(text_config=ARCHITECTURES["mistral"]().to_dict(), vision_config=seeing)
    for model, place in (
        (tf.Mistral3ForConditionalGeneration(config), "model.language_model."),
        (make_model("mistral"), "model."),
    ):
        weight = model.get_parameter(f"{place}layers.1.self_attn.q_proj.weight")
        original = weight.clone()
        if "vision" in before:
            with pytest.raises(SourceError, match=r"has (no layer|a weight) 'model\.vision_tower\."):
                merge_adapter(model, adapter)
            assert torch.equal(weight, original)
        else:
            assert merge_adapter(model, adapter).endswith("into 1 layers, whole weights taken from it: 1")
            assert not torch.equal(weight, original)
            assert torch.equal(model.get_parameter(f"{place}layers.0.input_layernorm.weight"), whole)


def test_layers_may_have_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    adapter = save_adapter(
        tmp_path / "adapter", r=16, rank_pattern={"v_proj": 2, "q_proj": 4}, alpha_pattern={f"^{LAYER}": 12}
    )
    base, merged = make_model("llama"), make_model("llama")
    assert merge_adapter(merged, adapter) == "LoRA adapter of rank 4 merged into 1 layers"
    down, up = load_file(adapter / "adapter_model.safetensors").values()
    expected = base.get_submodule(LAYER).weight + 12 / 4 * up @ down
    torch.testing.assert_close(merged.get_submodule(LAYER).weight, expected)


def test_magnitudes_are_the_lengths_of_rows(tmp_path: Path) -> None:
    magnitudes = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    adapter = save_adapter(tmp_path / "adapter", {f"{LAYER}.lora_magnitude_vector": magnitudes}, use_dora=True)
    merged = make_model("llama")
    tensors = load_file(adapter / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{LAYER}.lora_{part}.weight"] for part in "AB")
    turned = make_model("llama").get_submodule(LAYER).weight + 2 * up @ down
    merge_adapter(merged, adapter)
    found = merged.get_submodule(LAYER).weight
    torch.testing.assert_close(found.norm(dim=1), magnitudes)
    assert torch.nn.functional.cosine_similarity(found, turned).min() > 0.99999


def test_embeddings_and_whole_weights(tmp_path: Path) -> None:
    """As peft saves them: the weight below a LoRA of an embedding, biases that were trained, modules_to_save."""
    base, merged = make_model("llama", attention_bias=True), make_model("llama", attention_bias=True)
    words, width = base.model.embed_tokens.weight.shape
    random = torch.Generator().manual_seed(3)
    more = {
        "model.embed_tokens.base_layer.weight": base.model.embed_tokens.weight.detach().clone(),
        "model.embed_tokens.lora_embedding_A": torch.randn(4, words, generator=random),
        "model.embed_tokens.lora_embedding_B": torch.randn(width, 4, generator=random),
        f"{LAYER}.base_layer.bias": torch.randn(64, generator=random),
        "lm_head.weight": torch.randn(words, width, generator=random),
    }
    note = merge_adapter(merged, save_adapter(tmp_path / "adapter", more, bias="all", modules_to_save=["lm_head"]))
    assert note == "LoRA adapter of rank 4 merged into 2 layers, whole weights taken from it: 2"
    delta = 2 * (more["model.embed_tokens.lora_embedding_B"] @ more["model.embed_tokens.lora_embedding_A"]).T
    torch.testing.assert_close(merged.model.embed_tokens.weight, base.model.embed_tokens.weight + delta)
    assert torch.equal(merged.get_submodule(LAYER).bias, more[f"{LAYER}.base_layer.bias"])
    assert torch.equal(merged.lm_head.weight, more["lm_head.weight"])


def test_whole_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wide = save_adapter(tmp_path / "wide", {"lm_head.weight": torch.ones(999, 64)})
    with pytest.raises(SourceError, match=r"a weight 'lm_head\.weight' of \(999, 64\), LlamaForCausalLM has one of \("):
        merge_adapter(make_model("llama"), wide)
    model = make_model("llama", tie_word_embeddings=True, vocab_size=64)
    same = save_adapter(tmp_path / "same", {"lm_head.weight": model.lm_head.weight.detach().clone()})
    assert merge_adapter(model, same) == "LoRA adapter of rank 4 merged into 1 layers"
    other = save_adapter(tmp_path / "other", {"lm_head.weight": torch.ones(64, 64)})
    with pytest.raises(SourceError, match="changes 'lm_head', whose weight is tied to another layer's"):
        merge_adapter(model, other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": "model.layers.7.self_attn.q_proj"}, "LlamaForCausalLM has no layer 'model.layers.7.self_attn.q_proj'"),
        ({"width": 32}, r"has a weight of \(64, 64\), the adapter adds \(64, 32\)"),
        ({"lora_bias": True}, "asks for lora_bias, which is not merged here"),
        ({"trainable_token_indices": [1]}, "asks for trainable_token_indices"),
        ({"rank_pattern": {"(q|v)_proj": 8}}, "rank_pattern is .* numbers by names of layers, or by their ends"),
        ({"alpha_pattern": {"q_proj": -1}}, "lora_alpha is -1; a positive number is expected"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"r": 8}, "says that its rank is 8"),
        ({"peft_type": "IA3"}, "of type 'IA3'; LORA is merged"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    model = make_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(SourceError, match=message):
        merge_adapter(model, save_adapter(tmp_path / "adapter", **given))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_tied_weight_is_not_changed_behind_the_other_layers_back(tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True, vocab_size=64)
    with pytest.raises(SourceError, match="tied to another layer's"):
        merge_adapter(model, save_adapter(tmp_path / "adapter", layer="lm_head"))


def test_folders_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    with pytest.raises(SourceError, match="is no adapter folder"):
        merge_adapter(model, tmp_path)
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(SourceError, match="cannot be read"):
        merge_adapter(model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="safetensors alone"):
        merge_adapter(model, adapter)


def test_a_folder_that_is_no_adapter_is_said_before_its_base_is_loaded(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"cannot be loaded")
    with pytest.raises(SourceError, match="is no adapter folder"):
        export(base, adapter=tmp_path)
