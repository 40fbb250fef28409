"""The pictures: bars and lines, as small SVG files that can be read without seeing colours."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from _words import in_words
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, and can be searched
        "svg.hashsalt": "gsplice",  # the same picture is the same file
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

#: Of Okabe and Ito, which the colour-blind can tell apart; the lines differ in their marks as well.
OURS, THEIRS = "#0072B2", "#B0B0B0"
COLOURS = ("#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#7F7F7F", "#8C6D31")
MARKS = "s^vDPX<>"
OUR_COLOURS, OUR_MARKS = (OURS, "#004C78", "#3D9BD4"), "ohp"

Spec = dict[str, Any]


def draw(spec: Spec, path: Path) -> None:
    """Draw what :class:`_report.Report` has kept into the file *path*."""
    figure = {"bars": _bars, "lines": _lines}[spec["kind"]](spec)
    # Not suptitle(), which would be centred over the labels too and cut off where they are long.
    figure.suptitle(spec["title"], x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None}, facecolor="white")
    path.write_text(_smaller(written.getvalue()))


def _smaller(svg: str) -> str:
    """Return the same picture in a third of the bytes: who made it, and digits that nobody sees."""
    svg = re.sub(r"<!DOCTYPE.*?>\s*|<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"(\d\.\d)\d{4,}", r"\1", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return re.sub(r"\n(?=[LMQCz\"])", "", svg)


def _bars(spec: Spec) -> Figure:
    panels = spec["panels"]
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(8.4, 1.1 + rows * (0.45 + 0.29 * len(names))), layout="constrained")
    all_axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=False):
        _panel(axes, title, bars, names, spec["ours"])
    figure.supxlabel(spec["unit"], fontsize=11)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for label in all_axes[0].get_yticklabels():
        if label.get_text() in spec["ours"]:
            label.set_fontweight("bold")
    return figure


def _panel(
    axes: Axes, title: str, bars: dict[str, float], names: list[str], ours: list[str]
) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    most = max(bars.values(), default=1) or 1
    for row, name in enumerate(names):
        value = bars.get(name)
        if value is None:
            axes.text(0, row, " not measured", va="center", fontsize=9, color="#606060")
            continue
        is_ours = name in ours
        axes.barh(row, value, height=0.72, color=OURS if is_ours else THEIRS)
        figures = f" {value:.3g}" if value < 1000 else f" {value:,.0f}"
        weight = "bold" if is_ours else "normal"
        axes.text(value, row, figures, va="center", fontsize=9.5, fontweight=weight)
    axes.set_xlim(0, most * 1.28)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])  # the figures are by the bars
    axes.spines["bottom"].set_visible(False)


def _lines(spec: Spec) -> Figure:
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = {
        True: zip(OUR_COLOURS, OUR_MARKS, strict=True),
        False: zip(COLOURS, MARKS, strict=True),
    }
    sizes = sorted({point[0] for points in spec["series"].values() for point in points})
    values = [point[1] for points in spec["series"].values() for point in points]
    for name, points in spec["series"].items():
        is_ours = name in spec["ours"]
        colour, mark = next(styles[is_ours])
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=colour,
            marker=mark,
            markersize=7 if is_ours else 5,
            linewidth=3.2 if is_ours else 1.4,
            zorder=3 if is_ours else 2,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    label = (lambda x: in_words(x).replace(" ", "\n")) if spec["in bytes"] else "{:,}".format
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: label(round(x))))
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        )
        axes.tick_params(axis="y", which="minor", labelsize=9)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_xlabel(spec["x"])
    axes.set_ylabel(spec["y"])
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    return figure
