"""Any flags and any bytes: a script trains its steps or exits with a message, and never hangs.

`make test` tries few inputs, the same each time; `make test-all` tries many, new ones each time.
"""

import importlib
import io
import math
import signal
import tempfile
import typing
import warnings

import pytest
import torch
from conftest import REPRESENTATIVES, TRAINING, tiny_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

every_script = pytest.mark.parametrize("script", TRAINING)
one_script = pytest.mark.parametrize("script", sorted(REPRESENTATIVES))
FEW = settings(max_examples=6, derandomize=True, deadline=None, database=None)
FEW = settings(FEW, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=150, derandomize=False, print_blob=True)
BYTES = settings(FEW, max_examples=60)
MANY_BYTES = settings(MANY, max_examples=3000)

FLOATS = st.sampled_from([-1.0, 0.0, 1e-30, 0.01, 0.3, 0.5, 0.999, 1.0, 2.0, 1e30, math.inf, math.nan])
INTS = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 16])
SIZES = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 24, 31, 32, 33, 48])
RANGES = {  # what would take minutes, or means something else, is left out
    "image_size": SIZES,
    "local_size": SIZES,
    "patch_size": st.sampled_from([0, 2, 4, 5, 8, 16]),
    "batch_size": st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 17]),
    "seed": st.sampled_from([-1, 0, 1, 2**32, 2**63]),
    "tokenizer_layers": st.sampled_from([0, 1, 2, 3]),
    "amp": st.sampled_from(["auto", "off", "bf16"]),
    "arch": st.sampled_from(["vit_nano", "resnet18"]),
    "queue_size": st.sampled_from([1, 16, 48, 60, 64]),
}
FIXED = "data epochs tokenizer_epochs workers device compile run_dir init dvae tokenizer".split()


class Hang(BaseException):
    """Not an Exception: those of a decoder are caught and named."""


def hang(*_):
    raise Hang("longer than a minute")


@pytest.fixture(autouse=True)
def at_most_a_minute():
    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def values_of(script, name, kind):
    if name in RANGES:
        choices = typing.get_args(kind)
        return RANGES[name].filter(lambda value: not choices or value in choices)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        parts = [values_of(script, name, part) for part in typing.get_args(kind)]
        return st.tuples(*parts) if None not in parts else None  # of texts
    return {int: INTS, float: FLOATS, bool: st.booleans()}.get(kind)


def flags_of(script):
    """Up to four flags of a tiny run, changed; sizes and batches more often than others."""
    kinds = typing.get_type_hints(importlib.import_module(script).Args)
    open_flags = {name: values_of(script, name, kind) for name, kind in kinds.items() if name not in FIXED}
    open_flags = {name: values for name, values in open_flags.items() if values is not None}
    often = [
        name for name in ("image_size", "patch_size", "batch_size", "micro_batch_size") if name in open_flags
    ]
    names = st.lists(st.sampled_from([*open_flags, *often * 3]), min_size=1, max_size=4, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: open_flags[name] for name in chosen}))


def two_steps_or_a_message(script, folder, flags):
    """Train two batches; the message if it stops."""
    module = importlib.import_module(script)
    read = module.Images.__init__

    def short(self, *arguments, **options):
        read(self, *arguments, **options)
        few = 2 * max(args.batch_size, 1)
        self.items = self.items[:: max(1, len(self.items) // few)][:few]  # of all folders

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as run_dir:
        args = tiny_args(script, **{"data": str(folder), "epochs": 1, "run_dir": run_dir + "/run"} | flags)
        patch.setattr(module.Images, "__init__", short)
        patch.setattr(module, "save_checkpoint", lambda path, **state: None)
        signal.alarm(60)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                metrics = module.train(args)
        except SystemExit as stop:
            message = stop.code
            assert isinstance(message, str) and 5 < len(message) < 500, message
            assert "cannot be read" not in message, message  # the files are good, a flag is not
            assert "\n" not in message, message
            return message
        finally:
            signal.alarm(0)
        assert math.isfinite(metrics["train/loss"]), metrics


def fuzz(script, folder, how):
    seen = []

    @how
    @given(flags_of(script))
    def check(flags):
        try:
            seen.append(two_steps_or_a_message(script, folder, flags))
        except BaseException as error:
            error.add_note(f"{script}.py with {flags}") if hasattr(error, "add_note") else None
            raise

    check()
    return seen


@every_script
def test_any_flags(script, folder, capsys):
    assert fuzz(script, folder, FEW)


@every_script
@pytest.mark.slow
def test_many_flags(script, folder, capsys):
    seen = fuzz(script, folder, MANY)
    assert any(message is None for message in seen) and any(message for message in seen)  # some of each


# What was found by these tests
FOUND = {
    "mae": [{"mask_ratio": math.inf}, {"mask_ratio": 1e30}],
    "pretext": [{"task": "jigsaw", "batch_size": 1}, {"task": "colorization", "image_size": 1}],
}
FOUND_ANYWHERE = [{"seed": 2**64}]


@pytest.mark.parametrize(
    "script, flags", [(script, flags) for script in TRAINING for flags in FOUND.get(script, ())]
)
def test_found_before(script, flags, folder):
    two_steps_or_a_message(script, folder, flags)


@every_script
@pytest.mark.shared
@pytest.mark.parametrize("flags", FOUND_ANYWHERE)
def test_found_in_all_scripts(script, flags, folder):
    two_steps_or_a_message(script, folder, flags)


@every_script
def test_a_batch_of_two_logs_numbers(script, folder, tmp_path):
    module, flags = importlib.import_module(script), {"data": str(folder), "epochs": 1}
    with pytest.raises(SystemExit, match="^--batch-size 1: give a multiple of 1, from 2 to 40"):
        module.train(tiny_args(script, **flags, batch_size=1, run_dir=str(tmp_path / "run")))
    metrics = module.train(tiny_args(script, **flags, batch_size=2, run_dir=str(tmp_path / "run")))
    assert all(math.isfinite(value) for value in metrics.values())


# Bytes


@st.composite
def spoilt(draw, originals):
    """One of the originals with some bytes changed, cut out or cut off; or bytes alone."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "end", "insert", "all"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "end":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data = bytearray(draw(st.binary(max_size=300)))
    return bytes(data)


def encoded(kind, **options):
    buffer = io.BytesIO()
    image = Image.frombytes("RGB", (24, 20), bytes(i * i % 251 for i in range(24 * 20 * 3)))
    (image.convert("P") if kind == "GIF" else image).save(buffer, kind, **options)
    return buffer.getvalue()


ORIGINALS = [encoded(kind) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")]
ORIGINALS += [encoded("JPEG", progressive=True), encoded("TIFF", compression="tiff_lzw")]


def check_images(script, root, how):
    module = importlib.import_module(script)
    Image.new("RGB", (40, 40)).save(root / "b.png")
    (root / "a.jpg").touch()
    crop = module.random_crop(16, 0.3) if hasattr(module, "random_crop") else (lambda pixels: pixels)
    images = module.Images(tiny_args(script, data=str(root)), (crop,), shortest=32)

    @how
    @given(spoilt(ORIGINALS))
    def check(data):
        (root / "a.jpg").write_bytes(data)
        signal.alarm(20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            view = images[0][0]  # of this file or of the next
        signal.alarm(0)
        assert view.dtype == torch.uint8 and view.shape[0] == 3

    check()


@every_script
@pytest.mark.shared
def test_any_bytes_as_an_image(script, tmp_path):
    check_images(script, tmp_path, BYTES)


@one_script
@pytest.mark.slow
def test_many_bytes_as_an_image(script, tmp_path):
    check_images(script, tmp_path, MANY_BYTES)


def check_run_folder(script, root, how, name):
    """open_run reads what is in the folder; a refused file stays as it was."""
    module, parts = importlib.import_module(script), {"model": torch.nn.Linear(3, 2)}
    args = tiny_args(script, run_dir=str(root / "run"))
    run = module.open_run(args, script, parts, 4096, None)
    state = {name: getattr(run, name) for name in run.kept}
    module.save_checkpoint(run.folder / "checkpoint.pt", **state, model=parts["model"].state_dict())
    path, seen = run.folder / name, set()
    whole = path.read_bytes()

    @how
    @given(spoilt([whole, whole[:200]]))
    def check(data):
        path.write_bytes(data)
        signal.alarm(20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert module.open_run(args, script, parts, 4096, None).step == 0
                seen.add("read")
            except SystemExit as stop:
                assert (
                    stop.code.startswith(f"{run.folder}") and "delete" in stop.code and "\n" not in stop.code
                )
                assert path.read_bytes() == data
                seen.add("refused")
        signal.alarm(0)

    check()
    assert "refused" in seen


@every_script
@pytest.mark.shared
@pytest.mark.parametrize("name", ["checkpoint.pt", "args.json"])
def test_any_bytes_in_a_run_folder(script, tmp_path, name):
    check_run_folder(script, tmp_path, BYTES, name)


@every_script
@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.pt", "args.json"])
def test_many_bytes_in_a_run_folder(script, tmp_path, name):
    check_run_folder(script, tmp_path, MANY_BYTES, name)


CSV = b"path,label\na.png,cat\nb.png,dog\nc/d.png,cat\n"


def check_csv(root, how):
    module = importlib.import_module("eval_linear")
    for name in ("a.png", "b.png"):
        (root / name).touch()

    @how
    @given(spoilt([CSV, CSV[:30], b'"a.png","cat"\r\n"b.png","dog"\r\n', "a.png,\u00e9\n".encode("utf-16")]))
    def check(data):
        (root / "labels.csv").write_bytes(data)
        try:
            module.csv_rows(str(root), str(root / "labels.csv"))
        except SystemExit as stop:
            assert isinstance(stop.code, str) and "labels.csv" in stop.code

    check()


def test_any_bytes_as_labels(tmp_path):
    check_csv(tmp_path, BYTES)


@pytest.mark.slow
def test_many_bytes_as_labels(tmp_path):
    check_csv(tmp_path, MANY_BYTES)


def check_convert(root, how):
    module = importlib.import_module("convert")
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 3, 1, 1)}}, root / "a.pth")
    whole = (root / "a.pth").read_bytes()

    @how
    @given(spoilt([whole]))
    def check(data):
        (root / "a.pth").write_bytes(data)
        try:
            module.convert(module.Args(str(root / "a.pth"), to=str(root / "b.pt")))
        except SystemExit as stop:
            assert isinstance(stop.code, str) and "a.pth" in stop.code
        assert not (root / "b.pt").exists()

    check()


def test_any_bytes_as_a_published_checkpoint(tmp_path):
    check_convert(tmp_path, BYTES)


@pytest.mark.slow
def test_many_bytes_as_a_published_checkpoint(tmp_path):
    check_convert(tmp_path, MANY_BYTES)
