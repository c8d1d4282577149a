"""The report page and the table on the terminal: complete, escaped, self-contained, and tolerant of missing parts."""

from __future__ import annotations

import dataclasses
import html
import io
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from onnxpress import terminal
from onnxpress.manifest import FileEntry, Json, Manifest, Signature, TensorSpec
from onnxpress.report import build_command, render_report

HOSTILE = '<script>alert("1")</script> & $\\frac{$ 模型'


def row(name: str, status: str, quality: float | None, size: float, **more: Json) -> dict[str, Json]:
    """One row of a ledger; sizes in MB."""
    return {
        "pass": name, "status": status, "reason": f"why of {name}", "changes": 3, "notes": [f"note of {name}"],
        "metric": "cosine_mean", "quality": quality, "quality_before": 1.0, "bytes": int(size * 1e6),
        "bytes_before": 90_000_000, **more,
    }  # fmt: skip


def make_manifest(*ledger: dict[str, Json], **more: Any) -> Manifest:
    first = row("export", "kept", 1.0, 90.0, changes=0, quality_before=None, bytes_before=None)
    manifest = Manifest(
        name="minilm",
        target="cpu",
        precision="int8",
        signature=Signature(
            task="feature-extraction",
            inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"), bounds=(0, 30521)),),
            outputs=(TensorSpec(name="embeddings", dtype="float32", shape=("batch", 384)),),
            axes={"batch": (1, 1024), "length": (1, 512)},
        ),
        options={},
        session={},
        recipe={"model": {"source": "folder/my model", "task": None}, "build": {"target": "cpu", "precision": "int8"}},
        ledger=(first, *ledger),
        versions={"onnxruntime": "1.32.0"},
        minimum_onnxruntime="1.30",
        operators={"MatMul": 4, "Attention": 6, "com.microsoft::MatMulIntegerToFloat": 36},
        files={"model.onnx": FileEntry(sha256="ab" * 32, size=23_192_453)},
    )
    return dataclasses.replace(manifest, **more)


LEDGER = (
    row("fold", "unchanged", 1.0, 90.0, changes=0),
    row("fuse-gelu", "undone", 1.0, 90.0),
    row("int8", "repaired", 0.9925, 23.1, batch_cosine=0.99987),
)
MEASURED: dict[str, Json] = {
    "machine": {"processor": "A processor", "instruction_sets": ["avx2"], "cores": 2, "memory_bytes": 2**34, "system": "S"},
    "date": "2026-11-24T13:20:06+00:00",
    "rows": [{"pass": "int8", "latency_before_ms": 200.4, "latency_ms": 83.4}],
    "latency": [
        {"system": system, "batch": batch, "length": 128, "shape": [batch, 128], "median_ms": factor * batch}
        for batch in (1, 8)
        for system, factor in (("PyTorch", 20.0), ("export", 10.0), ("artifact", 4.0))
    ],
    "operators_before": {"MatMul": 40, "Add": 50},
    "budget": {"metric": "cosine_mean", "limit": 0.99},
    "note": "a note",
    "tokens_per_chunk": 256,
    "build_seconds": 37.5,
    "peak_memory_bytes": 1_240_000_000,
}  # fmt: skip


class Reader(HTMLParser):
    """Checks that elements close in order, and keeps texts, tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data.strip())


def test_everything_is_on_the_page() -> None:
    page = render_report(make_manifest(*LEDGER), MEASURED)
    text = " ".join(Reader(page).texts)
    for words in (
        "minilm", "feature-extraction · cpu · int8", "within budget", "mean cosine 0.9925, where at least 0.99 is required",
        "repaired: int8; undone: fuse-gelu", "23.1 MB", "from 90.0 MB (3.9× smaller)", "Latency at 1 × 128", "4 ms",
        "PyTorch 20 ms, plain export 10 ms", "0.99987", "why of fuse-gelu", "note of int8", "1 → 0.9925", "90.0 → 23.1",
        "200 → 83.4", "5.00×", "2.50×", "256 tokens", "0 to 30,521", "batch × 384", "batch from 1 to 1,024",
        "A processor (avx2), 2 cores, 16 GiB", "38 s", "1.24 GB", "onnxruntime 1.32.0", "a note",
        "onnxpress build 'folder/my model' --target cpu --precision int8", "onnxpress verify ARTIFACT", "23,192,453",
        "Operators: 90 before, 46 after", "MatMulIntegerToFloat",
    ):  # fmt: skip
        assert words in text, words


def test_the_curve_of_an_automatic_plan() -> None:
    """What lost is in the ledger and in the curve, not among the passes that made the artifact."""
    ledger = (
        row("int8", "repaired", 0.9925, 23.1, batch_cosine=0.99987, curve=[]),
        row("int8-dynamic", "lost", 0.9955, 40.0, batch_cosine=0.12345, curve=[]),
        row("int4-weights", "undone", 0.5, 14.0, curve=[]),
    )
    times = [{"pass": "int8-dynamic", "latency_before_ms": 10.0, "latency_ms": 7.3, "share_of_time": 0.731}]
    page = render_report(make_manifest(*ledger), {**MEASURED, "rows": times, "curve": [
        point("int8", 0, 0.9, 0.55, 20.0), point("int8", 2, 0.9925, 0.6, 23.1, chosen=True),
        point("int8-dynamic", 0, 0.9955, 0.731, 40.0), point("int4-weights", 0, -30.0, 1.2, 14.0),
        {**point("fp16", 0, 0.0, 0.9, 45.0), "quality": None},
    ]})  # fmt: skip
    text = " ".join(Reader(page).texts)
    for words in (
        "What was tried to keep the budget", "time, as a share of float", "budget 0.99", "2 of 38", "int8 (chosen)", "0.73",
        "why of int8-dynamic; 0.73 × the time of float", "lost", "0.99987",
    ):  # fmt: skip
        assert words in text, words
    assert "0.12345" not in text
    assert "undone: int4-weights" not in text  # a candidate is no pass that failed
    assert "time is each plan's in turns with float" in text
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    curve = next(drawing for drawing in drawings if "4 points; chosen int8, 23.1 MB, 0.9925" in drawing)
    ElementTree.fromstring(curve)
    assert "↓" in curve
    quality = next(drawing for drawing in drawings if "Quality after each pass" in drawing)
    assert "int8-dynamic" not in quality
    untimed = [point("int8", 0, 0.9925, None, 23.1, chosen=True)]
    page = render_report(make_manifest(*ledger), {**MEASURED, "curve": untimed})
    assert "time" not in page[page.index("What was tried to keep the budget") : page.index("The same in numbers")]


def point(
    plan: str, kept: int, quality: float, share: float | None, size: float, *, chosen: bool = False
) -> dict[str, Json]:
    times = None if share is None else 10 * share
    return {
        "plan": plan, "kept": kept, "places": 38, "quality": quality, "holds": quality >= 0.99, "bytes": int(size * 1e6),
        "latency_before_ms": 10.0, "latency_ms": times, "share_of_time": share, "chosen": chosen,
    }  # fmt: skip


def test_it_needs_no_network_and_no_scripts() -> None:
    reader = Reader(render_report(make_manifest(*LEDGER), MEASURED))
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert str(value).startswith("#")
    assert "@import" not in render_report(make_manifest(), MEASURED)
    assert not re.search(r"url\((?!#)", render_report(make_manifest(*LEDGER), MEASURED))


def test_drawings_are_valid_follow_the_page_and_share_no_identifiers() -> None:
    page = render_report(make_manifest(*LEDGER), MEASURED)
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4
    identifiers: list[str] = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        identifiers += re.findall(r' id="([^"]+)"', drawing)
        own = set(re.findall(r' id="([^"]+)"', drawing))
        assert set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', drawing)) <= own
        assert "var(--ink)" in drawing
        assert "<text" in drawing
        assert not re.search(r"#00000[1-6]", drawing)
    assert len(set(identifiers)) == len(identifiers)
    assert "prefers-color-scheme: dark" in page


def test_what_comes_from_outside_is_escaped() -> None:
    spec = TensorSpec(name=HOSTILE, dtype=HOSTILE, shape=(HOSTILE,))
    ledger = (row(HOSTILE, "kept", 0.995, 23.0, reason=HOSTILE, notes=[HOSTILE], metric=HOSTILE),)
    manifest = make_manifest(
        *ledger, name=HOSTILE, target=HOSTILE, precision=HOSTILE, versions={HOSTILE: HOSTILE}, operators={HOSTILE: 2},
        signature=Signature(task=HOSTILE, inputs=(spec,), outputs=(spec,), axes={HOSTILE: (1, 2)}),
        recipe={"model": {"source": HOSTILE}}, files={HOSTILE: FileEntry(sha256=HOSTILE, size=1)},
        minimum_onnxruntime=HOSTILE,
    )  # fmt: skip
    machine = {"processor": HOSTILE, "instruction_sets": [HOSTILE], "cores": HOSTILE, "system": HOSTILE}
    latency = [{"system": HOSTILE, "batch": 1, "length": 2, "median_ms": 3.0}]
    measured = {
        **MEASURED, "machine": machine, "date": HOSTILE, "note": HOSTILE, "latency": latency,
        "operators_before": {HOSTILE: 3}, "tokens_per_chunk": HOSTILE,
    }  # fmt: skip
    page = render_report(manifest, measured)
    assert "script" not in Reader(page).tags
    assert "<script" not in page
    assert html.escape(HOSTILE) in page


def test_a_result_below_the_budget_says_so() -> None:
    page = render_report(make_manifest(row("int8", "kept", 0.95, 23.0)), MEASURED)
    assert "below budget" in page
    assert "within budget" not in page
    budget = {**MEASURED["budget"], "limit": 0.950000004}  # all digits of the quality that is said in six
    assert "within budget" in render_report(
        make_manifest(row("int8", "kept", 0.95, 23.0)), MEASURED | {"budget": budget}
    )
    page = render_report(make_manifest(row("int8", "kept", float("nan"), 23.0)), MEASURED | {"rows": []})
    assert "below budget" in page


@pytest.mark.parametrize("missing", [*MEASURED, "everything"])
def test_parts_that_were_not_measured_are_left_out(missing: str) -> None:
    measured = {} if missing == "everything" else {key: value for key, value in MEASURED.items() if key != missing}
    page = render_report(make_manifest(*LEDGER), measured)
    Reader(page)
    assert ("<h2>Speed</h2>" in page) == ("latency" in measured)
    assert ("within budget" in page) == ("budget" in measured)
    assert "None" not in page


def test_systems_that_miss_shapes() -> None:
    """PyTorch may be too slow for the largest shape, a module may have no length, and nothing but the artifact."""
    latency = [row for row in MEASURED["latency"] if row["system"] != "PyTorch" or row["batch"] == 1]
    assert "–" in render_report(make_manifest(*LEDGER), MEASURED | {"latency": latency})
    latency = [{"system": "artifact", "batch": 4, "length": None, "median_ms": 1.5}]
    assert "Latency at 4" in render_report(make_manifest(*LEDGER), MEASURED | {"latency": latency})
    latency = [{"system": "PyTorch", "batch": 4, "length": 7, "median_ms": 1.5}]
    Reader(render_report(make_manifest(*LEDGER), MEASURED | {"latency": latency}))


def test_an_export_alone() -> None:
    page = render_report(make_manifest(operators={}), {})
    Reader(page)
    assert make_manifest().name in page
    assert "Latency" not in page


def test_the_same_page_every_time() -> None:
    assert render_report(make_manifest(*LEDGER), MEASURED) == render_report(make_manifest(*LEDGER), MEASURED)


@pytest.mark.parametrize(
    "content",
    [
        {
            "model": {"source": "some folder", "task": "text-classification", "max_length": 64, "revision": "main"},
            "build": {"name": "it's", "target": "cpu", "precision": "int8", "keep_all": True, "measure": False},
            "quality": {"budget": "0.5%", "file": "a b.csv", "columns": {"text": "body", "label": 2}},
        },
        {
            "model": {"source": "llama", "task": "text-generation", "adapter": "my lora", "hidden_states": True},
            "build": {"target": "cpu", "precision": "int4-weights", "cache": "int8"},
            "quality": {"file": "a.txt", "calibration": "b.txt"},
            "prune": {"ffn": 0.5, "layers": 1},
            "distil": {"file": "c.txt"},
        },
        {
            "model": {"source": "bert"},
            "build": {"target": "cpu"},
            "prune": {"layers": 1},
            "distil": {},
        },
        {
            "model": {"source": "bert"},
            "build": {"target": "cpu"},
            "prune": {"layers": 1},
            "distil": {"checkpoints": "2024"},
        },
        {
            "model": {"source": "bert"},
            "build": {"target": "cpu", "precision": "int8-qdq"},
            "prune": {"ffn": 0.5, "heads": 0.33, "multiple": 8},
            "distil": {"file": "c d.csv", "epochs": 4, "batch_size": 8, "columns": {"text": "a b"}},
            "passes": {"int8-qdq": {"calibration": "entropy", "bias_correction": True, "smooth": 0.5}},
        },
    ],
)
def test_the_command_builds_the_same_recipe_again(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words on the page go through the command line's own parser and give the recipe back."""
    import shlex

    from onnxpress import cli, pipeline
    from onnxpress.recipe import make_recipe

    recipe = make_recipe(content)
    seen: list[Any] = []

    def keep(given: Any, **_: Any) -> Any:
        seen.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "build", keep)
    words = shlex.split(build_command(recipe.model_dump(mode="json")))
    assert words[0] == "onnxpress"
    assert cli.main(words[1:]) == 130
    assert seen == [recipe]
    counted = make_recipe({**content, "quality": {"samples": 16}}).model_dump(mode="json")
    assert build_command(counted).endswith("  # with [quality] samples = 16 in a recipe")
    python = build_command({"model": {"source": "python:shop.Net"}})
    assert python == "onnxpress.build(model, example_inputs=…)  # shop.Net"


# The terminal


def artifact(manifest: Manifest, measured: Any = MEASURED) -> Any:
    return SimpleNamespace(manifest=manifest, measured=measured, path=Path("out[1]/a[b]c"))


def printed(table: Any, width: int) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return buffer.getvalue()


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_table_loses_nothing_on_a_narrow_terminal(width: int) -> None:
    table = terminal.ledger_table(artifact(make_manifest(*LEDGER)))
    text = printed(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("0.9925", "23.1", "90.0", "200", "→", "83.4"):
        assert figure in text, figure
    letters = sorted(re.sub(r"[\s─]", "", text))
    assert letters == sorted(re.sub(r"[\s─]", "", printed(table, 200)))


def test_brackets_in_names_and_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_build(artifact(make_manifest(*LEDGER, name="my[/b]model"), MEASURED | {"note": "[/x] note"}))
    text = capsys.readouterr().out
    assert "my[/b]model" in text
    assert "out[1]/a[b]c: 23.2 MB" in text
    assert "[/x] note" in text
    assert "int8: why of int8; note of int8" in text


def test_a_build_that_timed_nothing_prints(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"rows": [], "build_seconds": 1.0, "peak_memory_bytes": 1, "note": ""}
    terminal.print_build(artifact(make_manifest(*LEDGER), measured))
    assert "→" not in capsys.readouterr().out


def test_a_long_step_says_where_it_is_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_SAY_EVERY", 0.05)
    with terminal.Progress(enabled=True) as progress:
        progress.step("int8-qdq")
        progress.detail("sensitivity 1 of 9")
        time.sleep(0.1)
        progress.detail("sensitivity 2 of 9")
        progress.detail("sensitivity 3 of 9")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "  int8-qdq: sensitivity 2 of 9"
    assert said[1].startswith("  int8-qdq 0.")
    assert len(said) == 2


def test_progress_is_lines_on_stderr_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Progress(enabled=True) as progress:
        progress.step("fold [/b]")
        progress.detail("half")
        progress.step("int8")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"  fold \[/b\] \d+\.\d s\n  int8 \d+\.\d s\n", captured.err)


def test_progress_names_the_step_that_failed_and_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = terminal.Progress(enabled=True)
    progress.step("int8")
    error = ValueError("broken")
    progress.__exit__(ValueError, error, None)
    assert capsys.readouterr().err == "  int8 failed\n"
    with terminal.Progress(enabled=False) as progress:
        progress.step("int8")
    assert capsys.readouterr().err == ""
