"""llama.cpp's logits for given tokens: KIND --model FOLDER --cache FOLDER --windows FILE --out FILE."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_cpp import Llama

from peers.llama_cpp_decoder import quantized

parser = argparse.ArgumentParser()
parser.add_argument("kind")
for name in ("model", "cache", "windows", "out"):
    parser.add_argument(f"--{name}", type=Path, required=True)
arguments = parser.parse_args()
path = quantized(arguments.model, arguments.cache, arguments.kind)
model = Llama(str(path), n_ctx=1024, n_batch=512, logits_all=True, verbose=False)
logits = {}
for index, window in enumerate(json.loads(arguments.windows.read_text())):
    model.reset()
    model.eval(window)
    logits[str(index)] = model.scores[: len(window)].copy()
np.savez(arguments.out, bytes=path.stat().st_size, **logits)
