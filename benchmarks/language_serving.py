"""A language model's artifact alone: batches of unequal prompts, the second turn of a chat, and steps of several tokens.

    python benchmarks/language_serving.py --artifact DIR [--rounds 5] [--json FILE]

Batches: 4 and 16 prompts of 16 to 128 random tokens in one call, 32 new tokens each, against the same prompts one after the other;
total new tokens a second, and how many answers are the same token for token. Second turn: the time to the first token after a
history of 900 tokens and 20 new ones, with the history in the cache and without. Steps: what one over several tokens of a text takes,
beside one over a single token, 128 tokens into the text: what guesses (prompt lookup) cost, and could gain if all came true.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report

import onnxpress
from onnxpress.runtime import Generator
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep

NEW, HISTORY, TURN = 32, 900, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = report.facts()
    generator = onnxpress.load(arguments.artifact, verify=False)
    assert isinstance(generator, Generator), f"{arguments.artifact} is no language model"
    generator.generate([[5, 6, 7]], max_new_tokens=2)
    rows: dict[str, list[float]] = {}
    random = np.random.default_rng(0)
    same: dict[int, list[int]] = {4: [], 16: []}
    for _ in range(arguments.rounds):
        for count, found in same.items():
            prompts = [random.integers(5, 4000, random.integers(16, 129)).tolist() for _ in range(count)]

            def answer(batch: list[list[int]]) -> list[list[int]]:
                generator.reset()
                return [item.token_ids for item in generator.generate(batch, max_new_tokens=NEW, ignore_eos=True)]

            seconds, together = timed(lambda prompts=prompts, answer=answer: answer(prompts))
            rows.setdefault(f"{count} prompts together, tokens/s", []).append(count * NEW / seconds)
            seconds, alone = timed(lambda prompts=prompts, answer=answer: [answer([prompt])[0] for prompt in prompts])
            rows.setdefault(f"{count} prompts one by one, tokens/s", []).append(count * NEW / seconds)
            found.append(sum(one == other for one, other in zip(together, alone, strict=True)))
        history = random.integers(5, 4000, HISTORY).tolist()
        turn = history + random.integers(5, 4000, TURN).tolist()
        generator.reset()
        seconds, _ = timed(lambda turn=turn: generator.generate([turn], max_new_tokens=1, ignore_eos=True))
        rows.setdefault("second turn, cold, s", []).append(seconds)
        generator.reset()
        generator.generate([history], max_new_tokens=1, ignore_eos=True)
        seconds, answers = timed(lambda turn=turn: generator.generate([turn], max_new_tokens=1, ignore_eos=True))
        assert answers[0].cached_tokens == HISTORY
        rows.setdefault("second turn, history in the cache, s", []).append(seconds)
        for count, seconds in steps(generator, history[:128]).items():
            rows.setdefault(f"step of {count} tokens, ms", []).append(1000 * seconds)
    table = {name: [report.spread(values)] for name, values in rows.items()}
    for count, equal in same.items():
        table[f"{count} prompts: equal answers, together and alone"] = [f"{sum(equal)} of {count * len(equal)}"]
    report.show(arguments.artifact.name, table, [""])
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "rounds": rows, "equal": same})


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the answer, after a pause in which spinning threads fall asleep."""
    time.sleep(0.1)
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def steps(generator: Generator, prompt: list[int]) -> dict[int, float]:
    """Median seconds of a step of so many tokens, each of them answered, after the prompt."""
    cache = KeyValueCache(generator.session.signature.inputs, context=generator.context, budget=2**30)
    step = ModelStep(generator.session, cache)
    step.run(0, [prompt])
    found: dict[int, float] = {}
    for count in (1, 2, 3, 5, 9):
        times = []
        for _ in range(12):
            start = time.perf_counter()
            step.run(0, [prompt[:count]], [count])
            times.append(time.perf_counter() - start)
            cache.truncate(0, len(prompt))
        found[count] = statistics.median(times[2:])
    return found


if __name__ == "__main__":
    main()
