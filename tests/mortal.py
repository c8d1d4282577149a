"""A model and a batch that several processes can be given, one of which is killed on its way."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch


class Line(torch.nn.Module):
    """y = weight · x + bias, and the loss to labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x[:, None])[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


def collate(items: list[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([float(item[name]) for item in items]) for name in ("x", "labels")}


def size(item: Any) -> int:
    return int(item["x"])


def killed_in_the_second_process(items: list[Any]) -> dict[str, torch.Tensor]:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return collate(items)
