"""Trials of a lossy plan: the graph with some of its places kept, and what that costs. Each is measured once.

What was measured is kept in memory and, where a folder is given, in a file, so that a search that was interrupted goes
on from there, and so that one under another budget measures little again. Trials hold figures and no verdicts: those
are the gate's, and they change with the budget.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from onnxpress.artifact import check_outside
from onnxpress.calibration import ActivationStream, Calibration
from onnxpress.errors import OnnxpressError, OutputError, RecipeError
from onnxpress.gate import Gate, Judgement
from onnxpress.graph import Graph
from onnxpress.manifest import Json
from onnxpress.optimizers.base import Pass, PassContext, PassResult
from onnxpress.optimizers.targets import Target
from onnxpress.runtime.providers import one_line
from onnxpress.runtime.session import Session
from onnxpress.whole import part_of, remove, remove_leftovers
from onnxpress.workbench import RowByRow, Workbench

Times = dict[str, tuple[float, float]]  # milliseconds of the graph before and after, by shape: {"1x32": (5.2, 2.1)}


class Trial(BaseModel):
    """One choice of places that stay, and its figures.

    kept: those places. changes, notes, touched and kept_as are the pass's (optimizers/base.py). bytes: of all weights.
    metrics and batch_cosine are the gate's. times: how long it takes, "batched" and "alone" (row by row); without those
    that were not asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    kept: tuple[str, ...]
    changes: int
    notes: tuple[str, ...]
    touched: tuple[str, ...]
    kept_as: str
    bytes: int
    metrics: dict[str, float]
    batch_cosine: float | None
    times: dict[str, Times] = {}


class Applied(NamedTuple):
    """A graph with the plan applied, open."""

    result: PassResult
    session: Session


class Trials:
    """Tries a plan, one lossy pass or several in a row, on a graph.

    graph, session: the graph before it, open. notebook: the file that outlives the process, if any. measured counts the
    trials that were made here, and not read from the notebook.
    """

    def __init__(
        self,
        steps: Sequence[Pass],
        graph: Graph,
        session: Session,
        *,
        bench: Workbench,
        gate: Gate,
        target: Target,
        progress: Callable[[str], None],
        notebook: Notebook | None = None,
    ) -> None:
        self.measured = 0
        self._steps, self._graph, self._session = tuple(steps), graph, session
        self._bench, self._gate, self._target, self._progress = bench, gate, target, progress
        self._observe = Calibration(bench.open, gate.workload.calibration)
        self._notebook = notebook
        self._known = {} if notebook is None else {frozenset(trial.kept): trial for trial in notebook.read()}
        self._unproven = set(self._known)
        self._last: tuple[frozenset[str], Applied] | None = None

    def apply(self, kept: frozenset[str]) -> Applied:
        """The graph with the plan applied and the named places kept; the last one is at hand still."""
        if self._last is not None and self._last[0] == kept:
            return self._last[1]
        self._last = None  # one at a time in memory
        graph = self._graph.clone()
        results: list[PassResult] = []
        for step in self._steps:
            # Activations behind a pass that changed the graph are other ones in each trial.
            observe = Calibration(self._bench.open, self._gate.workload.calibration) if results else self._observe
            context = PassContext(
                target=self._target,
                observe=observe,
                distributions=observe.distributions,
                stream=partial(ActivationStream, open_session=self._bench.open, inputs=self._gate.workload.calibration),
                keep=kept,
                progress=self._progress,
            )
            results.append(step.apply(graph, context))
            graph = results[-1].graph
        joined = PassResult(
            graph=graph,
            changes=sum(result.changes for result in results),
            notes=tuple(note for result in results for note in result.notes),
            touched=tuple(dict.fromkeys(name for result in results for name in result.touched)),
            kept_as=" or ".join(dict.fromkeys(result.kept_as for result in results if result.changes)),
        )
        self._last = kept, Applied(joined, self._bench.open(graph))
        return self._last[1]

    def let_go(self) -> None:
        """Keep no graph at hand: trials of several plans are not in memory together."""
        self._last = None

    def measure(self, kept: frozenset[str]) -> Trial:
        """The figures of a choice, measured where they are not known yet."""
        if kept not in self._known:
            self._unproven.discard(kept)
            result, session = self.apply(kept)
            metrics, batch_cosine = self._gate.measure(session)
            self.measured += 1
            self._note(
                Trial(
                    kept=tuple(sorted(kept)),
                    changes=result.changes,
                    notes=result.notes,
                    touched=result.touched,
                    kept_as=result.kept_as,
                    bytes=result.graph.weight_bytes(),
                    metrics={name: float(value) for name, value in metrics.items()},
                    batch_cosine=batch_cosine,
                )
            )
        return self._known[kept]

    def judge(self, kept: frozenset[str], *, rows_alone: bool = False) -> Judgement:
        """The gate's verdict on a choice. rows_alone: on running it row by row."""
        trial = self.measure(kept)
        return self._gate.verdict(trial.metrics, None if rows_alone else trial.batch_cosine)

    def prove(self, kept: frozenset[str], *, rows_alone: bool = False) -> Judgement:
        """As `judge`, but measured in this process: an artifact rests on no file's word. Raises RecipeError."""
        judgement = self.judge(kept, rows_alone=rows_alone)
        if kept not in self._unproven or self._notebook is None:
            return judgement
        times = self._known.pop(kept).times
        here = self.judge(kept, rows_alone=rows_alone)
        self._note(self._known[kept].model_copy(update={"times": times}))
        if judgement.holds and not here.holds:
            raise RecipeError(
                f"{self._notebook.path} says {judgement.sentence()}, and here it is {here.sentence()}; remove the file, or choose "
                "another folder for --resume."
            )
        return here

    def times(self, kept: frozenset[str], *, rows_alone: bool = False) -> Times:
        """Milliseconds before and after, taken in turns, where they are not known yet."""
        trial, how = self.measure(kept), "alone" if rows_alone else "batched"
        if how not in trial.times:
            session = self.apply(kept).session
            times = self._bench.compare(
                self._session, RowByRow(session) if rows_alone else session, self._gate.workload.timing
            )
            self._note(trial.model_copy(update={"times": {**trial.times, how: times}}))
        return self._known[kept].times[how]

    def _note(self, trial: Trial) -> None:
        self._known[frozenset(trial.kept)] = trial
        if self._notebook is not None:
            self._notebook.write(list(self._known.values()))


class _Page(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

    about: dict[str, Json]
    trials: list[Trial]


class Notebook:
    """The file of one plan's trials in a folder. Its name is a digest of `about`, all that the figures hang on.

    Each write replaces the whole file in one step, so that a kill leaves the old one or the new one.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Json]) -> None:
        self._about = json.loads(json.dumps(about))
        canonical = json.dumps(self._about, sort_keys=True)
        self.path = folder / f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:24]}.json"

    def read(self) -> list[Trial]:
        """The trials so far. Raises RecipeError where the file is not what `write` wrote."""
        try:
            page = _Page.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise RecipeError(
                f"{self.path} is not what a search wrote ({said}); remove it, or choose another folder for --resume."
            ) from None
        if page.about != self._about:
            raise RecipeError(
                f"{self.path} is about another build than its name says; remove it, or choose another folder for --resume."
            )
        return page.trials

    def write(self, trials: Sequence[Trial]) -> None:
        """Keep these trials. Raises OutputError."""
        part = part_of(self.path)
        try:
            remove_leftovers(self.path)
            part.write_text(_Page(about=self._about, trials=list(trials)).model_dump_json(indent=1), encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            raise OutputError(
                f"Writing {self.path} failed: {error.strerror or error}. Free space or choose another folder for --resume."
            ) from None
        finally:
            remove(part)


def notebook_folder(folder: Path, artifact: Path) -> Path:
    """The folder for notebooks, made where it is missing. Raises OutputError, and RecipeError where the artifact would replace it."""
    check_outside(folder, artifact, "--resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"The folder {folder} of --resume cannot be written: {error.strerror or error}. Choose another one."
        ) from None
    return folder


def not_run(error: OnnxpressError) -> str:
    """Why ONNX Runtime does not open or run a graph, for the ledger: without the name of a temporary file."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return (
        f"ONNX Runtime does not run what comes out of it: {re.sub('Load model from .* failed: ?', '', one_line(cause))}"
    )


def describe_steps(steps: Sequence[Pass]) -> list[Json]:
    """Names and options of passes, for a notebook."""
    return [{"pass": step.name, "options": dataclasses.asdict(step)} for step in steps]  # type: ignore[call-overload]


def digest_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
