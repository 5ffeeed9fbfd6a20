"""A picture of a diagnosis: the hardware as an icicle, its windows, and the communicators, coloured by scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.topology import Indices, Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

Values = npt.NDArray[np.float64]
SUFFIXES = (".svg", ".png")
_ICICLE = (Kind.POWER, Kind.SPINE, Kind.LEAF, Kind.HOST, Kind.NIC, Kind.DEVICE)
_GROUPS = (Kind.TENSOR, Kind.PIPELINE, Kind.DATA)
_NOTHING = "#e4e4e4"
_OUTLINE = "#0b5fff"
_LEAST_LABEL = 0.035
"""Of the width: in less than that a name cannot be read."""
_LEAST_OUTLINE = 0.006


@dataclass(frozen=True, eq=False)
class Shown:
    """``values``: (windows, ranks), NaN where nothing was measured, the newest last; ``measure`` says what they are. A
    rank has the colour of their sum, over the square root of their number; an element that of the mean of its ranks.
    ``blamed`` is outlined."""

    topology: Topology
    values: Values
    measure: str
    blamed: tuple[Element, ...]
    title: str
    subtitle: str


def check(path: Path) -> None:
    """Raises ``ConfigError`` if no picture could be written there."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--picture {path}: name a file that ends with {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no directory {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        remedy = "pip install 'megatron-flashrecovery[diagnose]', or leave --picture out"
        raise ConfigError(f"--picture needs matplotlib: {remedy}") from None


def draw(path: Path, shown: Shown) -> None:
    """Takes a second for 2,048 ranks."""
    from matplotlib.figure import Figure

    view = _View(shown)
    figure = Figure(figsize=(14, 9.5), layout="constrained")
    kinds = [kind for kind in _GROUPS if view.elements_of(kind)]
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1) if kinds else (1, 0.01))
    upper = rows[0].subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    view.icicle(upper[0])
    view.windows(upper[1])
    if kinds:
        for axes, kind in zip(rows[1].subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            view.communicators(axes, kind)
    rows[0].colorbar(view.colours, ax=list(upper), label=shown.measure, pad=0.01, fraction=0.025)
    figure.suptitle(shown.title, fontsize=15, fontweight="bold", x=0.01, ha="left")
    rows[0].suptitle(shown.subtitle, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


class _View:
    def __init__(self, shown: Shown) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        self._shown, self._topology = shown, shown.topology
        with np.errstate(invalid="ignore"):
            counted = np.isfinite(shown.values).sum(axis=0)
            self._z = np.where(counted > 0, np.nansum(shown.values, axis=0) / np.sqrt(np.maximum(counted, 1)), np.nan)
        highest = float(np.nanmax(self._z, initial=0.0)) if np.isfinite(self._z).any() else 0.0
        self.colours: ScalarMappable = ScalarMappable(Normalize(0.0, max(4.0, highest)), _map())
        self._order = _order(self._topology)
        self._place = np.argsort(self._order)
        self._blamed = [self._topology.elements.index(element) for element in shown.blamed]

    def elements_of(self, kind: Kind) -> list[int]:
        return [k for k, element in enumerate(self._topology.elements) if element.kind is kind]

    def icicle(self, axes: Axes) -> None:
        """Power domains above, devices below; an element is as wide as the ranks in its reach."""
        layers = [kind for kind in _ICICLE if self.elements_of(kind)]
        world = self._topology.world
        for level, kind in enumerate(reversed(layers)):
            boxes, colours = [], []
            for k in self.elements_of(kind):
                colour = self._colour(self._topology.ranks_of(k))
                runs = _runs(self._place[self._topology.ranks_of(k)])
                boxes += runs
                colours += [colour] * len(runs)
                for start, width in runs:
                    if width / world >= _LEAST_LABEL:
                        self._name(axes, k, start + width / 2, level + 0.5, width / world, colour)
            edges = "white" if max(width for _, width in boxes) / world > _LEAST_LABEL / 4 else "none"
            axes.broken_barh(boxes, (level + 0.03, 0.94), facecolors=colours, edgecolor=edges, linewidth=0.6)
        self._outline_icicle(axes, list(reversed(layers)))
        axes.set(xlim=(0, world), ylim=(0, len(layers)))
        axes.set_yticks(np.arange(len(layers)) + 0.5, [str(kind) for kind in reversed(layers)])
        _bare(axes)

    def windows(self, axes: Axes) -> None:
        values = self._shown.values[:, self._order]
        axes.imshow(
            self.colours.to_rgba(np.ma.masked_invalid(values)),
            aspect="auto",
            interpolation="nearest",
            extent=(0, values.shape[1], values.shape[0], 0),
        )
        number = values.shape[0]
        axes.set_yticks([0.5, number - 0.5] if number > 1 else [0.5], ["oldest", "newest"] if number > 1 else ["all"])
        axes.set_ylabel("windows" if number > 1 else "")
        world = values.shape[1]
        every = max(1, world // 32)
        axes.set_xticks(np.arange(0, world, every) + 0.5, [str(rank) for rank in self._order[::every]], fontsize=8)
        axes.set_xlabel("rank" if every == 1 else f"rank (one of {every} is named)")
        for k in self._blamed:
            for start, width in _runs(self._place[self._topology.ranks_of(k)]):
                begin, wide = self._widened(start, width)
                for x in (begin, begin + wide):
                    axes.axvline(x, color=_OUTLINE, linewidth=1.2)
        _bare(axes)

    def _widened(self, start: float, width: float) -> tuple[float, float]:
        """An outline must not cover what it is around."""
        more = max(0.0, self._topology.world * _LEAST_OUTLINE - width) / 2
        return start - more, width + 2 * more

    def communicators(self, axes: Axes, kind: Kind) -> None:
        """A row for each communicator, a column for each of its members."""
        from matplotlib.patches import Rectangle

        elements = self.elements_of(kind)
        widest = max(self._topology.ranks_of(k).size for k in elements)
        table = np.full((len(elements), widest), np.nan)
        for row, k in enumerate(elements):
            ranks = self._topology.ranks_of(k)
            table[row, : ranks.size] = self._z[ranks]
        axes.imshow(self.colours.to_rgba(np.ma.masked_invalid(table)), aspect="auto", interpolation="nearest")
        for row, k in enumerate(elements):
            if k in self._blamed:
                box = Rectangle((-0.5, row - 0.5), widest, 1, fill=False, edgecolor=_OUTLINE, linewidth=2.5)
                box.set_clip_on(False)
                axes.add_patch(box)
        every = max(1, -(-len(elements) // 16))
        names = [self._topology.elements[k].name for k in elements[::every]]
        axes.set_yticks(np.arange(0, len(elements), every), names, fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel(f"{widest} members" if widest > 1 else "")
        axes.set_title(f"{len(elements)} {kind}s", fontsize=10)
        _bare(axes)

    def _colour(self, ranks: Indices) -> Any:  # noqa: ANN401  (matplotlib's)
        values = self._z[ranks]
        values = values[np.isfinite(values)]
        return self.colours.to_rgba(values.mean()) if values.size else self.colours.to_rgba(np.ma.masked)

    def _name(self, axes: Axes, k: int, x: float, y: float, share: float, colour: Any) -> None:  # noqa: ANN401
        name = self._topology.elements[k].name
        if self._topology.elements[k].kind in (Kind.DEVICE, Kind.NIC) and len(name) > share * 110:
            name = name.rpartition("/")[2]  # its host is above it
        is_dark = sum(colour[:3]) < 1.5
        if len(name) <= share * 160:
            axes.text(x, y, name, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")

    def _outline_icicle(self, axes: Axes, layers: Sequence[Kind]) -> None:
        from matplotlib.patches import Rectangle

        for k in self._blamed:
            element = self._topology.elements[k]
            if element.kind not in layers:
                continue
            level = layers.index(element.kind)
            runs = list(_runs(self._place[self._topology.ranks_of(k)]))
            for start, width in runs:
                begin, wide = self._widened(start, width)
                thick = 2.5 if width == wide else 1.2
                box = Rectangle((begin, 0), wide, level + 1, fill=False, edgecolor=_OUTLINE, linewidth=thick, zorder=5)
                box.set_clip_on(False)
                axes.add_patch(box)
            if runs[0][1] / self._topology.world < _LEAST_LABEL:
                self._point_at(axes, element.name, runs[0][0] + runs[0][1] / 2, level + 1)

    def _point_at(self, axes: Axes, name: str, x: float, y: float) -> None:
        is_right = x > self._topology.world / 2
        axes.annotate(
            name,
            (x, y),
            xytext=(-14 if is_right else 14, 12),
            textcoords="offset points",
            ha="right" if is_right else "left",
            color=_OUTLINE,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": _OUTLINE},
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": _OUTLINE},
            zorder=6,
            annotation_clip=False,
        )


def _map() -> Any:  # noqa: ANN401
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("scores", colormaps["YlOrRd"](np.linspace(0.03, 1.0, 256)))
    return colours.with_extremes(bad=_NOTHING)


def _order(topology: Topology) -> Indices:
    """The ranks such that those of a spine, leaf, host, NIC and device are beside each other."""
    keys = []
    for kind in (Kind.DEVICE, Kind.NIC, Kind.HOST, Kind.LEAF, Kind.SPINE):  # lexsort: the last key is the first
        key = np.full(topology.world, -1, dtype=np.int64)
        for k in reversed(range(len(topology.elements))):
            if topology.elements[k].kind is kind:
                key[topology.ranks_of(k)] = k
        keys.append(key)
    return np.lexsort(keys)


def _runs(places: Indices) -> list[tuple[int, int]]:
    """(start, width) of neighbours."""
    places = np.sort(places)
    cuts = np.flatnonzero(np.diff(places) > 1) + 1
    return [(int(run[0]), run.size) for run in np.split(places, cuts)]


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
