"""The report: one HTML page with tables and plots, readable without a network, in light and dark.

Everything that comes from outside (names, notes, versions) is escaped; the plots are inline SVG.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxpress.manifest import Json, Manifest

_STYLE = """
:root { --ink: #1c2430; --soft: #5c6675; --line: #dfe3e8; --paper: #ffffff; --panel: #f6f7f9; --good: #1f7a4d;
  --warn: #9a6700; --bad: #b42318; --one: #3565c4; --two: #c8642b; --three: #8a8f98; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #a2abb8; --line: #333b46; --paper: #14181d;
  --panel: #1c2229; --good: #5fc992; --warn: #e0b04c; --bad: #f08a80; --one: #7fa6f5; --two: #f0995f; --three: #8a93a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -0.01em; } h2 { font-size: 1.1rem; margin: 2.4rem 0 0.7rem; }
p { margin: 0.4rem 0; } .soft { color: var(--soft); } .verdict { font-size: 1.05rem; margin-top: 0.8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.8rem; margin-top: 1.4rem; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem 1rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 0.4rem 0.8rem 0.4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.kept { color: var(--good); } .repaired { color: var(--warn); } .undone { color: var(--bad); } .unchanged { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: var(--soft); font-size: 0.9rem; }
svg text { fill: var(--ink); font-family: system-ui, sans-serif; } code { font-size: 0.9em; } td code { white-space: nowrap; }
@media (max-width: 30rem) { .plots { grid-template-columns: 1fr; } }
"""
# Colours of the plots stand for variables of the page, so that they follow light and dark.
_COLOURS = {"#000001": "--ink", "#000002": "--line", "#000003": "--one", "#000004": "--two", "#000005": "--three"}
_INK, _LINE, _ONE, _TWO, _THREE = _COLOURS


def render_report(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    """The page. measured may lack parts (a build that timed nothing)."""
    first, last = manifest.ledger[0], _final(manifest)
    parts = [
        f"<h1>{_text(manifest.name)}</h1>",
        f'<p class="soft">{_text(manifest.task)} for {_text(manifest.target)}, {_text(manifest.precision)}, opset graph of '
        f"{sum(manifest.operators.values())} nodes</p>",
        f'<p class="verdict">{_verdict(manifest, measured)}</p>',
        _tiles(manifest, measured, first, last),
        "<h2>Passes</h2>",
        _ledger(manifest, measured),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_plots(manifest, measured))}</div>',
        "<h2>Signature</h2>",
        _signature(manifest),
        "<h2>How it was made</h2>",
        _origin(manifest, measured),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_text(manifest.name)}: onnxpress report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    last = _final(manifest)
    budget = measured.get("budget", {})
    words = f"Answers like the original: {_text(str(last['metric']))} {last['quality']:.5g}"
    if budget.get("metric") == last["metric"]:
        words += f", at least {budget['limit']:.5g} was required"
    undone = [_text(row["pass"]) for row in manifest.ledger if row["status"] == "undone"]
    if undone:
        words += f". Undone: {', '.join(undone)}"
    return words + "."


def _tiles(
    manifest: Manifest, measured: Mapping[str, Json], first: Mapping[str, Json], last: Mapping[str, Json]
) -> str:
    tiles = [
        (f"{last['bytes'] / 1e6:.1f} MB", f"weights, from {first['bytes'] / 1e6:.1f} MB"),
        (f"{last['quality']:.5g}", f"{last['metric']}"),
    ]
    times = {(tuple(row["shape"]), row["system"]): row["median_ms"] for row in measured.get("latency", ())}
    shapes = list(dict.fromkeys(shape for shape, _ in times))
    if shapes and (shapes[0], "artifact") in times:
        before, after = times[shapes[0], "export"], times[shapes[0], "artifact"]
        tiles.insert(1, (f"{after:.3g} ms", f"at {_shape(shapes[0])}, from {before:.3g} ms"))
    batched = [row["batch_cosine"] for row in manifest.ledger if "batch_cosine" in row and row["status"] != "undone"]
    if batched:
        tiles.append((f"{batched[-1]:.6f}", "cosine of an answer alone and in a batch"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in tiles)
        + "</div>"
    )


def _ledger(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    times = {row["pass"]: row for row in measured.get("rows", ())}
    rows = []
    for row in manifest.ledger:
        time = times.get(row["pass"])
        notes = "".join(f'<br><span class="soft">{_text(note)}</span>' for note in row["notes"])
        rows.append(
            [
                f"<code>{_text(row['pass'])}</code>",
                f'<span class="{_text(row["status"])}">{_text(row["status"])}</span>',
                f'<span class="number">{row["changes"] or "–"}</span>',
                f"{row['quality']:.5g}" if row["quality"] is not None else "",
                f"{row['bytes'] / 1e6:.1f}",
                f"{time['latency_before_ms']:.3g} → {time['latency_ms']:.3g}" if time else "",
                _text(row["reason"]) + notes,
            ]
        )
    metric = _text(manifest.ledger[0]["metric"])
    return _table(["pass", "", "changes", metric, "MB", "ms of all shapes", "why"], rows, numbers={2, 3, 4, 5})


def _signature(manifest: Manifest) -> str:
    rows = []
    for kind, specs in (("input", manifest.signature.inputs), ("output", manifest.signature.outputs)):
        for spec in specs:
            bounds = "" if spec.bounds is None else f"{spec.bounds[0]} to {spec.bounds[1]}"
            shape = ", ".join(map(str, spec.shape))
            rows.append([kind, f"<code>{_text(spec.name)}</code>", _text(spec.dtype), _text(shape), bounds])
    axes = ", ".join(f"{_text(name)} {low} to {high}" for name, (low, high) in manifest.signature.axes.items())
    return _table(["", "name", "dtype", "shape", "values"], rows) + f'<p class="soft">{axes}</p>'


def _origin(manifest: Manifest, measured: Mapping[str, Json]) -> str:
    machine = measured.get("machine", {})
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in manifest.versions.items())
    lines = [f"Source: <code>{_text(manifest.recipe.get('model', {}).get('source', ''))}</code>", versions]
    if machine:
        sets = ", ".join(machine.get("instruction_sets", ()))
        lines.append(
            _text(f"{machine.get('processor')}, {machine.get('cores')} cores ({sets}); {machine.get('system')}; ")
            + _text(measured.get("date", ""))
        )
    if "build_seconds" in measured:
        memory = measured["peak_memory_bytes"] / 1e9
        lines.append(f"Built in {measured['build_seconds']:.0f} s with {memory:.2f} GB of memory.")
    if measured.get("note"):
        lines.append(_text(measured["note"]))
    rows = [[f"<code>{_text(name)}</code>", f"{entry.size:,}", f"<code>{entry.sha256[:16]}…</code>"]
            for name, entry in manifest.files.items()]  # fmt: skip
    return "".join(f"<p>{line}</p>" for line in lines) + _table(["file", "bytes", "SHA-256"], rows, numbers={1})


def _plots(manifest: Manifest, measured: Mapping[str, Json]) -> Iterable[str]:
    rows = [row for row in manifest.ledger if row["changes"] or row["pass"] == "export"]
    names = [row["pass"] for row in rows]
    yield _figure("Weights after each pass, MB", lambda axes: _bars(axes, names, [row["bytes"] / 1e6 for row in rows]))
    judged = [row for row in rows if row["quality"] is not None]
    limit = measured.get("budget", {}).get("limit")
    metric = manifest.ledger[0]["metric"]
    yield _figure(
        f"{metric} after each pass" + ("" if limit is None else f"; the line is the budget, {limit:.5g}"),
        lambda axes: _quality(axes, [row["pass"] for row in judged], [row["quality"] for row in judged], limit),
    )
    if measured.get("latency"):
        yield _figure(
            "Milliseconds by batch × length, logarithmic: PyTorch, the plain export and the artifact in one call",
            lambda axes: _latency(axes, measured["latency"]),
        )
    if measured.get("operators_before"):
        yield _figure(
            "Operators before and after",
            lambda axes: _operators(axes, measured["operators_before"], manifest.operators),
            height=4.6,
        )


def _figure(caption: str, draw: Any, height: float = 3.0) -> str:
    """An inline SVG; text stays text, so that it follows the page's font and can be searched."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "onnxpress", "font.size": 10}):
        figure = Figure(figsize=(6, height), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_LINE)
        axes.tick_params(colors=_INK, length=0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several drawings in one page must not share identifiers.
    prefix = re.sub(r"\W", "", caption)[:12]
    svg = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{prefix}", svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_text(caption)}" ', 1)
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _bars(axes: Any, names: Sequence[str], values: Sequence[float]) -> None:
    axes.barh(range(len(names)), values, color=_ONE, height=0.6)
    for index, value in enumerate(values):
        axes.text(value, index, f" {value:.1f}", va="center", color=_INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15 or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _quality(axes: Any, names: Sequence[str], values: Sequence[float], limit: float | None) -> None:
    axes.plot(range(len(names)), values, color=_ONE, marker="o", linewidth=2)
    low, high = min([*values, limit] if limit is not None else values), max(values)
    room = (high - low) * 0.3 or abs(high) * 0.01 or 0.01
    if limit is not None:
        axes.axhline(limit, color=_TWO, linewidth=1.5, linestyle="--")
    for index, value in enumerate(values):
        axes.text(index, value + room * 0.3, f"{value:.4g}", ha="center", color=_INK)
    axes.set_ylim(low - room, high + room * 1.5)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
    axes.ticklabel_format(axis="y", useOffset=False)


def _latency(axes: Any, rows: Sequence[Mapping[str, Json]]) -> None:
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    width = 0.8 / len(systems)
    for place, (system, colour) in enumerate(zip(systems, (_THREE, _ONE, _TWO), strict=False)):
        times = {tuple(row["shape"]): row["median_ms"] for row in rows if row["system"] == system}
        positions = [index + (place - (len(systems) - 1) / 2) * width for index in range(len(shapes))]
        axes.bar(positions, [times[shape] for shape in shapes], width * 0.9, color=colour, label=system)
        for position, shape in zip(positions, shapes, strict=True):
            axes.text(position, times[shape], f"{times[shape]:.3g}", ha="center", va="bottom", color=_INK, fontsize=8)
    axes.set_yscale("log")
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_xticks(range(len(shapes)), [_shape(shape) for shape in shapes])
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.15)
    axes.legend(frameon=False, labelcolor=_INK, ncols=3, loc="upper left")


def _operators(axes: Any, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    names = sorted({*before, *after}, key=lambda name: -max(before.get(name, 0), after.get(name, 0)))[:14]
    places = range(len(names))
    axes.barh(
        [place - 0.2 for place in places], [before.get(name, 0) for name in names], 0.36, color=_THREE, label="before"
    )
    axes.barh(
        [place + 0.2 for place in places], [after.get(name, 0) for name in names], 0.36, color=_ONE, label="after"
    )
    axes.set_yticks(places, [name.split("::")[-1] for name in names])
    axes.invert_yaxis()
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="number">{cell}</{tag}>' if index in right else f"<{tag}>{cell}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _final(manifest: Manifest) -> Mapping[str, Json]:
    """The last row that is part of the artifact."""
    return [row for row in manifest.ledger if row["status"] in ("kept", "repaired")][-1]


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _text(value: object) -> str:
    return html.escape(str(value))
