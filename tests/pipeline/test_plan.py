"""The automatic plan: real builds of a network in which one layer is very sensitive, and the choice among plans.

The network: six layers of 64 numbers. One channel between the third and the fourth is a thousand times as large as the
others, and the fourth layer's weights undo it: 8 bits for that layer's inputs leave nothing of the other channels.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxpress
from onnxpress import artifact as artifact_module
from onnxpress.budgets import Budget
from onnxpress.errors import BudgetError, OutputError, RecipeError
from onnxpress.foreign import open_onnx
from onnxpress.gate import Gate, Judgement
from onnxpress.module_workload import ModuleWorkload
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.targets import target
from onnxpress.plan import Plan, choose, choose_automatically, mixed_plan, whole_plan
from onnxpress.trials import Notebook, Trials, describe_steps
from onnxpress.workbench import Workbench

LAYERS, SENSITIVE = 6, "layer3"
NONE: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    nodes, weights = [], []
    for index in range(LAYERS):
        weight = random.standard_normal((64, 64)).astype(np.float32) / 5
        if index == 2:
            weight[:, 0] *= 1000
        if index == 3:
            weight[0] /= 1000
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        source = "x" if index == 0 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [f"p{index}"], name=f"layer{index}"))
        nodes.append(helper.make_node("LeakyRelu", [f"p{index}"], [f"h{index + 1}"], name=f"act{index}", alpha=0.1))
    shape = ["batch", 64]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info(f"h{LAYERS}", 1, shape)],
        weights,
    )
    path = tmp_path_factory.mktemp("network") / "network.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def trials_of(network: Path, folder: Path, limit: float, notebook: Notebook | None = None) -> Trials:
    """The trials of int8 on the network, under a budget of its own."""
    exported = open_onnx(network)
    folder.mkdir(exist_ok=True)
    bench = Workbench(folder, target("cpu"))
    workload = ModuleWorkload(signature=exported.graph.signature, example=exported.example)
    return Trials(
        [make_pass("int8")],
        exported.graph,
        bench.open(exported.graph),
        bench=bench,
        gate=Gate(workload, exported.reference, Budget(metric="variance_kept", limit=limit)),
        target=target("cpu"),
        progress=lambda _: None,
        notebook=notebook,
    )


def searched(trials: Trials) -> Plan:
    return mixed_plan(whole_plan("int8", trials, can_run_alone=False), trials, lambda _: None)


def build(network: Path, out: Path, **options: Any) -> artifact_module.Artifact:
    return onnxpress.build(network, out=out, target="cpu", name="same", **{"measure": False, **options})


def test_the_one_sensitive_layer_is_kept_and_no_other(network: Path, tmp_path: Path) -> None:
    trials = trials_of(network, tmp_path / "work", limit=0.98)
    assert not trials.judge(NONE).holds
    plan = searched(trials)
    assert plan.holds
    assert plan.kept == {SENSITIVE}
    assert "1 of 6 places stay in float (layer3)" in plan.sentence(named=True)


def test_along_the_curve_sizes_grow_and_the_sensitivities_serve_every_budget(network: Path, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, "int8", {"model": "network"})
    first = trials_of(network, tmp_path / "one", limit=0.98, notebook=notebook)
    points = searched(first).points()
    assert [len(point.kept) for point in points] == sorted({len(point.kept) for point in points})
    sizes = [point.bytes for point in points]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes) > 2
    alone = {name for kept in first._known for name in [*{f"layer{i}" for i in range(LAYERS)} - kept] if len(kept) == 5}
    assert len(alone) == LAYERS  # each layer was tried alone

    again = trials_of(network, tmp_path / "two", limit=0.98, notebook=notebook)
    assert searched(again) == searched(first)
    assert again.measured == 0
    stricter = trials_of(network, tmp_path / "three", limit=0.9995, notebook=notebook)
    plan = searched(stricter)
    assert plan.kept > {SENSITIVE}
    assert stricter.measured <= 3  # steps of the bisection, and no sensitivity again


def test_what_a_notebook_says_is_measured_again_before_it_is_taken(network: Path, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, "int8", {"model": "network"})
    plan = searched(trials_of(network, tmp_path / "one", limit=0.98, notebook=notebook))
    honest = trials_of(network, tmp_path / "two", limit=0.98, notebook=notebook)
    assert honest.prove(plan.kept).holds
    assert honest.measured == 1
    forged = [trial.model_copy(update={"metrics": {"variance_kept": 1.0}}) for trial in notebook.read()]
    notebook.write(forged)
    with pytest.raises(RecipeError, match=r"variance_kept 1,.*here it is.*remove the file"):
        trials_of(network, tmp_path / "three", limit=0.98, notebook=notebook).prove(NONE)


def test_a_notebook_is_for_one_build_and_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    steps = describe_steps([make_pass("int8")])
    ours = Notebook(tmp_path, "int8", {"graph": "a", "steps": steps})
    ours.write([])
    assert ours.read() == []
    other_options = describe_steps([make_pass("int8", {"minimum_elements": 5})])
    for about in ({"graph": "b", "steps": steps}, {"graph": "a", "steps": other_options}):
        assert Notebook(tmp_path, "int8", about).path != ours.path
    assert [path.name for path in tmp_path.iterdir()] == [ours.path.name]
    whole = ours.path.read_text()
    for content in ("", "[]", whole[:-4], whole.replace('"a"', '"b"'), whole.replace("[]", '[{"kept": 3}]', 1), "\x00"):
        ours.path.write_text(content)
        with pytest.raises(RecipeError, match=r"remove it, or choose another folder for --resume"):
            ours.read()


def test_a_folder_that_cannot_hold_notebooks_is_refused_before_anything_is_done(network: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"--resume cannot be written.*Choose another"):
        build(network, tmp_path / "out", budget="2%", resume=tmp_path / "file" / "notes")
    with pytest.raises(RecipeError, match=r"inside of the artifact .*out, which is replaced"):
        build(network, tmp_path / "out", budget="2%", resume=tmp_path / "out" / "notes")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_search_that_was_killed_goes_on_and_comes_to_the_same(network: Path, tmp_path: Path) -> None:
    straight = build(network, tmp_path / "straight", budget=0.98)
    resume = tmp_path / "notes"
    command = [
        sys.executable, "-m", "onnxpress", "build", str(network), "--target", "cpu", "--name", "same", "--budget", "0.98",
        "--no-measure", "--resume", str(resume), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and noted(resume) < 8:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = noted(resume)
    total = straight.measured["search"]["trials"]
    assert 8 <= done < total
    resumed = build(network, tmp_path / "out", budget="0.98", resume=resume)
    # The chosen plan is measured here in any case, whatever was noted of it.
    assert total - done <= resumed.measured["search"]["trials"] <= total - done + 1
    assert digests(resumed.path)["model.onnx"] == digests(straight.path)["model.onnx"]
    assert resumed.manifest.ledger == straight.manifest.ledger
    other = build(network, tmp_path / "other", budget="0.98", resume=resume, calibration_samples=7)
    assert other.measured["search"]["trials"] >= total - 1


def test_a_named_precision_goes_on_from_its_notes_too(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    real = Gate.measure

    def counted(gate: Gate, session: Any) -> Any:
        measured.append(session)
        return real(gate, session)

    monkeypatch.setattr(Gate, "measure", counted)
    options: dict[str, Any] = {"precision": "int8", "budget": "0.98", "resume": tmp_path / "notes"}
    first = build(network, tmp_path / "first", **options)
    tried = noted(tmp_path / "notes")
    assert len(measured) >= tried > LAYERS
    measured.clear()
    again = build(network, tmp_path / "again", **options)
    assert len(measured) == 1  # the plan that is taken, whatever was noted of it
    assert again.manifest.ledger == first.manifest.ledger
    with pytest.raises(RecipeError, match="--resume keeps what is measured of passes that cost quality"):
        build(network, tmp_path / "none", **{**options, "precision": "fp32"})
    assert not (tmp_path / "none").exists()


def noted(folder: Path) -> int:
    return sum(len(json.loads(path.read_text())["trials"]) for path in folder.glob("*.json"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_an_automatic_build_says_what_it_tried_and_why_others_lost(network: Path, tmp_path: Path) -> None:
    built = build(network, tmp_path / "out", budget="2%")
    rows = {row["pass"]: row for row in built.manifest.ledger}
    assert list(rows)[-6:] == ["int8", "fp32", "int8-dynamic", "int8-qdq", "int8-weights", "int4-weights"]
    chosen = [row for row in built.manifest.ledger[-6:] if row["status"] in ("kept", "repaired")]
    assert [row["pass"] for row in chosen] == [built.manifest.precision]
    assert chosen[0]["reason"].startswith("the smallest that keeps the budget")
    holding = [row for row in built.manifest.ledger[-6:] if row["quality"] >= 0.98]
    assert chosen[0]["bytes"] == min(row["bytes"] for row in holding)
    assert "is smaller" in rows["fp32"]["reason"]
    assert rows["int8"]["status"] in ("lost", "repaired")
    assert [point["kept"] for point in rows["int8"]["curve"]][:2] == [0, 1]
    points = built.measured["curve"]
    assert {point["plan"] for point in points} == set(list(rows)[-6:])
    assert sum(point["chosen"] for point in points) == 1
    assert {point["latency_ms"] for point in points} == {None}
    page = (built.path / "report.html").read_text()
    assert "What was tried to keep the budget" in page
    assert "a point for each plan" in page
    same = build(network, tmp_path / "again", budget="2%")
    leave_out = (artifact_module.MEASURED, artifact_module.REPORT)
    one, two = digests(built.path), digests(same.path)
    assert {name: one[name] for name in one if name not in leave_out} == {
        name: two[name] for name in two if name not in leave_out
    }


def test_an_automatic_build_takes_what_the_clock_says(network: Path, tmp_path: Path) -> None:
    """Whatever the times were: the choice follows from them by the rule that is written down."""
    built = build(network, tmp_path / "out", budget="0.5", measure=True)
    points = [point for point in built.measured["curve"] if point["holds"]]
    assert all(point["latency_ms"] > 0 for point in points)
    best = {}
    for point in points:  # of each plan the point with the fewest places kept
        best.setdefault(point["plan"], point)
    fastest = min(point["share_of_time"] for point in best.values())
    fast = [point for point in best.values() if point["share_of_time"] <= 1.0501 * fastest]
    assert built.manifest.precision in {
        point["plan"] for point in fast if point["bytes"] == min(p["bytes"] for p in fast)
    }
    losers = [row for row in built.manifest.ledger if row["status"] == "lost"]
    assert losers
    assert all(
        f"{built.manifest.precision} is faster, or as fast within 5% and smaller" in row["reason"] for row in losers
    )
    assert "time, as a share of float" in (built.path / "report.html").read_text()


def test_speed_is_not_promised_where_nothing_is_timed(network: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing is timed here.*leave `prefer` out"):
        onnxpress.build(network, budget="1%", prefer="speed", measure=False, out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_only_float_keeps(network: Path, tmp_path: Path) -> None:
    built = build(network, tmp_path / "out", budget="0.99999999")
    rows = {row["pass"]: row for row in built.manifest.ledger}
    assert built.manifest.precision == "fp32"
    assert rows["fp32"]["status"] == "kept"
    assert "what came closest: 5 of 6 places stay in float: variance_kept 0.9" in rows["int8"]["reason"]
    with pytest.raises(
        BudgetError, match=r"pass int8 was asked for.*came closest, of at most half of the places: 3 of 6 places stay"
    ):
        build(network, tmp_path / "named", budget="0.99999999", precision="int8")


def test_a_budget_that_the_original_itself_breaks(network: Path, tmp_path: Path) -> None:
    trials = trials_of(network, tmp_path / "work", limit=2.0)
    with pytest.raises(BudgetError, match=r"variance_kept of at least 2; the original itself has 1, so no plan can"):
        choose_automatically(
            {"int8": trials, "fp32": None},
            trials._gate,
            1,
            trials._gate.verdict(trials._gate.reference_metrics, None),
            by_size=True,
            timed=False,
            step=print,
            progress=print,
        )
    assert trials.measured == 0


def test_a_default_precision_that_breaks_the_default_budget_is_undone_and_named(tmp_path: Path) -> None:
    """No budget is given: the default precision alone is tried. Of one place no half can stay in float."""
    scale = np.ones(64, np.float32)
    scale[0] = 1000
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    nodes = [helper.make_node("Mul", ["x", "scale"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"], name="only")]
    shape = ["batch", 64]
    inputs, outputs = ([helper.make_tensor_value_info(name, 1, shape)] for name in "xy")
    weights = [numpy_helper.from_array(weight / scale[:, None], "w"), numpy_helper.from_array(scale, "scale")]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "one.onnx"
    )
    built = build(tmp_path / "one.onnx", tmp_path / "out")
    row = built.manifest.ledger[-1]
    assert (row["pass"], row["status"]) == ("int8", "undone")
    assert "over the budget" in row["reason"]
    assert built.manifest.precision == "fp32"
    assert set(built.manifest.operators) == {"Mul", "MatMul"}
    assert built.measured["curve"] == []


def plan(name: str, share: float, size: int, quality: float = 1.0) -> Plan:
    judgement = Judgement(metrics={}, metric="m", value=quality, batch_cosine=1, margin=0)
    return Plan(
        name=name, judgement=judgement, bytes=size, times={"1x32": (10.0, 10 * share), "8x128": (50.0, 50 * share)}
    )


def test_the_faster_plan_is_chosen_and_ties_go_by_size_and_order() -> None:
    slow, fast = plan("slow", 0.8, 10), plan("fast", 0.5, 20)
    assert choose([slow, fast], by_size=False) is fast
    assert choose([slow, fast], by_size=True) is slow
    smaller = plan("smaller", 0.52, 15)
    assert choose([slow, fast, smaller], by_size=False) is smaller  # 4 % are the clock's
    twin = plan("twin", 0.5, 20)
    assert choose([twin, fast], by_size=False) is twin
    assert choose([fast, twin], by_size=False) is fast


def test_the_share_of_time_weighs_shapes_equally() -> None:
    judgement = plan("", 1, 1).judgement
    mixed = Plan(name="p", judgement=judgement, bytes=1, times={"1x1": (1.0, 0.5), "1x128": (100.0, 200.0)})
    assert mixed.share_of_time == pytest.approx(1.0)
