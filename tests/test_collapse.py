"""DESIGN 9: metrics of collapse, the alarm, that it rings without a safeguard and never in a healthy run."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAINING, metrics_of, run, tiny_args
from torch import nn

import simclr

# Metrics and alarm, Plumbing: on simclr.py


def test_monitor_oracles(generator):
    """methods/collapse.md, section 6."""
    metrics = simclr.collapse_metrics
    equal = metrics(torch.full((256, 128), 0.7))
    assert equal["feature_std"] < 1e-5 and abs(equal["spread"]) < 1e-5
    assert equal["effective_rank"] == pytest.approx(1.0002, abs=1e-4)
    axes = metrics(torch.cat([torch.eye(128), -torch.eye(128)]))
    assert axes["spread"] == pytest.approx(1) and axes["feature_std"] == pytest.approx((256 / 255) ** 0.5)
    assert axes["effective_rank"] == pytest.approx(128.006, abs=0.01)

    gauss = torch.randn(1024, 128, generator=generator)
    healthy = metrics(gauss)
    rank = healthy["effective_rank"]
    assert healthy["feature_std"] == pytest.approx(1, abs=0.01) and rank == pytest.approx(126, abs=1)
    rotation = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    flat = metrics(gauss[:, :4] @ rotation[:4])
    assert flat["feature_std"] > 0.9 and flat["effective_rank"] == pytest.approx(4, abs=0.02)
    unit = nn.functional.normalize(gauss + 1, dim=1)
    assert metrics(gauss + 1)["spread"] == pytest.approx(unit.var(0, correction=0).sum().item(), abs=1e-6)

    nearly = 5 + 1e-6 * torch.randn(512, 128, generator=generator)
    assert metrics(nearly, center=True)["effective_rank"] == 1
    for same in (7 * gauss, gauss @ rotation, gauss[torch.randperm(1024, generator=generator)]):
        assert metrics(same)["effective_rank"] == pytest.approx(rank, abs=1e-3)
    assert metrics(gauss + 3)["effective_rank"] < rank - 10
    assert metrics(gauss + 3, center=True)["effective_rank"] == pytest.approx(rank, abs=1)
    assert metrics(torch.zeros(8, 4))["effective_rank"] == 1
    few = metrics(torch.randn(64, 512, generator=generator))["effective_rank"]
    assert 55 < few < 64
    many = torch.randn(3000, 16, generator=generator)
    assert metrics(many) == metrics(many[:2048])

    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert metrics(gauss.requires_grad_()) == healthy
    assert torch.equal(state, torch.get_rng_state()) and gauss.grad is None


@pytest.fixture
def log(folder):
    """log(values, bad, armed_after) logs a metric, bad at the steps where it has a problem -> the alarm."""

    def log(values, bad, armed_after=0, rank=0):
        shutil.rmtree("run", ignore_errors=True)
        args, heard = tiny_args("simclr", data=str(folder), run_dir="run"), []
        began = simclr.open_run(args, "simclr", {}, 40, None)
        began.rank = rank
        with simclr.guarded(began, len(values)):
            for step, (value, problem) in enumerate(zip(values, bad, strict=True), start=1):
                metrics = {"train/loss": 1.0, "x/level": value}
                problems = {"it is flat; raise it": "x/level"} if problem else {}
                simclr.log_metrics(began, step, metrics, problems, armed_after)
                heard.append(metrics["monitor/alarm"])
        return heard

    return log


def test_alarm_rings_after_three_and_clears_after_three(log, capsys):
    bad = [1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1]
    heard = log([0.5] * 21, bad, armed_after=2)
    assert heard == [0.0] * 4 + [1.0] * 12 + [0.0] * 4 + [1.0]
    said = capsys.readouterr().out
    assert said.count("COLLAPSE") == said.count("it is flat; raise it") == 2  # once each time
    assert "COLLAPSE at step 5" in said and "COLLAPSE at step 21" in said
    assert [line["monitor/alarm"] for line in metrics_of("run")] == heard


def test_a_level_that_rises_does_not_ring(log, capsys, generator):
    """R2 of a healthy MAE is below 0 in its first steps."""
    rising = [-1 + 0.9 * i / 11 for i in range(12)]
    assert not any(log(rising, [True] * 12)) and "COLLAPSE" not in capsys.readouterr().out
    noise = torch.randn(20, generator=generator).tolist()
    for level in (-0.1, 0.0, 0.5):
        assert log([level + 0.003 * x for x in noise], [True] * 20) == [0.0] * 2 + [1.0] * 18
        assert capsys.readouterr().out.count("COLLAPSE") == 1
    falling = log([1 - 0.05 * i for i in range(12)], [False] * 6 + [True] * 6)
    assert falling == [0.0] * 8 + [1.0] * 4


def test_process_0_alone_says_and_writes(log, capsys):
    assert log([0.5] * 4, [True] * 4, rank=1)[-1] == 1
    assert "COLLAPSE" not in capsys.readouterr().out
    assert not metrics_of("run") and not list(Path("run").glob("events*"))


# Each script with and without its safeguard


def random_targets(module, patch):
    targets = module.pixel_targets
    patch.setattr(module, "pixel_targets", lambda *a: (torch.randn_like(targets(*a)[0]), *targets(*a)[1:]))


def shuffled_captions(module, patch):
    texts = module.Pairs.texts
    patch.setattr(module.Pairs, "texts", lambda self, i: texts(self, i * 7919 % len(self.images.items)))


def one_code(module, patch):
    """A tokenizer that has one code for everything."""

    def forget(args, tokenizer, *_):
        nn.init.zeros_(tokenizer.encoder[-1].weight)

    patch.setattr(module, "train_tokenizer", forget)


def random_turns(module, patch):
    rotate, permute = module.rotate_batch, torch.randperm
    patch.setattr(module, "rotate_batch", lambda x: (rotate(x)[0], rotate(x)[1][permute(4 * len(x))]))


# For each safeguard the flags that remove it, or a control that spoils the task, and what the alarm says.
SAFEGUARDS = {
    "beit": [(one_code, "perplexity 1: one code is in use")],
    "byol": [({"predictor": False}, "projections"), ({"stop_gradient": False}, "projections")],
    "clip": [(shuffled_captions, "do captions fit")],
    "dino": [({"centering": False, "momentum": 0.9}, "one-hot"), ({"sharpening": False}, "uniform")],
    "dinov2": [({"centering": False, "momentum": 0.9}, "one-hot"), ({"sharpening": False}, "uniform")],
    "ijepa": [({"stop_gradient": False}, "hardly differ"), ({"momentum": 0.0}, "hardly differ")],
    "mae": [(random_targets, "no better than a mean")],
    "moco": [({"negatives": False}, "directions|one way")],
    # with its own momentum z falls from 85 directions to 7.6 in 150 steps
    "moco_v3": [({"negatives": False, "momentum": 0.0}, "by chance")],
    "pretext": [(random_turns, "no better than one answer to all")],
    "simclr": [({"negatives": False}, "directions|one way")],
}
# Of a few steps, on the demo with a small network, and on photos: what shows it soon. DINO's alarm is not
# armed while the prototypes are frozen.
THAWED = {"freeze_last_layer": 0, "local_crops": 0}
ON_DEMO = {
    "beit": {"min_block": 2, "lr": 3e-3, "dvae": "", "tokenizer_dim": 16, "tokenizer_epochs": 2},
    "byol": {"base_lr": 2.0, "momentum": 0.5},
    "clip": {"lr": 1e-3},
    "dino": THAWED | {"momentum": 0.99, "epochs": 4},  # with .9 it falls in spite of the centering
    "dinov2": THAWED | {"layer_scale": 1.0, "momentum": 0.9},
    "ijepa": {"lr": 1e-2, "image_size": 8, "patch_size": 2},
    "mae": {"base_lr": 0.1, "epochs": 4},
    "moco": {"base_lr": 0.7},
    "moco_v3": {"base_lr": 0.08},
    "pretext": {"base_lr": 0.2, "min_scale": 1.0, "epochs": 6, "batch_size": 64},
    "simclr": {"base_lr": 1.0},
}
ON_PHOTOS = {
    "beit": {"lr": 2e-3, "dvae": "", "epochs": 2, "tokenizer_dim": 32, "min_block": 4},  # to tell codes
    "byol": {"image_size": 16, "base_lr": 0.24, "momentum": 0.5, "weight_decay": 1e-4, "hidden_dim": 256},
    "clip": {"lr": 1e-3, "warmup_epochs": 0.4},  # before it tells captions better than by chance
    "dino": THAWED | {"patch_size": 16},
    "dinov2": THAWED | {"patch_size": 16},
}
SIZES = {"VITS": (64, 2, 2), "MOCO_VITS": (64, 2, 2), "TOWERS": (64, 2)}  # width, depth, heads
SIZES |= {"DECODERS": (32, 1, 2), "PREDICTORS": (32, 1)}
DEMO = [simclr.demo_image(index) for index in range(512)]


def small_resnet(arch, stem):
    layers = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 256


@pytest.fixture(params=["demo", pytest.param("photos", marks=pytest.mark.slow)])
def short(script, request, monkeypatch):
    """Flags of a run of 32 to 64 steps on the demo, or of 156 on photos."""
    if request.param == "photos":
        data = photos = request.getfixturevalue("photos")
        if script == "clip":
            files = sorted((photos / "train").rglob("*.jpg"))
            data = Path("photos.csv")
            data.write_text(
                "\n".join(["image,caption", *(f"{f},a photo of a {f.parent.name}" for f in files)])
            )
        flags = {"data": str(data), "epochs": 1, "batch_size": 64, "log_every": 3, "warmup_epochs": 0.1}
        return flags | ON_PHOTOS.get(script, {})

    module = importlib.import_module(script)
    small = {"resnet": small_resnet, "open_data": lambda data: DEMO, "retrieval": lambda *_: {}}
    small["demo_image"] = lambda index: DEMO[index % len(DEMO)]
    for name in small.keys() & vars(module).keys():
        monkeypatch.setattr(module, name, small[name])
    for name in SIZES.keys() & vars(module).keys():
        monkeypatch.setitem(getattr(module, name), "vit_nano", SIZES[name])
    flags = {"data": "demo", "epochs": 2, "batch_size": 32, "image_size": 16, "log_every": 2}
    return flags | {"warmup_epochs": 0.1} | ON_DEMO[script]


every_script = pytest.mark.parametrize("script", TRAINING)


@every_script
def test_a_removed_safeguard_rings_the_alarm(script, short, capsys, monkeypatch):
    module = importlib.import_module(script)
    for number, (removed, words) in enumerate(SAFEGUARDS[script]):
        flags = ({} if callable(removed) else removed) | short | {"run_dir": f"run{number}"}
        with monkeypatch.context() as patch:
            removed(module, patch) if callable(removed) else None
            module.train(tiny_args(script, **flags))
        lines = metrics_of(flags["run_dir"])
        said = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSE" in line]
        assert lines[-1]["monitor/alarm"] == 1 and len(said) == 1 and re.search(words, said[0]), said
        assert not any(line["monitor/alarm"] for line in lines if line["step"] <= 0.2 * lines[-1]["step"])


@every_script
def test_a_healthy_run_never_rings(script, short, capsys):
    importlib.import_module(script).train(tiny_args(script, **short, run_dir="run"))
    lines = metrics_of("run")
    assert not any(line["monitor/alarm"] for line in lines) and "COLLAPSE" not in capsys.readouterr().out
    assert sum(line["step"] > 0.2 * lines[-1]["step"] for line in lines) >= 5  # armed


@every_script
@pytest.mark.slow
def test_the_demo_never_rings(script):
    done = run([sys.executable, ROOT / f"{script}.py", "--run-dir", "run"], timeout=900)
    assert done.returncode == 0 and "COLLAPSE" not in done.stdout + done.stderr
    alarms = [line["monitor/alarm"] for line in metrics_of("run")]
    assert not any(alarms) and len(alarms) * 0.8 >= 5
