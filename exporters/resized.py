"""Makes a PyTorch module as small as its pruned graph: the same weights, the same layers gone."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from onnxpress.errors import ConversionError
from onnxpress.exporters.module import PlainModule
from onnxpress.exporters.transformers_model import TextModel
from onnxpress.manifest import Runnable
from onnxpress.pruned import Change, LostHeads, Pruned

_WIDTHS = ("all_head_size", "split_size", "embed_dim", "inner_dim")  # what modules call the channels of all heads


def original(reference: Runnable) -> torch.nn.Module | None:
    """The module that an export's reference runs, without what the export put around it; None where it is no module."""
    module: torch.nn.Module | None = getattr(reference, "module", None)
    if isinstance(module, TextModel):
        inner: torch.nn.Module = module.model
        return inner
    return module.module if isinstance(module, PlainModule) else module


def resized(module: torch.nn.Module, pruned: Pruned) -> torch.nn.Module:
    """A copy of a module that answers like its pruned graph; the module is left as it was.

    The graph's constants have the names of the module's parameters, and may stand transposed. Raises ConversionError where they
    do not, or where layers are gone that are no entries of one list of modules.
    """
    _refuse_twins(module, pruned)
    smaller = copy.deepcopy(module)
    for name, change in pruned.changes.items():
        _set(smaller, name, change)
    for name, change in pruned.changes.items():
        _fit_bias(module, smaller, name, change)
    for lost in pruned.heads:
        _tell_heads(smaller, lost)
    if pruned.heads and len({(lost.before, lost.groups) for lost in pruned.heads}) == 1:
        for config in _configs(smaller):
            _renumber(config, pruned.heads[0])
            if getattr(config, "head_dim", None) is None:
                config.head_dim = pruned.heads[0].before.size
    if pruned.layers:
        _drop(smaller, pruned.layers)
    return smaller


def _refuse_twins(module: torch.nn.Module, pruned: Pruned) -> None:
    """Raise ConversionError where a weight that was cut is another one's copy (a layer that was cloned and never trained): the graph
    may hold both as one, and does not tell which was cut.
    """
    parameters = dict(module.named_parameters())
    for name, weight in parameters.items():
        if name not in pruned.changes or not name.endswith("weight"):  # a bias is cut as its weight is
            continue
        for other, candidate in parameters.items():
            if other not in pruned.changes and candidate.shape == weight.shape and torch.equal(candidate, weight):
                raise ConversionError(
                    f"{name} and {other} of {type(module).__name__} hold the same numbers without being one parameter, so that what "
                    "was cut cannot be told: prune the module when it has been trained."
                )


def _set(module: torch.nn.Module, name: str, change: Change) -> None:
    before, after = change.before, change.after
    try:
        old: object = module.get_parameter(name)
    except AttributeError:
        old = None
    if not isinstance(old, torch.nn.Parameter):
        raise ConversionError(
            f"The pruned graph has other numbers in {name}, which is no parameter of {type(module).__name__}: this model can "
            "be pruned as a graph (an .onnx file), and not be trained afterwards."
        )
    held = old.detach().numpy()
    if held.shape == before.shape and np.array_equal(held, before):
        new = after
    elif held.ndim == 2 and held.T.shape == before.shape and np.array_equal(held.T, before):
        new = after.T
    else:
        raise ConversionError(f"The graph's {name} is not the parameter of that name in {type(module).__name__}.")
    parameter = torch.nn.Parameter(torch.tensor(np.ascontiguousarray(new)))
    for part in module.modules():  # of which several may hold it
        for attribute in [
            key for key, held_there in part.named_parameters(recurse=False, remove_duplicate=False) if held_there is old
        ]:
            setattr(part, attribute, parameter)
            if attribute == "weight" and new.ndim == 2:
                # What the layer says of itself; Conv1D is transformers' name for a linear layer whose weight stands transposed.
                if isinstance(part, torch.nn.Linear):
                    part.out_features, part.in_features = new.shape
                elif type(part).__name__ == "Conv1D":
                    part.nf = new.shape[1]


def _fit_bias(module: torch.nn.Module, smaller: torch.nn.Module, name: str, change: Change) -> None:
    """Cut a bias as its weight was: the graph may hold it under another name, or another one under its own, where layers begin alike."""
    path = name.removesuffix(".weight")
    owner: Any = smaller.get_submodule(path) if path != name else None
    bias = getattr(owner, "bias", None)
    if bias is None or change.before.ndim != 2:
        return
    as_in_graph = np.array_equal(module.get_parameter(name).detach().numpy(), change.before)
    rows = 0 if as_in_graph == isinstance(owner, torch.nn.Linear) else 1  # the graph's axis of what the layer gives
    if rows in change.kept:
        right = module.get_parameter(f"{path}.bias").detach()[torch.from_numpy(change.kept[rows])]
        if not torch.equal(bias, right):
            owner.bias = torch.nn.Parameter(right)
    elif len(bias) != change.after.shape[rows]:
        raise ConversionError(f"The bias beside {name} is not as long as the pruned graph's weight is wide.")


def _drop(module: torch.nn.Module, layers: Sequence[frozenset[str]]) -> None:
    """Take entries out of the one list of modules that holds all lost layers, and tell the others their new numbers."""
    found: set[tuple[str, int]] = set()
    for names in layers:
        owners = {
            (match[1], int(match[2]))
            for name in names
            if (match := re.match(r"(.*?)\.(\d+)\.", name)) and _is_list(module, match[1])
        }
        if len(owners) != 1:
            raise ConversionError(
                f"A layer of the pruned graph is no single entry of a list of modules in {type(module).__name__}: prune "
                "heads or channels instead, or the graph alone (an .onnx file)."
            )
        found |= owners
    path = next(iter(found))[0]
    lost = {index for _, index in found}
    entries: Any = module.get_submodule(path)
    count = len(entries)
    kept = [index for index in range(count) if index not in lost]
    parent = module.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], torch.nn.ModuleList([entries[index] for index in kept]))
    for number, index in enumerate(kept):
        for part in entries[index].modules():
            if getattr(part, "layer_idx", None) == index:
                part.layer_idx = number
    for config in _configs(module):
        _tell_layers(config, count, kept)


def _tell_heads(module: torch.nn.Module, lost: LostHeads) -> None:
    """Change the numbers of heads that the modules around an attention's projections hold."""
    paths = [name.split(".")[:-1] for name in lost.constants]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    for part in module.get_submodule(".".join(shared)).modules():
        _renumber(part, lost)


def _renumber(owner: Any, lost: LostHeads) -> None:
    """Integers of an object that are the old number of heads, or of channels of all heads, become the new ones."""
    before = lost.before
    for name, value in list(vars(owner).items()):
        counts = "head" in name and not any(word in name for word in ("dim", "size", "group"))
        widths = name in _WIDTHS
        of_keys = "key_value" in name or "kv" in name
        old, new = (
            (before.groups, lost.groups) if of_keys else (before.groups * before.queries, lost.groups * before.queries)
        )
        if type(value) is int and counts and value == old:
            setattr(owner, name, new)
        elif type(value) is int and widths and value == old * before.size:
            setattr(owner, name, new * before.size)


def _configs(module: torch.nn.Module) -> list[Any]:
    """The configs that a transformers model and its parts hold, each once."""
    found = [getattr(part, "config", None) for part in module.modules()]
    return list({id(config): config for config in found if config is not None}.values())


def _tell_layers(config: Any, count: int, kept: Sequence[int]) -> None:
    if getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = len(kept)
    for name, value in list(vars(config).items()):
        by_layer = "layer" in name or "window" in name
        if by_layer and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])


def _is_list(module: torch.nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), torch.nn.ModuleList)
    except AttributeError:
        return False
