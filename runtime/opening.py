"""How ONNX Runtime opens a model: its own session, with these providers and options, or an error in plain words."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import ArtifactError, OnnxpressError, ProviderError
from onnxpress.manifest import Signature
from onnxpress.runtime.cuda import CAPTURES, CUDA
from onnxpress.runtime.device import ON_CARD
from onnxpress.runtime.openvino import OpenVINO
from onnxpress.runtime.providers import CPU, PLUGINS, Provider, one_line, refusal
from onnxpress.runtime.saturation import products_saturate
from onnxpress.runtime.threads import usable_cores

_NO_CAPTURE = "graph capture"  # in what ONNX Runtime says of a session that cannot capture
# What may run on the CPU for a session on a card: arithmetic with shapes and positions, which ONNX Runtime puts there itself.
_SHAPE_ARITHMETIC = frozenset({
    "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "GatherND",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax",
    "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose",
    "Unsqueeze", "Where",
})  # fmt: skip
_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # ONNX Runtime reads it when it makes a kernel
_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A model's file, and all that ONNX Runtime is told when it opens it: as `Session` says, but that providers are options."""

    path: Path
    content: Callable[[], Mapping[str, bytes | bytearray]] | None
    signature: Signature | None
    providers: tuple[Provider, ...]
    disabled_optimizers: tuple[str, ...]
    exact_products: bool
    flash_attention: bool
    prepacking: bool
    as_written: bool
    half_floats: bool
    cache_key: str | None

    @property
    def threads(self) -> int:
        """Cores that a session works on."""
        given = (provider.threads for provider in self.providers if isinstance(provider, CPU | OpenVINO))
        return next(filter(None, given), None) or usable_cores()

    def open(self, *, one_thread: bool = False, record_placement: bool = False) -> tuple[Any, bool]:
        """ONNX Runtime's session, and whether its runs can be captured as CUDA graphs.

        one_thread: runs use one thread, the caller's or one that ONNX Runtime starts. record_placement: for `placement`, below.
        Raises ArtifactError, ProviderError.
        """
        import onnxruntime

        if not self._on_cpu_alone:
            onnxruntime.set_default_logger_severity(3)  # it warns of plugin providers that nobody asked for
        if self.exact_products and any(map(_overflows, self.providers)) and products_saturate():
            raise ProviderError(
                f"{self.path} multiplies 8-bit integers, and OpenVINO's sums of them overflow on this CPU, which has no VNNI: its answers would "
                "be wrong. Build it with --precision fp32 or bf16, or with --target cpu-avx2 for the CPU provider."
            )
        if self.content is None and not self.path.is_file():
            raise ArtifactError(f"The model {self.path} does not exist.")
        options = self._options(1 if one_thread else self.threads, record_placement=record_placement)
        providers = self._provider_options()
        for provider in self.providers:
            if isinstance(provider, PLUGINS):
                streams = self.threads if one_thread else 1
                told = provider.plugin_options(self.threads, half_floats=self.half_floats, streams=streams)
                options.add_provider_for_devices(provider.devices(), told)
                providers = {}
        files = {} if self.content is None else dict(self.content())

        try:
            model = bytes(files.pop(self.path.name)) if files else self.path
            if files:
                data = [np.frombuffer(content, np.uint8) for content in files.values()]
                options.add_external_initializers_from_files_in_memory(list(files), data, [len(one) for one in data])
            inner = partial(self._inference_session, model, options)
            with contextlib.nullcontext() if self._on_cpu_alone else ON_CARD:
                try:
                    return inner(providers), CAPTURES in providers.get(CUDA.registered_as, {})
                except Exception as error:
                    if self._cuda is None or self._cuda.graphs or _NO_CAPTURE not in str(error):
                        raise
                    del providers[CUDA.registered_as][CAPTURES]  # it was not asked for by name
                    return inner(providers), False
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise self._refused(error) from error

    @property
    def _on_cpu_alone(self) -> bool:
        return all(isinstance(provider, CPU) for provider in self.providers)

    @property
    def _cuda(self) -> CUDA | None:
        return next((provider for provider in self.providers if isinstance(provider, CUDA)), None)

    @cached_property
    def _engine_key(self) -> str:
        """What tells this model's cached engines from another's, where engines are cached."""
        if self.cache_key is None and any(getattr(provider, "cache_folder", None) for provider in self.providers):
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return self.cache_key or ""

    def _options(self, threads: int, *, record_placement: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        if self.exact_products and products_saturate():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if not self.prepacking:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # All have one priority, so that their order decides; else what hangs on constants alone is computed first.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if record_placement or not self._on_cpu_alone:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _provider_options(self) -> dict[str, dict[str, str]]:
        found = {
            provider.registered_as: provider.options(self.signature, self._engine_key) for provider in self.providers
        }
        if self._cuda is not None and self._cuda is not self.providers[0]:  # behind TensorRT it runs but a part
            if self._cuda.graphs:
                raise ProviderError("CUDA(graphs=True) was asked for behind another provider; it has to come first.")
            found[CUDA.registered_as].pop(CAPTURES, None)
        return found

    def _inference_session(self, model: bytes | Path, options: Any, providers: Mapping[str, dict[str, str]]) -> Any:
        import onnxruntime

        with _environment(self.flash_attention):
            return onnxruntime.InferenceSession(
                model,
                options,
                providers=list(providers.items()) or None,
                disabled_optimizers=list(self.disabled_optimizers) or None,
                enable_fallback=0,
            )

    def _refused(self, error: Exception) -> OnnxpressError:
        """What it means that ONNX Runtime did not open the model."""
        if refused := refusal(error, self.providers):
            return refused
        if not self._on_cpu_alone:
            names = ", ".join(provider.name for provider in self.providers)
            compiled = any(isinstance(provider, OpenVINO) for provider in self.providers)
            advice = (
                " OpenVINO does not take this graph: build for cpu (onnxpress build --target cpu)." if compiled else ""
            )
            return ProviderError(f"ONNX Runtime cannot open {self.path} on {names}: {one_line(error)}.{advice}")
        if "bad_alloc" in str(error):
            what = "does not fit into the memory that there is"
        elif "Could not find an implementation" in str(error):
            what = (
                "needs kernels that ONNX Runtime's CPU provider does not have (bfloat16 runs on a card, or on openvino)"
            )
        elif "is not a registered function/op" in str(error) or "NOT_IMPLEMENTED" in str(error):
            what = "has operators that this ONNX Runtime does not have"
        else:
            what = "is corrupt or not a model that this ONNX Runtime reads"
        return ArtifactError(f"{self.path} {what}: {one_line(error)}")


def _overflows(provider: Provider) -> bool:
    return isinstance(provider, OpenVINO) and provider.device == "CPU"


@contextlib.contextmanager
def _environment(flash_attention: bool) -> Iterator[None]:
    """As it is for the session that opens in it, not for one that opens beside it; what the user has set stays as it is."""
    with _ENVIRONMENT:
        if flash_attention or _FLASH in os.environ:
            yield
            return
        os.environ[_FLASH] = "1"
        try:
            yield
        finally:
            del os.environ[_FLASH]


def placement(inner: Any) -> dict[str, str]:
    """Which provider runs each node, after ONNX Runtime's own fusions, of a session that recorded it: {node: provider}."""
    return {
        node.name or f"{node.op_type}_{index}": part.ep_name
        for part in inner.get_provider_graph_assignment_info()
        for index, node in enumerate(part.get_nodes())
    }


def left_on_cpu(inner: Any) -> str:
    """Operators beside shape arithmetic that a session without the CPU provider has there, each with its count."""
    nodes = [
        node.op_type
        for part in inner.get_provider_graph_assignment_info()
        if part.ep_name == CPU.registered_as
        for node in part.get_nodes()
    ]
    counts = Counter(name for name in nodes if name not in _SHAPE_ARITHMETIC)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
