"""Several processes on this machine that do one task together, as torch's launcher starts them: a training that shares each batch.

    python -m onnxpress.optimizers.processes FOLDER      is each of them; nobody else calls it

The task reaches them as a file. What the first one prints is progress, what it returns is the result. Where one ends early, the launcher
ends the others; where the caller ends, the launcher is told, or the first process meets a pipe without a reader. What the processes
say to each other is the task's.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import output_capturing

from onnxpress.errors import InputError, OnnxpressError

Progress = Callable[[str], None]

# Where launchers say how many processes there are, as accelerate reads it.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_TASK, _RESULT, _ERROR = "task", "result", "error"


def check_alone() -> None:
    """Raise InputError in a process that a launcher started several times, each of which would do, and write, the same."""
    count = next((os.environ[name] for name in _COUNTS if name in os.environ), "1")
    if count.isdecimal() and int(count) > 1:
        raise InputError(
            f"This was started in {count} processes by a launcher (torchrun, accelerate launch, mpirun). Start it once, without: training "
            "alone is shared, by processes that it starts itself (build: --pass-option distil.processes=2, fit: --processes 2)."
        )


def together(task: Callable[[Progress], Any], processes: int, progress: Progress) -> Any:
    """Call a task in so many processes, each of which has torch.distributed's variables; what the first one returns.

    task: it and all that it holds are pickled, so that its functions are a module's. progress: is told what the first process
    says; what it raises ends them all. Raises InputError for a task that cannot be pickled, and what any of the processes raises.
    """
    check_alone()
    with tempfile.TemporaryDirectory(prefix="onnxpress-processes-") as name:
        folder = Path(name)
        try:
            with (folder / _TASK).open("wb") as file:
                _Pickler(file).dump(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"This cannot be handed to other processes: {error}. Use functions and classes of a module, or processes=1."
            ) from None
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with (
            (folder / "said").open("w+") as said,
            subprocess.Popen(
                [*command, "-m", "onnxpress.optimizers.processes", str(folder)],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
                },
            ) as launcher,
        ):
            assert launcher.stdout is not None
            try:
                for line in launcher.stdout:
                    progress(line.rstrip("\n"))
            except BaseException:
                launcher.terminate()  # it ends the others
                raise
        if (folder / _ERROR).is_file():
            raised = pickle.loads((folder / _ERROR).read_bytes())
            assert isinstance(raised, OnnxpressError)
            raise raised
        if launcher.returncode:
            raise OnnxpressError(_ended_early(processes, (folder / "said").read_text(errors="replace")))
        return torch.load(folder / _RESULT, weights_only=False)


class _Pickler(pickle.Pickler):
    """For transformers' models that have answered: they hold hooks that collect hidden states, closures, which are added again when missed."""

    def reducer_override(self, value: Any) -> Any:
        """How a module is pickled; NotImplemented for anything else."""
        if not isinstance(value, torch.nn.Module):
            return NotImplemented
        state = {name: part for name, part in vars(value).items() if name != "_output_capturing_hooks_installed"}
        hooks = value._forward_hooks.items()
        state["_forward_hooks"] = OrderedDict(
            (key, hook) for key, hook in hooks if getattr(hook, "__module__", "") != output_capturing.__name__
        )
        return _unfilled, (type(value), dict.get(output_capturing._CAN_RECORD_REGISTRY, str(type(value)))), state


def _unfilled(kind: type[torch.nn.Module], records: Any) -> torch.nn.Module:
    """A module before its state. records: what it can collect, which transformers notes when one of its class is made."""
    if records is not None:
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(kind), records)
    return kind.__new__(kind)


def _ended_early(processes: int, said: str) -> str:
    """What to say of a process that ended without an error of ours."""
    lines = [line.strip() for line in said.splitlines()]
    errors = [line.partition("]:")[2].strip() for line in lines if line.startswith("[rank") and "Error" in line]
    signals = [line.removeprefix("traceback : ") for line in lines if line.startswith("traceback : Signal")]
    killed = [line for line in signals if "SIGTERM" not in line]  # with which the launcher ends the others
    if killed:
        why = f"{killed[-1]}. It may have had too little memory: take fewer processes, or a smaller batch"
    else:
        why = (errors or signals or ["no reason was given"])[-1].rstrip(".")
    return f"One of the {processes} processes ended early, and the others with it: {why}."


def _work(folder: Path) -> None:
    """Be one of the processes."""
    first = os.environ["RANK"] == "0"
    with (folder / _TASK).open("rb") as file:
        task = pickle.load(file)
    try:
        result = task(partial(print, flush=True) if first else lambda _: None)
    except OnnxpressError as error:
        part = folder / f"{_ERROR}.{os.getpid()}"
        part.write_bytes(pickle.dumps(error))
        part.replace(folder / _ERROR)
        sys.exit(error.exit_code)
    if first:
        torch.save(result, folder / _RESULT)
    with suppress(AssertionError, ValueError):  # there is no group where the task made none
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
