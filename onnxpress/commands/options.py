"""What the options of several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    """The parser of a new command; function: takes its options and returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=function, prog=parser.prog)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def add_providers(parser: argparse.ArgumentParser) -> None:
    """Where an artifact opens."""
    parser.add_argument(
        "--provider",
        action="append",
        help="cpu, openvino, cuda, tensorrt, tensorrt-rtx (default: what the artifact was built for); repeatable, in order",
    )
    parser.add_argument("--allow-fallback", action="store_true", help="take what loads, and say what it was")


def add_key(parser: argparse.ArgumentParser) -> None:
    """Where the key of an encrypted artifact is."""
    parser.add_argument("--key", metavar="SOURCE", help="of an encrypted artifact: file:PATH, env:NAME or command:LINE")


def others(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """All of a command's own options but these."""
    return {name: value for name, value in vars(options).items() if name not in ("command", "debug", *names)}
