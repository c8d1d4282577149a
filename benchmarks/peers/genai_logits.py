"""Logits of the model that onnxruntime-genai's builder makes, for given tokens, on ONNX Runtime.

KIND --model FOLDER --cache FOLDER --windows FILE --out FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers.genai_decoder import built

parser = argparse.ArgumentParser()
parser.add_argument("kind")
for name in ("model", "cache", "windows", "out"):
    parser.add_argument(f"--{name}", type=Path, required=True)
arguments = parser.parse_args()
folder = built(arguments.model, arguments.cache)
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
config = json.loads((arguments.model / "config.json").read_text())
head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
past = {
    item.name: np.zeros((1, item.shape[1], 0, head), np.float32)
    for item in session.get_inputs()
    if item.name.startswith("past_key_values")
}
logits = {}
for index, window in enumerate(json.loads(arguments.windows.read_text())):
    ids = np.array([window], np.int64)
    logits[str(index)] = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0][0]
size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
np.savez(arguments.out, bytes=size, **logits)
