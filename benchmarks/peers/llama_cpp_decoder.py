"""llama.cpp through llama-cpp-python: the same model as GGUF, quantized by llama.cpp itself."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp
from measure import THREADS, Setting

from peers import gguf_file

_KINDS = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
_CONTEXT = 2048


def open_peer(variant: str, setting: Setting) -> Peer:
    return Peer(quantized(setting.model, setting.cache, variant))


def quantized(model: Path, cache: Path, kind: str) -> Path:
    """The GGUF file of a model in one of llama.cpp's forms, made where it is not there."""
    path = cache / f"{kind}.gguf"
    if not path.exists():
        whole = cache / "f16.gguf"
        if not whole.exists():
            gguf_file.write(model, whole)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = _KINDS[kind], THREADS
        part = path.with_suffix(".part")
        if llama_cpp.llama_model_quantize(bytes(whole), bytes(part), ctypes.byref(options)):
            raise SystemExit(f"llama.cpp does not quantize {whole}.")
        part.rename(path)
    return path


class Peer:
    def __init__(self, path: Path) -> None:
        self.model = llama_cpp.Llama(
            str(path), n_ctx=_CONTEXT, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
        )
        self.description = f"llama.cpp by llama-cpp-python {llama_cpp.__version__}, {path.stem}"

    def generate(self, prompt: list[int], count: int) -> dict[str, float]:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompt)
        first = time.perf_counter()
        for index in range(count):
            self.model.eval([prompt[index % len(prompt)]])  # greedy choices would cost the same and nothing is sampled
        return {"prompt_seconds": first - start, "token_seconds": (time.perf_counter() - first) / count}
