"""Is pretraining worth it for me? Accuracy against the number of labels, for several backbones, as a picture.

    python benchmarks/label_curve.py --data PHOTOS --backbones untrained=random:runs/simclr/backbone.pt \
        SimCLR=runs/simclr/backbone.pt --scratch runs/simclr/backbone.pt --to benchmarks/label_curve.png

Frozen features and logistic regression (evaluation.md 4 and 7: stratified subsets, the penalty chosen among
the labels), and --scratch, the architecture of that file trained from random weights on the labels alone:
SGD, crops and flips, 600 steps or 100 epochs, with all labels 15 epochs. Mean and sample deviation over
seeds; with all labels only the untrained network differs between them.
"""

import json
import sys
from pathlib import Path

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_linear as E  # noqa: E402


def frozen(path, data, counts, seeds):
    """{labels: [top-1 of each seed]} of logistic regression on frozen features."""
    images = E.read_labels(data)
    learnt = [item for item, test in zip(images.items, images.is_test, strict=True) if not test]
    top1, features = {count: [] for count in counts}, None
    for seed in range(seeds):
        if features is None or path.startswith("random:"):
            backbone = E.load_backbone(path, seed)
            E.settle_statistics(backbone, learnt if path.startswith("random:") else [], "cpu")
            features = E.extract_features(backbone, E.Pictures(images.items, backbone.side), workers=2)
        for count in counts:
            if count == 0 and seed and not path.startswith("random:"):
                continue  # with all labels the subset is the same
            options = E.Args(path, "logreg", data=data, labels=count)
            train, test = next(E.splits(images, options, seed))
            known = features[train], images.labels[train], images.groups[train], len(images.classes)
            weight, bias, _ = E.logreg(*known, seed)
            top1[count].append(E.accuracy(features[test] @ weight + bias, images.labels[test])["top1"])
    return top1


def from_scratch(file, data, counts, seeds):
    """The same of a network trained from random weights on these labels alone."""
    top1 = {}
    for count in counts:
        batch = min(64, max(8, count // 4)) if count else 256
        epochs = min(100, 600 * batch // count) if count else 15
        args = E.Args(f"random:{file}", "finetune", data=data, labels=count, epochs=epochs, workers=0)
        args.batch_size, args.seeds = batch, seeds if count else 1
        top1[count] = [result["top1"] for result in E.evaluate(args)["results"]]
    return top1


def draw(table, title, to):
    figure, panel = plt.subplots(figsize=(7, 4.2))
    for name, curve in table.items():
        rows = [torch.tensor(values) for values in curve.values()]
        means = [row.mean().item() for row in rows]
        spread = [row.std().item() if len(row) > 1 else 0.0 for row in rows]
        style = "--" if name in ("untrained", "from scratch") else "-"
        panel.errorbar([*curve], means, spread, label=name, capsize=3, ls=style, marker=".")

    panel.set(xscale="log", xlabel="labels", ylabel="top-1 accuracy in %", title=title)
    ticks = sorted({count for curve in table.values() for count in curve})
    panel.set_xticks(ticks, [str(count) for count in ticks])
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def main(
    backbones: list[str],
    data: str = "demo",
    labels: tuple[int, ...] = (10, 47, 100, 1000, 0),
    seeds: int = 3,
    scratch: str = "",
    scratch_seeds: int = 2,
    to: str = "label_curve.png",
):
    """--backbones NAME=FILE ...; --labels: numbers of labels, 0 is all; writes --to and the same as .json,
    whose other curves stay."""
    everything, file = sum(~E.read_labels(data).is_test).item(), Path(to).with_suffix(".json")
    kept = json.loads(file.read_text())["top1"] if file.exists() else {}
    table = {name: {int(count): kept[name][count] for count in kept[name]} for name in kept}
    for name, path in (word.split("=", 1) for word in backbones):
        curve = frozen(path, data, labels, seeds)
        table[name] = {count or everything: curve[count] for count in curve}
        print(name, {count: round(sum(v) / len(v), 1) for count, v in table[name].items()}, flush=True)
    if scratch:
        curve = from_scratch(scratch, data, labels, scratch_seeds)
        table["from scratch"] = {count or everything: curve[count] for count in curve}

    tests = int(sum(E.read_labels(data).is_test))
    results = {"data": data, "seeds": seeds, "test_images": tests, "top1": table}
    file.write_text(json.dumps(results, indent=1))
    draw(table, Path(data).name, to)
    print(to)


if __name__ == "__main__":
    tyro.cli(main)
