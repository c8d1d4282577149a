"""The build: export, verify, press pass by pass under the gate, and write the artifact with its proof.

Every step can be read in `_build`. Nothing is decided anywhere else: what a pass is lives in optimizers, what is
good enough in gate, what a model is tried on in workload.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxpress import evaluation, preflight, terminal
from onnxpress.artifact import Artifact, ArtifactWriter, check_outside
from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.errors import (
    ArtifactError,
    BudgetError,
    ConversionError,
    GoldenError,
    ParityError,
    RecipeError,
    SourceError,
)
from onnxpress.exporters import DecoderParityCheck, Exported, Found, ParityCheck, ParityRow, export, find
from onnxpress.foreign import open_onnx
from onnxpress.gate import Gate
from onnxpress.golden import write_golden
from onnxpress.graph import Graph
from onnxpress.machine import describe, peak_memory_bytes
from onnxpress.manifest import Json, Manifest, Runnable
from onnxpress.module_workload import ModuleWorkload
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import Pass, PassContext
from onnxpress.optimizers.targets import Target
from onnxpress.optimizers.targets import target as find_target
from onnxpress.plan import Plan, choose_automatically, curve, mixed_plan, proven, whole_plan
from onnxpress.pruning import Smaller, make_smaller
from onnxpress.recipe import BuildSection, ModelSection, QualitySection, Recipe, make_recipe, read_recipe
from onnxpress.report import render_report
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.loading import check_onnxruntime
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session
from onnxpress.runtime.wheel import version_of
from onnxpress.sample_arrays import read_arrays
from onnxpress.timing import alternate
from onnxpress.trials import Notebook, Times, Trials, describe_steps, digest_of_files, notebook_folder
from onnxpress.workbench import RowByRow, Workbench, attends_in_float, save, session_options
from onnxpress.workload import TextWorkload, Workload, workload_file

if TYPE_CHECKING:
    import torch

MINIMUM_ONNXRUNTIME = "1.30"
_MINIMUM_FOR_GENERATION = "1.32"  # GroupQueryAttention with query_seqlens
_MINIMUM_FOR_UNIFORM_STEPS = "1.31"  # without
_INT8_CACHE = "int8-cache"  # of the lossy passes the one that leaves the weights alone
_SLOWER = 1.05  # a pass must not take more than this share of the time before it
_MOST_KEPT = 0.5  # of the groups of places, where one precision was chosen: with more it would not be that precision
_NOISE_MS = 0.05  # differences below this are the clock's
_PARITY_CACHE = 2**32  # bytes of keys and values while a graph is compared
_SAMPLES, _CALIBRATION_SAMPLES = 200, 128  # that a model is tried on where the recipe says no number
_RANDOM_SAMPLES = 64  # that a module is tried on where no arrays are given
_TORCH_FREE = ("torch", "transformers", "onnx")


def build(
    source: str | os.PathLike[str] | torch.nn.Module | Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    resume: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    **options: Any,
) -> Artifact:
    """Build an artifact and return it.

    source: a recipe (file or object), a model folder, a hub id, "package.module:factory", an .onnx file, or a
    torch.nn.Module with example_inputs (a tuple or dict of tensors) and perhaps dynamic_axes ({input: {axis: name}};
    without it axis 0 is tried as the batch). out: the artifact's folder (default artifacts/NAME). options: any key of a
    recipe's sections: task, revision, max_length, trust_remote_code, adapter, hidden_states, name, target, precision, prefer, cache, only,
    keep_all, measure, budget, file, calibration, columns, samples, calibration_samples; passes, a dict of each pass's options; prune
    and distil, dicts of those sections' keys. They overrule the recipe's. resume: a folder in which a search keeps what it measured, so that one that was interrupted goes on
    from there. quiet: no progress.

    Raises RecipeError, SourceError, ConversionError, ParityError, BudgetError, OutputError.
    """
    import torch

    module = None
    if isinstance(source, Recipe):
        recipe = source
    elif isinstance(source, str | os.PathLike) and str(source).endswith(".toml"):
        recipe = read_recipe(Path(source))
    elif isinstance(source, str | os.PathLike):
        recipe = make_recipe({"model": {"source": os.fspath(source)}})
    elif not isinstance(source, torch.nn.Module):
        raise SourceError(f"A {type(source).__name__} was given as source; a name, a recipe or a module is expected.")
    else:
        module = source
        recipe = make_recipe({"model": {"source": f"python:{type(source).__module__}.{type(source).__qualname__}"}})
    recipe = with_options(recipe, options)
    folder = Path(out) if out is not None else Path("artifacts") / _name(recipe)
    report = terminal.Progress(enabled=not quiet)
    with report:
        given = _Given(module, example_inputs, dynamic_axes)
        notes = None if resume is None else notebook_folder(Path(resume), folder)
        return _build(recipe, folder, given, report, notes)


class _Given(NamedTuple):
    """What was given in Python and no recipe can hold."""

    module: torch.nn.Module | None
    example_inputs: Any
    dynamic_axes: Mapping[str, Mapping[int, str]] | None


class _Resume(NamedTuple):
    """Where searches keep their trials, and what these hang on beside the graph and the passes."""

    folder: Path
    about: Mapping[str, Json]


def _build(
    recipe: Recipe, folder: Path, given: _Given, report: terminal.Progress, resume: Path | None = None
) -> Artifact:
    started = time.perf_counter()
    facts = find_target(recipe.build.target)
    if recipe.distil is not None and recipe.distil.checkpoints is not None:
        check_outside(Path(recipe.distil.checkpoints), folder, "distil.checkpoints")
    evaluation_file = workload_file(recipe.quality.file, "evaluation")
    calibration_file = workload_file(recipe.quality.calibration, "calibration")
    with ArtifactWriter(folder) as writer:
        work = writer.folder / ".work"
        work.mkdir()
        bench = Workbench(work, facts)

        report.step("find the model, check what is asked for")
        found = _find(recipe, given)
        task, labels = ("module", {}) if found is None else (found.task, found.options)
        preflight.check(recipe, task, labels, resume=resume is not None)

        report.step("export")
        exported = _export(recipe, found)
        _copy_files(exported, writer.folder)
        workload = _workload(recipe, exported, writer.folder, evaluation_file, calibration_file)
        budget = evaluation.budget_for(
            workload.task,
            recipe.quality.budget,
            labelled=_is_labelled(workload),
            problem_type=exported.options.get("problem_type"),
        )

        report.step("verify the export against the original")
        if _generates(exported):
            bench.timed = bench.timed and not facts.uniform_steps
            check_onnxruntime(_minimum(exported, facts), "A language model")
            ChatTemplate.from_folder(writer.folder)  # one that is not valid is said now
        parity = _Parity(exported)
        try:
            plain = bench.open(exported.graph)
        except ArtifactError as error:
            raise ConversionError(f"{exported.name} does not run on ONNX Runtime: {error.__cause__ or error}") from None
        parity_rows = parity.check(plain)
        gate = Gate(workload, exported.reference, budget)

        notes = None if resume is None else _Resume(resume, _about(recipe, workload, bench))
        press = _Press(recipe, bench, gate, parity, exported.graph, plain, report, notes)
        if recipe.prune is not None:
            report.step("prune")
            smaller = make_smaller(
                exported,
                recipe,
                facts,
                bench=bench,
                workload=workload,
                tokenizer_folder=writer.folder,
                export_again=partial(_export, recipe, found),
                progress=report.detail,
            )
            press.begin_with(smaller, _Parity(smaller.exported))
        steps = [make_pass(name, recipe.passes.get(name)) for name in recipe.pass_names(workload.task)]
        for step in steps:
            if step.lossless:
                press.run(step)
        if recipe.automatic:
            press.choose(recipe.plans(workload.task))
        for step in steps:
            if not step.lossless:
                press.run(step)

        if facts.uniform_steps and attends_in_float(press.graph):
            raise RecipeError(
                f"The attention of {exported.name} is still in float32, for which the provider {facts.name} has no kernel: `only` has to "
                "end with fp16, or give --precision fp16."
            )
        report.step("golden outputs")
        save(press.graph, writer.folder / "model.onnx")
        tolerance = write_golden(
            writer.folder / "golden.safetensors",
            press.session,
            workload.golden(press.session),
            unrounded=None if press.exact else press.unrounded,
        )
        options: dict[str, Json] = {**exported.options, "golden_tolerance": tolerance}
        how: dict[str, Json] = session_options(facts, press.graph.signature)
        if facts.providers != ("cpu",):
            how["providers"] = list(facts.providers)
        if press.rows_alone:
            how["tokens_per_chunk"] = 1
        manifest = Manifest(
            name=_name(recipe),
            target=facts.name,
            precision=press.precision,
            signature=press.graph.signature,
            options=options,
            session=how,
            recipe=recipe.model_dump(mode="json"),
            ledger=(
                {
                    "pass": "export",
                    "status": "kept",
                    "reason": _parity_sentence(parity_rows),
                    "changes": 0,
                    "notes": [*exported.notes, *parity.notes, *workload.notes],
                    "metric": budget.metric,
                    "quality": _rounded(gate.reference_value),
                    "quality_before": None,
                    "bytes": exported.graph.weight_bytes(),
                    "bytes_before": None,
                },
                *press.ledger,
            ),
            versions=_versions(),
            minimum_onnxruntime=_minimum(exported, facts),
            operators=press.graph.operators(),
            files={},
        )
        measured: dict[str, Json] = {
            "machine": describe(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rows": press.measured,
            "curve": press.curve,
            "search": press.search,
            "latency": [],
            "operators_before": exported.graph.operators(),
            "budget": {"metric": budget.metric, "limit": budget.limit_value(gate.reference_value)},
            "note": bench.note,
        }
        if recipe.build.measure and bench.timed:
            report.step("measure")
            measured["latency"] = _latency(
                workload, _timed_systems(workload, exported.reference, {"export": plain, "artifact": press.session})
            )
            if isinstance(workload, TextWorkload) and not press.rows_alone and press.session.on_cpu:
                measured["tokens_per_chunk"] = _fastest_chunk(workload, press.session)
        shutil.rmtree(work)
        measured["build_seconds"] = round(time.perf_counter() - started, 1)
        measured["peak_memory_bytes"] = peak_memory_bytes()

        report.step("reopen without torch and check the golden outputs")
        manifest = writer.seal(manifest)
        writer.write_measured(measured, render_report(manifest, measured))
        _check_in_fresh_process(writer.folder, facts.providers if bench.on_target else ("cpu",))
        return writer.publish()


class _Parity:
    """The comparison with the original that suits the task: of single answers, or step by step."""

    def __init__(self, exported: Exported) -> None:
        self._context = exported.options.get("max_length", 0)
        self._inner = DecoderParityCheck(exported) if _generates(exported) else ParityCheck(exported)
        self.notes = self._inner.notes

    def check(self, session: Session) -> list[ParityRow]:
        """One row a comparison. Raises ParityError."""
        if isinstance(self._inner, ParityCheck):
            return self._inner.check(session)

        def with_an_empty_cache() -> ModelStep:
            return ModelStep(
                session,
                KeyValueCache(
                    session.signature.inputs, context=self._context, budget=_PARITY_CACHE, memory=session.memory
                ),
            )

        return self._inner.check(with_an_empty_cache)


class _Press:
    """The graph as it stands, and what became of each pass."""

    def __init__(
        self,
        recipe: Recipe,
        bench: Workbench,
        gate: Gate,
        parity: _Parity,
        graph: Graph,
        session: Session,
        report: terminal.Progress,
        resume: _Resume | None,
    ) -> None:
        self.graph = graph
        self.session = session
        self.ledger: list[dict[str, Json]] = []
        self.measured: list[dict[str, Json]] = []
        self.curve: list[dict[str, Json]] = []
        self.search: dict[str, Json] = {}
        self.precision = "fp32"
        self.exact = True
        self.unrounded = session  # what answers as the graph did before the first lossy pass
        self.rows_alone = False
        self._quality = _rounded(gate.reference_value)
        self._as_it_is = gate.verdict(gate.reference_metrics, 1.0)  # what is said of the float graph
        self._recipe, self._bench, self._gate, self._parity, self._report = recipe, bench, gate, parity, report
        self._target, self._resume = find_target(recipe.build.target), resume

    def begin_with(self, smaller: Smaller, parity: _Parity) -> None:
        """Go on with a pruned model, whose own answers passes that lose nothing keep. Raises BudgetError."""
        session = self._bench.open(smaller.exported.graph)
        parity.check(session)
        judgement = self._gate.verdict(*self._gate.measure(session))
        row = self._row("prune", smaller.changes, smaller.notes)
        row["quality"] = _rounded(judgement.value)
        row["metrics"] = {name: _rounded(value) for name, value in judgement.metrics.items()}
        if not judgement.holds and not self._recipe.build.keep_all:
            raise BudgetError(
                f"The pruned model is not good enough: {judgement.sentence()}; the original has "
                f"{self._gate.budget.metric} {self._gate.reference_value:.5g}. Prune less, "
                + (
                    "let it learn with [distil] (for longer, or on more of the texts that it is for), "
                    if smaller.can_learn
                    else ""
                )
                + "allow more with --budget, or keep it all the same with --keep-all."
            )
        if smaller.planned is not None:
            parity.check(
                self._bench.open(smaller.planned)
            )  # the graph that was pruned, against the module made as small
        self._parity, self._as_it_is, self.unrounded = parity, judgement, session
        self._slower("prune", session)
        self._take(row, smaller.exported.graph, session, status="kept", reason=judgement.sentence())

    def run(self, step: Pass) -> None:
        """Try one pass: keep it, repair it, or undo it; one row of the ledger either way."""
        self._report.step(step.name)
        if step.lossless:
            self._run_lossless(step)
        else:
            self._run_lossy(step)

    def _run_lossless(self, step: Pass) -> None:
        result = step.apply(self.graph.clone(), PassContext(target=self._target))
        row = self._row(step.name, result.changes, result.notes)
        if result.changes == 0:
            self._record(row, status="unchanged", reason="nothing to change")
            return
        session = self._bench.open(result.graph)
        try:
            self._parity.check(session)
        except ParityError as error:
            self._record(row, status="undone", reason=f"changed the answers: {error}")
            return
        slower = self._slower(step.name, session)
        if slower and not self._recipe.build.keep_all and not self._recipe.build.only:
            self._record(row, status="undone", reason=slower)
            return
        reason = "answers as before" + (f"; {slower}" if slower else "")
        self._take(row, result.graph, session, status="kept", reason=reason)

    def _run_lossy(self, step: Pass) -> None:
        trials = self._trials(step.name, (step,))
        whole = trials.measure(frozenset())
        row = self._row(step.name, whole.changes, whole.notes)
        if whole.changes == 0:
            self._record(row, status="undone", reason="nothing to change")
            self._refuse(step, row)
            return
        plan = whole_plan(step.name, trials, can_run_alone=self._gate.workload.rows_can_run_alone)
        if not plan.holds and not self._recipe.build.keep_all:
            over = f"over the budget: {plan.sentence()}"
            plan = mixed_plan(plan, trials, self._report.detail, share=_MOST_KEPT)
            if not plan.holds:
                row["quality"] = _rounded(plan.judgement.value)
                closest = f"; what came closest: {plan.sentence()}" if plan.kept else ""
                self._record(row, status="undone", reason=over + closest)
                self._refuse(step, row)
                return
        plan = proven(plan, trials)
        self._fill(row, plan)
        session = trials.apply(plan.kept).session
        slower = self._slower(step.name, RowByRow(session) if plan.rows_alone else session)
        if slower and not self._explicit(step):
            self._record(row, status="undone", reason=slower)
            return
        reason = plan.sentence(named=True) + (f"; {slower}" if slower else "")
        self._take_plan(row, plan, trials, status=plan.status, reason=reason)
        if step.name != _INT8_CACHE:
            self.precision = self._recipe.build.precision or step.name

    def choose(self, precisions: Mapping[str, Sequence[str]]) -> None:
        """The automatic plan: try all of some precisions and take the best; one row of the ledger each."""
        started = time.perf_counter()
        build = self._recipe.build
        timed = build.measure and self._bench.timed
        candidates: dict[str, Trials | None] = {
            name: self._trials(name, [make_pass(step, self._recipe.passes.get(step)) for step in steps])
            if steps
            else None
            for name, steps in precisions.items()
        }
        choice = choose_automatically(
            candidates,
            self._gate,
            self.graph.weight_bytes(),
            self._as_it_is,
            by_size=build.prefer == "size" or not timed,
            timed=timed,
            step=self._report.step,
            progress=self._report.detail,
        )
        self.curve = curve(choice)
        rows = [
            self._row(item.name, item.plan.changes if item.plan else 0, item.plan.notes if item.plan else ())
            for item in choice.outcomes
        ]
        for outcome, row in zip(choice.outcomes, rows, strict=True):
            plan, trials = outcome.plan, candidates[outcome.name]
            if plan is not None:
                self._fill(row, plan)
                row["bytes"] = plan.bytes
                row["curve"] = [
                    {key: point[key] for key in ("kept", "quality", "bytes")}
                    for point in self.curve
                    if point["plan"] == outcome.name
                ]
                if plan.times is not None:
                    self._record_times(outcome.name, plan.times, share_of_time=round(plan.share_of_time, 4))
            if plan is not choice.chosen or trials is None:
                self._record(row, status=outcome.status, reason=outcome.reason)
            else:
                self._take_plan(row, plan, trials, status=outcome.status, reason=outcome.reason)
                self.precision = plan.name
        self.search = {
            "seconds": round(time.perf_counter() - started, 1),
            "trials": sum(trials.measured for trials in candidates.values() if trials is not None),
        }

    def _trials(self, name: str, steps: Sequence[Pass]) -> Trials:
        notebook = None
        if self._resume is not None:
            files = sorted(self.session.path.parent.iterdir())
            about = {"graph": digest_of_files(files), "steps": describe_steps(steps), **self._resume.about}
            notebook = Notebook(self._resume.folder, name, about)
        return Trials(
            steps,
            self.graph,
            self.session,
            bench=self._bench,
            gate=self._gate,
            target=self._target,
            report=self._report,
            notebook=notebook,
        )

    def _fill(self, row: dict[str, Json], plan: Plan) -> None:
        """What the evaluation says of a plan."""
        row["changes"], row["notes"] = plan.changes, list(plan.notes)
        row["quality"] = _rounded(plan.judgement.value)
        row["batch_cosine"] = _rounded(plan.judgement.batch_cosine)
        row["metrics"] = {name: _rounded(value) for name, value in plan.judgement.metrics.items()}

    def _take_plan(self, row: dict[str, Json], plan: Plan, trials: Trials, *, status: str, reason: str) -> None:
        result, session = trials.apply(plan.kept)
        self._take(row, result.graph, session, status=status, reason=reason)
        self.exact, self.rows_alone = False, plan.rows_alone

    def _explicit(self, step: Pass) -> bool:
        """Whether the recipe asks for a lossy pass by name."""
        build = self._recipe.build
        return build.keep_all or build.precision is not None or bool(build.only) or step.name == _INT8_CACHE

    def _refuse(self, step: Pass, row: Mapping[str, Json]) -> None:
        """A precision that was asked for by name is never left out in silence."""
        if self._explicit(step):
            why = "; ".join([row["reason"], *row["notes"]])
            instead = "leave out --cache int8" if step.name == _INT8_CACHE else "choose another --precision"
            raise BudgetError(
                f"The pass {step.name} was asked for and cannot be kept: {why}. Allow more with --budget, {instead}, or "
                "keep it in spite of the budget with --keep-all."
            )

    def _slower(self, name: str, session: Runnable) -> str:
        """Why a pass does not pay, or nothing. Records the times."""
        if not self._recipe.build.measure or not self._bench.timed:
            return ""
        rows = self._bench.compare(self.session, session, self._gate.workload.timing)
        self._record_times(name, {"x".join(map(str, shape)): pair for shape, pair in rows.items()})
        worse = all(new > old * _SLOWER and new - old > _NOISE_MS for old, new in rows.values())
        return "slower on the build machine at every shape tried (times: measured.json)" if worse else ""

    def _record_times(self, name: str, times: Times, **more: Json) -> None:
        before, after = (sum(pair[i] for pair in times.values()) for i in (0, 1))
        self.measured.append(
            {
                "pass": name,
                "latency_before_ms": round(before, 4),
                "latency_ms": round(after, 4),
                "shapes": {shape: [round(time, 4) for time in pair] for shape, pair in times.items()},
                **more,
            }
        )

    def _row(self, name: str, changes: int, notes: tuple[str, ...]) -> dict[str, Json]:
        return {
            "pass": name,
            "changes": changes,
            "notes": list(notes),
            "metric": self._gate.budget.metric,
            "quality_before": self._quality,
            "quality": self._quality,
            "bytes_before": self.graph.weight_bytes(),
            "bytes": self.graph.weight_bytes(),
        }

    def _record(self, row: dict[str, Json], *, status: str, reason: str) -> None:
        row.update(status=status, reason=reason)
        self.ledger.append(row)

    def _take(self, row: dict[str, Json], graph: Graph, session: Session, *, status: str, reason: str) -> None:
        row["bytes"] = graph.weight_bytes()
        self.graph, self.session, self._quality = graph, session, row["quality"]
        self._record(row, status=status, reason=reason)


def with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """A recipe with some of its keys set, as `build` takes them. Raises RecipeError."""
    content = recipe.model_dump(exclude_unset=True)
    sections = {
        "model": set(ModelSection.model_fields),
        "build": set(BuildSection.model_fields),
        "quality": set(QualitySection.model_fields),
    }
    for key, value in options.items():
        if value is None:
            continue
        if key in ("prune", "distil"):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{key} is {value!r}; it takes a dict, the keys of the recipe's [{key}].")
            content[key] = (content.get(key) or {}) | dict(value)
            continue
        if key == "passes":
            before = content.get("passes", {})
            if not isinstance(value, Mapping) or not all(isinstance(given, Mapping) for given in value.values()):
                raise RecipeError(f"passes is {value!r}; it takes the options of each pass by its name.")
            content["passes"] = before | {name: before.get(name, {}) | dict(given) for name, given in value.items()}
            continue
        section = next((name for name, keys in sections.items() if key in keys), None)
        if section is None or key == "source":
            allowed = sorted(set().union(*sections.values()) - {"source"} | {"passes", "prune", "distil"})
            raise RecipeError(f"Unknown option {key!r}; the options are: {', '.join(allowed)}.")
        content.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    return make_recipe(content)


def _name(recipe: Recipe) -> str:
    if recipe.build.name is not None:
        return recipe.build.name
    source = recipe.model.source.rstrip("/")
    if source.startswith("python:"):
        return source.rpartition(".")[2]
    if source.endswith(".onnx"):
        return Path(source).stem
    return source.replace(":", "/").rpartition("/")[2] or "model"


def _find(recipe: Recipe, given: _Given) -> Found | None:
    """The model, not loaded yet; None where it is an .onnx file."""
    model = recipe.model
    if given.module is None and model.source.endswith(".onnx"):
        return None
    return find(
        given.module if given.module is not None else model.source,
        example_inputs=given.example_inputs,
        dynamic_axes=given.dynamic_axes,
        task=model.task,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def _export(recipe: Recipe, found: Found | None, instead: torch.nn.Module | None = None) -> Exported:
    model = recipe.model
    if found is None:
        return open_onnx(Path(model.source), task=model.task)
    return export(
        found,
        max_length=model.max_length,
        trust_remote_code=model.trust_remote_code,
        adapter=model.adapter,
        hidden_states=model.hidden_states,
        uniform_steps=find_target(recipe.build.target).uniform_steps,
        instead=instead,
    )


def _workload(
    recipe: Recipe, exported: Exported, tokenizer_folder: Path, file: Path | None, calibration: Path | None
) -> Workload:
    signature, quality = exported.graph.signature, recipe.quality
    if signature.task == "module":
        return ModuleWorkload(
            signature=signature,
            example=exported.example,
            evaluation=None if file is None else read_arrays(file, signature),
            calibration=None if calibration is None else read_arrays(calibration, signature),
            samples=quality.samples or (_RANDOM_SAMPLES if file is None else _SAMPLES),
            calibration_samples=quality.calibration_samples
            or (_RANDOM_SAMPLES if calibration is None else _CALIBRATION_SAMPLES),
        )
    kind = DecoderWorkload if _generates(exported) else partial(TextWorkload, task=signature.task)
    return kind(
        signature=signature,
        options=exported.options,
        tokenizer_folder=tokenizer_folder,
        file=file,
        calibration=calibration,
        columns=quality.columns,
        samples=quality.samples or _SAMPLES,
        calibration_samples=quality.calibration_samples or _CALIBRATION_SAMPLES,
    )


def _about(recipe: Recipe, workload: Workload, bench: Workbench) -> dict[str, Json]:
    """What a trial's figures hang on beside the graph and the passes; the budget is not among it."""
    quality = recipe.quality
    inputs = hashlib.sha256()
    for feeds in workload.calibration():
        for name, array in sorted(feeds.items()):
            inputs.update(f"{name} {array.dtype} {array.shape}".encode())
            inputs.update(array.tobytes())
    machine = describe()
    return {
        "model": recipe.model.model_dump(mode="json"),
        "quality": quality.model_dump(mode="json", exclude={"budget"}),
        "files": digest_of_files([Path(file) for file in (quality.file, quality.calibration) if file is not None]),
        "calibration": inputs.hexdigest(),
        "target": recipe.build.target,
        "on_target": bench.on_target,
        "machine": {name: machine[name] for name in ("processor", "instruction_sets", "cores")},
        "versions": _versions(),
    }


def _minimum(exported: Exported, facts: Target) -> str:
    """The oldest ONNX Runtime that has the operators."""
    if not _generates(exported):
        return MINIMUM_ONNXRUNTIME
    return _MINIMUM_FOR_UNIFORM_STEPS if facts.uniform_steps else _MINIMUM_FOR_GENERATION


def _generates(exported: Exported) -> bool:
    return exported.graph.signature.task == DecoderWorkload.task


def _timed_systems(workload: Workload, reference: Runnable, ours: Mapping[str, Runnable]) -> Mapping[str, Runnable]:
    """What is timed side by side; the original of a language model has no cache, so that its steps would mislead."""
    return ours if isinstance(workload, DecoderWorkload) else {"PyTorch": reference, **ours}


def _copy_files(exported: Exported, folder: Path) -> None:
    for path in exported.files:
        shutil.copyfile(path, folder / path.name)


def _is_labelled(workload: Workload) -> bool:
    return isinstance(workload, TextWorkload | ModuleWorkload) and workload.labelled


def _latency(workload: Workload, systems: Mapping[str, Runnable]) -> list[dict[str, Json]]:
    rows: list[dict[str, Json]] = []
    given = {name: (runnable, workload.timing(runnable)) for name, runnable in systems.items()}
    for shape in next(iter(given.values()))[1]:
        times = alternate({name: partial(item.run, feeds[shape]) for name, (item, feeds) in given.items()}, rounds=3)
        for name, milliseconds in times.items():
            row = {"system": name, "batch": shape[0], "length": shape[1] if len(shape) > 1 else None}
            rows.append({**row, "shape": list(shape), "median_ms": round(milliseconds, 4)})
    return rows


def _fastest_chunk(workload: TextWorkload, session: Session) -> int:
    """Tokens per chunk that answered the evaluation samples fastest."""
    times = alternate({str(size): workload.throughput(session, size) for size in (128, 256, 512)}, rounds=3)
    return int(min(times, key=times.__getitem__))


def _check_in_fresh_process(folder: Path, providers: tuple[str, ...]) -> None:
    """Run `verify` on the artifact in a process of its own that may not import torch. Raises GoldenError."""
    code = (
        "import sys\n"
        f"for name in {_TORCH_FREE!r}: sys.modules[name] = None\n"
        "from onnxpress.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "verify", str(folder)]
    for provider in providers:
        command += ["--provider", provider]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise GoldenError(f"The finished artifact does not answer alike in a fresh process without torch: {said}")


def _parity_sentence(rows: list[Any]) -> str:
    worst = max(rows, key=lambda row: row.max_abs)
    return (
        f"answers like the original in {len(rows)} comparisons: largest difference {worst.max_abs:.1e} ({worst.output})"
    )


def _versions() -> dict[str, str]:
    names = (
        "onnxpress",
        "torch",
        "transformers",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "onnxruntime-gpu",
        "numpy",
        "tokenizers",
    )
    found = {name: version for name in names if (version := version_of(name)) is not None}
    return {"python": platform.python_version(), **found}


def _rounded(value: float) -> float:
    """Six significant digits: what is said of quality must not hang on the last bits of a sum."""
    return float(f"{value:.6g}")
