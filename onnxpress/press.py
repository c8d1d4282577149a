"""Presses a graph pass by pass under the gate: each is kept, repaired or undone, with a row of the ledger.

What a pass is lives in optimizers, what is good enough in gate, how places for a lossy one are chosen in plan.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from onnxpress import terminal
from onnxpress.errors import ArtifactError, BudgetError, InputError, ParityError
from onnxpress.gate import Gate
from onnxpress.graph import Graph
from onnxpress.manifest import Json, Runnable
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import Pass, PassContext
from onnxpress.optimizers.targets import target as find_target
from onnxpress.parity import Parity
from onnxpress.plan import NOTHING, Plan, choose_automatically, curve, mixed_plan, proven, whole_plan
from onnxpress.pruning import Smaller
from onnxpress.recipe import Recipe
from onnxpress.runtime.session import Session
from onnxpress.trials import Notebook, Times, Trials, describe_steps, not_run
from onnxpress.workbench import RowByRow, Workbench

_QDQ = "int8-qdq"
_INT8_CACHE = "int8-cache"  # of the lossy passes the one that leaves the weights alone
_SLOWER = 1.05  # a pass must not take more than this share of the time before it
_MOST_KEPT = 0.5  # of the groups of places, where one precision was chosen: with more it would not be that precision
_NOISE_MS = 0.05  # differences below this are the clock's
_TOGETHER_FROM = 2**30  # bytes of weights: to open and compare such a graph takes ten seconds and more


class Resume(NamedTuple):
    """Where searches keep their trials, and what these hang on beside the graph and the passes."""

    folder: Path
    about: Mapping[str, Json]


class Press:
    """The graph as it stands, and what became of each pass."""

    def __init__(
        self,
        recipe: Recipe,
        bench: Workbench,
        gate: Gate,
        parity: Parity,
        graph: Graph,
        session: Session,
        report: terminal.Progress,
        resume: Resume | None,
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
        self._quality = rounded(gate.reference_value)
        self._as_it_is = gate.verdict(gate.reference_metrics, None)  # what is said of the float graph
        self._recipe, self._bench, self._gate, self._parity, self._report = recipe, bench, gate, parity, report
        self._target, self._resume = find_target(recipe.build.target), resume

    def begin_with(self, smaller: Smaller) -> None:
        """Go on with a pruned model, whose own answers passes that lose nothing keep. Raises BudgetError."""
        session = self._bench.open(smaller.exported.graph)
        smaller.parity.check(session)
        judgement = self._gate.verdict(*self._gate.measure(session))
        row = self._row("prune", smaller.changes, smaller.notes)
        row["quality"] = rounded(judgement.value)
        row["metrics"] = {name: rounded(value) for name, value in judgement.metrics.items()}
        if not judgement.holds and not self._recipe.build.keep_all:
            learn = (
                "let it learn with [distil] (for longer, or on more of the texts that it is for), "
                if smaller.can_learn
                else ""
            )
            raise BudgetError(
                f"The pruned model is not good enough: {judgement.sentence()}; the original has "
                f"{self._gate.budget.metric} {self._gate.reference_value:.5g}. Prune less, {learn}allow more with --budget, or keep it all "
                "the same with --keep-all."
            )
        self._parity, self._as_it_is, self.unrounded = smaller.parity, judgement, session
        self._slower("prune", session)
        self._take(row, smaller.exported.graph, session, status="kept", reason=judgement.sentence())

    def run_lossless(self, steps: Sequence[Pass]) -> None:
        """Try the passes that lose nothing; those of a large graph are compared once, behind the last, unless that finds fault."""
        if self.graph.weight_bytes() < _TOGETHER_FROM or not self._run_together(steps):
            for step in steps:
                self.run(step)

    def run(self, step: Pass) -> None:
        """Try one pass: keep it, repair it, or undo it; one row of the ledger either way."""
        self._report.step(step.name)
        if step.lossless:
            self._run_lossless(step)
        else:
            self._run_lossy(step)

    def _run_together(self, steps: Sequence[Pass]) -> bool:
        """Keep all of these passes, if the graph behind them answers as before; else nothing is kept, nor in the ledger."""
        graph, bytes_before = self.graph.clone(), self.graph.weight_bytes()
        rows: list[dict[str, Json]] = []
        for step in steps:
            self._report.step(step.name)
            result = step.apply(graph, PassContext(target=self._target))
            graph = result.graph
            row = self._row(step.name, result.changes, result.notes)
            row["bytes_before"], row["bytes"] = bytes_before, (bytes_before := graph.weight_bytes())
            rows.append(row)
        changed = [row["pass"] for row in rows if row["changes"]]
        if len(changed) < 2:
            return False
        self._report.step(f"compare what {', '.join(changed)} have changed")
        if not self._bench.timed:  # the clock alone looks at the one before, and memory has better uses
            del self.session, self.unrounded
        try:
            session = self._bench.open(graph)
            self._parity.check(session)
        except (ArtifactError, InputError, ParityError):  # by themselves each is told from the others
            if not self._bench.timed:
                self.session = self.unrounded = self._bench.open(self.graph)
            return False
        slower = self._slower(changed[-1], session)
        if slower and not self._recipe.build.keep_all and not self._recipe.build.only:
            self.measured.pop()
            return False
        for row in rows:
            if row["changes"] == 0:
                self._record(row, status="unchanged", reason=NOTHING)
            else:
                reason = f"answers as before, compared once behind {changed[-1]}" + (f"; {slower}" if slower else "")
                self._record(row, status="kept", reason=reason)
        self.graph, self.session = graph, session
        if self.exact:
            self.unrounded = session  # so that no session of an older graph stays in memory
        return True

    def _run_lossless(self, step: Pass) -> None:
        result = step.apply(self.graph.clone(), PassContext(target=self._target))
        row = self._row(step.name, result.changes, result.notes)
        if result.changes == 0:
            self._record(row, status="unchanged", reason=NOTHING)
            return
        try:
            session = self._bench.open(result.graph)
            self._parity.check(session)
        except (ArtifactError, InputError) as error:  # the graph before it takes the same inputs
            self._record(row, status="undone", reason=not_run(error))
            return
        except ParityError as error:
            self._record(row, status="undone", reason=f"changed the answers: {error}")
            return
        slower = self._slower(step.name, session)
        asked = self._recipe.build.keep_all or self._recipe.build.only or step.name in self._target.needed
        if slower and not asked:
            self._record(row, status="undone", reason=slower)
            return
        reason = "answers as before" + (f"; {slower}" if slower else "")
        self._take(row, result.graph, session, status="kept", reason=reason)
        if self.exact:
            self.unrounded = session  # so that no session of an older graph stays in memory

    def _run_lossy(self, step: Pass) -> None:
        trials = self._trials(step.name, (step,))
        try:
            whole = trials.measure(frozenset())
        except (ArtifactError, InputError) as error:
            row = self._row(step.name, 0, ())
            self._record(row, status="undone", reason=not_run(error))
            self._refuse(step, row)
            return
        row = self._row(step.name, whole.changes, whole.notes)
        if whole.changes == 0:
            self._record(row, status="unchanged", reason=NOTHING)
            if self._by_name(step):
                raise BudgetError(
                    f"The pass {step.name} was asked for and finds nothing to change: {'; '.join(whole.notes)}. {self._instead(step)}."
                )
            return
        plan = whole_plan(step.name, trials, can_run_alone=self._gate.workload.rows_can_run_alone)
        if not plan.holds and not self._recipe.build.keep_all:
            over = f"over the budget: {plan.sentence()}"
            plan = mixed_plan(plan, trials, self._report.detail, share=_MOST_KEPT)
            if not plan.holds:
                row["quality"] = rounded(plan.judgement.value)
                closest = f"; what came closest, of at most half of the places: {plan.sentence()}" if plan.kept else ""
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
        timed = self._bench.timed
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
            about = {"graph": self.graph.digest(), "steps": describe_steps(steps), **self._resume.about}
            notebook = Notebook(self._resume.folder, name, about)
        return Trials(
            steps,
            self.graph,
            self.session,
            bench=self._bench,
            gate=self._gate,
            target=self._target,
            progress=self._report.detail,
            notebook=notebook,
        )

    def _fill(self, row: dict[str, Json], plan: Plan) -> None:
        """What the evaluation says of a plan."""
        row["changes"], row["notes"] = plan.changes, list(plan.notes)
        row["quality"] = rounded(plan.judgement.value)
        if plan.judgement.batch_cosine is not None:
            row["batch_cosine"] = rounded(plan.judgement.batch_cosine)
        row["metrics"] = {name: rounded(value) for name, value in plan.judgement.metrics.items()}

    def _take_plan(self, row: dict[str, Json], plan: Plan, trials: Trials, *, status: str, reason: str) -> None:
        result, session = trials.apply(plan.kept)
        self._take(row, result.graph, session, status=status, reason=reason)
        self.exact, self.rows_alone = False, plan.rows_alone

    def _explicit(self, step: Pass) -> bool:
        """Whether the recipe asks for a lossy pass by name, or for all of them."""
        return self._recipe.build.keep_all or self._by_name(step)

    def _by_name(self, step: Pass) -> bool:
        build = self._recipe.build
        return build.precision is not None or bool(build.only) or step.name == _INT8_CACHE

    def _refuse(self, step: Pass, row: Mapping[str, Json]) -> None:
        """A precision that was asked for by name is never left out in silence."""
        if self._explicit(step):
            why = "; ".join([row["reason"], *row["notes"]])
            random = self._gate.workload.task == "module" and self._recipe.quality.file is None
            give = "It was judged by random inputs: give it real ones with --calibration and --eval. " if random else ""
            raise BudgetError(
                f"The pass {step.name} was asked for and cannot be kept: {why}. {give}{self._instead(step)}, allow more with --budget, or "
                "keep it in spite of the budget with --keep-all."
            )

    def _instead(self, step: Pass) -> str:
        """What can be done without a pass that was asked for by name."""
        if step.name == _INT8_CACHE:
            return "Leave out --cache int8"
        if self._recipe.build.only:
            return f"Take {step.name} out of `only`"
        convolves = step.name != _QDQ and _QDQ in self._target.precisions and "Conv" in self.graph.operators()
        return "Choose another --precision" + (f" ({_QDQ} is the one for convolutions)" if convolves else "")

    def _slower(self, name: str, session: Runnable) -> str:
        """Why a pass does not pay, or nothing. Records the times."""
        if not self._bench.timed:
            return ""
        rows = self._bench.compare(self.session, session, self._gate.workload.timing)
        self._record_times(name, rows)
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


def rounded(value: float) -> float:
    """Six significant digits: what is said of quality must not hang on the last bits of a sum."""
    return float(f"{value:.6g}")
