"""Providers are asked for exactly; what does not load is named, on this machine's real wheels."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loadable import loads
from tiny_artifacts import SIGNATURE, save_embedder

from onnxpress.errors import InputError, ProviderError
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.runtime import CPU, CUDA, NvTensorRtRtx, Session, TensorRT
from onnxpress.runtime.nvidia import gpu_name, missing_libraries, tensorrt_version
from onnxpress.runtime.providers import check_provider, make_providers, refusal
from onnxpress.runtime.wheel import check_wheel, onnxruntime_version


def test_names_become_options() -> None:
    assert make_providers(["tensorrt", "cuda", "cpu"]) == (TensorRT(), CUDA(), CPU())
    assert make_providers([CPU(threads=3)]) == (CPU(threads=3),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["gpu"], "Unknown provider 'gpu'; the providers are: cpu, cuda, tensorrt, tensorrt-rtx"),
        (["CUDAExecutionProvider"], "Unknown provider"),
        (["cpu", "cpu"], "each once"),
        (["tensorrt-rtx", "cuda"], "alone or with cpu"),
        ([], "at least one"),
    ],
)
def test_refuses_unknown_and_repeated(given: list[str], message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        make_providers(given)


@pytest.mark.parametrize("given", [5, CPU, {"cpu"}, 1.5])
def test_what_is_no_list_of_providers(given: object) -> None:
    with pytest.raises(ProviderError, match="was given as providers; give a name"):
        make_providers(given)  # type: ignore[arg-type]


def test_refuses_no_threads() -> None:
    with pytest.raises(ProviderError, match="a whole number from 1 on"):
        CPU(threads=0)


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_the_cpu_wheel_says_that_it_has_no_gpu_provider(name: str, tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    with pytest.raises(ProviderError, match=rf"{name} .* not in the installed wheel .*onnxpress\[gpu\]"):
        Session(path, providers=[name])


@pytest.mark.skipif(loads("cuda"), reason="this machine has a card that loads, so nothing falls back")
def test_fallback_is_said(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    session = Session(path, providers=["cuda", "cpu"], allow_fallback=True)
    assert session.providers == ("cpu",)
    assert "cuda was asked for" in session.fallback_note
    session = Session(path, providers=["tensorrt"], allow_fallback=True)
    assert session.providers == ("cpu",)
    assert "tensorrt was asked for" in session.fallback_note


def test_cuda_options() -> None:
    assert CUDA(device_id=1, memory_limit=2**30).options(SIGNATURE, "key") == {
        "device_id": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "gpu_mem_limit": str(2**30),
        "enable_cuda_graph": "1",
    }
    assert CUDA(tf32=True).options(None, "")["use_tf32"] == "1"
    assert CUDA(graphs=True).options(None, "")["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in CUDA(graphs=False).options(None, "")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (CUDA, {"device_id": -1}, r"CUDA\(device_id=-1\): a whole number is needed, 0 or more"),
        (CUDA, {"device_id": True}, "whole number"),
        (CUDA, {"device_id": "0"}, "device_id='0'"),
        (CUDA, {"memory_limit": 0}, "memory_limit=0.*1 or more .bytes"),
        (CUDA, {"memory_limit": 1e9}, "whole number"),
        (CUDA, {"tf32": 1}, "tf32=1.*True or False"),
        (CUDA, {"graphs": "yes"}, "graphs='yes'.*True, False or None"),
        (TensorRT, {"device_id": -1}, "0 or more"),
        (NvTensorRtRtx, {"device_id": None}, "whole number"),
        (TensorRT, {"builder_optimization_level": 6}, "0 to 5"),
        (TensorRT, {"cache_folder": 3}, "a path is needed"),
        (TensorRT, {"cache_folder": "a", "ep_context": "b"}, "give one of them"),
        (TensorRT, {"axes": [("batch", 1)]}, "a dict"),
        (TensorRT, {"axes": {"batch": (1, 2)}}, "three whole numbers"),
        (TensorRT, {"axes": {"batch": (4, 2, 8)}}, "three whole numbers"),
        (TensorRT, {"axes": {"batch": (0, 2, 8)}}, "from 1"),
        (TensorRT, {"raw_options": {"trt_dla_core": 1}}, "dict of strings"),
        (TensorRT, {"raw_options": {"trt_fp16_enable": "1"}}, "trt_fp16_enable; precision is in the graph"),
        (TensorRT, {"raw_options": {"trt_int8_calibration_table_name": "t"}}, "--precision fp16, int8-qdq or fp8-qdq"),
    ],
)
def test_refuses_bad_options(kind: type[CUDA], options: dict[str, object], message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        kind(**options)  # type: ignore[arg-type]


def test_axes_narrow_the_profile() -> None:
    options = TensorRT(axes={"batch": (1, 8, 32)}).options(SIGNATURE, "")
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_opt_shapes"] == "input_ids:8x16,attention_mask:8x16"
    assert options["trt_profile_max_shapes"] == "input_ids:32x16,attention_mask:32x16"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch": (1, 8, 65)}, "batch 1 to 65; the model takes 1 to 64"),
        ({"rows": (1, 8, 16)}, "names rows; the model's dynamic axes are: batch, length"),
    ],
)
def test_axes_have_to_fit_the_signature(axes: dict[str, tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        TensorRT(axes=axes).options(SIGNATURE, "")


def test_axes_need_a_signature() -> None:
    with pytest.raises(ProviderError, match="signature is not known"):
        TensorRT(axes={"batch": (1, 8, 16)}).options(None, "")


def test_a_folder_is_no_context_model(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="is a folder"):
        TensorRT(ep_context=tmp_path)


def test_refuses_what_is_no_provider() -> None:
    for item in (3, CUDA):
        with pytest.raises(ProviderError, match=r"was given as a provider; give a name \(cpu, cuda"):
            make_providers([item])  # type: ignore[list-item]


def test_axes_give_ranges_that_the_model_lacks() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("n", "m", 3))
    bare = Signature(task="module", inputs=(spec,), outputs=(), axes={})
    assert TensorRT(axes={"n": (1, 2, 4), "m": (5, 5, 9)}).options(bare, "")["trt_profile_max_shapes"] == "x:4x9x3"
    with pytest.raises(ProviderError, match="has to name m as well"):
        TensorRT(axes={"n": (1, 2, 4)}).options(bare, "")


def test_inputs_outside_of_the_profile_are_refused() -> None:
    provider = TensorRT(axes={"batch": (2, 8, 32)})
    provider.check_sizes({"batch": 2, "length": 900})
    for size in (1, 33):
        with pytest.raises(
            InputError, match=rf"batch {size} was given; TensorRT's profile of this session has 2 to 32"
        ):
            provider.check_sizes({"batch": size})


@pytest.mark.skipif(loads("tensorrt"), reason="this machine has TensorRT, so nothing falls back")
def test_a_session_that_fell_back_takes_what_its_provider_takes(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    narrow = TensorRT(axes={"batch": (1, 1, 1)})
    session = Session(path, signature=SIGNATURE, providers=[narrow, "cpu"], allow_fallback=True)
    ones = np.ones((2, 4), np.int64)
    assert session.run({"input_ids": ones, "attention_mask": ones})


@pytest.mark.skipif(loads("cuda"), reason="this machine has CUDA, so nothing falls back")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_provider_that_loads_and_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library of CUDA's is older than ONNX Runtime wants: it gives a session on the CPU, without an error."""
    path = save_embedder(tmp_path / "model.onnx")
    monkeypatch.setattr("onnxpress.runtime.session.check_provider", lambda _: None)
    with pytest.raises(ProviderError, match="did not take the provider cuda; it took CPUExecutionProvider"):
        Session(path, providers=["cuda"])
    session = Session(path, providers=["cuda"], allow_fallback=True)
    assert session.providers == ("cpu",)
    assert session.on_cpu
    assert "did not take the provider cuda" in session.fallback_note


def test_context_model_and_raw_options(tmp_path: Path) -> None:
    path = tmp_path / "new" / "context.onnx"
    options = TensorRT(ep_context=path, raw_options={"trt_dla_enable": "1"}).options(SIGNATURE, "")
    assert options["trt_dump_ep_context_model"] == options["trt_ep_context_embed_mode"] == "1"
    assert options["trt_ep_context_file_path"] == str(path)
    assert options["trt_dla_enable"] == "1"
    assert path.parent.is_dir()
    with pytest.raises(ProviderError, match="trt_sparsity_enable, which TensorRT's own fields set"):
        TensorRT(raw_options={"trt_sparsity_enable": "0"}).options(SIGNATURE, "")


# What onnxruntime-gpu 1.31.1 said on an H200, but for the engine and cuDNN, whose words are from its libraries.
AT_OPEN = (
    "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: core/framework/bfc_arena.cc:360 "
    "Available memory of 0 is smaller than requested bytes of 1179648"
)
AT_RUN = (
    "Non-zero status code returned while running Gather node. Name:'Gather_1' Status Message: core/framework/bfc_arena.cc:360 "
    "Available memory of 59768832 is smaller than requested bytes of 201326592"
)


@pytest.mark.parametrize(
    ("said", "provider", "message"),
    [
        (
            AT_OPEN,
            CUDA(memory_limit=10**7),
            r"1179648 bytes more .* 0 were left of CUDA\(memory_limit=10000000\)\. Give a larger",
        ),
        (
            AT_RUN,
            CUDA(memory_limit=10**8),
            r"201326592 bytes more .* 59768832 were left of CUDA\(memory_limit=100000000\)",
        ),
        ("Failed to allocate memory for requested buffer of size 77", CUDA(), r"77 bytes more .*nvidia-smi"),
        ("CUDA failure 2: out of memory ; GPU=0", TensorRT(), "memory of the card does not suffice"),
        ("cuDNN is not available. Install cuDNN", CUDA(), r"onnxruntime-gpu\[cudnn\]"),
        ("TensorRT EP could not deserialize engine from binary data", TensorRT(), "another kind of card"),
    ],
)
def test_errors_about_the_card_are_not_about_shapes(said: str, provider: CUDA | TensorRT, message: str) -> None:
    refused = refusal(RuntimeError(said), [provider])
    assert isinstance(refused, ProviderError)
    with pytest.raises(ProviderError, match=message):
        raise refused


def test_other_errors_stay_what_they_are() -> None:
    assert refusal(RuntimeError("Got invalid dimensions for input: x"), [CUDA()]) is None
    assert refusal(RuntimeError(AT_RUN), [CPU()]) is None


@pytest.mark.skipif(loads("tensorrt-rtx"), reason="this machine has the plugin and a card")
def test_the_plugin_provider_names_its_package() -> None:
    with pytest.raises(ProviderError, match=r"tensorrt-rtx .* pip install onnxruntime-ep-nv-tensorrt-rtx"):
        check_provider("tensorrt-rtx")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="makes libraries with gcc on Linux")
def test_all_missing_libraries_are_named(tmp_path: Path) -> None:
    """A library that needs two that are there, CUDA's, and two that are not, as where cuDNN and TensorRT are missing."""

    def compiled(name: str, *needs: str) -> Path:
        path = tmp_path / name
        (tmp_path / "empty.c").write_text("")
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name},--no-as-needed", "-o", str(path), "-x", "c"]
        command += [str(tmp_path / "empty.c"), "-x", "none", f"-L{tmp_path}", *(f"-l:{one}" for one in needs)]
        subprocess.run(command, check=True, capture_output=True)
        return path

    names = (
        "libonnxpresscudart.so.13",
        "libonnxpresscublas.so.13",
        "libonnxpresscudnn.so.9",
        "libonnxpressinfer.so.10",
    )
    made = [compiled(name) for name in names]
    provider = compiled("libprovider.so", *names)
    assert missing_libraries(provider) == list(names)
    for path in made[:2]:
        ctypes.CDLL(str(path))  # as onnxruntime.preload_dlls() does, from wheels
    assert missing_libraries(provider) == ["libonnxpresscudnn.so.9", "libonnxpressinfer.so.10"]
    (tmp_path / "library.dll").write_bytes(b"MZ" * 100)
    assert missing_libraries(tmp_path / "library.dll") == []


def test_tensorrt_profiles_cover_the_signature(tmp_path: Path) -> None:
    options = TensorRT(cache_folder=tmp_path).options(SIGNATURE, "abc")
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_opt_shapes"] == "input_ids:64x16,attention_mask:64x16"
    assert options["trt_profile_max_shapes"] == "input_ids:64x16,attention_mask:64x16"
    here = f"onnxruntime-{onnxruntime_version()}-tensorrt-{tensorrt_version()}-{gpu_name(0)}-level-3"
    folder = tmp_path / "abc" / here
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert not [name for name in options if "fp16" in name or "int8" in name]
    others = ({"builder_optimization_level": 5}, {"raw_options": {"trt_build_heuristics_enable": "1"}})
    paths = {
        TensorRT(cache_folder=tmp_path, **more).options(SIGNATURE, "abc")["trt_engine_cache_path"] for more in others
    }
    assert len(paths | {str(folder)}) == 3, "an engine that was built otherwise is another one"


def test_tensorrt_without_ranges_or_cache() -> None:
    unknown = Signature(
        task="module", inputs=(TensorSpec(name="x", dtype="float32", shape=("n", "m")),), outputs=(), axes={"n": (1, 2)}
    )
    for signature in (None, unknown):
        assert TensorRT().options(signature, "") == {
            "device_id": "0",
            "trt_builder_optimization_level": "3",
            "trt_sparsity_enable": "1",
        }


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProviderError, match=r"cache .* cannot be made"):
        TensorRT(cache_folder=tmp_path / "file").options(SIGNATURE, "abc")


SHADOW = """
import sys
sys.path.insert(0, {folder!r})
from onnxpress.errors import OnnxpressError
from onnxpress.runtime.providers import check_provider
try:
    check_provider("cpu")
except OnnxpressError as error:
    print(type(error).__name__, error)
"""


def shadowed(folder: Path) -> str:
    """What a fresh process says that sees `folder` before the installed packages."""
    done = subprocess.run(
        [sys.executable, "-c", SHADOW.format(folder=str(folder))], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_two_wheels_at_once_are_refused(tmp_path: Path) -> None:
    """The metadata of a second wheel, as pip leaves it."""
    second = "onnxruntime" if check_wheel() == "onnxruntime-gpu" else "onnxruntime-gpu"
    info = tmp_path / f"{second.replace('-', '_')}-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {second}\nVersion: 1.31.1\n")
    said = shadowed(tmp_path)
    assert said.startswith("ProviderError Both onnxruntime and onnxruntime-gpu are installed")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in said


def test_a_half_removed_wheel_is_named(tmp_path: Path) -> None:
    """Uninstalling one of the two wheels leaves a package without its content."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("")
    assert shadowed(tmp_path).startswith("ProviderError ONNX Runtime is installed and does not load")


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 2 ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { __builtin_strncpy(name, "NVIDIA H200 (x/y)", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
"""
CARDS = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
from onnxpress.errors import ProviderError
from onnxpress.runtime.nvidia import check_card, gpu_name
check_card("cuda", 1)
print(gpu_name(0), gpu_name(2))
try:
    check_card("cuda", 2)
except ProviderError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="makes a driver with gcc on Linux")
def test_a_card_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Through a driver of our own with two cards, in a process of its own."""
    (tmp_path / "driver.c").write_text(DRIVER)
    path = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(path), str(tmp_path / "driver.c")]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", CARDS, str(path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "NVIDIA-H200-x-y-sm90 unknown-gpu",
        "The provider cuda was asked for with device_id 2; this machine has 0 to 1.",
    ], done.stderr


def test_engines_of_an_encrypted_model_stay_in_memory(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    for options in (
        {"cache_folder": tmp_path},
        {"ep_context": tmp_path / "context.onnx"},
        {"raw_options": {"trt_engine_cache_enable": "1"}},
        {"raw_options": {"trt_dump_subgraphs": "1"}},
    ):
        with pytest.raises(ProviderError, match="encrypted model in plain"):
            Session(path, content=lambda: {"model.onnx": path.read_bytes()}, providers=[TensorRT(**options)])


def test_one_provider_needs_no_list(tmp_path: Path) -> None:
    session = Session(save_embedder(tmp_path / "model.onnx"), providers=CPU(threads=1))
    assert (session.providers, session.threads) == (("cpu",), 1)
