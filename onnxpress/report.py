"""The report: one HTML page with tables and plots, readable without a network, in light and dark.

Everything that comes from outside (names, notes, versions) is escaped. Parts that were not measured are left out.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

from onnxpress.figures import megabytes
from onnxpress.manifest import Json, Manifest
from onnxpress.plots import curve_plot, latency_plot, operator_plot, quality_plot, size_plot
from onnxpress.recipe import DistilSection

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --soft: #586374; --line: #dde2e9; --paper: #ffffff; --panel: #f5f7fa;
  --accent: #2f62c9; --muted: #a9b3c1; --good: #17693f; --good-paper: #e3f4ea; --warn: #8a5800; --warn-paper: #fdf1d8;
  --bad: #a8200f; --bad-paper: #fde8e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a3adbb; --line: #303946; --paper: #12161c;
  --panel: #1a2029; --accent: #7ea6f7; --muted: #576375; --good: #6fd3a0; --good-paper: #15301f; --warn: #e7b95a;
  --warn-paper: #33270d; --bad: #f59a90; --bad-paper: #3a1a16; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { margin: 0 auto; max-width: 66rem; padding: 2.8rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 0.9rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.5rem; }
p { margin: 0.4rem 0; } .soft { color: var(--soft); } .kicker { color: var(--soft); font-size: 0.9rem; margin: 0 0 0.3rem; }
.verdict { display: flex; flex-wrap: wrap; gap: 0.4rem 0.8rem; align-items: baseline; margin: 1rem 0 0; font-size: 1.05rem; }
.badge { border-radius: 99px; padding: 0.05rem 0.65rem; font-size: 0.85rem; font-weight: 600; white-space: nowrap; }
.kept { color: var(--good); background: var(--good-paper); } .repaired { color: var(--warn); background: var(--warn-paper); }
.undone, .failed { color: var(--bad); background: var(--bad-paper); } .unchanged, .lost { color: var(--soft); background: var(--panel); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 0.9rem; margin: 1.6rem 0 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 0.9rem 1.1rem; }
.tile dt { color: var(--soft); font-size: 0.88rem; } .tile dd { margin: 0; }
.tile .value { font-size: 1.6rem; font-weight: 600; line-height: 1.35; letter-spacing: -0.01em; }
.tile .value, .number { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 0.5rem 1.1rem 0.5rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { color: var(--soft); font-weight: 500; font-size: 0.86rem; white-space: nowrap; } th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; } td code { white-space: nowrap; }
tr.quiet td { color: var(--soft); padding-top: 0.3rem; padding-bottom: 0.3rem; }
.why { min-width: 17rem; } .why ul { margin: 0.2rem 0 0; padding-left: 1.1rem; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2.2rem 2.5rem; }
.stack { display: grid; gap: 2.2rem; align-content: start; } figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; }
.scroll > svg { min-width: 38rem; }
svg text { font-family: system-ui, sans-serif !important; }
code, pre { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; font-size: 0.9em; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.6rem 0; }
details { margin: 0.8rem 0; } summary { cursor: pointer; color: var(--accent); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.4rem; margin: 0; font-size: 0.95rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
@media print { details > * { display: block; } .scroll { overflow: visible; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""
_METRICS = {
    "cosine_mean": "mean cosine",
    "top1_agreement": "same answer",
    "variance_kept": "variance kept",
    "span_agreement": "same span",
    "spearman": "Spearman",
    "entity_f1": "entity F1",
    "f1": "F1",
}
_SYSTEMS = {"PyTorch": "PyTorch", "export": "plain export", "artifact": "this artifact"}
_CURVE_NOTE = (
    "Along a line more and more places stay, those first that cost most. The full mark is what this artifact is"
)
_CURVE_TIMES = "; time is each plan's in turns with float, the mean over the shapes"
_TAKEN = ("kept", "repaired")  # statuses of rows that are part of the artifact
_SPEED_NOTE = "Medians of one call in milliseconds; shorter is faster. Each panel has its own scale."


def render_report(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    """The page. measured may lack parts (a build that timed nothing)."""
    kind = f"{manifest.task} · {manifest.target} · {manifest.precision}"
    parts = [
        '<header><p class="kicker">onnxpress report</p>',
        f'<h1>{_text(manifest.name)}</h1><p class="soft">{_text(kind)}</p>',
        _verdict(manifest, measured),
        _tiles(manifest, measured),
        "</header><h2>What each pass did</h2>",
        _ledger(manifest, measured),
        *_curve(manifest, measured),
        "<h2>Size, quality and operators</h2>",
        _plots(manifest, measured),
        *_speed(measured),
        "<h2>What it takes and gives</h2>",
        _signature(manifest),
        "<h2>How it was made</h2>",
        _origin(manifest, measured),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(manifest.name)} – onnxpress report</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def build_command(recipe: Mapping[str, Json]) -> str:
    """What to type to build the same again; a module that was given in Python needs more, and numbers of samples a recipe."""
    model, build, quality = (recipe.get(section, {}) for section in ("model", "build", "quality"))
    source = str(model.get("source", ""))
    if source.startswith("python:"):
        return f"onnxpress.build(model, example_inputs=…)  # {source.removeprefix('python:')}"
    words = ["onnxpress", "build", source]
    for section, key, option in (
        (model, "task", "--task"),
        (model, "revision", "--revision"),
        (model, "max_length", "--max-length"),
        (build, "target", "--target"),
        (build, "precision", "--precision"),
        (build, "prefer", "--prefer"),
        (build, "name", "--name"),
        (quality, "budget", "--budget"),
        (quality, "file", "--eval"),
        (quality, "calibration", "--calibration"),
        (model, "adapter", "--adapter"),
        (recipe.get("distil") or {}, "file", "--distil"),
    ):
        if section.get(key) is not None:
            words += [option, str(section[key])]
    for role, column in quality.get("columns", {}).items():
        words += ["--column", f"{role}={column}"]
    for name in build.get("only", ()):
        words += ["--only", str(name)]
    parts = [f"{name}={value}" for name, value in (recipe.get("prune") or {}).items() if value and name != "multiple"]
    words += ["--prune", ",".join(parts)] if parts else []
    distil, defaults = recipe.get("distil"), DistilSection().model_dump(mode="json")
    if distil is not None and distil == defaults:
        words += ["--pass-option", f"distil.epochs={defaults['epochs']}"]  # one of them says that it is wanted
    further = {
        "prune": {"multiple": (recipe.get("prune") or {}).get("multiple")},
        "distil": {k: v for k, v in (distil or {}).items() if k != "file" and v != defaults[k]},
        **recipe.get("passes", {}),
    }
    for step, options in further.items():
        for name, value in options.items():
            words += ["--pass-option", f"{step}.{name}={_said(value)}"] if value is not None else []
    words += ["--cache", "int8"] if build.get("cache") == "int8" else []
    words += ["--hidden-states"] if model.get("hidden_states") else []
    words += ["--keep-all"] if build.get("keep_all") else []
    words += ["--trust-remote-code"] if model.get("trust_remote_code") else []
    words += ["--no-measure"] if build.get("measure") is False else []
    counts = [f"{key} = {quality[key]}" for key in ("samples", "calibration_samples") if quality.get(key) is not None]
    return shlex.join(words) + (f"  # with [quality] {', '.join(counts)} in a recipe" if counts else "")


def _said(value: Json) -> str:
    """As the command line reads it back: what is no JSON is a text."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def _verdict(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    last = _final(manifest)
    budget = measured.get("budget", {})
    name, value, limit = _metric(last["metric"]), last["quality"], budget.get("limit")
    if value is None or budget.get("metric") != last["metric"]:
        badge, words = ("unchanged", "no budget"), f"{name} {_figure(value)}"
    else:
        # Quality is said in six digits, the limit in all.
        holds = value >= limit or math.isclose(value, limit, rel_tol=1e-5)
        badge = ("kept", "within budget") if holds else ("undone", "below budget")
        words = f"{name} {_figure(value)}, where at least {_figure(limit)} is required"
        if holds and budget.get("on_random_inputs"):
            badge = ("unchanged", "within budget on random inputs")
            words += "; give samples of your own (--eval), without which nothing is claimed of real data"
    for status in ("repaired", "undone"):
        # An automatic plan's candidates are no passes that failed.
        names = [
            row["pass"]
            for row in manifest.ledger
            if row["status"] == status and (status != "undone" or "curve" not in row)
        ]
        words += f"; {status}: {', '.join(names)}" if names else ""
    return f'<p class="verdict"><span class="badge {badge[0]}">{badge[1]}</span><span>{_text(words)}.</span></p>'


def _tiles(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    first, last = manifest.ledger[0], _final(manifest)
    smaller = f" ({first['bytes'] / last['bytes']:.1f}× smaller)" if 0 < last["bytes"] < first["bytes"] else ""
    tiles = [("Weights", f"{megabytes(last['bytes'])} MB", f"from {megabytes(first['bytes'])} MB{smaller}")]
    for shape, row in list(_times(measured).items())[:1]:
        if "artifact" in row:
            others = ", ".join(
                f"{_SYSTEMS.get(name, name)} {time:.3g} ms" for name, time in row.items() if name != "artifact"
            )
            tiles.append((f"Latency at {shape}", f"{row['artifact']:.3g} ms", others))
    tiles.append(
        (_metric(last["metric"]).capitalize(), _figure(last["quality"]), f"original {_figure(first['quality'])}")
    )
    batched = [row["batch_cosine"] for row in manifest.ledger if "batch_cosine" in row and row["status"] in _TAKEN]
    if batched:
        numbers = manifest.signature.task == "module" or manifest.options.get("problem_type") == "regression"
        what = "variance kept, of the same answers" if numbers else "cosine of the same answer"
        tiles.append(("Alone against batched", f"{batched[-1]:.5f}", what))
    cells = (
        f'<div class="tile"><dt>{_text(name)}</dt><dd class="value">{_text(value)}</dd><dd class="soft">{_text(more)}</dd></div>'
        for name, value, more in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _ledger(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    times = {row["pass"]: row for row in measured.get("rows", ())}
    rows: list[list[str]] = []
    for row in manifest.ledger:
        notes = "".join(f"<li>{_text(note)}</li>" for note in row.get("notes", ()))
        time = times.get(row["pass"], {})
        rows.append(
            [
                f"<code>{_text(row['pass'])}</code>",
                f'<span class="badge {_text(row["status"])}">{_text(row["status"])}</span>',
                str(row["changes"] or "–"),
                _change(row.get("quality_before"), row["quality"], "{:.5g}".format),
                _change(row.get("bytes_before"), row["bytes"], megabytes),
                _change(time.get("latency_before_ms"), time.get("latency_ms"), "{:.3g}".format) or "–",
                _text(row["reason"] + _share(time)) + (f"<ul>{notes}</ul>" if notes else ""),
            ]
        )
    quiet = {index for index, row in enumerate(manifest.ledger) if row["status"] == "unchanged"}
    head = ["pass", "", "changes", _text(_metric(manifest.ledger[0]["metric"])), "MB", "ms, all shapes", "why"]
    return _table(head, rows, numbers={2, 3, 4, 5}, quiet=quiet)


def _curve(manifest: Manifest, measured: Mapping[str, Json]) -> Iterable[str]:
    """What an automatic plan chose among."""
    points = measured.get("curve")
    if not points:
        return
    metric = _metric(manifest.ledger[0]["metric"])
    yield "<h2>What was tried to keep the budget</h2>"
    timed = any(point["share_of_time"] is not None for point in points)
    title = f"Quality against size{' and time' if timed else ''}, a point for each plan that was tried as a whole"
    note = f"{_CURVE_NOTE}{_CURVE_TIMES if timed else ''}."
    yield _captioned(title, curve_plot(title, points, metric, measured["budget"]["limit"]), note=note, wide=True)
    rows = [
        [
            f"<code>{_text(point['plan'])}</code>" + (" (chosen)" if point["chosen"] else ""),
            f"{point['kept']} of {point['places']}" if point["places"] else "–",
            _figure(point["quality"]),
            "yes" if point["holds"] else "no",
            megabytes(point["bytes"]),
            "–" if point["latency_ms"] is None else f"{point['latency_ms']:.3g}",
            "–" if point["share_of_time"] is None else f"{point['share_of_time']:.2f}",
        ]
        for point in points
    ]
    head = ["plan", "places that stay", _text(metric), "within budget", "MB", "ms, all shapes", "share of float's time"]
    table = _table(head, rows, numbers=range(1, len(head)))
    yield f"<details><summary>The same in numbers</summary>{table}</details>"


def _plots(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    # What is part of the artifact; passes that were undone or found nothing are in the table.
    rows = [row for row in manifest.ledger if row["status"] in _TAKEN]
    names = [row["pass"] for row in rows]
    title = "Weights after each pass that was kept"
    parts = [_captioned(title, size_plot(title, names, [row["bytes"] for row in rows]))]
    # Those of an automatic plan that were not chosen are in its own drawing.
    judged = [
        row
        for row in manifest.ledger
        if row["quality"] is not None
        and row["status"] != "unchanged"
        and (row["status"] in _TAKEN or "curve" not in row)
    ]
    if judged:
        budget = measured.get("budget", {})
        limit = budget.get("limit") if budget.get("metric") == judged[0]["metric"] else None
        title = f"Quality after each pass that was tried: {_metric(judged[0]['metric'])}"
        labels = [
            row["pass"] + (f" ({row['status']})" if row["status"] in ("undone", "failed") else "") for row in judged
        ]
        taken = [row["status"] in _TAKEN for row in judged]
        values = [row["quality"] for row in judged]
        parts.append(_captioned(title, quality_plot(title, labels, values, taken, limit)))
    operators = ""
    before, after = measured.get("operators_before"), manifest.operators
    if before and after:
        title = f"Operators: {sum(before.values())} before, {sum(after.values())} after"
        operators = _captioned(title, operator_plot(title, before, after))
    return f'<div class="plots"><div class="stack">{"".join(parts)}</div>{operators}</div>'


def _speed(measured: Mapping[str, Json]) -> Iterable[str]:
    times = _times(measured)
    if not times:
        return
    yield "<h2>Speed</h2>"
    named = {
        shape: {_SYSTEMS.get(name, name): row[name] for name in sorted(row, key=lambda name: name == "artifact")}
        for shape, row in times.items()
    }
    spoken = "; ".join(
        f"{shape}: " + ", ".join(f"{n} {t:.3g} ms" for n, t in row.items()) for shape, row in named.items()
    )
    yield _captioned("By batch × length", latency_plot(spoken, named), note=_SPEED_NOTE, wide=True)
    systems = list(dict.fromkeys(name for row in named.values() for name in row))
    ours = _SYSTEMS["artifact"]
    ratios = [name for name in systems if name != ours] if ours in systems else []
    rows = [
        [_text(shape)]
        + [f"{row[name]:.3g}" if name in row else "–" for name in systems]
        + [f"{row[name] / row[ours]:.2f}×" if name in row and row.get(ours) else "–" for name in ratios]
        for shape, row in named.items()
    ]
    head = ["batch × length", *(f"{_text(name)}, ms" for name in systems), *(f"against {_text(n)}" for n in ratios)]
    yield f"<details><summary>The same in numbers</summary>{_table(head, rows, numbers=range(1, len(head)))}</details>"
    if "tokens_per_chunk" in measured:
        yield f'<p class="soft">Batches of mixed lengths run in chunks of {_text(measured["tokens_per_chunk"])} tokens.</p>'


def _signature(manifest: Manifest) -> str:
    rows = []
    for kind, specs in (("input", manifest.signature.inputs), ("output", manifest.signature.outputs)):
        for spec in specs:
            bounds = "" if spec.bounds is None else f"{spec.bounds[0]:,} to {spec.bounds[1]:,}"
            shape = _text(" × ".join(map(str, spec.shape)) or "one number")
            rows.append([f"<code>{_text(spec.name)}</code>", kind, _text(spec.dtype), shape, bounds])
    axes = ", ".join(f"{name} from {low:,} to {high:,}" for name, (low, high) in manifest.signature.axes.items())
    table = _table(["name", "", "dtype", "shape", "allowed values"], rows)
    return table + (f'<p class="soft">Axes: {_text(axes)}.</p>' if axes else "")


def _origin(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    machine = measured.get("machine", {})
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine.get("memory_bytes") else ""
    sets = f" ({', '.join(machine['instruction_sets'])})" if machine.get("instruction_sets") else ""
    facts = {
        "Source": manifest.recipe.get("model", {}).get("source"),
        "Machine": f"{machine.get('processor', '')}{sets}, {machine.get('cores', '?')} cores{memory}"
        if machine
        else None,
        "System": machine.get("system"),
        "Date": measured.get("date"),
        "Build time": f"{measured['build_seconds']:.0f} s" if "build_seconds" in measured else None,
        "Peak memory": f"{peak / 1e9:.2f} GB" if (peak := measured.get("peak_memory_bytes")) else None,
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "Runs on": f"ONNX Runtime {manifest.minimum_onnxruntime} or newer",
        "Note": measured.get("note"),
    }
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if value)
    commands = f"{build_command(manifest.recipe)}\nonnxpress verify ARTIFACT\nonnxpress inspect ARTIFACT"
    files = [[f"<code>{_text(path)}</code>", f"{entry.size:,}", f'<code title="{_text(entry.sha256)}">{_text(entry.sha256[:16])}…</code>']
             for path, entry in manifest.files.items()]  # fmt: skip
    recipe = json.dumps(manifest.recipe, indent=2, ensure_ascii=False)
    return (
        f'<dl class="facts">{listed}</dl><pre><code>{_text(commands)}</code></pre>'
        + _table(["file", "bytes", "SHA-256"], files, numbers={1})
        + f"<details><summary>The whole recipe</summary><pre><code>{_text(recipe)}</code></pre></details>"
    )


def _captioned(title: str, svg: str, *, note: str = "", wide: bool = False) -> str:
    """wide: scrolls where the window is narrow, else its letters would be too small to read."""
    more = f'<p class="soft">{_text(note)}</p>' if note else ""
    svg = f'<div class="scroll" tabindex="0">{svg}</div>' if wide else svg
    return f"<figure><figcaption><h3>{_text(title)}</h3></figcaption>{svg}{more}</figure>"


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = (), quiet: Iterable[int] = ()
) -> str:
    """Cells are HTML. numbers: columns set to the right; quiet: rows of less interest."""
    right, soft = set(numbers), set(quiet)

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ["number" if index in right else "why" if name == "why" else "" for index, name in enumerate(header)]
        return "".join(
            f"<{tag}{f' class={kind}' if kind else ''}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr{' class=quiet' if i in soft else ''}>{cells(row, 'td')}</tr>" for i, row in enumerate(rows))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _times(measured: Mapping[str, Json]) -> dict[str, dict[str, float]]:
    """{shape: {system: milliseconds}}, in the order measured."""
    times: dict[str, dict[str, float]] = {}
    for row in measured.get("latency", ()):
        shape = row.get("shape") or [size for size in (row.get("batch"), row.get("length")) if size is not None]
        times.setdefault(" × ".join(map(str, shape)), {})[row["system"]] = row["median_ms"]
    return times


def _final(manifest: Manifest) -> Mapping[str, Json]:
    """The last row that is part of the artifact."""
    return [row for row in manifest.ledger if row["status"] in _TAKEN][-1]


def _metric(name: str) -> str:
    return _METRICS.get(name, name.replace("_", " "))


def _share(time: Mapping[str, Json]) -> str:
    return f"; {time['share_of_time']:.2f} × the time of float" if "share_of_time" in time else ""


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _change(before: float | None, after: float | None, form: Callable[[float], str]) -> str:
    """One figure, or two where they differ."""
    if after is None:
        return ""
    return form(after) if before is None or form(before) == form(after) else f"{form(before)} → {form(after)}"


def _text(value: object) -> str:
    return html.escape(str(value))
