"""Any flags and any bytes: a script trains its steps or ends with a line, and never hangs. `make test` tries
few inputs, the same each time, `make test-all` many, new ones each time."""

import contextlib
import importlib
import io
import math
import signal
import typing
from functools import partial

import pytest
import torch
from conftest import TRAINING, tiny_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
import eval_linear
import simclr

FEW = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, derandomize=False, print_blob=True)
pytestmark = pytest.mark.filterwarnings("ignore")


def few_or_many(few, many):
    many = pytest.param(settings(MANY, max_examples=many), marks=pytest.mark.slow)
    return pytest.mark.parametrize("how", [settings(FEW, max_examples=few), many], ids=["few", "many"])


class Hang(BaseException):
    """Not an Exception: those of a decoder are caught and named."""


@contextlib.contextmanager
def at_most(seconds, what):
    def hang(*_):
        raise Hang(f"longer than {seconds} s: {what}")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Flags

FLOATS = st.sampled_from([-1.0, 0.0, 1e-30, 0.01, 0.3, 0.5, 0.999, 1.0, 2.0, 1e30, math.inf, math.nan])
KINDS = {int: st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 16]), float: FLOATS, bool: st.booleans()}
SIZES = [0, 1, 2, 3, 4, 7, 8, 16, 24, 31, 32, 33, 48]
RANGES = {  # what would take minutes, or means something else, is left out
    "image_size": SIZES,
    "local_size": SIZES,
    "patch_size": [0, 3, 4, 5, 8, 16],
    "batch_size": [0, 1, 2, 3, 4, 6, 8, 16, 17],
    "seed": [-1, 0, 1, 2**32, 2**63],
    "tokenizer_layers": [0, 1, 2, 3],
    "amp": ["auto", "off", "bf16"],
    "arch": ["vit_nano", "resnet18"],
    "queue_size": [1, 16, 48, 60, 64],
}
FIXED = "data epochs tokenizer_epochs workers device compile run_dir init dvae tokenizer".split()
REFUSED = [{"seed": 2**64}, {"batch_size": 1}, {"micro_batch_size": 3}, {"image_size": 33, "patch_size": 8}]
REFUSED += [{"queue_size": 60}, {"batch_size": 41}]
FOUND = {  # by these tests
    "mae": [{"mask_ratio": math.inf}, {"mask_ratio": 1e30}],
    "pretext": [{"task": "jigsaw", "batch_size": 1}, {"task": "colorization", "image_size": 1}],
}


def values_of(name, kind):
    choices = typing.get_args(kind)
    if name in RANGES:
        return st.sampled_from([value for value in RANGES[name] if not choices or value in choices])
    if typing.get_origin(kind) is tuple:
        parts = [values_of(name, part) for part in choices]
        return st.tuples(*parts) if None not in parts else None  # of texts
    return st.sampled_from(choices) if choices else KINDS.get(kind)


def flags_of(module):
    """Up to four flags of a tiny run, changed; sizes and batches more often than others."""
    kinds = typing.get_type_hints(module.Args)
    values = {name: values_of(name, kind) for name, kind in kinds.items() if name not in FIXED}
    values = {name: some for name, some in values.items() if some is not None}
    often = [
        name for name in ("image_size", "patch_size", "batch_size", "micro_batch_size") if name in values
    ]
    names = st.lists(st.sampled_from([*values, *often * 3]), min_size=1, max_size=4, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen}))


@few_or_many(4, 150)
@pytest.mark.parametrize("script", TRAINING)
def test_any_flags(script, how, folder, tmp_path_factory, monkeypatch):
    """Two batches are learnt from, or one line says why not."""
    module = importlib.import_module(script)
    begin = module.Images.__init__

    def short(self, args, *given):
        begin(self, args, *given)
        few = 2 * max(args.batch_size, 1)
        self.items = self.items[:: max(1, len(self.items) // few)][:few]  # of all folders

    def outcome(flags):
        run_dir = str(tmp_path_factory.mktemp("any") / "run")
        args = tiny_args(script, **{"data": str(folder), "epochs": 1, "run_dir": run_dir} | flags)
        with at_most(60, flags):
            try:
                metrics = module.train(args)
            except SystemExit as stop:
                message = stop.code
                assert 5 < len(message) < 500 and "\n" not in message, message
                assert "cannot be read" not in message, message  # the files are good, a flag is not
                return message
        assert math.isfinite(metrics["train/loss"]), metrics
        return metrics

    monkeypatch.setattr(module.Images, "__init__", short)
    monkeypatch.setattr(module, "save_checkpoint", lambda path, **state: None)
    for flags in REFUSED:
        if flags.keys() <= typing.get_type_hints(module.Args).keys():
            assert isinstance(outcome(flags), str), flags
    assert all(map(math.isfinite, outcome({"batch_size": 2}).values()))
    seen = [outcome(flags) for flags in FOUND.get(script, ())]
    how(given(flags_of(module))(lambda flags: seen.append(outcome(flags))))()
    assert how.max_examples < 100 or {*map(type, seen)} == {str, dict}  # some of each


# Bytes


def spoilt(originals):
    """One of the originals with parts that are replaced, cut out or cut off."""

    def edited(data, edits):
        for at, cut, more in edits:
            at %= len(data) + 1
            data = data[:at] + more + data[at + cut :]
        return data

    cuts = st.sampled_from([0, 1, 8, 64, 2**20])
    edits = st.tuples(st.integers(0, 2**12), cuts, st.binary(max_size=64))
    return st.builds(edited, st.sampled_from(originals), st.lists(edits, min_size=1, max_size=4))


# A file, what it may have held, and what reads it


def an_image(root):
    photo, originals = simclr.demo_image(0)[0], []
    photo.save(root / "b.png")
    (root / "a.jpg").touch()
    images = simclr.Images(simclr.Args(data=str(root)), (simclr.random_crop(16, 0.3),), 32)
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"):
        for options in ({}, {"progressive": True, "compression": "tiff_lzw"}):  # each for one kind
            photo.save(file := io.BytesIO(), kind, **options)
            originals.append(file.getvalue())

    def read():
        view, _ = images[0]  # of this file or of the next
        assert view.dtype == torch.uint8 and view.shape == (3, 16, 16)

    return root / "a.jpg", originals, read


def in_a_run_folder(name, root):
    args, part = simclr.Args(run_dir=str(root)), {"model": torch.nn.Linear(3, 2)}
    run = simclr.open_run(args, "simclr", part, 4096, None)
    state = {name: getattr(run, name) for name in run.kept}
    simclr.save_checkpoint(root / "checkpoint.pt", **state, model=part["model"].state_dict())

    def read():
        assert simclr.open_run(args, "simclr", part, 4096, None).step == 0

    whole = (root / name).read_bytes()
    return root / name, [whole, whole[:200]], read


def labels(root):
    for name in ("a.png", "b.png"):
        (root / name).touch()
    table = b"path,label\na.png,cat\nb.png,dog\nc/d.png,cat\n"
    originals = [table, table[:30], b'"a.png","cat"\r\n"b.png","dog"\r\n', "a.png,\u00e9\n".encode("utf-16")]
    return root / "labels.csv", originals, lambda: eval_linear.csv_rows(str(root), str(root / "labels.csv"))


def published(root):
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 3, 1, 1)}}, root / "a.pth")
    args = convert.Args(str(root / "a.pth"), to=str(root / "b.pt"))
    return root / "a.pth", [(root / "a.pth").read_bytes()], lambda: convert.convert(args)


KINDS_OF_FILES = {
    "image": an_image,
    "checkpoint": partial(in_a_run_folder, "checkpoint.pt"),
    "args": partial(in_a_run_folder, "args.json"),
    "labels": labels,
    "published": published,
}


@few_or_many(20, 3000)
@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_any_bytes(kind, how, tmp_path):
    """They are read, or a line says whose they are; then nothing is written."""
    path, originals, read = KINDS_OF_FILES[kind](tmp_path)
    seen, before = {"read"}, {*tmp_path.iterdir(), path}

    def check(data):
        path.write_bytes(data)
        with at_most(20, data):
            try:
                read()
            except SystemExit as stop:
                assert str(tmp_path) in stop.code and "\n" not in stop.code, stop.code
                assert path.read_bytes() == data and {*tmp_path.iterdir()} == before
                seen.add("refused")

    for data in originals:
        for some in (data, data[:-1], data[1:]):
            check(some)
    how(given(spoilt(originals))(check))()
    assert "refused" in seen or kind == "image"
