"""The command line: build, fit, run, generate, chat, bench, verify, bundle, deploy, inspect, doctor. Each command is one function.

run, verify, bench and doctor work where only the runtime is installed, so nothing heavy is imported at the top.
Exit codes: 0 done, 1 the artifact is not good enough, 2 wrong use or input.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from onnxpress.devices import DEVICES
from onnxpress.errors import InputError, MissingExtraError, OnnxpressError, UsageError

if TYPE_CHECKING:
    from onnxpress.manifest import Json

_BUILD_PACKAGES = {
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "pydantic",
    "rich",
    "matplotlib",
    "accelerate",
}
_BUILD_PACKAGES |= {"safetensors", "scipy", "sklearn", "ml_dtypes"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors are one paragraph on stderr, a traceback only with --debug."""
    parser, options = _parser(), argparse.Namespace(debug=False)
    warnings.showwarning = _print_warning
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        options = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    print(f"onnxpress: {message}", file=sys.stderr)
    return code


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
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(metavar="COMMAND")

    build = _command(commands, "build", _build, "export a model, press it under a quality gate, write an artifact")
    build.add_argument("source", help="recipe.toml, model folder, hub id, package.module:factory, or FILE.onnx")
    build.add_argument("--task", help="e.g. feature-extraction, text-classification; found out where possible")
    build.add_argument(
        "--target", help="cpu, cpu-avx2 (x86 without VNNI), cpu-arm64, cuda, tensorrt (default: this machine's CPU)"
    )
    build.add_argument(
        "--precision",
        help="fp32, int8, int8-dynamic, int8-qdq, fp8-qdq, int8-weights, int4-weights, dual (4 bits, and int8 for prompts), fp16, "
        "fp16-sparse, bf16",
    )
    build.add_argument("--out", type=Path, help="folder of the artifact (default: artifacts/NAME)")
    build.add_argument("--cache", choices=("fp32", "int8"), help="of a language model's keys and values (default fp32)")
    build.add_argument("--name", help="name of the artifact")
    build.add_argument(
        "--budget",
        help='what quality it may cost: "0.5%%" (relative) or "0.99" (absolute); without --precision, the best plan that keeps it '
        "is searched",
    )
    build.add_argument("--prefer", choices=("speed", "size"), help="what that search looks for (default speed)")
    build.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="where a build keeps what it measured of passes that cost quality, so that an interrupted one goes on",
    )
    build.add_argument(
        "--eval",
        dest="file",
        help="your samples: csv, tsv or jsonl, with or without labels, or CoNLL columns; or a .txt without labels, a text a line (of a "
        "language model one text), on which answers are compared with the original's; of a module, .npz",
    )
    build.add_argument(
        "--calibration",
        help="other samples, for passes that calibrate, the same kinds of files, labels unread; or .npy, token ids; of a module, .npz",
    )
    build.add_argument("--column", action="append", default=[], metavar="ROLE=NAME", help="a column of these tables")
    build.add_argument(
        "--pass-option", action="append", default=[], metavar="PASS.NAME=VALUE", help="e.g. int4-weights.method=gptq"
    )
    build.add_argument(
        "--prune",
        metavar="PARTS",
        help="e.g. ffn=0.5,heads=0.33,layers=2: shares below 1 or whole numbers that go, then all that follows",
    )
    build.add_argument(
        "--distil",
        metavar="FILE",
        help="what was pruned learns from the original on these texts; more with --pass-option distil.epochs=5",
    )
    build.add_argument("--only", action="append", metavar="PASS", help="run this pass and no other (repeatable)")
    build.add_argument("--keep-all", action="store_true", default=None, help="keep passes in spite of budget and times")
    build.add_argument("--max-length", type=int, help="longest input in tokens; of a language model, the context")
    build.add_argument("--adapter", help="folder of a LoRA adapter to merge into a language model")
    build.add_argument("--hidden-states", action="store_true", default=None, help="a language model answers these too")
    build.add_argument("--revision", help="revision on the hub")
    build.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the model brings")
    build.add_argument("--no-measure", dest="measure", action="store_false", default=None, help="do not time anything")
    build.add_argument("--json", action="store_true", help="print the manifest and the measurements as JSON")

    fit = _command(commands, "fit", _fit, "train a checkpoint on your labels, and build the artifact")
    fit.add_argument("source", help="model folder or hub id")
    fit.add_argument(
        "--train", type=Path, required=True, metavar="FILE", help="csv, tsv, jsonl, CoNLL, or lines of label and text"
    )
    fit.add_argument(
        "--eval", type=Path, dest="evaluation", metavar="FILE", help="the same (default: a tenth of --train)"
    )
    fit.add_argument("--out", type=Path, required=True, help="folder of the artifact")
    fit.add_argument("--checkpoint", type=Path, help="folder of the trained model (default: OUT-checkpoint)")
    fit.add_argument(
        "--task",
        help="text-classification, multi-label-classification, regression, token-classification (default: told from the labels)",
    )
    fit.add_argument("--column", action="append", default=[], metavar="ROLE=NAME", help="e.g. text=sentence, label=2")
    fit.add_argument(
        "--frozen-encoder", action="store_true", help="fit a linear head alone: seconds in the place of minutes"
    )
    fit.add_argument("--balanced", action="store_true", help="rare labels count as much as frequent ones")
    fit.add_argument("--epochs", type=int, help="passes over the samples (default 3)")
    fit.add_argument("--batch-size", type=int, help="samples a step (default 32)")
    fit.add_argument("--learning-rate", type=float, help="its peak (default 5e-5)")
    fit.add_argument("--warmup", type=float, help="share of the steps in which it rises (default 0.1)")
    fit.add_argument("--schedule", choices=("linear", "cosine", "constant"), help="how it falls (default linear)")
    fit.add_argument("--weight-decay", type=float, help="default 0.01")
    fit.add_argument("--max-steps", type=int, help="stop there, whatever the epochs")
    fit.add_argument("--patience", type=int, help="stop after so many epochs without a better metric")
    fit.add_argument("--seed", type=int, help="of the head, the order and the split (default 0)")
    fit.add_argument("--autocast", choices=("fp32", "bf16", "fp16"), help="precision of training")
    fit.add_argument("--processes", type=int, help="that share each batch: one a device, or on the CPU (default 1)")
    fit.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="keep what --resume needs this often too")
    fit.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    fit.add_argument("--max-length", type=int, help="longest text in tokens")
    fit.add_argument("--revision", help="revision on the hub")
    fit.add_argument("--target", help="as for build")
    fit.add_argument("--precision", help="of the artifact, as for build")
    fit.add_argument("--budget", help='what quality pressing may cost, as for build, e.g. "0.5%%"')
    fit.add_argument("--no-measure", dest="measure", action="store_false", default=None, help="do not time anything")
    fit.add_argument("--json", action="store_true", help="print training, manifest and measurements as JSON")

    run = _command(commands, "run", _run, "answer with an artifact")
    run.add_argument("artifact", type=Path)
    run.add_argument("--text", action="append", default=[], help="a text (repeatable)")
    run.add_argument("--pair", action="append", default=[], help="the second text of each --text; a question's context")
    run.add_argument("--file", type=Path, help="a file with one text a line; - for standard input")
    run.add_argument("--top-k", type=int, help="how many answers (question-answering, fill-mask)")
    run.add_argument("--json", action="store_true", help="one JSON document")
    _providers(run)
    _key(run)

    generate = _command(commands, "generate", _generate, "continue prompts with a language model")
    generate.add_argument("artifact", type=Path)
    generate.add_argument("--prompt", action="append", default=[], help="a prompt (repeatable; they run together)")
    generate.add_argument("--file", type=Path, help="a file that is one prompt; - for standard input")
    generate.add_argument("--n", type=int, default=1, help="answers to each prompt")
    generate.add_argument(
        "--logprobs", type=int, help="with --json: log-probabilities, and of so many likeliest tokens"
    )
    generate.add_argument("--json", action="store_true", help="one JSON document: text, token_ids, finish_reason, …")
    _sampling(generate)

    chat = _command(commands, "chat", _chat, "talk with a language model")
    chat.add_argument("artifact", type=Path)
    chat.add_argument("--system", help="the system message")
    _sampling(chat)

    bench = _command(commands, "bench", _bench, "time an artifact")
    bench.add_argument("artifact", type=Path)
    bench.add_argument("--against", default="", help="also time, by commas: torch, onnx, folders of other artifacts")
    bench.add_argument("--batch", help="batch sizes (default 1,32; language models: 1,4 answers at once)")
    bench.add_argument("--length", help="lengths in tokens (default 32,128; language models: prompts of 128,1024)")
    bench.add_argument("--rounds", default="5", help="rounds of which medians are taken (default 5)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    _providers(bench)

    verify = _command(
        commands, "verify", _verify, "check hashes and golden outputs, here and now; of a bundle, hashes and signature"
    )
    verify.add_argument("artifact", type=Path, help="an artifact, or a bundle (its file, or its folder)")
    verify.add_argument(
        "--signed-by", type=Path, metavar="FILE", help="of a bundle: the key, or certificates, in PEM form"
    )
    verify.add_argument("--json", action="store_true")
    _providers(verify)
    _key(verify)

    bundle = _command(commands, "bundle", _bundle, "one file for a device, that runs and checks itself there")
    bundle.add_argument("artifact", type=Path)
    bundle.add_argument("--target", required=True, help=f"the device: {', '.join(DEVICES)}")
    bundle.add_argument("--out", type=Path, help="the file (default: NAME-DEVICE.tar or .zip beside the artifact)")
    bundle.add_argument("--latency-ms", type=float, help="the self-test fails where a golden input takes longer")
    bundle.add_argument("--memory-mb", type=float, help="the self-test fails where the process takes more")
    bundle.add_argument("--sign", type=Path, metavar="KEY", help="PEM file of a private key (P-256, P-384 or P-521)")
    bundle.add_argument(
        "--certificate", type=Path, metavar="FILE", help="PEM: the key's, then those between it and a root"
    )
    bundle.add_argument("--encrypt", metavar="SOURCE", help="of the key: file:PATH, env:NAME or command:LINE")
    bundle.add_argument("--delta", type=Path, metavar="OLD", help="write only what this older bundle does not have")

    deploy = _command(
        commands, "deploy", _deploy, "bring a bundle to a device over ssh, test it there, and switch to it"
    )
    deploy.add_argument("bundle", type=Path)
    deploy.add_argument("host", metavar="USER@DEVICE")
    deploy.add_argument("--place", help="folder there (default: onnxpress/NAME-DEVICE in the home folder)")
    deploy.add_argument("--python", default="python3", help="the device's Python (default python3)")
    deploy.add_argument("--signed-by", type=Path, metavar="FILE", help="send nothing that was not signed by this key")
    deploy.add_argument("--key", metavar="SOURCE", help="where the device has the key of an encrypted model")
    deploy.add_argument("--ssh", default="ssh", metavar="COMMAND", help='e.g. "ssh -p 2222 -i key" (default ssh)')

    inspect = _command(commands, "inspect", _inspect, "signature, operators, sizes, placement, ledger")
    inspect.add_argument("artifact", type=Path, help="an artifact, or an .onnx file (needs the build extra)")
    inspect.add_argument("--placement", action="store_true", help="which provider runs each node")
    inspect.add_argument("--json", action="store_true")
    _providers(inspect)

    doctor = _command(commands, "doctor", _doctor, "versions, wheels in conflict, providers that really load, cores")
    doctor.add_argument("--json", action="store_true")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=function)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def _providers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provider",
        action="append",
        help="cpu, cuda, tensorrt, tensorrt-rtx (default: what the artifact was built for); repeatable, in order",
    )
    parser.add_argument("--allow-fallback", action="store_true", help="take what loads, and say what it was")


def _key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", metavar="SOURCE", help="of an encrypted artifact: file:PATH, env:NAME or command:LINE")


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, help="tokens of an answer at most (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="no token below this share of the likeliest one's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--presence-penalty", type=float, default=0.0)
    parser.add_argument("--frequency-penalty", type=float, default=0.0)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the answer (repeatable)")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end token")
    parser.add_argument(
        "--prompt-lookup", type=int, default=0, help="guess so many tokens at a time from the text so far (default 0)"
    )
    parser.add_argument("--cache-mb", type=int, default=2048, help="most memory for keys and values (default 2048)")
    _providers(parser)
    _key(parser)


_SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_lookup"),
)


def _build(options: argparse.Namespace) -> int:
    from onnxpress import terminal
    from onnxpress.pipeline import build

    keys = (
        *(
            "task",
            "target",
            "precision",
            "prefer",
            "resume",
            "cache",
            "name",
            "budget",
            "file",
            "calibration",
            "only",
            "keep_all",
            "max_length",
        ),
        *("adapter", "hidden_states", "revision", "trust_remote_code", "measure"),
    )
    chosen = {key: getattr(options, key) for key in keys}
    if options.pass_option:
        passes = _pass_options(options.pass_option)
        for section in ("prune", "distil"):
            if section in passes:
                chosen[section] = passes.pop(section)
        chosen["passes"] = passes
    if options.prune is not None:
        chosen["prune"] = _once([*chosen.get("prune", {}).items(), *_prune(options.prune)], "--prune")
    if options.distil is not None:
        chosen["distil"] = _once([*chosen.get("distil", {}).items(), ("file", options.distil)], "--distil")
    if options.column:
        chosen["columns"] = _columns(options.column)
    artifact = build(options.source, out=options.out, quiet=options.json, **chosen)
    if options.json:
        _print_json(
            {
                "path": str(artifact.path),
                "manifest": json.loads(artifact.manifest.to_json()),
                "measured": artifact.measured,
            }
        )
    else:
        terminal.print_build(artifact)
    return 0


def _fit(options: argparse.Namespace) -> int:
    from onnxpress import terminal
    from onnxpress.fit import fit

    keys = (
        *(
            "epochs",
            "batch_size",
            "learning_rate",
            "warmup",
            "schedule",
            "weight_decay",
            "max_steps",
            "patience",
            "seed",
        ),
        *(
            "autocast",
            "processes",
            "checkpoint_every",
            "resume",
            "max_length",
            "revision",
            "target",
            "precision",
            "budget",
            "measure",
        ),
    )
    fitted = fit(
        options.source,
        options.train,
        out=options.out,
        evaluation=options.evaluation,
        checkpoint=options.checkpoint,
        task=options.task,
        columns=_columns(options.column),
        frozen_encoder=options.frozen_encoder,
        balanced=options.balanced,
        quiet=options.json,
        **{key: getattr(options, key) for key in keys},
    )
    if options.json:
        _print_json(
            {
                "path": str(fitted.artifact.path),
                "checkpoint": str(fitted.checkpoint),
                "training": fitted.facts,
                "manifest": json.loads(fitted.artifact.manifest.to_json()),
                "measured": fitted.artifact.measured,
            }
        )
    else:
        terminal.print_build(fitted.artifact)
        for note in fitted.facts["notes"]:
            print(note)
        print(f"the trained model: {fitted.checkpoint}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from onnxpress.inspection import say_fallback
    from onnxpress.runtime import Generator, ModuleRunner, load

    runner = load(options.artifact, providers=options.provider, allow_fallback=options.allow_fallback, key=options.key)
    say_fallback(runner.session)
    if isinstance(runner, Generator):
        raise UsageError("This artifact is a language model: use `onnxpress generate` or `onnxpress chat`.")
    if isinstance(runner, ModuleRunner):
        raise UsageError(
            "This artifact takes named arrays, not text: use Python, onnxpress.load(path).run({name: array})."
        )
    texts = list(options.text)
    if options.file is not None:
        texts += _lines(options.file)
    if not texts:
        raise InputError('No text was given: use --text "…", or --file FILE with one text a line.')
    samples: list[Any] = texts
    if options.pair:
        if len(options.pair) != len(texts):
            raise InputError(f"{len(texts)} texts and {len(options.pair)} --pair were given; each text needs one pair.")
        samples = list(zip(texts, options.pair, strict=True))
    answers = runner.answer_texts(samples, top_k=options.top_k)
    if options.json:
        _print_json({"artifact": str(options.artifact), "task": runner.task, "answers": answers})
    else:
        for sample, answer in zip(samples, answers, strict=True):
            print(f"{_shown(sample)}\n  {_answer_line(answer)}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from onnxpress.conversation import generate

    prompts = list(options.prompt)
    if options.file is not None:
        prompts.append(_text(options.file))
    if not prompts:
        raise InputError('No prompt was given: use --prompt "…", or --file FILE (- for standard input).')
    if options.logprobs is not None and not options.json:
        raise UsageError("--logprobs are shown with --json; give it too.")
    chosen = {name: getattr(options, name) for name in (*_SAMPLING, "n", "logprobs")}
    return generate(_generator(options), prompts, as_json=options.json, **chosen)


def _chat(options: argparse.Namespace) -> int:
    from onnxpress.conversation import chat

    chosen = {name: getattr(options, name) for name in _SAMPLING}
    return chat(_generator(options), system=options.system, **chosen)


def _generator(options: argparse.Namespace) -> Any:
    from onnxpress.conversation import open_generator
    from onnxpress.inspection import say_fallback

    if options.cache_mb < 1:
        raise UsageError(f"--cache-mb takes a positive whole number, not {options.cache_mb}.")
    runner = open_generator(
        options.artifact,
        providers=options.provider,
        allow_fallback=options.allow_fallback,
        key=options.key,
        cache_bytes=options.cache_mb * 2**20,
    )
    say_fallback(runner.session)
    return runner


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
        _print_json(
            {
                "artifact": str(options.artifact),
                "files": len(artifact.manifest.files),
                "golden": [vars(row) for row in rows],
            }
        )
    else:
        print(f"{len(artifact.manifest.files)} files have the digests of the manifest.")
        for row in rows:
            print(
                f"golden {row.case}, {row.output}: largest difference {row.max_abs:.3g} (allowed {row.tolerance:.3g})"
            )
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
        _print_json(
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
    print(f"{place}, {place.stat().st_size / 1e6:.1f} MB. There: {then}")
    return 0


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
    print(f"{options.host} runs it now; {size / 1e6:.2f} MB were sent.")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from onnxpress.inspection import inspect

    return inspect(
        options.artifact,
        placement=options.placement,
        as_json=options.json,
        providers=options.provider,
        allow_fallback=options.allow_fallback,
    )


def _doctor(options: argparse.Namespace) -> int:
    from onnxpress.doctor import examine

    findings = examine()
    if options.json:
        _print_json(findings)
    else:
        for line in findings["lines"]:
            print(line)
    return 2 if findings["problems"] else 0


def _columns(items: Sequence[str]) -> dict[str, str | int]:
    columns: list[tuple[str, str | int]] = []
    for item in items:
        role, separator, name = item.partition("=")
        if not separator or not role or not name:
            raise UsageError(f"--column {item!r} is not of the form ROLE=NAME, e.g. text=sentence or label=2.")
        columns.append((role, int(name) if name.isdecimal() else name))
    return _once(columns, "--column")


def _pass_options(items: Sequence[str]) -> dict[str, dict[str, Json]]:
    found: dict[str, dict[str, Json]] = {}
    for item in items:
        where, separator, text = item.partition("=")
        step, dot, name = where.partition(".")
        if not separator or not dot or not step or not name:
            raise UsageError(
                f"--pass-option {item!r} is not of the form PASS.NAME=VALUE, e.g. int4-weights.block_size=64."
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a word
        found[step] = _once([*found.get(step, {}).items(), (name, value)], f"--pass-option {step}")
    return found


def _once(pairs: Sequence[tuple[str, Any]], flag: str) -> dict[str, Any]:
    """Names and values as a dict. Raises UsageError where one is given twice, of which the first would be forgotten."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{flag}: {twice} is given twice; give it once.")
    return dict(pairs)


def _prune(text: str) -> list[tuple[str, int | float]]:
    """Parts and what goes of them: 1 is a whole number, and 1.0, which says no clear thing, is refused with the recipe."""
    pairs = [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in text.split(","))]
    try:
        return [(name, int(value) if value.isdecimal() else float(value)) for name, value in pairs]
    except ValueError:
        raise UsageError(
            f"--prune {text!r} is not of the form PART=SHARE,…: ffn, heads or layers, e.g. ffn=0.5,heads=0.33."
        ) from None


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


def _text(path: Path) -> str:
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The file {path} cannot be read as UTF-8 text: {error}.") from None


def _lines(path: Path) -> list[str]:
    # Not splitlines: it also cuts at form feeds and the like, which stand within texts.
    return [line for line in _text(path).replace("\r\n", "\n").split("\n") if line.strip()]


def _shown(sample: str | tuple[str, str]) -> str:
    text = sample if isinstance(sample, str) else " | ".join(sample)
    return text if len(text) <= 100 else text[:99] + "…"


def _answer_line(answer: Json) -> str:
    if isinstance(answer, list) and answer and isinstance(answer[0], float):
        head = ", ".join(f"{value:.4f}" for value in answer[:8])
        return f"[{head}{', …' if len(answer) > 8 else ''}] ({len(answer)} numbers; --json prints all)"
    if isinstance(answer, list):
        return "\n  ".join(_answer_line(item) for item in answer) if answer else "(nothing found)"
    if isinstance(answer, dict):
        parts = (f"{key}: {_short(value)}" for key, value in answer.items() if key not in ("scores", "truncated"))
        return ", ".join(parts) + (", input truncated" if answer.get("truncated") else "")
    return str(answer)


def _short(value: Json) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _print_json(content: Json) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=1))


def _terminate(*_: Any) -> None:
    """What a build has begun is removed on the way out, as it is on an interrupt."""
    sys.exit(128 + signal.SIGTERM)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"onnxpress: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
