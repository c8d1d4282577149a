"""The provider OpenVINO: a plugin that is really loaded, answers, threads, and what is missing or left out."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from loadable import needs_openvino, why_not
from small_graphs import small_graph
from tiny_artifacts import save_artifact, save_embedder

from onnxpress.errors import InputError, ProviderError
from onnxpress.runtime import CPU, OpenVINO, Session, load, opening, openvino, plugin
from onnxpress.runtime.providers import make_providers
from onnxpress.runtime.wheel import version_of

ATTENTION = "y = Attention<q_num_heads=4, kv_num_heads=4>(x, x, x)"


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="the extra dev has no package for this system")
def test_the_development_packages_have_it() -> None:
    """So that the tests below are skipped nowhere else without a word."""
    missing = why_not("openvino")
    assert not missing or platform.machine() != "x86_64" or "on Intel's processors alone" in missing


@pytest.mark.skipif(
    version_of("onnxruntime-ep-openvino") is None, reason="the extra dev has no package for this system"
)
def test_what_is_missing_is_said_alike_twice() -> None:
    """A library without devices here is registered with ONNX Runtime all the same, which takes it once."""
    assert why_not("openvino") == why_not("openvino")


class Device:
    """As ONNX Runtime lists one."""

    def __init__(self, vendor: str, vendor_id: int) -> None:
        self.ep_name, self.device, self.ep_metadata = "CPUExecutionProvider", self, {}  # type: ignore[var-annotated]
        self.type, self.vendor, self.vendor_id = onnxruntime.OrtHardwareDeviceType.CPU, vendor, vendor_id


@pytest.mark.parametrize(
    ("vendor", "vendor_id", "message"),
    [
        ("AMD", 0x1022, "on Intel's processors alone, this one is by AMD"),
        ("Intel", 0x8086, "the device CPU; it finds none"),
    ],
)
def test_processors_that_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, vendor: str, vendor_id: int, message: str
) -> None:
    """Its plugin leaves out AMD's (seen with 1.8.1)."""
    monkeypatch.setattr(openvino, "plugin_devices", lambda *named: [])
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [Device(vendor, vendor_id)])
    with pytest.raises(ProviderError, match=message):
        OpenVINO().devices()


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openvino, "version_of", lambda package: None)
    path = save_embedder(tmp_path / "model.onnx")
    with pytest.raises(ProviderError, match=r"openvino was asked for .* pip install onnxruntime-ep-openvino"):
        Session(path, providers=["openvino"])
    session = Session(path, providers=["openvino", "cpu"], allow_fallback=True)
    assert session.providers == ("cpu",)
    assert "openvino was asked for" in session.fallback_note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": ""}, "a name is needed"),
        ({"device": 0}, "a name is needed"),
        ({"threads": 0}, "from 1 on"),
        ({"threads": True}, "whole number"),
        ({"threads": 10**9}, "1024 at most"),
        ({"threads": "2"}, "whole number"),
    ],
)
def test_refuses_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        OpenVINO(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [("openvino", "cuda"), ("cpu", "openvino"), ("openvino", "tensorrt-rtx")])
def test_is_taken_alone_or_before_the_cpu(names: tuple[str, ...]) -> None:
    with pytest.raises(ProviderError, match="alone or with cpu behind it"):
        make_providers(names)
    assert make_providers(("openvino", "cpu")) == (OpenVINO(), CPU())


def test_floats_are_computed_as_the_artifact_says() -> None:
    said = {half: OpenVINO().plugin_options(3, half_floats=half)["load_config"] for half in (False, True)}
    assert '"INFERENCE_PRECISION_HINT": "f32"' in said[False]
    here = "bf16" if openvino._cpu_has_bfloat16() else "f32"
    assert f'"INFERENCE_PRECISION_HINT": "{here}"' in said[True]
    assert '"INFERENCE_NUM_THREADS": "3"' in said[True]
    assert (
        '"INFERENCE_PRECISION_HINT": "f16"' in OpenVINO(device="GPU").plugin_options(1, half_floats=True)["load_config"]
    )
    assert OpenVINO(device="NPU").plugin_options(1, half_floats=True) == {}


@needs_openvino
def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(ProviderError, match=r"with the device TPU; it finds .*CPU"):
        OpenVINO(device="TPU").check()


@needs_openvino
def test_answers_as_the_cpu_provider_does(tmp_path: Path) -> None:
    """On CPUs with bfloat16 too, which OpenVINO itself would take for float32: the difference would be a thousandth."""
    graph = small_graph("h = MatMul(x, w) g = Gelu(h) y = MatMul(g, w)", weights={"w": numbers(32, 32)}, opset=20)
    ir.save(graph.model, tmp_path / "model.onnx")
    here, there = (Session(tmp_path / "model.onnx", providers=[name]) for name in ("cpu", "openvino"))
    assert there.providers == ("openvino",)
    assert there.on_cpu
    assert set(there.placement().values()) == {OpenVINO.registered_as}
    for shape in ((1, 1, 32), (1, 7, 32), (4, 16, 32), (2, 3, 32)):
        feeds = {"x": numbers(*shape)}
        np.testing.assert_allclose(there.run(feeds)["y"], here.run(feeds)["y"], rtol=1e-5, atol=1e-4)
    wrong = {"x": numbers(1, 2, 31)}
    with pytest.raises(InputError):
        there.run(wrong)


@needs_openvino
def test_integers_are_refused_where_their_sums_overflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On CPUs without VNNI, where a session on the CPU provider takes other kernels."""
    graph = small_graph("y = MatMul(x, w)", weights={"w": numbers(32, 32)})
    ir.save(graph.model, tmp_path / "model.onnx")
    monkeypatch.setattr(opening, "products_saturate", lambda: True)
    with pytest.raises(ProviderError, match=r"no VNNI.*--precision fp32 or bf16"):
        Session(tmp_path / "model.onnx", providers=["openvino"], exact_products=True)
    assert Session(tmp_path / "model.onnx", providers=["openvino"]).providers == ("openvino",)
    assert Session(tmp_path / "model.onnx", exact_products=True).providers == ("cpu",)


@needs_openvino
def test_integers_that_it_would_wrap_are_refused(tmp_path: Path) -> None:
    """It computes with 32 bits, also where a graph has 64: a time in milliseconds would be another one."""
    graph = small_graph(
        "y = Mul(x, w)", inputs="int64[batch] x", outputs="int64[batch] y", weights={"w": np.array([3])}
    )
    ir.save(graph.model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", providers=["openvino"])
    assert session.run({"x": np.array([5, -7])})["y"].tolist() == [15, -21]
    for large in (2**31, 1_764_500_000_000, -(2**31) - 1):
        with pytest.raises(InputError, match="integers of 32 bits"):
            session.run({"x": np.array([1, large])})


@needs_openvino
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_not_to_wait_for_threads_that_it_has_not(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    session = Session(path, providers=["openvino"])
    feeds = {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64)}
    session.run_on_one_thread(feeds)
    child = os.fork()
    if not child:
        told = 0
        signal.alarm(60)
        try:
            for attempt in (lambda: session.run(feeds), lambda: Session(path, providers=["openvino"])):
                try:
                    attempt()
                except ProviderError as error:
                    told += "forked" in str(error)
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    session.run(feeds)


@pytest.mark.parametrize(("flags", "hint"), [("flags : avx2 amx_bf16", "bf16"), ("flags : avx512_vnni", "f32")])
def test_bfloat16_is_asked_for_where_the_cpu_has_it(flags: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: flags)
    openvino._cpu_has_bfloat16.cache_clear()
    try:
        assert f'"{hint}"' in OpenVINO().plugin_options(1, half_floats=True)["load_config"]
    finally:
        openvino._cpu_has_bfloat16.cache_clear()


@needs_openvino
def test_threads_ask_at_once_and_get_their_own_answers(tmp_path: Path) -> None:
    graph = small_graph("y = MatMul(x, w)", weights={"w": numbers(32, 32)})
    ir.save(graph.model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", providers=[OpenVINO(threads=1)])
    assert session.threads == 1
    asked = [{"x": numbers(batch, 3, 32) * batch} for batch in (1, 2, 3, 4)]
    expected = [session.run(feeds)["y"] for feeds in asked]
    wrong: list[int] = []

    def ask(first: int) -> None:
        for index in range(first, first + 40):
            run = session.run if index % 3 else session.run_on_one_thread
            answer = run(asked[index % 4])["y"]
            if answer.shape != expected[index % 4].shape or not np.allclose(answer, expected[index % 4], atol=1e-5):
                wrong.append(index)

    asking = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert not wrong


@needs_openvino
def test_what_it_has_no_kernel_for_is_named(tmp_path: Path) -> None:
    graph = small_graph(ATTENTION, opset=23, ir_version=10)
    ir.save(graph.model, tmp_path / "model.onnx")
    with pytest.raises(ProviderError, match=r"Attention \(1\) would run on the CPU.*--target openvino"):
        Session(tmp_path / "model.onnx", providers=["openvino"])
    feeds = {"x": numbers(2, 3, 32)}
    both = Session(tmp_path / "model.onnx", providers=["openvino", "cpu"])
    expected = Session(tmp_path / "model.onnx").run(feeds)["y"]
    np.testing.assert_allclose(both.run(feeds)["y"], expected, atol=1e-6)


@needs_openvino
def test_an_artifact_for_the_cpu_opens_on_it_where_it_is_asked_for(tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny")
    texts = ["the cat", "a red dog ran to the house", "the"]
    expected = load(artifact.path).embed(texts)  # type: ignore[union-attr]
    runner = load(artifact.path, providers=["openvino", "cpu"])
    np.testing.assert_allclose(runner.embed(texts), expected, atol=1e-5)  # type: ignore[union-attr]


@needs_openvino
def test_a_broken_package_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    monkeypatch.setattr(plugin, "_registered", set())

    def broken(name: str, library: str) -> None:
        raise RuntimeError("cannot open\nthe library")

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", broken)
    with pytest.raises(ProviderError, match=r"does not load: cannot open the library\. pip install --force-reinstall"):
        OpenVINO().check()
