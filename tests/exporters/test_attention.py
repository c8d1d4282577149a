"""The attention switch: what it emits, and that it leaves the model as it was."""

import pytest
import torch
import transformers as tf
from tiny_models import CONFIGS, OnnxRunner, load_text_model, save_model

from onnxpress.errors import ConversionError
from onnxpress.exporters import ParityCheck, export
from onnxpress.exporters.attention import fused_attention
from onnxpress.exporters.trace import trace

IDS = torch.arange(4, 24).reshape(2, 10)
MASK = (torch.arange(10)[None] < torch.tensor([10, 6])[:, None]).long()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_model_is_the_same_afterwards(implementation, tmp_path):
    model = tf.AutoModel.from_pretrained(
        save_model(tmp_path / "model", "bert"), attn_implementation=implementation
    ).eval()
    before = _answer(model)
    with fused_attention(model):
        assert model.config._attn_implementation != implementation
    assert model.config._attn_implementation == implementation
    assert torch.equal(_answer(model), before)


def test_model_is_the_same_after_an_error(tmp_path):
    model = load_text_model(save_model(tmp_path / "model", "bert"))
    before = _answer(model)
    with pytest.raises(RuntimeError, match="in the middle"), fused_attention(model):
        raise RuntimeError("in the middle")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(_answer(model), before)


def test_model_is_the_same_after_an_export_that_fails(tmp_path):
    model = load_text_model(save_model(tmp_path / "model", "bert"))
    before = _answer(model)

    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            hidden = self.model(input_ids=inputs[0]).last_hidden_state
            return (hidden if hidden.sum() > 0 else -hidden,)  # a branch on data cannot be traced

    with pytest.raises(ConversionError, match="Branching does not convert"), fused_attention(model):
        trace(
            Branching(),
            {"input_ids": IDS},
            shapes={"input_ids": ("batch", "length")},
            axes={"batch": (1, 8), "length": (1, 40)},
            outputs=("hidden",),
            prefix="",
            name="Branching",
        )
    assert torch.equal(_answer(model), before)


def test_parts_with_attention_of_their_own_get_it_back():
    text, vision = CONFIGS["bert"](), tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    model = tf.VisionTextDualEncoderModel(config)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with fused_attention(model):
        pass
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_attention_that_asks_for_more_falls_back_and_says_why(tmp_path):
    exported = export(save_model(tmp_path / "model", "granite-swa"))  # has learned attention sinks
    assert exported.notes[0].startswith("attention: unfused (GraniteSWAAttention asks its attention for s_aux")
    assert "Attention" not in exported.graph.operators()
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_grouped_heads_and_softcap_are_attributes(tmp_path):
    exported = export(save_model(tmp_path / "model", "gemma2"))
    nodes = [node for node in exported.graph.model.graph if node.op_type == "Attention"]
    assert [node.attributes["q_num_heads"].value for node in nodes] == [4, 4]
    assert [node.attributes["kv_num_heads"].value for node in nodes] == [2, 2]
    assert [node.attributes["softcap"].value for node in nodes] == [50.0, 50.0]


def _answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).last_hidden_state
