"""benchmarks/gpu, on a machine without a card: what it says, and all of it in small on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "benchmarks" / "gpu" / "bench.py"

sys.path.insert(0, str(BENCH.parent))
import bench  # noqa: E402
import record  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and the JSON of a try in small."""
    path = tmp_path_factory.mktemp("bench") / "gpu.json"
    options = ("--rounds", "1", "--seconds", "0", "--only", "minilm", "0.5b")
    done = run("--provider", "cpu", "--tiny", "--json", str(path), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())


def test_without_a_card_it_says_so() -> None:
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "no GPU: nothing measured\n", "")


def test_every_system_gives_its_figures(tried: tuple[str, dict[str, Any]]) -> None:
    output, results = tried
    found: dict[str, dict[str, set[str]]] = {}
    for figure in results["figures"]:
        found.setdefault(figure["of"], {}).setdefault(figure["case"], set()).add(figure["system"])
    assert len(found["roof"]) == 3  # of each process the same
    encoders = found["encoder minilm-l6, float16"]
    torch_forms = {
        "torch, eager attention",
        "torch, SDPA",
        "torch, SDPA, one CUDA graph",
        "torch, SDPA, layers compiled, one CUDA graph",
    }
    assert set(encoders) == {"1 x 32", "1 x 128", "64 x 128", "64 x 16–128"}
    bare = "torch, SDPA without a mask, one CUDA graph"
    for case, systems in encoders.items():
        assert systems == {"onnxpress", *torch_forms, *(() if "–" in case else (bare,))}
    for figure in results["figures"]:
        if figure["of"].startswith("encoder"):
            assert figure["difference"] < 0.01
            assert len(figure["ms on the card"]) == len(figure["ms numpy to numpy"]) == 1
    for case in ("step after 512", "prompt of 512"):
        half, four = found["decoder qwen2.5-0.5b, float16"], found["decoder qwen2.5-0.5b, int4, blocks of 32"]
        ours, peers = "onnxpress' graph, bound by hand", half[f"{case}, taking turns"]
        assert ours in half[f"{case}, alone"] & four[f"{case}, alone"] & peers
        assert sum(name.startswith("torch") for name in peers) == 3
        assert f"| {case}, taking turns | {ours} |" in output
    assert results["left_out"] == []
    assert results["about"]["tiny"] is True


def test_nothing_fails(tried: tuple[str, dict[str, Any]]) -> None:
    _, results = tried
    assert results["errors"] == []
    systems = {figure["system"] for figure in results["figures"]}
    assert {"onnxpress, ModelStep, logits in numpy", "onnxpress, Generator, greedy"} <= systems


def test_a_spent_budget_begins_nothing(tmp_path: Path) -> None:
    only = ("--only", "minilm", "roof")
    done = run("--provider", "cpu", "--tiny", "--budget", "0", *only, "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["figures"] == []
    assert results["left_out"] == ["roof", "encoder minilm-l6, float16"]
    assert "left out for want of time: encoder minilm-l6, float16" in done.stdout


def test_a_part_whose_process_ends_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    options = argparse.Namespace(
        json=tmp_path / "a" / "gpu.json",
        folder=None,
        provider="cpu",
        tiny=True,
        whole=False,
        rounds=1,
        seconds=0,
        budget=5,
    )
    assert bench._each_alone(options, ["encoder minilm-l6", "encoder bert-base"]) == 1
    errors = json.loads((tmp_path / "a" / "gpu.json").read_text())["errors"]
    assert errors == [
        {"what": f"encoder {name}", "error": "its process ended with 1"} for name in ("minilm-l6", "bert-base")
    ]


def test_one_that_fails_leaves_the_others_their_rounds(tmp_path: Path) -> None:
    results = record.Record(tmp_path / "a" / "gpu.json", {}, budget=None, rounds=3, seconds=0)
    calls = {"good": 0, "late": 0}

    def good() -> None:
        calls["good"] += 1

    def late() -> None:
        calls["late"] += 1
        if calls["late"] == 9:
            raise RuntimeError("out of memory")

    def never() -> None:
        raise ValueError("no kernel")

    found = results.take_turns("x", {"never": never, "good": good, "late": late})
    assert list(found) == ["good"]
    assert len(found["good"]) == 3
    errors = {item["what"]: item["error"] for item in json.loads((tmp_path / "a" / "gpu.json").read_text())["errors"]}
    assert errors == {"x, never": "ValueError: no kernel", "x, late": "RuntimeError: out of memory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--provider", "cpu"), "add --tiny"),
        (("--only", "bart"), "names no part; there are: roof, encoder minilm-l6, decoder"),
        (("--rounds", "0"), "--rounds takes a number from 1 on"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
