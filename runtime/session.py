"""The one place that runs ONNX Runtime: exactly the providers asked for, inputs checked, errors in plain words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import InputError, OnnxpressError, ProviderError
from onnxpress.manifest import Arrays, Signature
from onnxpress.runtime import bfloat16
from onnxpress.runtime.binding import Binding
from onnxpress.runtime.cuda import CUDA
from onnxpress.runtime.device import ON_CARD, DeviceMemory, HostMemory, device_memory
from onnxpress.runtime.feeds import check_feeds, declared_signature
from onnxpress.runtime.opening import Opening, left_on_cpu, placement
from onnxpress.runtime.openvino import OpenVINO
from onnxpress.runtime.providers import CPU, Provider, check_provider, make_providers, one_line, refusal
from onnxpress.runtime.replay import (
    MOST_GRAPHS,
    NO_GRAPH,
    Buffers,
    Key,
    bytes_of,
    can_be_replayed,
    run_options,
    shapes_of,
)
from onnxpress.runtime.tensorrt import TensorRT
from onnxpress.runtime.wheel import check_wheel

_MOST_SHAPES = 10_000  # that a session remembers to have seen
# Bytes of inputs and outputs that are kept on a card; with more, the launches do not matter.
_LARGEST_BUFFERS = 64 * 2**20


class Session:
    """An ONNX model, open on the providers that were asked for.

    path: model.onnx. content: gives the model's files by name (model.onnx, and its data) in the place of those on disk, as often as it
    is opened. signature: what inputs are checked against; without it, what the file declares. providers:
    names ("cpu", "cuda", "tensorrt") or options (CPU(threads=2)), in order. allow_fallback: take what loads;
    `fallback_note` then says what did not. disabled_optimizers: names of ONNX Runtime's graph optimizers. exact_products: whether x86
    CPUs keep from faster kernels for signed weights of 8 bits, whose 16-bit sums overflow. flash_attention: whether the CPU provider's
    GroupQueryAttention may take its tiled kernel for prompts. prepacking: whether weights are copied into the form that is fastest to
    multiply; 4-bit weights are slow without. as_written: nodes run in the file's order, and none is computed ahead, fused or replaced.
    half_floats: whether OpenVINO may compute floats in half precision, where the processor has it.
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
        prepacking: bool = True,
        as_written: bool = False,
        half_floats: bool = False,
        cache_key: str | None = None,
    ) -> None:
        check_wheel()
        given = make_providers(providers)
        if content is not None and any(one.writes_engines for one in given if isinstance(one, TensorRT)):
            raise ProviderError(
                "An engine on disk would hold an encrypted model in plain: leave cache_folder, ep_context and raw options of "
                "caches and dumps out."
            )
        self.path = Path(path)
        self._allow_fallback = allow_fallback
        self.fallback_note = ""
        self._opening = Opening(
            path=self.path,
            content=content,
            signature=signature,
            providers=self._loadable(given),
            disabled_optimizers=tuple(disabled_optimizers),
            exact_products=exact_products,
            flash_attention=flash_attention,
            prepacking=prepacking,
            as_written=as_written,
            half_floats=half_floats,
            cache_key=cache_key,
        )
        self._session, captures = self._opening.open()
        self._one_thread: Any = None
        self._one_thread_lock = threading.Lock()
        self._providers = self._taken()
        self.providers = tuple(provider.name for provider in self._providers)
        self.signature = signature or declared_signature(self._session)
        self._has_bfloat16 = bfloat16.has_bfloat16(self.signature)
        self._outputs = [output.name for output in self._session.get_outputs()]
        first = self._providers[0]
        self.memory: HostMemory | DeviceMemory = (
            device_memory(first.device_id) if isinstance(first, CUDA) else HostMemory()
        )
        # Whether runs can be captured as CUDA graphs.
        self.captures = captures and isinstance(first, CUDA)
        # Whether `run` answers shapes that come again by a CUDA graph.
        self.replays = self.captures and can_be_replayed(self._session, self.signature)
        self._graphs_made = 0
        self._seen: dict[Key, Buffers | None] = {}
        self._too_large: set[Key] = set()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that `run` takes."""
        return tuple(spec.name for spec in self.signature.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names that `run` gives."""
        return tuple(self._outputs)

    @property
    def on_cpu(self) -> bool:
        """Whether everything runs on this machine's CPU."""
        on_cpu = (
            isinstance(one, CPU) or (isinstance(one, OpenVINO) and one.device == "CPU") for one in self._providers
        )
        return all(on_cpu)

    @property
    def threads(self) -> int:
        """Cores that `run` works on."""
        return self._opening.threads

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch. Raises InputError where an input does not fit the signature.

        Inputs and outputs of bfloat16, which numpy does not have, are float32. On a card, shapes that come again are
        answered from buffers that stay there, by a CUDA graph.
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
                raise self.refused(error, _described(feeds)) from error
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
        if not can_be_replayed(self._session, self.signature):
            raise ProviderError(
                f"{self.path} reads inputs on the CPU, or answers shapes that hang on values: its buffers cannot stay on the card."
            )
        graph = None
        if self.captures:
            number = self.next_graph()
            graph = NO_GRAPH if number is None else str(number)
        try:
            return Buffers(self._session, self.memory, feeds, self._outputs, graph)
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise self.refused(error, _described(feeds)) from error

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

    def run_on_one_thread(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """As `run`, but the calling thread does all the work; a second copy of packed weights is made for it."""
        self.check(feeds)
        with self._one_thread_lock:
            if self._one_thread is None:
                self._one_thread, _ = self._opening.open(one_thread=True)
        return self._run(self._one_thread, feeds, run_options(NO_GRAPH) if self.captures else None)

    def check(self, feeds: Arrays) -> None:
        """Raise InputError where names, dtypes, shapes or integer values do not fit the signature."""
        sizes = check_feeds(feeds, self.signature)
        for provider in self._providers:
            if isinstance(provider, TensorRT):
                provider.check_sizes(sizes)
            elif isinstance(provider, OpenVINO):
                provider.check_inputs(feeds)

    def binding(self, graph: int | None = None) -> Binding:
        """Inputs and outputs bound to buffers that stay where they are from run to run; graph: the number of its CUDA graph."""
        options = None
        if self.captures:
            options = run_options(NO_GRAPH if graph is None else str(graph))
        return Binding(self, self._session, options, copies=graph is None and isinstance(self.memory, DeviceMemory))

    def placement(self) -> dict[str, str]:
        """Which provider runs each node, after ONNX Runtime's own fusions: {node: provider}."""
        inner, _ = self._opening.open(record_placement=True)
        return placement(inner)

    def refused(self, error: Exception, what: str) -> OnnxpressError:
        """What an error of a run means; what: the arrays that it was given."""
        if isinstance(error, OnnxpressError):
            return error
        return refusal(error, self._providers) or InputError(f"ONNX Runtime refuses {what}: {one_line(error)}")

    def _buffers_for(self, feeds: Arrays) -> Buffers | None:
        """Buffers for shapes that were seen before; None where a plain run is better, or all that there is."""
        if not self.replays:
            return None
        key = shapes_of(feeds)
        if key in self._too_large:
            return None
        if key not in self._seen:
            if len(self._seen) < _MOST_SHAPES:
                self._seen[key] = None
            return None
        buffers = self._seen[key]
        if buffers is None and self._graphs_made < MOST_GRAPHS and bytes_of(feeds, self.signature) <= _LARGEST_BUFFERS:
            try:
                buffers = self._seen[key] = self.buffers(feeds)
            except ProviderError:  # no memory for them: a plain run needs less
                self._too_large.add(key)
        return buffers

    def _run(self, session: Any, feeds: Arrays, options: Any = None) -> dict[str, np.ndarray[Any, Any]]:
        try:
            if self._has_bfloat16:
                found = bfloat16.run(session, self._outputs, feeds, self.signature, options)
            else:
                found = session.run(self._outputs, dict(feeds), options)
            return dict(zip(self._outputs, found, strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise self.refused(error, _described(feeds)) from error

    def _loadable(self, providers: tuple[Provider, ...]) -> tuple[Provider, ...]:
        """Those whose libraries and cards are there; the CPU where none is. Raises ProviderError where that may not be."""
        loaded: list[Provider] = []
        for provider in providers:
            try:
                check_provider(provider)
                loaded.append(provider)
            except ProviderError as error:
                if not self._allow_fallback:
                    raise
                self._note(str(error))
        return tuple(loaded) or (CPU(),)

    def _taken(self) -> tuple[Provider, ...]:
        """The providers that ONNX Runtime has opened the model on. Raises ProviderError for others than were asked for."""
        asked, got = self._opening.providers, self._session.get_providers()
        taken = tuple(provider for provider in asked if provider.registered_as in got) or (CPU(),)
        if missing := [provider.name for provider in asked if provider.registered_as not in got]:
            note = f"ONNX Runtime did not take the provider {', '.join(missing)}; it took {', '.join(got)}."
            if not self._allow_fallback:
                raise ProviderError(f"{note} Run `onnxpress doctor`, or allow the fallback.")
            self._note(note)
        names = [provider.name for provider in taken]
        if left := "" if CPU.name in names else left_on_cpu(self._session):
            note = f"{left} would run on the CPU: {', '.join(names)} has no kernel for them in this graph."
            if not self._allow_fallback:
                raise ProviderError(
                    f"{note} Build for this target (onnxpress build --target {names[0]}), or allow it: providers "
                    f"{', '.join((*names, CPU.name))}."
                )
            self._note(note)
        return taken

    def _note(self, what: str) -> None:
        self.fallback_note = f"{self.fallback_note} {what}".lstrip()


def _described(feeds: Arrays) -> str:
    return f"the inputs ({', '.join(f'{name} {list(array.shape)}' for name, array in feeds.items())})"
