"""Plans: what a lossy pass, or several in a row, come to under the budget; and the automatic choice among them.

The automatic plan tries every precision of the target. Those that break the budget as they are, and would be chosen if
they did not, are searched for the places that have to stay (search.py). The fastest that keeps the budget is chosen;
plans within 5 % of it count as fast, and of them the smallest is, then the first in the target's order. Where nothing is
timed, the smallest is chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from onnxpress.errors import ArtifactError, BudgetError, ConversionError, InputError, RecipeError
from onnxpress.gate import Gate, Judgement
from onnxpress.manifest import Json
from onnxpress.search import search
from onnxpress.trials import Times, Trials, not_run

TIE = 1.05  # plans count as equally fast up to this share of the fastest one's time: as much is the clock's
NOTHING = "nothing to change"
_ALL: frozenset[str] = frozenset()  # nothing stays


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A way to press the graph, and what comes of it.

    kept: places that stay, of `places`; kept_as says how. rows_alone: it is to be run row by row. bytes: of its weights.
    times: milliseconds before and after by shape, None where nothing was timed. changes and notes: the passes'.
    batch_cosine: as measured in batches. tried: what a search went through, by the places that stay, fewest first.
    """

    name: str
    judgement: Judgement
    bytes: int
    kept: frozenset[str] = _ALL
    rows_alone: bool = False
    times: Times | None = None
    changes: int = 0
    notes: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    kept_as: str = ""
    batch_cosine: float | None = None
    tried: tuple[Plan, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether it keeps the budget."""
        return self.judgement.holds

    @property
    def share_of_time(self) -> float:
        """Its time as a share of the graph's before it: geometric mean over the shapes, 1 where nothing was timed."""
        pairs = (self.times or {}).values()
        return math.exp(sum(math.log(after / before) for before, after in pairs) / len(pairs)) if pairs else 1.0

    @property
    def status(self) -> str:
        """Its status in the ledger where it is taken."""
        return "repaired" if self.kept or self.rows_alone else "kept"

    def sentence(self, *, named: bool = False) -> str:
        """What stays, and the verdict. named: the places are named and not only counted."""
        said = self.judgement.sentence()
        if self.rows_alone:
            return f"rows run one at a time, since batched they were at {self.batch_cosine:.5f}: {said}"
        if self.kept:
            names = f" ({', '.join(sorted(self.kept))})" if named else ""
            return f"{len(self.kept)} of {len(self.places)} places stay {self.kept_as}{names}: {said}"
        return said

    def points(self) -> list[Plan]:
        """All that was tried of it, by the places that stay, fewest first."""
        return [*self.tried] or [self]


def whole_plan(name: str, trials: Trials, *, can_run_alone: bool, timed: bool = False) -> Plan:
    """The plan with nothing kept; row by row if it keeps the budget in no other way. timed: it is timed too."""
    judgement = trials.judge(_ALL)
    if not judgement.holds and can_run_alone:
        alone = trials.judge(_ALL, rows_alone=True)
        if alone.holds:
            return _plan(name, trials, _ALL, alone, timed=timed, rows_alone=True)
    return _plan(name, trials, _ALL, judgement, timed=timed)


def mixed_plan(
    whole: Plan, trials: Trials, progress: Callable[[str], None], *, share: float = 1.0, timed: bool = False
) -> Plan:
    """The plan with the fewest places kept that keeps the budget; one that does not hold is the closest that was tried.

    share: how much of it may be kept at most. timed: each plan of the bisection is timed too, while it is at hand.
    """

    def visit(kept: frozenset[str]) -> None:
        if timed:
            trials.times(kept)

    found = search(whole.places, trials.judge, progress, share=share, visit=visit)
    tried = [_plan(whole.name, trials, kept, judgement, timed=timed) for kept, judgement in found]
    # Where all layers stay, what lay between them does too: that is no plan.
    tried = [plan for plan in tried if plan.changes]
    best = max([whole, *tried], key=lambda plan: (plan.holds, -len(plan.kept) if plan.holds else plan.judgement.margin))
    return replace(best, tried=(whole, *tried))


def proven(plan: Plan, trials: Trials) -> Plan:
    """The plan with figures that were measured in this process. Raises RecipeError where it held only in a notebook."""
    return replace(plan, judgement=trials.prove(plan.kept, rows_alone=plan.rows_alone))


def choose(plans: Sequence[Plan], *, by_size: bool) -> Plan:
    """The smallest of some plans, or the fastest; where they are equal, the first."""
    if by_size:
        return min(plans, key=lambda plan: plan.bytes)
    fastest = min(plan.share_of_time for plan in plans)
    return min((plan for plan in plans if plan.share_of_time <= TIE * fastest), key=lambda plan: plan.bytes)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one candidate: "kept" or "repaired" is the chosen one, "lost" keeps the budget too, "undone" does not.

    plan is None where it cannot be tried at all, or ("unchanged") finds nothing to change.
    """

    name: str
    plan: Plan | None
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the automatic plan came to, and every candidate's outcome."""

    chosen: Plan
    outcomes: tuple[Outcome, ...]


def choose_automatically(
    candidates: Mapping[str, Trials | None],
    gate: Gate,
    float_bytes: int,
    as_it_is: Judgement,
    *,
    by_size: bool,
    timed: bool,
    step: Callable[[str], None],
    progress: Callable[[str], None],
) -> Choice:
    """Try all candidates and choose. candidates: a precision's trials by its name, None for float as it is; as_it_is: the verdict on that.

    timed: the clock is asked; without it, choose by_size. step and progress say what the search is at.

    Raises BudgetError where not even float keeps the budget.
    """
    if not as_it_is.holds:
        raise BudgetError(
            f"The budget asks for {as_it_is.metric} of at least {gate.budget.limit_value(gate.reference_value):.5g}; the original "
            f"itself has {as_it_is.value:.5g}, so no plan can keep it. Allow more with --budget."
        )
    plans: dict[str, Plan] = {}
    why_not: dict[str, str] = {}
    for name, trials in candidates.items():
        step(name)
        if trials is None:
            plans[name] = Plan(name=name, judgement=as_it_is, bytes=float_bytes)
            continue
        with _left_out(name, why_not):
            if trials.measure(_ALL).changes == 0:
                why_not[name] = NOTHING
            else:
                alone = gate.workload.rows_can_run_alone
                plans[name] = whole_plan(name, trials, can_run_alone=alone, timed=timed)
        trials.let_go()

    for name, whole in list(plans.items()):
        trials = candidates[name]
        if whole.holds or trials is None:
            continue
        holding = [plan for plan in plans.values() if plan.holds]
        if choose([*holding, whole], by_size=by_size) is not whole:
            why_not[name] = (
                f"over the budget, and not searched, since another would be chosen all the same: {whole.sentence()}"
            )
            continue
        step(f"{name}, the places that have to stay")
        with _left_out(name, why_not):
            plans[name] = mixed_plan(whole, trials, progress, timed=timed)
            if not plans[name].holds:
                why_not[name] = f"over the budget; what came closest: {plans[name].sentence()}"
        trials.let_go()

    chosen = choose([plan for plan in plans.values() if plan.holds], by_size=by_size)
    if (trials := candidates[chosen.name]) is not None:
        plans[chosen.name] = chosen = proven(chosen, trials)
    outcomes = [_outcome(name, plans.get(name), why_not.get(name, ""), chosen, by_size) for name in candidates]
    return Choice(chosen=chosen, outcomes=tuple(outcomes))


@contextmanager
def _left_out(name: str, why_not: dict[str, str]) -> Iterator[None]:
    """What one candidate meets does not end the search."""
    try:
        yield
    except (RecipeError, ConversionError) as error:
        why_not[name] = f"cannot be tried: {error}"
    except (ArtifactError, InputError) as error:
        why_not[name] = not_run(error)


def curve(choice: Choice) -> list[dict[str, Json]]:
    """Quality, size and time of all that was tried, for programs and for the report: one row a point.

    latency_ms is a sum over the shapes, latency_before_ms the float graph's in turns with it, share_of_time Plan's; all three
    None where nothing was timed. quality is None where it is no number.
    """
    points = [point for outcome in choice.outcomes if outcome.plan is not None for point in outcome.plan.points()]
    rows: list[dict[str, Json]] = [
        {
            "plan": point.name,
            "kept": len(point.kept),
            "places": len(point.places),
            "quality": float(f"{point.judgement.value:.6g}") if math.isfinite(point.judgement.value) else None,
            "holds": point.holds,
            "bytes": point.bytes,
            **_latency(point),
            "chosen": point.name == choice.chosen.name and point.kept == choice.chosen.kept,
        }
        for point in points
    ]
    before = [row["latency_before_ms"] for row in rows if row["latency_ms"] is not None]
    for row in rows:
        if before and not row["places"]:  # float, which the others were timed in turns with
            middle = statistics.median(before)
            row.update(latency_before_ms=middle, latency_ms=middle, share_of_time=1.0)
    return rows


def _outcome(name: str, plan: Plan | None, why_not: str, chosen: Plan, by_size: bool) -> Outcome:
    """Reasons have no times in them, for the manifest does not hang on the clock more than the choice itself does."""
    if plan is None or not plan.holds:
        return Outcome(name=name, plan=plan, status="unchanged" if why_not == NOTHING else "undone", reason=why_not)
    if plan is chosen:
        most = "smallest" if by_size else "fastest"
        reason = f"the {most} that keeps the budget: {plan.sentence(named=True)}"
        return Outcome(name=name, plan=plan, status=plan.status, reason=reason)
    better = "smaller" if by_size else f"faster, or as fast within {TIE - 1:.0%} and smaller"
    return Outcome(name=name, plan=plan, status="lost", reason=f"{chosen.name} is {better}: {plan.sentence()}")


def _latency(plan: Plan) -> dict[str, Json]:
    if plan.times is None:
        return dict.fromkeys(("latency_before_ms", "latency_ms", "share_of_time"))
    before, after = (round(sum(times), 4) for times in zip(*plan.times.values(), strict=True))
    return {"latency_before_ms": before, "latency_ms": after, "share_of_time": round(plan.share_of_time, 4)}


def _plan(
    name: str, trials: Trials, kept: frozenset[str], judgement: Judgement, *, timed: bool, rows_alone: bool = False
) -> Plan:
    trial, whole = trials.measure(kept), trials.measure(_ALL)
    return Plan(
        name=name,
        judgement=judgement,
        bytes=trial.bytes,
        kept=kept,
        rows_alone=rows_alone,
        batch_cosine=trial.batch_cosine,
        times=trials.times(kept, rows_alone=rows_alone) if timed else None,
        changes=trial.changes,
        notes=trial.notes,
        places=whole.touched,
        kept_as=trial.kept_as,
    )
