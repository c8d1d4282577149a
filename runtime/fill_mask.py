"""What may stand at a mask (task fill-mask)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.text_runner import TextRunner, check_count, softmax
from onnxpress.runtime.tokenization import Sample, check_samples


class FillMask(TextRunner):
    """Candidates for the mask token of a text."""

    task = "fill-mask"
    one_answer_a_token = True

    def predict(self, texts: Sequence[str], *, top_k: int = 5) -> list[list[list[dict[str, Json]]]]:
        """For each text, for each of its masks, up to top_k candidates, best first: token, token_id, score, sequence.

        sequence is the text with this mask filled and the others left. Raises InputError for a text without a mask.
        """
        check_count(top_k)
        check_samples(texts)
        mask = str(self.options["mask_token"])
        mask_id = self.tokenizer.inner.token_to_id(mask)
        for index, text in enumerate(texts):
            if not isinstance(text, str) or mask not in text:
                raise InputError(f"Text {index} has no mask: write {mask} where a word is to be found.")
        encodings = self.encode(texts)
        answers = self.run_encodings(encodings)
        found = []
        for text, encoding, answer in zip(texts, encodings, answers, strict=True):
            places = [place for place, token in enumerate(encoding.ids) if token == mask_id]
            if not places:
                raise InputError(f"The mask is behind token {self.tokenizer.max_length}, where the text was cut.")
            found.append(
                [
                    # A mask token may take the space before it with it, so its offset is only where to look.
                    self._candidates(text, text.index(mask, encoding.offsets[place][0]), answer["logits"][place], top_k)
                    for place in places
                ]
            )
        return found

    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """The candidates for each mask of each text."""
        return list(self.predict(list(samples), top_k=5 if top_k is None else top_k))  # type: ignore[arg-type]

    def _candidates(self, text: str, start: int, logits: np.ndarray, top_k: int) -> list[dict[str, Json]]:
        probabilities = softmax(logits.astype(np.float64))  # (vocabulary,)
        end = start + len(self.options["mask_token"])
        inner = self.tokenizer.inner
        rows: list[dict[str, Json]] = []
        for token_id in map(int, np.argsort(probabilities)[::-1]):
            if inner.id_to_token(token_id) is None:  # models round their vocabulary up
                continue
            token = inner.decode([token_id]).strip() or inner.id_to_token(token_id)
            sequence = text[:start] + token + text[end:]
            rows.append(
                {"token": token, "token_id": token_id, "score": float(probabilities[token_id]), "sequence": sequence}
            )
            if len(rows) == top_k:
                break
        return rows
