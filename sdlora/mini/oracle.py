"""The oracle of the embedded model's world: says what a picture shows, by geometry and colour alone; nothing in it is learned.

Analysis by synthesis: every thing of the world is drawn on the background that was found, at every place and size, and what
leaves the least of the picture unexplained is what is seen. What no drawing explains well is a thing of kind None.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlora.mini import world

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Labels = NDArray[np.int32]
Values = TypeVar("Values", Floats, Labels)
Box = tuple[int, int, int, int]  # left, top, right, bottom in px, the last two exclusive

KINDS = (*world.SHAPES, *world.FILES)
STYLES = ("fluent", "noto")

# All thresholds were set on blurred, noisy, off-colour renders and on things left out of `kinds`; distances are Euclidean RGB.
BACKGROUND_REACH = 45.0  # a border further than this from every background is of none
FOREGROUND = 32.0  # a pixel this far from the background belongs to a thing
BRIDGE = 0.3  # share of the strongest contrast within 3 px
SPECK = 40  # px; a smaller patch of foreground is a blemish, not a thing
LARGEST_COUNT = 4
UNEXPLAINED = 0.35  # a match that leaves a larger share of the thing's energy than this is none
# Nor is one whose best rival of another kind leaves less than this many times as much: a poor drawing of a fox is still far nearer
# to the fox than to all else, while a thing of unknown kind is about as near to several.
RIVAL = 2.5
UNEVEN_SHAPE = 0.02  # the inside of a shape is flat, so a round emoji is no circle
EMOJI_SHIFT = 20.0  # a thing's shade may be off by this much a channel
SHAPE_SHIFT = 40.0
PLACE_REACH = 8.0  # px from a nominal place

COARSE_SIDES = (11, 13, 15, 18, 21, 24)  # in half resolution: the world's sizes, what lies between, and larger ones
SHORTLIST = 10  # templates that are fitted at full resolution
SAME_KIND = 2  # of those, how many may be of one kind
JUDGED = 8  # of those, how many are judged
PAD = 4  # px of background around the picture, so that a thing may touch the border


@dataclass(frozen=True)
class Seen:
    kind: str | None  # None: something, but nothing known
    colour: str | None  # shapes only
    size: str
    place: str | None  # None: at none of the world's places
    style: str | None  # emoji only
    distance: float  # share of the thing's energy that its drawing leaves unexplained, 0 (exact) to 1; of the best match if kind is None


@dataclass(frozen=True)
class Sighting:
    background: str | None
    things: tuple[Seen, ...]  # from left to right


@dataclass(frozen=True)
class Verdict:
    kind: bool
    colour: bool  # of shapes; an emoji of the right kind is right in colour
    background: bool
    place: bool
    size: bool
    count: bool

    @property
    def all(self) -> bool:
        return self.kind and self.colour and self.background and self.place and self.size and self.count


@dataclass(frozen=True)
class Template:
    kind: str
    colour: str | None
    style: str | None


@dataclass(frozen=True)
class Field:
    """A picture less its background, padded: what is still to be explained. H = W = RESOLUTION + 2 PAD."""

    shade: Floats  # of the background
    contrast: Floats  # (H, W, 3), 0 where nothing is left over
    smooth: Floats  # the same, smoothed
    energy: Floats  # (H, W), squared length of `smooth`
    left_over: Bools  # foreground that nothing explains yet
    patches: Labels  # connected foreground


@dataclass(frozen=True)
class Fit:
    template: Template
    side: int
    left: int
    top: int  # px in the padded picture
    gain: float  # squared contrast that it explains
    unexplained: float = np.inf
    rival: float = np.inf  # what the best fit of another kind leaves unexplained
    uneven: float = np.inf  # of its inside alone: mean squared error there, in shares of its mean squared contrast

    @property
    def box(self) -> Box:
        return self.left, self.top, self.left + self.side, self.top + self.side

    def rivals(self, other: Fit) -> bool:
        """Whether it says that the same thing is of another kind; in a pair, the fit of the other thing says nothing of this one."""
        middle = self.left + self.side / 2, self.top + self.side / 2
        left, top, right, bottom = other.box
        return self.template.kind != other.template.kind and left <= middle[0] <= right and top <= middle[1] <= bottom

    @property
    def likely(self) -> bool:
        flat = self.template.colour is None or self.uneven <= UNEVEN_SHAPE
        return flat and self.unexplained <= UNEXPLAINED and self.rival >= RIVAL * self.unexplained


# ---------------------------------------------------------------- verdict


def agrees(scene: world.Scene, picture: Image.Image | NDArray[np.uint8] | Sighting) -> Verdict:
    """Compare with what is seen; each thing of the scene with the thing that suits it best."""
    sighting = picture if isinstance(picture, Sighting) else see(picture)
    places = ("left", "right") if len(scene.things) == 2 else (scene.place,)

    def match(order: tuple[Seen | None, ...]) -> tuple[bool, bool, bool, bool]:
        rows = [
            (s.kind == t.kind, s.kind == t.kind if t.colour is None else s.colour == t.colour, s.place == p, s.size == t.size)
            if s
            else (False,) * 4
            for t, p, s in zip(scene.things, places, order, strict=True)
        ]
        kind, colour, place, size = (all(column) for column in zip(*rows, strict=True))
        return kind, colour, place, size

    candidates: list[Seen | None] = [*sighting.things, *(None,) * (len(scene.things) - len(sighting.things))]
    kind, colour, place, size = max(match(order) for order in permutations(candidates, len(scene.things)))
    count = len(sighting.things) == len(scene.things)
    return Verdict(kind, colour, sighting.background == scene.background, place, size, count)


# ---------------------------------------------------------------- seeing


def see(picture: Image.Image | NDArray[np.uint8], kinds: tuple[str, ...] = KINDS, styles: tuple[str, ...] = STYLES) -> Sighting:
    """What a square RGB picture of any size shows, in terms of these kinds and drawing styles."""
    pixels = _pixels(picture)
    background, shade = _background(pixels)
    contrast: Floats = np.pad(pixels - shade, ((PAD, PAD), (PAD, PAD), (0, 0)))
    strength: Floats = np.linalg.norm(_smooth(contrast), axis=2)
    left_over: Bools = strength > FOREGROUND
    # Not what is faint beside something strong: a bridge of blur between two things.
    patches = _components(left_over & (strength > BRIDGE * _highest(strength, 3)))
    groups = _components(_grown(left_over))  # fragments that a narrow gap divides belong together
    found: list[tuple[Fit, Box]] = []
    while len(found) < LARGEST_COUNT and left_over.any():
        group = groups == np.bincount(groups[left_over]).argmax()
        if np.count_nonzero(group & left_over) < SPECK:
            break
        remaining = np.where(_grown(left_over)[..., None], contrast, np.float32(0))
        smooth = _smooth(remaining)
        field = Field(shade, remaining, smooth, np.square(smooth).sum(2), left_over, patches)
        best, *others = sorted(_fits(field, _templates(kinds, styles)), key=lambda fit: fit.unexplained)
        best = replace(best, rival=min((fit.unexplained for fit in others if fit.rivals(best)), default=np.inf))
        if best.likely:
            explained, box = _grown(_grown(_mask(best, left_over.shape))), best.box
        else:
            explained, box = group, _box(group & left_over)
        found.append((best, box))
        left_over = left_over & ~explained
    found.sort(key=lambda pair: pair[1][0] + pair[1][2])
    return Sighting(background, tuple(_seen(fit, box, len(found)) for fit, box in found))


def _pixels(picture: Image.Image | NDArray[np.uint8]) -> Floats:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if image.size != (world.RESOLUTION, world.RESOLUTION):
        image = image.resize((world.RESOLUTION, world.RESOLUTION), Image.Resampling.BOX)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _background(pixels: Floats) -> tuple[str | None, Floats]:
    """Name and shade of the background: each border pixel votes for the nearest, since a thing may touch the border."""
    smooth = _smooth(pixels)
    border = np.concatenate(
        [smooth[:2].reshape(-1, 3), smooth[-2:].reshape(-1, 3), smooth[2:-2, :2].reshape(-1, 3), smooth[2:-2, -2:].reshape(-1, 3)]
    )
    shades = np.array(list(world.BACKGROUNDS.values()), dtype=np.float32)
    votes = np.linalg.norm(border[:, None] - shades, axis=2).argmin(1)
    winner = int(np.bincount(votes, minlength=len(shades)).argmax())
    shade: Floats = np.median(border[votes == winner], axis=0).astype(np.float32)
    known = float(np.linalg.norm(shade - shades[winner])) <= BACKGROUND_REACH
    return (tuple(world.BACKGROUNDS)[winner] if known else None), shade


def _seen(fit: Fit, box: Box, count: int) -> Seen:
    left, top, right, bottom = (v - PAD for v in box)
    side = max(right - left, bottom - top) * (world.SIZES["medium"] / world.PAIR_SIZE if count == 2 else 1)
    size = min(world.SIZES, key=lambda word: abs(np.log(world.SIZES[word] / side)))
    nominal = world.PAIR_SIZE if count == 2 else world.SIZES[size]
    x, y = (left + right) / 2, (top + bottom) / 2
    away = {p: float(np.hypot(x - world.centre(p, nominal, "x"), y - world.centre(p, nominal, "y"))) for p in world.PLACES}
    nearest = min(away, key=lambda place: away[place])
    place = nearest if away[nearest] <= PLACE_REACH else None
    if not fit.likely:
        return Seen(None, None, size, place, None, fit.unexplained)
    return Seen(fit.template.kind, fit.template.colour, size, place, fit.template.style, fit.unexplained)


# ---------------------------------------------------------------- fitting


@cache
def _templates(kinds: tuple[str, ...], styles: tuple[str, ...]) -> tuple[Template, ...]:
    shapes = [Template(k, c, None) for k in kinds if k in world.SHAPES for c in world.COLOURS]
    return (*shapes, *(Template(k, None, s) for k in kinds if k in world.FILES for s in styles))


@cache
def _drawn(template: Template, side: int) -> tuple[Floats, Floats]:
    """Premultiplied colour (side, side, 3) and opacity (side, side, 1) of a thing centred in its box."""
    sprite = world.sprite(template.kind, template.colour, side, template.style or STYLES[0])
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(sprite, (round((side - sprite.width) / 2), round((side - sprite.height) / 2)))
    pixels = np.asarray(canvas, dtype=np.float32)
    alpha = pixels[..., 3:] / np.float32(255)
    return (pixels[..., :3] * alpha).astype(np.float32), alpha.astype(np.float32)


@cache
def _bank(templates: tuple[Template, ...], side: int) -> tuple[Floats, Floats]:
    """All templates at one side: colours (N, 3, side * side) and opacities (N, 1, side * side)."""
    drawn = [_drawn(t, side) for t in templates]
    colours, alphas = (np.stack(part).reshape(len(drawn), side * side, -1).transpose(0, 2, 1) for part in zip(*drawn, strict=True))
    return np.ascontiguousarray(colours), np.ascontiguousarray(alphas)


def _fits(field: Field, templates: tuple[Template, ...]) -> list[Fit]:
    """The templates that explain most of the picture: sought in half resolution, then fitted, then judged."""
    height, width, _ = field.contrast.shape
    half = field.contrast.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    left, top, right, bottom = (v // 2 for v in _box(field.left_over))
    best_gain = np.full(len(templates), -np.inf)
    best_at = np.zeros((len(templates), 3), dtype=int)  # side, left, top in half resolution
    for side in COARSE_SIDES:
        colours, alphas = _bank(templates, side)
        drawn = (colours - alphas * field.shade[:, None]).reshape(len(templates), -1)
        x, y = _span(left, right, side, width // 2), _span(top, bottom, side, height // 2)
        windows = np.lib.stride_tricks.sliding_window_view(half[y, x], (side, side), axis=(0, 1))
        gains = _gains(windows, drawn)
        at = gains.argmax(0)
        gain = gains[at, np.arange(len(templates))]
        better = gain > best_gain
        best_gain[better] = gain[better]
        columns = windows.shape[1]
        best_at[better] = np.stack([np.full(len(at), side), x.start + at % columns, y.start + at // columns], 1)[better]
    ranked: list[int] = []
    for i in map(int, np.argsort(-best_gain)):  # not one shape in all its colours: the best match needs rivals of other kinds
        if sum(templates[i].kind == templates[j].kind for j in ranked) < SAME_KIND:
            ranked.append(i)
        if len(ranked) == SHORTLIST:
            break
    shortlist = []
    for i in ranked:
        side, left, top = (2 * int(v) for v in best_at[i])
        shortlist.append(_fit(templates[i], side, left, top, field))
    shortlist.sort(key=lambda fit: -fit.gain)
    return [_judged(fit, field) for fit in shortlist[:JUDGED]]


def _span(low: int, high: int, side: int, extent: int) -> slice:
    """Where to look, along one axis, for a thing whose middle lies within low..high."""
    start = min(max(0, low - side // 2), extent - side)
    return slice(start, min(extent, max(start, high - side // 2) + side))


def _gains(windows: Floats, drawn: Floats) -> Floats:
    """How much of the picture each drawing explains at each place: |picture|^2 - |picture - drawn|^2.

    windows: (rows, columns, 3, side, side); drawn: (N, 3 * side * side); result: (rows * columns, N).
    """
    gains: Floats = 2 * windows.reshape(-1, drawn.shape[1]) @ drawn.T - np.square(drawn).sum(1)
    return gains


def _fit(template: Template, side: int, left: int, top: int, field: Field, reach: int = 2) -> Fit:
    """The side and place, near those given, at which the template explains most."""
    height, width, _ = field.contrast.shape
    best = Fit(template, side, left, top, -np.inf)
    for step in (2, 1):
        start = best
        for s in range(start.side - step, start.side + step + 1, step):
            x0, y0 = (min(max(0, v + round((start.side - s) / 2) - reach), e - s) for v, e in ((start.left, width), (start.top, height)))
            area = field.contrast[y0 : y0 + s + 2 * reach, x0 : x0 + s + 2 * reach]
            windows = np.lib.stride_tricks.sliding_window_view(area, (s, s), axis=(0, 1))
            colour, alpha = _drawn(template, s)
            gains = _gains(windows, (colour - alpha * field.shade).transpose(2, 0, 1).reshape(1, -1))[:, 0]
            at = int(gains.argmax())
            if gains[at] > best.gain:
                best = Fit(template, s, x0 + at % windows.shape[1], y0 + at // windows.shape[1], float(gains[at]))
    return best


def _mask(fit: Fit, shape: tuple[int, ...]) -> Bools:
    """Where the thing is drawn, (H, W)."""
    mask = np.zeros(shape, dtype=bool)
    mask[fit.top : fit.top + fit.side, fit.left : fit.left + fit.side] = _drawn(fit.template, fit.side)[1][..., 0] > 0.5
    return mask


def _judged(fit: Fit, field: Field) -> Fit:
    """Measure what the fitted template leaves unexplained of its own area and of all patches that it touches."""
    mask = _mask(fit, field.left_over.shape)
    numbers = np.unique(field.patches[mask & field.left_over])
    touched = np.isin(field.patches, numbers[numbers > 0]) & field.left_over
    if not touched.any():  # a shape of almost the background's colour "explains" an empty place
        return fit
    region = touched | _grown(mask)
    near = np.s_[max(0, fit.top - PAD) : fit.top + fit.side + PAD, max(0, fit.left - PAD) : fit.left + fit.side + PAD]
    smooth = field.smooth[near]
    colour, alpha = (
        np.pad(
            part,
            (
                (fit.top - near[0].start, smooth.shape[0] - fit.side - fit.top + near[0].start),
                (fit.left - near[1].start, smooth.shape[1] - fit.side - fit.left + near[1].start),
                (0, 0),
            ),
        )
        for part in _drawn(fit.template, fit.side)
    )
    sharp = _smooth(colour - alpha * field.shade)
    alpha = _smooth(alpha)
    inner = alpha[..., 0] > 0.99
    if inner.any():  # the shade of the whole thing may be a little off: its median tells by how much
        limit = SHAPE_SHIFT if fit.template.colour else EMOJI_SHIFT
        sharp += alpha * np.clip(np.median((smooth - sharp)[inner], axis=0), -limit, limit)
    drawings = (sharp, _smooth(_smooth(sharp)))  # the picture may be blurred
    inside = min(float(np.square(smooth - drawing).sum(2)[region[near]].sum()) for drawing in drawings)
    total = float(field.energy[region].sum())
    outside = total - float(field.energy[near][region[near]].sum())
    errors = np.square(smooth - sharp).sum(2)[inner].sum()
    uneven = float(errors / max(1.0, float(field.energy[near][inner].sum())))
    return replace(fit, unexplained=(inside + outside) / total, uneven=uneven)


# ---------------------------------------------------------------- pixels


def _smooth(pixels: Floats) -> Floats:
    """Binomial 3 x 3 filter of (H, W, C)."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth: Floats = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    return smooth


def _grown(mask: Bools) -> Bools:
    """The mask and all neighbours of its pixels."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    grown: Bools = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return grown


def _highest(values: Values, reach: int = 1) -> Values:
    """Highest value of each pixel's neighbourhood, (H, W); the values are not negative."""
    for _ in range(reach):
        padded = np.pad(values, 1)
        rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
        values = np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return values


def _components(mask: Bools) -> Labels:
    """Number of the connected patch of each pixel, 0 where the mask is not: the largest number spreads until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0).astype(np.int32)
    while True:
        spread = np.where(mask, _highest(labels), np.int32(0))
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _box(mask: Bools) -> Box:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
