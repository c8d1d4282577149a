"""What can be named as a model, and what is said about what cannot."""

import json
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import OnnxRunner, load_text_model, save_model, save_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, processors
from transformers import AutoTokenizer

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters import ParityCheck, export, find
from onnxpress.exporters.source import FolderSource, resolve
from onnxpress.exporters.tasks import find_task, infer_task
from onnxpress.exporters.tokenizer import read_tokenizer
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.tokenization import Tokenizer as RuntimeTokenizer


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", "distilbert")


def test_what_was_found_is_exported_as_what_was_named(folder):
    found = find(folder, task="embeddings")
    assert (found.task, found.options) == ("feature-extraction", {})
    (folder / "config.json").unlink()  # nothing is looked for twice
    assert export(found).graph.signature.task == "feature-extraction"


def test_labels_are_known_before_the_weights_are_read(tmp_path):
    folder = save_model(tmp_path / "model", "bert", tf.AutoModelForSequenceClassification, num_labels=2)
    (folder / "model.safetensors").write_bytes(b"")
    found = find(folder)
    labels = {"labels": ["LABEL_0", "LABEL_1"], "problem_type": "single_label_classification"}
    assert (found.task, found.options) == ("text-classification", labels)


@pytest.mark.parametrize("source", ["package:onnxpress/data", None])
def test_a_revision_of_what_is_here_is_refused(folder, source):
    with pytest.raises(SourceError, match=r"revision 'main' was asked for; .* is here as it is"):
        resolve(source or folder, revision="main")


def test_folder_by_text_and_by_path(folder):
    assert resolve(str(folder)) == resolve(folder) == FolderSource(name="model", folder=folder)


def test_unknown_folder(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        export(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"There is no folder \./nothing"):
        export("./nothing")


def test_hub_id_without_the_hub():
    with pytest.raises(SourceError, match="some-org/some-model is no folder here, and could not be had from the hub"):
        export("some-org/some-model")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        export(folder)


def test_garbled_config(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(SourceError, match="is not one that transformers understands"):
        export(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="has no weights"):
        export(folder)


def test_pickled_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    torch.save({}, folder / "colbert_linear.pt")
    (folder / "optimizer.bin").write_bytes(b"")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"pickled \(pytorch_model\.bin\).*convert it to safetensors"):
        export(folder)


def test_corrupt_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match="do not load as a model for feature-extraction"):
        export(folder)


def test_weights_of_other_shapes(folder):
    weights = load_file(folder / "model.safetensors")
    name = "transformer.layer.0.ffn.lin1.weight"
    save_file({**weights, name: torch.ones(7, 7)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lin1\.weight is \(7, 7\) in the files and \(\d+, 32\) in the model"):
        export(folder)


def test_code_of_the_folder_is_not_run_unasked(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(SourceError, match="pass trust_remote_code"):
        export(folder)


def test_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer: no tokenizer\.json"):
        export(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="cannot be read"):
        export(folder)


def test_links_lead_into_the_hubs_cache_alone(folder, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path.rename(blobs / path.name))
    assert export(snapshot).files
    assert export(snapshot).name == "1a2b"
    named = (tmp_path / "hub").rename(tmp_path / "models--someone--tiny-model")
    (folder, snapshot) = (named / "blobs", named / "snapshots" / "1a2b")
    for path in snapshot.iterdir():
        path.unlink()
        path.symlink_to(folder / path.name)
    assert export(snapshot).name == "tiny-model"
    (tmp_path / "secret").write_text("{}")
    (snapshot / "special_tokens_map.json").unlink(missing_ok=True)
    (snapshot / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"special_tokens_map\.json is a link that leads out of its folder"):
        export(snapshot)
    (snapshot / "special_tokens_map.json").unlink()
    export(snapshot)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "tool_use.jinja").write_text("secret")
    (snapshot / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    with pytest.raises(SourceError, match=r"tool_use\.jinja is a link that leads out of its folder"):
        export(snapshot)


def test_code_that_is_named_and_not_run_is_said(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "someone/code--modeling.Model"}})
    )
    said = "config.json names code of its own (auto_map), which is not run: this is transformers' own DistilBertModel"
    assert said in export(folder).notes
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.layer.0.ffn.lin1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"1 are missing, .* pass trust_remote_code"):
        export(folder)


def test_models_of_images_and_sound_are_to_be_given_as_modules(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = tf.ViTConfig(**sizes, image_size=16, patch_size=8, architectures=["ViTForImageClassification"])
    clip = tf.CLIPConfig(text_config=sizes, vision_config=sizes, architectures=["CLIPModel"])
    for config, said in ((vit, "reads pixel_values and no text"), (clip, "compares texts with something else")):
        config.save_pretrained(tmp_path)
        save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match=rf"{said}\. Give it as a module: .*\(model, \(pixel_values,\)\)"):
            find(tmp_path)
    for name in ("Qwen2VLModel", "LlavaModel", "GPT2Model", "CLIPTextModel"):
        assert (
            infer_task(tmp_path, (name,), clip if "CLIP" in name else tf.Qwen2VLConfig()).name == "feature-extraction"
        )
    with pytest.raises(SourceError, match="does not say what it was saved as"):
        infer_task(tmp_path, (), clip)
    assert infer_task(tmp_path, ("LlavaForConditionalGeneration",), tf.LlavaConfig()).name == "text-generation"
    assert infer_task(tmp_path, ("MyLlavaForConditionalGeneration",), tf.LlavaConfig()).name == "text-generation"
    with pytest.raises(SourceError, match="was saved as ShieldGemma2ForImageClassification, from which"):
        infer_task(tmp_path, ("ShieldGemma2ForImageClassification",), tf.ShieldGemma2Config())


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_classifiers_that_were_decoders_know_padding_from_the_tokenizer(kind, tmp_path):
    folder = save_model(tmp_path / "model", kind, tf.AutoModelForSequenceClassification, num_labels=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    exported = export(folder)
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    model = load_text_model(folder, tf.AutoModelForSequenceClassification)
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        alone = model(input_ids=ids).logits.numpy()
    padded = {
        "input_ids": np.array([[5, 9, 11, 4, 0, 0], [6, 7, 8, 9, 10, 11]]),
        "attention_mask": np.array([[1] * 4 + [0] * 2, [1] * 6]),
    }
    found = OnnxRunner(exported.graph.model, tmp_path).run(padded)["logits"]
    np.testing.assert_allclose(found[:1], alone, rtol=0, atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.sep_token
    ended = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", tokenizer.sep_token_id)])
    tokenizer.backend_tokenizer.post_processor = ended  # padding would be each text's end
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConversionError, match="no padding token is defined"):
        export(folder)


def test_older_tokenizer_is_converted(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    exported = export(folder)
    written = next(path for path in exported.files if path.name == "tokenizer.json")
    assert written.parent != folder
    assert json.loads(written.read_text())["model"]["vocab"] == {word: index for index, word in enumerate(words)}
    assert exported.notes[1] == "tokenizer: converted to tokenizer.json"


def test_the_tokenizer_is_transformers_own_where_the_files_alone_read_otherwise(folder):
    """A token that another file names; a class that is built anew, as LlamaTokenizer is by transformers 5."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    token = {"content": "<extra>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    path.write_text(
        json.dumps(
            {
                **config,
                "added_tokens_decoder": {str(len(AutoTokenizer.from_pretrained(folder))): {**token, "special": True}},
            }
        )
    )
    found = read_tokenizer(folder, trust_remote_code=False)
    _reads_alike(found, folder, "the <extra> cat")
    assert "tokenizer.json alone reads 'a <extra> b<extra>c' otherwise" in found.notes[0]

    inner = FastTokenizer(
        models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5}, merges=[], unk_token="<unk>")
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.save(str(folder / "tokenizer.json"))
    path.write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    _reads_alike(read_tokenizer(folder, trust_remote_code=False), folder, "a<s>b a")


def test_a_token_that_another_file_adds_to_many_is_found(folder):
    path = folder / "tokenizer.json"
    inner = FastTokenizer.from_file(str(path))
    inner.add_special_tokens([f"<reserved_{number}>" for number in range(120)])
    inner.save(str(path))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": inner.get_vocab_size()}))
    _reads_alike(read_tokenizer(folder, trust_remote_code=False), folder, "the <extra> cat")


def test_a_tokenizer_without_an_unknown_token_is_read(folder):
    path = folder / "tokenizer.json"
    FastTokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "c": 2}, unk_token="[UNK]")).save(str(path))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    assert read_tokenizer(folder, trust_remote_code=False).pad_token_id == 0


def test_texts_are_cut_on_the_tokenizers_side(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    found = read_tokenizer(folder, trust_remote_code=False)
    assert "of texts that are too long the end is read" in found.notes[0]
    expected = AutoTokenizer.from_pretrained(folder)("the cat sat on a mat", truncation=True, max_length=4).input_ids
    runtime = RuntimeTokenizer.from_folder(found.files[0].parent, max_length=4)
    assert runtime.encode(["the cat sat on a mat"])[0].ids == expected
    assert pickle.loads(pickle.dumps(runtime)).encode(["the cat sat on a mat"])[0].ids == expected


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"0": "a", "1": "a", "2": "b"}, "names 'a' twice"),
        ({"1": "a", "2": "b", "3": "c"}, "counts 1, 2, 3; the model's labels are 0 to 2"),
    ],
)
def test_labels_that_cannot_be_told_apart(labels, said, tmp_path):
    folder = save_model(tmp_path / "model", "bert", tf.AutoModelForSequenceClassification, num_labels=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": labels, "label2id": {}}))
    with pytest.raises(SourceError, match=said):
        export(folder)


def test_special_tokens_that_texts_spell_are_read_as_such(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    assert "split_special_tokens is not applied" in read_tokenizer(folder, trust_remote_code=False).notes[-1]


def test_special_tokens_that_templates_name_are_in_the_tokenizers_config(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["cls_token"]
    path.write_text(json.dumps({**config, "chat_template": "{{ cls_token }}"}))
    (folder / "special_tokens_map.json").write_text('{"cls_token": "[CLS]"}')
    found = read_tokenizer(folder, trust_remote_code=False)
    template = ChatTemplate.from_folder(found.files[0].parent)
    assert template.render([{"role": "user", "content": ""}]) == "[CLS]"
    assert "whose tokenizer_config.json names no cls_token" in found.notes[0]


def _reads_alike(found, folder, text):
    path = next(path for path in found.files if path.name == "tokenizer.json")
    assert FastTokenizer.from_file(str(path)).encode(text).ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_declared_lower_casing_goes_into_the_tokenizer(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": true}')
    exported = export(folder)
    written = next(path for path in exported.files if path.name == "tokenizer.json")
    assert json.loads(written.read_text())["normalizer"] == {"type": "Lowercase"}


def test_task_names(tmp_path):
    assert find_task("ner").name == "token-classification"
    assert find_task("sentence-similarity").name == "feature-extraction"
    with pytest.raises(SourceError, match=r"There is no task 'cooking'. onnxpress exports feature-extraction, text-"):
        find_task("cooking")
    assert infer_task(tmp_path, ("ElectraForPreTraining",)).name == "feature-extraction"
    assert infer_task(tmp_path, ("BertForTokenClassification",)).name == "token-classification"
    assert infer_task(tmp_path, ("LlamaForCausalLM",)).name == "text-generation"
    assert infer_task(tmp_path, ("GPT2LMHeadModel",)).name == "text-generation"
    assert infer_task(tmp_path, ("CTRLLMHeadModel",)).name == "text-generation"
    assert infer_task(tmp_path, ("FlaubertWithLMHeadModel",)).name == "fill-mask"
    assert infer_task(tmp_path, ("LlamaModel",)).name == "feature-extraction"
    with pytest.raises(
        SourceError, match="was saved as PatchTSTForPrediction, from which onnxpress cannot tell the task"
    ):
        infer_task(tmp_path, ("PatchTSTForPrediction",))
    with pytest.raises(SourceError, match="does not say what it was saved as"):
        infer_task(tmp_path, ())
    with pytest.raises(SourceError, match=r"T5ForConditionalGeneration. Models that write a text .* are not exported"):
        infer_task(tmp_path, ("T5ForConditionalGeneration",), tf.T5Config())


def test_code_that_a_model_brings_for_an_architecture_of_transformers(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    plain = load_text_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "custom.Doubled"}, "architectures": ["Doubled"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(
        "from transformers import BertModel\n"
        "class Doubled(BertModel):\n"
        "    def forward(self, input_ids, attention_mask=None, **more):\n"
        "        answer = super().forward(input_ids, attention_mask=attention_mask)\n"
        "        answer.last_hidden_state = 2 * answer.last_hidden_state\n"
        "        return answer\n"
    )
    exported = export(folder, task="feature-extraction", trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    found = OnnxRunner(exported.graph.model, tmp_path).run(feeds)["last_hidden_state"]
    with torch.no_grad():
        expected = 2 * plain(input_ids=ids).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=0)


def test_model_without_such_a_class(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    with pytest.raises(SourceError, match="do not load as a model for fill-mask"):
        export(folder, task="fill-mask")


def test_factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_factory.py").write_text(
        "import torch\n"
        "def make():\n    return torch.nn.Linear(3, 2), (torch.ones(2, 3),)\n"
        "def wrong():\n    return torch.nn.Linear(3, 2)\n"
        "def broken():\n    raise ValueError('no weights here')\n"
    )
    exported = export("my_factory:make")
    assert exported.name == "make"
    assert [(spec.name, spec.shape) for spec in exported.graph.signature.inputs] == [("input", ("batch", 3))]
    with pytest.raises(SourceError, match=r"wrong gives Linear; onnxpress takes \(module, example_inputs\)"):
        export("my_factory:wrong")
    with pytest.raises(SourceError, match="ValueError: no weights here"):
        export("my_factory:broken")
    (tmp_path / "my_script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    monkeypatch.setattr("sys.argv", ["onnxpress", "build", "my_script:make"])
    with pytest.raises(SourceError, match=r"my_script ends the program \(exit code 2\).*__main__"):
        export("my_script:make")
    with pytest.raises(SourceError, match="no_such_package"):
        export("no_such_package:make")


@pytest.mark.parametrize("source", [3, None, tf])
def test_other_things_are_no_models(source):
    with pytest.raises(SourceError, match="was given as model"):
        export(source)


def test_example_inputs_with_a_folder(folder):
    with pytest.raises(SourceError, match=r"go with a torch\.nn\.Module"):
        export(folder, example_inputs=torch.ones(1))


def test_a_length_that_special_tokens_fill_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    path = folder / "tokenizer.json"
    inner = FastTokenizer.from_file(str(path))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.save(str(path))
    with pytest.raises(
        SourceError, match="A maximum length of 2 was asked for, and the tokenizer puts 2 special tokens"
    ):
        export(folder, max_length=2)
    assert export(folder, max_length=3).options["max_length"] == 3


def test_tokenizer_with_pad_token_elsewhere(folder):
    save_tokenizer(folder, pad_token_id=1)
    assert export(folder).options["pad_token_id"] == 1
