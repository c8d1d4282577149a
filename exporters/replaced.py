"""Lets functions stand for modules' own forward, and for the functions that they call, for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


@contextmanager
def replaced_forwards(replacements: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let `replacement(module, original, …)` stand for the forward of each module while this lasts."""
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, replacement in replacements.items():
            module.__dict__["forward"] = bound(replacement, module, module.forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def bound(replacement: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """A function with its first arguments given."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*first, *args, **kwargs)

    return call


@contextmanager
def replaced_functions(
    model: torch.nn.Module, choose: Callable[[str, Any], Callable[..., Any] | None]
) -> Iterator[None]:
    """Let what `choose(name, function)` gives stand for functions of the source files of a model's modules while this lasts.

    choose: None leaves what is there.
    """
    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for source in {sys.modules[type(part).__module__] for part in model.modules()}:
            for name, function in list(vars(source).items()):
                if (replacement := choose(name, function)) is not None:
                    replaced.append((source, name, function))
                    setattr(source, name, replacement)
        yield
    finally:
        for source, name, function in replaced:
            setattr(source, name, function)
