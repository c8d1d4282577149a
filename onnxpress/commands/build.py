"""build and fit: from a model to an artifact."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxpress.commands.options import command, others
from onnxpress.errors import UsageError
from onnxpress.figures import print_json

if TYPE_CHECKING:
    from onnxpress.artifact import Artifact
    from onnxpress.manifest import Json


def add_build(commands: Any) -> None:
    """`onnxpress build`."""
    parser = command(commands, "build", _build, "export a model, press it under a quality gate, write an artifact")
    parser.add_argument("source", help="recipe.toml, model folder, hub id, package.module:factory, or FILE.onnx")
    parser.add_argument("--task", help="e.g. feature-extraction, text-classification; found out where possible")
    parser.add_argument(
        "--target",
        help="cpu, cpu-avx2 (x86 without VNNI), cpu-arm64, openvino (Intel), cuda, tensorrt (default: this machine's CPU)",
    )
    parser.add_argument(
        "--precision",
        help="fp32, int8, int8-dynamic, int8-qdq, fp8-qdq, int8-weights, int4-weights, dual (4 bits, and int8 for prompts), fp16, "
        "fp16-sparse, bf16; int8-weights-bf16, int4-weights-bf16",
    )
    parser.add_argument("--out", type=Path, help="folder of the artifact (default: artifacts/NAME)")
    parser.add_argument(
        "--cache", choices=("fp32", "int8"), help="of a language model's keys and values (default fp32)"
    )
    parser.add_argument("--name", help="name of the artifact")
    parser.add_argument(
        "--budget",
        help='what quality it may cost: "0.5%%" (relative) or "0.99" (absolute); without --precision, the best plan that keeps it '
        "is searched",
    )
    parser.add_argument("--prefer", choices=("speed", "size"), help="what that search looks for (default speed)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="where a build keeps what it measured of passes that cost quality, so that an interrupted one goes on",
    )
    parser.add_argument(
        "--eval",
        dest="file",
        help="your samples: csv, tsv or jsonl, with or without labels, or CoNLL columns; or a .txt without labels, a text a line (of a "
        "language model one text), on which answers are compared with the original's; of a module, .npz",
    )
    parser.add_argument(
        "--calibration",
        help="other samples, for passes that calibrate, the same kinds of files, labels unread; or .npy, token ids; of a module, .npz",
    )
    parser.add_argument("--column", action="append", default=[], metavar="ROLE=NAME", help="a column of these tables")
    parser.add_argument(
        "--pass-option", action="append", default=[], metavar="PASS.NAME=VALUE", help="e.g. int4-weights.method=gptq"
    )
    parser.add_argument(
        "--prune",
        metavar="PARTS",
        help="e.g. ffn=0.5,heads=0.33,layers=2: shares below 1 or whole numbers that go, then all that follows",
    )
    parser.add_argument(
        "--distil",
        metavar="FILE",
        help="what was pruned learns from the original on these texts; more with --pass-option distil.epochs=5",
    )
    parser.add_argument("--only", action="append", metavar="PASS", help="run this pass and no other (repeatable)")
    parser.add_argument(
        "--keep-all", action="store_true", default=None, help="keep passes in spite of budget and times"
    )
    parser.add_argument("--max-length", type=int, help="longest input in tokens; of a language model, the context")
    parser.add_argument("--adapter", help="folder of a LoRA adapter to merge into a language model")
    parser.add_argument("--hidden-states", action="store_true", default=None, help="a language model answers these too")
    parser.add_argument("--revision", help="revision on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the model brings")
    parser.add_argument("--no-measure", dest="measure", action="store_false", default=None, help="do not time anything")
    parser.add_argument("--json", action="store_true", help="print the manifest and the measurements as JSON")


def _build(options: argparse.Namespace) -> int:
    from onnxpress.recipe import recipe_of

    Path.cwd()  # without one, torch's libraries end the process
    chosen = others(options, "source", "out", "json", "resume", "pass_option", "prune", "distil", "column")
    if options.pass_option:
        passes = _pass_options(options.pass_option)
        for section in ("prune", "distil"):
            if section in passes:
                chosen[section] = passes.pop(section)
        chosen["passes"] = passes
    if options.prune is not None:
        chosen["prune"] = _once([*chosen.get("prune", {}).items(), *_prune(options.prune)], "--prune")
    if options.distil is not None:
        chosen["distil"] = _once([*chosen.get("distil", {}).items(), ("file", options.distil)], "--distil")
    if options.column:
        chosen["columns"] = _columns(options.column)
    recipe = recipe_of(options.source, chosen)

    # After what may be wrong with the options: torch takes seconds to load.
    from onnxpress import terminal
    from onnxpress.pipeline import build

    artifact = build(recipe, out=options.out, resume=options.resume, quiet=options.json)
    if options.json:
        print_json(_described(artifact))
    else:
        terminal.print_build(artifact)
    return 0


def add_fit(commands: Any) -> None:
    """`onnxpress fit`."""
    parser = command(commands, "fit", _fit, "train a checkpoint on your labels, and build the artifact")
    parser.add_argument("source", help="model folder or hub id")
    parser.add_argument(
        "--train", type=Path, required=True, metavar="FILE", help="csv, tsv, jsonl, CoNLL, or lines of label and text"
    )
    parser.add_argument(
        "--eval", type=Path, dest="evaluation", metavar="FILE", help="the same (default: a tenth of --train)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the artifact")
    parser.add_argument("--checkpoint", type=Path, help="folder of the trained model (default: OUT-checkpoint)")
    parser.add_argument(
        "--task",
        help="text-classification, multi-label-classification, regression, token-classification (default: told from the labels)",
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="ROLE=NAME", help="e.g. text=sentence, label=2"
    )
    parser.add_argument(
        "--frozen-encoder", action="store_true", help="fit a linear head alone: seconds in the place of minutes"
    )
    parser.add_argument("--balanced", action="store_true", help="rare labels count as much as frequent ones")
    parser.add_argument("--epochs", type=int, help="passes over the samples (default 3)")
    parser.add_argument("--batch-size", type=int, help="samples a step (default 32)")
    parser.add_argument("--learning-rate", type=float, help="its peak (default 5e-5)")
    parser.add_argument("--warmup", type=float, help="share of the steps in which it rises (default 0.1)")
    parser.add_argument("--schedule", choices=("linear", "cosine", "constant"), help="how it falls (default linear)")
    parser.add_argument("--weight-decay", type=float, help="default 0.01")
    parser.add_argument("--max-steps", type=int, help="stop there, whatever the epochs")
    parser.add_argument("--patience", type=int, help="stop after so many epochs without a better metric")
    parser.add_argument("--seed", type=int, help="of the head, the order and the split (default 0)")
    parser.add_argument("--autocast", choices=("fp32", "bf16", "fp16"), help="precision of training")
    parser.add_argument("--processes", type=int, help="that share each batch: one a device, or on the CPU (default 1)")
    parser.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="keep what --resume needs this often too")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    parser.add_argument("--max-length", type=int, help="longest text in tokens")
    parser.add_argument("--revision", help="revision on the hub")
    parser.add_argument("--target", help="as for build")
    parser.add_argument("--precision", help="of the artifact, as for build")
    parser.add_argument("--budget", help='what quality pressing may cost, as for build, e.g. "0.5%%"')
    parser.add_argument("--no-measure", dest="measure", action="store_false", default=None, help="do not time anything")
    parser.add_argument("--json", action="store_true", help="print training, manifest and measurements as JSON")


def _fit(options: argparse.Namespace) -> int:
    Path.cwd()
    from onnxpress import terminal
    from onnxpress.fit import fit

    fitted = fit(
        options.source,
        options.train,
        columns=_columns(options.column),
        quiet=options.json,
        **others(options, "source", "train", "column", "json"),
    )
    if options.json:
        print_json(_described(fitted.artifact, checkpoint=str(fitted.checkpoint), training=fitted.facts))
    else:
        terminal.print_build(fitted.artifact)
        for note in fitted.facts["notes"]:
            print(note)
        print(f"the trained model: {fitted.checkpoint}")
    return 0


def _described(artifact: Artifact, **training: Json) -> dict[str, Json]:
    manifest = json.loads(artifact.manifest.to_json())
    return {"path": str(artifact.path), **training, "manifest": manifest, "measured": artifact.measured}


def _columns(items: Sequence[str]) -> dict[str, str | int]:
    columns: list[tuple[str, str | int]] = []
    for item in items:
        role, separator, name = item.partition("=")
        if not separator or not role or not name:
            raise UsageError(f"--column {item!r} is not of the form ROLE=NAME, e.g. text=sentence or label=2.")
        columns.append((role, int(name) if name.isdecimal() else name))
    return _once(columns, "--column")


def _pass_options(items: Sequence[str]) -> dict[str, dict[str, Json]]:
    found: dict[str, dict[str, Json]] = {}
    for item in items:
        where, separator, text = item.partition("=")
        step, dot, name = where.partition(".")
        if not separator or not dot or not step or not name:
            raise UsageError(
                f"--pass-option {item!r} is not of the form PASS.NAME=VALUE, e.g. int4-weights.block_size=64."
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a word
        found[step] = _once([*found.get(step, {}).items(), (name, value)], f"--pass-option {step}")
    return found


def _once(pairs: Sequence[tuple[str, Any]], flag: str) -> dict[str, Any]:
    """Names and values as a dict. Raises UsageError where one is given twice, of which the first would be forgotten."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{flag}: {twice} is given twice; give it once.")
    return dict(pairs)


def _prune(text: str) -> list[tuple[str, int | float]]:
    """Parts and what goes of them: 1 is a whole number, and 1.0, which says no clear thing, is refused with the recipe."""
    pairs = [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in text.split(","))]
    try:
        return [(name, int(value) if value.isdecimal() else float(value)) for name, value in pairs]
    except ValueError:
        raise UsageError(
            f"--prune {text!r} is not of the form PART=SHARE,…: ffn, heads or layers, e.g. ffn=0.5,heads=0.33."
        ) from None
