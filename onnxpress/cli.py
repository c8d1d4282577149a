"""The command line: build, fit, run, generate, chat, bench, verify, bundle, deploy, inspect, doctor. Each command is in `commands`.

run, generate, chat, bench, verify, inspect and doctor work where only the runtime is installed.
Exit codes: 0 done, 1 the artifact is not good enough, 2 wrong use or input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from onnxpress import __version__
from onnxpress.artifact import DISK_TROUBLE
from onnxpress.commands import answer, build, device, examine
from onnxpress.errors import MissingExtraError, OnnxpressError, UsageError
from onnxpress.stopping import end_if_told, end_on_signals

_BUILD_PACKAGES = frozenset((
    "torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript", "pydantic", "rich", "matplotlib", "accelerate", "safetensors",
    "scipy", "sklearn", "ml_dtypes",
))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors are one paragraph on stderr, a traceback only with --debug."""
    parser, options = _parser(), argparse.Namespace(debug=False)
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # it was closed
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115  it is written to until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # what cannot show a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    warnings.showwarning = _print_warning
    if threading.current_thread() is threading.main_thread():
        end_on_signals()
    try:
        options, unknown = parser.parse_known_args(_joined(sys.argv[1:] if arguments is None else arguments))
        named = vars(options).pop("prog")
        if unknown:
            raise UsageError(f"Unrecognized arguments: {' '.join(unknown)}; `{named} --help` says what there is.")
        if options.command is None:
            parser.print_help()
            return 2
        code = int(options.command(options))
        sys.stdout.flush()  # here, so that a pipe without a reader is met here and not at the interpreter's exit
        return code
    except OnnxpressError as error:
        code, message = error.exit_code, str(error)
        if options.debug:
            traceback.print_exc()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _BUILD_PACKAGES:
            raise
        missing = MissingExtraError(
            f"This command needs the package {package}, which is not installed: pip install 'onnxpress[build,cpu]'."
        )
        code, message = missing.exit_code, str(missing)
    except BrokenPipeError:  # the reader of our output went away, e.g. `onnxpress inspect … | head`
        _print_no_more()
        return 0
    except OSError as error:
        if error.filename is not None:
            code, message = 2, f"{os.fspath(error.filename)!r} cannot be read or written: {error.strerror}."
        elif isinstance(error, FileNotFoundError) and not _working_directory():
            code, message = 2, "The working directory was removed: change to one that is there."
        elif error.errno in DISK_TROUBLE:  # of our output
            _print_no_more()
            code, message = 2, f"Nothing more can be written: {error.strerror}."
        else:
            raise
        if options.debug:
            traceback.print_exc()
    except MemoryError:
        code, message = 2, "There is not enough memory for this."
    except Exception:
        end_if_told()
        raise
    except KeyboardInterrupt:
        code, message = 130, "Interrupted."
    end_if_told()  # while a library is loaded it makes an error of its own of what ends the process
    _print_warning(message)
    return code


def _working_directory() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _print_no_more() -> None:
    """What stdout still holds goes nowhere, so that nothing fails at the interpreter's exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Its errors are one sentence, as all others are."""

    def error(self, message: str) -> NoReturn:
        dash = "" if not message.endswith("expected one argument") else ", and one that begins with - is written with ="
        raise UsageError(f"{message[0].upper()}{message[1:]}{dash}; `{self.prog} --help` says what there is.")


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--budget -3%` as `--budget=-3%`: argparse would take the value for an option, and none of ours begins with a digit."""
    joined: list[str] = []
    for argument in arguments:
        if joined and re.match(r"-[\d.]", argument) and re.fullmatch(r"--[a-z][a-z-]*", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="onnxpress",
        description="Export PyTorch models to ONNX, press them, prove that they still answer alike, and run them.",
    )
    parser.set_defaults(command=None, debug=False, prog=parser.prog)
    parser.add_argument("--version", action="version", version=f"onnxpress {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    build.add_build(commands)
    build.add_fit(commands)
    answer.add_run(commands)
    answer.add_generate(commands)
    answer.add_chat(commands)
    examine.add_bench(commands)
    examine.add_verify(commands)
    device.add_bundle(commands)
    device.add_deploy(commands)
    examine.add_inspect(commands)
    examine.add_doctor(commands)
    return parser


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"onnxpress: {message}", file=sys.stderr)
