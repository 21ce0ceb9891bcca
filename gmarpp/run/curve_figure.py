"""The figure of mean insertion and deletion curves."""

from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gmarpp.labels import method_color, method_dashes, method_label
from gmarpp.run.summary import MeanCurve

_BANDS = 4
_BOUNDED = ("probability", "sigmoid")


def curves_figure(
    insertion: Mapping[str, MeanCurve],
    deletion: Mapping[str, MeanCurve],
    score: str = "probability",
    normalize: bool = False,
) -> Figure:
    """Draw the mean insertion and deletion curves of all methods side by side, with areas in the legends.

    Args:
        insertion: mean insertion curve of each method; higher is better.
        deletion: mean deletion curve of each method; lower is better. Up to four methods show their intervals, too.
        score: what the curves show, for the axis label; a probability or sigmoid has its whole range, 0 to 1.
        normalize: whether each curve was rescaled, and may leave that range.

    Returns:
        A figure of its own, outside matplotlib's global state; save it with `figure_bytes`.
    """
    figure = Figure(figsize=(8.6, 3.7), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("Insertion", "inserted", "higher", insertion), ("Deletion", "deleted", "lower", deletion))
    for axes, (title, verb, better, curves) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        best_first = sorted(curves, key=lambda method: curves[method].auc, reverse=better == "higher")
        for method in best_first:
            curve = curves[method]
            style = {"color": method_color(method), "linestyle": method_dashes(method), "linewidth": 1.6}
            axes.plot(curve.fractions, curve.mean, label=f"{method_label(method)}   {curve.auc:.3f}", **style)
            if len(curves) <= _BANDS:
                axes.fill_between(curve.fractions, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_title(f"{title} ({better} is better)", fontsize=10, loc="left")
        axes.set_xlabel(f"share of patches {verb}, most relevant first", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_axisbelow(True)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(title="area under the curve", fontsize=7.5, title_fontsize=7.5, frameon=False, alignment="left")
    figure.axes[0].set_ylabel(f"{score}, normalized" if normalize else score, fontsize=9)
    if score in _BOUNDED and not normalize:
        figure.axes[0].set_ylim(0, 1)
    return figure
