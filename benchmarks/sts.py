"""Quality on the STS benchmark: Spearman of PyTorch and of artifacts, and the cosine between their embeddings.

    python benchmarks/sts.py MODEL_FOLDER PAIRS.csv ARTIFACT [ARTIFACT …]

PAIRS.csv: sentence1, sentence2, score, without a header. The original is the model's own forward pass in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import onnxpress
from onnxpress.evaluation import read_samples
from onnxpress.exporters import export
from onnxpress.metrics import similarity_scores
from onnxpress.runtime import Embedder
from onnxpress.runtime.tokenization import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    arguments = parser.parse_args()
    samples = read_samples(arguments.pairs, "feature-extraction", {"text": 0, "text_pair": 1, "label": 2})
    gold = [sample.label for sample in samples]
    texts = [sample.text for sample in samples] + [str(sample.text_pair) for sample in samples]

    exported = export(str(arguments.model), task="feature-extraction")
    tokenizer = Tokenizer.from_folder(
        arguments.model, max_length=exported.options["max_length"], pad_token_id=exported.options["pad_token_id"]
    )
    original = Embedder(exported.reference, tokenizer, exported.options).embed(texts)
    runners = {str(path): onnxpress.load(path) for path in arguments.artifacts}
    print("| system | Spearman x 100 | mean cosine | smallest |")
    print("|---|---|---|---|")
    for name, vectors in {
        "PyTorch fp32": original,
        **{name: runner.embed(texts) for name, runner in runners.items()},
    }.items():
        half = len(samples)
        spearman = similarity_scores(vectors[:half], vectors[half:], gold)["spearman"]
        cosine = (vectors * original).sum(1) / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(original, axis=1))
        print(f"| {name} | {spearman:.2f} | {cosine.mean():.4f} | {cosine.min():.4f} |", flush=True)


if __name__ == "__main__":
    main()
