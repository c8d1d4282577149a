"""onnxruntime-genai with the model that its own builder makes, int4."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from measure import THREADS, Setting


def open_peer(variant: str, setting: Setting) -> Peer:
    return Peer(built(setting.model, setting.cache))


def built(model: Path, cache: Path) -> Path:
    """The builder's folder, made where it is not there."""
    folder = cache / "genai-int4"
    if not (folder / "genai_config.json").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model), "-o", str(folder)]
        command += ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        subprocess.run(command, check=True)
    return folder


class Peer:
    def __init__(self, folder: Path) -> None:
        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
        self.model = genai.Model(config)
        self.description = f"onnxruntime-genai {genai.__version__}, int4, block 32"

    def generate(self, prompt: list[int], count: int) -> dict[str, float]:
        length = len(prompt) + count + 1
        options = genai.GeneratorParams(self.model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(self.model, options)
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        return {"prompt_seconds": first - start, "token_seconds": (time.perf_counter() - first) / count}
