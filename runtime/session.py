"""The one place that opens ONNX Runtime: exactly the providers asked for, inputs checked, errors in plain words."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import ArtifactError, InputError, ProviderError
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.runtime.providers import CPU, Provider, check_provider, check_wheel, make_providers

_NUMPY = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint64)": "uint64",
    "tensor(uint32)": "uint32",
    "tensor(uint16)": "uint16",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
}


class Session:
    """An ONNX model, open on the providers that were asked for.

    path: model.onnx. signature: what inputs are checked against; without it, what the file declares. providers:
    names ("cpu", "cuda", "tensorrt") or options (CPU(threads=2)), in order. allow_fallback: take what loads;
    `fallback_note` then says what did not. disabled_optimizers: names of ONNX Runtime's graph optimizers.
    cache_key: identifies the model in engine caches, e.g. its SHA-256.

    `run` may be called from several threads at once.

    Raises ProviderError where a provider does not load, ArtifactError where the file is no readable model.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        signature: Signature | None = None,
        providers: Sequence[str | Provider] = ("cpu",),
        allow_fallback: bool = False,
        disabled_optimizers: Sequence[str] = (),
        cache_key: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.fallback_note = ""
        self._disabled = tuple(disabled_optimizers)
        self._cache_key = cache_key
        check_wheel()
        self._providers = self._loadable(make_providers(providers), allow_fallback=allow_fallback)
        self._signature = signature
        self._session = self._open(threads=None)
        self.signature = signature or _declared_signature(self._session)
        got = self._session.get_providers()
        missing = [provider.name for provider in self._providers if provider.registered_as not in got]
        if missing:
            note = f"ONNX Runtime did not take the provider {', '.join(missing)}; it took {', '.join(got)}."
            if not allow_fallback:
                raise ProviderError(f"{note} Run `onnxpress doctor`, or allow the fallback.")
            self.fallback_note = " ".join(filter(None, (self.fallback_note, note)))
        self.providers = tuple(provider.name for provider in self._providers if provider.name not in missing)
        self._specs = {spec.name: spec for spec in self.signature.inputs}
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._lock = threading.Lock()
        self._one_thread: Any = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that `run` takes."""
        return tuple(self._specs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names that `run` gives."""
        return tuple(self._outputs)

    @property
    def on_cpu(self) -> bool:
        """Whether everything runs on the CPU provider."""
        return self.providers == ("cpu",)

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch. Raises InputError where an input does not fit the signature."""
        self.check(feeds)
        return self._run(self._session, feeds)

    def run_on_one_thread(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """As `run`, but the calling thread does all the work; a second copy of packed weights is made for it."""
        self.check(feeds)
        with self._lock:
            if self._one_thread is None:
                self._one_thread = self._open(threads=1)
        return self._run(self._one_thread, feeds)

    def check(self, feeds: Arrays) -> None:
        """Raise InputError where names, dtypes, shapes or integer values do not fit the signature."""
        if set(feeds) != set(self._specs):
            raise InputError(
                f"The inputs {sorted(feeds)} were given; the model takes {', '.join(map(_shown, self._specs.values()))}."
            )
        sizes: dict[str, tuple[int, str]] = {}
        for name, spec in self._specs.items():
            _check_array(spec, feeds[name], self.signature, sizes)

    def binding(self) -> Binding:
        """Inputs and outputs bound to buffers that stay where they are from run to run."""
        return Binding(self, self._session)

    def placement(self) -> dict[str, str]:
        """Which provider runs each node, after ONNX Runtime's own fusions: {node: provider}."""
        session = self._open(threads=None, record_placement=True)
        return {
            node.name or f"{node.op_type}_{index}": part.ep_name
            for part in session.get_provider_graph_assignment_info()
            for index, node in enumerate(part.get_nodes())
        }

    def _run(self, session: Any, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        try:
            return dict(zip(self._outputs, session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise InputError(f"ONNX Runtime refuses the inputs ({shapes}): {_one_line(error)}") from error

    def _loadable(self, providers: tuple[Provider, ...], *, allow_fallback: bool) -> tuple[Provider, ...]:
        loaded: list[Provider] = []
        for provider in providers:
            try:
                check_provider(provider.name)
                loaded.append(provider)
            except ProviderError as error:
                if not allow_fallback:
                    raise
                self.fallback_note = " ".join(filter(None, (self.fallback_note, str(error))))
        return tuple(loaded) or (CPU(),)

    def _open(self, *, threads: int | None, record_placement: bool = False) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        cpu = next((provider for provider in self._providers if isinstance(provider, CPU)), CPU())
        options.intra_op_num_threads = threads or cpu.threads or usable_cores()
        options.inter_op_num_threads = 1
        if record_placement:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [
            (provider.registered_as, provider.options(self._signature, self._cache_key)) for provider in self._providers
        ]
        if not self.path.is_file():
            raise ArtifactError(f"The model {self.path} does not exist.")
        try:
            return onnxruntime.InferenceSession(
                self.path,
                options,
                providers=providers,
                disabled_optimizers=list(self._disabled) or None,
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            if any(not isinstance(provider, CPU) for provider in self._providers):
                raise ProviderError(
                    f"ONNX Runtime cannot open {self.path} on {', '.join(item.name for item in self._providers)}: "
                    f"{_one_line(error)}"
                ) from error
            raise ArtifactError(
                f"{self.path} is corrupt or not a model that this ONNX Runtime reads: {_one_line(error)} Build it again."
            ) from error


class Binding:
    """Preallocated inputs and outputs: what is written into a bound input array is what the next run reads."""

    def __init__(self, session: Session, inner: Any) -> None:
        self._session = session
        self._inner = inner
        self._binding = inner.io_binding()
        self._kept: dict[str, np.ndarray[Any, Any]] = {}

    def bind_input(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Bind a contiguous array, which is not copied."""
        self._kept[name] = array
        self._binding.bind_cpu_input(name, array)

    def bind_output(self, name: str, array: np.ndarray[Any, Any] | None = None) -> None:
        """Bind an array that receives an output, or let ONNX Runtime allocate it."""
        if array is None:
            self._binding.bind_output(name, "cpu")
            return
        self._kept[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> dict[str, np.ndarray[Any, Any]]:
        """Answer what is in the bound inputs. Raises InputError."""
        self._session.check({name: self._kept[name] for name in self._session.input_names if name in self._kept})
        self._inner.run_with_iobinding(self._binding)
        names = [output.name for output in self._inner.get_outputs()]
        return {name: self._kept.get(name, array) for name, array in zip(names, self._outputs(), strict=False)}

    def _outputs(self) -> list[np.ndarray[Any, Any]]:
        return list(self._binding.copy_outputs_to_cpu())


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_array(spec: TensorSpec, array: Any, signature: Signature, sizes: dict[str, tuple[int, str]]) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"Input {spec.name} is a {type(array).__name__}; the model takes a numpy array: {_shown(spec)}."
        )
    if spec.dtype != "str" and array.dtype.name != spec.dtype:
        raise InputError(
            f"Input {spec.name} has dtype {array.dtype.name}; the model takes {_shown(spec)}: use .astype(numpy.{spec.dtype})."
        )
    if array.ndim != len(spec.shape):
        raise InputError(f"Input {spec.name} has shape {list(array.shape)}; the model takes {_shown(spec)}.")
    for axis, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise InputError(f"Input {spec.name} has shape {list(array.shape)}; the model takes {_shown(spec)}.")
            continue
        low, high = signature.axes.get(axis, (0, 2**62))
        if not low <= size <= high:
            raise InputError(f"Input {spec.name} has {axis} {size}; the model takes {low} to {high}.")
        first, owner = sizes.setdefault(axis, (size, spec.name))
        if first != size:
            raise InputError(f"Input {spec.name} has {axis} {size} and {owner} has {first}; they have to agree.")
    if spec.bounds is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < spec.bounds[0] or high > spec.bounds[1]:
            raise InputError(
                f"Input {spec.name} has values from {low} to {high}; the model takes {spec.bounds[0]} to {spec.bounds[1]}."
            )


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _declared_signature(session: Any) -> Signature:
    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype=_NUMPY.get(value.type, value.type),
                shape=tuple(
                    axis if isinstance(axis, int) else axis or f"{value.name}_{index}"
                    for index, axis in enumerate(value.shape)
                ),
            )
            for value in values
        )

    return Signature(task="module", inputs=specs(session.get_inputs()), outputs=specs(session.get_outputs()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
