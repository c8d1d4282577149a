"""The comparison of graphs with the original, as the task asks for."""

from __future__ import annotations

from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.exporters import DecoderParityCheck, Exported, ParityCheck, ParityRow
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session

_PARITY_CACHE = 2**32  # bytes of keys and values while a graph is compared


class Parity:
    """The comparison with the original that suits the task: of single answers, or step by step."""

    def __init__(self, exported: Exported) -> None:
        self._context = exported.options.get("max_length", 0)
        self._inner = (
            DecoderParityCheck(exported)
            if exported.graph.signature.task == DecoderWorkload.task
            else ParityCheck(exported)
        )
        self.notes = self._inner.notes

    def check(self, session: Session) -> list[ParityRow]:
        """One row a comparison. Raises ParityError."""
        if isinstance(self._inner, ParityCheck):
            return self._inner.check(session)

        def with_an_empty_cache() -> ModelStep:
            return ModelStep(
                session,
                KeyValueCache(
                    session.signature.inputs, context=self._context, budget=_PARITY_CACHE, memory=session.memory
                ),
            )

        return self._inner.check(with_an_empty_cache)
