"""Sessions: what they accept, what they refuse and how they say it, threads, bindings, placement, providers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graphs import SIGNATURE, feeds, save_embedding_model

from onnxpress.errors import ArtifactError, InputError, ProviderError
from onnxpress.runtime import CPU, CUDA, Session, TensorRT
from onnxpress.runtime.providers import make_providers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_embedding_model(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def session(model: Path) -> Session:
    return Session(model, signature=SIGNATURE)


def test_answers_named_arrays(session: Session) -> None:
    assert session.input_names == ("input_ids", "attention_mask")
    assert session.providers == ("cpu",)
    assert session.run(feeds())["embeddings"].shape == (2, 8)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": None}, r"inputs \['input_ids'\] were given; the model takes input_ids int64 \[batch, length\]"),
    ({"extra": np.zeros(1)}, "extra"),
    ({"input_ids": [[1, 2]]}, "is a list; the model takes a numpy array"),
    ({"input_ids": np.ones((2, 5), np.int32)}, r"dtype int32.*astype\(numpy.int64\)"),
    ({"input_ids": np.ones((2, 5), np.float32)}, "dtype float32"),
    ({"input_ids": np.ones(5, np.int64)}, r"shape \[5\]"),
    ({"input_ids": np.ones((2, 4), np.int64)}, "attention_mask has length 5 and input_ids has 4"),
    ({"input_ids": np.full((2, 5), 20)}, "values from 20 to 20; the model takes 0 to 19"),
    ({"input_ids": np.full((2, 5), -1)}, "values from -1 to -1"),
    ({"attention_mask": np.full((2, 5), 2)}, "attention_mask has values from 2 to 2"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_refuses_what_does_not_fit(session: Session, change: dict[str, Any], said: str) -> None:
    given = {name: array for name, array in {**feeds(), **change}.items() if array is not None}
    with pytest.raises(InputError, match=said):
        session.run(given)


def test_refuses_lengths_out_of_range(session: Session) -> None:
    with pytest.raises(InputError, match="length 17; the model takes 1 to 16"):
        session.run(feeds(1, 17))
    with pytest.raises(InputError, match="batch 0"):
        session.run({name: array[:0] for name, array in feeds().items()})


def test_without_a_signature_the_file_s_own_counts(model: Path) -> None:
    session = Session(model)
    with pytest.raises(InputError, match="dtype float64"):
        session.run({**feeds(), "input_ids": np.ones((2, 5))})
    with pytest.raises(InputError, match="ONNX Runtime refuses"):
        session.run({**feeds(), "input_ids": np.full((2, 5), 10_000)})


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_models(model: Path, keep: float) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ArtifactError, match="corrupt"):
        Session(model, signature=SIGNATURE).run(feeds())


def test_garbage_and_missing_models(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(os.urandom(1000))
    with pytest.raises(ArtifactError, match="corrupt"):
        Session(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        Session(tmp_path / "none.onnx")


def test_one_session_serves_many_threads(session: Session) -> None:
    given = [feeds(1 + index % 4, 3 + index % 5) for index in range(64)]
    expected = [session.run(item)["embeddings"] for item in given]
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(session.run, given))
        alone = list(pool.map(session.run_on_one_thread, given))
    for one, two, three in zip(expected, several, alone, strict=True):
        np.testing.assert_array_equal(one, two["embeddings"])
        np.testing.assert_array_equal(one, three["embeddings"])


def test_bound_buffers_are_used_again(session: Session) -> None:
    given = feeds()
    result = np.zeros((2, 8), np.float32)
    binding = session.binding()
    for name, array in given.items():
        binding.bind_input(name, array)
    binding.bind_output("embeddings", result)
    first = binding.run()["embeddings"]
    assert first is result
    np.testing.assert_array_equal(result, session.run(given)["embeddings"])
    given["input_ids"][:] = 7
    binding.run()
    np.testing.assert_array_equal(result, session.run(given)["embeddings"])
    given["input_ids"][:] = 77
    with pytest.raises(InputError, match="77"):
        binding.run()


def test_placement_names_every_node(session: Session) -> None:
    placement = session.placement()
    assert "embed" in placement
    assert set(placement.values()) == {"CPUExecutionProvider"}


def test_threads_follow_the_affinity(model: Path) -> None:
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from onnxpress.runtime.session import Session, usable_cores\n"
        f"Session({str(model)!r})\n"
        "import threading; print(usable_cores(), len(os.listdir('/proc/self/task')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cores, threads = map(int, done.stdout.split())
    assert cores == 1
    assert threads <= 2  # the program's own, and numpy's or ONNX Runtime's one helper at most


@pytest.mark.parametrize(
    ("providers", "said"),
    [
        (("tpu",), r"Unknown provider 'tpu'; the providers are: cpu, cuda, tensorrt"),
        (("cpu", "cpu"), "each once"),
        ((), "at least one"),
    ],
)
def test_wrong_providers(providers: tuple[str, ...], said: str) -> None:
    with pytest.raises(ProviderError, match=said):
        make_providers(providers)


def test_no_threads_are_too_few() -> None:
    with pytest.raises(ProviderError, match="at least one"):
        CPU(threads=0)


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_provider_that_the_wheel_lacks(model: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProviderError, match=rf"provider {name} was asked for and is not in the installed wheel.*gpu"):
        Session(model, providers=(name, "cpu"))
    session = Session(model, providers=(name, "cpu"), allow_fallback=True)
    assert session.providers == ("cpu",)
    assert name in session.fallback_note
    assert capfd.readouterr().out == ""


def test_provider_options() -> None:
    options = CUDA(device_id=1, memory_limit=2**30).options(SIGNATURE, None)
    assert options == {
        "device_id": "1", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "gpu_mem_limit": str(2**30),
    }  # fmt: skip
    options = TensorRT(cache_folder=Path("/cache")).options(SIGNATURE, "abc")
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_opt_shapes"] == "input_ids:64x16,attention_mask:64x16"
    assert options["trt_profile_max_shapes"] == "input_ids:64x16,attention_mask:64x16"
    assert options["trt_engine_cache_path"].startswith("/cache/abc/onnxruntime-")


def test_both_wheels_are_a_conflict(tmp_path: Path) -> None:
    """Real metadata of a second wheel, found as importlib.metadata finds it."""
    folder = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    code = "from onnxpress.runtime.providers import check_wheel\ncheck_wheel()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "ProviderError: Both onnxruntime and onnxruntime-gpu are installed" in done.stderr
    doctor = subprocess.run(
        [sys.executable, "-m", "onnxpress.cli", "doctor"], capture_output=True, text=True, env=environment, check=False
    )
    assert doctor.returncode == 2
    assert "PROBLEM: both onnxruntime and onnxruntime-gpu" in doctor.stdout
