"""What goes wrong on real machines: bad numbers, full disks, signals, kills, several processes.

On every training script; test_contract.py has the plain cases. What needs a process of its own is
forked from one that has imported the script (`Children`): starting Python and torch takes 3 to 5 seconds.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAINING, at_each_step, caption_all, command_line, run, tiny_args
from test_contract import TEN, assert_same_run, load, metrics_of, snapshot, stopped, without_events
from torch import nn

pytestmark = pytest.mark.parametrize("script", TRAINING, scope="module")
both_signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def module(script):
    return importlib.import_module(script)


@pytest.fixture(scope="module")
def whole(script, folder, tmp_path_factory):
    """A run of ten steps that nothing disturbs."""
    path = tmp_path_factory.mktemp(script) / "run"
    args = tiny_args(script, data=str(folder), **TEN | {"run_dir": str(path)})
    importlib.import_module(script).train(args)
    return path


def at_step(module, monkeypatch, number, action):
    """Do it when step `number` begins; once."""
    due = [number - 1]

    def once(step):
        if step in due:
            due.clear()
            action()

    at_each_step(module, monkeypatch, once)


def send(*numbers):
    """Signals to this process, if train() has set a handler: else they would end pytest."""
    for number in numbers:
        ours = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
        assert signal.getsignal(number) not in ours, "train() has set no handler"
        os.kill(os.getpid(), number)


def stop_at(module, args, number, *signals):
    """Train until these signals, in step `number`; returns the message."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(module, patch, number, lambda: send(*signals))
        return stopped(module, args, "the same command goes on")


@pytest.fixture(scope="module")
def stopped_at_5(script, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp(script) / "run"
    args = tiny_args(script, data=str(folder), **TEN | {"run_dir": str(path)})
    stop_at(importlib.import_module(script), args, 5, signal.SIGTERM)
    return path


@pytest.fixture
def begun(module, folder, stopped_at_5):
    """Arguments of a run of ten steps that was stopped after the fifth; it is in `run`."""
    shutil.copytree(stopped_at_5, "run")
    return tiny_args(module.__name__, data=str(folder), **TEN)


# Numbers that are not finite


def spoil_batch(module, monkeypatch, number):
    def hook(net, inputs):
        if spoiling and torch.is_grad_enabled() and net.training and inputs:
            images = inputs[0]
            if isinstance(images, torch.Tensor) and images.ndim > 3 and images.is_floating_point():
                images = images.clone()
                images[0].fill_(math.nan)
                return images, *inputs[1:]

    spoiling = []
    at_step(module, monkeypatch, number, lambda: spoiling.append(True))
    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    return handle.remove


def nth_call(monkeypatch, method, number, action):
    """action(arguments) before the GradScaler's method is called for the n-th time; 0: each time."""
    count, call = itertools.count(1), getattr(torch.amp.GradScaler, method)

    def counted(self, *given):
        if next(count) == number or number == 0:
            action(*given)
        return call(self, *given)

    monkeypatch.setattr(torch.amp.GradScaler, method, counted)


def spoil_loss(module, monkeypatch, number):
    nth_call(monkeypatch, "scale", number, lambda loss: loss.data.fill_(math.nan))


def spoil_gradient(module, monkeypatch, number, value=math.nan):
    def spoil(optimizer):
        next(p for p in optimizer.param_groups[0]["params"] if p.grad is not None).grad[:1].fill_(value)

    nth_call(monkeypatch, "unscale_", number, spoil)


@pytest.mark.parametrize("spoil", [spoil_batch, spoil_loss, spoil_gradient])
def test_nan_stops_before_anything_is_saved(module, folder, monkeypatch, spoil):
    """In step 2. Each step is a log step here: that step is named, and nothing of it is saved."""
    undo = spoil(module, monkeypatch, 2)
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run", "save_minutes": 0.0}
    try:
        stopped(
            module, tiny_args(module.__name__, **flags), "^step 2: loss .*gradient .*lower the learning rate"
        )
    finally:
        undo() if undo else None
    assert [line["step"] for line in metrics_of("run")] == [1]
    assert load("run/checkpoint.pt")["step"] == 1 and not list(Path("run").glob("*.tmp"))
    weights = load("run/backbone.pt")["state_dict"].values()
    assert all(torch.isfinite(weight).all() for weight in weights)


@pytest.mark.shared
def test_nan_between_two_log_steps_stops_at_the_next(module, folder, monkeypatch):
    """In step 2 of 5, with log steps 1, 3 and 5: step 3 is named and not saved."""
    spoil_gradient(module, monkeypatch, 2)
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run", "log_every": 3, "save_minutes": 0.0}
    stopped(module, tiny_args(module.__name__, **flags), "^step 3: loss .*lower the learning rate")
    assert load("run/checkpoint.pt")["step"] == 1 and [line["step"] for line in metrics_of("run")] == [1]


@pytest.mark.shared
def test_nan_in_the_step_of_a_signal_is_not_saved(module, folder, monkeypatch):
    """A stop checks its step as a log step does."""
    spoil_gradient(module, monkeypatch, 2)
    at_step(module, monkeypatch, 2, lambda: send(signal.SIGTERM))
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run", log_every=100)
    stopped(module, args, "^step 2: loss .*lower the learning rate")
    assert not Path("run/checkpoint.pt").exists()


def test_a_rate_that_is_too_high_stops_and_saves_nothing_bad(module, folder):
    rate = "base_lr" if hasattr(module.Args, "base_lr") else "lr"
    flags = {"data": str(folder), "run_dir": "run", "save_minutes": 0.0, "warmup_epochs": 3, rate: 1e18}
    stopped(module, tiny_args(module.__name__, **flags), "^step .*loss .*gradient .*lower")
    tensors = [t for t in load("run/checkpoint.pt")["model"].values() if t.is_floating_point()]
    assert len(tensors) > 20 and all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.shared
def test_weights_that_are_not_finite_are_not_saved(module, begun, monkeypatch):
    """As after a float16 step that was skipped: its batch has spoilt the statistics of BatchNorm."""
    before, save_run = without_events(snapshot("run")), module.save_run

    def spoiled(run, step, encoder, *rest, **facts):
        next(iter(encoder.values())).fill_(math.inf)
        save_run(run, step, encoder, *rest, **facts)

    monkeypatch.setattr(module, "save_run", spoiled)
    stopped(module, begun, "^step 10: a weight is not finite, nothing is saved; lower ")
    after = without_events(snapshot("run"))
    for name in ("checkpoint.pt", "backbone.pt"):
        assert after[Path("run") / name] == before[Path("run") / name]


# float16


@pytest.fixture
def bfloat16_for_float16(monkeypatch):
    """The CPU needs seconds for float16; what is tested is the scaler."""
    autocast = torch.autocast

    def cast(kind, dtype=None, enabled=True):
        return autocast(kind, torch.bfloat16 if dtype == torch.float16 else dtype, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", cast)


def test_a_float16_overflow_skips_its_step(module, folder, monkeypatch, bfloat16_for_float16):
    """Step 2 of 3 changes no weight and halves the scale; the run goes on, and the file stays JSON."""
    spoil_gradient(module, monkeypatch, 2, value=math.inf)
    changed, scales, step_of = [], [], torch.amp.GradScaler.step

    def step(self, optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        step_of(self, optimizer)
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True)))
        scales.append(self.get_scale())  # before its update

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    flags = {"data": str(folder), "epochs": 1, "batch_size": 12, "queue_size": 48, "amp": "fp16"}
    flags = {k: v for k, v in flags.items() if hasattr(module.Args, k)} | {"warmup_epochs": 0}
    metrics = module.train(tiny_args(module.__name__, run_dir="run", **flags))
    assert changed == [True, False, True] and scales == [65536, 65536, 32768]
    assert math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"])
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in lines]
    assert ["train/grad_norm" in line for line in lines] == [True, False, True]
    assert all("train/loss" in line for line in lines)


@pytest.mark.shared
def test_a_gradient_that_is_never_finite_stops_a_float16_run(
    module, folder, monkeypatch, bfloat16_for_float16
):
    """When the scale, which halves each time, has come down from 8 to 1 in the fourth step."""
    spoil_gradient(module, monkeypatch, 0)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, **more: scaler(*given, init_scale=8, **more))
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run", amp="fp16")
    stopped(module, args, "^step 4: .*gradient nan")


# Disks


NO_SPACE = OSError(28, "No space left on device")


@contextlib.contextmanager
def small_disk(path, size):
    """A disk of `size` bytes at `path` and True; False where this machine lets nobody mount one."""
    path = Path(path).absolute()
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    mounted = shutil.which("mount") and run(words).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            assert run(["umount", "-l", path]).returncode == 0


def path_of(file):
    return file.name if hasattr(file, "write") else file


def full_disk(monkeypatch, name):
    """torch.save fails half way for this file, as it does on a full disk: by a RuntimeError."""
    save = torch.save

    def full(state, file):
        path = path_of(file)
        if f"/{name}" not in str(path):
            return save(state, file)
        Path(path).write_bytes(b"half")
        try:
            raise NO_SPACE
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4352 vs 4246")

    monkeypatch.setattr(torch, "save", full)


@pytest.mark.shared
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("name", ["backbone.pt", "checkpoint.pt"])
def test_a_full_disk_leaves_the_old_files(module, begun, whole, monkeypatch, capfd, name, real):
    """At the save of step 10; with space again the same command ends as if nothing had been."""
    sizes = [Path("run", other).stat().st_size for other in ("backbone.pt", "checkpoint.pt")]
    room = sizes[0] // 2 if name == "backbone.pt" else sum(sizes) // 2
    used = sum(path.stat().st_size for path in Path("run").iterdir()) + 2**20
    before = without_events(snapshot("run"))
    with small_disk("small", used + room) if real else contextlib.nullcontext() as mounted:
        at = "small" if mounted else "run"
        with monkeypatch.context() as patch:
            if mounted:
                shutil.copytree("run", "small", dirs_exist_ok=True)
            else:
                full_disk(patch, name)
            words = f"{at}/{name}.*disk full|No space left on device"
            stopped(module, dataclasses.replace(begun, run_dir=at), words)
        assert not [path.name for path in Path(at).iterdir() if "tmp" in path.name]
        assert (Path(at) / "checkpoint.pt").read_bytes() == before[Path("run/checkpoint.pt")]
        if name == "backbone.pt":
            assert (Path(at) / "backbone.pt").read_bytes() == before[Path("run/backbone.pt")]
        assert len(load(f"{at}/backbone.pt")["state_dict"]) > 20
        shutil.copytree(at, "later")
    assert "Traceback" not in capfd.readouterr().err
    module.train(dataclasses.replace(begun, run_dir="later"))
    assert_same_run("later", whole)


def fill(folder):
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), open(f"{folder}/filler", "wb", buffering=0) as file:
        while file.write(bytes(2**12)) == 2**12:
            pass


@pytest.mark.shared
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("real", [True, False])
def test_metrics_that_find_no_space_say_so(module, folder, whole, monkeypatch, capfd, real):
    """The disk is full from step 2 on, and still at the next try; TensorBoard's thread fails on it as
    well, and says nothing."""
    flags = TEN | {"run_dir": "small", "log_every": 1}
    args = tiny_args(module.__name__, data=str(folder), **flags)
    with small_disk("small", 2**20) if real else contextlib.nullcontext() as mounted:

        def opened(path, mode="r", *more, **options):
            if str(path).endswith("metrics.jsonl"):
                raise NO_SPACE
            return open(path, mode, *more, **options)

        with monkeypatch.context() as patch:
            full = patch.setattr if not mounted else lambda *_, **__: fill("small")
            at_step(module, patch, 2, lambda: full(module, "open", opened, raising=False))
            stopped(module, args, "No space left on device.*the same command goes on")
            stopped(module, args, "No space left on device")  # at its start or at the same place
        assert not [path.name for path in Path("small").iterdir() if "tmp" in path.name]
        Path("small/filler").unlink(missing_ok=True)
        shutil.copytree("small", "later")
    assert "Traceback" not in capfd.readouterr().err and not Path("later/checkpoint.pt").exists()
    module.train(dataclasses.replace(args, run_dir="later"))
    assert [line["step"] for line in metrics_of("later")] == list(range(1, 11))
    assert metrics_of("later")[-1]["train/loss"] == metrics_of(whole)[-1]["train/loss"]


@pytest.mark.shared
def test_a_full_disk_under_the_event_file_says_the_same(module, begun, monkeypatch):
    """TensorBoard's writer fails once more when it is closed."""

    def full(*_):
        raise NO_SPACE

    monkeypatch.setattr(module.SummaryWriter, "close", full)
    full_disk(monkeypatch, "checkpoint.pt")
    stopped(module, begun, "No space left on device.*goes on|disk full.*goes on")
    assert load("run/checkpoint.pt")["step"] == 5


@pytest.mark.shared
def test_a_checkpoint_that_cannot_be_opened_says_so(module, begun, monkeypatch):
    """No more files, no right to write: open() itself fails."""

    def opened(path, mode="r", *more, **options):
        if "checkpoint.pt." in str(path):
            raise OSError(24, "Too many open files", str(path))
        return open(path, mode, *more, **options)

    def saved(state, file):
        opened(path_of(file), "ab").close()
        save(state, file)

    save = torch.save
    monkeypatch.setattr(module, "open", opened, raising=False)
    monkeypatch.setattr(torch, "save", saved)
    stopped(module, begun, "Too many open files.*checkpoint.pt.*goes on")
    assert load("run/checkpoint.pt")["step"] == 5 and load("run/backbone.pt")["state_dict"]


@pytest.mark.shared
@pytest.mark.parametrize("call", ["mkdir", "write_text"])
def test_a_read_only_run_folder_says_so(module, folder, monkeypatch, call):
    """Root may write anywhere, so the refusal is faked."""

    def refuse(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, call, refuse)
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run")
    stopped(module, args, "^run: .*Read-only file system")


# Signals


@both_signals
def test_a_signal_ends_the_run_after_its_step(module, folder, whole, number, capsys):
    """Step 5, which is no log step: all of it is saved and nothing more is logged; the same command goes on
    bit for bit."""
    args = tiny_args(module.__name__, data=str(folder), **TEN)
    message = stop_at(module, args, 5, number)
    assert message == "stopped after step 5, saved; the same command goes on"
    assert load("run/checkpoint.pt")["step"] == 5 and load("run/backbone.pt")["state_dict"]
    assert [line["step"] for line in metrics_of("run")] == [1, 2, 4]
    assert "backbone.pt" not in capsys.readouterr().out  # no result yet
    module.train(args)
    assert ", step 5\n" in capsys.readouterr().out
    assert_same_run("run", whole)


@pytest.mark.shared
def test_a_second_signal_ends_at_once(module, folder, begun, stopped_at_5):
    message = stop_at(module, begun, 8, signal.SIGINT, signal.SIGTERM)
    assert message == "interrupted; the same command goes on from the last checkpoint"
    before, after = snapshot(stopped_at_5), snapshot("run")
    for name in ("checkpoint.pt", "backbone.pt"):
        assert after[Path("run") / name] == before[stopped_at_5 / name]


@pytest.mark.shared
def test_a_second_ctrl_c_while_a_checkpoint_is_written(module, begun, whole, monkeypatch):
    """torch.save turns what is raised while it writes into a RuntimeError, as on a full disk."""
    before, save = without_events(snapshot("run")), torch.save

    class Interrupting:
        def __init__(self, file):
            self.file, self.size = file, 0

        def write(self, data):
            self.size += len(data)
            if self.size > 10**6:
                send(signal.SIGINT, signal.SIGINT)
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def interrupted(state, file):
        save(state, Interrupting(file) if hasattr(file, "write") else file)
        send(signal.SIGINT, signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        message = stopped(module, begun, "the same command goes on")
    after = without_events(snapshot("run"))
    assert after.keys() == before.keys()  # no temporary file
    for name in ("checkpoint.pt", "backbone.pt"):
        assert after[Path("run") / name] == before[Path("run") / name]
    assert "interrupted" in message and "disk" not in message
    module.train(begun)
    assert_same_run("run", whole)


@pytest.fixture
def handlers():
    """Handlers of somebody else, set for both signals."""

    def mine(number, frame):
        pass

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, mine) for number in numbers]
    yield lambda: [signal.getsignal(number) is mine for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.shared
def test_handlers_are_put_back(module, folder, monkeypatch, handlers):
    """After an end, a stop, a stop at once and an error; and so is the hook of threads."""
    hook, during = threading.excepthook, []
    args = tiny_args(module.__name__, data=str(folder), epochs=1, batch_size=40, warmup_epochs=0)

    def ends(run_dir, action, ending):
        with monkeypatch.context() as patch, ending:
            at_step(module, patch, 1, lambda: (during.append(handlers()), action()))
            module.train(dataclasses.replace(args, run_dir=run_dir))
        assert handlers() == [True, True] and threading.excepthook is hook

    ends("end", lambda: None, contextlib.nullcontext())
    ends("stop", lambda: send(signal.SIGTERM), pytest.raises(SystemExit, match="stopped after step 1, saved"))
    ends("two", lambda: send(signal.SIGTERM, signal.SIGINT), pytest.raises(SystemExit, match="interrupted"))
    ends("error", lambda: 1 / 0, pytest.raises(ZeroDivisionError))
    assert during == [[False, False]] * 4


@pytest.mark.shared
def test_another_thread_leaves_handlers_alone(module, folder, monkeypatch, handlers):
    during, results = [], []
    at_step(module, monkeypatch, 1, lambda: during.append(handlers()))
    args = tiny_args(module.__name__, data=str(folder), epochs=1, batch_size=40, run_dir="run")
    thread = threading.Thread(target=lambda: results.append(module.train(args)))
    thread.start()
    thread.join()
    assert during == [[True, True]] and handlers() == [True, True] and math.isfinite(results[0]["train/loss"])


@pytest.mark.shared
def test_an_interrupt_after_a_checkpoint_goes_on_bit_for_bit(module, folder, whole, monkeypatch):
    save, args = module.save_checkpoint, tiny_args(module.__name__, data=str(folder), **TEN, save_minutes=0.0)

    def stop(path, **state):
        save(path, **state)
        if Path(path).name == "checkpoint.pt" and state["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", stop)
        stopped(module, args, "^interrupted; the same command goes on from the last checkpoint")
    module.train(args)
    assert_same_run("run", whole)


@pytest.mark.shared
@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_stop_does_not_disturb_the_alarm(module, folder, monkeypatch, number, capsys):
    """It rings from step 4 on, the third bad line after a fifth of the run, and says so once, whether it is
    stopped before, within or after these three."""
    monitor = module.monitor

    def flat(*given):
        metrics, problems = monitor(*given)
        return metrics | {"x/level": 0.5}, {"it is flat": "x/level"}

    monkeypatch.setattr(module, "monitor", flat)
    args = tiny_args(module.__name__, data=str(folder), epochs=1, warmup_epochs=0, run_dir="run")
    stop_at(module, args, number, signal.SIGTERM)
    module.train(args)
    assert [line["monitor/alarm"] for line in metrics_of("run")] == [0, 0, 0, 1, 1]
    said = capsys.readouterr().out
    assert said.count("COLLAPSE") == 1 and "COLLAPSE at step 4: it is flat" in said


# Processes


SERVER = """
import json, os, signal, sys, warnings
sys.path[:0] = {paths!r}
import torch, torchvision, tyro, {script} as module
for line in sys.stdin:
    pids = []
    for folder, output, environment, code in json.loads(line):
        pid = os.fork()
        if not pid:
            break
        pids.append(pid)
    else:
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)
        continue
    break
else:
    sys.exit()

os.setsid()
signal.alarm(100)  # it hangs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
os.chdir(folder)
os.environ.update(environment)
for number, name in enumerate((os.devnull, output + ".out", output + ".err")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
exec(compile(code, "child", "exec"))
"""


class Children:
    """Processes at the price of a fork, each a session of its own: children(code, ...) runs all of them at
    once -> what subprocess.run() gives for each; or begin(code, ...) -> pids, and end()."""

    def __init__(self, script, folder):
        code = SERVER.format(paths=[str(ROOT), str(ROOT / "tests")], script=script)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        self.folder, self.count = folder, itertools.count()

    def begin(self, *codes, environments=None):
        self.outputs = [str(self.folder / f"child{next(self.count)}") for _ in codes]
        environments = environments or [{}] * len(codes)
        jobs = [[os.getcwd(), *job] for job in zip(self.outputs, environments, codes, strict=True)]
        print(json.dumps(jobs), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def end(self):
        codes = json.loads(self.server.stdout.readline())
        texts = [[Path(f"{name}.{end}").read_text() for end in ("out", "err")] for name in self.outputs]
        return [subprocess.CompletedProcess("", code, *text) for code, text in zip(codes, texts, strict=True)]

    def __call__(self, *codes, environments=None):
        self.begin(*codes, environments=environments)
        return self.end()

    def as_torchrun(self, *codes):
        """One process for each code, of one training."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": len(codes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(len(codes))]
        environments = [{name: str(value) for name, value in rank.items()} for rank in ranks]
        return self(*codes, environments=environments)


@pytest.fixture(scope="module")
def children(script, tmp_path_factory):
    children = Children(script, tmp_path_factory.mktemp("children"))
    yield children
    children.server.stdin.close()
    assert children.server.wait(timeout=60) == 0


def command(script, before="", **flags):
    """Code of the command with these flags, after the code `before`, which may spoil something."""
    words = command_line(script, **flags)[1:]
    return f"sys.argv = {words!r}\n{textwrap.dedent(before)}\nmodule.train(tyro.cli(module.Args))\n"


def said(done):
    """Lines of stderr but those of the progress bar."""
    return [line for line in done.stderr.splitlines() if line.strip() and not re.search("it/s|s/it", line)]


@pytest.mark.shared
def test_wrong_flag_and_wrong_choice(script, children, tmp_path):
    wrong = (["--no-such-flag", "1"], ["--arch", "resnet1000"], ["--epochs", "many"], ["--restart"])
    code = f"import runpy\nsys.argv = [{str(ROOT / script)!r} + '.py', *%r]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    for words, done in zip(wrong, children(*(code % words for words in wrong)), strict=True):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert words[0] in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.shared
def test_a_worker_that_finds_no_image_ends_the_command(script, children, tmp_path):
    """With one line, and soon."""
    (tmp_path / "bad").mkdir()
    for i in range(110):
        (tmp_path / f"bad/{i:03d}.jpg").write_text("no image")
    caption_all(tmp_path / "bad")
    begin = time.time()
    [done] = children(command(script, data="bad", workers=2, run_dir="run"))
    assert done.stderr.count("100 files in a row cannot be read") == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1 and time.time() - begin < 60


@pytest.mark.shared
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_says_one_line(script, children, folder, number):
    """As Ctrl-C in a terminal, or a scheduler: two workers get it, too."""
    flags = {"data": folder, "run_dir": "run", "epochs": 400, "workers": 2, "log_every": 1}
    [pid] = children.begin(command(script, **flags))
    log, begin = Path("run/metrics.jsonl"), time.time()
    while time.time() - begin < 60 and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.02)
    os.killpg(pid, number)
    [done] = children.end()
    step = load("run/checkpoint.pt")["step"]
    assert step >= 3 and said(done) == [f"stopped after step {step}, saved; the same command goes on"]
    assert done.returncode == 1 and [line["step"] for line in metrics_of("run")] == list(range(1, step + 1))


@pytest.mark.shared
def test_two_processes_of_one_command(script, module, children, folder, whole):
    """By mistake, in one folder at once: neither dies, and both tell the same numbers."""
    flags = {"data": folder, **TEN, "save_minutes": 0.0}
    both = children(*[command(script, **flags)] * 2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    assert len({done.stdout.splitlines()[-1] for done in both}) == 1
    names = {path.name for path in Path("run").iterdir() if "events" not in path.name}
    assert names == {path.name for path in whole.iterdir() if "events" not in path.name}
    lines, right = metrics_of("run"), metrics_of(whole)
    assert all(line in right for line in lines) and all(line in lines for line in right)
    assert load("run/checkpoint.pt")["step"] == 10
    assert module.train(tiny_args(script, **flags))  # prints the result


# What each process of several does first: warnings are errors; but process 0 none may write; and the clock
# of process 0 runs an hour a look, that of the others stands still, or the other way round.
EACH = """
warnings.simplefilter("error", FutureWarning)
rank, fast = int(os.environ["RANK"]), {fast}
def forbidden(*given, **more):
    raise AssertionError(f"process {{rank}} writes {{given}}")
if rank:
    import pathlib
    pathlib.Path.mkdir = pathlib.Path.write_text = pathlib.Path.touch = forbidden
    os.replace = torch.save = module.SummaryWriter = torchvision.utils.save_image = forbidden
import itertools, time, types
ticks = itertools.count(1)
hours = lambda: 3600.0 * next(ticks)
stands = lambda: 1e-6 * next(ticks)
module.time = types.SimpleNamespace(monotonic=hours if (rank == 0) == fast else stands)
"""
DIES = """
count, backward = itertools.count(1), torch.Tensor.backward
def dying(*given, **more):
    if next(count) == {number} and {condition}:
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*given, **more)
torch.Tensor.backward = dying
"""
NO_BATCHNORM = """
def plain(self, x):
    return torch.nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
torch.nn.modules.batchnorm._BatchNorm.forward = plain
"""

# What is within each process, as in the official code.
WITHIN = {"dinov2": {"koleo_weight": 0.0}}


def test_a_run_changes_its_number_of_processes(script, module, children, folder, monkeypatch):
    """2, killed in step 3, then 1, stopped in step 3, then 4: each step once, numbers as of one process where
    no BatchNorm sees one process alone. Process 0 alone writes, when its own clock says so."""
    norm = nn.modules.batchnorm._BatchNorm
    monkeypatch.setattr(norm, "forward", norm.forward)
    exec(NO_BATCHNORM, {"torch": torch})
    rate = "base_lr" if hasattr(module.Args, "base_lr") else "lr"
    rate = {rate: 0.1 * getattr(module.Args, rate)}  # slow, or rounding errors grow
    flags = {"data": str(folder), "device": "cpu", "epochs": 1, "run_dir": "run"} | rate
    flags |= WITHIN.get(script, {})
    args = tiny_args(script, **flags)
    module.train(dataclasses.replace(args, run_dir="alone"))

    first = EACH.format(fast=True) + NO_BATCHNORM
    killed = children.as_torchrun(*[command(script, first + DIES.format(number=3, condition=1), **flags)] * 2)
    assert [done.returncode for done in killed] == [-9, -9], killed
    assert load("run/checkpoint.pt")["step"] == 2
    assert stop_at(module, args, 3, signal.SIGTERM).startswith("stopped after step 3, saved")
    second = EACH.format(fast=False) + NO_BATCHNORM
    four = children.as_torchrun(*[command(script, second, **flags)] * 4)
    assert [done.returncode for done in four] == [0] * 4, "\n".join(done.stderr for done in four)

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


@pytest.mark.shared
def test_processes_save_by_the_clock_of_process_0(script, children, folder):
    """Where it stands still none saves, though the others' clocks run; nor do they wait for each other."""
    flags = {"data": folder, "device": "cpu", "run_dir": "run", "epochs": 1}
    code = command(script, EACH.format(fast=False) + DIES.format(number=5, condition=1), **flags)
    assert [done.returncode for done in children.as_torchrun(code, code)] == [-9, -9]
    assert [line["step"] for line in metrics_of("run")] == [1, 2, 3, 4]
    assert not Path("run/checkpoint.pt").exists()


@pytest.mark.shared
def test_processes_ring_one_alarm(script, children, folder):
    spoil = """
        def flat(*given):
            metrics, problems = monitor(*given)
            return metrics | {"x/level": 0.5}, {"it is flat": "x/level"}
        monitor, module.monitor = module.monitor, flat
    """
    flags = {"data": folder, "device": "cpu", "run_dir": "run", "epochs": 1, "warmup_epochs": 0}
    both = children.as_torchrun(*[command(script, spoil, **flags)] * 2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr
    assert [done.stdout.count("COLLAPSE") for done in both] == [1, 0]
    assert [line["monitor/alarm"] for line in metrics_of("run")] == [0, 0, 0, 1, 1]


@pytest.mark.shared
def test_process_0_downloads_while_the_other_waits(script, children):
    if script == "clip":
        pytest.skip("data sets of torchvision have no captions")
    spoil = """
        import time
        from PIL import Image
        class Set(list):
            def __init__(self, root, download):
                if os.environ["RANK"] == "0":
                    time.sleep(0.5)
                    open("downloaded", "w").close()
                assert root == "data" and download and os.path.exists("downloaded")
                super().__init__((Image.new("L", (20, 20), 10 * i), i % 2) for i in range(16))
        torchvision.datasets.CIFAR10 = Set
    """
    flags = {"data": "CIFAR10", "device": "cpu", "run_dir": "run", "epochs": 1, "log_every": 2}
    both = children.as_torchrun(*[command(script, spoil, **flags)] * 2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    assert [line["step"] for line in metrics_of("run")] == [1, 2]


@pytest.mark.shared
def test_three_processes_refuse_an_odd_batch(script, children, folder):
    done = children.as_torchrun(*[command(script, data=folder, device="cpu", run_dir="run")] * 3)
    for process in done:
        assert process.returncode == 1 and "Traceback" not in process.stderr
        assert re.match(r"--batch-size 8: give a multiple of \d*[369], from \d+ to \d+, ", said(process)[-1])
    assert not Path("run").exists()


@pytest.mark.shared
def test_torchrun_trains_without_a_warning(script, children, folder):
    """The real launcher and the file itself, with FutureWarning as an error; then the same command again."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    flags = {"data": folder, "epochs": 1, "run_dir": "run", "device": "cpu"}
    done = run(
        [*launcher, *command_line(script, **flags)[1:]],
        env=os.environ | {"PYTHONWARNINGS": "error::FutureWarning"},
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert [line["step"] for line in metrics_of("run")] == [1, 2, 3, 4, 5]
    assert done.stdout.count("effective learning rate") == 1 and "2 x cpu" in done.stdout
    assert done.stdout.count("run/backbone.pt: ") == 1
    assert load("run/checkpoint.pt")["step"] == 5
    before = without_events(snapshot("run"))
    again = children.as_torchrun(*[command(script, **flags)] * 2)
    assert [process.returncode for process in again] == [0, 0], again[0].stderr
    assert ", step 5\n" in again[0].stdout and again[0].stdout.splitlines()[-1] in done.stdout
    assert without_events(snapshot("run")) == before


def torchrun(script, n, before, **flags):
    """`before` runs in each process, with its rank."""
    code = "import itertools, os, signal, sys\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\nimport torch, {script} as module, tyro\n"
    code += 'rank = int(os.environ["RANK"])\n' + textwrap.dedent(before)
    Path("program.py").write_text(code + "\nmodule.train(tyro.cli(module.Args))")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    words = command_line(script, run_dir="run", device="cpu", **flags)[2:]
    return run([*launcher, "program.py", *words], timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_others(script, folder, dies):
    """Within the limit of torchrun(), start included; and the run goes on from its checkpoint."""
    before = DIES.format(number=8, condition=f"rank == {dies}")
    done = torchrun(script, 2, before, data=folder, log_every=2, save_minutes=0.0)
    assert done.returncode != 0
    assert load("run/checkpoint.pt")["step"] in (6, 7)  # of step 8 no loss is known to all
    done = torchrun(script, 2, "", data=folder, log_every=2, save_minutes=0.0)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics_of("run")] == [1, *range(2, 21, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_spawned_workers_give_the_same(script, folder, whole, workers):
    code = f"""
        import multiprocessing, sys
        sys.path.insert(0, {str(ROOT)!r})
        import {script} as module, tyro
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            module.train(tyro.cli(module.Args))
    """
    Path("program.py").write_text(textwrap.dedent(code))
    words = command_line(script, data=folder, workers=workers, **TEN)
    done = run([sys.executable, "program.py", *words[2:]])
    assert done.returncode == 0, done.stderr
    assert_same_run("run", whole)


# Kills


KILL = """
import io, random
def die():
    os.kill(os.getpid(), signal.SIGKILL)

def plan(kind, after):
    "Kill this process at the event of this kind with number `after`."
    count = 0
    def due():
        nonlocal count
        count += 1
        return count == after
    save, replace, backward = torch.save, os.replace, torch.Tensor.backward
    write = module.SummaryWriter.add_scalar
    def torn(state, file):
        if due():
            buffer = io.BytesIO()
            save(state, buffer)
            half = buffer.getvalue()[: random.Random(after).randrange(buffer.tell())]
            file = file if hasattr(file, "write") else open(file, "wb")
            file.write(half)
            file.flush()
            die()
        save(state, file)
    def renamed(old, new):
        replace(old, new)
        if due():
            die()
    def before_rename(old, new):
        if due():
            die()
        replace(old, new)
    def stepping(*args, **options):
        if due():
            die()
        return backward(*args, **options)
    def logging(*args, **options):
        if due():
            die()
        return write(*args, **options)
    if kind == "step":
        torch.Tensor.backward = stepping
    elif kind == "torn":
        torch.save = torn
    elif kind == "renamed":
        os.replace = renamed
    elif kind == "before rename":
        os.replace = before_rename
    elif kind == "log":
        module.SummaryWriter.add_scalar = logging
    elif kind == "epoch":
        batches = module.Images.batches
        def between(self, batch_size, *rest):
            per_epoch = len(self.items) // batch_size
            for i, keys in enumerate(batches(self, batch_size, *rest), start=rest[0]):
                if i % per_epoch == 0 and i > rest[0] and due():
                    die()
                yield keys
        module.Images.batches = between
plan({kind!r}, {after})
"""


def kill_and_continue(script, children, folder, kills, **flags):
    """The same command as often as there are kills, and once more; returns how many kills were met."""
    flags = {"data": folder, "run_dir": "run", "log_every": 2, "save_minutes": 0.0} | flags
    met = 0
    for kind, after in kills:
        [done] = children(command(script, KILL.format(kind=kind, after=after), **flags))
        assert done.returncode in (-9, 0) and not said(done), done.stderr
        met += done.returncode == -9
    [done] = children(command(script, **flags))
    assert done.returncode == 0, done.stderr
    return met


def shown(folder):
    """Steps of the loss in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


@pytest.mark.shared
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_the_same_command_again(script, children, folder, whole, workers):
    """kill -9 in step 6, which logged nothing yet, half way through a line of metrics.jsonl; then in the
    third save from there: bit for bit."""
    flags = {"data": folder, **TEN, "save_minutes": 0.0, "workers": workers}
    [done] = children(command(script, KILL.format(kind="step", after=6), **flags))
    assert done.returncode == -9 and load("run/checkpoint.pt")["step"] == 4
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tor')
    assert kill_and_continue(script, children, folder, [("torn", 4)], **flags) == 1
    assert_same_run("run", whole)
    assert shown("run") == [1, 2, 4, 6, 8, 10]


@pytest.mark.shared
def test_kill_while_a_checkpoint_is_written(script, children, folder, whole):
    """The second checkpoint, of step 2, is killed when a part of it is on the disk: the first stands."""
    flags = {"data": folder, **TEN, "save_minutes": 0.0}
    [done] = children(command(script, KILL.format(kind="torn", after=4), **flags))
    assert done.returncode == -9
    assert load("run/checkpoint.pt")["step"] == 1 and load("run/backbone.pt")["state_dict"]
    assert kill_and_continue(script, children, folder, [("renamed", 5)], **TEN) == 1
    assert_same_run("run", whole)


@pytest.mark.slow
def test_twenty_kills_change_nothing(script, module, children, folder):
    """Short lives, so that the 20 steps take all of them; events without a kill left are no matter."""
    kills = [
        ("step", 2),
        ("torn", 1),
        ("torn", 2),
        ("before rename", 1),
        ("before rename", 2),
        ("renamed", 1),
    ]
    kills += [("log", 3), ("renamed", 2), ("step", 4), ("epoch", 1), ("torn", 2), ("renamed", 3), ("log", 30)]
    kills += [("step", 1), ("before rename", 3), ("step", 5), ("torn", 1), ("epoch", 1), ("step", 3)]
    kills += [("renamed", 3)]
    assert len(kills) == 20
    assert kill_and_continue(script, children, folder, kills, epochs=4) >= 15
    module.train(tiny_args(script, data=str(folder), epochs=4, run_dir="whole", log_every=2))
    assert_same_run("run", "whole")
    assert shown("run") == [1, *range(2, 21, 2)]
