"""The recipe: what to build, from a TOML file or from options. Everything has a default but the model.

[model]
source = "folder, hub id, package:NAME/FOLDER, package.module:factory or FILE.onnx"
task = "feature-extraction"

[build]
target = "cpu"
precision = "int8"

[quality]
budget = "0.99"
file = "sentences.csv"
calibration = "other.csv"

[prune]
ffn = 0.5
heads = 0.33

[distil]
file = "texts.txt"

[passes.int8]
minimum_elements = 4096
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxpress.budgets import BUDGETS
from onnxpress.errors import RecipeError
from onnxpress.machine import cpu_target
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.prune import PruneOptions
from onnxpress.optimizers.sparse import check_sparse_target
from onnxpress.optimizers.targets import DUAL, GENERATION, TARGETS, target
from onnxpress.sample_files import TABLES, suffix

_MODULE = "module"  # the task of plain modules and .onnx files
_PROMPTS = "int8-prompts"  # the pass that goes last of all, since it doubles the layers


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """What to export.

    Of language models: adapter, a folder with a LoRA adapter to merge; hidden_states, whether the last layer's states are a second
    output.
    """

    source: str
    task: str | None = None
    revision: str | None = None
    max_length: int | None = Field(default=None, ge=1)
    adapter: str | None = None
    hidden_states: bool = False
    trust_remote_code: bool = False


class BuildSection(_Section):
    """What to make of it.

    target: this machine's CPU where not given. precision: None is the target's default. only: the passes to run, and no
    others. prefer: what the automatic plan looks for, speed where not given. cache: of language models, fp32 where not given; "int8"
    for keys and values that take a quarter of the memory.
    """

    name: str | None = Field(default=None, pattern=r"^\w[^/\\]*$")
    target: str = Field(default_factory=cpu_target)
    precision: str | None = None
    prefer: Literal["speed", "size"] | None = None
    cache: Literal["fp32", "int8"] | None = None
    only: list[str] = []
    keep_all: bool = False
    measure: bool = True


class QualitySection(_Section):
    """What it may cost.

    file holds the user's samples (csv, tsv, jsonl; of a module, arrays in .npz or .safetensors); budget "0.5%" is relative, 0.99 absolute. calibration: a file of other
    samples, which passes that calibrate look at in the place of the built-in ones. samples, calibration_samples: how many are looked at, 200 and
    128 where not given; of the random ones of a module 64.
    """

    budget: str | float | int | None = None
    file: str | None = None
    calibration: str | None = None
    columns: dict[str, str | int] = {}
    samples: int | None = Field(default=None, ge=8)
    calibration_samples: int | None = Field(default=None, ge=1)


class PruneSection(_Section):
    """What goes before anything else is done: shares below 1, or whole numbers written without a point (PruneOptions checks them).

    ffn: feed-forward channels and heads: key-value heads (with their query heads) of each layer; layers: whole layers. multiple: the
    number of channels that stay is one of these (32 where not given).
    """

    ffn: Any = 0
    heads: Any = 0
    layers: Any = 0
    multiple: int | None = Field(default=None, ge=1)

    def options(self) -> PruneOptions:
        """What the pruning takes. Raises RecipeError."""
        return PruneOptions(**self.model_dump(exclude_none=True))


class DistilSection(_Section):
    """How what was pruned learns to answer like the original again.

    file: the texts to learn from (csv, tsv, jsonl, txt; the built-in ones where not given), columns: which of its columns. hidden_weight, label_weight: of the
    losses on hidden states and on the file's own labels, beside that on the answers. pieces: of each text, that are learned from like texts. checkpoints: a folder for them, from which a
    killed build goes on. processes: on this machine, that share each batch.
    """

    file: str | None = None
    columns: dict[str, str | int] = {}
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    hidden_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    label_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    pieces: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoints: str | None = None
    processes: int = Field(default=1, ge=1)


class Recipe(_Section):
    """A whole recipe; see the module's docstring for the file's form."""

    model: ModelSection
    build: BuildSection = BuildSection()
    quality: QualitySection = QualitySection()
    prune: PruneSection | None = None
    distil: DistilSection | None = None
    passes: dict[str, dict[str, Any]] = {}

    @property
    def automatic(self) -> bool:
        """Whether the build chooses the precision: a budget is given, and nothing that says how to keep it."""
        build = self.build
        return self.quality.budget is not None and build.precision is None and not build.only and not build.keep_all

    def plans(self, task: str) -> dict[str, tuple[str, ...]]:
        """The precisions among which an automatic build chooses, the task's default first, each with its passes."""
        facts = target(self.build.target)
        found = {name: facts.precisions[name] for name in facts.allowed_precisions(task)}
        # int8-cache, which comes after the choice, would have to go before int8-prompts.
        return {name: steps for name, steps in found.items() if self.build.cache != "int8" or _PROMPTS not in steps}

    def precision(self, task: str) -> str:
        """The precision asked for, or the target's default for a task. Raises RecipeError where they do not go together."""
        allowed = target(self.build.target).allowed_precisions(task)
        if self.build.precision not in (None, *allowed):
            raise RecipeError(
                f"Precision {self.build.precision!r} does not go with {task} on target {self.build.target!r}; it takes: "
                f"{', '.join(allowed)}."
            )
        return self.build.precision or allowed[0]

    def check(self, task: str) -> None:
        """Hold the recipe against the task, once that is known. Raises RecipeError for what does not go with it."""
        target(self.build.target).allowed_precisions(task)
        if not self.build.only:
            self.precision(task)
        self.check_pass_options((task,))
        for_language_models = {
            "adapter": self.model.adapter is not None,
            "hidden_states": self.model.hidden_states,
            "cache": self.build.cache is not None,
            "int8-cache": "int8-cache" in self.build.only,
            _PROMPTS: _PROMPTS in self.build.only,
        }
        for_texts = {
            "max_length": self.model.max_length is not None,
            "revision": self.model.revision is not None,
            "distil": self.distil is not None,
        }
        wrong = [key for key, given in for_language_models.items() if given and task != GENERATION]
        if wrong:
            raise RecipeError(
                f"`{wrong[0]}` goes with text-generation, and the task is {task}: leave it out, or build a language model."
            )
        wrong = [key for key, given in for_texts.items() if given and task == _MODULE]
        if wrong:
            raise RecipeError(
                f"`{wrong[0]}` goes with models that read text, built from PyTorch; leave it out for a plain module or an .onnx file."
            )
        for columns in (self.quality.columns, self.distil.columns if self.distil else {}):
            unread = sorted(set(columns) - {"text"})
            if unread and task == GENERATION:
                raise RecipeError(
                    f"The column of {unread[0]!r} was named, and language models read texts alone: leave it out."
                )

    def check_pass_options(self, tasks: Sequence[str]) -> None:
        """Raises RecipeError for options of passes that run for none of these tasks."""
        runs = dict.fromkeys(name for task in tasks for name in self.pass_names(task))
        if self.automatic:
            runs |= dict.fromkeys(name for task in tasks for names in self.plans(task).values() for name in names)
        unread = [name for name in self.passes if name not in runs]
        if unread:
            raise RecipeError(
                f"[passes.{unread[0]}] sets options of a pass that this recipe does not run; it runs: {', '.join(runs)}."
            )

    def pass_names(self, task: str) -> tuple[str, ...]:
        """The passes that this recipe runs for a task, in order; an automatic build chooses lossy ones (`plans`) beside them."""
        if self.build.only:
            return tuple(self.build.only)
        facts = target(self.build.target)
        cache = ("int8-cache",) if self.build.cache == "int8" and task == GENERATION else ()
        lossy = () if self.automatic else facts.precisions[self.precision(task)]
        return (*facts.lossless, *sorted((*lossy, *cache), key=_PROMPTS.__eq__))  # which goes last


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Paths in it are relative to its folder. Raises RecipeError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}.") from None
    recipe = make_recipe(content, where=str(path))
    quality, model = recipe.quality, recipe.model
    files = {"file": quality.file, "calibration": quality.calibration}
    quality = quality.model_copy(
        update={key: str(path.parent / name) for key, name in files.items() if name is not None}
    )
    distil = recipe.distil
    if distil is not None:
        paths = {"file": distil.file, "checkpoints": distil.checkpoints}
        found = {key: str(path.parent / name) for key, name in paths.items() if name is not None}
        distil = distil.model_copy(update=found)
    if model.adapter is not None:
        model = model.model_copy(update={"adapter": str(path.parent / model.adapter)})
    if (path.parent / model.source).exists():
        model = model.model_copy(update={"source": str(path.parent / model.source)})
    build = recipe.build
    if build.name is None and path.name == "recipe.toml":
        build = build.model_copy(update={"name": path.resolve().parent.name})
    return recipe.model_copy(update={"quality": quality, "model": model, "build": build, "distil": distil})


def make_recipe(content: Mapping[str, Any], *, where: str = "The recipe") -> Recipe:
    """Check a recipe's content; `where` names it in errors. Raises RecipeError naming the key and what is allowed.

    What hangs on a task that is not known yet is `Recipe.check`'s.
    """
    try:
        recipe = Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(item) for item in error.errors()) + ".") from None
    facts = target(recipe.build.target)
    if recipe.build.precision not in (None, *facts.precisions):
        raise RecipeError(
            f"{where}: precision {recipe.build.precision!r} does not go with target {facts.name!r}; "
            f"it takes: {', '.join(facts.precisions)}.{_where(recipe.build.precision)}"
        )
    if recipe.build.only and recipe.build.precision is not None:
        raise RecipeError(f"{where}: `only` names the passes itself; leave `precision` out, or `only`.")
    if recipe.build.only and recipe.build.cache is not None:
        raise RecipeError(
            f"{where}: `only` names the passes itself; leave `cache` out, or put int8-cache last in `only`."
        )
    if recipe.build.cache is not None and facts.uniform_steps:
        raise RecipeError(
            f"{where}: a cache of {recipe.build.cache} does not go with target {facts.name!r}, whose language models have one of float16."
        )
    if recipe.distil is not None and recipe.prune is None:
        raise RecipeError(f"{where}: [distil] trains what [prune] made smaller; add [prune], or leave [distil] out.")
    if recipe.build.prefer is not None and not recipe.automatic:
        raise RecipeError(
            f"{where}: `prefer` is for builds that choose the precision themselves: give a `budget`, and neither `precision` nor "
            "`only` nor `keep_all`; or leave `prefer` out."
        )
    if recipe.prune is not None:
        channels = recipe.prune.options().ffn  # says what is wrong with any of them
        if recipe.prune.multiple is not None and not channels:
            raise RecipeError(
                f"{where}: prune: multiple rounds how many channels of ffn stay; set ffn, or leave it out."
            )
    _check_columns(where, recipe.quality.columns, recipe.quality.file, recipe.quality.calibration)
    if recipe.distil is not None:
        _check_columns(where, recipe.distil.columns, recipe.distil.file)
        if recipe.distil.batch_size % recipe.distil.processes:
            raise RecipeError(
                f"{where}: distil: batch_size is {recipe.distil.batch_size}, which {recipe.distil.processes} processes cannot share "
                "evenly; it is a multiple of processes."
            )
    if "sparse-2-4" in recipe.build.only:
        check_sparse_target(facts)
    twice = [name for name in recipe.build.only if recipe.build.only.count(name) > 1]
    if twice:
        raise RecipeError(f"{where}: `only` names {twice[0]} twice; it runs once.")
    order = [make_pass(name) for name in recipe.build.only]
    for step, later in pairwise(order):
        if later.lossless and not step.lossless:
            raise RecipeError(
                f"{where}: `only` has {later.name} after {step.name}; lossless passes go before lossy ones."
            )
        if step.name == _PROMPTS or (step.name == "int8-cache" and later.name != _PROMPTS):
            raise RecipeError(f"{where}: `only` has {later.name} after {step.name}, which goes last.")
    for name, options in recipe.passes.items():
        make_pass(name, options)  # says what is wrong with them
    try:
        if recipe.model.task is not None and recipe.model.task in BUDGETS:
            recipe.check(recipe.model.task)
        else:  # not known yet, or by another name
            generates = facts.generation and recipe.build.precision in (None, *facts.generation)
            others = () if recipe.build.precision == DUAL else ("",)
            recipe.check_pass_options((*others, GENERATION) if generates else others)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return recipe


def recipe_of(source: str | os.PathLike[str], options: Mapping[str, Any]) -> Recipe:
    """A recipe file's, or that of a model alone, with some of its keys set. Raises RecipeError."""
    name = os.fspath(source)
    recipe = read_recipe(Path(name)) if name.endswith(".toml") else make_recipe({"model": {"source": name}})
    return with_options(recipe, options)


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
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        content.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    return make_recipe(content)


def _check_columns(where: str, columns: Mapping[str, str | int], *files: str | None) -> None:
    """Raises RecipeError where columns are named and no file has any."""
    if columns and not any(suffix(Path(file)) in TABLES for file in files if file is not None):
        raise RecipeError(
            f"{where}: columns were named, and none of the files given is a table: {', '.join(TABLES)} have columns; leave them out."
        )


def _where(precision: str | None) -> str:
    """Which targets run a precision that one does not."""
    names = [name for name, facts in TARGETS.items() if precision in facts.precisions]
    return f" {precision} brings speed on --target {' or '.join(names)} alone." if names else ""


def _explain(item: Mapping[str, Any]) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in item["loc"][:-1]:
            section = section.model_fields[part].annotation
            section = next((kind for kind in get_args(section) if kind is not type(None)), section)  # of `X | None`
        return f"unknown key {location!r} (allowed here: {', '.join(section.model_fields)})"
    if item["type"] == "missing":
        return f"key {location!r} is missing"
    return f"key {location!r}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
