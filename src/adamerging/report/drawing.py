"""The drawing library: a figure in the report's manner, and its way into a page and into files.

Colours are drawn as fixed hexadecimal values, which the page replaces by variables of its style sheet: so
a chart is light or dark with the page around it. The files beside the page keep the light ones.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from ..errors import MissingExtraError
from .document import short
from .lines import Line

INK, SOFT, RULE, PAPER = "#1c2127", "#5f6b7a", "#dce1e7", "#fefefe"
# Okabe and Ito's palette, without the yellow that white paper swallows: safe for colour-blind readers.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "D", "^", "v", "P")
VARIABLES = {INK: "--ink", SOFT: "--soft", RULE: "--rule", PAPER: "--paper"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, 1)
}
SEQUENTIAL = "cividis"
WIDE, NARROW = 7.4, 4.6
"""Inches; the page scales them to the column, or to the screen of a phone."""
_width = ContextVar("width", default=WIDE)

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "image.cmap": SEQUENTIAL,
    "figure.constrained_layout.use": True,
}


def require_matplotlib() -> None:
    """Make sure that charts can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "drawing a report") from None


def styled(draw: Callable[[], Any], width: float = WIDE) -> Any:
    """Draw under the report's settings, which no other figure of the process sees; the laid-out figure."""
    from matplotlib import rc_context

    token = _width.set(width)
    try:
        with rc_context(_RC), _quiet():
            made = draw()
            made.get_layout_engine().execute(made)
            made.set_layout_engine("none")  # once is enough: each file would do it again
            return made
    finally:
        _width.reset(token)


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as `styled` says, and its axes; for use within it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(_width.get(), height))
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, **options)


def svg(made: Any, name: str) -> str:
    """A drawn figure as an SVG document, texts as texts; the same figure gives the same bytes."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({**_RC, "svg.hashsalt": name}), _quiet():
        made.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return target.getvalue()


def png(made: Any) -> bytes:
    """A drawn figure as a PNG, twice the resolution of a screen."""
    from matplotlib import rc_context

    target = io.BytesIO()
    with rc_context(_RC), _quiet():
        made.savefig(target, format="png", dpi=200, metadata={"Software": None})
    return target.getvalue()


def inline(document: str, name: str) -> str:
    """An SVG document as a part of the page: its colours the page's, its names its own."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = f'<svg {box[0]} aria-hidden="true" focusable="false">{rest}'
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="((?:[a-z]\w*)_\d+)"', "", body)  # groups' names, the same in every figure
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return body


class Style:
    """How a model is drawn, the same in every chart."""

    def __init__(self, line: Line, best: int = len(SERIES)) -> None:
        self.color, self.marker, self.width = SOFT, ".", 1.0
        self.dash: Any = "-"
        self.strong = False
        if line.kind == "expert":
            self.color, self.dash, self.width, self.strong = INK, (0, (4, 2)), 1.6, True
        elif line.kind == "base":
            self.dash, self.strong = (0, (1, 2)), True
        elif line.kind == "plain":
            self.color, self.dash, self.width, self.strong = INK, (0, (6, 2, 1, 2)), 1.2, True
        elif line.kind == "average":
            self.width, self.strong = 1.6, True
        elif line.rank is not None and line.rank < best:
            self.color, self.marker, self.width = SERIES[line.rank], MARKERS[line.rank], 1.9
            self.strong = True


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], gap: float = 11.0) -> None:
    """Write each line's name at its right end, pushed apart where they would overlap.

    Args:
        axes: with its limits set.
        ends: (x, y, text, colour) of each line.
        gap: least distance of two names in points.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    points = axes.figure.get_figheight() * 72 * 0.8 / _rows(axes)
    step = gap / points * (high - low)
    order = sorted(ends, key=lambda end: end[1])
    places = [end[1] for end in order]
    for _ in range(200):  # neighbours that overlap move apart by halves until none do
        moved = False
        for i in range(len(places) - 1):
            lack = step - (places[i + 1] - places[i])
            if lack > 1e-3 * step:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    shift = max(0.0, low - places[0]) - max(0.0, places[-1] - high)
    reach = axes.get_xlim()[1] - axes.get_xlim()[0]
    for (x, y, text, color), place in zip(order, places, strict=True):
        axes.plot(
            [x, right + 0.02 * reach], [y, place + shift], color=color, lw=0.6, alpha=0.5, clip_on=False
        )
        axes.annotate(
            short(text),
            (right + 0.025 * reach, place + shift),
            annotation_clip=False,
            va="center",
            color=color,
        )


def heat(axes: Any, values: Any, low: float, high: float) -> Any:
    """Cells of a matrix as colours, exact and small in a vector file."""
    return _cells(axes, values, low, high, SEQUENTIAL)


def tint(axes: Any, values: Any, low: float, high: float, form: str | None = None) -> Any:
    """Cells as depths of one colour that lets the page shine through, light or dark; numbers if ``form``."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    clear = LinearSegmentedColormap.from_list(
        "tint", [(*to_rgb(SERIES[0]), 0.02), (*to_rgb(SERIES[0]), 0.62)]
    )
    for i, row in enumerate(values) if form is not None else ():
        for j, value in enumerate(row):
            if value is not None and form is not None:
                axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7)
    axes.set_xticks([x + 0.5 for x in range(len(values[0]) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(values) - 1)], minor=True)
    axes.grid(which="minor", color=PAPER, lw=1)
    axes.tick_params(which="minor", length=0)
    return _cells(axes, values, low, high, clear)


def _cells(axes: Any, values: Any, low: float, high: float, colors: Any) -> Any:
    import numpy as np

    known = [[float("nan") if value is None else value for value in row] for row in values]
    return axes.imshow(
        np.ma.masked_invalid(np.asarray(known, dtype=float)),
        aspect="auto",
        interpolation="none",
        vmin=low,
        vmax=high if high > low else low + 1,
        cmap=colors,
        zorder=0,
    )


def write_cells(
    axes: Any, values: Sequence[Sequence[float | None]], low: float, high: float, form: str
) -> None:
    """The numbers in the cells of `heat`, dark on light and light on dark."""
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                dark = (value - low) / ((high - low) or 1) < 0.55
                axes.text(
                    j,
                    i,
                    form.format(value),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="#ffffff" if dark else "#000000",
                )


def named_axis(axis: Any, names: Sequence[str], most: int = 40) -> None:
    """Names along the axis of a matrix; of many every so manieth."""
    stride = max(1, -(-len(names) // most))
    axis.set_ticks(range(0, len(names), stride), [short(name, 22) for name in names[::stride]])


def percents(axis: Any) -> None:
    """Shares as percentages along an axis."""
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g} %")


def _rows(axes: Any) -> int:
    spec = axes.get_subplotspec()
    return int(spec.get_gridspec().nrows) if spec is not None else 1


class _quiet(warnings.catch_warnings):
    """No warnings about letters that the drawing library's own font lacks: the page's fonts draw them."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
