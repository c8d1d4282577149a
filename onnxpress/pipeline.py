"""The build: export, verify, press pass by pass under the gate, and write the artifact with its proof.

Every step can be read in `_build`. What becomes of each pass lives in press, what a pass is in optimizers, what is good enough
in gate, what a model is tried on in workload.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
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

from onnxpress import preflight, terminal
from onnxpress.artifact import Artifact, ArtifactWriter, check_outside
from onnxpress.budgets import budget_for
from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.errors import (
    ArtifactError,
    ConversionError,
    GoldenError,
    InputError,
    OnnxpressError,
    OutputError,
    ParityError,
    RecipeError,
    SourceError,
)
from onnxpress.exporters import DecoderReference, Exported, Found, ParityRow, export, find, in_half, share_weights
from onnxpress.foreign import open_onnx
from onnxpress.gate import Gate
from onnxpress.golden import Allowed, write_golden
from onnxpress.graph import Graph
from onnxpress.graph_files import save, weights_are_large
from onnxpress.machine import OtherProcesses, PeakMemory, describe, free_memory_bytes
from onnxpress.manifest import Json, Manifest, Runnable
from onnxpress.module_workload import ModuleWorkload
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.openvino_forms import respell
from onnxpress.optimizers.processes import check_alone
from onnxpress.optimizers.stand_in import computes_in_half, holds_half
from onnxpress.optimizers.targets import Target
from onnxpress.optimizers.targets import target as find_target
from onnxpress.parity import Parity
from onnxpress.press import Press, Resume, rounded
from onnxpress.pruning import make_smaller
from onnxpress.recipe import Recipe, make_recipe, recipe_of, with_options
from onnxpress.report import render_report
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.loading import check_onnxruntime
from onnxpress.runtime.session import Session
from onnxpress.runtime.wheel import version_of
from onnxpress.sample_arrays import read_arrays
from onnxpress.timing import alternate
from onnxpress.trials import digest_of_files, notebook_folder
from onnxpress.workbench import Workbench, attends_in_float, check_types, session_options
from onnxpress.workload import TextWorkload, Workload, workload_file

if TYPE_CHECKING:
    import torch

MINIMUM_ONNXRUNTIME = "1.30"
_ALL_ROUNDED = ("int4-weights", "int8-weights")  # precisions
_MINIMUM_FOR_GENERATION = "1.32"  # GroupQueryAttention with query_seqlens
_MINIMUM_FOR_UNIFORM_STEPS = "1.31"  # without
_SAMPLES, _CALIBRATION_SAMPLES = 200, 128  # that a model is tried on where the recipe says no number
_RANDOM_SAMPLES = 64  # that a module is tried on where no arrays are given
_STOOD_IN = (
    "The CPU provider has no kernels for bfloat16: every trial, and the golden outputs, come from the same graph in float32 with each "
    "result rounded to bfloat16. ONNX Runtime has checked the types of the file itself; nothing has run it yet."
)
_ROUNDED = "Trials come from the same graph in float32 with each result rounded to float16, which the CPU provider would not do."
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

    Raises RecipeError, InputError, SourceError, ConversionError, ParityError, BudgetError, OutputError.
    """
    import torch

    if sys.platform == "win32":
        raise RecipeError("Models are built on Linux or macOS, and in WSL on Windows. Artifacts run on Windows too.")
    check_alone()
    module = None
    if isinstance(source, Recipe):
        recipe = with_options(source, options)
    elif isinstance(source, str | os.PathLike):
        recipe = recipe_of(source, options)
    elif not isinstance(source, torch.nn.Module):
        raise SourceError(f"A {type(source).__name__} was given as source; a name, a recipe or a module is expected.")
    else:
        module = source
        name = f"python:{type(source).__module__}.{type(source).__qualname__}"
        recipe = with_options(make_recipe({"model": {"source": name}}), options)
    folder = Path(out) if out is not None else _free_folder(recipe)
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


def _build(
    recipe: Recipe, folder: Path, given: _Given, report: terminal.Progress, resume: Path | None = None
) -> Artifact:
    started, others = time.perf_counter(), OtherProcesses()
    facts = find_target(recipe.build.target)
    if recipe.distil is not None and recipe.distil.checkpoints is not None:
        check_outside(Path(recipe.distil.checkpoints), folder, "distil.checkpoints")
    evaluation_file = workload_file(recipe.quality.file, "evaluation")
    calibration_file = workload_file(recipe.quality.calibration, "calibration")
    with ArtifactWriter(folder) as writer, PeakMemory() as memory:
        work = writer.folder / ".work"
        bench = Workbench(work, facts, measure=recipe.build.measure)

        report.step("find the model, check what is asked for")
        found = _find(recipe, given)
        task, labels = ("module", {}) if found is None else (found.task, found.options)
        preflight.check(recipe, task, labels, resume=resume is not None)
        if recipe.prune is not None and found is not None and found.config is not None:
            recipe.prune.options().check_sizes(**_sizes(found.config.get_text_config()))

        report.step("export")
        exported = _export(recipe, found)
        bench.half_from_the_start = computes_in_half(exported.graph)
        if isinstance(exported.reference, DecoderReference) and weights_are_large(exported.graph):
            share_weights(exported.reference.module, exported.graph, bench.write_weights)
        for path in exported.files:
            shutil.copyfile(path, writer.folder / path.name)
        workload = _workload(recipe, exported, writer.folder, evaluation_file, calibration_file)
        budget = budget_for(
            workload.task,
            recipe.quality.budget,
            labelled=workload.labelled_samples > 0,
            problem_type=exported.options.get("problem_type"),
        )

        report.step("verify the export against the original")
        if _generates(exported):
            bench.timed = bench.timed and not facts.uniform_steps
            check_onnxruntime(_minimum(exported, facts), "A language model")
            ChatTemplate.from_folder(writer.folder)  # one that is not valid is said now
        parity = Parity(exported)
        if why := bench.too_large(exported.graph):
            preflight.refuse_speed(recipe, why)
        try:
            plain = bench.open(exported.graph)
        except ArtifactError as error:
            why = str(error.__cause__ or error).rstrip(". ")
            raise ConversionError(
                f"{exported.name} does not run on ONNX Runtime: {why}.{_in_float32(exported)}"
            ) from None
        try:
            parity_rows = parity.check(plain)
        except InputError as error:
            raise ConversionError(
                f"The graph of {exported.name} does not take what the original takes: {str(error).rstrip('.')}.{_fixed_axes(found, exported)}"
            ) from None
        except ParityError as error:
            advice = in_half(found) or _in_float32(exported) or _fixed_axes(found, exported)
            raise ParityError(f"{error}{advice}") from None
        try:
            gate = Gate(workload, exported.reference, budget)
        except OnnxpressError:
            raise
        except Exception as error:  # whatever a module raises
            inputs = "arrays" if exported.graph.signature.task == "module" else "texts"
            raise RecipeError(
                f"{exported.name} fails on the {inputs} that it is to be judged by ({type(error).__name__}: {error}): give {inputs} that "
                "it takes with --eval, and with --calibration."
            ) from error

        notes = None if resume is None else Resume(resume, _about(recipe, workload, bench))
        press = Press(recipe, bench, gate, parity, exported.graph, plain, report, notes)
        del plain  # float weights once more in memory, until the first pass is kept
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
            press.begin_with(smaller)
        _run_passes(press, recipe, workload.task)
        if bench.on_target and "openvino" in facts.providers and press.session.fallback_note:
            missing = "put plain-attention into `only`, or " if "Attention" in press.graph.operators() else ""
            raise RecipeError(f"{press.session.fallback_note} For {exported.name}, {missing}build with --target cpu.")
        if facts.uniform_steps and attends_in_float(press.graph):
            raise RecipeError(
                f"The attention of {exported.name} is still in float32, for which the provider {facts.name} has no kernel: `only` has to "
                "end with fp16, or give --precision fp16."
            )

        report.step("golden outputs")
        save(press.graph, writer.folder / "model.onnx")
        stood_in = bench.stands_in(press.graph) and bench.runs(press.graph)
        session = bench.open(press.graph, itself=True) if stood_in else press.session
        allowed = write_golden(
            writer.folder / "golden.safetensors",
            session,
            workload.golden(session),
            unrounded=None if press.exact else press.unrounded,
            masks_from=gate.mask_sizes(),
            half=holds_half(press.graph),
        )
        del session, press.unrounded  # float weights once more in memory
        ledger = (
            _export_row(exported, parity_rows, [*parity.notes, *workload.notes, *gate.notes], gate),
            *press.ledger,
        )
        manifest = _manifest(recipe, facts, exported, press, ledger=ledger, allowed=allowed)
        measured = _measured(exported, gate, press, bench)
        measured["budget"]["on_random_inputs"] = isinstance(workload, ModuleWorkload) and workload.random
        if bench.timed:
            report.step("measure")
            measured |= _times(workload, exported, bench, press)
        shutil.rmtree(work)
        measured["build_seconds"] = round(time.perf_counter() - started, 1)
        measured["peak_memory_bytes"] = memory.peak
        if bench.timed and (crowding := others.crowding()) is not None:
            busy = f"Other processes used {crowding:.1f} cores of this machine meanwhile: its times say less than they seem to."
            measured["note"] = f"{measured['note']} {busy}".strip()

        manifest = writer.seal(manifest)
        writer.write_measured(measured, render_report(manifest, measured))
        if not bench.runs(press.graph):
            report.step("have ONNX Runtime check the types")
            check_types(writer.folder / "model.onnx", press.graph)
        else:
            report.step("reopen without torch and check the golden outputs")
            _check_in_fresh_process(writer.folder, facts.providers if bench.on_target else ("cpu",))
        return writer.publish()


def _fixed_axes(found: Found | None, exported: Exported) -> str:
    """Advice where a module with a batch that PyTorch traced for any size is wrong at another one."""
    if found is None or exported.graph.signature.task != "module" or not exported.graph.signature.axes:
        return ""
    return (
        " Where forward asks for sizes, or loops over them, its trace holds for the example's alone: leave such axes out of dynamic_axes (in "
        "Python, or the third part of what a factory returns); with dynamic_axes={} the graph takes the example's shapes and no others."
    )


def _in_float32(exported: Exported) -> str:
    """Advice for a module that answers float32 and has layers in half precision, which PyTorch and ONNX Runtime round differently."""
    graph = exported.graph
    halved = any(spec.dtype == "float16" for spec in graph.signature.outputs)
    if graph.signature.task != "module" or halved or not holds_half(graph):
        return ""
    return " Some of its layers are in half precision: give it in float32, as module.float() makes it."


def _run_passes(press: Press, recipe: Recipe, task: str) -> None:
    """Those that lose nothing, then the search where there is one, then the others."""
    steps = [make_pass(name, recipe.passes.get(name)) for name in recipe.pass_names(task)]
    press.run_lossless([step for step in steps if step.lossless])
    if recipe.automatic:
        press.choose(recipe.plans(task))
    for step in steps:
        if not step.lossless:
            press.run(step)


def _export_row(exported: Exported, rows: list[ParityRow], notes: list[str], gate: Gate) -> dict[str, Json]:
    """The ledger's first row."""
    worst = max(rows, key=lambda row: row.max_abs)
    return {
        "pass": "export",
        "status": "kept",
        "reason": f"answers like the original in {len(rows)} comparisons: largest difference {worst.max_abs:.1e} ({worst.output})",
        "changes": 0,
        "notes": [*exported.notes, *notes],
        "metric": gate.budget.metric,
        "quality": rounded(gate.reference_value),
        "quality_before": None,
        "bytes": exported.graph.weight_bytes(),
        "bytes_before": None,
    }


def _manifest(
    recipe: Recipe,
    facts: Target,
    exported: Exported,
    press: Press,
    *,
    ledger: tuple[dict[str, Json], ...],
    allowed: Allowed,
) -> Manifest:
    how: dict[str, Json] = session_options(facts, press.graph)
    golden: dict[str, Json] = {"golden_tolerance": allowed.tolerances}
    if allowed.sizes:
        golden["golden_size"] = allowed.sizes
    if facts.providers != ("cpu",):
        how["providers"] = list(facts.providers)
    if press.rows_alone:
        how["tokens_per_chunk"] = 1
    return Manifest(
        name=_name(recipe),
        target=facts.name,
        precision=press.precision,
        signature=press.graph.signature,
        options={**exported.options, **golden},
        session=how,
        recipe=recipe.model_dump(mode="json"),
        ledger=ledger,
        versions=_versions(),
        minimum_onnxruntime=_minimum(exported, facts),
        operators=press.graph.operators(),
        files={},
    )


def _stand_in(graph: Graph, bench: Workbench) -> str:
    """What is to be said of trials of half precision."""
    return "" if not bench.stands_in(graph) else _ROUNDED if bench.runs(graph) else _STOOD_IN


def _measured(exported: Exported, gate: Gate, press: Press, bench: Workbench) -> dict[str, Json]:
    """What another build of the same recipe may find otherwise, but for the times of the finished artifact."""
    return {
        "machine": describe(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": press.measured,
        "curve": press.curve,
        "search": press.search,
        "latency": [],
        "operators_before": exported.graph.operators(),
        "budget": {"metric": gate.budget.metric, "limit": gate.budget.limit_value(gate.reference_value)},
        "note": " ".join(filter(None, [bench.note, _stand_in(press.graph, bench)])),
    }


def _free_folder(recipe: Recipe) -> Path:
    """Where an artifact goes that was given no folder. Raises OutputError where another model's is."""
    folder, source = Path("artifacts") / _name(recipe), recipe.model.source
    try:
        held = str(Artifact.open(folder, verify=False).manifest.recipe["model"]["source"])
    except (ArtifactError, KeyError):
        return folder
    same = Path(held).exists() and Path(source).exists() and Path(held).samefile(source)
    if held != source and not same:
        raise OutputError(
            f"{folder} holds an artifact of {held}, not of {source}: choose --out or another --name, or remove it."
        )
    return folder


def _name(recipe: Recipe) -> str:
    if recipe.build.name is not None:
        return recipe.build.name
    source = recipe.model.source.rstrip("/")
    if source in (".", ".."):
        source = os.path.abspath(source)  # noqa: PTH100  resolve() would follow a link
    if source.startswith("python:"):
        return source.rpartition(".")[2]
    if source.endswith(".onnx"):
        return Path(source).stem
    return source.replace(":", "/").rpartition("/")[2] or "model"


def _sizes(config: Any) -> dict[str, int]:
    """What can be pruned of a model, as far as its config says it in one number."""
    names = {"ffn": "intermediate_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}
    if getattr(config, "num_key_value_heads", None):
        names["heads"] = "num_key_value_heads"
    sizes = {kind: getattr(config, name, None) for kind, name in names.items()}
    return {kind: size for kind, size in sizes.items() if isinstance(size, int)}


def _find(recipe: Recipe, given: _Given) -> Found | None:
    """The model, not loaded yet; None where it is an .onnx file."""
    model = recipe.model
    if given.module is None and model.source.endswith(".onnx"):
        if given.example_inputs is not None or given.dynamic_axes is not None:
            raise SourceError("example_inputs and dynamic_axes go with a torch.nn.Module, not with an .onnx file.")
        return None
    return find(
        given.module if given.module is not None else model.source,
        example_inputs=given.example_inputs,
        dynamic_axes=given.dynamic_axes,
        task=model.task,
        revision=model.revision,
        max_length=model.max_length,
        trust_remote_code=model.trust_remote_code,
        free_memory=free_memory_bytes(),
        half=_rounds_all_weights(recipe),
    )


def _rounds_all_weights(recipe: Recipe) -> bool:
    """Whether a language model's weights end as integers, so that nothing has to hold them in float32, or float16, at once."""
    build, facts = recipe.build, find_target(recipe.build.target)
    if recipe.automatic or build.only or recipe.model.adapter is not None or recipe.prune is not None:
        return False
    return facts.providers == ("cpu",) and (build.precision or facts.generation[0]) in _ALL_ROUNDED


def _export(recipe: Recipe, found: Found | None, instead: torch.nn.Module | None = None) -> Exported:
    model, facts = recipe.model, find_target(recipe.build.target)
    if found is None:
        samples = recipe.quality.file or recipe.quality.calibration
        exported = open_onnx(Path(model.source), task=model.task, samples=None if samples is None else Path(samples))
    else:
        exported = _export_module(found, recipe, facts, instead)
    if "openvino" in facts.providers:  # before anything runs on it
        return dataclasses.replace(exported, notes=(*exported.notes, *respell(exported.graph)))
    return exported


def _export_module(found: Found, recipe: Recipe, facts: Target, instead: torch.nn.Module | None) -> Exported:
    model = recipe.model
    return export(
        found,
        max_length=model.max_length,
        trust_remote_code=model.trust_remote_code,
        adapter=model.adapter,
        hidden_states=model.hidden_states,
        uniform_steps=facts.uniform_steps,
        emit_experts=facts.providers == ("cpu",),
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
    if not _generates(exported) and "com.microsoft::MoE" not in exported.graph.operators():
        return MINIMUM_ONNXRUNTIME
    return _MINIMUM_FOR_UNIFORM_STEPS if facts.uniform_steps else _MINIMUM_FOR_GENERATION


def _generates(exported: Exported) -> bool:
    return exported.graph.signature.task == DecoderWorkload.task


def _times(workload: Workload, exported: Exported, bench: Workbench, press: Press) -> dict[str, Json]:
    """Of the finished artifact beside its plain export and the original."""
    systems: dict[str, Runnable] = {"export": bench.open(exported.graph), "artifact": press.session}
    if not isinstance(workload, DecoderWorkload):  # a language model's original has no cache: its steps would mislead
        original = "original" if isinstance(exported.reference, Session) else "PyTorch"
        original += "" if press.session.on_cpu else " on the CPU"
        systems = {original: exported.reference, **systems}
    times: dict[str, Json] = {"latency": _latency(workload, systems)}
    if isinstance(workload, TextWorkload) and not press.rows_alone and press.session.on_cpu:
        times["tokens_per_chunk"] = _fastest_chunk(workload, press.session)
    return times


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


def _versions() -> dict[str, str]:
    names = (
        "onnxpress", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers",
    )  # fmt: skip
    found = {name: version for name in names if (version := version_of(name)) is not None}
    return {"python": platform.python_version(), **found}
