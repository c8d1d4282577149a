"""Trains a PyTorch model: the one place that runs transformers' Trainer (which runs on accelerate).

What it adds to the Trainer: one frozen set of options; a kill and a resume give the weights of an uninterrupted run, bit
for bit on a CPU, and a resume with other options or data is refused; a loss that is no number stops at its step; nothing is
printed and no file is left outside the given folder. What a batch, a loss or a metric is, its callers say.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from onnxpress.errors import InputError, OutputError, QualityError
from onnxpress.optimizers.processes import together

Batch = dict[str, torch.Tensor]
Item = Mapping[str, Any]
# (model, batch) → the loss, a scalar, and the outputs, which have a "logits" if metrics are computed from them.
ComputeLoss = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
# (logits, labels) of the whole evaluation set → figures. Tokens that pad, or that have no label, are -100 in the labels.
ComputeMetrics = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]

_IDENTITY = "training.json"  # what a folder of checkpoints belongs to
_TOLD = 40  # characters at most of a value that a message repeats
_RECENT = 50  # steps that the reported loss is the mean of
_POOL = 50  # batches at most whose texts are put together by length
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train. Raises InputError for values that cannot be.

    warmup: the share of all steps in which the learning rate rises. max_steps: stop there, and let the schedule end there.
    precision: of the forward pass (autocast); weights and optimizer stay in fp32. patience: evaluations without a better
    metric before training stops; None trains to the end. checkpoints: a folder for what a resume needs; one checkpoint an epoch, and
    one every checkpoint_every steps too. resume: go on from the last checkpoint there. processes: that share each batch, on this
    machine: one a device where there are any, else on the CPU.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_steps: int | None = None
    patience: int | None = None
    checkpoints: Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "processes", "max_steps", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is None and name not in ("epochs", "batch_size", "processes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is a positive whole number, not {value!r}.")
        _check_number("learning_rate", self.learning_rate, above=0.0, below=math.inf)
        _check_number("warmup", self.warmup, least=0.0, below=1.0)
        _check_number("weight_decay", self.weight_decay, least=0.0, below=math.inf)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise InputError(f"seed is a whole number from 0 to 2^32 - 1, not {self.seed!r}.")
        for name, allowed in (("schedule", tuple(_SCHEDULES)), ("precision", ("fp32", "bf16", "fp16"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}.")
        if self.checkpoints is None and (self.resume or self.checkpoint_every is not None):
            raise InputError("resume and checkpoint_every need a folder for the checkpoints; give checkpoints too.")
        if self.batch_size % self.processes:
            raise InputError(
                f"batch_size is {self.batch_size}, which {self.processes} processes cannot share evenly; it is a multiple of processes."
            )

    def check_machine(self) -> None:
        """Raise InputError for what cannot be done here."""
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise InputError(
                "precision fp16 needs a CUDA device, and torch finds none here; bf16 and fp32 train on a CPU."
            )
        devices = torch.accelerator.device_count()
        if devices and self.processes > devices:
            raise InputError(f"processes is {self.processes}, each takes one device, and torch finds {devices} here.")
        if self.processes > 1 and not torch.distributed.is_available():
            raise InputError("processes is above 1, and this build of torch has no torch.distributed; leave it 1.")


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What became of a training.

    loss: mean of the last steps' (50 at most; of a resumed training those since). evaluations: one dict an evaluation, the step among its figures. best_step: the step
    whose weights the model has now; the last one where nothing was evaluated. stopped_early: by patience.
    """

    steps: int
    loss: float
    evaluations: tuple[Mapping[str, float], ...]
    best_step: int
    stopped_early: bool


def train(
    model: torch.nn.Module,
    dataset: Sequence[Item],
    *,
    options: TrainingOptions,
    collate: Callable[[list[Item]], Batch],
    evaluation: Sequence[Item] | None = None,
    compute_loss: ComputeLoss | None = None,
    length: Callable[[Item], int] | None = None,
    metrics: ComputeMetrics | None = None,
    best: str = "loss",
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> TrainingSummary:
    """Train a model in place; with an evaluation set it ends with the weights of its best epoch.

    dataset: examples, dicts whose values are numbers, texts, lists or arrays; collate makes a batch of tensors of some.
    compute_loss: where None, the model computes its own (a batch has labels). length: an example's; batches are then of like ones,
    which need little padding. metrics: figures of the evaluation; `best` names the one that decides, higher is better but for
    "loss". identity: what else decides the weights (a teacher, a temperature), JSON; a
    resume compares it. progress: is told the step and the loss at every step; what it raises ends the training.

    Raises InputError (no data, a checkpoint folder that does not fit), OutputError, and QualityError where a loss is no number.
    """
    _check_data(dataset, evaluation, options, best, metrics)
    with _folder(options.checkpoints) as folder:
        belongs = _identity(model, dataset, evaluation, options, best, identity or {})
        run = _Run(
            model=model,
            dataset=dataset,
            evaluation=evaluation,
            options=options,
            folder=folder,
            checkpoint=_checkpoint_to_resume(folder, options, belongs),
            collate=collate,
            compute_loss=compute_loss,
            lengths=None if length is None else [length(dataset[index]) for index in range(len(dataset))],
            metrics=metrics,
            best=best,
        )
        try:
            if options.processes == 1:
                return run(progress)
            summary, weights = together(run.with_weights, options.processes, progress)
        except QualityError:
            if options.checkpoints is not None and not any(
                _is_whole(path, options) for path in folder.glob("checkpoint-*")
            ):
                with contextlib.suppress(OSError):  # nothing to resume: other options may begin anew there
                    (folder / _IDENTITY).unlink()
                    folder.rmdir()
            raise
    model.load_state_dict(weights)
    model.eval()
    return cast("TrainingSummary", summary)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One training, ready to begin: in this process, or in each of several that share its batches."""

    model: torch.nn.Module
    dataset: Sequence[Item]
    evaluation: Sequence[Item] | None
    options: TrainingOptions
    folder: Path
    checkpoint: Path | None
    collate: Callable[[list[Item]], Batch]
    compute_loss: ComputeLoss | None
    lengths: Sequence[int] | None
    metrics: ComputeMetrics | None
    best: str

    def __call__(self, progress: Callable[[str], None]) -> TrainingSummary:
        """Train the model in place."""
        origin = next(self.model.parameters()).device
        with _kept_random_state():
            trainer = _Trainer(
                model=self.model,
                args=_arguments(self.options, self.folder, evaluates=self.evaluation is not None, best=self.best),
                data_collator=self.collate,
                train_dataset=self.dataset,
                eval_dataset=self.evaluation,
                compute_metrics=None if self.metrics is None else _metrics_of(self.metrics),
                callbacks=[_Observer(self.options, progress)],
            )
            trainer.own_loss, trainer.lengths, trainer.options = self.compute_loss, self.lengths, self.options
            trainer.remove_callback(PrinterCallback)
            if self.options.patience is not None:
                trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=self.options.patience))
            trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        self.model.to(origin).eval()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise QualityError(_not_a_number(trainer.state.global_step, "weights"))
        return _summary(trainer)

    def with_weights(self, progress: Callable[[str], None]) -> tuple[TrainingSummary, Mapping[str, torch.Tensor]]:
        """Train in a process whose model nobody else has."""
        return self(progress), self.model.state_dict()


class _Trainer(Trainer):  # type: ignore[misc]
    """The Trainer with a loss of the caller's, that stops at a loss which is no number and writes no pickled arguments."""

    own_loss: ComputeLoss | None = None
    lengths: Sequence[int] | None = None
    options: TrainingOptions | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: deque[float] = deque(maxlen=_RECENT)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        return _LikeLengths(self.lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch, and the logits."""
        if self.own_loss is not None:
            loss, outputs = self.own_loss(model, inputs)
        else:
            try:
                outputs = model(**inputs)
            except ValueError as error:  # BART's and T5's, for texts with different numbers of end tokens
                raise InputError(f"The model refuses a batch of these texts: {error}") from error
            loss = outputs["loss"]
        return (loss, {"logits": outputs["logits"]}) if return_outputs else loss

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        """Forward and backward; the weights change after it. Raises QualityError."""
        loss: torch.Tensor = super().training_step(*arguments, **more)
        value = float(self.accelerator.reduce(loss, "mean"))  # the same in all processes, which then stop together
        if not math.isfinite(value):
            raise QualityError(_not_a_number(self.state.global_step + 1, "loss"))
        self.losses.append(value)
        return loss

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        """A checkpoint. Raises OutputError."""
        assert self.options is not None
        with _on_disk(Path(self.args.output_dir), self.options):
            super()._save_checkpoint(*arguments, **more)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        super()._save(output_dir, state_dict)
        if shown:
            logging.enable_progress_bar()
        pickled = Path(output_dir or self.args.output_dir) / "training_args.bin"  # which nobody reads
        pickled.unlink(missing_ok=True)


class _LikeLengths(torch.utils.data.Sampler[int]):
    """Batches of texts of like lengths, which need little padding, in random order; seed and epoch alone decide it.

    The Trainer's own sampler of this kind draws from the process's generator, so that a resume within an epoch sees another order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self._epoch}")
        order = draw.sample(range(len(self)), len(self))
        pool = self._batch_size * max(1, min(_POOL, len(order) // (4 * self._batch_size)))  # batches differ each epoch
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=self._lengths.__getitem__)
            batches += [alike[first : first + self._batch_size] for first in range(0, len(alike), self._batch_size)]
        last = batches.pop()  # the one batch that may be short
        draw.shuffle(batches)
        return itertools.chain(*batches, last)


class _Observer(TrainerCallback):  # type: ignore[misc]
    """Says where training is, and asks for checkpoints between the epochs' own."""

    def __init__(self, options: TrainingOptions, progress: Callable[[str], None]) -> None:
        self._options, self._progress = options, progress
        self._started, self._first = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Start the clock."""
        self._started, self._first = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A step is done; its checkpoint comes before what `progress` may raise at the next."""
        step, total = state.global_step, state.max_steps
        left = (time.perf_counter() - self._started) / max(1, step - self._first) * (total - step)
        self._progress(f"step {step} of {total}, about {left:.0f} s left")
        if self._options.checkpoint_every is not None and step % self._options.checkpoint_every == 0:
            control.should_save = True


def _arguments(options: TrainingOptions, folder: Path, *, evaluates: bool, best: str) -> TrainingArguments:
    saves = options.checkpoints is not None or evaluates
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size // options.processes,
        per_device_eval_batch_size=options.batch_size // options.processes,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup,  # below 1 it is a share
        weight_decay=options.weight_decay,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),  # without it the Trainer refuses bf16
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,  # the last, and the best
        load_best_model_at_end=evaluates,
        metric_for_best_model=best if evaluates else None,
        greater_is_better=best != "loss" if evaluates else None,
        restore_callback_states_from_checkpoint=options.resume and options.patience is not None,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of a process; with more the batch would be as many times larger
    return arguments


def _summary(trainer: _Trainer) -> TrainingSummary:
    state = trainer.state
    found = [entry for entry in state.log_history if "eval_loss" in entry]
    evaluations = tuple(
        {name.removeprefix("eval_"): value for name, value in entry.items() if name not in _TIMES} for entry in found
    )
    return TrainingSummary(
        steps=state.global_step,
        loss=float(np.mean(trainer.losses)) if trainer.losses else math.nan,
        evaluations=evaluations,
        best_step=state.best_global_step or state.global_step,
        stopped_early=state.global_step < state.max_steps,
    )


_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def _metrics_of(metrics: ComputeMetrics) -> Callable[[Any], dict[str, float]]:
    return lambda answers: dict(metrics(answers.predictions, answers.label_ids))


@contextlib.contextmanager
def _folder(checkpoints: Path | None) -> Iterator[Path]:
    """The folder for checkpoints; a temporary one for the best weights where none is wanted."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory(prefix="onnxpress-training-") as folder:
            yield Path(folder)
        return
    import fcntl  # of POSIX systems, where models are built

    make_folder(checkpoints)
    place = os.open(checkpoints, os.O_RDONLY)
    try:  # a lock of the system: whoever dies lets go of it
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise OutputError(
            f"Another training is at work in {checkpoints}: let it end, or choose another folder."
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield checkpoints
    finally:
        os.close(place)


def make_folder(checkpoints: Path) -> None:
    """Make a folder for checkpoints where it is missing. Raises OutputError where it cannot be made, or nothing written in it."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=checkpoints):
            pass
    except OSError as error:
        raise OutputError(
            f"The folder for checkpoints {checkpoints} cannot be written: {error.strerror or error}. Choose another one."
        ) from None


def has_begun(checkpoints: Path) -> bool:
    """Whether a folder holds a training that can be resumed."""
    return (checkpoints / _IDENTITY).is_file()


def is_barely_begun(checkpoints: Path) -> bool:
    """Whether a folder holds no more than a training leaves that was killed before it began."""
    return checkpoints.is_dir() and {path.name for path in checkpoints.iterdir()} <= {_IDENTITY + ".part"}


def _checkpoint_to_resume(folder: Path, options: TrainingOptions, belongs: dict[str, Any]) -> Path | None:
    """The last whole checkpoint, None to begin at the start. Raises InputError where folder and options do not fit."""
    written, temporary = folder / _IDENTITY, folder / (_IDENTITY + ".part")
    if not options.resume:
        if any(path.name != temporary.name for path in folder.iterdir()):
            raise OutputError(
                f"{folder} is not empty. Resume the training whose checkpoints it holds (resume), or give another folder."
            )
        with _on_disk(folder, options):
            temporary.write_text(json.dumps(belongs, indent=1))
            temporary.replace(written)
        return None
    try:
        before = json.loads(written.read_text())
    except FileNotFoundError:
        raise InputError(f"There is nothing to resume in {folder}: it has no {_IDENTITY} of a training.") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{written}, which says what training {folder} holds, cannot be read ({error}); begin anew with another folder."
        ) from None
    if not isinstance(before, dict) or set(before) != set(belongs):
        raise InputError(f"{written} was not written by this version; begin anew with another folder.")
    differing = [name for name in belongs if before[name] != belongs[name]]
    if differing:
        what = ", ".join(_difference(name, before[name], belongs[name]) for name in differing)
        raise InputError(
            f"The training in {folder} cannot be resumed with another {what}. Give what it began with, or begin anew with "
            f"another folder."
        )
    whole = [path for path in folder.glob("checkpoint-*") if _is_whole(path, options)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextlib.contextmanager
def _on_disk(folder: Path, options: TrainingOptions) -> Iterator[None]:
    """Says OutputError where a disk is full: torch has a RuntimeError for it, safetensors an error of its own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        said = str(error).partition("\n")[0]
        if options.checkpoints is None:
            then = ", or set TMPDIR to a folder that has more of it"
        elif any(_is_whole(path, options) for path in folder.glob("checkpoint-*")):
            then = ", and resume from the checkpoint before, or choose another folder"
        else:
            then = f"{', and resume, which begins at the start' if has_begun(folder) else ''}, or choose another folder"
        raise OutputError(f"Writing a checkpoint into {folder} failed: {said}. Free space{then}.") from error


def _difference(name: str, before: Any, now: Any) -> str:
    plain = all(
        value is None or isinstance(value, bool | int | float) or len(str(value)) <= _TOLD for value in (before, now)
    )
    return f"{name} ({before}, now {now})" if plain else name


def _is_whole(checkpoint: Path, options: TrainingOptions) -> bool:
    """The Trainer writes its state last, so that a checkpoint with a state that can be read has all files of the first process.

    The others write one each, of their random numbers, which is an archive once it is whole. Weights may have been lost with the power.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    others = (checkpoint / f"rng_state_{rank}.pth" for rank in range(1, options.processes))
    if not all(map(zipfile.is_zipfile, others)):
        return False
    return re.fullmatch(r"checkpoint-\d+", checkpoint.name) is not None


def _identity(
    model: torch.nn.Module,
    dataset: Sequence[Item],
    evaluation: Sequence[Item] | None,
    options: TrainingOptions,
    best: str,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the weights, as JSON: the options, and digests of data and initial weights."""
    chosen = asdict(options)
    for place in ("checkpoints", "checkpoint_every", "resume"):  # where and how often it is saved changes nothing
        del chosen[place]
    if options.checkpoints is None:
        return {}  # nobody resumes it
    return {
        **chosen,
        "best metric": best,
        "training data": _digest(dataset),
        "evaluation data": None if evaluation is None else _digest(evaluation),
        "model to begin with (its weights, or what was pruned of them)": digest_of_weights(model),
        **json.loads(json.dumps(more)),  # as a resume reads it back
    }


def digest_of_weights(model: torch.nn.Module) -> str:
    """SHA-256 over all that a model's state holds."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(dataset: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        for name, value in sorted(dataset[index].items()):
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
            if isinstance(array, np.ndarray):
                digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
            else:
                digest.update(f"{name}{array!r}".encode())
    return digest.hexdigest()


def _check_data(
    dataset: Sequence[Item],
    evaluation: Sequence[Item] | None,
    options: TrainingOptions,
    best: str,
    metrics: ComputeMetrics | None,
) -> None:
    if not len(dataset):
        raise InputError("The training set is empty; at least one example is needed.")
    if evaluation is not None and not len(evaluation):
        raise InputError("The evaluation set is empty; leave it out, or give at least one example.")
    options.check_machine()
    if evaluation is None and options.patience is not None:
        raise InputError("patience needs an evaluation set: it counts evaluations without a better metric.")
    if metrics is None and best != "loss":
        raise InputError(
            f"The best epoch is to be told by {best!r}, and there are no metrics; give metrics, or leave it."
        )


def _check_number(
    name: str, value: object, *, below: float, least: float = -math.inf, above: float = -math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= float(value) < below or not float(value) > above:  # type: ignore[arg-type]
        span = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise InputError(
            f"{name} is a number {span}{f' and below {below:g}' if below < math.inf else ''}, not {value!r}."
        )


def _not_a_number(step: int, what: str) -> str:
    return (
        f"Training stopped: at step {step} the {what} held numbers that are not finite. Try a smaller learning rate, "
        f"precision fp32, and look for examples that are not numbers."
    )


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """The Trainer seeds every generator of the process; they go on afterwards as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
