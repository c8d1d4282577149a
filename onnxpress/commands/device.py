"""bundle and deploy: from an artifact to a device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from onnxpress.commands.options import command
from onnxpress.devices import DEVICES
from onnxpress.errors import UsageError
from onnxpress.figures import megabytes


def add_bundle(commands: Any) -> None:
    """`onnxpress bundle`."""
    parser = command(commands, "bundle", _bundle, "one file for a device, that runs and checks itself there")
    parser.add_argument("artifact", type=Path, help="an artifact's folder")
    parser.add_argument("--target", required=True, help=f"the device: {', '.join(DEVICES)}")
    parser.add_argument("--out", type=Path, help="the file (default: NAME-DEVICE.tar or .zip beside the artifact)")
    parser.add_argument("--latency-ms", type=float, help="the self-test fails where a golden input takes longer")
    parser.add_argument("--memory-mb", type=float, help="the self-test fails where the process takes more")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="PEM file of a private key (P-256, P-384 or P-521)")
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="PEM: the key's, then those between it and a root"
    )
    parser.add_argument("--encrypt", metavar="SOURCE", help="of the key: file:PATH, env:NAME or command:LINE")
    parser.add_argument("--delta", type=Path, metavar="OLD", help="write only what this older bundle does not have")


def _bundle(options: argparse.Namespace) -> int:
    from onnxpress.bundle import bundle

    place = bundle(
        options.artifact,
        target=options.target,
        out=options.out,
        latency_ms=options.latency_ms,
        memory_mb=options.memory_mb,
        sign=options.sign,
        certificate=options.certificate,
        encrypt_with=options.encrypt,
        delta=options.delta,
    )
    then = "unpack it, and python run.py --self-test" if DEVICES[options.target].python else "unpack it"
    then = "unpack it, and serve its folder: python -m http.server" if options.target == "browser" else then
    then = f"python PLACE/current/update.py PLACE {place.name}" if options.delta is not None else then
    print(f"{place}, {megabytes(place.stat().st_size)} MB. There: {then}")
    return 0


def add_deploy(commands: Any) -> None:
    """`onnxpress deploy`."""
    parser = command(
        commands, "deploy", _deploy, "bring a bundle to a device over ssh, test it there, and switch to it"
    )
    parser.add_argument("bundle", type=Path, help="the file that `bundle` wrote")
    parser.add_argument("host", metavar="USER@DEVICE", help="as ssh takes it")
    parser.add_argument("--place", help="folder there (default: onnxpress/NAME-DEVICE in the home folder)")
    parser.add_argument("--python", default="python3", help="the device's Python (default python3)")
    parser.add_argument("--signed-by", type=Path, metavar="FILE", help="send nothing that was not signed by this key")
    parser.add_argument("--key", metavar="SOURCE", help="where the device has the key of an encrypted model")
    parser.add_argument("--ssh", default="ssh", metavar="COMMAND", help='e.g. "ssh -p 2222 -i key" (default ssh)')


def _deploy(options: argparse.Namespace) -> int:
    import shlex

    from onnxpress.deploy import deploy

    try:
        ssh = shlex.split(options.ssh)
    except ValueError as error:
        raise UsageError(f"--ssh {options.ssh!r} is not a command: {error}.") from None
    size = deploy(
        options.bundle,
        options.host,
        place=options.place,
        python=options.python,
        signed_by=options.signed_by,
        key=options.key,
        ssh=ssh,
    )
    print(f"{options.host} runs it now; {megabytes(size)} MB were sent.")
    return 0
