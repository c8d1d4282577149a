"""Quality on the STS benchmark: Spearman of PyTorch and of artifacts, and the cosine between their embeddings.

    python benchmarks/sts.py --model FOLDER --artifact DIR [DIR …] --data PAIRS.csv [--json FILE]

PAIRS.csv: sentence1, sentence2, score, without a header. The original is the model's own forward pass in float32 with
transformers alone, pooled as the sentence-transformers folder says; no line of onnxpress takes part in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import report
import torch
import turns
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

import onnxpress
from onnxpress.runtime import Embedder

Vectors = npt.NDArray[np.float32]  # (texts, dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, required=True, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs = turns.read_pairs(arguments.data)
    texts = [first for first, _, _ in pairs] + [second for _, second, _ in pairs]
    gold = [score for _, _, score in pairs]

    original = embed_with_transformers(arguments.model, texts)
    figures = {"PyTorch fp32": compare(original, original, gold)}
    for path in arguments.artifact:
        runner = onnxpress.load(path)
        if not isinstance(runner, Embedder):
            sys.exit(f"{path} is no embedding model.")
        figures[f"onnxpress {path.name}"] = compare(runner.embed(texts), original, gold)

    rows = {
        name: [f"{row['spearman']:.2f}", f"{row['mean_cosine']:.4f}", f"{row['min_cosine']:.4f}"]
        for name, row in figures.items()
    }
    report.show(
        f"{arguments.data.stem}, {len(pairs)} pairs", rows, ["Spearman x 100", "mean cosine", "smallest cosine"]
    )
    report.save(arguments.json, {"data": arguments.data.name, "pairs": len(pairs), "figures": figures})


def compare(vectors: Vectors, original: Vectors, gold: list[float]) -> dict[str, float]:
    """Spearman of the pairs' cosines with the scores, and how near each vector is to the original's."""
    half = len(gold)
    to_original = cosine(vectors, original)
    return {
        "spearman": 100 * float(spearmanr(cosine(vectors[:half], vectors[half:]), gold).statistic),
        "mean_cosine": float(to_original.mean()),
        "min_cosine": float(to_original.min()),
    }


def cosine(a: Vectors, b: Vectors) -> npt.NDArray[np.float64]:
    """Row by row, (texts,)."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    result: npt.NDArray[np.float64] = (a64 * b64).sum(1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))
    return result


def embed_with_transformers(folder: Path, texts: list[str]) -> Vectors:
    pooling = read_json(folder / "1_Pooling" / "config.json")
    mean, first = pooling.get("pooling_mode_mean_tokens"), pooling.get("pooling_mode_cls_token")
    if bool(mean) == bool(first):
        sys.exit(f"{folder} pools neither by the mean nor by the first token alone; this benchmark knows those two.")
    max_length = read_json(folder / "sentence_bert_config.json")["max_seq_length"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    parts = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state  # (batch, length, dim)
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        parts.append((states * mask).sum(1) / mask.sum(1) if mean else states[:, 0])
    vectors: Vectors = torch.cat(parts).numpy()
    return vectors


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"{path} is missing: {error.strerror}. --model takes a sentence-transformers folder.")


if __name__ == "__main__":
    main()
