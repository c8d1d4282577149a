"""OpenVINO GenAI with the model that optimum-intel makes, int4 in groups of 64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
from measure import THREADS, Setting


def open_peer(variant: str, setting: Setting) -> Peer:
    folder = setting.cache / "openvino-int4"
    if not (folder / "openvino_tokenizer.xml").exists():
        command = [
            str(Path(sys.executable).with_name("optimum-cli")),
            "export",
            "openvino",
            "--model",
            str(setting.model),
        ]
        command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64"]
        command += ["--ratio", "1.0", "--sym", str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return Peer(folder)


class Peer:
    def __init__(self, folder: Path) -> None:
        self.pipe = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=THREADS)
        self.description = f"OpenVINO GenAI {openvino_genai.__version__}, int4, groups of 64"

    def generate(self, prompt: list[int], count: int) -> dict[str, float]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count + 1, True, False
        ids, mask = np.array([prompt], np.int64), np.ones((1, len(prompt)), np.int64)
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask))
        measured = self.pipe.generate(inputs, config).perf_metrics
        return {
            "prompt_seconds": measured.get_ttft().mean / 1000,
            "token_seconds": measured.get_tpot().mean / 1000,
        }
