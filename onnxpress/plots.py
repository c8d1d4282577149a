"""The drawings of the report: inline SVG whose colours and fonts are the page's, so that they follow light and dark."""

from __future__ import annotations

import html
import io
import itertools
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxpress.figures import megabytes

# Colours that matplotlib writes down, and the page's variables that they stand for.
_COLOURS = {
    "#000001": "--ink",
    "#000002": "--soft",
    "#000003": "--line",
    "#000004": "--accent",
    "#000005": "--muted",
    "#000006": "--warn",
}
_INK, _SOFT, _LINE, _ACCENT, _MUTED, _LIMIT = _COLOURS
_WIDTH = 5.6  # inches; the page scales drawings to its own width
_MOST_OPERATORS = 14


def size_plot(title: str, names: Sequence[str], sizes: Sequence[int]) -> str:
    """One horizontal bar a name, in MB."""

    def draw(figure: Any) -> None:
        axes = _axes(figure.add_subplot(), names)
        colours = [_MUTED] * (len(sizes) - 1) + [_ACCENT]
        axes.barh(range(len(names)), sizes, 0.62, color=colours)
        _label_bars(axes, sizes, lambda size: f"{megabytes(size)} MB")

    spoken = ", ".join(f"{name} {megabytes(size)} MB" for name, size in zip(names, sizes, strict=True))
    return _svg(f"{title}: {spoken}", draw, height=0.42 * len(names) + 0.3)


def quality_plot(
    title: str, names: Sequence[str], values: Sequence[float], taken: Sequence[bool], limit: float | None
) -> str:
    """A dot a pass, hollow where the pass was not taken, and the budget as a dashed line."""

    def draw(figure: Any) -> None:
        axes = _axes(figure.add_subplot(), names)
        bounds = [*values] if limit is None else [*values, limit]
        low, high = min(bounds), max(bounds)
        room = (high - low) or abs(high) * 0.01 or 0.01
        axes.set_xlim(low - room * 0.08, high + room * 0.3)
        axes.set_ylim(len(names) - 0.4, -0.9)
        if limit is not None:
            axes.axvline(limit, color=_LIMIT, linewidth=1.3, linestyle=(0, (4, 3)))
            axes.annotate(f"budget {limit:.5g}", (limit, -0.9), (4, -2), textcoords="offset points", va="top",
                          color=_LIMIT, fontsize=9.5)  # fmt: skip
        for place, (value, kept) in enumerate(zip(values, taken, strict=True)):
            axes.axhline(place, color=_LINE, linewidth=0.8, zorder=0)
            axes.plot(value, place, marker="o", markersize=7, markeredgewidth=1.8, color=_ACCENT if kept else _MUTED,
                      fillstyle="full" if kept else "none")  # fmt: skip
            axes.annotate(f"{value:.5g}", (value, place), (8, 1), textcoords="offset points", va="bottom", color=_INK)

    spoken = ", ".join(f"{name} {value:.5g}" for name, value in zip(names, values, strict=True))
    return _svg(f"{title}: {spoken}" + ("" if limit is None else f"; budget {limit:.5g}"), draw,
                height=0.42 * len(names) + 0.5)  # fmt: skip


def latency_plot(title: str, times: Mapping[str, Mapping[str, float]]) -> str:
    """One panel a shape, one bar a system: {shape: {system: milliseconds}}. Every panel has its own scale from 0."""
    systems = list(dict.fromkeys(system for row in times.values() for system in row))

    def draw(figure: Any) -> None:
        columns = min(3, len(times))
        grid = figure.subplots(-(-len(times) // columns), columns, squeeze=False)
        for axes, (shape, row) in zip(grid.flat, times.items(), strict=False):
            first = axes in grid[:, 0]
            _axes(axes, systems if first else [""] * len(systems))
            values = [row.get(system, 0.0) for system in systems]
            colours = [_ACCENT if system == systems[-1] else _MUTED for system in systems]
            axes.barh(range(len(systems)), values, 0.62, color=colours)
            _label_bars(axes, values, "{:.3g}".format, room=0.5)
            axes.set_title(shape, loc="left", color=_SOFT, fontsize=10)
        for axes in grid.flat[len(times) :]:
            axes.set_axis_off()

    panels = -(-len(times) // 3)
    return _svg(title, draw, height=panels * (0.36 * len(systems) + 0.55), width=_WIDTH * 1.8)


def curve_plot(title: str, points: Sequence[Mapping[str, Any]], metric: str, limit: float) -> str:
    """Quality over size, and over time where it was measured: a line a plan, the chosen point full.

    points: rows of plan.curve. What is far below the budget is drawn at the lower edge, with an arrow; what has no quality is not.
    """
    points = [point for point in points if point["quality"] is not None]
    top = max([limit, *(point["quality"] for point in points)])
    inside = [limit, *(point["quality"] for point in points if point["quality"] >= limit - 2 * (top - limit))]
    room = (top - min(inside)) or abs(top) * 0.01 or 0.01
    floor = min(inside) - 0.12 * room
    panels = {"MB": [point["bytes"] / 1e6 for point in points]}
    if all(point["share_of_time"] is not None for point in points):
        panels["time, as a share of float's"] = [point["share_of_time"] for point in points]

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (label, places) in zip(grid, panels.items(), strict=True):
            _plain(axes)
            axes.tick_params(colors=_SOFT)
            axes.grid(axis="y", color=_LINE, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.axhline(limit, color=_LIMIT, linewidth=1.3, linestyle=(0, (4, 3)))
            for marker, name in zip(itertools.cycle("os^DvPX"), dict.fromkeys(point["plan"] for point in points)):
                own = [(place, point) for place, point in zip(places, points, strict=True) if point["plan"] == name]
                colour = _ACCENT if any(point["chosen"] for _, point in own) else _SOFT
                axes.plot([place for place, _ in own], [max(point["quality"], floor) for _, point in own],
                          color=colour, linewidth=1.4, marker=marker, markersize=7, markeredgewidth=1.6,
                          fillstyle="none", label=name)  # fmt: skip
                for place, point in own:
                    if point["chosen"]:
                        axes.plot(place, point["quality"], marker=marker, markersize=9, color=_ACCENT, zorder=3)
                    if point["quality"] < floor:
                        axes.annotate(
                            "↓", (place, floor), (0, -13), textcoords="offset points", ha="center", color=_SOFT
                        )
            axes.set_xlim(0, max(places) * 1.1)
            axes.set_ylim(floor - 0.12 * room, top + 0.1 * room)
            axes.set_xlabel(label, color=_SOFT)
        grid[0].set_ylabel(metric, color=_SOFT)
        grid[0].annotate(
            f"budget {limit:.5g}", (0, limit), (4, 3), textcoords="offset points", color=_LIMIT, fontsize=9.5
        )
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=len(names), handlelength=1.6, columnspacing=1.2,
                      frameon=False, labelcolor=_INK)  # fmt: skip

    best = next(point for point in points if point["chosen"])
    spoken = (
        f"{title}: {len(points)} points; chosen {best['plan']}, {megabytes(best['bytes'])} MB, {best['quality']:.5g}"
    )
    return _svg(spoken, draw, height=4.0, width=_WIDTH * 1.8)


def operator_plot(title: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Two bars an operator, the most frequent ones first."""
    count = {name: max(before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}
    names = sorted(count, key=lambda name: (-count[name], name))[:_MOST_OPERATORS]

    def draw(figure: Any) -> None:
        axes = _axes(figure.add_subplot(), [name.split("::")[-1] for name in names])
        for offset, colour, label, counts in ((-0.19, _MUTED, "before", before), (0.19, _ACCENT, "after", after)):
            values = [counts.get(name, 0) for name in names]
            places = [place + offset for place in range(len(names))]
            axes.barh(places, values, 0.34, color=colour, label=label)
            for place, value in zip(places, values, strict=True):
                axes.annotate(str(value), (value, place), (4, 0), textcoords="offset points", va="center",
                              color=_SOFT, fontsize=8.5)  # fmt: skip
        axes.set_xlim(0, max(count.values()) * 1.12)
        axes.legend(frameon=False, labelcolor=_INK, loc="lower right")

    return _svg(title, draw, height=0.36 * len(names) + 0.3)


def _axes(axes: Any, names: Sequence[str]) -> Any:
    """Axes for horizontal bars, the first name on top."""
    _plain(axes)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.invert_yaxis()
    return axes


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
        axes.spines[side].set_color(_LINE)
    axes.tick_params(colors=_INK, length=0)


def _label_bars(axes: Any, values: Sequence[float], form: Callable[[float], str], room: float = 0.22) -> None:
    for place, value in enumerate(values):
        if value:
            axes.annotate(form(value), (value, place), (5, 0), textcoords="offset points", va="center", color=_INK)
    axes.set_xlim(0, max([*values, 0]) * (1 + room) or 1)


def _svg(spoken: str, draw: Callable[[Any], None], *, height: float, width: float = _WIDTH) -> str:
    """Text stays text: it takes the page's font and can be searched. spoken: what a screen reader says."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    options = {"svg.fonttype": "none", "svg.hashsalt": "onnxpress", "font.size": 10.5, "text.parse_math": False}
    with mpl.rc_context(options), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are measured as boxes and drawn by the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Drawings of one page must not share identifiers.
    prefix = f"plot{zlib.crc32(spoken.encode()):08x}-"
    svg = re.sub(r'(?<= )(id="|xlink:href="#)|(url\(#)', lambda found: found.group(0) + prefix, svg)
    svg = re.sub(r"(?<=: )#00000[1-6]", lambda found: f"var({_COLOURS[found.group(0)]})", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(spoken)}" ', 1)
