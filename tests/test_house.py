"""The house stands as documented: packages, links, import rules, public names, and what a wheel and an sdist hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import onnxpress

ROOT = Path(__file__).parent.parent
ROOMS = ("exporters", "optimizers", "runtime")


def modules() -> list[str]:
    folders = {"onnxpress": "onnxpress", **{f"onnxpress/{room}": room for room in ROOMS}}
    found = []
    for package, folder in folders.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any((ROOT / folder / part).is_symlink() for part in path.relative_to(ROOT / folder).parts[:1]):
                found.append(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_packages_are_those_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {str(Path(module).parent).replace("/", ".") for module in modules() if module.endswith("__init__.py")}
    assert set(project["packages"]) == on_disk
    assert project["package-dir"] == {f"onnxpress.{room}": room for room in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked(room: str) -> None:
    link = ROOT / "onnxpress" / room
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{room}"


def test_public_names() -> None:
    assert onnxpress.__all__ == ["Engine", "OnnxpressError", "__version__", "build", "load"]
    for name in onnxpress.__all__:
        assert getattr(onnxpress, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        onnxpress.nothing  # noqa: B018


# Which packages a room may import, beside the standard library.
SHARED = {"onnxpress.errors", "onnxpress.manifest"}
ALLOWED = {
    "runtime": {"jinja2", "numpy", "onnxruntime", "tokenizers", "tqdm", "onnxpress.runtime", "onnxpress.artifact", *SHARED},
    "optimizers": {"numpy", "onnx_ir", "onnx", "onnxscript", "ml_dtypes", "onnxpress.optimizers", "onnxpress.graph", "onnxpress.pruned", *SHARED},
    "exporters": {
        "numpy", "torch", "tokenizers", "transformers", "huggingface_hub", "safetensors", "optimum", "onnx_ir", "onnxscript",
        "onnxpress.exporters", "onnxpress.graph", "onnxpress.masked", "onnxpress.pruned", "onnxpress.stopping", *SHARED,
    },
}  # fmt: skip
# What changes weights by training runs in torch; nothing else among the optimizers does.
TRAINING = {"torch", "transformers", "safetensors"}
ALLOWED_IN_FILES = {
    **dict.fromkeys((f"optimizers/{name}.py" for name in ("training", "processes", "distil", "divergence")), TRAINING),
    "optimizers/linear_head.py": {"sklearn"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [str(node.module)]
            for name in names:
                top = name.split(".")[0]
                short = ".".join(name.split(".")[:2]) if top == "onnxpress" else top
                allowed = ALLOWED[room] | ALLOWED_IN_FILES.get(f"{room}/{path.name}", set())
                assert short in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_wheel_and_sdist_hold_everything(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for module in modules():
        assert module in wheel
        inner = module.removeprefix("onnxpress/")
        assert module in sdist or inner in sdist
    for path in (ROOT / "onnxpress" / "data").glob("*.*"):
        assert f"onnxpress/data/{path.name}" in wheel
    for path in (ROOT / "onnxpress" / "page").iterdir():
        assert f"onnxpress/page/{path.name}" in wheel
        assert f"onnxpress/page/{path.name}" in sdist
    assert {"onnxpress/py.typed", "onnxpress/on_device.cpp"} <= set(wheel)
