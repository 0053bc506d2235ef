"""Does every script do on this GPU what the tests show on a CPU? A table in less than ten minutes.

    python benchmarks/gpu_check.py [--scripts simclr mae] [--minutes 9]

Trains each script for some steps in float32, bfloat16, float16 with an overflow in its third step, in
micro-batches, at 224 pixels and compiled, and prints images a second, the share of the time spent waiting
for images, the most memory, the loss of the first step and the optimiser. A row fails if the script does, if
its first loss is not that in float32, if it does not end finite, or if the overflow was not skipped. Case by
case, so that --minutes cuts off the last, slowest ones. `--device cpu --quick` tries it without a GPU.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from torch.utils.data.dataloader import _BaseDataLoaderIter as Loading

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef train(args" in path.read_text())
SMALL = {"image_size": 32, "batch_size": 64, "epochs": 1, "warmup_epochs": 0.5, "tokenizer_epochs": 1}
QUICK = SMALL | {"batch_size": 8, "queue_size": 64, "out_dim": 64, "bn_splits": 2, "tokenizer_dim": 8}
LARGE = {"image_size": 224, "patch_size": 16, "local_size": 96, "tokenizer_layers": 3, "local_crops": 2}
ARCHS = ("resnet50", "vit_small")
CASES = {  # flags, and how far the first loss may be from float32's
    "float32": ({"amp": "off"}, 0.0),
    "bf16": ({"amp": "bf16"}, 0.03),
    "fp16, overflow": ({"amp": "fp16"}, 0.03),
    "micro-batches": ({"amp": "off", "micro_batch_size": "a part"}, 0.25),  # statistics of BatchNorm
    "224 pixels, bf16": ({"amp": "bf16"} | LARGE, math.inf),
    "compiled, bf16": ({"amp": "bf16", "compile": True}, 0.03),
}
# With two stages the overflow falls into the tokenizer's training: a step less, and other tokens to predict.
TWO_STAGES = {"fp16, overflow": 0.05}


@dataclasses.dataclass
class Args:
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: to try this file
    quick: bool = False  # three steps of eight images, not compiled, not at 224 pixels
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # those to check
    workers: int = 8  # processes that read images
    steps: int = 40  # of each row; the second half is timed
    minutes: float = 9.0  # no row starts later


def flags_of(module, args, case):
    """Args of the script for a row, or None if it has no such flag."""
    flags = dict(QUICK if args.quick else SMALL) | {"device": args.device, "workers": args.workers}
    flags |= CASES[case][0]
    held = {field.name for field in dataclasses.fields(module.Args)}
    if "micro_batch_size" in flags:
        if "micro_batch_size" not in held:
            return None
        flags["micro_batch_size"] = flags["batch_size"] // (2 if args.quick else 4)  # BatchNorm of 2 is noise
    if flags["image_size"] == 224:
        choices = typing.get_args(typing.get_type_hints(module.Args)["arch"])
        flags["arch"] = next((arch for arch in ARCHS if arch in choices), module.Args.arch)
    steps = 3 if args.quick else args.steps
    flags |= {"log_every": max(1, steps // 2), "checkpoint_every": steps}  # this only in the first edition
    return module.Args(**{name: value for name, value in flags.items() if name in held})


def row(module, args, case, folder):
    """Train once; what metrics.jsonl, the scaler and the optimiser say."""
    flags = flags_of(module, args, case)
    if flags is None:
        return None
    flags.run_dir, steps = str(folder), 3 if args.quick else args.steps
    seen, count, waits, load = {}, 0, [], Loading.__next__
    read, unscale, step = module.Images.__init__, torch.amp.GradScaler.unscale_, torch.amp.GradScaler.step

    def short(self, *arguments, **options):  # an epoch of `steps` batches
        read(self, *arguments, **options)
        self.items = self.items[: steps * flags.batch_size]

    def timed(loading):  # also the last call, which only says that there is no more
        asked = time.perf_counter()
        try:
            return load(loading)
        finally:
            waits.append(time.perf_counter() - asked)

    def overflow(scaler, optimizer):
        nonlocal count
        count += 1
        if scaler.is_enabled() and count == 3:
            next(p for p in optimizer.param_groups[0]["params"] if p.grad is not None).grad.fill_(math.inf)
        return unscale(scaler, optimizer)

    def stepped(scaler, optimizer):
        seen["optimiser"] = "fused " * bool(optimizer.defaults.get("fused")) + type(optimizer).__name__
        seen["scaler"] = scaler
        return step(scaler, optimizer)

    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        mock.patch.object(module.Images, "__init__", short),
        mock.patch.object(Loading, "__next__", timed),
        mock.patch.object(torch.amp.GradScaler, "unscale_", overflow),
        mock.patch.object(torch.amp.GradScaler, "step", stepped),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        module.train(flags)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen |= {"first": lines[0]["train/loss"], "last": lines[-1]["train/loss"]}
    seen["rate"] = lines[-1]["perf/images_per_second"]  # between the last two logs
    waits = waits[-(lines[-1]["step"] - lines[-2]["step"]) - 1 : -1]
    seen["wait"] = sum(waits) * seen["rate"] / (flags.batch_size * len(waits))
    seen["memory"] = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else math.nan
    seen["stages"] = 1 + hasattr(flags, "tokenizer_epochs")
    seen["skipped"] = seen["scaler"].is_enabled() and seen["scaler"].get_scale() < 65536
    return seen


def problem_of(seen, case, reference):
    if not math.isfinite(seen["last"]):
        return "FAIL: the last loss is not finite"
    if case == "fp16, overflow" and not seen["skipped"]:
        return "FAIL: the overflow was not skipped"
    off = TWO_STAGES.get(case, 0) if seen["stages"] == 2 else 0
    if reference and abs(seen["first"] / reference - 1) > max(off, CASES[case][1]):
        return f"FAIL: in float32 the first loss is {reference:.4f}"
    return ""


def main(args):
    """Prints the table; returns the failed rows."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use; to try this file without one: --device cpu --quick")
    unknown = set(args.scripts) - set(SCRIPTS)
    if unknown:
        raise SystemExit(f"--scripts {' '.join(sorted(unknown))}: give some of {' '.join(SCRIPTS)}")
    started, failed, left_out, reference = time.time(), [], [], {}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}")
    print(f"{'':26}{'images/s':>9}{'waits':>7}{'GiB':>7}{'loss 1':>9}  optimiser")
    cases = [case for case in CASES if not args.quick or case.split()[0] not in ("224", "compiled,")]
    for case in cases:
        for script in args.scripts:
            title = f"{script:9}{case:17}"
            if time.time() - started > 60 * args.minutes:
                left_out.append(f"{script} {case}")
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    seen = row(importlib.import_module(script), args, case, Path(folder))
                except (Exception, SystemExit) as error:
                    failed.append(title)
                    print(
                        f"{title}FAIL: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                        flush=True,
                    )
                    continue
            if seen is None:
                continue
            problem = problem_of(seen, case, reference.get(script))
            failed += [title] if problem else []
            reference.setdefault(script, seen["first"] if case == "float32" else None)
            numbers = f"{seen['rate']:9.0f}{seen['wait']:7.0%}{seen['memory']:7.2f}{seen['first']:9.4f}"
            print(f"{title}{numbers}  {seen['optimiser']} {problem}", flush=True)
    if left_out:
        print(f"After {args.minutes:g} minutes these were left out: {', '.join(left_out)}")
    print(f"{len(failed)} rows failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(tyro.cli(Args, description=__doc__)) else 0)
