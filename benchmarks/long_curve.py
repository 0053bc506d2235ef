"""How long must I wait? Accuracy on frozen features against the minutes of one long run, as a picture.

    python benchmarks/long_curve.py SimCLR --command "simclr.py --data PHOTOS --epochs 100" --data PHOTOS \
        --saves 10 --images-per-second 278
    python benchmarks/long_curve.py scratch --supervised-like runs/curve/SimCLR/backbone.pt --epochs 5 15 60 \
        --data PHOTOS --images-per-second 500

The first trains, keeps a copy of backbone.pt --saves times, measures each by eval_linear.py when the training
is over, adds the curve to --to and draws all that are there. Stopped, it goes on by the same command. The
second trains a classifier of the same architecture from random weights, anew for each number of epochs.
Minutes are images seen / --images-per-second, which is measured on the idle machine: the run itself may
share it with others. An untrained network is the point at 0 minutes.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval_linear  # noqa: E402


def copies(folder):
    """{step: its backbone.pt} of what keep() has copied."""
    return {int(path.stem[5:]): path for path in folder.glob("step-*.pt") if path.stem[5:].isdigit()}


def train(command, folder, saves):
    """Run the script; when it passes a share of its steps, keep its next backbone.pt as step-N.pt."""
    script, *flags = shlex.split(command)
    flags += ["--run-dir", str(folder), "--save-minutes", "1"]
    folder.mkdir(parents=True, exist_ok=True)
    kept = max(copies(folder), default=0)

    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", HERE.parent / script, *flags], stdout=log, stderr=log
        )
        while process.poll() is None:
            time.sleep(5)
            kept = keep(folder, kept, saves)
    if process.returncode:
        sys.exit(f"{script} failed, see {folder}/log.txt")
    keep(folder, kept, saves)


def keep(folder, kept, saves):
    """Copy backbone.pt if a save is due -> the step of the last copy."""
    log = folder / "log.txt"
    total = re.search(r", (\d+) steps", log.read_text())
    if not (total and (folder / "checkpoint.pt").exists()):
        return kept
    total, step = int(total[1]), torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    if step * saves // total == kept * saves // total:
        return kept
    shutil.copy(folder / "backbone.pt", folder / f"step-{step}.pt")
    return step


def accuracy(backbone, data):
    """logreg and k-NN of a backbone.pt by eval_linear.py, once."""
    top1 = {}
    for mode in ("logreg", "knn"):
        args = eval_linear.Args(str(backbone), mode, data=data)
        measured = eval_linear.result_path(args, f"eval-{mode}.json")
        if not measured.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                eval_linear.evaluate(args)
        top1[mode] = json.loads(measured.read_text())["results"][0]["top1"]  # of k-NN: k = 20
    return top1


def pretrained(command, data, folder, saves):
    """Points of one run, [{images, logreg, knn}]."""
    train(command, folder, saves)
    batch = json.loads((folder / "args.json").read_text())["batch_size"]
    files = copies(folder)
    points = [{"images": 0} | accuracy(f"random:{folder}/backbone.pt", data)]
    return points + [{"images": step * batch} | accuracy(files[step], data) for step in sorted(files)]


def supervised(file, data, epochs):
    """Points of classifiers trained from random weights, each with a schedule of its own."""
    images, points = sum(~eval_linear.read_labels(data).is_test).item(), []
    for count in epochs:
        args = eval_linear.Args(f"random:{file}", "finetune", data=data, epochs=count)
        points.append({"images": count * images, "top1": eval_linear.evaluate(args)["results"][0]["top1"]})
    return points


def draw(curves, to):
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, sharex=True)
    for panel, mode in zip(panels, ("logreg", "knn"), strict=True):
        for name, curve in curves.items():
            points = [point for point in curve["points"] if point["images"]]
            minutes = [point["images"] / curve["images_per_second"] / 60 for point in points]
            style = {"ls": "--", "color": "black"} if "top1" in points[0] else {}
            top1 = [point.get("top1", point.get(mode)) for point in points]
            (line,) = panel.plot(minutes, top1, label=name, marker=".", **style)
            untrained = [point[mode] for point in curve["points"] if not point["images"]]
            for value in untrained:
                panel.axhline(value, color=line.get_color(), ls=":", lw=1)

        title = {"logreg": "logistic regression", "knn": "k-NN"}[mode]
        panel.set(xscale="log", xlabel="minutes on 2 CPU cores", title=title)
        panel.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 accuracy in %")
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="upper center", ncols=len(curves))  # above: it hides no curve there
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(to, dpi=110)


def main(
    name: tyro.conf.Positional[str],
    data: str,
    images_per_second: float,
    command: str = "",
    supervised_like: str = "",
    epochs: tuple[int, ...] = (5, 15, 60),
    saves: int = 10,
    runs: str = "runs/curve",
    to: str = "benchmarks/long_curve.png",
):
    """NAME of the curve; --command: script and flags; or --supervised-like: a backbone.pt of its network."""
    if supervised_like:
        points = supervised(supervised_like, data, epochs)
    else:
        points = pretrained(command, data, Path(runs, name.replace(" ", "-")), saves)
    file = Path(to).with_suffix(".json")
    curves = json.loads(file.read_text()) if file.exists() else {}
    curves[name] = {"command": command, "images_per_second": images_per_second, "points": points}
    file.write_text(json.dumps(curves, indent=1) + "\n")
    draw(curves, to)
    print(f"{name}: {points}, {to}")


if __name__ == "__main__":
    tyro.cli(main)
