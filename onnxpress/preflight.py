"""What can be said against a build before its model is loaded: by the recipe, the task, the model's labels and the user's files.

What hangs on the tokenizer, on weights, or on shapes is said later, where it is met; how long a text may be, by `find`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxpress import evaluation
from onnxpress.budgets import budget_for
from onnxpress.decoder_workload import read_token_ids
from onnxpress.errors import OutputError, RecipeError
from onnxpress.manifest import Json
from onnxpress.optimizers import calibrates, make_pass
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.targets import GENERATION, target
from onnxpress.recipe import DistilSection, Recipe
from onnxpress.sample_arrays import check_arrays
from onnxpress.sample_files import read_samples
from onnxpress.samples import LONG, Sample, overlap
from onnxpress.training_texts import gold_labels
from onnxpress.workbench import untried
from onnxpress.workload import workload_file


def check(
    recipe: Recipe,
    task: str,
    options: Mapping[str, Json],
    *,
    resume: bool = False,
    labelled: bool = False,
) -> None:
    """Raise RecipeError, InputError or OutputError for what cannot be, or would be ignored. options: of the model, its labels if it has any.

    resume: whether what a search measures is to be kept. labelled: evaluation samples with labels will be there, beside no file.
    """
    recipe.check(task)
    names = [*recipe.pass_names(task)]
    if recipe.automatic:
        names += [name for plan in recipe.plans(task).values() for name in plan]
    steps = [make_pass(name, recipe.passes.get(name)) for name in dict.fromkeys(names)]
    _check_machine(recipe, task, steps)
    if resume and all(step.lossless for step in steps):
        raise RecipeError(
            "--resume keeps what is measured of passes that cost quality, and this build runs none: leave it out."
        )
    if recipe.quality.calibration is not None and recipe.prune is None and not any(map(calibrates, steps)):
        raise RecipeError(_unread(recipe, task))
    found = _check_files(recipe, task, options)
    if found is not None:
        problem_type = options.get("problem_type")
        budget_for(task, recipe.quality.budget, labelled=labelled or found, problem_type=problem_type)


def _unread(recipe: Recipe, task: str) -> str:
    """What to say where nothing looks at the calibration file."""
    plans = recipe.plans(task)
    choices = [
        f"--precision {name}" for name, passes in plans.items() if any(calibrates(make_pass(step)) for step in passes)
    ]
    choices += [f"--pass-option {name}.method=gptq" for name in ("int4-weights", "int8-weights") if name in plans]
    return (
        f"Nothing in this build would look at the calibration file {recipe.quality.calibration}: leave it out, or choose "
        f"{', '.join(choices)} or --prune."
    )


def _check_machine(recipe: Recipe, task: str, steps: Sequence[Pass]) -> None:
    """What this machine cannot do."""
    facts = target(recipe.build.target)
    untried_here = untried(facts)
    timed = recipe.build.measure and not untried_here and not (task == GENERATION and facts.uniform_steps)
    if not timed:
        refuse_speed(recipe, untried_here or "`measure` is off")
    if facts.providers == ("cpu",) and any(step.name == "bf16" for step in steps):
        raise RecipeError(
            f"ONNX Runtime's CPU provider has no kernels for bf16: leave it out, target {facts.name!r} cannot run it."
        )


def refuse_speed(recipe: Recipe, why: str) -> None:
    """Raise RecipeError where the fastest plan is asked for; why: nothing is timed."""
    if recipe.build.prefer == "speed":
        raise RecipeError(
            f"Speed is to be preferred, and nothing is timed here ({why}): leave `prefer` out and the smallest plan within the budget is "
            "taken, or give a precision."
        )


def _check_files(recipe: Recipe, task: str, options: Mapping[str, Json]) -> bool | None:
    """Read the user's files; whether there are labels to judge by, None where it is not known yet: of a module's arrays."""
    quality, distil = recipe.quality, recipe.distil
    file, calibration = workload_file(quality.file, "evaluation"), workload_file(quality.calibration, "calibration")
    learned = None if distil is None else workload_file(distil.file, "distillation")
    if task == "module":
        check_arrays(file, calibration)
        return None if file is not None else False
    judged = [] if file is None else read_samples(file, task, quality.columns)
    labelled = bool(judged) and judged[0].label is not None
    if labelled:
        evaluation.check_labels(task, options, judged)
        evaluation.check_spread(task, options, judged)
    if calibration is not None and task == GENERATION and calibration.suffix == ".npy":
        read_token_ids(calibration)
    elif calibration is not None:
        calibrating = read_samples(calibration, task, quality.columns, labels=False)
        seen = {text for sample in judged for text in (sample.text, sample.text_pair)} - {None}
        both = _shared(calibrating, judged)
        # A language model's texts are cut into windows later, of which those that are shared are left out, or refused where they are long.
        if task != GENERATION and all({sample.text, sample.text_pair} & seen for sample in calibrating):
            both = len(calibrating)
        if both:
            raise RecipeError(overlap(calibration, file, both))
    if distil is not None:
        _check_lesson(distil, learned, task, options, judged, file)
    return labelled


def _check_lesson(
    distil: DistilSection,
    learned: Path | None,
    task: str,
    options: Mapping[str, Json],
    judged: Sequence[Sample],
    file: Path | None,
) -> None:
    """What a student would learn from: texts that do not judge it, with labels where these are learned too."""
    from onnxpress.optimizers.training import TrainingOptions, has_begun, make_folder

    TrainingOptions(
        batch_size=distil.batch_size, precision=distil.precision, processes=distil.processes
    ).check_machine()
    with_labels = distil.label_weight > 0
    if distil.pieces and (with_labels or task in (GENERATION, "question-answering")):
        raise RecipeError(
            "distil.pieces makes texts of parts of texts, which have no labels, and goes with no language model and no questions: leave it out."
        )
    samples = [] if learned is None else read_samples(learned, task, distil.columns, labels=with_labels)
    if with_labels:
        gold_labels(samples, task, options, learned)
    both = _shared(samples, judged)
    if both:
        raise RecipeError(
            f"{both} texts of {learned} are in {file} too: what has learned from them cannot be judged by them. Take them out."
        )
    if distil.checkpoints is not None:
        folder = Path(distil.checkpoints)
        make_folder(folder)
        if any(folder.iterdir()) and not has_begun(folder):
            raise OutputError(
                f"The folder {folder} of distil.checkpoints is not empty, and holds no training that could go on: choose another one."
            )


def _shared(samples: Sequence[Sample], judged: Sequence[Sample]) -> int:
    """How many texts, long enough not to be equal by chance, are among both."""
    one, other = ({text for item in part for text in (item.text, item.text_pair) if text} for part in (samples, judged))
    return sum(len(text) >= LONG for text in one & other)
