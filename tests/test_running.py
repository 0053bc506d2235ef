"""What running a training script promises (DESIGN 3, 6, 7, 8, 11): flags, schedule, folder, names, --init.

What each script does for itself is tested on each, by one tiny run; Plumbing, the same in all, on simclr.py.
test_data.py has images, test_failures.py disks, signals, kills and several processes.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from conftest import TRAINING, at_each_step, load, metrics_of, refused, stopped, tiny_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import clip
import eval_linear
import simclr

every_script = pytest.mark.parametrize("script", TRAINING, scope="module")
FREE = {"workers", "device", "compile", "run_dir", "log_every", "save_minutes"}  # do not define a training
COMMON = FREE | set("data image_size arch epochs batch_size weight_decay warmup_epochs init amp seed".split())
TAGS = {"train/loss", "train/lr", "train/grad_norm", "perf/images_per_second"}
TAGS |= {"monitor/feature_std", "monitor/effective_rank", "monitor/alarm"}
BAD_VALUES = """
    epochs=-1 batch_size=0 image_size=-1 weight_decay=-0.1 weight_decay=inf warmup_epochs=-1. workers=-1
    log_every=0 save_minutes=-1. micro_batch_size=-1 seed=-1 temperature=-1. temperature=0. min_scale=0.
    min_scale=1.5 blur=2. base_lr=nan base_lr=0. base_lr=inf lr=nan lr=0.
"""
MOVING = ("byol", "dino", "dinov2", "ijepa", "moco", "moco_v3")  # they have a second, slower encoder


# Each script


def begun(script, **flags):
    """Weights of a training before its first step, where train() is left."""

    def leave(args, method, parts, *_):
        raise InterruptedError(parts["model"].state_dict())

    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError) as left:
        patch.setattr(module, "open_run", leave)
        module.train(tiny_args(script, **flags))
    return left.value.args[0]


@pytest.fixture(scope="module")
def trained(script, folder, tmp_path_factory):
    """A run of two epochs of two steps, in bfloat16, whose warm-up would last three."""
    path = tmp_path_factory.mktemp(script) / "run"
    flags = {"data": str(folder), "epochs": 2, "batch_size": 20, "warmup_epochs": 3.0, "amp": "bf16"}
    args, module = tiny_args(script, **flags, run_dir=str(path)), importlib.import_module(script)
    log, update, armed, rates = module.log_metrics, torch.amp.GradScaler.step, [], []

    def step(scaler, optimizer):
        rates.append([(group["lr"], group.get("scale", 1.0)) for group in optimizer.param_groups])
        return update(scaler, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "log_metrics", lambda *given: armed.append(given[-1]) or log(*given))
        patch.setattr(torch.amp.GradScaler, "step", step)
        facts = {"args": args, "metrics": module.train(args), "armed": armed, "rates": rates}
    return SimpleNamespace(**facts, folder=path, file=str(path / "backbone.pt"))


@every_script
def test_flags_and_that_wrong_values_say_what_is_allowed(script, tmp_path):
    default = vars(importlib.import_module(script).Args())
    assert COMMON < set(default) and {"base_lr", "lr"} & set(default)
    assert (default["data"], default["device"], default["amp"]) == ("demo", "auto", "auto")
    assert default["run_dir"] == "" and default["save_minutes"] == 10

    wrong = [item.split("=") for item in BAD_VALUES.split() if item.split("=")[0] in default]
    assert len(wrong) >= 10
    for name, text in wrong:
        value = float(text) if re.search("[.a-z]", text) else int(text)
        allowed = rf"^--{name.replace('_', '-')} {value}: must be (above|at least) 0( and at most \d+)?$"
        refused(script, allowed, data="nowhere", **{name: value})
    if not torch.cuda.is_available():
        refused(script, "^--device cuda: .*--device cpu", data="nowhere", device="cuda")
    assert not list(tmp_path.iterdir())


@every_script
def test_a_run_writes_its_flags_metrics_pictures_and_events(script, trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert {"args.json", "metrics.jsonl", "checkpoint.pt", "backbone.pt"} < names
    assert any(name.endswith(".png") for name in names) and not any(name.endswith(".tmp") for name in names)

    held = json.loads((trained.folder / "args.json").read_text())
    flags = {name: value for name, value in dataclasses.asdict(trained.args).items() if name not in FREE}
    facts = {"method": script, "images": 40, "autocast": "torch.bfloat16", "torch": torch.__version__}
    assert held == json.loads(json.dumps(flags)) | facts
    checkpoint = load(trained.folder / "checkpoint.pt")
    assert checkpoint["method"] == script and checkpoint["step"] == 4

    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    last = lines[-1]
    assert TAGS < set(last) and any(tag.startswith(f"{script}/") for tag in last)
    assert trained.metrics.items() <= last.items() and all(map(math.isfinite, last.values()))
    board = EventAccumulator(str(trained.folder)).Reload()
    assert set(board.Tags()["scalars"]) == set(last) - {"step", "epoch"}
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]


@every_script
def test_a_warm_up_longer_than_the_run_is_cut_to_it(script, trained):
    """Four steps: from 0 in a line that would reach the peak in the fifth, of BEiT and DINOs in the fourth.
    I-JEPA counts steps from 1, as the official code: the peak in the third, then its lowest rate. The alarm
    is armed after it."""
    args = trained.args
    peak = args.base_lr * 20 / 256 if hasattr(args, "base_lr") else args.lr
    expected = [peak * i / (3 if script in ("beit", "dino", "dinov2") else 4) for i in range(4)]
    if script == "ijepa":
        expected = [peak / 3, peak * 2 / 3, peak, 1e-6]
    assert [line["train/lr"] for line in metrics_of(trained.folder)] == pytest.approx(expected)
    assert trained.armed == [3 if script == "ijepa" else 4] * 4

    for lr, groups in zip(expected, trained.rates[-4:], strict=True):  # BEiT's tokenizer has steps before
        for rate, scale in groups:
            assert rate == pytest.approx(lr * scale) or script == "dinov2" and rate == 0  # frozen
    assert sum(rate > 0 for groups in trained.rates for rate, _ in groups) >= 2


@every_script
def test_backbone_loads_where_it_was_built(script, trained):
    """Strictly, in the library that its builder names, in float32; and eval_linear.py takes it."""
    args, module, saved = trained.args, importlib.import_module(script), load(trained.file)
    facts = "method arch builder arch_args image_size mean std step feature_dim state_dict"
    assert set(saved) == set(facts.split())
    assert (saved["method"], saved["arch"], saved["image_size"]) == (script, args.arch, args.image_size)
    assert tuple(saved["mean"]) == module.MEAN and tuple(saved["std"]) == module.STD
    state = saved["state_dict"].values()
    assert not any(tensor.requires_grad for tensor in state)
    assert {tensor.dtype for tensor in state if tensor.is_floating_point()} == {torch.float32}

    library, _, name = saved["builder"].partition(".")
    if library == "torchvision":
        assert name == "resnet" and saved["arch_args"] == {"arch": args.arch, "stem": args.stem}
        net = getattr(torchvision.models, args.arch)()
        dim, net.fc = net.fc.in_features, nn.Identity()
    else:
        assert library == "timm" and saved["arch_args"]["num_classes"] == 0
        shape = dict(saved["arch_args"])
        eps = shape.pop("norm_eps", 1e-6)  # timm takes it as a class
        net = getattr(timm.models, name)(**shape, norm_layer=partial(nn.LayerNorm, eps=eps))
        dim = net.num_features
    net.load_state_dict(saved["state_dict"], strict=True)

    features = eval_linear.load_backbone(trained.file).eval()(torch.rand(2, 3, 32, 32) * 255)
    assert features.shape == (2, dim) and saved["feature_dim"] == dim and features.isfinite().all()


def copies_of(name, model):
    """Tensors of a model's state that backbone.pt has under this name: of its encoder and copies of it."""
    if "visual.proj" in model:  # clip.py: in the official names
        tower = {k.removeprefix("visual."): v for k, v in model.items() if k.startswith("visual.")}
        return [clip.in_timm_names(SimpleNamespace(state_dict=lambda: tower))[name]]
    names = tuple(f"{encoder}.{name}" for encoder in ("backbone", "encoder_q", "encoder_k", "encoder"))
    return [tensor for ours, tensor in model.items() if ours == name or ours.endswith(names)]


@every_script
def test_no_epochs_write_the_untrained_backbone(script, folder):
    """It is what a training of the same seed starts from."""
    args = tiny_args(script, data=str(folder), epochs=0, run_dir="run")
    assert importlib.import_module(script).train(args) == {}
    weights = load("run/backbone.pt")["state_dict"]
    assert load("run/checkpoint.pt")["step"] == 0 and metrics_of("run") == []
    for seed in (0, 1):
        start = begun(script, data=str(folder), seed=seed)
        same = [torch.equal(copies_of(name, start)[0], weights[name]) for name in weights]
        assert all(same) == (seed == 0)


@every_script
def test_init_starts_every_copy_of_the_encoder_from_a_backbone(script, folder, trained):
    """A number of heads and an activation, which no shape shows, have to be the same where the file says
    them; that of the first edition does not."""
    start, saved = begun(script, data=str(folder), seed=1, init=trained.file), load(trained.file)
    for name, tensor in saved["state_dict"].items():
        copies = copies_of(name, start)
        assert len(copies) == 1 + (script in MOVING), name
        assert all(torch.equal(copy, tensor) for copy in copies), name

    for hidden in {"num_heads", "act_layer"} & set(saved["arch_args"]):
        torch.save(saved | {"arch_args": {hidden: "other"}}, "other.pt")
        refused(script, "^--init other.pt: its weights are not ", data=str(folder), init="other.pt")
    torch.save({"state_dict": saved["state_dict"]}, "first.pt")
    assert begun(script, data=str(folder), init="first.pt")


# Flags and schedule


def test_a_schedule_that_is_all_warm_up_ends_at_its_base():
    assert [simclr.cosine_schedule(step, 2, 2, 1.0) for step in range(3)] == [0, 0.5, 1]


def test_each_process_takes_its_slice_of_the_global_batch(folder):
    images = simclr.Images(tiny_args("simclr", data=str(folder)), (), 32)
    whole = list(images.batches(8, 0, 2, 0, 1))
    parts = [list(images.batches(8, 0, 2, rank, 2)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]
    assert len(whole) == 10 and all(len(batch) == 8 for batch in whole)
    assert all(whole[step:] == list(images.batches(8, step, 2, 0, 1)) for step in (3, 7, 10))
    assert list(images.batches(8, 0, 0, 0, 1)) == []

    first, second = sum(whole[:5], []), sum(whole[5:], [])
    assert sorted(first) == list(range(40)) and sorted(second) == list(range(40, 80))
    assert [key - 40 for key in second] != first
    assert [len(batch) for batch in images.batches(16, 0, 2, 0, 1)] == [16] * 4  # the rest is dropped


def test_a_batch_is_shared_evenly_or_refused():
    def check(batch_size, world, micro=0):
        args = SimpleNamespace(batch_size=batch_size, micro_batch_size=micro, data="photos")
        return simclr.images_per_pass(args, 40, world)

    assert check(8, 1) == 8 and check(8, 2) == 4 and check(8, 1, 2) == 2 and check(8, 2, 4) == 4
    assert check(40, 1) == 40
    cases = [(0, 1), (1, 1), (41, 1), (8, 3), (4, 4)]  # BatchNorm1d of one row
    allowed = ["1, from 2"] * 3 + ["3, from 6", "4, from 8"]
    for given, words in zip(cases, allowed, strict=True):
        words = f"^--batch-size {given[0]}: give a multiple of {words} to 40, the images in photos$"
        stopped(partial(check, *given), words)
    for world, micro, sizes in ((1, 3, "1, 2, 4, 8"), (2, 8, "1, 2, 4"), (1, 16, "1, 2, 4, 8")):
        stopped(partial(check, 8, world, micro), rf"^--micro-batch-size {micro}: .*\[{sizes}\]$")


def test_processes_device_and_autocast_type(monkeypatch):
    """auto is bfloat16 on GPUs of compute capability 8, float16 on older ones, off elsewhere."""
    start, cpu = simclr.start_processes, torch.device("cpu", 0)
    for amp, dtype in (("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("auto", None)):
        assert start("cpu", amp) == (0, 1, cpu, dtype)
    with monkeypatch.context() as patch:  # under a scheduler that sets this variable alone
        patch.delenv("RANK", raising=False)
        patch.setenv("WORLD_SIZE", "2")
        stopped(lambda: start("cpu", "off"), "WORLD_SIZE is 2, without RANK.*torchrun")

    gpus = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": lambda device: None}
    for name, function in gpus.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for local, capability, dtype in ((0, 9, torch.bfloat16), (0, 8, torch.bfloat16), (1, 7, torch.float16)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: (found, 0))
        assert start("auto", "auto") == (0, 1, torch.device("cuda", local), dtype)
    monkeypatch.setenv("LOCAL_RANK", "2")
    stopped(lambda: start("auto", "auto"), "no GPU for process 2 of this machine")


# The run folder, of a small network


@pytest.fixture
def small(folder, monkeypatch):
    """small(...) trains ten steps, in `run`, and logs 1 2 4 6 8 10."""

    def resnet(arch, stem):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8)), 8

    def train(**flags):
        flags = {"data": str(folder), "epochs": 2, "log_every": 2, "run_dir": "run"} | flags
        return simclr.train(tiny_args("simclr", image_size=8, **flags))

    monkeypatch.setattr(simclr, "resnet", resnet)
    return train


def snapshot(folder):
    """Contents of all files but TensorBoard's, and times of those that torch.save() writes."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and "events" not in path.name]
    return {file: (file.read_bytes(), file.suffix == ".pt" and file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_command_of_a_finished_run_prints_its_result_and_writes_nothing(small, capsys, epochs):
    """The last step is a log step, and the last line has the three or four numbers that matter."""
    metrics = small(epochs=epochs, log_every=4)
    words, before = capsys.readouterr().out.splitlines()[-1], snapshot("run")
    if epochs:
        assert [line["step"] for line in metrics_of("run")] == [1, 4, 8, 10]
        numbers = re.fullmatch(r"run/backbone\.pt: ((?:\w+ [-+.e\d]+(?:, |$)){3,4})", words)[1].split(", ")
        values = {tag.split("/")[1]: f"{value:.4g}" for tag, value in metrics.items()}
        assert all(values[number.split()[0]] == number.split()[1] for number in numbers)
    assert small(epochs=epochs) == metrics
    assert capsys.readouterr().out.splitlines()[-1] == words and snapshot("run") == before


def test_name_of_the_run_folder(small, folder, capsys):
    """By what defines the training; photos, photos/ and ./photos are the same photos."""
    args = tiny_args("simclr", data=str(folder))

    def name(args=args, **flags):
        return str(simclr.open_run(dataclasses.replace(args, **flags), "simclr", {}, 40, None).folder)

    assert name(simclr.Args()) == "runs/simclr" and re.fullmatch(r"runs/simclr-[0-9a-f]{8}", name())
    assert len({name(), name(seed=1), name(epochs=9), name(epochs=10)}) == 4
    assert name() == name(workers=3, device="cpu", log_every=7, save_minutes=3.0, compile=True)
    assert name(run_dir="elsewhere/x") == "elsewhere/x"

    os.symlink(folder, "photos")
    ends = set()
    for step, data in ((0, "photos"), (10, "photos/"), (10, "./photos")):
        capsys.readouterr()
        small(data=data, run_dir="")
        first, *_, last = capsys.readouterr().out.splitlines()
        assert re.search(rf"Run folder runs/simclr-\w+, step {step}$", first)
        ends.add(last)
    assert len(ends) == 1


def test_a_folder_of_another_run_is_refused_and_not_touched(small, folder, monkeypatch):
    """Other flags, epochs, images, or what --amp auto became elsewhere: it names what differs and the way on,
    --init only where the training is the same."""
    shutil.copytree(folder, "photos")
    small(data="photos")
    new = ": to begin anew delete run, or give another --run-dir"
    init = f"{new} and --init run/backbone.pt"

    def check(words, **flags):
        before = snapshot("run")
        stopped(partial(small, data="photos", **flags), f"^run holds a run with {words}$")
        assert snapshot("run") == before

    check(f"weight_decay 0.0001, not 0.5, seed 0, not 5{new}", weight_decay=0.5, seed=5)
    check(f"epochs 2, not 3{init}", epochs=3)
    check(f"epochs 2, not 3, seed 0, not 5{new}", epochs=3, seed=5)
    shutil.copytree(folder, "photos/more")
    check(f"images 40, not 80{init}")
    shutil.rmtree("photos/more")
    became = (0, 1, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(simclr, "start_processes", lambda *_: became)
    check(f"autocast None, not torch.bfloat16{new}")

    Path("file").write_text("mine")
    stopped(partial(small, run_dir="file"), "^file: .*exists: 'file': .*give another --run-dir")
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    "minutes, clock, steps",
    [
        (0.0, lambda step: 0, [1, 2, 4, 6, 8, 10]),  # at each log step
        (10.0, lambda step: 0.1 * step, [10]),
        (10.0, lambda step: 3 * step, [4, 8, 10]),  # at 12 min, the first log step 10 later; again 10 later
        (8.0, lambda step: 9 * (step > 3) + 7.5 * (step > 7), [4, 10]),  # at 9 min, not at 16.5
    ],
)
def test_checkpoints_come_by_the_clock(small, monkeypatch, minutes, clock, steps):
    """Which says clock(step), in minutes, in a step."""
    saved, at, looks, save = [], [0], itertools.count(), simclr.save_checkpoint

    def note(path, **state):
        saved.append((path.name, state.get("step")))
        save(path, **state)

    time = SimpleNamespace(monotonic=lambda: 60.0 * clock(at[-1]) + 1e-3 * next(looks))
    at_each_step(simclr, monkeypatch, lambda step: at.append(step + 1))
    monkeypatch.setattr(simclr, "time", time)
    monkeypatch.setattr(simclr, "save_checkpoint", note)
    small(save_minutes=minutes)
    assert [step for name, step in saved if name == "checkpoint.pt"] == steps


# --init


def test_a_start_that_does_not_match_is_refused(small):
    small()
    whole, saved = Path("run/backbone.pt").read_bytes(), load("run/backbone.pt")
    state = saved["state_dict"]
    less = {name: tensor for name, tensor in state.items() if name != "1.bias"}
    more, longer = state | {"layer9.weight": torch.ones(1)}, state | {"1.bias": torch.ones(7)}
    for other, found in (
        (less, "1.bias None, not"),
        (more, "layer9.weight .1., not"),
        (longer, "1.bias .7., not"),
    ):
        torch.save(saved | {"state_dict": other}, "bad.pt")
        words = f"^--init bad.pt: its weights are not .*: {found} .*; conv"
        stopped(partial(small, init="bad.pt", run_dir="new"), words)
    for damage in (b"", b"no checkpoint", whole[:1000]):
        Path("bad.pt").write_bytes(damage)
        stopped(partial(small, init="bad.pt", run_dir="new"), "^--init bad.pt: .*convert.py makes")
    stopped(partial(small, init="no.pt", run_dir="new"), "^--init no.pt: .*No such file")
    assert not Path("new").exists()

    small(init="run/backbone.pt", run_dir="new")
    assert json.loads(Path("new/args.json").read_text())["init"] == "run/backbone.pt"
