"""The testbed's drawing: what was planted against what is measured, before and after each method.

One column a method; above the masked-LM (stereotype preference against the link in the text), below the classifier (TPR-GAP against the link in the labels, with
what chance alone gives). Grey, open: without the method. Black, filled: with it. Bars: 95 % interval of the mean over seeds, where there are several.
It tells without colour: dashes and fillings differ, not hues.
"""

BEFORE = {"color": "0.55", "linestyle": "--", "marker": "o", "markerfacecolor": "white"}
AFTER = {"color": "black", "linestyle": "-", "marker": "s", "markerfacecolor": "black"}
PLACES = {"text": ("stereotype-preference", "stereotype preference\nof the masked-LM", "link planted in the text", 0.5),
          "labels": ("tpr-gap/rms", "TPR-GAP rms of the\nclassifier, points", "link planted in the labels", 100)}
FLOOR = "tpr-gap/rms-shuffled"


def draw(found: dict):
    """found: what testbed.json holds -> matplotlib Figure. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows = found["rows"]
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "none")) or [None]
    figure = Figure(figsize=(1.6 + 1.45 * len(methods), 4.6), layout="constrained")
    axes = figure.subplots(len(PLACES), len(methods), sharex=True, sharey="row", squeeze=False)
    for (place, (measure, what, planted, top)), line in zip(PLACES.items(), axes):
        here = [r for r in rows if r["place"] == place]
        for axis, method in zip(line, methods):
            _line(axis, [r for r in here if r["method"] == "none"], measure, BEFORE, "without")
            _line(axis, [r for r in here if r["method"] == method], measure, AFTER, "with the method")
            if place == "labels":
                plain = sorted((r for r in here if r["method"] == "none"), key=lambda r: r["strength"])
                axis.plot([r["strength"] for r in plain], [r["figures"][FLOOR]["mean"] for r in plain], color="0.55", linestyle=":", linewidth=1, label="chance alone")
            axis.set(xlim=(-0.06, 1.06), ylim=(0, 1.06 * top), xticks=[0, 0.5, 1], xticklabels=["0", ".5", "1"])
            axis.spines[["top", "right"]].set_visible(False)
            if place == "text" and method is not None:
                axis.set_title(method, fontsize=10)
        line[0].set_ylabel(what)
        line[len(methods) // 2].set_xlabel(planted)
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _line(axis, rows: list[dict], measure: str, style: dict, label: str) -> None:
    """Means over seeds against the planted strength, with the intervals of the means."""
    if not rows:
        return
    rows = sorted(rows, key=lambda r: r["strength"])
    figures = [r["figures"][measure] for r in rows]
    reach = None
    if all(f["sd"] is not None for f in figures):
        reach = [[f["mean"] - f["low"] for f in figures], [f["high"] - f["mean"] for f in figures]]
    axis.errorbar([r["strength"] for r in rows], [f["mean"] for f in figures], yerr=reach, label=label, linewidth=1.2, markersize=4, elinewidth=1, **style)
