"""bench, verify, inspect and doctor: how good an artifact, a bundle or this machine is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from onnxpress.commands.options import add_key, add_providers, command
from onnxpress.errors import UsageError
from onnxpress.figures import print_json


def add_bench(commands: Any) -> None:
    """`onnxpress bench`."""
    parser = command(commands, "bench", _bench, "time an artifact")
    parser.add_argument("artifact", type=Path, help="an artifact's folder")
    parser.add_argument("--against", default="", help="also time, by commas: torch, onnx, folders of other artifacts")
    parser.add_argument("--batch", help="batch sizes (default 1,32; language models: 1,4 answers at once)")
    parser.add_argument("--length", help="lengths in tokens (default 32,128; language models: prompts of 128,1024)")
    parser.add_argument("--rounds", default="5", help="rounds of which medians are taken (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    add_providers(parser)


def _bench(options: argparse.Namespace) -> int:
    from onnxpress.bench import bench

    return bench(
        options.artifact,
        against=[item for item in options.against.split(",") if item],
        batches=None if options.batch is None else _numbers(options.batch, "--batch"),
        lengths=None if options.length is None else _numbers(options.length, "--length"),
        rounds=_number(options.rounds, "--rounds"),
        json_file=options.json,
        providers=options.provider,
        allow_fallback=options.allow_fallback,
    )


def add_verify(commands: Any) -> None:
    """`onnxpress verify`."""
    parser = command(
        commands, "verify", _verify, "check hashes and golden outputs, here and now; of a bundle, hashes and signature"
    )
    parser.add_argument("artifact", type=Path, help="an artifact, or a bundle (its file, or its folder)")
    parser.add_argument(
        "--signed-by", type=Path, metavar="FILE", help="of a bundle: the key, or certificates, in PEM form"
    )
    parser.add_argument("--json", action="store_true")
    add_providers(parser)
    add_key(parser)


def _verify(options: argparse.Namespace) -> int:
    from onnxpress.artifact import Artifact
    from onnxpress.inspection import say_fallback
    from onnxpress.on_device import DESCRIPTION
    from onnxpress.runtime.loading import open_session, verify_golden

    if (
        options.artifact.is_file()
        or (options.artifact / DESCRIPTION).is_file()
        or options.artifact.suffix in (".tar", ".zip")
    ):
        return _verify_bundle(options)
    if options.signed_by is not None:
        raise UsageError(
            f"{options.artifact} is no bundle, and bundles alone are signed (onnxpress bundle --sign KEY)."
        )
    artifact = Artifact.open(options.artifact, key=options.key)
    session = open_session(artifact, providers=options.provider, allow_fallback=options.allow_fallback)
    say_fallback(session)
    rows = verify_golden(artifact, session)
    if options.json:
        print_json(
            {
                "artifact": str(options.artifact),
                "files": len(artifact.manifest.files),
                "golden": [vars(row) for row in rows],
            }
        )
    else:
        print(f"{len(artifact.manifest.files)} files have the digests of the manifest.")
        for row in rows:
            print(f"golden {row.case}, {row.output}: difference {row.difference:.3g} (allowed {row.tolerance:.3g})")
    return 0


def _verify_bundle(options: argparse.Namespace) -> int:
    from onnxpress.bundle_archive import unpacked

    if options.key is not None or options.provider or options.allow_fallback:
        raise UsageError(
            "Of a bundle, files and signature are verified; --key, --provider and --allow-fallback are for artifacts."
        )
    with unpacked(options.artifact, options.signed_by) as (_, description, found):
        pass
    if options.json:
        print_json(
            {
                "bundle": str(options.artifact),
                "target": description["target"],
                "files": len(description["files"]),
                "found": found,
            }
        )
    else:
        print(f"{description['name']} for {description['target']}: {'; '.join(found)}. Its answers are checked there.")
    return 0


def add_inspect(commands: Any) -> None:
    """`onnxpress inspect`."""
    parser = command(commands, "inspect", _inspect, "signature, operators, sizes, placement, ledger")
    parser.add_argument("artifact", type=Path, help="an artifact, or an .onnx file (needs the build extra)")
    parser.add_argument("--placement", action="store_true", help="which provider runs each node")
    parser.add_argument("--json", action="store_true")
    add_providers(parser)


def _inspect(options: argparse.Namespace) -> int:
    from onnxpress.inspection import inspect

    return inspect(
        options.artifact,
        placement=options.placement,
        as_json=options.json,
        providers=options.provider,
        allow_fallback=options.allow_fallback,
    )


def add_doctor(commands: Any) -> None:
    """`onnxpress doctor`."""
    parser = command(commands, "doctor", _doctor, "versions, wheels in conflict, providers that really load, cores")
    parser.add_argument("--json", action="store_true")


def _doctor(options: argparse.Namespace) -> int:
    from onnxpress.doctor import examine

    findings = examine()
    if options.json:
        print_json(findings)
    else:
        for line in findings["lines"]:
            print(line)
    return 2 if findings["problems"] else 0


def _numbers(text: str, flag: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{flag} takes positive whole numbers separated by commas, e.g. 1,32, not {text!r}.")
    return numbers


def _number(text: str, flag: str) -> int:
    numbers = _numbers(text, flag)
    if len(numbers) > 1:
        raise UsageError(f"{flag} takes one positive whole number, not {text!r}.")
    return numbers[0]
