"""Draws the README's figure: KL against stored bits, jquant beside the best of other tools.

python -m benchmarks.headline     # draw docs/images/quality.svg from results/
"""

from __future__ import annotations

import json

from benchmarks.harness import RESULTS
from benchmarks.others import OTHERS
from benchmarks.pictures import save

GREY, ORANGE, BLUE = "#666666", "#D55E00", "#0072B2"  # told apart by the colour-blind too


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    one_pass = json.loads((RESULTS / "quality.json").read_text())["rows"]
    stages = json.loads((RESULTS / "stages.json").read_text())["rows"]
    names = list(stages)
    series = [
        ("rounded to nearest", GREY, [one_pass[name]["Nearest"]["kl"] for name in names]),
        ("best of other tools", ORANGE, [min(OTHERS[name].values()) for name in names]),
        ("jquant, QEP", BLUE, [stages[name]["weight + QEP"]["kl"] for name in names]),
    ]
    figure, axis = pyplot.subplots(figsize=(7.6, 3.2), layout="constrained")
    for label, color, losses in series:
        axis.plot(range(len(names)), losses, "o-", color=color, label=label, linewidth=1)
        for place, kl in enumerate(losses):
            axis.annotate(f"{kl:.3g}", (place, kl), (5, -11), textcoords="offset points",
                          fontsize=8, color=color)  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(0.03, 20)
    axis.set_xlim(-0.2, len(names) - 0.6)
    axis.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axis.set_yticks([], minor=True)
    bits = [one_pass[name]["Nearest"]["bits_per_weight"] for name in names]
    labels = [f"{name}\n{some:.2f} bits" for name, some in zip(names, bits, strict=True)]
    axis.set_xticks(range(len(names)), labels)
    axis.set_ylabel("KL, nats per token")
    axis.set_title("SmolLM2-135M: distance to the full model (less is better)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    save(figure, "quality.svg", "quality.json", "stages.json")


if __name__ == "__main__":
    main()
