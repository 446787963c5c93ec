"""Line plots as inline SVG: no library, no script, colours from the style sheet; a few hundred points however long the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .history import History, Series
from .markup import text

POINTS = 300
SIDE = 1000  # of the drawing's own square, which is stretched to the space there is
COLOURS = 6  # that the style sheet has for lines, --line-0 and on


@dataclass(frozen=True)
class Line:
    name: str
    series: Series
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Band:
    """What lies between two series of the same steps."""

    low: Series
    high: Series
    colour: int = 0


def plot(title: str, lines: Sequence[Line], *, bands: Sequence[Band] = (), form: Callable[[float], str], last_step: int) -> str:
    """A figure; `form` writes a value, `last_step` is where the axis ends."""
    drawn = [Line(line.name, line.series.thinned(POINTS), line.colour, line.faint) for line in lines if line.series.steps]
    filled = [Band(band.low.thinned(POINTS), band.high.thinned(POINTS), band.colour) for band in bands if band.low.steps]
    if not drawn:
        return f'<figure class="sd-plot"><figcaption><b>{text(title)}</b></figcaption><div class="sd-empty">Nothing yet</div></figure>'
    values = [v for line in drawn for v in line.series.values] + [v for band in filled for v in (*band.low.values, *band.high.values)]
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    end = max(last_step, 1)

    def points(series: Series) -> str:
        again = series.steps[:1] if len(series.steps) == 1 else []  # a line from a point to itself shows as a dot
        return " ".join(
            f"{SIDE * step / end:.0f},{SIDE * (high - value) / (high - low):.0f}"
            for step, value in zip(series.steps + again, series.values * (1 + len(again)), strict=True)
        )

    heights = [SIDE * (high - tick) / (high - low) for tick in ticks]
    shapes = [f'<line class="grid" x1="0" x2="{SIDE}" y1="{y:.0f}" y2="{y:.0f}"/>' for y in heights]
    for band in filled:
        back = Series(band.low.steps[::-1], band.low.values[::-1])
        shapes.append(f'<polygon class="band c{band.colour}" points="{points(band.high)} {points(back)}"/>')
    for line in drawn:
        shapes.append(f'<polyline class="c{line.colour}{look(line)}" points="{points(line.series)}"/>')
    key = "".join(
        f'<span class="c{line.colour}{" faint" if line.faint else ""}"><i></i>{text(line.name)} {text(form(line.series.values[-1]))}</span>'
        for line in drawn
    )
    labels = "".join(f'<span style="top:{100 * (high - tick) / (high - low):.1f}%">{text(form(tick))}</span>' for tick in ticks)
    return (
        f'<figure class="sd-plot" role="img" aria-label="{text(title)}: {text(form(drawn[-1].series.values[-1]))}">'
        f'<figcaption><b>{text(title)}</b><span class="key">{key}</span></figcaption>'
        f'<div class="area"><div class="ticks">{labels}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg></div>'
        f'<div class="steps"><span>0</span><span>{end:,} steps</span></div></figure>'
    )


def look(line: Line) -> str:
    """Its further classes."""
    return (" faint" if line.faint else "") + (" dot" if len(line.series.steps) == 1 else "")


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers, 1, 2 or 5 times a power of ten apart, that hold low and high between them."""
    if not high > low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * of for of in (1, 2, 5, 10) if power * of >= rough)
    return [gap * number for number in range(math.floor(low / gap), math.ceil(high / gap) + 1)]


def of_run(seen: History) -> str:
    """The plots of a run."""
    series, end = seen.series, seen.steps
    alphas = [
        Band(series["alpha_0"], series["alpha_100"], 3),
        Band(series["alpha_25"], series["alpha_75"], 3),
    ]
    figures = [
        plot(
            "Loss",
            [Line("each step", series["loss"], 0, True), Line("smoothed", series["smooth"], 0)],
            form="{:.3g}".format,
            last_step=end,
        ),
        plot("Learning rate", [Line("UNet", series["rate"], 1)], form=scientific, last_step=end),
        plot(
            "Embedding-norm drift",
            [Line("worst token", series["worst"], 2, True), Line("mean", series["drift"], 2)],
            form=percent,
            last_step=end,
        ),
        plot("Learned alphas", [Line("median of layers", series["alpha_50"], 3)], bands=alphas, form="{:.4g}".format, last_step=end),
        plot("Drift of pinned prompts", [Line("1 - cosine", series["pinned"], 5)], form="{:.2g}".format, last_step=end),
        plot("Memory", [Line("in use", series["memory"], 4)], form="{:.3g} GiB".format, last_step=end),
    ]
    return f'<div class="sd-plots">{"".join(figures)}</div>'


def scientific(value: float) -> str:
    """ "1.5e-4" without the zeros of Python's."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"
