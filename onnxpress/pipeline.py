"""The build: export, verify, press pass by pass under the gate, and write the artifact with its proof.

Every step can be read in `_build`. Nothing is decided anywhere else: what a pass is lives in optimizers, what is
good enough in gate, what a model is tried on in workload.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxpress import evaluation, terminal
from onnxpress.artifact import Artifact, ArtifactWriter
from onnxpress.calibration import ActivationStream, Calibration
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
from onnxpress.exporters import DecoderParityCheck, Exported, ParityCheck, ParityRow, export
from onnxpress.foreign import open_onnx
from onnxpress.gate import Gate, repair
from onnxpress.golden import write_golden
from onnxpress.graph import Graph
from onnxpress.machine import describe, peak_memory_bytes
from onnxpress.manifest import Json, Manifest, Runnable
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import Pass, PassContext
from onnxpress.optimizers.targets import target as find_target
from onnxpress.recipe import BuildSection, ModelSection, QualitySection, Recipe, make_recipe, read_recipe
from onnxpress.report import render_report
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.loading import check_onnxruntime
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session
from onnxpress.timing import alternate
from onnxpress.workbench import RowByRow, Workbench, save
from onnxpress.workload import ModuleWorkload, TextWorkload, Workload, workload_file

if TYPE_CHECKING:
    import torch

MINIMUM_ONNXRUNTIME = "1.30"
_MINIMUM_FOR_GENERATION = "1.32"  # GroupQueryAttention with query_seqlens
_INT8_CACHE = "int8-cache"  # of the lossy passes the one that leaves the weights alone
_SLOWER = 1.05  # a pass must not take more than this share of the time before it
_NOISE_MS = 0.05  # differences below this are the clock's
_PARITY_CACHE = 2**32  # bytes of keys and values while a graph is compared
_TORCH_FREE = ("torch", "transformers", "onnx")


def build(
    source: str | os.PathLike[str] | torch.nn.Module | Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    quiet: bool = True,
    **options: Any,
) -> Artifact:
    """Build an artifact and return it.

    source: a recipe (file or object), a model folder, a hub id, "package.module:factory", an .onnx file, or a
    torch.nn.Module with example_inputs (a tuple or dict of tensors) and perhaps dynamic_axes ({input: {axis: name}};
    without it axis 0 is tried as the batch). out: the artifact's folder (default artifacts/NAME). options: any key of a
    recipe's sections: task, revision, max_length, trust_remote_code, adapter, hidden_states, name, target, precision, cache, only,
    keep_all, measure, budget, file, calibration, columns, samples, calibration_samples, and passes, a dict of each pass's options;
    they overrule the recipe's. quiet: no progress.

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
        return _build(recipe, folder, _Given(module, example_inputs, dynamic_axes), report)


class _Given(NamedTuple):
    """What was given in Python and no recipe can hold."""

    module: torch.nn.Module | None
    example_inputs: Any
    dynamic_axes: Mapping[str, Mapping[int, str]] | None


def _build(recipe: Recipe, folder: Path, given: _Given, report: terminal.Progress) -> Artifact:
    started = time.perf_counter()
    facts = find_target(recipe.build.target)
    evaluation_file = workload_file(recipe.quality.file, "evaluation")
    calibration_file = workload_file(recipe.quality.calibration, "calibration")
    with ArtifactWriter(folder) as writer:
        work = writer.folder / ".work"
        work.mkdir()
        bench = Workbench(work, facts)

        report.step("export")
        exported = _export(recipe, given)
        _copy_tokenizer(exported, writer.folder)
        if recipe.build.cache != "fp32" and not _generates(exported):
            raise RecipeError(f"A cache of {recipe.build.cache} was asked for; {exported.name} is no language model.")
        workload = _workload(recipe, exported, writer.folder, evaluation_file, calibration_file)
        budget = evaluation.budget_for(
            workload.task,
            recipe.quality.budget,
            labelled=_is_labelled(workload),
            problem_type=exported.options.get("problem_type"),
        )

        report.step("verify the export against the original")
        if _generates(exported):
            check_onnxruntime(_MINIMUM_FOR_GENERATION, "A language model")
            ChatTemplate.from_folder(writer.folder)  # one that is not valid is said now
        parity = _Parity(exported)
        try:
            plain = bench.open(exported.graph)
        except ArtifactError as error:
            raise ConversionError(f"{exported.name} does not run on ONNX Runtime: {error.__cause__ or error}") from None
        parity_rows = parity.check(plain)
        gate = Gate(workload, exported.reference, budget)

        press = _Press(recipe, bench, gate, parity, exported.graph, plain, report)
        for name in recipe.pass_names(workload.task):
            press.run(make_pass(name, recipe.passes.get(name)))

        report.step("golden outputs")
        save(press.graph, writer.folder / "model.onnx")
        tolerance = write_golden(
            writer.folder / "golden.safetensors", press.session, workload.golden(press.session), exact=press.exact
        )
        options: dict[str, Json] = {**exported.options, "golden_tolerance": tolerance}
        session_options: dict[str, Json] = {"disabled_optimizers": list(facts.disabled_optimizers)}
        if press.rows_alone:
            session_options["tokens_per_chunk"] = 1
        manifest = Manifest(
            name=_name(recipe),
            target=facts.name,
            precision=press.precision,
            signature=press.graph.signature,
            options=options,
            session=session_options,
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
            minimum_onnxruntime=_MINIMUM_FOR_GENERATION if _generates(exported) else MINIMUM_ONNXRUNTIME,
            operators=press.graph.operators(),
            files={},
        )
        measured: dict[str, Json] = {
            "machine": describe(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rows": press.measured,
            "latency": [],
            "operators_before": exported.graph.operators(),
            "budget": {"metric": budget.metric, "limit": budget.limit_value(gate.reference_value)},
            "note": bench.note,
        }
        if recipe.build.measure and bench.on_target:
            report.step("measure")
            measured["latency"] = _latency(
                workload, _timed_systems(workload, exported.reference, {"export": plain, "artifact": press.session})
            )
            if isinstance(workload, TextWorkload) and not press.rows_alone:
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
                session, KeyValueCache(session.signature.inputs, context=self._context, budget=_PARITY_CACHE)
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
    ) -> None:
        self.graph = graph
        self.session = session
        self.ledger: list[dict[str, Json]] = []
        self.measured: list[dict[str, Json]] = []
        self.precision = "fp32"
        self.exact = True
        self.rows_alone = False
        self._quality = _rounded(gate.reference_value)
        self._recipe, self._bench, self._gate, self._parity, self._report = recipe, bench, gate, parity, report
        self._target = find_target(recipe.build.target)

    def run(self, step: Pass) -> None:
        """Try one pass: keep it, repair it, or undo it; one row of the ledger either way."""
        self._report.step(step.name)
        if step.lossless:
            self._run_lossless(step)
        else:
            self._run_lossy(step)

    def _run_lossless(self, step: Pass) -> None:
        result = step.apply(self.graph.clone(), PassContext(target=self._target))
        row = self._row(step, result.changes, result.notes)
        if result.changes == 0:
            self._record(row, status="unchanged", reason="nothing to change")
            return
        session = self._bench.open(result.graph)
        try:
            self._parity.check(session)
        except ParityError as error:
            self._record(row, status="undone", reason=f"changed the answers: {error}")
            return
        slower = self._slower(step, session)
        if slower and not self._recipe.build.keep_all and not self._recipe.build.only:
            self._record(row, status="undone", reason=slower)
            return
        reason = "answers as before" + (f"; {slower}" if slower else "")
        self._take(row, result.graph, session, status="kept", reason=reason)

    def _run_lossy(self, step: Pass) -> None:
        inputs = self._gate.workload.calibration
        calibration = Calibration(self._bench.open, inputs)
        stream = partial(ActivationStream, open_session=self._bench.open, inputs=inputs)
        keep: frozenset[str] = frozenset()

        def apply(kept: frozenset[str]) -> tuple[Any, Session]:
            context = PassContext(
                target=self._target, observe=calibration, stream=stream, keep=kept, progress=self._report.detail
            )
            outcome = step.apply(self.graph.clone(), context)
            return outcome, self._bench.open(outcome.graph)

        result, session = apply(keep)
        row = self._row(step, result.changes, result.notes)
        if result.changes == 0:
            self._record(row, status="undone", reason="nothing to change")
            self._refuse(step, row)
            return
        judgement = self._gate.judge(session)
        status, reason = "kept", judgement.sentence()
        rows_alone = False
        if not judgement.holds and not self._recipe.build.keep_all:
            can_run_alone = self._gate.workload.rows_can_run_alone
            alone = self._gate.judge(session, rows_alone=True) if can_run_alone else judgement
            if alone.holds:
                status, judgement, rows_alone = "repaired", alone, True
                reason = f"rows run one at a time, since batched they were at {judgement.batch_cosine:.5f}: {alone.sentence()}"
            else:
                mended = repair(result.touched, lambda kept: self._gate.judge(apply(kept)[1]), self._report.detail)
                if mended is None:
                    row["quality"] = _rounded(judgement.value)
                    half = "" if len(result.touched) == 1 else f" even with half {result.kept_as}"
                    self._record(row, status="undone", reason=f"over the budget{half}: {reason}")
                    self._refuse(step, row)
                    return
                keep, judgement = mended
                result, session = apply(keep)
                row |= {"changes": result.changes, "notes": list(result.notes)}
                status = "repaired"
                reason = f"{len(keep)} places stay {result.kept_as} ({', '.join(sorted(keep))}): {judgement.sentence()}"
        row["quality"] = _rounded(judgement.value)
        row["batch_cosine"] = _rounded(judgement.batch_cosine)
        row["metrics"] = {name: _rounded(value) for name, value in judgement.metrics.items()}
        slower = self._slower(step, RowByRow(session) if rows_alone else session)
        if slower and not self._explicit(step):
            self._record(row, status="undone", reason=slower)
            return
        self._take(row, result.graph, session, status=status, reason=f"{reason}; {slower}" if slower else reason)
        self.exact, self.rows_alone = False, rows_alone
        if step.name != _INT8_CACHE:
            self.precision = step.name

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

    def _slower(self, step: Pass, session: Runnable) -> str:
        """Why a pass does not pay, or nothing. Records the times."""
        if not self._recipe.build.measure or not self._bench.on_target:
            return ""
        rows = self._bench.compare(self.session, session, self._gate.workload.timing)
        before = sum(times[0] for times in rows.values())
        after = sum(times[1] for times in rows.values())
        self.measured.append(
            {
                "pass": step.name,
                "latency_before_ms": round(before, 4),
                "latency_ms": round(after, 4),
                "shapes": {
                    "x".join(map(str, shape)): [round(time, 4) for time in pair] for shape, pair in rows.items()
                },
            }
        )
        worse = all(new > old * _SLOWER and new - old > _NOISE_MS for old, new in rows.values())
        return "slower on the build machine at every shape tried (times: measured.json)" if worse else ""

    def _row(self, step: Pass, changes: int, notes: tuple[str, ...]) -> dict[str, Json]:
        return {
            "pass": step.name,
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
        if key == "passes":
            before = content.get("passes", {})
            if not isinstance(value, Mapping) or not all(isinstance(given, Mapping) for given in value.values()):
                raise RecipeError(f"passes is {value!r}; it takes the options of each pass by its name.")
            content["passes"] = before | {name: before.get(name, {}) | dict(given) for name, given in value.items()}
            continue
        section = next((name for name, keys in sections.items() if key in keys), None)
        if section is None or key == "source":
            allowed = sorted(set().union(*sections.values()) - {"source"} | {"passes"})
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


def _export(recipe: Recipe, given: _Given) -> Exported:
    model = recipe.model
    if given.module is None and model.source.endswith(".onnx"):
        return open_onnx(Path(model.source), task=model.task, max_length=model.max_length)
    return export(
        given.module if given.module is not None else model.source,
        example_inputs=given.example_inputs,
        dynamic_axes=given.dynamic_axes,
        task=model.task,
        revision=model.revision,
        max_length=model.max_length,
        trust_remote_code=model.trust_remote_code,
        adapter=model.adapter,
        hidden_states=model.hidden_states,
    )


def _workload(
    recipe: Recipe, exported: Exported, tokenizer_folder: Path, file: Path | None, calibration: Path | None
) -> Workload:
    signature, quality = exported.graph.signature, recipe.quality
    if signature.task == "module":
        if file is not None or calibration is not None:
            raise RecipeError("A file of text does not go with a plain module; leave `file` and `calibration` out.")
        return ModuleWorkload(signature=signature, example=exported.example)
    kind = DecoderWorkload if _generates(exported) else partial(TextWorkload, task=signature.task)
    return kind(
        signature=signature,
        options=exported.options,
        tokenizer_folder=tokenizer_folder,
        file=file,
        calibration=calibration,
        columns=quality.columns,
        samples=quality.samples,
        calibration_samples=quality.calibration_samples,
    )


def _generates(exported: Exported) -> bool:
    return exported.graph.signature.task == DecoderWorkload.task


def _timed_systems(workload: Workload, reference: Runnable, ours: Mapping[str, Runnable]) -> Mapping[str, Runnable]:
    """What is timed side by side; the original of a language model has no cache, so that its steps would mislead."""
    return ours if isinstance(workload, DecoderWorkload) else {"PyTorch": reference, **ours}


def _copy_tokenizer(exported: Exported, folder: Path) -> None:
    for path in exported.tokenizer_files:
        shutil.copyfile(path, folder / path.name)


def _is_labelled(workload: Workload) -> bool:
    return isinstance(workload, TextWorkload) and workload.labelled


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
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _rounded(value: float) -> float:
    """Six significant digits: what is said of quality must not hang on the last bits of a sum."""
    return float(f"{value:.6g}")
