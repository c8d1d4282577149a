"""Prunes an exported model before it is pressed, and lets the smaller one learn from the original where that is asked for.

    export → prune the graph → the same cuts in the PyTorch module → distil → export again

A file that somebody else exported has no module: its graph is pruned, and is what goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onnxpress.calibration import ActivationStream, activations
from onnxpress.errors import ConversionError, ParityError
from onnxpress.exporters import Exported, original, resized
from onnxpress.graph import Graph
from onnxpress.manifest import Json
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.prune import prune
from onnxpress.optimizers.targets import Target
from onnxpress.parity import Parity
from onnxpress.pruned import Pruned
from onnxpress.recipe import DistilSection, Recipe
from onnxpress.runtime.tokenization import Tokenizer
from onnxpress.workbench import Workbench
from onnxpress.workload import Workload

if TYPE_CHECKING:
    import torch

# Passes after which heads and layers can be found.
_READABLE = ("fold", "fuse-gelu", "fuse-layer-norm", "fuse-attention")
# Exporters repeat the weights that layers share; one constant for all is cut for all.
_READABLE_WITHOUT_NAMES = ("fold", "deduplicate", *_READABLE[1:])


class Smaller(NamedTuple):
    """The pruned model's export, whose reference is the pruned model itself; what was done, for the ledger."""

    exported: Exported
    changes: int
    notes: tuple[str, ...]
    parity: Parity
    can_learn: bool  # whether [distil] could train it


def make_smaller(
    exported: Exported,
    recipe: Recipe,
    target: Target,
    *,
    bench: Workbench,
    workload: Workload,
    tokenizer_folder: Path,
    export_again: Callable[[torch.nn.Module], Exported],
    progress: Callable[[str], None],
) -> Smaller:
    """Prune as the recipe says. export_again: exports a module in the place of the original one.

    Raises RecipeError, and ConversionError where the PyTorch module cannot follow the graph.
    """
    assert recipe.prune is not None
    module = original(exported.reference)
    graph = exported.graph.clone()
    for name in _READABLE if module is not None else _READABLE_WITHOUT_NAMES:
        if module is not None or name in target.lossless:
            graph = make_pass(name).apply(graph, PassContext(target=target)).graph
    pruned = prune(
        graph,
        recipe.prune.options(),
        stream=partial(ActivationStream, open_session=bench.open, inputs=workload.calibration),
        activations=partial(activations, open_session=bench.open, inputs=workload.calibration),
        training_follows=recipe.distil is not None,
        progress=progress,
    )
    changes, notes = len(pruned.changes) + len(pruned.layers), pruned.notes
    if module is None:
        assert recipe.distil is None
        smaller = dataclasses.replace(exported, graph=pruned.graph, reference=bench.open(pruned.graph))
        notes = (_sizes(exported.graph, pruned.graph), *notes)
        return Smaller(smaller, changes, notes, Parity(smaller), can_learn=False)
    student = resized(module, pruned)
    again = export_again(student)
    parity = Parity(again)
    try:
        parity.check(bench.open(pruned.graph))
    except ParityError as error:
        raise ConversionError(
            f"{exported.name}: made as small as its pruned graph, the PyTorch module answers otherwise; it may hold sizes that are not known "
            "as such. Prune something else (ffn, heads, layers), or the model as an .onnx file, whose graph alone is pruned."
        ) from error
    if recipe.distil is not None:
        del again, parity  # which hold the weights, and answers, once more
        notes += _distil(exported, module, student, pruned, recipe.distil, tokenizer_folder, progress)
        again = export_again(student)
        parity = Parity(again)
    notes = (_sizes(exported.graph, again.graph), *notes)
    learns = workload.task != "module"  # there are no texts for a plain one
    return Smaller(again, changes, notes, parity, can_learn=learns)


def _sizes(before: Graph, after: Graph) -> str:
    return f"{before.weight_bytes() / 4e6:.3g} million numbers became {after.weight_bytes() / 4e6:.3g} million"


def _distil(
    exported: Exported,
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    pruned: Pruned,
    section: DistilSection,
    tokenizer_folder: Path,
    progress: Callable[[str], None],
) -> tuple[str, ...]:
    """Train the student in place; remarks for the ledger."""
    from onnxpress.optimizers.distil import DistilOptions, distil
    from onnxpress.optimizers.training import TrainingOptions, has_begun
    from onnxpress.training_texts import training_examples

    options: Mapping[str, Json] = exported.options
    task = exported.graph.signature.task
    tokenizer = Tokenizer.from_folder(
        tokenizer_folder, max_length=options["max_length"], pad_token_id=options["pad_token_id"]
    )
    examples, notes = training_examples(
        task,
        tokenizer,
        options,
        file=None if section.file is None else Path(section.file),
        columns=section.columns,
        pieces=section.pieces,
        labels=section.label_weight > 0,
        seed=section.seed,
    )
    checkpoints = None if section.checkpoints is None else Path(section.checkpoints)
    training = TrainingOptions(
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        seed=section.seed,
        precision=section.precision,
        processes=section.processes,
        checkpoints=checkpoints,
        resume=checkpoints is not None and has_begun(checkpoints),
    )
    summary = distil(
        teacher,
        student,
        examples,
        task=task,
        options=DistilOptions(
            temperature=section.temperature,
            hidden_weight=section.hidden_weight,
            label_weight=section.label_weight,
            training=training,
        ),
        layers=pruned.kept_layers or None,
        pooling=getattr(getattr(exported.reference, "module", None), "pooling", None),
        problem_type=options.get("problem_type"),
        progress=progress,
    )
    return (
        *notes,
        f"distilled on {len(examples)} examples, {section.epochs} epochs: divergence {summary.before:.4g} to {summary.after:.4g}",
    )
