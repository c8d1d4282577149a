"""Inputs and outputs of a session in arrays that stay where they are from run to run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxpress.errors import InputError
from onnxpress.runtime.device import ON_CARD, DeviceArray, HostMemory
from onnxpress.runtime.feeds import check_bindable

if TYPE_CHECKING:
    from onnxpress.runtime.session import Session


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
            array.bind(self._binding.bind_input, name)
            return
        check_bindable(name, array, self._session.input_names)
        self._inputs[name] = array
        with ON_CARD if self._copies else contextlib.nullcontext():
            self._binding.bind_cpu_input(name, array)

    def bind_output(self, name: str, array: np.ndarray[Any, Any] | DeviceArray) -> None:
        """Bind a contiguous array that receives an output. Raises InputError."""
        if isinstance(array, DeviceArray):
            self._kept[name] = array
            array.bind(self._binding.bind_output, name)
            return
        check_bindable(name, array, self._session.output_names)
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
            raise self._session.refused(error, "the bound arrays") from error
        return dict(self._outputs)
