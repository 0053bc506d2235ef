"""One curve of several runs as a picture, from their metrics.jsonl.

    python benchmarks/plot_runs.py runs/byol runs/byol-1a2b --labels BYOL "no predictor" \
        --tag monitor/projection_std --to benchmarks/byol.png
"""

import json
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(
    runs: tyro.conf.Positional[list[str]],
    labels: list[str],
    tag: list[str],
    to: str,
):
    """Draw --tag over the steps of each run, one panel for each tag; a cross where the alarm rang."""
    figure, panels = plt.subplots(1, len(tag), figsize=(4 * len(tag), 2.8), squeeze=False)
    for run, label in zip(runs, labels, strict=True):
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        alarm = next((i for i, line in enumerate(lines) if line.get("monitor/alarm")), None)
        for panel, name in zip(panels[0], tag, strict=True):
            values = [line[name] for line in lines]
            (curve,) = panel.plot(steps, values, label=label)
            if alarm is not None:
                panel.plot(steps[alarm], values[alarm], "x", color=curve.get_color(), label="the alarm rings")
    for panel, name in zip(panels[0], tag, strict=True):
        panel.set(xlabel="step", title=name, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(to, dpi=100)
    print(to)


if __name__ == "__main__":
    tyro.cli(main)
