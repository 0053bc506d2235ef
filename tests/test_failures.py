"""What fails does no silent harm: numbers that are not finite, disks, signals, damaged files, kills.

RESULTS.md has the promises under "What happens when something fails". What each training loop has to do is
tested on every script, what is Plumbing on simclr.py; with tiny networks, in runs of six steps.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import TRAINING, Forked, at_each_step, load, metrics_of, stopped, tensors_of, tiny_args
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.amp import GradScaler

import simclr

every_script = pytest.mark.parametrize("script", TRAINING)
INT, TERM = signal.SIGINT, signal.SIGTERM
TINY_SIZES = {"VITS": (32, 2, 2), "MOCO_VITS": (32, 2, 2), "TOWERS": (64, 1), "PREDICTORS": (32, 1)}
TINY_SIZES |= {"DECODERS": (32, 1, 2)}


def tiny_resnet():
    """In the place of torchvision's: images -> 32 features."""
    net = nn.Sequential(nn.Conv2d(3, 32, 5, stride=4), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net.append(nn.Flatten()).fc = nn.Linear(32, 1000)
    return net


def module_of(args):
    return sys.modules[type(args).__module__]


def train(args, **changes):
    return module_of(args).train(dataclasses.replace(args, **changes))


@pytest.fixture
def args_of(folder, monkeypatch):
    """args_of(script, **flags): two epochs of three steps, lines 1 2 4 6, of tiny networks."""

    def args_of(script="simclr", **flags):
        usual = {"data": str(folder), "device": "cpu", "epochs": 2, "batch_size": 12, "log_every": 2}
        args = tiny_args(script, **usual | {"run_dir": "run"} | flags)
        for name in TINY_SIZES.keys() & vars(module_of(args)):
            monkeypatch.setitem(getattr(module_of(args), name), "vit_nano", TINY_SIZES[name])
        return args

    monkeypatch.setattr(torchvision.models, "resnet18", tiny_resnet)
    return args_of


@pytest.fixture
def begun(args_of):
    """Arguments of simclr.py's run, which was stopped after its third step; it is in `run`."""
    stop_at(args_of(), 3, TERM)
    return args_of()


def at_step(args, patch, number, action):
    """Do it when step `number` begins."""
    at_each_step(module_of(args), patch, lambda step: action() if step == number - 1 else None)


def send(*numbers):
    """Signals to this process, if train() has set a handler: else they would end pytest."""
    for number in numbers:
        assert "guarded" in str(signal.getsignal(number)), "train() has set no handler"
        os.kill(os.getpid(), number)


def ends(args, match):
    """train() must end in one line that matches; returns it."""
    return stopped(lambda: train(args), match)


def stop_at(args, number, *signals):
    """Train until these signals, in step `number`; returns the message."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(args, patch, number, lambda: send(*signals))
        return ends(args, "the same command goes on")


def assert_same_run(args, reference=train):
    """As the run of this command which nothing disturbs, bit for bit: the metrics and every tensor."""
    reference(args, run_dir="whole", workers=0)
    assert metrics_of("run") == metrics_of("whole")
    for name in ("checkpoint.pt", "backbone.pt"):
        ours, theirs = (tensors_of(load(f"{folder}/{name}")) for folder in ("run", "whole"))
        assert len(ours) > 5 and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def snapshot(folder="run"):
    """Its files but those of TensorBoard."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if "events" not in path.name}


def assert_sound():
    """The run's files are finite, and none is half written."""
    assert not list(Path("run").glob("*.tmp"))
    for state in (load("run/backbone.pt")["state_dict"], load("run/checkpoint.pt")["model"]):
        assert len(state) > 5 and all(tensor.isfinite().all() for tensor in state.values())


# Numbers that are not finite


def spoil(args, patch, what, value=math.nan):
    """In step 2 the batch, the loss or a gradient gets this value."""
    now = [0]
    at_each_step(module_of(args), patch, lambda step: now.append(step + 1))
    calls = {
        "batch": (nn.Module, "__call__"),
        "loss": (GradScaler, "scale"),
        "gradient": (GradScaler, "unscale_"),
    }
    owner, name = calls[what]
    call = getattr(owner, name)

    def spoiled(self, *given, **options):
        first = given[0] if given and now[-1] == 2 else None
        if what == "gradient" and first:
            next(p for p in first.param_groups[0]["params"] if p.grad is not None).grad[:1].fill_(value)
        elif (
            what == "loss" and first is not None or getattr(first, "ndim", 0) == 4 and not first.requires_grad
        ):
            first.data.fill_(value)
        return call(self, *given, **options)

    patch.setattr(owner, name, spoiled)


@every_script
def test_nan_stops_before_anything_is_saved(script, args_of):
    """In step 2: of a gradient at a log step; then, from the checkpoint of step 1, of the loss in the step of
    a signal; then of the batch between two log steps, the next of which is step 3."""
    for what, log_every, named in (("gradient", 1, 2), ("loss", 100, 2), ("batch", 3, 3)):
        args = args_of(script, log_every=log_every, save_minutes=0.0)
        with pytest.MonkeyPatch.context() as patch:
            spoil(args, patch, what)
            if what == "loss":
                at_step(args, patch, 2, lambda: send(TERM))
            ends(args, f"^step {named}: loss .*gradient .*lower the learning rate")
        assert [line["step"] for line in metrics_of("run")] == [1], what
        assert load("run/checkpoint.pt")["step"] == 1
        assert_sound()


@every_script
def test_a_rate_that_is_too_high_stops_and_saves_nothing_bad(script, args_of):
    args = args_of(script, log_every=1, save_minutes=0.0, warmup_epochs=2)
    rate = "base_lr" if hasattr(args, "base_lr") else "lr"
    ends(dataclasses.replace(args, **{rate: 1e18}), "^step .*loss .*gradient .*lower")
    assert_sound()


def test_weights_that_are_not_finite_are_not_saved():
    """As after a float16 step that was skipped: its batch has spoilt the statistics of BatchNorm."""
    weights = {"weight": torch.ones(1), "running_mean": torch.tensor([math.inf])}
    run = SimpleNamespace(rank=0, step=5, folder=Path())
    words = "^step 6: a weight is not finite, nothing is saved; lower "
    stopped(lambda: simclr.save_run(run, 6, weights), words)
    assert not list(Path().iterdir())


@every_script
@pytest.mark.parametrize("black", ["all", "the second batch"])
def test_black_images_do_no_silent_harm(script, args_of, folder, black):
    """The run stops and names step and cause, or trains on as ever."""
    shutil.copytree(folder, "photos")
    args = args_of(script, data="photos", epochs=1, log_every=1 if black == "all" else 3)
    images = module_of(args).Images(args, (), 32)
    keys = sum(images.batches(12, 0, 1, 0, 1), [])
    for key in keys if black == "all" else keys[12:24]:
        Image.new("RGB", (40, 36)).save(images.items[key])
    try:
        train(args)
    except SystemExit as stop:
        assert re.match(r"step \d+: loss \S+, gradient \S+; .*black", stop.code), stop.code
        assert not Path("run/checkpoint.pt").exists()
    else:
        tensors = [tensor for tensor in tensors_of(load("run/checkpoint.pt")).values() if tensor.ndim]
        assert len(tensors) > 5 and all(tensor.abs().max() < 1e6 for tensor in tensors)


# float16


@every_script
def test_a_float16_overflow_skips_its_step(script, args_of, monkeypatch):
    """Step 2 of 3 changes no weight and halves the scale; the run goes on, and the file stays JSON."""
    changed, scales, step_of, autocast = [], [], GradScaler.step, torch.autocast

    def cast(kind, dtype, enabled):  # the CPU needs seconds for float16; what is tested is the scaler
        return autocast(kind, torch.bfloat16 if dtype == torch.float16 else dtype, enabled=enabled)

    def step(self, optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        step_of(self, optimizer)
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True)))
        scales.append(self.get_scale())  # before its update

    monkeypatch.setattr(torch, "autocast", cast)
    monkeypatch.setattr(GradScaler, "step", step)
    args = args_of(script, epochs=1, amp="fp16", warmup_epochs=0, log_every=1)
    spoil(args, monkeypatch, "gradient", math.inf)
    metrics = train(args)
    assert changed == [True, False, True] and scales == [65536, 65536, 32768]
    assert math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"])
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert ["train/grad_norm" in line for line in lines] == [True, False, True]
    assert all("train/loss" in line for line in lines)


def test_a_gradient_that_is_never_finite_stops_a_float16_run():
    """When the scale, which halves each time, has come down to 1."""
    loss, gradient = torch.tensor(2.0), torch.tensor(math.nan)
    scalers = [GradScaler("cpu", init_scale=scale) for scale in (2.0, 1.0)]
    simclr.check_finite(3, loss, gradient, scalers[0])
    stopped(lambda: simclr.check_finite(4, loss, gradient, scalers[1]), "^step 4: .*gradient nan")


# Disks


BACKBONE, CHECKPOINT = (f"{name}.pt.{os.getpid()}.tmp" for name in ("backbone", "checkpoint"))
FULL = [  # what finds no space from step 4 on, really, and what is said
    ("/dev/full", [BACKBONE], "^run/backbone.pt: cannot be written, is the disk full"),
    ("/dev/full", [CHECKPOINT], "^run/checkpoint.pt: cannot be written, is the disk full"),
    ("nowhere/file", [CHECKPOINT], "^run/checkpoint.pt: cannot be written"),
    ("/dev/full", ["metrics.jsonl"], "No space left on device"),
    ("/dev/full", ["metrics.jsonl", "events*"], "No space left on device"),  # in TensorBoard's thread, too
]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_in_one_line_and_leaves_the_old_files(begun, capfd):
    before = snapshot()
    for device, names, words in FULL:

        def fill_up(device=device, names=names):
            files = [path for name in names for path in Path("run").glob(name)]
            for path in files or [Path("run", *names)]:
                path.unlink(missing_ok=True)
                path.symlink_to(device)

        with pytest.MonkeyPatch.context() as patch:
            at_step(begun, patch, 4, fill_up)
            ends(begun, f"{words}.*; the same command goes on")
        assert not list(Path("run").glob("*.tmp")), names
        assert Path("run/checkpoint.pt").read_bytes() == before["checkpoint.pt"]
        assert Path("run/backbone.pt").read_bytes() == before["backbone.pt"] or BACKBONE not in names
        assert load("run/backbone.pt")["state_dict"]
        Path("run/metrics.jsonl").unlink()
        Path("run/metrics.jsonl").write_bytes(before["metrics.jsonl"])
    assert "Traceback" not in capfd.readouterr().err
    train(begun)
    assert_same_run(begun)


@pytest.mark.parametrize("call", ["mkdir", "write_text"])
def test_a_read_only_run_folder_says_so(args_of, monkeypatch, call):
    """Root may write anywhere, so the refusal is faked."""

    def refuse(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, call, refuse)
    ends(args_of(), "^run: .*Read-only file system")


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(monkeypatch):
    """Or a power cut may leave an empty file under it. Windows syncs only what may be written to."""
    calls, fsync, replace = [], os.fsync, os.replace

    def sync(file):
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_RDWR
        calls.append("fsync")
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append("replace") or replace(old, new))
    simclr.save_checkpoint("a.pt", method="x")
    assert calls == ["fsync", "replace"] and load("a.pt") == {"method": "x"}


# Signals


@every_script
def test_a_signal_ends_the_run_after_its_step(script, args_of, capsys):
    """Step 3, which is no log step: all of it is saved and nothing more is logged; the same command goes on
    bit for bit."""
    args = args_of(script)
    assert stop_at(args, 3, TERM) == "stopped after step 3, saved; the same command goes on"
    assert load("run/checkpoint.pt")["step"] == 3 and load("run/backbone.pt")["state_dict"]
    assert [line["step"] for line in metrics_of("run")] == [1, 2]
    assert "backbone.pt" not in capsys.readouterr().out  # no result yet
    train(args)
    assert ", step 3\n" in capsys.readouterr().out
    assert_same_run(args)


@pytest.mark.parametrize("at_save", [False, True])
def test_a_second_signal_ends_at_once(begun, monkeypatch, at_save):
    """In step 5, or while a checkpoint is written: torch.save turns what is raised as it writes to an open
    file into a RuntimeError, as on a full disk. What is saved stays, and the run goes on from it."""
    before, save = snapshot(), torch.save

    def interrupted(state, file):
        save(state, SimpleNamespace(write=lambda data: send(INT, INT)) if hasattr(file, "write") else file)
        send(INT, INT)

    with monkeypatch.context() as patch:
        if at_save:
            patch.setattr(torch, "save", interrupted)
        else:
            at_step(begun, patch, 5, lambda: send(INT, TERM))
        ends(begun, "^interrupted; the same command goes on from the last checkpoint$")
    after = snapshot()
    assert after.keys() == before.keys()  # no temporary file
    assert all(after[name] == before[name] for name in ("checkpoint.pt", "backbone.pt"))
    train(begun)
    assert_same_run(begun)


ENDS = {"": lambda: None, "stopped after": lambda: send(TERM), "interrupted": lambda: send(INT, TERM)}


def hooks():
    return [signal.getsignal(INT), signal.getsignal(TERM), threading.excepthook]


@pytest.mark.parametrize("match, action", [*ENDS.items(), ("division", lambda: 1 / 0)])
def test_handlers_are_put_back(args_of, monkeypatch, match, action):
    """After an end, a stop, a stop at once and an error; and so is the hook of threads."""
    before, args = hooks(), args_of(epochs=1, batch_size=40, warmup_epochs=0)
    at_step(args, monkeypatch, 1, action)
    with pytest.raises((SystemExit, ZeroDivisionError), match=match) if match else contextlib.nullcontext():
        train(args)
    assert hooks() == before


def test_another_thread_leaves_handlers_alone(args_of, monkeypatch):
    before, during, args = hooks(), [], args_of(epochs=1, batch_size=40)
    at_step(args, monkeypatch, 1, lambda: during.extend(hooks()[:2]))
    thread = threading.Thread(target=lambda: during.append(train(args)["train/loss"]))
    thread.start()
    thread.join()
    assert during[:2] == before[:2] and math.isfinite(during[2])


def ill_monitor(patch):
    """simclr.py's, with a problem at every log step."""
    monitor, level, problem = simclr.monitor, {"x/level": 0.5}, {"it is flat": "x/level"}
    patch.setattr(simclr, "monitor", lambda *given: (monitor(*given)[0] | level, problem))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_stop_does_not_disturb_the_alarm(args_of, monkeypatch, number, capsys):
    """It rings from step 4 on, the third bad line after a fifth of the run, and says so once, whether it is
    stopped before, within or after these three."""
    ill_monitor(monkeypatch)
    args = args_of(batch_size=8, epochs=1, warmup_epochs=0, log_every=1)
    stop_at(args, number, TERM)
    train(args)
    assert [line["monitor/alarm"] for line in metrics_of("run")] == [0, 0, 0, 1, 1]
    said = capsys.readouterr().out
    assert said.count("COLLAPSE") == 1 and "COLLAPSE at step 4: it is flat" in said


def test_processes_ring_one_alarm(args_of, monkeypatch):
    ill_monitor(monkeypatch)
    args = args_of(batch_size=8, epochs=1, warmup_epochs=0, log_every=1)
    both = Forked(lambda rank: train(args), 2).end()
    assert [end.returncode for end in both] == [0, 0], both[0].stderr
    assert [end.stdout.count("COLLAPSE") for end in both] == [1, 0]
    assert [line["monitor/alarm"] for line in metrics_of("run")] == [0, 0, 0, 1, 1]


# Damaged files


def test_damaged_and_foreign_files_say_so(begun):
    files, state, name = snapshot(), load("run/checkpoint.pt"), "projector.0.weight"
    whole, tensors = files["checkpoint.pt"], state["model"]
    models = [{key: tensors[key] for key in tensors if key != name}, tensors | {name: tensors[name][:1]}]
    models += [tensors | {"layer9.weight": torch.ones(1)}]  # what a repair leaves
    damages = [state | {"model": model} for model in models]
    damages += [
        {"method": "another", "step": 3},
        {part: state[part] for part in state if part != "optimizer"},
    ]
    damages += [torch.ones(3), whole[: len(whole) // 2], whole[:-100], b"", b"no checkpoint"]
    damages = [("checkpoint.pt", damage) for damage in damages]
    for name, damage in damages + [("args.json", text) for text in (b"", b"{", b"[]", b"\xff\xfe")]:
        path = Path("run") / name
        path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
        before = snapshot()
        ends(begun, rf"^run.*{name}.* delete run, or give another --run-dir$")
        assert snapshot() == before
        path.write_bytes(files[name])
    assert train(begun)  # nothing else had been touched


# Kills


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies(owner, name, number, when, *first):
    """kill -9 before the number-th call of a function (with this first argument), after it, or when half of
    what it writes is written."""
    call, count = getattr(owner, name), itertools.count(1)

    def counted(*given, **options):
        due = given[: len(first)] == first and next(count) == number
        if due and when == "before":
            die()
        result = call(*given, **options)
        if due and when == "half":
            os.truncate(given[1], os.path.getsize(given[1]) // 2)
        return die() if due else result

    setattr(owner, name, counted)


KILLS = [  # one after another: step of the checkpoint they leave, of 1, 2, 4, 6, workers, and where
    (0, 0, torch.Tensor, "backward", 1, "before"),
    (0, 0, torch, "save", 1, "half"),
    (0, 0, torch, "save", 2, "half"),
    (0, 0, os, "replace", 1, "after"),  # of backbone.pt
    (0, 0, os, "replace", 2, "before"),
    (1, 0, os, "replace", 2, "after"),
    (2, 2, torch.Tensor, "backward", 2, "before"),
    (2, 0, simclr, "seeded", 2, "before", 2),  # between two epochs
    (4, 0, torch, "save", 3, "half"),
    (4, 0, torch, "save", 2, "half"),
    (4, 0, simclr.SummaryWriter, "add_scalar", 5, "after"),
    (6, 0, os, "replace", 2, "after"),
]


def test_kill_9_at_any_moment_and_the_same_command_again(args_of):
    """Bit for bit; each kill leaves half a line in metrics.jsonl, some half a file."""
    args = args_of(save_minutes=0.0)
    for step, workers, *kill in KILLS:
        args.workers = workers
        [end] = Forked(lambda _, kill=kill: (dies(*kill), train(args))).end()
        assert end.returncode == -signal.SIGKILL, end.stderr
        assert (load("run/checkpoint.pt")["step"] if Path("run/checkpoint.pt").exists() else 0) == step, kill
        with open("run/metrics.jsonl", "a") as file:
            file.write('{"step": 6, "tor')
    train(args)
    assert_same_run(args)
    shown = [event.step for event in EventAccumulator("run").Reload().Scalars("train/loss")]
    assert shown == sorted({*shown}) and {*shown} <= {1, 2, 4, 6}
