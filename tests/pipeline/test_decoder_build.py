"""Language models through the whole pipeline and the command line."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tiny_decoders import CONTEXT, save_decoder
from transformers import AutoModelForCausalLM

import onnxpress
from onnxpress import conversation, decoder_workload, exporters, graph_files, pipeline, press
from onnxpress.artifact import Artifact
from onnxpress.cli import main
from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.errors import RecipeError, SourceError
from onnxpress.exporters import Exported, export, half_weights
from onnxpress.exporters.transformers_decoder import _own_sampling
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.fuse_rotary import FuseRotary
from onnxpress.optimizers.targets import target
from onnxpress.runtime import Generator
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.generator import Piece

pytestmark = pytest.mark.newest

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("model") / "tiny", "qwen2", template=TEMPLATE)


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    """4 bits with a budget that a random model can keep only where some layers have 8."""
    built = onnxpress.build(
        folder, precision="int4-weights", budget=0.001, measure=True, samples=64, out=folder.with_name("artifact")
    )
    return built.path


def command(*arguments: object, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "error", "-m", "onnxpress", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, input=given, text=True, env={**os.environ, **environment})


def test_four_bits_and_where_they_cost_too_much_eight(artifact: Path) -> None:
    manifest = Artifact.open(artifact).manifest
    rows = {row["pass"]: row for row in manifest.ledger}
    assert manifest.precision == "int4-weights"
    assert manifest.minimum_onnxruntime == "1.32"
    assert manifest.session.get("flash_attention", True) == target(manifest.target).flash_attention
    if rows["fuse-rotary"]["status"] == "kept":  # the build asks the clock, which on a busy machine may say otherwise
        assert rows["pack-projections"]["changes"] == 2
    row = rows["int4-weights"]
    assert row["metrics"]["kl_mean"] <= 0.1
    if row["status"] == "repaired":
        assert "stay at 8 bits" in row["reason"]
    assert set(row["metrics"]) >= {"likelihood_kept", "perplexity", "kl_mean", "top1_agreement"}
    assert manifest.options["eos_token_ids"] == [0]
    assert manifest.options["max_length"] == CONTEXT


def test_passes_of_a_large_model_are_compared_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the artifact is the one that they make when each is compared by itself."""
    options: dict[str, Any] = {"precision": "fp32", "keep_all": True}
    single = onnxpress.build(folder, out=tmp_path / "single", **options)
    monkeypatch.setattr(press, "_TOGETHER_FROM", 0)
    together = onnxpress.build(folder, out=tmp_path / "together", **options)
    said = ("pass", "status", "changes", "notes", "bytes_before", "bytes")
    rows = [[[row[key] for key in said] for row in built.manifest.ledger] for built in (single, together)]
    assert rows[0] == rows[1]
    kept = [row for row in together.manifest.ledger if row["status"] == "kept"][1:]
    assert len(kept) > 2
    assert all("answers as before, compared once behind pack-projections" in row["reason"] for row in kept)
    assert [row["pass"] for row in together.measured["rows"]] == ["pack-projections"]
    assert together.manifest.operators == single.manifest.operators
    assert together.manifest.files["golden.safetensors"] == single.manifest.files["golden.safetensors"]


def test_a_wrong_pass_of_a_large_model_is_found_by_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: FuseRotary, graph: Graph, __: PassContext) -> PassResult:
        name, value = next((n, v) for n, v in graph.model.graph.initializers.items() if n.endswith("norm.weight"))
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=name)
        return PassResult(graph=graph, changes=1)

    monkeypatch.setattr(press, "_TOGETHER_FROM", 0)
    monkeypatch.setattr(FuseRotary, "apply", wrong)
    built = onnxpress.build(folder, out=tmp_path / "out", precision="fp32", measure=False)
    rows = {row["pass"]: row for row in built.manifest.ledger}
    assert rows["fuse-rotary"]["status"] == "undone"
    assert "changed the answers" in rows["fuse-rotary"]["reason"]
    kept = [name for name, row in rows.items() if row["status"] == "kept"]
    assert kept == ["export", "fuse-skip-norm", "scale-queries"]
    assert rows["fuse-skip-norm"]["reason"] == "answers as before"
    assert len(rows) == len(built.manifest.ledger), "each pass has one row"


def test_a_model_that_memory_does_not_hold(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before its weights are read."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"are no weights")
    monkeypatch.setattr(pipeline, "free_memory_bytes", lambda: 1)
    with pytest.raises(
        SourceError, match=r"0\.0 billion weights: .* takes 1\.[23] GiB of memory, and 0\.0 GiB are free"
    ):
        onnxpress.build(tmp_path / "model", out=tmp_path / "out")
    monkeypatch.setattr(pipeline, "free_memory_bytes", lambda: 2**31)
    with pytest.raises(SourceError, match="do not load"):
        onnxpress.build(tmp_path / "model", out=tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int4-weights", "passes": {"int4-weights": {"method": "awq-gptq", "block_size": 32}}},
        {"precision": "int8-weights", "cache": "int8"},
    ],
)
def test_a_model_that_memory_holds_in_half_precision_alone(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is the one of a build in float32."""
    model = save_decoder(tmp_path / "model", "qwen2")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    built = []
    for name, dtype in (("whole", torch.float32), ("half", torch.bfloat16)):
        monkeypatch.setattr(exporters, "fitting_dtype", lambda *_, half, found=dtype, **__: found if half else None)
        monkeypatch.setattr(half_weights, "_LARGE", 4000)
        monkeypatch.setattr(
            graph_files, "_EXTERNAL_FROM", 1000
        )  # weights are files of their own, as those of large models
        built.append(onnxpress.build(model, out=tmp_path / name, keep_all=True, measure=False, **options))
    whole, half = (one.manifest for one in built)
    assert half.ledger[0]["notes"][0].startswith("large weights stayed in bfloat16")
    assert half.files == whole.files
    assert [row["reason"] for row in half.ledger[1:]] == [row["reason"] for row in whole.ledger[1:]]


def test_experts_have_four_bits_in_the_artifact(tmp_path: Path) -> None:
    save_decoder(tmp_path / "tiny", "olmoe", hidden_size=128, intermediate_size=256)
    built = onnxpress.build(
        tmp_path / "tiny", precision="int4-weights", keep_all=True, measure=False, out=tmp_path / "artifact"
    )
    graph = onnx.load(built.file("model.onnx")).graph
    assert [node.op_type for node in graph.node if "MoE" in node.op_type] == ["QMoE", "QMoE"]
    stacks = [one for one in graph.initializer if len(one.dims) == 3 and one.dims[0] == 8]
    assert sum(one.data_type == onnx.TensorProto.UINT8 for one in stacks) == 4
    of_experts = sum(len(one.raw_data) for one in stacks)
    numbers = 2 * 8 * 3 * 128 * 256
    assert of_experts == numbers // 2 + numbers // 32 * 4  # and scales
    assert built.file("model.onnx").stat().st_size < numbers * 4 / 3  # of what they were in float
    rows = {row["pass"]: row for row in built.manifest.ledger}
    assert any("2 mixtures of experts at 4 bits" in note for note in rows["int4-weights"]["notes"])
    generator = onnxpress.load(built.path)
    assert isinstance(generator, Generator)
    answers = generator.generate(["in", "a much longer prompt"], max_new_tokens=4, ignore_eos=True)
    assert [len(answer.token_ids) for answer in answers] == [4, 4]


def test_batches_of_quantized_weights_answer_nearly_as_alone(artifact: Path) -> None:
    """Kernels round differently for one row and for several; what is chosen is the same, the log-probabilities nearly."""
    generator = onnxpress.load(artifact)
    assert isinstance(generator, Generator)
    prompts = ["the thing", "in", "a much longer prompt than the others"]
    together = generator.generate(prompts, max_new_tokens=1, logprobs=1, ignore_eos=True)
    for prompt, found in zip(prompts, together, strict=True):
        generator.reset()
        alone = generator.generate(prompt, max_new_tokens=1, logprobs=1, ignore_eos=True)[0]
        assert found.logprobs is not None
        assert alone.logprobs is not None
        assert found.logprobs[0].logprob == pytest.approx(alone.logprobs[0].logprob, abs=0.05)


def test_generate_on_the_command_line(artifact: Path) -> None:
    done = command("generate", artifact, "--prompt", "the", "--max-new-tokens", 5, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert "tokens/s]" in done.stderr
    done = command(
        "generate", artifact, "--prompt", "the", "--prompt", "in a", "--max-new-tokens", 5, "--ignore-eos", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [len(row["token_ids"]) for row in rows] == [5, 5]
    assert set(rows[0]) == {"text", "token_ids", "finish_reason", "prompt_tokens", "cached_tokens"}
    done = command("generate", artifact, "--file", "-", "--max-new-tokens", 3, given="from a pipe")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [["--json"], ["--prompt", "in a"]])
def test_a_terminal_that_cannot_show_a_character(artifact: Path, more: list[str]) -> None:
    asked = ("generate", artifact, "--prompt", "é 中", *more, "--max-new-tokens", 3, "--ignore-eos")
    done, other = (command(*asked, PYTHONIOENCODING=encoding) for encoding in ("ascii", "utf-8"))
    assert done.returncode == 0, done.stderr
    if more == ["--json"]:
        assert json.loads(done.stdout) == json.loads(other.stdout)


@pytest.mark.parametrize(("line", "code"), [("chat", 0), ("generate --file -", 2)])
def test_without_an_input_there_is_none(artifact: Path, line: str, code: int) -> None:
    verb, *more = line.split()
    closed = f"exec {shlex.join([sys.executable, '-m', 'onnxpress', verb, str(artifact), *more])} <&-"
    done = subprocess.run(["sh", "-c", closed], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\ufffd[2J\n\tb\n"), (False, "a\x1b[2J\n\tb\n")])
def test_control_characters_do_not_reach_a_terminal(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Output(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    output = Output()
    monkeypatch.setattr("sys.stdout", output)
    assert conversation._show(iter([Piece(index=0, text="a\x1b[2J\n\tb")]), 0.0)[0] == "a\x1b[2J\n\tb"
    assert output.getvalue() == shown


def test_half_an_answer_is_no_success(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = onnxpress.load(artifact)
    assert isinstance(runner, Generator)

    def stream(*arguments: Any, **options: Any) -> Iterator[Piece]:
        yield from itertools.islice(Generator.stream(runner, *arguments, **options), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "stream", stream)
    assert conversation.generate(runner, ["the"], as_json=False, max_new_tokens=9, ignore_eos=True) == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
def test_output_that_nobody_takes(artifact: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "onnxpress",
        "generate",
        str(artifact),
        "--prompt",
        "the",
        "--max-new-tokens",
        "2",
        "--json",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "onnxpress: Nothing more can be written: No space left on device.\n")
    done = subprocess.run(f"{shlex.join(line)} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_chat_keeps_the_conversation_and_survives_what_is_refused(artifact: Path) -> None:
    given = "the man\n\nand then?\n/undo\n/forget\n" + "x" * CONTEXT + "\n/reset\nagain\n/exit\n"
    done = command("chat", artifact, "--max-new-tokens", 4, given=given)
    assert done.returncode == 1, done.stderr  # a piped message got no answer
    assert done.stderr.count("tokens/s]") == 3
    assert "the model's context is" in done.stderr
    assert "There is no /forget: /reset forgets" in done.stderr
    knew = [int(part.split(" of them known")[0].split()[-1]) for part in done.stderr.splitlines() if "known" in part]
    assert knew[0] == 0
    assert knew[1] > 5


def test_a_chat_goes_on_after_bytes_that_are_no_text(artifact: Path) -> None:
    """Typed at a terminal whose encoding is strict, as it is with most locales."""
    ours, terminal = pty.openpty()
    os.write(ours, b"\xff\xfehi\n/forget\n/exit\n")
    line = [sys.executable, "-W", "error", "-m", "onnxpress", "chat", str(artifact), "--max-new-tokens", "4"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}
    done = subprocess.run(line, stdin=terminal, capture_output=True, text=True, env=environment)
    os.close(ours)
    os.close(terminal)
    assert done.returncode == 0, done.stderr
    assert "tokens/s]" in done.stderr
    assert "There is no /forget" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "ARTIFACT"], "No prompt was given"),
        (["generate", "ARTIFACT", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "ARTIFACT", "--prompt", "x" * 300], "the model's context is 128"),
        (["generate", "ARTIFACT", "--prompt", "x", "--cache-mb", "0"], "--cache-mb takes a positive"),
        (["chat", "ARTIFACT", "--top-p", "7"], "top_p is 7.0"),
        (["run", "ARTIFACT", "--text", "x"], "use `onnxpress generate`"),
        (["generate", "ARTIFACT", "--prompt", "x", "--prompt-lookup", "17"], "from 0 to 16"),
        (["bench", "ARTIFACT", "--against", "torch"], "not for language models"),
        (["bench", "ARTIFACT", "--batch", "17"], "at most 16"),
        (["bench", "ARTIFACT", "--length", "127"], "prompts of at most 126"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere does not exist"),
    ],
)
def test_wrong_use_is_one_paragraph(artifact: Path, arguments: list[str], message: str) -> None:
    done = command(*[argument.replace("ARTIFACT", str(artifact)) for argument in arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_without_torch_generates(artifact: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'pydantic', 'rich', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from onnxpress.cli import main\n"
        "sys.exit(main(['generate', sys.argv[1], '--prompt', 'the', '--max-new-tokens', '3', '--json']))\n"
    )
    line = [sys.executable, "-W", "error", "-c", code, str(artifact)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["prompt_tokens"] == 1


def test_tokens_are_chosen_by_generation_config(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    asked = {
        "do_sample": True,
        "top_k": 7,
        "top_p": 1.0,
        "repetition_penalty": 1.2,
        "suppress_tokens": [5],
        "max_length": 99,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    built = onnxpress.build(tmp_path / "model", out=tmp_path / "out", precision="fp32", measure=False)
    own = {"temperature": 1.0, "top_k": 7, "repetition_penalty": 1.2}
    assert built.manifest.options["sampling"] == own
    assert (
        "generation_config.json asks for suppress_tokens, max_length 99, which is not applied"
        in built.manifest.ledger[0]["notes"]
    )
    generator: Any = onnxpress.load(built.path)
    options = {"max_new_tokens": 12, "ignore_eos": True}

    def ids(**sampling: Any) -> list[int]:
        generator.reset()
        found: list[int] = generator.generate(["the"], **options, **sampling)[0].token_ids
        return found

    plain: Any = onnxpress.build(folder, out=tmp_path / "plain", precision="fp32", measure=False)
    plain = onnxpress.load(plain.path)
    for seed in range(3):
        assert ids(seed=seed) == plain.generate(["the"], seed=seed, **own, **options)[0].token_ids
        assert (
            ids(seed=seed, top_k=0, temperature=2.0)
            == plain.generate(["the"], seed=seed, **options, temperature=2.0, repetition_penalty=1.2)[0].token_ids
        )
    assert ids(temperature=0, repetition_penalty=1) == plain.generate(["the"], **options)[0].token_ids
    line = [
        "generate",
        str(built.path),
        "--prompt",
        "the",
        "--max-new-tokens",
        "12",
        "--ignore-eos",
        "--json",
        "--seed",
        "1",
    ]
    assert main(line) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["token_ids"] == ids(seed=1)
    assert "(repetition_penalty 1.2, temperature 1.0, top_k 7)" in said.err


def test_the_chat_template_of_a_processor_is_read(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "qwen2")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    exported = export(folder)
    assert "tokenizer: the chat template is that of chat_template.json" in exported.notes
    for path in exported.files:
        shutil.copy(path, tmp_path)
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "user: hi\nassistant:"


def test_templates_for_tools_in_files_of_their_own_are_kept(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "qwen2", template=TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    for path in export(folder).files:
        shutil.copy(path, tmp_path)
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "user: hi\nassistant:"
    assert template.render(messages, variables={"tools": [{"name": "clock"}]}) == "clock"


@pytest.mark.parametrize(
    ("asked", "taken", "left"),
    [
        ({"temperature": 0.6, "top_k": 20}, {}, ""),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.8}, {"top_k": 50, "top_p": 0.8}, "temperature 0.0"),
        ({"do_sample": True, "top_k": -1, "min_p": "x"}, {"temperature": 1.0}, "top_k -1, min_p x"),
        ({"do_sample": True, "top_k": 10**400, "top_p": 1e-400}, {"temperature": 1.0}, f"top_k {10**400}, top_p 0.0"),
        ({"do_sample": True, "top_k": None, "temperature": math.inf}, {"top_k": 50}, "temperature inf"),
        (
            {"do_sample": True, "top_k": 0, "repetition_penalty": math.nan},
            {"temperature": 1.0},
            "repetition_penalty nan",
        ),
        ({"do_sample": False, "repetition_penalty": 1.1, "num_beams": 4}, {"repetition_penalty": 1.1}, "num_beams 4"),
        ({"do_sample": True, "temperature": True, "top_p": None, "typical_p": 1.0}, {"top_k": 50}, "temperature True"),
        ({"do_sample": "true", "temperature": "0.7"}, {}, "do_sample 'true'"),
        ({"min_new_tokens": 5, "stop_strings": ["x"], "max_length": 20}, {}, "min_new_tokens 5, stop_strings"),
        ({"num_beams": True, "repetition_penalty": True}, {}, "repetition_penalty True, num_beams True"),
        ({"use_cache": True, "_from_model_config": True, "output_scores": True, "min_length": 0}, {}, ""),
    ],
)
def test_what_is_taken_of_generation_config(
    tmp_path: Path, asked: dict[str, Any], taken: dict[str, Any], left: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    sampling, remarks = _own_sampling(tmp_path)
    assert sampling == taken
    assert (f"asks for {left}, which is not applied" in " ".join(remarks)) == bool(left)


@pytest.mark.parametrize("ends", [2.0, [1, 2.0]])
def test_end_tokens_that_are_whole_numbers_are_taken(ends: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    exported = export(tmp_path / "model", task="text-generation")
    assert exported.options["eos_token_ids"] == ([2] if ends == 2 else [1, 2])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"eos_token_id": "128"}', "eos_token_id of the model's generation_config.json"),
        ('{"eos_token_id": [0, "128"]}', "tokens are whole numbers"),
        ('{"eos_token_id": {"a": 1}}', "tokens are whole numbers"),
        ('{"eos_token_id": 1e300}', "tokens are whole numbers"),
        ('{"eos_token_id": true}', "tokens are whole numbers"),
        ('{"bos_token_id": 1.5}', "bos_token_id of the model's"),
        ("[1, 2]", "generation_config.json holds no object"),
        ("{", "generation_config.json cannot be read as JSON"),
    ],
)
def test_a_wrong_generation_config_is_said_to_be(content: str, said: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    with pytest.raises(SourceError, match=said):
        export(tmp_path / "model", task="text-generation")


def test_a_context_beyond_the_models_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"takes 1 to {CONTEXT} tokens"):
        onnxpress.build(folder, max_length=CONTEXT + 1, out=tmp_path / "out")
    with pytest.raises(SourceError, match="A context of 1 leaves no room for an answer"):
        onnxpress.build(folder, max_length=1, out=tmp_path / "out")
    with pytest.raises(SourceError, match="is no adapter folder"):
        onnxpress.build(folder, adapter=str(tmp_path), out=tmp_path / "out")


def test_bench_gives_tokens_a_second(artifact: Path, tmp_path: Path) -> None:
    line = ["--batch", "1,3", "--length", "20", "--rounds", 1, "--json", tmp_path / "speeds.json"]
    done = command("bench", artifact, *line, "--against", artifact)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("new tokens/s") == 4
    rows = json.loads((tmp_path / "speeds.json").read_text())["rows"]
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 20), (1, 20), (3, 20), (3, 20)]
    assert all(row["prompt"] > 0 and row["new"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3, 4), np.int64), "one or two axes"),
        (np.zeros(9), "token ids are integers"),
        (np.array([1, 999]), "token ids from 1 to 999"),
        (np.array([5]), "no text has two tokens"),
        (np.array([{}], object), "no .npy file of an array of integers"),
    ],
)
def test_calibration_tokens_that_are_none(folder: Path, tmp_path: Path, ids: np.ndarray, message: str) -> None:
    exported = export(str(folder))
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(RecipeError, match=message):
        judged_on(exported, folder, calibration=tmp_path / "ids.npy")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8' (((\n", b"text"])
def test_calibration_files_that_are_no_arrays(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(RecipeError, match=r"no \.npy file of an array of integers"):
        judged_on(export(str(folder)), folder, calibration=tmp_path / "ids.npy")


def test_calibration_files(folder: Path, tmp_path: Path) -> None:
    exported = export(str(folder))
    np.save(tmp_path / "ids.npy", np.arange(2 * 100).reshape(2, 100) % 256)
    (tmp_path / "own.txt").write_text("in the house " * 40)
    (tmp_path / "eval.txt").write_text("something else, " * 30)
    lengths = {
        name: [
            feeds["input_ids"].shape[1]
            for feeds in judged_on(exported, folder, calibration=tmp_path / name).calibration()
        ]
        for name in ("ids.npy", "own.txt")
    }
    assert lengths["ids.npy"] == [100, 100]
    assert set(lengths["own.txt"][:-1]) == {CONTEXT}
    judged_on(exported, folder, calibration=tmp_path / "own.txt", file=tmp_path / "eval.txt")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "in the house in the house in the house in"}) + "\n")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "in the house"}) + "\n")
    for name in ("own.txt", "rows.jsonl"):
        with pytest.raises(RecipeError, match="what a pass has calibrated on cannot judge it"):
            judged_on(exported, folder, calibration=tmp_path / "own.txt", file=tmp_path / name)
    judged_on(exported, folder, calibration=tmp_path / "own.txt", file=tmp_path / "short.jsonl")


def judged_on(exported: Exported, folder: Path, **files: Path) -> DecoderWorkload:
    return DecoderWorkload(
        signature=exported.graph.signature, options=exported.options, tokenizer_folder=folder, **files
    )


def test_calibrated_rounding_and_hidden_states(folder: Path, tmp_path: Path) -> None:
    """Through the whole pipeline, with options that the command line gives."""
    (tmp_path / "own.txt").write_text("in the house of the man there is a thing and another " * 20)
    line = ["--calibration", tmp_path / "own.txt", "--precision", "dual", "--keep-all", "--no-measure"]
    line += [
        "--cache",
        "int8",
        "--pass-option",
        "int4-weights.method=awq-gptq",
        "--pass-option",
        "int4-weights.table_bits=8",
    ]
    done = command("build", folder, "--hidden-states", *line, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    row = onnxpress.load(tmp_path / "out")
    assert isinstance(row, Generator)
    manifest = Artifact.open(tmp_path / "out").manifest
    ledger = {item["pass"]: item for item in manifest.ledger}
    assert any("embedding tables at 8" in note for note in ledger["int4-weights"]["notes"])
    assert any("norms carry scales" in note for note in ledger["int4-weights"]["notes"])
    assert (ledger["int8-cache"]["status"], ledger["int8-cache"]["changes"]) == ("kept", 2)
    assert list(ledger)[-3:] == ["int4-weights", "int8-cache", "int8-prompts"]
    assert (ledger["int8-prompts"]["status"], ledger["int8-prompts"]["changes"]) == ("kept", 10)
    assert (manifest.precision, manifest.operators["If"]) == ("dual", 1)
    assert "flash_attention" not in manifest.session  # of a cache in float alone
    assert {spec.dtype for spec in manifest.signature.inputs if spec.name.startswith("past_key")} == {"int8"}
    assert len(row.generate("the man", max_new_tokens=20, ignore_eos=True)[0].token_ids) == 20
    states = row.hidden_states("the man")
    assert states.shape == (len(row.tokenizer.inner.encode("the man").ids), 64)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("int4-weights.method=best", "has the methods rtn, gptq, awq, awq-gptq"),
        ("int4-weights.table_bits=5", "table_bits is 4 or 8"),
        ("int4-weights.method", "is not of the form PASS.NAME=VALUE"),
        ("int4-weights.frob=1", "does not take 'frob'"),
    ],
)
def test_pass_options_that_are_none(
    folder: Path, tmp_path: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--precision", "int4-weights", "--pass-option", option, "--out", str(tmp_path / "out")]
    assert main(["build", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Uniform:
    """Every token equally likely, but for the next one, which has `extra` nats more."""

    input_names = ("input_ids", "past_lengths", "lengths", "logit_indices")

    def __init__(self, extra: float) -> None:
        self.extra = extra

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        logits = np.zeros((len(feeds["logit_indices"]), 320), np.float32)
        following = feeds["input_ids"].reshape(-1)[feeds["logit_indices"] + 1]
        logits[np.arange(len(logits)), following] = self.extra
        return {"logits": logits}


def workload(folder: Path, artifact: Path, file: Path | None = None) -> DecoderWorkload:
    manifest = Artifact.open(artifact).manifest
    return DecoderWorkload(
        signature=manifest.signature, options=manifest.options, tokenizer_folder=folder, file=file, samples=20
    )


def test_perplexity_is_that_of_the_next_tokens(folder: Path, artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the man in the land and the thing in the end. " * 20, encoding="utf-8")
    for file in (None, text):
        tried = workload(folder, artifact, file)
        flat, knowing = tried.answers(Uniform(0.0)), tried.answers(Uniform(2.0))
        assert tried.metrics(flat, flat)["perplexity"] == pytest.approx(320)
        found = tried.metrics(knowing, flat)
        expected = (np.exp(2.0) + 319) / np.exp(2.0)
        assert tried.metrics(flat, knowing)["perplexity"] == pytest.approx(expected)
        assert found["likelihood_kept"] == pytest.approx(expected / 320)


def test_few_logits_are_asked_of_few_whole_texts_from_all_over_a_file(
    folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the man in the land and the thing in the end. " * 20, encoding="utf-8")
    every = [window for window, _ in workload(folder, artifact, text).questions()]
    monkeypatch.setattr(decoder_workload, "_KEPT_BYTES", 3 * 16 * 320 * 4)  # of the logits of three texts
    found = workload(folder, artifact, text)
    windows, positions = zip(*found.questions(), strict=True)
    assert len(every) > 3
    assert list(windows) == [every[0], every[(len(every) - 1) // 2], every[-1]]
    assert [len(asked) for asked in positions] == [min(16, len(window) - 1) for window in windows]
    assert f"judged at {sum(map(len, positions))} tokens of 3 texts" in found.notes


def test_tokens_that_the_model_has_not_are_left_out_and_said(folder: Path, artifact: Path) -> None:
    manifest = Artifact.open(artifact).manifest
    ids = next(spec for spec in manifest.signature.inputs if spec.name == "input_ids")
    few = dataclasses.replace(ids, bounds=(0, 99))
    inputs = tuple(few if spec is ids else spec for spec in manifest.signature.inputs)
    options = {"options": manifest.options, "tokenizer_folder": folder, "samples": 20}
    signature = dataclasses.replace(manifest.signature, inputs=inputs)
    notes = DecoderWorkload(signature=signature, **options).notes
    assert any(re.match(r"[1-9]\d* tokens of the texts were left out: .* 0 to 99, has not", note) for note in notes)
    assert not any("left out: the tokenizer" in note for note in workload(folder, artifact).notes)


def test_texts_of_the_users_replace_the_built_in_ones(folder: Path, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("one long text " * 100, encoding="utf-8")
    windows = [window for window, _ in workload(folder, artifact, file).questions()]
    assert max(map(len, windows)) == CONTEXT
    assert len(windows) > 5
    file.write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match="holds no samples"):
        workload(folder, artifact, file)
