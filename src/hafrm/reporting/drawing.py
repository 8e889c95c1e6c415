"""matplotlib's SVG made fit for the page: text as text, colours from the style sheet, no ids but used ones.

Figures are drawn with placeholder colours, which become CSS variables afterwards, so that one drawing
serves light and dark. Nothing global is touched: no pyplot, no settings beyond the drawing itself.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH, HEIGHT = 310.0, 190.0
"""Of a panel, in pixels: a phone shows one at this size, a wide page three."""
NUM_COLOURS = 7

INK, MUTED, RULE, PAPER = "#0a0d00", "#0a0d01", "#0a0d02", "#0a0d03"
GOOD, BAD = "#0a0d04", "#0a0d05"
ROLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", GOOD: "good", BAD: "bad"}
"""Placeholders, and the variables of the style sheet that they stand for."""
ROLES |= {f"#0a0b{i:02x}": f"c{i}" for i in range(NUM_COLOURS)}
ROLES |= {f"#0a0c{i:02x}": f"t{i}" for i in range(NUM_COLOURS)}

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hafrm",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "sans-serif",
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

_XLINK = "{http://www.w3.org/1999/xlink}href"
_SVG = "{http://www.w3.org/2000/svg}"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FONT = re.compile(r"font: ?([\d.]+px)[^;]*")


def line_colour(number: int) -> str:
    """The placeholder for a run's lines."""
    return f"#0a0b{number % NUM_COLOURS:02x}"


def text_colour(number: int) -> str:
    """The placeholder for a run's name, dark enough to be read."""
    return f"#0a0c{number % NUM_COLOURS:02x}"


def draw(
    name: str, fill: Callable[[Axes], None], *, height: float = HEIGHT
) -> tuple[Markup, tuple[float, float]]:
    """What is inside the svg element of a panel that `fill` draws, and its size in pixels.

    Ids follow from the name and the drawing, so that the same page has the same ones.
    """
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that only the browser has
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=layout)
        fill(figure.add_subplot())
        file = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    drawn = file.getvalue()
    digest = hashlib.sha256(name.encode("utf-8", "replace") + drawn).hexdigest()[:8]
    return _cleaned(drawn, f"p{digest}-"), (WIDTH, height)


def _cleaned(svg: bytes, prefix: str) -> Markup:
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib's own, made just now
    # its style rules would apply to the whole page
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in {f"{_SVG}style", f"{_SVG}metadata"}]:
            parent.remove(child)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg.decode("utf-8")))
    for element in root.iter():
        _clean(element, used, prefix)
    ET.register_namespace("", _SVG[1:-1])
    inside = "".join(ET.tostring(child, encoding="unicode") for child in root)
    # inside an HTML page the namespace is known
    return Markup(inside.replace(f' xmlns="{_SVG[1:-1]}"', "").replace("\n", ""))  # noqa: S704 - ours


def _clean(element: ET.Element, used: set[str], prefix: str) -> None:
    given = element.attrib
    name = given.pop("id", None)
    if name in used:
        given["id"] = prefix + str(name)
    if _XLINK in given:
        given["href"] = "#" + prefix + given.pop(_XLINK).removeprefix("#")
    if "clip-path" in given:
        given["clip-path"] = given["clip-path"].replace("url(#", f"url(#{prefix}")
    for key in ("d", "transform", "x", "y", "width", "height"):
        if key in given:
            given[key] = _NUMBER.sub(lambda m: f"{float(m[0]):.1f}", given[key])
    if "style" in given:
        style = _FONT.sub(r"font-size: \1", given["style"])
        for placeholder, variable in ROLES.items():
            style = style.replace(placeholder, f"var(--{variable})")
        given["style"] = style
    if element.tag != f"{_SVG}text" and element.text and not element.text.strip():
        element.text = None
    element.tail = None
