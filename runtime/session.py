"""The one place that opens ONNX Runtime: exactly the providers asked for, inputs checked, errors in plain words."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import ArtifactError, InputError, OnnxpressError, ProviderError
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.runtime.cuda import CAPTURES, CUDA
from onnxpress.runtime.device import ON_CARD, DeviceArray, DeviceMemory, HostMemory, device_memory
from onnxpress.runtime.providers import (
    CPU,
    Provider,
    check_provider,
    make_providers,
    refusal,
)
from onnxpress.runtime.replay import MOST_GRAPHS, NO_GRAPH, Buffers, Key, bind, run_options, shapes_of
from onnxpress.runtime.saturation import products_saturate
from onnxpress.runtime.tensorrt import NvTensorRtRtx, TensorRT
from onnxpress.runtime.wheel import check_wheel

_MOST_SHAPES = 10_000  # that a session remembers to have seen
_LARGEST_BUFFERS = (
    64 * 2**20
)  # bytes of inputs and outputs that are kept on a card; with more, the launches do not matter
_NO_CAPTURE = "graph capture"  # in what ONNX Runtime says of a session that cannot capture
# What may run on the CPU for a session on a card: arithmetic with shapes and positions, which ONNX Runtime puts there itself.
_SHAPE_ARITHMETIC = frozenset({
    "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "GatherND",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax",
    "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose",
    "Unsqueeze", "Where",
})  # fmt: skip
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


_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # ONNX Runtime reads it when it makes a kernel
_ENVIRONMENT = threading.Lock()


class Session:
    """An ONNX model, open on the providers that were asked for.

    path: model.onnx. content: gives the model's files by name (model.onnx, and its data) in the place of those on disk, as often as it
    is opened. signature: what inputs are checked against; without it, what the file declares. providers:
    names ("cpu", "cuda", "tensorrt") or options (CPU(threads=2)), in order. allow_fallback: take what loads;
    `fallback_note` then says what did not. disabled_optimizers: names of ONNX Runtime's graph optimizers. exact_products: whether x86
    CPUs keep from faster kernels for signed weights of 8 bits, whose 16-bit sums overflow. flash_attention: whether the CPU provider's
    GroupQueryAttention may take its tiled kernel for prompts.
    cache_key: identifies the model in engine caches; None takes its SHA-256 when it is needed.

    `run` may be called from several threads at once.

    Raises ProviderError where a provider does not load, ArtifactError where the file is no readable model.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        content: Callable[[], Mapping[str, bytes | bytearray]] | None = None,
        signature: Signature | None = None,
        providers: Sequence[str | Provider] = ("cpu",),
        allow_fallback: bool = False,
        disabled_optimizers: Sequence[str] = (),
        exact_products: bool = False,
        flash_attention: bool = True,
        cache_key: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._content = content
        self.fallback_note = ""
        self._disabled = tuple(disabled_optimizers)
        self._exact_products = exact_products
        self._flash_attention = flash_attention
        self._cache_key = cache_key
        check_wheel()
        given = make_providers(providers)
        if content is not None and any(one.writes_engines for one in given if isinstance(one, TensorRT)):
            raise ProviderError(
                "An engine on disk would hold an encrypted model in plain: leave cache_folder, ep_context and raw options of "
                "caches and dumps out."
            )
        self._providers = self._loadable(given, allow_fallback=allow_fallback)
        self._signature = signature
        self.captures = False  # whether runs can be captured as CUDA graphs
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
        if left := "" if "cpu" in self.providers else self._left_on_cpu():
            note = f"{left} would run on the CPU: {', '.join(self.providers)} has no kernel for them in this graph."
            if not allow_fallback:
                raise ProviderError(
                    f"{note} Build for this target (onnxpress build --target {self.providers[0]}), or allow it: providers "
                    f"{', '.join((*self.providers, 'cpu'))}."
                )
            self.fallback_note = " ".join(filter(None, (self.fallback_note, note)))
        self._specs = {spec.name: spec for spec in self.signature.inputs}
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._lock = threading.Lock()
        self._one_thread: Any = None
        cuda = next((provider for provider in self._providers if isinstance(provider, CUDA)), None)
        on_card = cuda is not None and self.providers[0] == cuda.name
        self.memory: HostMemory | DeviceMemory = (
            device_memory(cuda.device_id) if on_card and cuda is not None else HostMemory()
        )
        self.captures = self.captures and on_card
        # Whether `run` answers shapes that come again by a CUDA graph.
        self.replays = self.captures and self._can_be_replayed()
        self._graphs_made = 0
        self._seen: dict[Key, Buffers | None] = {}

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

    @property
    def threads(self) -> int:
        """Cores that `run` works on."""
        cpu = next((provider for provider in self._providers if isinstance(provider, CPU)), CPU())
        return cpu.threads or usable_cores()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch. Raises InputError where an input does not fit the signature.

        On a card, shapes that come again are answered from buffers that stay there, by a CUDA graph.
        """
        self.check(feeds)
        if isinstance(self.memory, HostMemory):
            return self._run(self._session, feeds)
        with ON_CARD:
            try:
                if (buffers := self._buffers_for(feeds)) is not None:
                    buffers.write(feeds)
                    buffers.run()
                    return buffers.read()
            except Exception as error:  # ONNX Runtime's errors have no common base but Exception
                raise self._refused(error, feeds) from error
            return self._run(self._session, feeds, run_options(NO_GRAPH) if self.captures else None)

    def buffers(self, feeds: Arrays) -> Buffers:
        """Inputs and outputs of these shapes that stay on the card.

        Raises InputError; ProviderError where there is no card, and for a model that reads inputs on the CPU, or whose outputs' shapes
        hang on more than the inputs' shapes.
        """
        self.check(feeds)
        if not isinstance(self.memory, DeviceMemory):
            raise ProviderError(
                f"Buffers on a card were asked for, and this session runs on {', '.join(self.providers)}."
            )
        if not self._can_be_replayed():
            raise ProviderError(
                f"{self.path} reads inputs on the CPU, or answers shapes that hang on values: its buffers cannot stay on the card."
            )
        graph = None
        if self.captures:
            number = self.next_graph()
            graph = NO_GRAPH if number is None else str(number)
        return Buffers(self._session, self.memory, feeds, self._outputs, graph)

    def next_graph(self) -> int | None:
        """The number for a new CUDA graph; None where this session captures none, or no more."""
        with ON_CARD:
            if not self.captures or self._graphs_made >= MOST_GRAPHS:
                return None
            self._graphs_made += 1
            return self._graphs_made

    def largest(self, axis: str) -> int | None:
        """The largest size that an axis of the inputs may have here; None where nothing limits it."""
        limits = [self.signature.axes[axis][1]] if axis in self.signature.axes else []
        limits += [one.axes[axis][2] for one in self._providers if isinstance(one, TensorRT) and axis in one.axes]
        return min(limits, default=None)

    def _buffers_for(self, feeds: Arrays) -> Buffers | None:
        """Buffers for shapes that were seen before; None where a plain run is better, or all that there is."""
        if not self.replays:
            return None
        key = shapes_of(feeds)
        if key not in self._seen:
            if len(self._seen) < _MOST_SHAPES:
                self._seen[key] = None
            return None
        buffers = self._seen[key]
        if buffers is None and self._graphs_made < MOST_GRAPHS and self._bytes(feeds) <= _LARGEST_BUFFERS:
            buffers = self._seen[key] = self.buffers(feeds)
        return buffers

    def _can_be_replayed(self) -> bool:
        """Whether all inputs are read on the card, and the outputs' shapes hang on the inputs' alone.

        A shape, a position or a number of elements that is an input is read on the CPU, when it is bound.
        """
        axes = {axis for spec in self.signature.inputs for axis in spec.shape}
        if not axes.issuperset(axis for spec in self.signature.outputs for axis in spec.shape if isinstance(axis, str)):
            return False
        if self.signature.task not in ("module", "text-generation"):  # these take tokens and masks alone
            return True
        places = [info.name.lower() for info in self._session.get_input_memory_infos()]
        return not any("cpu" in place or "pinned" in place for place in places)

    def _bytes(self, feeds: Arrays) -> int:
        """Of inputs and outputs."""
        sizes: dict[str | int, int] = {}
        for spec in self.signature.inputs:
            sizes.update(zip(spec.shape, feeds[spec.name].shape, strict=True))
        outputs = sum(
            math.prod(sizes.get(axis, axis if isinstance(axis, int) else 0) for axis in spec.shape)
            * np.dtype(spec.dtype).itemsize
            for spec in self.signature.outputs
        )
        return outputs + sum(array.nbytes for array in feeds.values())

    def run_on_one_thread(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """As `run`, but the calling thread does all the work; a second copy of packed weights is made for it."""
        self.check(feeds)
        with self._lock:
            if self._one_thread is None:
                self._one_thread = self._open(threads=1)
        return self._run(self._one_thread, feeds, run_options(NO_GRAPH) if self.captures else None)

    def check(self, feeds: Arrays) -> None:
        """Raise InputError where names, dtypes, shapes or integer values do not fit the signature."""
        if not isinstance(feeds, Mapping):
            raise InputError(f"A {type(feeds).__name__} was given; `run` takes a dict of arrays by name.")
        if set(feeds) != set(self._specs):
            raise InputError(
                f"The inputs {sorted(feeds)} were given; the model takes {', '.join(map(str, self._specs.values()))}."
            )
        sizes: dict[str, tuple[int, str]] = {}
        for name, spec in self._specs.items():
            _check_array(spec, feeds[name], self.signature, sizes)
        for provider in self._providers:
            if isinstance(provider, TensorRT) and provider.name in self.providers:
                provider.check_sizes({axis: size for axis, (size, _) in sizes.items()})

    def binding(self, graph: int | None = None) -> Binding:
        """Inputs and outputs bound to buffers that stay where they are from run to run; graph: the number of its CUDA graph."""
        options = None
        if self.captures:
            options = run_options(NO_GRAPH if graph is None else str(graph))
        return Binding(self, self._session, options, copies=graph is None and isinstance(self.memory, DeviceMemory))

    def placement(self) -> dict[str, str]:
        """Which provider runs each node, after ONNX Runtime's own fusions: {node: provider}."""
        session = self._open(threads=None, record_placement=True)
        return {
            node.name or f"{node.op_type}_{index}": part.ep_name
            for part in session.get_provider_graph_assignment_info()
            for index, node in enumerate(part.get_nodes())
        }

    def _left_on_cpu(self) -> str:
        """Operators beside shape arithmetic that a session without the CPU provider has there, each with its count."""
        nodes = [
            node.op_type
            for part in self._session.get_provider_graph_assignment_info()
            if part.ep_name == CPU.registered_as
            for node in part.get_nodes()
        ]
        counts = Counter(name for name in nodes if name not in _SHAPE_ARITHMETIC)
        return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))

    def _run(self, session: Any, feeds: Arrays, options: Any = None) -> dict[str, np.ndarray[Any, Any]]:
        try:
            return dict(zip(self._outputs, session.run(self._outputs, dict(feeds), options), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise self._refused(error, feeds) from error

    def _refused(self, error: Exception, feeds: Arrays) -> OnnxpressError:
        """What a run's error means."""
        if isinstance(error, OnnxpressError):
            return error
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        return refusal(error, self._providers) or InputError(
            f"ONNX Runtime refuses the inputs ({shapes}): {_one_line(error)}"
        )

    def _loadable(self, providers: tuple[Provider, ...], *, allow_fallback: bool) -> tuple[Provider, ...]:
        loaded: list[Provider] = []
        for provider in providers:
            try:
                check_provider(provider)
                loaded.append(provider)
            except ProviderError as error:
                if not allow_fallback:
                    raise
                self.fallback_note = " ".join(filter(None, (self.fallback_note, str(error))))
        return tuple(loaded) or (CPU(),)

    def _open(self, *, threads: int | None, record_placement: bool = False) -> Any:
        import onnxruntime

        if any(not isinstance(provider, CPU) for provider in self._providers):
            onnxruntime.set_default_logger_severity(3)  # it warns of plugin providers that nobody asked for
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = threads or self.threads
        options.inter_op_num_threads = 1
        if self._exact_products and products_saturate():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if record_placement or all(not isinstance(provider, CPU) for provider in self._providers):
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self._content is None and not self.path.is_file():
            raise ArtifactError(f"The model {self.path} does not exist.")
        key = self._engine_key()
        providers = {provider.registered_as: provider.options(self._signature, key) for provider in self._providers}
        for provider in self._providers:
            if isinstance(provider, NvTensorRtRtx):  # a plugin is given as a device; CPU comes behind it by itself
                options.add_provider_for_devices(provider.devices(), {})
                providers = {}
        files = {} if self._content is None else dict(self._content())
        cuda = next((provider for provider in self._providers if isinstance(provider, CUDA)), None)
        if cuda is not self._providers[0] and cuda is not None:  # behind TensorRT it runs but a part
            if cuda.graphs:
                raise ProviderError("CUDA(graphs=True) was asked for behind another provider; it has to come first.")
            providers[CUDA.registered_as].pop(CAPTURES, None)
        try:
            model = bytes(files.pop(self.path.name)) if files else self.path
            if files:
                data = [np.frombuffer(content, np.uint8) for content in files.values()]
                options.add_external_initializers_from_files_in_memory(list(files), data, [len(one) for one in data])
            inner = partial(
                _inference_session if self._flash_attention else _without_flash_attention,
                model,
                options,
                disabled_optimizers=list(self._disabled) or None,
                enable_fallback=0,
            )
            self.captures = CAPTURES in providers.get(CUDA.registered_as, {})
            try:
                return inner(providers=list(providers.items()) or None)
            except Exception as error:
                if cuda is None or cuda.graphs or _NO_CAPTURE not in str(error):
                    raise
                del providers[CUDA.registered_as][CAPTURES]  # it was not asked for by name
                self.captures = False
                return inner(providers=list(providers.items()) or None)
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            if refused := refusal(error, self._providers):
                raise refused from error
            if any(not isinstance(provider, CPU) for provider in self._providers):
                raise ProviderError(
                    f"ONNX Runtime cannot open {self.path} on {', '.join(item.name for item in self._providers)}: "
                    f"{_one_line(error)}"
                ) from error
            if "is not a registered function/op" in str(error) or "NOT_IMPLEMENTED" in str(error):
                what = "has operators that this ONNX Runtime does not have"
            else:
                what = "is corrupt or not a model that this ONNX Runtime reads"
            raise ArtifactError(f"{self.path} {what}: {_one_line(error)}") from error

    def _engine_key(self) -> str:
        """What tells this model's cached engines from another's, where engines are cached."""
        if self._cache_key is None and any(getattr(provider, "cache_folder", None) for provider in self._providers):
            with self.path.open("rb") as file:
                self._cache_key = hashlib.file_digest(file, "sha256").hexdigest()
        return self._cache_key or ""


class Binding:
    """Preallocated inputs and outputs: what is written into a bound input array is what the next run reads.

    Not for several threads at once: make a binding for each. copies: numpy inputs are copied to a card when they are bound, and have
    to be again for each run.
    """

    def __init__(self, session: Session, inner: Any, options: Any = None, *, copies: bool = False) -> None:
        self._session = session
        self._inner = inner
        self._options = options
        self._copies = copies
        self._binding = inner.io_binding()
        self._inputs: dict[str, np.ndarray[Any, Any]] = {}
        self._outputs: dict[str, np.ndarray[Any, Any]] = {}
        self._kept: dict[str, DeviceArray] = {}

    def bind_input(self, name: str, array: np.ndarray[Any, Any] | DeviceArray) -> None:
        """Bind a contiguous array, which is not copied. Raises InputError."""
        if isinstance(array, DeviceArray):
            self._kept[name] = array
            bind(self._binding.bind_input, name, array)
            return
        _check_bindable(name, array, self._session.input_names)
        self._inputs[name] = array
        self._binding.bind_cpu_input(name, array)

    def bind_output(self, name: str, array: np.ndarray[Any, Any] | DeviceArray) -> None:
        """Bind a contiguous array that receives an output. Raises InputError."""
        if isinstance(array, DeviceArray):
            self._kept[name] = array
            bind(self._binding.bind_output, name, array)
            return
        _check_bindable(name, array, self._session.output_names)
        if not array.flags.writeable:
            raise InputError(f"The array for {name} is read-only, so it cannot receive an output: use a copy.")
        self._outputs[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self, *, check: bool = True) -> dict[str, np.ndarray[Any, Any]]:
        """Answer what is in the bound inputs, in the bound outputs' own arrays. Raises InputError.

        check: whether the inputs fit the signature; not needed where the caller knows it, not done where some are on a card.
        """
        if check and not self._kept:
            self._session.check(self._inputs)
        try:
            if isinstance(self._session.memory, HostMemory):
                self._inner.run_with_iobinding(self._binding, self._options)
            else:
                with ON_CARD:
                    for name, array in self._inputs.items() if self._copies else ():
                        self._binding.bind_cpu_input(name, array)
                    self._inner.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            if refused := refusal(error, self._session._providers):
                raise refused from error
            raise InputError(f"ONNX Runtime refuses the bound arrays: {_one_line(error)}") from error
        return dict(self._outputs)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_bindable(name: str, array: Any, names: Sequence[str]) -> None:
    if name not in names:
        raise InputError(f"{name!r} was bound; there are: {', '.join(names)}.")
    if not isinstance(array, np.ndarray) or not array.dtype.isnative:
        kind = array.dtype.str if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise InputError(f"{kind} was bound to {name}; only a numpy array in this machine's byte order can be bound.")
    if not array.flags.c_contiguous:
        raise InputError(f"The array for {name} is not contiguous, so it cannot be bound: numpy.ascontiguousarray.")


def _check_array(spec: TensorSpec, array: Any, signature: Signature, sizes: dict[str, tuple[int, str]]) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"Input {spec.name} is a {type(array).__name__}; the model takes a numpy array: {spec}.")
    if spec.dtype != "str" and array.dtype.name != spec.dtype:
        raise InputError(
            f"Input {spec.name} has dtype {array.dtype.name}; the model takes {spec}: use .astype(numpy.{spec.dtype})."
        )
    if not array.dtype.isnative:  # ONNX Runtime would read the bytes in the wrong order, without an error
        raise InputError(f"Input {spec.name} is {array.dtype.str}; the model takes this machine's byte order.")
    if array.ndim != len(spec.shape):
        raise InputError(f"Input {spec.name} has shape {list(array.shape)}; the model takes {spec}.")
    for axis, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise InputError(f"Input {spec.name} has shape {list(array.shape)}; the model takes {spec}.")
            continue
        low, high = signature.axes.get(axis, (0, 2**62))
        if not low <= size <= high:
            raise InputError(f"Input {spec.name} has {axis} {size}; the model takes {low} to {high}.")
        first, owner = sizes.setdefault(axis, (size, spec.name))
        if first != size:
            raise InputError(f"Input {spec.name} has {axis} {size} and {owner} has {first}; they have to agree.")
    if spec.right_padded and not (np.all(array[:, :1] == 1) and np.all(array[:, 1:] <= array[:, :-1])):
        raise InputError(
            f"Input {spec.name} has rows that are not ones and then zeros; this artifact takes texts of at least one token, padded on "
            "the right."
        )
    if spec.bounds is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < spec.bounds[0] or high > spec.bounds[1]:
            raise InputError(
                f"Input {spec.name} has values from {low} to {high}; the model takes {spec.bounds[0]} to {spec.bounds[1]}."
            )


def _inference_session(*arguments: Any, **options: Any) -> Any:
    with _ENVIRONMENT:  # as it is for this session, not for one that opens beside it
        return _open_inference_session(*arguments, **options)


def _without_flash_attention(*arguments: Any, **options: Any) -> Any:
    """As `_inference_session`; what the user has set in the environment stays as it is."""
    with _ENVIRONMENT:
        if _FLASH in os.environ:
            return _open_inference_session(*arguments, **options)
        os.environ[_FLASH] = "1"
        try:
            return _open_inference_session(*arguments, **options)
        finally:
            del os.environ[_FLASH]


def _open_inference_session(*arguments: Any, **options: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(*arguments, **options)


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
