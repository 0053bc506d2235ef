"""Several processes: of one training, as torchrun starts them; workers; two of one command by mistake.

What a training loop has to do itself is tested on every script, what is Plumbing on simclr.py.
"""

import functools
import itertools
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import TRAINING, Forked, command_line, in_processes, load, metrics_of, run, tiny_args
from PIL import Image
from test_failures import args_of, assert_same_run, at_step, die, ends, module_of, snapshot, stop_at, train
from torch import nn
from torch.utils.data import DataLoader

import simclr

__all__ = ["args_of"]  # a fixture
WITHIN = {"dinov2": {"koleo_weight": 0.0}}  # what is within each process, as in the official code
ONE_EPOCH = {"batch_size": 8, "epochs": 1, "log_every": 1}  # five steps


def said(end):
    """Lines of stderr but those of the progress bar."""
    return [line for line in end.stderr.splitlines() if line.strip() and not re.search("it/s|s/it", line)]


def without_statistics(norm, x):
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def process(args, rank, fast):
    """train() where a warning is an error; but process 0 none may write; and the clock of process 0 runs an
    hour a look, that of the others stands still, or the other way round."""

    def forbidden(*given, **more):
        raise AssertionError(f"process {rank} writes {given}")

    ticks = itertools.count(1)
    tick = 3600.0 if (rank == 0) == fast else 1e-6
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        patch.setattr(module_of(args), "time", SimpleNamespace(monotonic=lambda: tick * next(ticks)))
        writers = [(Path, "mkdir"), (Path, "write_text"), (Path, "touch"), (os, "replace"), (torch, "save")]
        writers += [(module_of(args), "SummaryWriter"), (torchvision.utils, "save_image")]
        for owner, name in writers if rank else ():
            patch.setattr(owner, name, forbidden)
        train(args)


@pytest.mark.parametrize("script", TRAINING)
def test_a_run_changes_its_number_of_processes(script, args_of, monkeypatch):
    """2, killed in step 3, then 1, stopped in step 3, then 4: each step once, numbers as of one process where
    no BatchNorm sees one process alone. Process 0 alone writes, when its own clock says so."""
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", without_statistics)
    args = args_of(script, **ONE_EPOCH | WITHIN.get(script, {}))
    rate = "base_lr" if hasattr(args, "base_lr") else "lr"
    setattr(args, rate, 0.1 * getattr(args, rate))  # slow, or rounding errors grow
    train(args, run_dir="alone")

    with monkeypatch.context() as patch:
        at_step(args, patch, 3, die)
        killed = Forked(lambda rank: process(args, rank, fast=True), 2).end()
    assert [end.returncode for end in killed] == [-9, -9], killed
    assert load("run/checkpoint.pt")["step"] == 2
    assert stop_at(args, 3, signal.SIGTERM).startswith("stopped after step 3, saved")
    four = Forked(lambda rank: process(args, rank, fast=False), 4).end()
    assert [end.returncode for end in four] == [0] * 4, "\n".join(end.stderr for end in four)

    assert ", step 3\n" in four[0].stdout and "4 x cpu" in four[0].stdout
    assert four[0].stdout.count("effective learning rate") == 1
    assert four[0].stdout.splitlines()[-1].startswith("run/backbone.pt: ")
    for other in four[1:]:
        assert not re.search("images|Run folder|effective|backbone.pt|it/s", other.stdout + other.stderr)
    lines, alone = metrics_of("run"), metrics_of("alone")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line, right in zip(lines, alone, strict=True):
        for tag in ("train/loss", "train/lr", "train/grad_norm", "monitor/effective_rank"):
            assert line[tag] == pytest.approx(right[tag], rel=1e-4), (line["step"], tag)


def test_process_0_downloads_while_the_other_waits(args_of, monkeypatch):
    class Downloaded(list):
        def __init__(self, root, download):
            if os.environ["RANK"] == "0":
                time.sleep(0.5)
                Path("downloaded").touch()
            assert root == "data" and download and Path("downloaded").exists()
            super().__init__((Image.new("L", (20, 20), 10 * i), i % 2) for i in range(16))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    args = args_of(**ONE_EPOCH, data="CIFAR10")
    in_processes(lambda rank: train(args))
    assert [line["step"] for line in metrics_of("run")] == [1, 2]


def test_three_processes_refuse_an_odd_batch(args_of, monkeypatch):
    monkeypatch.setattr(simclr, "start_processes", lambda *_: (0, 3, torch.device("cpu"), None))
    ends(args_of(**ONE_EPOCH), "^--batch-size 8: give a multiple of 3, from 6 to 40, ")
    assert not Path("run").exists()


SLOW = [pytest.param(*which, marks=pytest.mark.slow) for which in (("simclr", 0), ("mae", 0), ("mae", 1))]


@pytest.mark.parametrize("script, rank", [("simclr", 1), *SLOW])
def test_torchrun_goes_on_after_kill_9_bit_for_bit(script, rank, folder):
    """The real launcher, command and networks. One process dies, so the other is ended, and no file is
    damaged; the same command goes on from the last checkpoint. FutureWarnings are errors."""
    flags = {"data": str(folder), "device": "cpu", "image_size": 16, "epochs": 3, "log_every": 10}
    flags |= {"save_minutes": 0.0, "run_dir": "run"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += command_line(script, **flags)[1:]
    options = {"env": os.environ | {"PYTHONWARNINGS": "error::FutureWarning"}}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options) as torchrun:
        while torchrun.poll() is None and not Path("run/checkpoint.pt").exists():
            time.sleep(0.02)
        pids = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(pids[rank]), signal.SIGKILL)
        assert torchrun.wait(timeout=100) != 0
    step = load("run/checkpoint.pt")["step"]
    again = run(words, **options)
    assert again.returncode == 0 and "Warning" not in again.stderr, again.stderr
    assert step in (1, 10) and f", step {step}\n" in again.stdout and "2 x cpu" in again.stdout
    assert again.stdout.count("effective learning rate") == again.stdout.count("run/backbone.pt: ") == 1
    assert [line["step"] for line in metrics_of("run")] == [1, 10, 15]
    args = tiny_args(script, **flags)
    assert_same_run(args, lambda *given, **changes: in_processes(lambda rank: train(*given, **changes)))


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_spawned_workers_give_the_same(script, args_of, monkeypatch):
    args = args_of(script, workers=2)
    loader = functools.partial(DataLoader, multiprocessing_context="spawn")
    with monkeypatch.context() as patch:
        patch.setattr(module_of(args), "DataLoader", loader)
        train(args)
    assert_same_run(args)


def test_a_worker_that_finds_no_image_ends_the_command(args_of, capfd):
    """With one line, and it waits for no worker."""
    Path("bad").mkdir()
    for i in range(110):
        Path(f"bad/{i:03d}.jpg").write_text("no image")
    with pytest.raises(SystemExit, match=r"^.*100 files in a row cannot be read.*$") as stop:
        train(args_of(data="bad", workers=2))
    assert not multiprocessing.active_children(), "the traceback keeps the loader"
    assert "\n" not in stop.value.code and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_says_one_line(args_of, monkeypatch, number):
    """As Ctrl-C in a terminal, or a scheduler: two workers get it, too, and step 3 has time to notice."""
    args = args_of(epochs=400, workers=2, log_every=1)
    at_step(args, monkeypatch, 3, lambda: time.sleep(1))
    command = Forked(lambda _: train(args))
    log, begin = Path("run/metrics.jsonl"), time.time()
    while time.time() - begin < 60 and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.02)
    os.killpg(command.pids[0], number)
    [end] = command.end()
    step = load("run/checkpoint.pt")["step"]
    assert step >= 2 and said(end) == [f"stopped after step {step}, saved; the same command goes on"]
    assert end.returncode == 1 and [line["step"] for line in metrics_of("run")] == [*range(1, step + 1)]


def test_two_processes_of_one_command(args_of):
    """By mistake, in one folder at once: neither dies, and both tell the same numbers."""
    args = args_of(save_minutes=0.0)
    commands = [Forked(lambda _: train(args)) for _ in range(2)]
    both = [command.end()[0] for command in commands]
    assert [end.returncode for end in both] == [0, 0], both[0].stderr + both[1].stderr
    assert len({end.stdout.splitlines()[-1] for end in both}) == 1
    train(args, run_dir="alone")
    assert snapshot().keys() == snapshot("alone").keys()
    lines, right = metrics_of("run"), metrics_of("alone")
    assert all(line in right for line in lines) and all(line in lines for line in right)
    assert load("run/checkpoint.pt")["step"] == 6
    assert train(args)  # prints the result


@pytest.mark.parametrize("words", ["--no-such-flag 1", "--arch resnet1000", "--epochs many", "--restart"])
def test_a_wrong_flag_or_choice_is_named(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["simclr.py", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(simclr.__file__, run_name="__main__")
    assert words.split()[0] in "".join(capsys.readouterr())
    assert not list(Path().iterdir())
