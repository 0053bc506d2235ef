"""What a GPU makes of the scripts: tables and gpu_check.json in less than ten minutes.

    python benchmarks/gpu_check.py [--sections steps loader] [--minutes 9] [--photos DIR]

scripts     each script in float32, bf16, fp16 with an overflow in its third step, micro-batches, compiled. A
            row fails if the script does, if its first loss is not that in float32, if it does not end finite,
            or if the overflow was not skipped
steps       SimCLR, MAE and DINO at the size of their papers, eager and compiled, and what of it augments
loader      images a second by the number of workers
logs        what a log step and a checkpoint cost
evaluation  k-NN and logistic regression beside the CPU
photos      SimCLR on --photos for the minutes that are left
`--device cpu --quick` tries it without a GPU.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter as Loading
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef train(args" in path.read_text())
SMALL = {"image_size": 32, "batch_size": 64, "epochs": 1, "warmup_epochs": 0.5, "tokenizer_epochs": 1}
QUICK = SMALL | {"batch_size": 8, "queue_size": 64, "out_dim": 64, "bn_splits": 2, "tokenizer_dim": 8}
CASES = {  # flags, and how far the first loss may be from float32's
    "float32": ({"amp": "off"}, 0.0),
    "bf16": ({"amp": "bf16"}, 0.03),
    "fp16, overflow": ({"amp": "fp16"}, 0.03),
    "micro-batches": ({"amp": "off", "micro_batch_size": "a part"}, 0.25),  # statistics of BatchNorm
    "compiled, bf16": ({"amp": "bf16", "compile": True}, 0.03),
}
# With two stages the overflow falls into the tokenizer's training: a step less, and other tokens to predict.
TWO_STAGES = {"fp16, overflow": 0.05}
STEPS = {  # at 224 pixels, as the papers train
    "simclr": {"arch": "resnet50", "optimizer": "lars", "batch_size": 256},
    "mae": {"arch": "vit_base", "patch_size": 16, "batch_size": 256},
    "dino": {"arch": "vit_small", "patch_size": 16, "local_size": 96, "local_crops": 8, "batch_size": 64},
}
TINY_STEP = {"image_size": 32, "batch_size": 8, "patch_size": 8, "local_size": 16, "local_crops": 1}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}  # dense bf16, FLOP/s
SECTIONS = ("scripts", "steps", "loader", "logs", "evaluation", "photos")


@dataclasses.dataclass
class Args:
    sections: tuple[Literal["scripts", "steps", "loader", "logs", "evaluation", "photos"], ...] = SECTIONS
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: to try this file
    quick: bool = False  # three steps of eight images, not compiled; all sizes tiny
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # those to check in section scripts
    photos: str = ""  # folder with train/ and val/ for section photos
    workers: int = 8  # processes that read images
    steps: int = 40  # of each row; the second half is timed
    minutes: float = 9.0  # no row starts later
    out: str = "gpu_check.json"  # where the numbers go
    started: float = dataclasses.field(default_factory=time.time)  # since when the minutes count


def left(args):
    """Seconds that are left."""
    return 60 * args.minutes - (time.time() - args.started)


def silent():
    stack = contextlib.ExitStack()
    nowhere = stack.enter_context(open(os.devnull, "w"))
    stack.enter_context(contextlib.redirect_stdout(nowhere))
    stack.enter_context(contextlib.redirect_stderr(nowhere))
    return stack


def mark(device):
    """A moment in the device's stream of work."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end):
    """Seconds from one mark to another."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def trained(module, args, flags, steps, noise=False):
    """Train for some steps; the rate of the second half, the share that waits for images, memory, losses.
    noise: crops of 32 random pictures instead of images that must be decoded."""
    held = {field.name for field in dataclasses.fields(module.Args)}
    flags = {"device": args.device, "workers": args.workers, "epochs": 1} | flags
    flags["log_every"] = max(1, steps // 2)
    waits, load, read, pool = [], Loading.__next__, module.Images.__init__, {}

    def short(self, *arguments, **options):  # an epoch of `steps` batches
        read(self, *arguments, **options)
        self.items = self.items[: steps * flags["batch_size"]]

    def timed(loading):  # also the last call, which only says that there is no more
        asked = time.perf_counter()
        try:
            return load(loading)
        finally:
            waits.append(time.perf_counter() - asked)

    def random_item(self, key):
        index = key % len(self.items)
        if index % 32 not in pool:
            pool[index % 32] = tuple(view(torch.randint(256, (3, 256, 256)).byte()) for view in self.views)
        return *pool[index % 32], index

    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(module.Images, "__init__", short))
        patches.enter_context(mock.patch.object(Loading, "__next__", timed))
        if noise:
            patches.enter_context(mock.patch.object(module.Images, "__getitem__", random_item))
        flags["run_dir"] = folder
        with silent():
            module.train(module.Args(**{name: value for name, value in flags.items() if name in held}))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    seen = {"first": lines[0]["train/loss"], "last": lines[-1]["train/loss"]}
    seen["rate"] = lines[-1]["perf/images_per_second"]  # between the last two logs
    waits = waits[-(lines[-1]["step"] - lines[-2]["step"]) - 1 : -1] if len(lines) > 1 else [0]
    seen["wait"] = sum(waits) * seen["rate"] / (flags["batch_size"] * len(waits))
    seen["memory"] = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else math.nan
    return seen


# --- scripts ------------------------------------------------------------------------------------------------
def row(module, args, case):
    """Train once; what metrics.jsonl, the scaler and the optimiser say. None: the script lacks the flag."""
    steps, count, used = 3 if args.quick else args.steps, 0, None
    flags = (QUICK if args.quick else SMALL) | CASES[case][0]
    held = {field.name for field in dataclasses.fields(module.Args)}
    if "micro_batch_size" in flags:
        if "micro_batch_size" not in held:
            return None
        flags["micro_batch_size"] = flags["batch_size"] // (2 if args.quick else 4)  # BatchNorm of 2 is noise
    unscale = torch.amp.GradScaler.unscale_

    def overflow(scaler, optimizer):
        nonlocal count, used
        count, used = count + 1, (scaler, optimizer)
        if scaler.is_enabled() and count == 3:
            next(p for p in optimizer.param_groups[0]["params"] if p.grad is not None).grad.fill_(math.inf)
        return unscale(scaler, optimizer)

    with mock.patch.object(torch.amp.GradScaler, "unscale_", overflow):
        seen = trained(module, args, flags, steps)
    scaler, optimizer = used
    seen["optimiser"] = "fused " * bool(optimizer.defaults.get("fused")) + type(optimizer).__name__
    seen["skipped"] = scaler.is_enabled() and scaler.get_scale() < 65536
    return seen | {"stages": 1 + ("tokenizer_epochs" in held)}


def problem_of(seen, case, reference):
    if not math.isfinite(seen["last"]):
        return "FAIL: the last loss is not finite"
    if case == "fp16, overflow" and not seen["skipped"]:
        return "FAIL: the overflow was not skipped"
    off = TWO_STAGES.get(case, 0) if seen["stages"] == 2 else 0
    if reference and abs(seen["first"] / reference - 1) > max(off, CASES[case][1]):
        return f"FAIL: in float32 the first loss is {reference:.4f}"
    return ""


def scripts(args):
    print(f"{'':26}{'images/s':>9}{'waits':>7}{'GiB':>7}{'loss 1':>9}  optimiser")
    reference = {}
    for case in CASES:
        for script in args.scripts:
            title = f"{script:9}{case:17}"
            if args.quick and case.startswith("compiled"):
                continue
            if left(args) < 0:
                yield title, {"words": "left out, no time"}
                continue
            try:
                seen = row(importlib.import_module(script), args, case)
            except (Exception, SystemExit) as error:
                words = f"FAIL: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                yield title, {"words": words}
                continue
            if seen is None:
                continue
            problem = problem_of(seen, case, reference.get(script))
            reference.setdefault(script, seen["first"] if case == "float32" else None)
            numbers = f"{seen['rate']:9.0f}{seen['wait']:7.0%}{seen['memory']:7.2f}{seen['first']:9.4f}"
            yield title, seen | {"words": f"{numbers}  {seen['optimiser']} {problem}"}


# --- steps --------------------------------------------------------------------------------------------------
def steps(args):
    print(f"{'':26}{'ms':>8}{'augment':>9}{'images/s':>10}{'waits':>7}{'GiB':>7}{'MFU':>7}")
    name = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak = next((peak for card, peak in PEAKS.items() if card in name), math.nan)
    for script, flags in STEPS.items():
        module, flops = importlib.import_module(script), 0
        flags = TINY_STEP if args.quick else {"image_size": 224, "amp": "bf16"} | flags
        for compiled in (False,) if args.quick else (False, True):
            title = f"{script:9}{'compiled' if compiled else 'eager':17}"
            if left(args) < 0:
                yield title, {"words": "left out, no time"}
                continue
            if not flops:
                counter = FlopCounterMode(display=False)
                with counter:
                    trained(module, args, flags | {"workers": 0}, 1, noise=True)
                flops = counter.get_total_flops()  # forward and backward of a step
            seen = whole_step(module, args, flags | {"compile": compiled})
            seen |= {"flops": flops, "mfu": flops / seen["seconds"] / peak}
            numbers = f"{1000 * seen['seconds']:8.1f}{1000 * seen['augment']:9.1f}{seen['rate']:10.0f}"
            yield (
                title,
                seen | {"words": f"{numbers}{seen['wait']:7.0%}{seen['memory']:7.2f}{seen['mfu']:7.1%}"},
            )


def whole_step(module, args, flags):
    """A step of train(), its augmentation on the device included, and how long that takes in it."""
    steps, marks, augment = 4 if args.quick else args.steps, [], getattr(module, "augment", None)

    def timed(*arguments, **options):
        start = mark(args.device)
        result = augment(*arguments, **options)
        marks.append((start, mark(args.device)))
        return result

    with mock.patch.object(module, "augment", timed) if augment else contextlib.nullcontext():
        seen = trained(module, args, flags, steps, noise=True)
    if args.device == "cuda":
        torch.cuda.synchronize()
    second_half = marks[len(marks) // 2 :]
    augmented = sum(between(*pair) for pair in second_half) / (steps / 2)
    return seen | {"seconds": flags["batch_size"] / seen["rate"], "augment": augmented}


# --- loader, logs, evaluation, photos -----------------------------------------------------------------------
def loader(args):
    """JPEGs of 500 x 375 through SimCLR's Images: decoded, two views of 224 pixels."""
    import simclr

    with tempfile.TemporaryDirectory() as folder:
        for i in range(64 if args.quick else 4096):
            image = simclr.demo_image(i)[0].resize((500, 375), Image.BICUBIC)
            image.save(f"{folder}/{i}.jpg", quality=90)
        crop = simclr.random_crop(224, 0.08)
        images = simclr.Images(simclr.Args(data=folder), (crop, crop), 224 / (0.75 * 0.08) ** 0.5)
        for workers in (0, 1) if args.quick else (1, 4, 8, 15):
            keys = images.batches(8 if args.quick else 64, 0, 1000, 0, 1)
            batches = iter(DataLoader(images, batch_sampler=keys, num_workers=workers))
            for _ in range(2 * workers + 1):  # read while they started
                next(batches)
            seen, started = 0, time.perf_counter()
            while time.perf_counter() - started < (0.5 if args.quick else 5):
                seen += len(next(batches)[0])
            rate = seen / (time.perf_counter() - started)
            del batches
            yield f"{workers} workers", {"rate": rate, "words": f"{rate:8.0f} images/s"}


def median_time(work, times):
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def logs(args):
    """collapse_metrics by the size of its features; MAE's ViT-L with its optimiser's state."""
    import mae

    for size in ((64, 32),) if args.quick else ((256, 128), (2048, 128), (2048, 2048)):
        features = torch.randn(size, device=args.device)
        mae.collapse_metrics(features)
        seconds = median_time(lambda features=features: mae.collapse_metrics(features), 5)
        yield f"collapse_metrics {size}", {"seconds": seconds, "words": f"{1000 * seconds:.1f} ms"}

    model = mae.MAE("vit_nano" if args.quick else "vit_large", 224, 16).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        seconds = median_time(lambda: mae.save_checkpoint(path, **state), 1 if args.quick else 3)
        size = path.stat().st_size / 2**30
    yield "checkpoint", {"seconds": seconds, "GiB": size, "words": f"{size:.2f} GiB in {seconds:.1f} s"}


def evaluation(args):
    """20,000 features of 2,048 numbers and 100 classes: k-NN, and one fit of logistic regression."""
    import eval_linear

    n, dim = (400, 32) if args.quick else (20000, 2048)
    labels = torch.arange(n) % 100
    features = torch.randn(100, dim)[labels] + 4 * torch.randn(n, dim)
    bank, held, queries, truth = features[n // 4 :], labels[n // 4 :], features[: n // 4], labels[: n // 4]
    for device in dict.fromkeys(["cpu", args.device]):

        def nearest(device=device):
            return eval_linear.knn(bank, held, queries, (20,), 100, device=device)[20]

        def regression(device=device):
            x, y = bank.to(device, torch.float64), held.to(device)
            weight, bias = eval_linear.fit_logreg(x, y, 0.1, 100, max_iter=20)
            return queries.double() @ weight.cpu() + bias.cpu()

        for name, run in (("k-NN", nearest), ("logreg", regression)):
            started = time.perf_counter()
            top1 = (run().argmax(dim=1) == truth).double().mean().item()
            seconds = time.perf_counter() - started
            yield (
                f"{name} {device}",
                {"seconds": seconds, "top1": top1, "words": f"{seconds:.2f} s, {top1:.1%}"},
            )


def photos(args):
    """SimCLR, ResNet-18 --stem cifar, as many epochs as there is time for; then eval_linear.py."""
    if not args.photos:
        return
    import eval_linear
    import simclr

    flags = {"data": f"{args.photos}/train", "image_size": 32, "device": args.device}
    flags |= {"batch_size": 8 if args.quick else 256, "workers": args.workers, "arch": "resnet18"}
    flags["stem"] = "imagenet" if args.quick else "cifar"
    images = len(simclr.image_paths(flags["data"]))
    pilot = trained(simclr, args, flags | {"warmup_epochs": 0.0}, min(30, images // flags["batch_size"]))
    epochs = 1 if args.quick else max(1, int((left(args) - 30) * pilot["rate"] / images * 0.9))
    flags |= {"epochs": epochs, "warmup_epochs": epochs / 20}
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        with silent():
            simclr.train(simclr.Args(**flags, run_dir=folder))
        seconds, words = time.time() - started, f"{epochs} epochs of {images} photos"
        yield "training", {"seconds": seconds, "epochs": epochs, "words": f"{words} in {seconds:.0f} s"}
        given = {"backbone": f"{folder}/backbone.pt", "data": args.photos, "workers": args.workers}
        for mode in ("logreg", "knn"):
            with silent():
                results = eval_linear.evaluate(eval_linear.Args(**given, mode=mode, device=args.device))
            yield mode, {"results": results, "words": json.dumps(results)}


def main(args):
    """Prints tables, writes --out; returns the titles of failed rows."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use; to try this file without one: --device cpu --quick")
    unknown = set(args.scripts) - set(SCRIPTS)
    if unknown:
        raise SystemExit(f"--scripts {' '.join(sorted(unknown))}: give some of {' '.join(SCRIPTS)}")
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, {os.cpu_count()} CPU cores, PyTorch {torch.__version__}")
    numbers, failed = {"card": card, "torch": torch.__version__}, []
    for name in args.sections:
        print(f"\n{name}", flush=True)
        numbers[name] = {}
        try:
            for title, seen in globals()[name](args):
                print(f"{title:26}{seen['words']}", flush=True)
                failed += [title] if "FAIL" in seen["words"] else []
                numbers[name][title.strip()] = seen
                Path(args.out).write_text(json.dumps(numbers, indent=1, default=str))
        except Exception as error:  # of the section itself: the next has a chance
            failed.append(name)
            print(f"{name} FAIL: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"\n{len(failed)} rows failed, after {(time.time() - args.started) / 60:.1f} minutes")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(tyro.cli(Args, description=__doc__.replace("\n", "\n "))) else 0)
