"""What goes wrong on real machines: bad numbers, full disks, dead processes, kills; on the first edition.

test_contract_first.py has the plain cases (a rate that is too high, one kill, a torn line).
"""

import importlib
import itertools
import json
import math
import os
import pickle
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import FIRST_EDITION, ROOT, command_line, run, tiny_args
from test_contract_first import assert_same_run, metrics_of
from torch import nn

pytestmark = pytest.mark.parametrize("script", FIRST_EDITION, scope="module")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def module(script):
    return importlib.import_module(script)


def stopped(module, args, match):
    """train() must end with SystemExit and one line for the user."""
    with pytest.raises(SystemExit) as stop:
        module.train(args)
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message and len(message) < 400, message
    assert re.search(match, message), message
    return message


class Steps:
    """Counts the steps of a run."""

    def __init__(self, module, monkeypatch):
        self.done, steps = -100, self

        class Bar(module.tqdm):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                steps.done = self.n

            def update(self, n=1):
                steps.done += n
                return super().update(n)

        monkeypatch.setattr(module, "tqdm", Bar)


# Numbers that are not finite


def spoil_batch(monkeypatch, steps, at):
    def hook(net, inputs):
        if steps.done == at - 1 and torch.is_grad_enabled() and net.training and inputs:
            images = inputs[0]
            if isinstance(images, torch.Tensor) and images.ndim > 3 and images.is_floating_point():
                images = images.clone()
                images[0].fill_(math.nan)
                return images, *inputs[1:]

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    return handle.remove


def spoil_loss(monkeypatch, steps, at):
    scale = torch.amp.GradScaler.scale

    def spoiled(self, loss):
        if steps.done == at - 1:
            loss.data.fill_(math.nan)
        return scale(self, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", spoiled)


EVERY = 0  # step


def spoil_gradient(monkeypatch, steps, at, value=math.nan):
    unscale = torch.amp.GradScaler.unscale_

    def spoiled(self, optimizer):
        if steps.done == at - 1 or (at == EVERY and steps.done >= 0):
            next(p for p in optimizer.param_groups[0]["params"] if p.grad is not None).grad[:1].fill_(value)
        return unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", spoiled)


@pytest.mark.parametrize(
    "spoil", [spoil_batch, *(pytest.param(f, marks=pytest.mark.slow) for f in (spoil_loss, spoil_gradient))]
)
def test_nan_stops_before_anything_is_saved(module, folder, monkeypatch, spoil):
    """In step 2. Each step is a log step here: that step is named, and nothing of it is saved."""
    steps = Steps(module, monkeypatch)
    undo = spoil(monkeypatch, steps, at=2)
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run", "checkpoint_every": 1}
    try:
        stopped(module, tiny_args(module.__name__, **flags), "^step 2: loss .*gradient .*lower --")
    finally:
        undo() if undo else None
    assert [line["step"] for line in metrics_of(Path("run"))] == [1]
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and not Path("run/checkpoint.pt.tmp").exists()
    weights = torch.load("run/backbone.pt", weights_only=True)["state_dict"].values()
    assert all(torch.isfinite(weight).all() for weight in weights)


@pytest.mark.shared
def test_nan_between_two_checks_stops_at_the_next(module, folder, monkeypatch):
    """In step 2 of 5, with checks in steps 1, 3 (saves) and 5: step 3 is named and not saved, and the images
    that steps 2 and 3 read are written down."""
    steps = Steps(module, monkeypatch)
    spoil_gradient(monkeypatch, steps, at=2)
    read, real = [], module.read_image
    monkeypatch.setattr(module, "read_image", lambda path, *size: read.append(path) or real(path, *size))
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run", "checkpoint_every": 3, "log_every": 100}
    args = tiny_args(module.__name__, **flags)
    stopped(module, args, "^step 3: loss .*lower --.*run/not-finite.txt names the images since step 1")
    assert not Path("run/checkpoint.pt").exists() and not Path("run/backbone.pt").exists()
    named = [line.split("\t") for line in Path("run/not-finite.txt").read_text().splitlines()]
    batches = [{path for step, path in named if step == number} for number in "123"]
    assert [len(batch) for batch in batches] == [0, args.batch_size, args.batch_size]
    assert batches[1] | batches[2] <= set(read) and not batches[1] & batches[2]


# float16


def bfloat16_for_float16(monkeypatch):
    """The CPU needs seconds for float16; what is tested is the scaler."""
    autocast = torch.autocast

    def cast(kind, dtype=None, enabled=True):
        return autocast(kind, torch.bfloat16 if dtype == torch.float16 else dtype, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", cast)


def test_a_float16_overflow_skips_its_step(module, folder, monkeypatch):
    """Step 2 of 3 changes no weight and halves the scale; the run goes on."""
    bfloat16_for_float16(monkeypatch)
    steps = Steps(module, monkeypatch)
    spoil_gradient(monkeypatch, steps, at=2, value=math.inf)
    changed, scales, step_of = [], [], torch.amp.GradScaler.step

    def step(self, optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        step_of(self, optimizer)
        if steps.done >= 0:
            changed.append(any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True)))
            scales.append(self.get_scale())  # before its update

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    monkeypatch.setattr(module, "save_checkpoint", lambda path, **state: None)
    flags = {"data": str(folder), "epochs": 1, "batch_size": 12, "queue_size": 48, "amp": "fp16"}
    flags = {k: v for k, v in flags.items() if hasattr(module.Args, k)} | {"warmup_epochs": 0}
    metrics = module.train(tiny_args(module.__name__, run_dir="run", **flags))
    assert changed == [True, False, True] and scales == [65536, 65536, 32768]
    logged = {line["step"]: line["perf/skipped_steps"] for line in map(json.loads, open("run/metrics.jsonl"))}
    assert sum(logged.values()) == 1 and logged[1] == 0
    assert math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"])


@pytest.mark.shared
def test_a_gradient_that_is_never_finite_stops_a_float16_run(module, folder, monkeypatch):
    bfloat16_for_float16(monkeypatch)
    spoil_gradient(monkeypatch, Steps(module, monkeypatch), at=EVERY)
    args = tiny_args(module.__name__, data=str(folder), epochs=4, run_dir="run", amp="fp16", log_every=5)
    stopped(module, args, "gradient")


@pytest.mark.shared
def test_metrics_are_json_that_every_reader_takes(module, folder, monkeypatch):
    bfloat16_for_float16(monkeypatch)
    spoil_gradient(monkeypatch, Steps(module, monkeypatch), at=2, value=math.inf)
    module.train(tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run", amp="fp16"))

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


# Disks


def fail_on(monkeypatch, module, name, error, times=math.inf):
    """open() of this module fails for writing paths that end in `name`, the first `times` times."""
    count = itertools.count()

    def opened(path, mode="r", *more, **options):
        if str(path).endswith(name) and mode != "r" and next(count) < times:
            raise error
        return open(path, mode, *more, **options)

    monkeypatch.setattr(module, "open", opened, raising=False)


NO_SPACE = OSError(28, "No space left on device")
READ_ONLY = OSError(30, "Read-only file system")


def begun(module, folder):
    """Arguments of a run of 5 steps that was interrupted after the checkpoint of step 2."""
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run", "checkpoint_every": 2, "log_every": 1}
    args, save = tiny_args(module.__name__, **flags), module.save_checkpoint

    def stop(path, **state):
        save(path, **state)
        if Path(path) == Path("run/checkpoint.pt"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_checkpoint", stop)
        stopped(module, args, "interrupted .step 2")
    return args


@pytest.mark.shared
@pytest.mark.parametrize("name", ["checkpoint", "backbone"])
def test_a_full_disk_leaves_the_old_checkpoint(module, folder, name):
    """The temporary file is Linux's /dev/full: each write to it fails as on a full disk."""
    args = begun(module, folder)
    before = torch.load("run/checkpoint.pt", weights_only=True)["step"]
    os.symlink("/dev/full", f"run/{name}.pt.tmp")
    try:
        stopped(module, args, "No space left on device.*step 4.*continues")
    finally:
        assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == before == 2
        os.unlink(f"run/{name}.pt.tmp")
        metrics = module.train(args)  # when there is space again
        assert math.isfinite(metrics["train/loss"]) and len(metrics_of(Path("run"))) == 5


@pytest.mark.shared
def test_a_full_disk_under_the_event_file_says_the_same(module, folder, monkeypatch):
    """TensorBoard's writer fails once more when it is closed."""

    def full(*_):
        raise NO_SPACE

    args = begun(module, folder)
    monkeypatch.setattr(module.SummaryWriter, "close", full)
    fail_on(monkeypatch, module, "checkpoint.pt.tmp", NO_SPACE)
    stopped(module, args, "No space left on device.*step 4.*continues")


@pytest.mark.shared
def test_weights_that_are_not_finite_are_not_saved(module, folder, monkeypatch):
    """As after a float16 step that was skipped: its batch has spoilt the statistics of BatchNorm."""
    args = begun(module, folder)
    before, export = Path("run/backbone.pt").read_bytes(), module.export_backbone

    def spoiled(folder, method, args, dim, weights, **more):
        next(iter(weights.values())).fill_(math.inf)
        export(folder, method, args, dim, weights, **more)

    monkeypatch.setattr(module, "export_backbone", spoiled)
    stopped(module, args, "^run: a weight is not finite, nothing is saved; lower .*--amp off")
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    assert Path("run/backbone.pt").read_bytes() == before


@pytest.mark.shared
def test_metrics_that_cannot_be_written_say_so(module, folder, monkeypatch):
    name = "metrics.jsonl"
    args = begun(module, folder)
    before = (Path("run/checkpoint.pt")).read_bytes()
    open_run = module.open_run

    def opened(*flags):
        result = open_run(*flags)
        if result[0] == Path("run"):
            fail_on(monkeypatch, module, f"run/{name}", NO_SPACE)
        return result

    monkeypatch.setattr(module, "open_run", opened)
    stopped(module, args, "No space left on device.*without --restart, continues")
    assert (Path("run/checkpoint.pt")).read_bytes() == before
    monkeypatch.delattr(module, "open")
    monkeypatch.setattr(module, "open_run", open_run)
    assert module.train(args) and len(metrics_of(Path("run"))) == 5


@pytest.mark.shared
@pytest.mark.parametrize("call", ["mkdir", "write_text"])
def test_a_read_only_run_folder_says_so(module, folder, monkeypatch, call):
    """Root may write anywhere, so the refusal is faked."""

    def refuse(self, *_, **__):
        raise OSError(READ_ONLY.errno, READ_ONLY.strerror, str(self))

    monkeypatch.setattr(Path, call, refuse)
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run")
    stopped(module, args, "run.*Read-only file system|Read-only file system.*run")


@pytest.mark.shared
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_args_json_says_so(module, folder, text):
    Path("run").mkdir()
    Path("run/args.json").write_bytes(text)
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run")
    stopped(module, args, "args.json.*--restart")


@pytest.mark.shared
def test_a_checkpoint_of_an_older_version_says_so(module, folder):
    """The same method, but another name or shape in it: what a repair of the script leaves behind."""
    args = begun(module, folder)
    state = torch.load("run/checkpoint.pt", weights_only=True)
    part = next(key for key in state if isinstance(state[key], dict) and len(state[key]) > 10)
    name = next(iter(state[part]))
    state[part][name + "_old"] = state[part].pop(name)
    for wrong in (state, {key: state[key] for key in state if key != "optimizer"}):
        torch.save(wrong, "run/checkpoint.pt")
        stopped(module, args, "checkpoint.pt.*--restart")


# The same numbers for any way of reading images


@pytest.fixture(scope="module")
def reference(script, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp(script)
    importlib.import_module(script).train(tiny_args(script, data=str(folder), epochs=1, run_dir=str(path)))
    return path


@pytest.mark.shared
def test_four_workers_and_the_same_seed_give_the_same(module, folder, reference):
    torch.manual_seed(99)  # whatever was drawn before
    module.train(tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run", workers=4))
    assert_same_run(Path("run"), reference)


def test_images_survive_the_way_to_a_spawned_worker(module, folder, monkeypatch):
    """Where workers are spawned (macOS, Windows) the data set is pickled; the copy draws the same crops."""
    seen = []

    def loader(data, *_, **__):
        seen.append(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "DataLoader", loader)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        module.train(tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run"))
    copied = pickle.loads(pickle.dumps(seen[0]))
    ours, theirs = (torch.utils.data.default_collate([data[3], data[41]]) for data in (seen[0], copied))
    flat = [torch.utils._pytree.tree_leaves(items) for items in (ours, theirs)]
    assert len(flat[0]) and all(torch.equal(a, b) for a, b in zip(*flat, strict=True) if torch.is_tensor(a))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_spawned_workers_give_the_same(script, folder, reference, workers):
    code = f"""
        import multiprocessing, sys
        sys.path.insert(0, {str(ROOT)!r})
        import {script} as module, tyro
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            module.train(tyro.cli(module.Args))
    """
    Path("program.py").write_text(textwrap.dedent(code))
    words = command_line(script, data=folder, epochs=1, run_dir="run", workers=workers)
    done = run([sys.executable, "program.py", *words[2:]])
    assert done.returncode == 0, done.stderr
    assert_same_run(Path("run"), reference)


# Several processes


def test_a_batch_that_three_processes_cannot_share_is_refused(module, folder, monkeypatch):
    monkeypatch.setattr(module, "start_processes", lambda *flags: (0, 3, torch.device("cpu"), None))
    args = tiny_args(module.__name__, data=str(folder), run_dir="run")
    stopped(module, args, r"^--batch-size 8: give a multiple of \d*[369]\b")
    assert not Path("run").exists()


def torchrun(script, n, before, **flags):
    """`before` runs in each process, with its rank."""
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch, {script} as module, tyro
        rank = int(os.environ["RANK"])
        {textwrap.indent(textwrap.dedent(before), 8 * " ").strip()}
        module.train(tyro.cli(module.Args))
    """
    Path("program.py").write_text(textwrap.dedent(code))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    return run(
        [*launcher, "program.py", *command_line(script, run_dir="run", device="cpu", **flags)[2:]],
        timeout=300,
    )


@pytest.mark.slow
def test_three_processes_refuse_an_odd_batch_with_one_message(script, folder):
    done = torchrun(script, 3, "", data=folder)
    assert done.returncode != 0 and done.stderr.count("--batch-size 8: give a multiple of") == 3
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_others(script, folder, dies):
    """Within the limit of torchrun(), start included; and the run goes on from its checkpoint."""
    before = f"""
        count = 0
        def dying(*arguments, **options):
            global count
            count += 1
            if count == 8 and rank == {dies}:
                os.kill(os.getpid(), signal.SIGKILL)
            return backward(*arguments, **options)
        backward, torch.Tensor.backward = torch.Tensor.backward, dying
    """
    done = torchrun(script, 2, before, data=folder, checkpoint_every=2)
    assert done.returncode != 0
    for path in Path("run").rglob("checkpoint.pt"):
        state = torch.load(path, weights_only=True)
        assert state["step"] % 2 == 0 or state["step"] == 5
    done = torchrun(script, 2, "", data=folder, checkpoint_every=2)
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in metrics_of(Path("run"))]
    assert steps == list(range(1, 21))


# Kills

KILLER = """
import io, os, random, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import {script} as module, torch
from conftest import tiny_args

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
            file.write(buffer.getvalue()[: random.Random(after).randrange(buffer.tell())])
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

args = tiny_args({script!r}, data={data!r}, epochs={epochs}, run_dir="run", checkpoint_every=3)
for kind, after in {kills!r} + [(None, 0)]:
    child = os.fork()  # the imports are done, once for all
    if not child:
        plan(kind, after)
        module.train(args)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    how = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    print("KILL" if kind else "END", kind, after, how, flush=True)
"""


def kill_and_continue(script, folder, kills, epochs):
    code = KILLER.format(
        root=str(ROOT), tests=str(ROOT / "tests"), script=script, data=str(folder), kills=kills, epochs=epochs
    )
    Path("killer.py").write_text(code)
    done = run([sys.executable, "killer.py"], timeout=900)
    assert done.returncode == 0, done.stderr
    ends = [line.split() for line in done.stdout.splitlines() if line.startswith(("KILL", "END"))]
    assert ends[-1] == ["END", "None", "0", "0"], done.stderr[-2000:]
    assert all(end[-1] in ("-9", "0") for end in ends[:-1]), done.stderr[-2000:]
    return sum(end[-1] == "-9" for end in ends)


def uninterrupted(script, folder, tmp_path_factory, epochs):
    path = tmp_path_factory.mktemp(f"{script}-whole")
    args = tiny_args(script, data=str(folder), epochs=epochs, run_dir=str(path), checkpoint_every=3)
    importlib.import_module(script).train(args)
    return path


def shown(folder):
    """Steps of the loss in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


@pytest.mark.shared
def test_three_kills_change_nothing(script, folder, tmp_path_factory):
    kills = [("step", 5), ("torn", 3), ("renamed", 4)]
    assert kill_and_continue(script, folder, kills, epochs=2) == 3
    assert_same_run(Path("run"), uninterrupted(script, folder, tmp_path_factory, epochs=2))
    assert shown("run") == list(range(1, 11))


@pytest.mark.slow
def test_twenty_kills_change_nothing(script, folder, tmp_path_factory):
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
    kills += [
        ("step", 1),
        ("before rename", 3),
        ("step", 5),
        ("torn", 1),
        ("epoch", 1),
        ("step", 3),
        ("renamed", 3),
    ]
    assert len(kills) == 20
    assert kill_and_continue(script, folder, kills, epochs=4) >= 15
    assert_same_run(Path("run"), uninterrupted(script, folder, tmp_path_factory, epochs=4))
    assert shown("run") == list(range(1, 21))
