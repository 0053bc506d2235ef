"""The contracts of DESIGN sections 3, 4, 8, 9 and 11, in tiny settings, on scripts of the first edition."""

import dataclasses
import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import torchvision
from conftest import FIRST_EDITION, ROOT, command_line, run, run_processes, tiny_args
from PIL import Image, ImageFile

COMMON = """
    data image_size arch epochs batch_size weight_decay warmup_epochs workers device amp compile seed init
    run_dir restart log_every checkpoint_every
"""
TAGS = """
    train/loss train/lr train/grad_norm
    perf/images_per_second perf/data_wait monitor/feature_std monitor/effective_rank monitor/alarm
"""
pytestmark = pytest.mark.parametrize("script", FIRST_EDITION, scope="module")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def module(script):
    return importlib.import_module(script)


def metrics_of(folder):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith("perf/")} for line in lines]


def tensors_of(state, prefix=""):
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, (list, tuple))
        else ()
    )
    return {
        name: tensor for key, value in items for name, tensor in tensors_of(value, f"{prefix}/{key}").items()
    }


def assert_same_run(a, b):
    """The metrics and every tensor of the checkpoint, bit for bit."""
    assert metrics_of(a) == metrics_of(b)
    a, b = (tensors_of(torch.load(folder / "checkpoint.pt", weights_only=True)) for folder in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "events" not in path.name]
    return {path: path.read_bytes() for path in files}


def refused(module, match, **flags):
    """train() must raise SystemExit with a short message that matches; returns the message."""
    with pytest.raises(SystemExit) as stop:
        module.train(tiny_args(module.__name__, **flags))
    message = str(stop.value)
    assert re.search(match, message), message
    assert stop.value.code not in (0, None) and "\n" not in message and len(message) < 400
    return message


# Section 3: running


def test_flags_that_every_script_has(module):
    fields = {field.name: field for field in dataclasses.fields(module.Args)}
    assert set(COMMON.split()) < set(fields) and {"base_lr", "lr"} & set(fields)
    assert fields["data"].default == "demo" and fields["device"].default == fields["amp"].default == "auto"
    assert fields["run_dir"].default == ""


def test_each_process_takes_its_slice_of_the_global_batch(module, folder):
    images = module.Images(str(folder), (), 0, 32, 0.3, 0)
    whole = list(images.batches(8, 0, 2, 0, 1))
    parts = [list(images.batches(8, 0, 2, rank, 2)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]
    assert len(whole) == 10 and all(len(batch) == 8 for batch in whole)
    assert whole[3:] == list(images.batches(8, 3, 2, 0, 1)) and whole[7:] == list(
        images.batches(8, 7, 2, 0, 1)
    )
    epochs = [sum(whole[:5], []), sum(whole[5:], [])]
    assert sorted(epochs[0]) == list(range(40)) and sorted(epochs[1]) == list(range(40, 80))
    assert [key - 40 for key in epochs[1]] != epochs[0]


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.shared)])
def test_amp_on_the_cpu(module, folder, tmp_path, amp):
    args = tiny_args(module.__name__, data=str(folder), amp=amp, epochs=1, device="cpu", run_dir="run")
    metrics = module.train(args)
    assert all(math.isfinite(value) for value in metrics.values())
    state = torch.load("run/backbone.pt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.shared
def test_two_processes_write_one_run(module, folder, tmp_path):
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run", "device": "cpu"}
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import tiny_args
import {module.__name__} as module
if __name__ == "__main__":
    metrics = module.train(tiny_args({module.__name__!r}, **{flags!r}))
"""
    output = run_processes(tmp_path, code).stdout
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert output.count("effective learning rate") == 1 and "2 x cpu" in output
    finished = run_processes(tmp_path, code).stdout  # the same command again
    assert "step 5 of 5" in finished and len(metrics_of(tmp_path / "run")) == 5


# Section 4: data


@pytest.mark.shared
def test_demo_images_are_a_small_balanced_world(module):
    images, labels, captions = zip(*(module.demo_image(index) for index in range(400)), strict=True)
    assert all(image.size == (48, 48) and image.mode == "RGB" for image in images)
    assert set(labels) == set(range(10)) and max(Counter(labels).values()) < 70
    again = module.demo_image(7)
    assert again[0].tobytes() == images[7].tobytes() and again[1:] == (labels[7], captions[7])
    words = set(" ".join(captions).split())
    assert {"mushroom", "flower", "big", "small", "left", "right", "dusk", "day"} < words
    assert all(list(module.WORLD)[label] in caption for label, caption in zip(labels, captions, strict=True))
    assert len({image.tobytes() for image in images}) == 400


def difficult_files(root):
    """One file of each kind that a camera or a scanner makes, and files that no decoder reads."""
    rng = random.Random(0)
    blocks = Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3))
    photo = blocks.resize((64, 48), Image.BICUBIC)
    (root / "plain").mkdir(parents=True)  # two folders: clip.py takes them for classes
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
    return photo


@pytest.mark.shared
def test_difficult_files_train_and_bad_ones_are_named(module, tmp_path, script):
    difficult_files(tmp_path / "files")
    done = run(command_line(script, data="files", epochs=1, run_dir="run"))
    assert done.returncode == 0, done.stderr
    assert "38 images" in done.stdout and "1 other files ignored" in done.stdout
    for name in ("truncated.jpg", "zero.jpg", "text.png"):
        assert re.search(rf"files/odd/{name} cannot be read", done.stderr), done.stderr
    assert done.stderr.count("cannot be read") == 3


@pytest.mark.shared
def test_good_files_are_read_right(module, tmp_path):
    photo = difficult_files(tmp_path / "files")

    def read(name, size=32):
        return torchvision.transforms.functional.pil_to_tensor(
            module.read_image(f"files/odd/{name}", size, 0.08)
        ).float()

    expected = torchvision.transforms.functional.pil_to_tensor(photo).float()
    gray = torchvision.transforms.functional.pil_to_tensor(photo.convert("L")).float()
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
def test_large_jpegs_decode_small_but_not_too_small(module, tmp_path):
    """At 1/2, 1/4 or 1/8 only if the smallest crop (area min_scale, aspect 3/4) keeps image_size pixels."""
    Image.new("RGB", (4000, 3000)).save("large.jpg")
    for size, scale, reduction in ((224, 0.08, 2), (224, 0.2, 4), (32, 0.2, 8), (32, 1.0, 8), (600, 0.08, 1)):
        width, height = module.read_image("large.jpg", size, scale).size
        assert (width, height) == (4000 // reduction, 3000 // reduction)
        assert math.sqrt(0.75 * scale * width * height) >= size
        if reduction < 8:
            assert math.sqrt(0.75 * scale * width * height) / 2 < size
    Image.new("RGB", (8000, 500)).save("panorama.jpg")  # no square crop is higher than the image
    assert module.read_image("panorama.jpg", 224, 0.3).size == (4000, 250)
    Image.new("RGB", (100, 60)).save("small.jpg")
    assert module.read_image("small.jpg", 224, 0.08).size == (100, 60)


@pytest.mark.shared
def test_train_folder_is_preferred_and_any_layout_is_found(module, folder, tmp_path):
    for name in ("train/x/1.png", "train/2.PNG", "val/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name)
    assert len(module.Images("set", (), 0, 32, 0.3, 0).items) == 2
    assert len(module.Images("set/val", (), 0, 32, 0.3, 0).items) == 1
    assert len(module.Images(str(folder), (), 0, 32, 0.3, 0).items) == 40


@pytest.mark.shared
def test_crops_depend_on_seed_epoch_and_index_alone(module, folder):
    crop = torchvision.transforms.v2.RandomResizedCrop(16)
    images = module.Images(str(folder), (crop, crop), 0, 16, 0.3, 0)
    first, second = images[3]
    torch.manual_seed(99)
    assert (
        torch.equal(images[3][0], first)
        and torch.equal(images[3][1], second)
        and not torch.equal(first, second)
    )
    assert not torch.equal(images[43][0], first)  # the next epoch
    assert not torch.equal(module.Images(str(folder), (crop,), 1, 16, 0.3, 0)[3][0], first)


@pytest.mark.shared
def test_a_hundred_bad_files_in_a_row_are_an_error(module, tmp_path, script):
    for i in range(110):
        (tmp_path / f"bad/{i // 60}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"bad/{i // 60}/{i:03d}.jpg").write_text("no image")
    for workers in (0, 1):
        done = run(command_line(script, data="bad", workers=workers, run_dir=f"run{workers}"))
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert any("100 files in a row cannot be read" in line for line in done.stderr.splitlines())


@pytest.mark.shared
def test_data_sets_of_torchvision(module, monkeypatch):
    class Set(list):
        classes, targets = ["fox", "owl"], [0, 1] * 8

        def __init__(self, items, download=True, train=True):
            super().__init__(pictures)

    pictures = [(Image.new("L", (20, 20), 10 * i), i % 2) for i in range(16)]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Set)
    metrics = module.train(tiny_args(module.__name__, data="CIFAR10", epochs=1, run_dir="run"))
    assert math.isfinite(metrics["train/loss"])

    class Damaged(list):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("broken picture")
            return super().__getitem__(index)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: Damaged(pictures))
    images = module.Images("CIFAR10", (), 0, 32, 0.3, 0)
    with pytest.warns(UserWarning, match="3 cannot be read"):
        images[3]

    def offline(root, download):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    message = refused(module, "network is unreachable", data="CIFAR10")
    assert "folder" in message and "demo" in message


# Section 8: the run folder


@pytest.mark.shared
def test_a_resumed_run_takes_over_where_there_was_no_scaler(module, folder, tmp_path):
    """The same command on another machine, where --amp auto becomes float16."""
    flags = {"data": str(folder), "run_dir": "run", "checkpoint_every": 5}
    module.train(tiny_args(module.__name__, epochs=4, **flags))
    state = torch.load("run/checkpoint.pt", weights_only=True)
    held = json.loads((tmp_path / "run/args.json").read_text())
    module.save_checkpoint("run/checkpoint.pt", **(state | {"step": 10}))
    (tmp_path / "run/args.json").write_text(json.dumps(held | {"amp": "fp16"}))
    assert math.isfinite(module.train(tiny_args(module.__name__, amp="fp16", **flags))["train/loss"])


def test_run_folder(module, folder, tmp_path, capsys):
    args = tiny_args(module.__name__, data=str(folder), run_dir="run")
    metrics = module.train(args)
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"args.json", "metrics.jsonl", "checkpoint.pt", "backbone.pt"} < names
    assert any(name.startswith("events.out") for name in names) and any(
        name.endswith(".png") for name in names
    )
    assert not any(name.endswith(".tmp") for name in names)
    held = json.loads((run / "args.json").read_text())
    assert held == json.loads(json.dumps(dataclasses.asdict(args))) | {"method": module.__name__}
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(1, 21)) and [
        line["epoch"] for line in lines
    ] == sorted([*range(4)] * 5)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(TAGS.split()) < set(last) and metrics.items() <= last.items()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run)).Reload()
    tags = {tag for tag in board.Tags()["scalars"] if not tag.startswith("eval/")}  # after the last step
    assert tags == set(last) - {"step", "epoch"} and board.Tags()["images"]
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 21))

    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["method"] == module.__name__ and checkpoint["step"] == 20
    backbone = torch.load(run / "backbone.pt", weights_only=True)
    assert set(backbone) == set("method arch arch_args image_size mean std feature_dim state_dict".split())
    assert (
        backbone["method"] == module.__name__
        and backbone["arch"] == args.arch
        and backbone["image_size"] == 32
    )
    if args.arch.startswith("resnet"):
        net = getattr(torchvision.models, args.arch)()
        missing, unexpected = net.load_state_dict(backbone["state_dict"], strict=False)
        assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
        assert backbone["feature_dim"] == net.fc.in_features

    # The same command again prints the result and trains nothing; --restart gives the same again.
    before = snapshot(run)
    capsys.readouterr()
    assert module.train(args) == metrics
    assert snapshot(run) == before and "step 20 of 20" in capsys.readouterr().out
    module.train(dataclasses.replace(args, restart=True, log_every=1))
    assert metrics_of(run) == lines


@pytest.mark.shared
def test_name_of_the_run_folder(module, folder, tmp_path):
    script, data = module.__name__, str(folder)
    args = tiny_args(script, data=data)

    def name(**flags):
        return module.open_run(dataclasses.replace(args, **flags), script, 0)[0]

    assert module.open_run(module.Args(), script, 0)[0].as_posix() == f"runs/{script}"
    assert re.fullmatch(rf"runs/{script}-[0-9a-f]{{8}}", name().as_posix())
    assert name() != name(seed=1) != name(epochs=9)
    assert name() == name(workers=3, device="cpu", log_every=7, checkpoint_every=3, compile=True)


def test_a_folder_of_another_run_is_refused(module, folder, tmp_path):
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir="run")
    module.train(args)
    before = snapshot(tmp_path / "run")
    message = refused(
        module, "run holds a run with", data=str(folder), epochs=1, run_dir="run", seed=5, weight_decay=0.5
    )
    assert (
        "--seed 0" in message
        and "--weight-decay" in message
        and "--restart" in message
        and "epochs" not in message
    )
    assert snapshot(tmp_path / "run") == before
    held = json.loads((tmp_path / "run/args.json").read_text())
    del held["init"]  # as begun before there was this flag: it had its default
    (tmp_path / "run/args.json").write_text(json.dumps(held))
    module.train(args)
    module.train(dataclasses.replace(args, seed=5, restart=True))
    assert json.loads((tmp_path / "run/args.json").read_text())["seed"] == 5


def wait_for_step(folder, step, process):
    start = time.time()
    while time.time() - start < 120 and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(script, folder, tmp_path_factory):
    """A run of 40 steps that nothing disturbs."""
    path = tmp_path_factory.mktemp(script)
    importlib.import_module(script).train(tiny_args(script, data=str(folder), epochs=8, run_dir=str(path)))
    return path


def test_an_interrupted_run_goes_on_bit_for_bit(module, folder, tmp_path, uninterrupted, monkeypatch):
    save = module.save_checkpoint

    def stop(path, **state):
        save(path, **state)
        if path.name == "checkpoint.pt" and state["step"] == 10:
            raise KeyboardInterrupt

    flags = {"data": str(folder), "epochs": 8, "run_dir": str(tmp_path / "run"), "checkpoint_every": 5}
    monkeypatch.setattr(module, "save_checkpoint", stop)
    with pytest.raises(
        SystemExit, match="interrupted .step 10.; the same command, without --restart, continues"
    ):
        module.train(tiny_args(module.__name__, **flags))
    monkeypatch.undo()
    module.train(tiny_args(module.__name__, **flags))
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.shared
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_the_same_command_again(script, folder, tmp_path, uninterrupted, workers):
    """40 steps = some more than 10, kill -9, the same command again: bit for bit, with any workers."""
    words = command_line(script, data=folder, epochs=8, run_dir="run", checkpoint_every=10, workers=workers)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for_step(tmp_path / "run", 13, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    step = torch.load("run/checkpoint.pt", weights_only=True)["step"]
    assert step in (10, 20, 30)
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 14, "tor')  # a line that the kill tore
    done = run(words)
    assert done.returncode == 0 and f"step {step} of 40" in done.stdout, done.stderr
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.shared
def test_kill_while_a_checkpoint_is_written(script, folder, tmp_path, uninterrupted):
    """The second checkpoint is killed when half of it is on the disk."""
    (tmp_path / "program.py").write_text(f"""
import io, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, {script} as module, tyro
save = torch.save
def half(state, file):
    if state.get("step") == 12:
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = half
module.train(tyro.cli(module.Args))
""")
    words = command_line(script, data=folder, epochs=8, run_dir="run", checkpoint_every=6)
    killed = run([sys.executable, "program.py", *words[2:]])
    assert killed.returncode == -signal.SIGKILL
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 6 and os.path.exists(
        "run/checkpoint.pt.tmp"
    )
    done = run(words)
    assert done.returncode == 0 and "step 6 of 40" in done.stdout, done.stderr
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.shared
def test_ctrl_c_says_one_line(script, folder, tmp_path):
    words = command_line(script, data=folder, run_dir="run", epochs=400, workers=1)
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a suite started in the background ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for_step(tmp_path / "run", 3, process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGINT) and "Traceback" not in errors
    assert "the same command, without --restart, continues" in errors.splitlines()[-1]


# Section 9: collapse


@pytest.mark.shared
def test_alarm_rings_after_three_and_clears_after_three(module, capsys):
    state, heard = {}, []
    for step, bad in enumerate([1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1], start=1):
        heard.append(
            module.collapse_alarm(state, step, 2, {"it is flat; raise it": bool(bad), "other": False})
        )
    assert heard == [0.0] * 4 + [1.0] * 12 + [0.0] * 4 + [1.0]
    said = capsys.readouterr().out
    assert said.count("COLLAPSE") == 2 and said.count("it is flat; raise it") == 2 and "other" not in said


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
    assert healthy["feature_std"] == pytest.approx(1, abs=0.01) and healthy[
        "effective_rank"
    ] == pytest.approx(126, abs=1)
    rotation = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    flat = metrics(gauss[:, :4] @ rotation[:4])
    assert flat["feature_std"] > 0.9 and flat["effective_rank"] == pytest.approx(4, abs=0.02)
    unit = torch.nn.functional.normalize(gauss + 1, dim=1)
    assert metrics(gauss + 1)["spread"] == pytest.approx(unit.var(0, correction=0).sum().item(), abs=1e-6)
    nearly = 5 + 1e-6 * torch.randn(512, 128, generator=generator)
    assert metrics(nearly, center=True)["effective_rank"] == 1
    rank = healthy["effective_rank"]
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


def shuffled_captions(module, monkeypatch):
    sample = module.Pairs.sample
    monkeypatch.setattr(
        module.Pairs,
        "sample",
        lambda self, index, x: (*sample(self, index * 7919 % len(self.items), x)[:2], index),
    )


# For each safeguard the flags that remove it, or a control that spoils the task, and what the alarm says; 60
# steps on the demo images are enough to see it.
SAFEGUARDS = {
    "clip": [(shuffled_captions, "found by chance")],
}
SHORT = {
    "data": "demo",
    "epochs": 1,
    "batch_size": 64,
    "log_every": 3,
    "warmup_epochs": 0.1,
    "run_dir": "run",
}


FASTER = {
    "clip": {"lr": 2e-3, "context_length": 40},
}

# On the photos it needs more before it tells captions better than by chance.
ON_PHOTOS = {
    "clip": {"lr": 1e-3, "warmup_epochs": 0.4},
}


def short(module, data):
    flags = SHORT | FASTER.get(module.__name__, {}) | {"data": data}
    return flags if data == "demo" else flags | ON_PHOTOS.get(module.__name__, {})


on_demo_and_photos = pytest.mark.parametrize("data", ["demo", pytest.param("photos", marks=pytest.mark.slow)])


@on_demo_and_photos
@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_removed_safeguard_rings_the_alarm(module, tmp_path, capsys, monkeypatch, request, which, data):
    """On the photos an epoch has 156 steps."""
    data = data if data == "demo" else str(request.getfixturevalue(data))
    for flags, words in SAFEGUARDS[module.__name__][which : which + 1]:
        if callable(flags):
            flags(module, monkeypatch)
            flags = {}
        module.train(tiny_args(module.__name__, **short(module, data), **flags))
        lines = metrics_of(tmp_path / "run")
        said = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSE" in line]
        assert lines[-1]["monitor/alarm"] == 1 and len(said) == 1 and re.search(words, said[0]), said
        assert not any(line["monitor/alarm"] for line in lines if line["step"] <= 0.2 * lines[-1]["step"])


@on_demo_and_photos
def test_a_healthy_run_never_rings(module, tmp_path, capsys, request, data):
    data = data if data == "demo" else str(request.getfixturevalue(data))
    module.train(tiny_args(module.__name__, **short(module, data)))
    lines = metrics_of(tmp_path / "run")
    assert not any(line["monitor/alarm"] for line in lines) and "COLLAPSE" not in capsys.readouterr().out
    assert sum(line["step"] > 0.2 * lines[-1]["step"] for line in lines) >= 5  # armed


def test_there_is_a_control(script):
    assert SAFEGUARDS[script]


@pytest.mark.slow
def test_the_demo_never_rings(script, tmp_path):
    done = run([sys.executable, ROOT / f"{script}.py", "--run-dir", "run"], timeout=900)
    assert done.returncode == 0 and "COLLAPSE" not in done.stdout + done.stderr
    alarms = [line["monitor/alarm"] for line in metrics_of(tmp_path / "run")]
    assert not any(alarms) and len(alarms) * 0.8 >= 5


# Section 11: bad input


BAD_VALUES = {
    "epochs": 0,
    "batch_size": 0,
    "image_size": -1,
    "weight_decay": -0.1,
    "warmup_epochs": 5.0,
    "workers": -1,
    "log_every": 0,
    "checkpoint_every": 0,
    "temperature": -1.0,
    "min_scale": 1.5,
    "blur": 2.0,
    "base_lr": math.nan,
}


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_wrong_values_say_what_is_allowed(module, tmp_path, flag):
    if flag in {field.name for field in dataclasses.fields(module.Args)}:
        refused(
            module,
            f"--{flag.replace('_', '-')} .*must be (above 0|0 or more)(, at most (1|4))?$",
            **{flag: BAD_VALUES[flag]},
        )
        assert not list(tmp_path.iterdir())


@pytest.mark.shared
def test_infinity_is_no_value(module):
    refused(module, "--weight-decay inf: must be 0 or more$", weight_decay=math.inf)


@pytest.mark.shared
def test_wrong_flag_and_wrong_choice(script, tmp_path):
    for words in (["--no-such-flag", "1"], ["--arch", "resnet1000"], ["--epochs", "many"]):
        done = run([sys.executable, ROOT / f"{script}.py", *words])
        assert (
            done.returncode == 2 and "Traceback" not in done.stderr and words[0] in done.stderr + done.stdout
        )
    assert not list(tmp_path.iterdir())


def test_bad_data(module, folder, tmp_path):
    refused(module, r"--data nowhere: no folder, no download .*demo", data="nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("nothing here")
    refused(module, r"give .* (at most|from \d to) 0 images in empty, 1 other files ignored", data="empty")
    (tmp_path / "file").write_text("")
    refused(
        module, "file/args.json: .*exists: 'file'; use another --run-dir", data=str(folder), run_dir="file"
    )
    (tmp_path / "file").unlink()
    words = r"--batch-size 64: give a multiple of \d+, (at most|from \d to) 40 images"
    refused(module, words, data=str(folder), batch_size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.shared
def test_more_processes_than_gpus_say_so(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="process 3 of this machine has no GPU"):
        module.start_processes("auto", "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda_where_it_is_asked_for(module, tmp_path):
    refused(module, "--device cuda: .*--device auto", device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.shared
def test_damaged_and_foreign_checkpoints(module, folder, tmp_path):
    flags = {"data": str(folder), "epochs": 1, "run_dir": "run"}
    module.train(tiny_args(module.__name__, **flags))
    path = tmp_path / "run/checkpoint.pt"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        path.write_bytes(damage)
        before = snapshot(tmp_path / "run")
        refused(module, "checkpoint.pt is damaged, or not of", **flags)
        assert snapshot(tmp_path / "run") == before
    torch.save(torch.ones(3), path)
    refused(module, "checkpoint.pt is damaged, or not of", **flags)
    torch.save({"method": "another", "step": 3}, path)
    refused(module, "checkpoint.pt is damaged, or not of", **flags)
    assert torch.load(path, weights_only=True)["method"] == "another"
    metrics = module.train(tiny_args(module.__name__, **flags, restart=True))
    assert math.isfinite(metrics["train/loss"])


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(module, folder, tmp_path):
    rate = "base_lr" if hasattr(module.Args, "base_lr") else "lr"
    flags = {"data": str(folder), "run_dir": "run", "checkpoint_every": 1, "warmup_epochs": 3, rate: 1e30}
    refused(module, "loss .*gradient .*lower", **flags)
    state = torch.load("run/checkpoint.pt", weights_only=True)
    tensors = [tensor for tensor in tensors_of(state).values() if tensor.is_floating_point()]
    assert len(tensors) > 20 and all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.shared
def test_save_is_complete_or_not_at_all(module, tmp_path, monkeypatch):
    module.save_checkpoint("a.pt", method="x", tensor=torch.ones(3))

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        module.save_checkpoint("a.pt", method="x", tensor=torch.zeros(3))
    monkeypatch.undo()
    assert module.load_checkpoint(tmp_path / "a.pt", "x")["tensor"].sum() == 3
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --init


def test_starts_from_a_backbone(module, script, folder, tmp_path, capsys, monkeypatch):
    """All of the encoder is that of the file, moving averages too; the rest is new and listed."""
    flags = {"data": str(folder), "epochs": 1}
    module.train(tiny_args(module.__name__, **flags, run_dir=str(tmp_path / "a"), seed=1))
    path, start = tmp_path / "a/backbone.pt", {}
    saved, models = torch.load(path, weights_only=True), []
    load_encoder, open_run = module.load_encoder, module.open_run
    monkeypatch.setattr(module, "load_encoder", lambda *a: models.append(a[0]) or load_encoder(*a))

    def spy(*args):
        start.update({name: tensor.clone() for name, tensor in models[0].state_dict().items()})
        return open_run(*args)

    monkeypatch.setattr(module, "open_run", spy)
    capsys.readouterr()
    module.train(tiny_args(module.__name__, **flags, init=str(path), run_dir=str(tmp_path / "b")))
    assert re.search(rf"--init {re.escape(str(path))}: new are (?!.*backbone)\w+", capsys.readouterr().out)
    assert json.loads((tmp_path / "b/args.json").read_text())["init"] == str(path)
    encoders = {"", "backbone.", "encoder_q.", "encoder_k.", "online.backbone.", "target.backbone."}
    if script == "clip":  # the official names are not timm's
        tower = {name: start["visual." + name] for name, _ in models[0].visual.named_parameters()}
        start = {module.timm_name(name): tensor for name, tensor in tower.items()}
        saved["state_dict"]["cls_token"].squeeze_()
        saved["state_dict"]["pos_embed"].squeeze_()
    encoders |= {"encoder.", "base_encoder.", "momentum_encoder."}
    for name, tensor in saved["state_dict"].items():
        ours = [start[encoder + name] for encoder in encoders if encoder + name in start]
        assert ours and all(torch.equal(start, tensor) for start in ours), name


def test_a_start_that_does_not_match_is_refused(module, folder, tmp_path):
    args = tiny_args(module.__name__, data=str(folder), epochs=1, run_dir=str(tmp_path / "a"))
    module.train(args)
    saved = torch.load(tmp_path / "a/backbone.pt", weights_only=True)
    state = saved["state_dict"]
    name = next(name for name in state if name.endswith(".weight"))
    more, less = state | {"layer9.weight": torch.ones(1)}, {k: v for k, v in state.items() if k != name}
    other = {k: v[..., :-1] if k == name else v for k, v in state.items()}
    told = "visual.conv1.weight" if module.__name__ == "clip" else name
    for part, words in ((more, "layer9.weight"), (less, told), (other, told)):
        torch.save(saved | {"state_dict": part}, tmp_path / "bad.pt")
        with pytest.raises(SystemExit, match=r"--init bad.pt: .*" + re.escape(words)):
            module.train(dataclasses.replace(args, init="bad.pt", run_dir="c"))
    with pytest.raises(SystemExit, match="--init none.pt: .*No such file"):
        module.train(dataclasses.replace(args, init="none.pt", run_dir="c"))
    assert not (tmp_path / "c").exists()
