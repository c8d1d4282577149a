"""How far a student's answers are from its teacher's, in float32: one loss for each kind of answer, and one for hidden states.

Each is 0 where the student answers like its teacher, is a mean over what is real, and takes nothing from padding. Divergences are
Kullback-Leibler's, KL(teacher || student) in nats, of distributions at a temperature and times its square, which keeps gradients
of one size at all temperatures (arXiv 1503.02531). Sizes below: B texts, L tokens, C classes or the vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import kl_div, layer_norm, log_softmax, logsigmoid
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor
Answers = Mapping[str, Tensor]
# (student's answers, teacher's answers, real tokens: bool (B, L), temperature) -> a scalar
Divergence = Callable[[Answers, Answers, Tensor, float], Tensor]

_NUMBERS_AT_ONCE = 2**24  # logits whose distributions are held at a time: 64 MiB for each of a few copies


def of_classes(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """One distribution a text: logits (B, C)."""
    return _kl(student["logits"], teacher["logits"], temperature).mean()


def of_labels(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """Several labels a text, each its own yes or no: logits (B, C); the mean over texts and labels."""
    ours, theirs = student["logits"].float() / temperature, teacher["logits"].float() / temperature
    yes = theirs.sigmoid()
    divergence = yes * (logsigmoid(theirs) - logsigmoid(ours)) + (1 - yes) * (logsigmoid(-theirs) - logsigmoid(-ours))
    return divergence.mean() * temperature**2


def of_numbers(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """A regression's numbers, logits (B, C): the mean square of the difference."""
    return (student["logits"].float() - teacher["logits"].float()).square().mean()


def of_tokens(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """One distribution a token: logits (B, L, C); the mean over real tokens.

    Beside the logits and their gradient, memory holds the distributions of a few tokens at a time, forward and backward.
    """
    ours, theirs = student["logits"].flatten(0, 1), teacher["logits"].flatten(0, 1)  # (B·L, C)
    rows = max(1, _NUMBERS_AT_ONCE // ours.shape[-1])
    total = ours.new_zeros((), dtype=torch.float32)
    for parts in zip(*(torch.split(tensor, rows) for tensor in (ours, theirs, real.flatten())), strict=True):
        total = total + checkpoint(_sum_of_real, *parts, temperature, use_reentrant=False, preserve_rng_state=False)
    return total / _share(real)


def of_spans(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """Where an answer starts and ends, each one distribution over a text's real tokens: logits (B, L); the mean of both."""
    both = [_kl(student[name], teacher[name], temperature, real).mean() for name in ("start_logits", "end_logits")]
    return torch.stack(both).mean()


def of_embeddings(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """One vector a text: embeddings (B, H). The mean square of the difference, relative to the teacher's length.

    For vectors of length 1 it is 2 - 2 cosine.
    """
    return _relative(student["embeddings"], teacher["embeddings"]).mean()


def of_states(student: Answers, teacher: Answers, real: Tensor, temperature: float) -> Tensor:
    """One vector a token, last_hidden_state (B, L, H): as for embeddings, over real tokens."""
    return _relative(student["last_hidden_state"][real], teacher["last_hidden_state"][real]).sum() / _share(real)


def of_hidden(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """Hidden states (B, L, H) of one layer, each normalized to mean 0 and variance 1: the mean square of the difference.

    Normalized, since layers differ in size by orders of magnitude, and the next layer normalizes too.
    """
    ours, theirs = (layer_norm(states[real].float(), states.shape[-1:]) for states in (student, teacher))
    return (ours - theirs).square().mean(-1).sum() / _share(real)


def _share(real: Tensor) -> Tensor:
    """The number of real tokens; where processes share a batch, their mean, so that the mean of their losses is the batch's."""
    count = real.sum().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count


def _sum_of_real(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """The sum of the divergences of real rows, (rows, C) and (rows,). Padding may hold anything, NaN too."""
    padding = ~real[:, None]
    return _kl(student.masked_fill(padding, 0), teacher.masked_fill(padding, 0), temperature).sum()


def _kl(student: Tensor, teacher: Tensor, temperature: float, allowed: Tensor | None = None) -> Tensor:
    """KL(teacher || student) along the last axis, over its allowed places: (…, C) -> (…)."""

    def logarithms(logits: Tensor) -> Tensor:
        scaled = logits.float() / temperature
        if allowed is not None:
            scaled = scaled.masked_fill(~allowed, torch.finfo(torch.float32).min)
        return log_softmax(scaled, dim=-1)

    divergence = kl_div(logarithms(student), logarithms(teacher), reduction="none", log_target=True)
    return divergence.sum(-1) * temperature**2


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|² / |teacher|² along the last axis."""
    ours, theirs = student.float(), teacher.float()
    return (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
