"""The contracts of DESIGN sections 3, 4, 8, 9 and 11, in tiny settings, on every training script.

Each run here is a call of train(args); test_hardening.py has disks, signals, kills and several processes.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from conftest import ROOT, TRAINING, at_each_step, caption_all, run, tiny_args
from PIL import Image, ImageFile

import clip
import eval_linear

COMMON = """
    data image_size arch epochs batch_size weight_decay warmup_epochs init workers device amp compile seed
    run_dir log_every save_minutes
"""
TAGS = """
    train/loss train/lr train/grad_norm perf/images_per_second
    monitor/feature_std monitor/effective_rank monitor/alarm
"""
ENCODERS = ("backbone", "encoder_q", "encoder_k", "encoder")
TEN = {"epochs": 2, "log_every": 2, "run_dir": "run"}  # ten steps, lines 1 2 4 6 8 10
pytestmark = pytest.mark.parametrize("script", TRAINING, scope="module")


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


@pytest.fixture
def finished(module, folder, whole):
    """Arguments of this run, now in `run`."""
    shutil.copytree(whole, "run")
    return tiny_args(module.__name__, data=str(folder), **TEN)


def metrics_of(folder):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith("perf/")} for line in lines]


def tensors_of(state, prefix=""):
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else ()
    items = enumerate(state) if isinstance(state, (list, tuple)) else items
    found = [tensors_of(value, f"{prefix}/{key}") for key, value in items]
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """The metrics and every tensor of checkpoint and backbone, bit for bit."""
    assert metrics_of(a) == metrics_of(b)
    for name in ("checkpoint.pt", "backbone.pt"):
        ours, theirs = (tensors_of(load(Path(folder) / name)) for folder in (a, b))
        assert len(ours) > 10 and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def copies_of(name, model):
    """Tensors of a model's state that backbone.pt has under this name: of its encoder and copies of it."""
    if "visual.proj" in model:  # clip.py: in the official names
        tower = {k.removeprefix("visual."): v for k, v in model.items() if k.startswith("visual.")}
        return [clip.in_timm_names(SimpleNamespace(state_dict=lambda: tower))[name]]
    names = tuple(f"{encoder}.{name}" for encoder in ENCODERS)
    return [tensor for ours, tensor in model.items() if ours == name or ours.endswith(names)]


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def without_events(files):
    return {path: data for path, data in files.items() if "events" not in path.name}


def stopped(module, args, match):
    """train() must end with SystemExit and one short line that matches; returns it."""
    with pytest.raises(SystemExit) as stop:
        module.train(args)
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message and len(message) < 400, message
    assert re.search(match, message), message
    return message


def refused(module, match, **flags):
    return stopped(module, tiny_args(module.__name__, **flags), match)


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


# Section 3: running


def test_flags_that_every_script_has(module):
    fields = {field.name: field for field in dataclasses.fields(module.Args)}
    assert set(COMMON.split()) < set(fields) and {"base_lr", "lr"} & set(fields)
    assert fields["data"].default == "demo" and fields["device"].default == fields["amp"].default == "auto"
    assert fields["run_dir"].default == "" and fields["save_minutes"].default == 10
    assert not {"restart", "checkpoint_every"} & set(fields)


def test_each_process_takes_its_slice_of_the_global_batch(module, folder):
    images = module.Images(tiny_args(module.__name__, data=str(folder)), (), 32)
    whole = list(images.batches(8, 0, 2, 0, 1))
    parts = [list(images.batches(8, 0, 2, rank, 2)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]
    assert len(whole) == 10 and all(len(batch) == 8 for batch in whole)
    assert whole[3:] == list(images.batches(8, 3, 2, 0, 1))
    assert whole[7:] == list(images.batches(8, 7, 2, 0, 1))
    assert list(images.batches(8, 10, 2, 0, 1)) == list(images.batches(8, 0, 0, 0, 1)) == []
    epochs = [sum(whole[:5], []), sum(whole[5:], [])]
    assert sorted(epochs[0]) == list(range(40)) and sorted(epochs[1]) == list(range(40, 80))
    assert [key - 40 for key in epochs[1]] != epochs[0]


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.shared)])
def test_amp_on_the_cpu(module, folder, amp):
    flags = {"epochs": 1, "device": "cpu", "run_dir": "run"}
    metrics = module.train(tiny_args(module.__name__, data=str(folder), amp=amp, **flags))
    assert all(math.isfinite(value) for value in metrics.values())
    state = load("run/backbone.pt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}


def test_no_epochs_write_the_untrained_backbone(module, folder, monkeypatch):
    """It is what a training of the same seed starts from."""
    assert module.train(tiny_args(module.__name__, data=str(folder), epochs=0, run_dir="run")) == {}
    weights = load("run/backbone.pt")["state_dict"]
    assert load("run/checkpoint.pt")["step"] == 0 and metrics_of("run") == []
    before = without_events(snapshot("run"))
    assert module.train(tiny_args(module.__name__, data=str(folder), epochs=0, run_dir="run")) == {}
    assert without_events(snapshot("run")) == before

    starts, open_run = [], module.open_run

    def spy(args, method, parts, *rest):
        starts.append({name: tensor.clone() for name, tensor in parts["model"].state_dict().items()})
        return open_run(args, method, parts, *rest)

    monkeypatch.setattr(module, "open_run", spy)
    for seed in (0, 1):
        flags = {"data": str(folder), "batch_size": 40, "epochs": 1, "seed": seed}
        module.train(tiny_args(module.__name__, **flags, run_dir=f"seed{seed}"))
    for seed, start in enumerate(starts):
        same = [torch.equal(copies_of(name, start)[0], weights[name]) for name in weights]
        assert all(same) == (seed == 0)


AHEAD = ("ijepa",)  # their schedules count steps from 1, as the official code, and end with the last step


def test_a_warm_up_longer_than_the_run_is_cut_to_it(module, folder):
    """Three steps: from 0 in a line that would reach the peak in the fourth, of BEiT and DINOs in the third;
    or AHEAD, to the peak in two and then at the lowest rate."""
    rates = []
    for warmup in (1.0, 2.0):
        flags = {"epochs": 1, "batch_size": 13, "warmup_epochs": warmup, "run_dir": f"run{warmup}"}
        args = tiny_args(module.__name__, data=str(folder), **flags)
        module.train(args)
        rates.append([line["train/lr"] for line in metrics_of(args.run_dir)])
    peak = args.base_lr * 13 / 256 if hasattr(args, "base_lr") else args.lr
    if module.__name__ in AHEAD:
        assert rates[0] == rates[1] == pytest.approx([peak / 2, peak, rates[1][-1]])
    else:
        rise = peak / (2 if module.__name__ in ("beit", "dino", "dinov2") else 3)
        assert rates[0] == rates[1] == pytest.approx([0, rise, 2 * rise])


@pytest.mark.shared
def test_a_schedule_that_is_all_warm_up_ends_at_its_base(module):
    assert [module.cosine_schedule(step, 2, 2, 1.0) for step in range(3)] == [0, 0.5, 1]


@pytest.mark.shared
def test_a_world_without_ranks_is_refused(module, folder, tmp_path, monkeypatch):
    """As under a scheduler that sets this variable alone."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(module, "WORLD_SIZE is 2, without RANK.*torchrun", data=str(folder), run_dir="run")
    assert not list(tmp_path.iterdir())


@pytest.mark.shared
def test_a_batch_is_shared_evenly_or_refused(module):
    def check(batch_size, world, micro=0):
        args = SimpleNamespace(batch_size=batch_size, micro_batch_size=micro, data="photos")
        return module.images_per_pass(args, 40, world)

    assert check(8, 1) == 8 and check(8, 2) == 4 and check(8, 1, 2) == 2 and check(8, 2, 4) == 4
    assert check(40, 1) == 40
    with pytest.raises(SystemExit, match=r"^--batch-size 8: give a multiple of 3, from \d+ to \d+, the"):
        check(8, 3)
    for wrong in (0, 1, 41):
        with pytest.raises(SystemExit, match=f"^--batch-size {wrong}: .*2 to 40, the images in photos$"):
            check(wrong, 1)
    with pytest.raises(SystemExit, match="^--batch-size 4: give a multiple of 4, from 8 to 40, the images"):
        check(4, 4)  # BatchNorm1d of one row
    for world, micro, sizes in ((1, 3, "1, 2, 4, 8"), (2, 8, "1, 2, 4"), (1, 16, "1, 2, 4, 8")):
        with pytest.raises(SystemExit, match=rf"^--micro-batch-size {micro}: .*\[{sizes}\]$"):
            check(8, world, micro)


# Section 4: data


@pytest.mark.shared
def test_demo_images_are_a_small_balanced_world(module):
    images, labels = zip(*(module.demo_image(index) for index in range(400)), strict=True)
    assert all(image.size == (48, 48) and image.mode == "RGB" for image in images)
    assert set(labels) == set(range(10)) and max(Counter(labels).values()) < 70
    again = module.demo_image(7)
    assert again[0].tobytes() == images[7].tobytes() and again[1] == labels[7]
    assert len({image.tobytes() for image in images}) == 400


def difficult_files(root):
    """One file of each kind that a camera or a scanner makes, and files that no decoder reads."""
    rng = random.Random(0)
    blocks = Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3))
    photo = blocks.resize((64, 48), Image.BICUBIC)
    (root / "plain").mkdir(parents=True)
    for i in range(24):
        photo.rotate(15 * i).save(root / f"plain/{i:02d}.JPG")
    root = root / "odd"
    root.mkdir()
    upright = Image.new("RGB", (48, 64), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 48, 32))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright.transpose(Image.ROTATE_90).save(root / "exif.jpg", exif=exif, quality=95)
    upright.convert("L").transpose(Image.ROTATE_90).save(root / "exif.tif", exif=exif)
    ramp = torch.linspace(0, 65535, 64).round().to(torch.int32).repeat(48, 1)
    Image.fromarray(ramp.numpy().astype("uint16")).save(root / "sixteen.png")
    Image.fromarray(ramp.numpy().astype("uint16")).save(root / "sixteen.tiff")
    big_endian = Image.frombytes("I;16B", (64, 48), ramp.numpy().astype(">u2").tobytes())
    big_endian.save(root / "sixteen_b.tiff")
    photo.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    photo.convert("P").save(root / "palette.png")
    photo.convert("RGBA").save(root / "rgba.webp", lossless=True)
    photo.convert("L").save(root / "gray.bmp")
    photo.convert("1").save(root / "bits.png")
    blocks.resize((4000, 3000), Image.BICUBIC).save(root / "large.jpeg", quality=90)
    (root / "truncated.jpg").write_bytes((root / "large.jpeg").read_bytes()[:20000])
    (root / "zero.jpg").write_bytes(b"")
    (root / "text.png").write_text("I am no image")
    (root / "notes.txt").write_text("I am ignored")
    caption_all(root.parent)
    return photo


@pytest.mark.shared
def test_difficult_files_train_and_bad_ones_are_named(module, tmp_path, capsys):
    """Each once, however often it is met: two batches of 19 hold all 38, in two epochs."""
    difficult_files(tmp_path / "files")
    module.train(tiny_args(module.__name__, data="files", epochs=2, batch_size=19, run_dir="run"))
    out, err = capsys.readouterr()
    assert out.startswith("38 images in files. Run folder run, step 0\n")
    said = [line.rpartition("\r")[2] for line in err.split("\n") if "cannot be read" in line]
    named = [re.match(r"files/odd/(\S+) cannot be read, the next takes its place", text) for text in said]
    assert sorted(match[1] for match in named) == ["text.png", "truncated.jpg", "zero.jpg"]


@pytest.mark.shared
def test_good_files_are_read_right(module, tmp_path):
    photo = difficult_files(tmp_path / "files")
    tensor = torchvision.transforms.functional.pil_to_tensor

    def read(name):
        image = module.read_image(f"files/odd/{name}", 32)
        assert image.mode == "RGB"
        return tensor(image).float()

    expected, gray = tensor(photo).float(), tensor(photo.convert("L")).float()
    for name, tolerance in (("cmyk.jpg", 12), ("palette.png", 25), ("rgba.webp", 0.5)):
        assert (read(name) - expected).abs().mean() < tolerance, name
    assert (read("gray.bmp") - gray).abs().max() == 0
    upright = read("exif.jpg")
    assert upright.shape == (3, 64, 48) and upright[0, :28].mean() > 240 and upright[2, 36:].mean() > 240
    gray = read("exif.tif")  # raw, which Pillow would map into memory
    assert gray.shape == (3, 64, 48) and gray[:, :32].mean() == 76 and gray[:, 32:].mean() == 29
    for name in ("sixteen.png", "sixteen.tiff", "sixteen_b.tiff"):
        ramp = read(name)[0, 0]
        torch.testing.assert_close(ramp, torch.linspace(0, 255, 64), atol=1.1, rtol=0)


@pytest.mark.shared
def test_large_jpegs_decode_small_but_not_too_small(module, folder, monkeypatch):
    """At 1/2, 1/4 or 1/8 only if the smallest crop (area min_scale, aspect 3/4) keeps image_size pixels."""
    asked, images = [], module.Images
    monkeypatch.setattr(module, "Images", lambda *given: asked.append(given[2]) or images(*given))
    for size, scale in ((32, 0.08), (64, 0.5)):
        flags = {"image_size": size, "min_scale": scale, "run_dir": f"run{size}"}
        module.train(tiny_args(module.__name__, data=str(folder), epochs=0, **flags))
    assert asked == pytest.approx([32 / 0.06**0.5, 64 / 0.375**0.5])

    Image.new("RGB", (4000, 3000)).save("large.jpg")
    for size, scale, reduction in ((224, 0.08, 2), (224, 0.2, 4), (32, 0.2, 8), (32, 1.0, 8), (600, 0.08, 1)):
        shortest = size / math.sqrt(0.75 * scale)
        width, height = module.read_image("large.jpg", shortest).size
        assert (width, height) == (4000 // reduction, 3000 // reduction)
        assert math.sqrt(0.75 * scale * width * height) >= size and min(width, height) >= shortest
        if reduction < 8:
            assert min(width, height) / 2 < shortest
    Image.new("RGB", (8000, 500)).save("panorama.jpg")
    assert module.read_image("panorama.jpg", 250).size == (4000, 250)
    assert module.read_image("panorama.jpg", 250.1).size == (8000, 500)
    Image.new("RGB", (100, 60)).save("small.jpg")
    assert module.read_image("small.jpg", 915).size == (100, 60)


@pytest.mark.shared
def test_train_folder_is_preferred_and_any_layout_is_found(module, folder, tmp_path):
    for name in ("train/x/1.png", "train/2.PNG", "val/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name)
    for data, count in (("set", 2), ("set/val", 1), (str(folder), 40)):
        assert len(module.Images(tiny_args(module.__name__, data=data), (), 32).items) == count


@pytest.mark.shared
def test_crops_depend_on_seed_epoch_and_index_alone(module, folder):
    crop = torchvision.transforms.v2.RandomResizedCrop(16)
    args = tiny_args(module.__name__, data=str(folder))
    images = module.Images(args, (crop, crop), 16)
    first, second, index = images[3]
    torch.manual_seed(99)
    assert index == images[43][2] == 3 and not torch.equal(first, second)
    assert torch.equal(images[3][0], first) and torch.equal(images[3][1], second)
    assert not torch.equal(images[43][0], first)  # the next epoch
    other = module.Images(dataclasses.replace(args, seed=1), (crop,), 16)
    assert not torch.equal(other[3][0], first)


@pytest.mark.shared
def test_a_hundred_bad_files_in_a_row_are_an_error(module, tmp_path):
    """test_hardening.py has them in a worker."""
    for i in range(110):
        (tmp_path / f"bad/{i // 60}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"bad/{i // 60}/{i:03d}.jpg").write_text("no image")
    caption_all(tmp_path / "bad")
    refused(module, r"100 files in a row cannot be read, the last is bad/\d/\d+.jpg", data="bad")


@pytest.mark.shared
def test_data_sets_of_torchvision(module, monkeypatch, capsys):
    class Set(list):
        classes, targets = ["fox", "owl"], [0, 1] * 8

        def __init__(self, items, download=True, train=True):
            super().__init__(pictures)

    pictures = [(Image.new("L", (20, 20), 10 * i), i % 2) for i in range(16)]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Set)
    args = tiny_args(module.__name__, data="CIFAR10", epochs=1, run_dir="run")
    if module.__name__ == "clip":  # these have no captions
        stopped(module, args, "^--data CIFAR10/captions.csv: .*needs columns")
        return
    assert math.isfinite(module.train(args)["train/loss"])

    class Damaged(list):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("broken picture")
            return super().__getitem__(index)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: Damaged(pictures))
    assert module.Images(args, (), 32)[3] == (4,)
    assert "CIFAR10[3] cannot be read" in capsys.readouterr().err

    def offline(root, download):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    refused(module, "^--data CIFAR10: .*network is unreachable.*folder.*demo$", data="CIFAR10")


@pytest.mark.shared
def test_workers_change_nothing(module, folder, whole):
    torch.manual_seed(99)  # whatever was drawn before
    module.train(tiny_args(module.__name__, data=str(folder), workers=4, **TEN))
    assert_same_run("run", whole)


def loader_of(module, monkeypatch, **flags):
    """What train() gives to its DataLoader."""
    seen = []

    def loader(data, *_, **__):
        seen.append(data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(module, "DataLoader", loader)
        module.train(tiny_args(module.__name__, **flags))
    return seen[0]


def test_images_survive_the_way_to_a_spawned_worker(module, folder, monkeypatch):
    """Where workers are spawned (macOS, Windows) the data set is pickled; the copy draws the same crops."""
    data = loader_of(module, monkeypatch, data=str(folder), epochs=1, run_dir="run")
    copied = pickle.loads(pickle.dumps(data))
    ours, theirs = (torch.utils.data.default_collate([images[3], images[41]]) for images in (data, copied))
    flat = [torch.utils._pytree.tree_leaves(items) for items in (ours, theirs)]
    assert len(flat[0]) > 1 and all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


# Section 8: the run folder


def test_run_folder(module, folder, capsys):
    args = tiny_args(module.__name__, data=str(folder), epochs=2, run_dir="run")
    metrics = module.train(args)
    words = last_line(capsys)
    run = Path("run")
    names = {path.name for path in run.iterdir()}
    assert {"args.json", "metrics.jsonl", "checkpoint.pt", "backbone.pt"} < names
    assert any(name.startswith("events.out") for name in names)
    assert any(name.endswith(".png") for name in names) and not any(name.endswith(".tmp") for name in names)

    held = json.loads((run / "args.json").read_text())
    free = {"workers", "device", "compile", "run_dir", "log_every", "save_minutes"}
    flags = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    facts = {"method": module.__name__, "images": 40, "autocast": "None", "torch": torch.__version__}
    assert held == json.loads(json.dumps(flags)) | facts

    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["epoch"] for line in lines] == [0] * 5 + [1] * 5
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(TAGS.split()) < set(last) and metrics.items() <= last.items()
    assert any(tag.startswith(f"{module.__name__}/") for tag in last)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run)).Reload()
    assert set(board.Tags()["scalars"]) == set(last) - {"step", "epoch"}
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 11))

    checkpoint = load(run / "checkpoint.pt")
    assert checkpoint["method"] == module.__name__ and checkpoint["step"] == 10

    # The last line has the three or four numbers that matter; the same command again prints it, and no more.
    numbers = re.fullmatch(r"run/backbone\.pt: ((?:\w+ [-+.e\d]+(?:, |$)){3,4})", words)[1].split(", ")
    values = {tag.split("/")[1]: f"{value:.4g}" for tag, value in metrics.items()}
    assert all(values[number.split()[0]] == number.split()[1] for number in numbers)
    before, times = without_events(snapshot(run)), (run / "checkpoint.pt").stat().st_mtime_ns
    assert module.train(args) == metrics and last_line(capsys) == words
    assert without_events(snapshot(run)) == before and (run / "checkpoint.pt").stat().st_mtime_ns == times


def test_backbone_loads_where_it_was_built(module, whole):
    """Strictly, in the library that its builder names; and eval_linear.py takes it."""
    saved = load(whole / "backbone.pt")
    facts = "method arch builder arch_args image_size mean std feature_dim state_dict"
    assert set(saved) == set(facts.split())
    args = tiny_args(module.__name__)
    assert (saved["method"], saved["arch"], saved["image_size"]) == (module.__name__, args.arch, 32)
    assert tuple(saved["mean"]) == module.MEAN and tuple(saved["std"]) == module.STD
    assert not any(tensor.requires_grad for tensor in saved["state_dict"].values())
    library, _, name = saved["builder"].partition(".")
    assert library in ("torchvision", "timm")
    if library == "torchvision":
        assert name == "resnet" and saved["arch_args"] == {"arch": args.arch, "stem": args.stem}
        net = getattr(torchvision.models, args.arch)()
        dim, net.fc = net.fc.in_features, torch.nn.Identity()
        net.load_state_dict(saved["state_dict"], strict=True)
        assert saved["feature_dim"] == dim
    else:
        shape = dict(saved["arch_args"])
        eps = shape.pop("norm_eps", 1e-6)  # timm takes it as a class
        net = getattr(timm.models, name)(**shape, norm_layer=partial(torch.nn.LayerNorm, eps=eps))
        net.load_state_dict(saved["state_dict"], strict=True)
        assert saved["feature_dim"] == net.num_features and saved["arch_args"]["num_classes"] == 0

    backbone = eval_linear.load_backbone(str(whole / "backbone.pt")).eval()
    features = backbone(torch.rand(2, 3, 32, 32) * 255)
    assert features.shape == (2, saved["feature_dim"]) and torch.isfinite(features).all()


@pytest.mark.shared
def test_name_of_the_run_folder(module, folder):
    script = module.__name__
    args = tiny_args(script, data=str(folder))

    def name(**flags):
        return module.open_run(dataclasses.replace(args, **flags), script, {}, 40, None).folder.as_posix()

    assert module.open_run(module.Args(), script, {}, 40, None).folder.as_posix() == f"runs/{script}"
    assert re.fullmatch(rf"runs/{script}-[0-9a-f]{{8}}", name())
    assert len({name(), name(seed=1), name(epochs=9), name(epochs=10)}) == 4
    assert name() == name(workers=3, device="cpu", log_every=7, save_minutes=3.0, compile=True)
    assert name(run_dir="elsewhere/x") == "elsewhere/x"


@pytest.mark.shared
def test_photos_with_a_slash_are_the_same_photos(module, folder, capsys):
    os.symlink(folder, "photos")
    ends = []
    for step, data in ((0, "photos"), (5, "photos/"), (5, "./photos")):
        module.train(tiny_args(module.__name__, data=data, epochs=1))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith(f", step {step}")
        ends.append(lines[-1])
    assert len({*ends}) == len(list(Path("runs").iterdir())) == 1


@pytest.mark.shared
def test_a_folder_of_another_run_is_refused(module, finished):
    before = snapshot("run")
    other = dataclasses.replace(finished, seed=5, weight_decay=0.5)
    message = stopped(module, other, "^run holds a run with .*to begin anew delete run, or give .*--run-dir")
    assert "seed 0, not 5" in message and f"weight_decay {finished.weight_decay}, not 0.5" in message
    assert "epochs" not in message and "--init" not in message
    assert snapshot("run") == before


@pytest.mark.shared
def test_more_epochs_are_another_run(module, finished):
    before = snapshot("run")
    message = stopped(module, dataclasses.replace(finished, epochs=3), "holds a run with epochs 2, not 3: ")
    assert "delete run" in message and "--init run/backbone.pt" in message
    assert snapshot("run") == before


@pytest.mark.shared
def test_more_photos_are_another_run(module, folder, finished, tmp_path):
    """40 of them, in a folder whose run is finished: it does not train on at the end of its schedule."""
    shutil.copytree(folder, tmp_path / "photos")
    args = dataclasses.replace(finished, data="photos", run_dir="mine")
    module.train(args)
    before = snapshot("mine")
    shutil.copytree(folder, tmp_path / "photos/more")
    caption_all(tmp_path / "photos")
    message = stopped(module, args, "^mine holds a run with images 40, not 80: ")
    assert "delete mine" in message and "--init mine/backbone.pt" in message
    assert snapshot("mine") == before


@pytest.mark.shared
def test_what_auto_became_defines_the_run(module, finished, monkeypatch):
    """The same command on another machine, where --amp auto becomes bfloat16."""
    before = snapshot("run")
    became = (0, 1, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(module, "start_processes", lambda *flags: became)
    stopped(module, finished, "autocast None, not torch.bfloat16")
    assert snapshot("run") == before


def saved_steps(module, monkeypatch, clock, **flags):
    """Steps at which a run of ten steps writes its checkpoint; clock(step) in minutes is what it sees."""
    steps, now = [], [0.0]
    save = module.save_checkpoint

    def tick(step):
        now[0] = max(now[0], 60.0 * clock(step + 1))

    def saved(path, **state):
        if Path(path).name == "checkpoint.pt":
            steps.append(state["step"])
        save(path, **state)

    def monotonic():
        now[0] += 1e-3
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
        at_each_step(module, patch, tick)
        patch.setattr(module, "save_checkpoint", saved)
        module.train(tiny_args(module.__name__, **flags))
    return steps


@pytest.mark.shared
@pytest.mark.parametrize(
    "minutes, clock, steps",
    [
        (0.0, lambda step: 0, [1, 2, 4, 6, 8, 10]),  # at each log step
        (10.0, lambda step: 0.1 * step, [10]),
        (10.0, lambda step: 3 * step, [4, 8, 10]),  # at 12 min, the first log step 10 later; again 10 later
    ],
)
def test_checkpoints_come_by_the_clock(module, folder, monkeypatch, minutes, clock, steps):
    flags = {"data": str(folder), "save_minutes": minutes, **TEN}
    assert saved_steps(module, monkeypatch, clock, **flags) == steps


# Section 9: collapse


@pytest.fixture
def log(module, folder):
    """log(values, bad, armed_after) logs a metric, bad at the steps where it has a problem -> the alarm."""

    def log(values, bad, armed_after=0, rank=0):
        args = tiny_args(module.__name__, data=str(folder), run_dir="run")
        run = module.open_run(args, module.__name__, {}, 40, None)
        run.rank, heard = rank, []
        with module.guarded(run, len(values)):
            for step, (value, problem) in enumerate(zip(values, bad, strict=True), start=1):
                metrics = {"train/loss": 1.0, "x/level": value}
                problems = {"it is flat; raise it": "x/level"} if problem else {}
                module.log_metrics(run, step, metrics, problems, armed_after)
                heard.append(metrics["monitor/alarm"])
        return heard

    return log


@pytest.mark.shared
def test_alarm_rings_after_three_and_clears_after_three(log, capsys):
    bad = [1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1]
    heard = log([0.5] * 21, bad, armed_after=2)
    assert heard == [0.0] * 4 + [1.0] * 12 + [0.0] * 4 + [1.0]
    said = capsys.readouterr().out
    assert said.count("COLLAPSE") == said.count("it is flat; raise it") == 2  # once each time
    assert "COLLAPSE at step 5" in said and "COLLAPSE at step 21" in said
    assert [line["monitor/alarm"] for line in metrics_of("run")] == heard


@pytest.mark.shared
def test_a_level_that_rises_does_not_ring(log, capsys):
    """R2 of a healthy MAE is below 0 in its first steps."""
    rising = [-1 + 0.9 * i / 11 for i in range(12)]
    assert not any(log(rising, [True] * 12)) and "COLLAPSE" not in capsys.readouterr().out
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    for level in (-0.1, 0.0, 0.5):
        shutil.rmtree("run")
        assert log([level + 0.003 * x for x in noise], [True] * 20) == [0.0] * 2 + [1.0] * 18
        assert capsys.readouterr().out.count("COLLAPSE") == 1
    shutil.rmtree("run")
    falling = log([1 - 0.05 * i for i in range(12)], [False] * 6 + [True] * 6)
    assert falling == [0.0] * 8 + [1.0] * 4


@pytest.mark.shared
def test_process_0_alone_says_and_writes(log, capsys):
    assert log([0.5] * 4, [True] * 4, rank=1)[-1] == 1
    assert "COLLAPSE" not in capsys.readouterr().out
    assert not metrics_of("run") and not list(Path("run").glob("events*"))


@pytest.mark.shared
def test_monitor_oracles(module):
    """methods/collapse.md, section 6."""
    metrics = module.collapse_metrics
    generator = torch.Generator().manual_seed(0)
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
    unit = torch.nn.functional.normalize(gauss + 1, dim=1)
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
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert metrics(gauss.requires_grad_()) == healthy
    assert torch.equal(state, torch.get_rng_state()) and gauss.grad is None


def random_targets(module, monkeypatch):
    targets = module.pixel_targets
    monkeypatch.setattr(
        module, "pixel_targets", lambda *a: (torch.randn_like(targets(*a)[0]), *targets(*a)[1:])
    )


def shuffled_captions(module, monkeypatch):
    texts = module.Pairs.texts
    monkeypatch.setattr(module.Pairs, "texts", lambda self, i: texts(self, i * 7919 % len(self.images.items)))


def one_code(module, monkeypatch):
    """A tokenizer that has one code for everything."""

    def constant(args, tokenizer, *_):
        torch.nn.init.zeros_(tokenizer.encoder[-1].weight)

    monkeypatch.setattr(module, "train_tokenizer", constant)


def random_turns(module, monkeypatch):
    def shuffled(images):
        turned, labels = rotate_batch(images)
        return turned, labels[torch.randperm(len(labels))]

    rotate_batch = module.rotate_batch
    monkeypatch.setattr(module, "rotate_batch", shuffled)


# For each safeguard the flags that remove it, or a control f(module, monkeypatch) that spoils the task, and
# what the alarm says; half an epoch of small demo images is enough to see it.
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
    "moco_v3": [({"negatives": False, "momentum": 0.0}, "directions|by chance")],
    "pretext": [(random_turns, "no better than one answer to all")],
    "simclr": [({"negatives": False}, "directions|one way")],
}
SHORT = {
    "data": "demo",
    "epochs": 1,
    "batch_size": 64,
    "log_every": 2,
    "warmup_epochs": 0.1,
    "run_dir": "run",
}
FASTER = {
    "beit": {"image_size": 16, "min_block": 2, "lr": 2e-3, "dvae": ""},
    # finds the constant in 32 steps, where a healthy run keeps 22 directions
    "byol": {"image_size": 16, "base_lr": 0.24, "momentum": 0.5, "weight_decay": 1e-4, "hidden_dim": 256},
    "clip": {"image_size": 16, "context_length": 40},
    # the alarm is not armed while the prototypes are frozen; large patches take less time
    "dino": {"freeze_last_layer": 0, "patch_size": 16, "local_crops": 0},
    "dinov2": {"freeze_last_layer": 0, "patch_size": 16, "local_crops": 0},
    "mae": {"base_lr": 6e-3, "log_every": 1},
    "moco": {"base_lr": 0.06},
    "moco_v3": {"patch_size": 16},
    "pretext": {"base_lr": 0.06, "image_size": 24, "min_scale": 1.0, "log_every": 1},
    "simclr": {"image_size": 16},
}
ON_PHOTOS = {
    "beit": {"lr": 2e-3, "dvae": "", "epochs": 2, "tokenizer_dim": 32, "min_block": 4},  # to tell codes
    "byol": FASTER["byol"],
    "clip": {"lr": 1e-3, "warmup_epochs": 0.4},  # before it tells captions better than by chance
    "dino": FASTER["dino"],
    "dinov2": FASTER["dinov2"],
}


@pytest.fixture(params=["demo", pytest.param("photos", marks=pytest.mark.slow)])
def short(module, request, monkeypatch):
    """Flags of a run of 32 steps on the demo, or of 156 on photos."""
    if request.param == "photos":
        data = photos = request.getfixturevalue("photos")
        if module.__name__ == "clip":
            files = sorted((photos / "train").rglob("*.jpg"))
            rows = [f"{file},a photo of a {file.parent.name}" for file in files]
            data = Path("photos.csv")
            data.write_text("\n".join(["image,caption", *rows]))
        flags = SHORT | {"data": str(data), "log_every": 3}
        return flags | ON_PHOTOS.get(module.__name__, {})

    class Half(module.Images):
        def __init__(self, *given):
            super().__init__(*given)
            self.items = self.items[:2048]

    monkeypatch.setattr(module, "Images", Half)
    return SHORT | FASTER.get(module.__name__, {})


def test_a_removed_safeguard_rings_the_alarm(module, short, capsys, monkeypatch):
    assert SAFEGUARDS[module.__name__]
    for number, (flags, words) in enumerate(SAFEGUARDS[module.__name__]):
        with monkeypatch.context() as patch:
            if callable(flags):
                flags(module, patch)
                flags = {}
            flags = short | flags | {"run_dir": f"run{number}"}
            module.train(tiny_args(module.__name__, **flags))
        lines = metrics_of(flags["run_dir"])
        said = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSE" in line]
        assert lines[-1]["monitor/alarm"] == 1 and len(said) == 1 and re.search(words, said[0]), said
        assert not any(line["monitor/alarm"] for line in lines if line["step"] <= 0.2 * lines[-1]["step"])


@pytest.mark.shared  # of the others in make test-all, for its time
def test_a_healthy_run_never_rings(module, short, capsys):
    module.train(tiny_args(module.__name__, **short))
    lines = metrics_of("run")
    assert not any(line["monitor/alarm"] for line in lines) and "COLLAPSE" not in capsys.readouterr().out
    assert sum(line["step"] > 0.2 * lines[-1]["step"] for line in lines) >= 5  # armed


@pytest.mark.slow
def test_the_demo_never_rings(script, tmp_path):
    done = run([sys.executable, ROOT / f"{script}.py", "--run-dir", "run"], timeout=900)
    assert done.returncode == 0 and "COLLAPSE" not in done.stdout + done.stderr
    alarms = [line["monitor/alarm"] for line in metrics_of("run")]
    assert not any(alarms) and len(alarms) * 0.8 >= 5


# Section 11: bad input


BAD_VALUES = """
    epochs=-1 batch_size=0 image_size=-1 weight_decay=-0.1 weight_decay=inf warmup_epochs=-1. workers=-1
    log_every=0 save_minutes=-1. micro_batch_size=-1 seed=-1 temperature=-1. temperature=0. min_scale=0.
    min_scale=1.5 blur=2. base_lr=nan base_lr=0. base_lr=inf lr=nan lr=0.
"""


def test_wrong_values_say_what_is_allowed(module, tmp_path):
    fields = {field.name for field in dataclasses.fields(module.Args)}
    wrong = [item.split("=") for item in BAD_VALUES.split() if item.split("=")[0] in fields]
    assert len(wrong) >= 10
    for name, text in wrong:
        value = float(text) if re.search("[.a-z]", text) else int(text)
        allowed = rf"^--{name.replace('_', '-')} {value}: must be (above|at least) 0 and at most \d+$"
        refused(module, allowed, **{name: value})
    assert not list(tmp_path.iterdir())


def test_bad_data(module, folder, tmp_path):
    refused(module, r"^--data nowhere: no such folder, no download .*folder, or demo", data="nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("nothing here")
    refused(module, r"^--data empty: no images found", data="empty")
    (tmp_path / "file").write_text("")
    words = "^file: .*exists: 'file': .*give another --run-dir"
    refused(module, words, data=str(folder), run_dir="file")
    assert (tmp_path / "file").read_text() == ""
    (tmp_path / "file").unlink()
    words = r"--batch-size 64: give a multiple of \d+, from \d+ to 40, the images in "
    refused(module, words, data=str(folder), batch_size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.shared
def test_more_processes_than_gpus_say_so(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="no GPU for process 2 of this machine"):
        module.start_processes("auto", "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda_where_it_is_asked_for(module, tmp_path):
    refused(module, "^--device cuda: .*--device cpu", device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.shared
def test_damaged_and_foreign_checkpoints(module, finished):
    path = Path("run/checkpoint.pt")
    whole, state = path.read_bytes(), load(path)
    tensors = state["model"]
    tensor = next(name for name in tensors if tensors[name].ndim > 1 and len(tensors[name]) > 1)
    others = {
        "a tensor": torch.ones(3),
        "foreign": {"method": "another", "step": 3},
        "no optimizer": {name: value for name, value in state.items() if name != "optimizer"},
        "a part less": state | {"model": {name: tensors[name] for name in tensors if name != tensor}},
        "a part more": state | {"model": tensors | {"layer9.weight": torch.ones(1)}},  # what a repair leaves
        "another shape": state | {"model": tensors | {tensor: tensors[tensor][:1]}},
    }
    damages = [whole[: len(whole) // 2], whole[:-100], b"", b"no checkpoint", *others.values()]
    for damage in damages:
        path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
        before = snapshot("run")
        stopped(module, finished, r"^run.*checkpoint\.pt.* delete run, or give another --run-dir$")
        assert snapshot("run") == before
    path.write_bytes(whole)
    assert module.train(finished)  # nothing else had been touched


@pytest.mark.shared
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_args_json_says_so(module, folder, text):
    Path("run").mkdir()
    Path("run/args.json").write_bytes(text)
    refused(
        module, r"^run.*args\.json.* delete run, or give another --run-dir$", data=str(folder), run_dir="run"
    )
    assert Path("run/args.json").read_bytes() == text and len(list(Path("run").iterdir())) == 1


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("black", [range(40), range(16, 24)])
def test_black_images_do_no_silent_harm(module, folder, tmp_path, black, log_every):
    """All of them, or the third batch: the run stops and names step and cause, or trains on as ever."""
    shutil.copytree(folder, tmp_path / "photos")
    args = tiny_args(module.__name__, data="photos", epochs=2, log_every=log_every, run_dir="run")
    images = module.Images(args, (), 32)
    keys = sum(images.batches(8, 0, 1, 0, 1), [])
    for i in black:
        Image.new("RGB", (40, 36)).save(images.items[keys[i]])
    try:
        module.train(args)
    except SystemExit as stop:
        assert re.match(r"step \d+: loss \S+, gradient \S+; .*black", stop.code), stop.code
        assert not Path("run/checkpoint.pt").exists()
    else:
        tensors = [tensor for tensor in tensors_of(load("run/checkpoint.pt")).values() if tensor.ndim]
        assert len(tensors) > 20 and all(tensor.abs().max() < 1e6 for tensor in tensors)


@pytest.mark.shared
def test_save_is_complete_or_not_at_all(module, tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
        patch.setattr(os, "replace", lambda old, new: calls.append("replace") or replace(old, new))
        module.save_checkpoint("a.pt", method="x", tensor=torch.ones(3))
    assert calls == ["fsync", "replace"]  # or a power cut may leave an empty file under the new name
    module.save_checkpoint(tmp_path / "b.pt", method="x")

    def fail(state, file):
        Path(file.name if hasattr(file, "write") else file).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(torch, "save", fail)
        module.save_checkpoint("a.pt", method="x", tensor=torch.zeros(3))
    assert load("a.pt")["tensor"].sum() == 3 and load("b.pt") == {"method": "x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --init


@pytest.mark.shared
def test_starts_from_a_backbone(module, folder, whole):
    """All of the encoder is that of the file, in every copy that the method keeps of it."""
    path = whole / "backbone.pt"
    flags = {"data": str(folder), "seed": 1, "init": str(path)}
    module.train(tiny_args(module.__name__, **flags, epochs=0, run_dir="run"))
    saved, written = load(path)["state_dict"], load("run/backbone.pt")["state_dict"]
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    assert json.loads(Path("run/args.json").read_text())["init"] == str(path)

    model = load("run/checkpoint.pt")["model"]
    for name, tensor in saved.items():
        copies = copies_of(name, model)
        assert copies and all(torch.equal(copy, tensor) for copy in copies), name


def test_a_start_that_does_not_match_is_refused(module, folder, whole):
    saved = load(whole / "backbone.pt")
    state = saved["state_dict"]
    name = next(name for name in state if name.endswith(".weight"))
    more, less = state | {"layer9.weight": torch.ones(1)}, {k: v for k, v in state.items() if k != name}
    other = {k: v[..., :-1] if k == name else v for k, v in state.items()}
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="c")
    for part in (more, less, other):
        torch.save(saved | {"state_dict": part}, "bad.pt")
        stopped(
            module, dataclasses.replace(args, init="bad.pt"), "^--init bad.pt: its weights are not .*conv"
        )
    for damage in (b"", b"no checkpoint", (whole / "backbone.pt").read_bytes()[:10000]):
        Path("bad.pt").write_bytes(damage)
        stopped(module, dataclasses.replace(args, init="bad.pt"), "^--init bad.pt: .*convert.py makes")
    stopped(module, dataclasses.replace(args, init="none.pt"), "^--init none.pt: .*No such file")
    assert not Path("c").exists()


@pytest.mark.shared
def test_what_no_shape_shows_is_compared(module, whole, tmp_path):
    """A small ViT has 6 heads in one method and 12 in another; a file of the first edition does not say. A
    CLIP has either GELU."""
    backbone = load(whole / "backbone.pt")
    for held, own, fits in ((6, 6, True), (6, 12, False), (None, 12, True), (None, None, True)):
        arch_args = {"num_heads": held} if held else {}
        torch.save({"state_dict": backbone["state_dict"], "arch_args": arch_args}, "heads.pt")
        encoder = {name: tensor.clone() for name, tensor in backbone["state_dict"].items()}
        with contextlib.nullcontext() if fits else pytest.raises(SystemExit, match="weights are not those"):
            module.load_encoder(encoder, "heads.pt", {"num_heads": own} if own else {})
    torch.save({"state_dict": backbone["state_dict"], "arch_args": {"act_layer": "gelu"}}, "gelu.pt")
    module.load_encoder(encoder, "gelu.pt", {"act_layer": "gelu"})
    with pytest.raises(SystemExit, match="weights are not those"):
        module.load_encoder(encoder, "gelu.pt", {"act_layer": "quick_gelu"})
