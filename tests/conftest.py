import ast
import atexit
import functools
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads of OpenMP cannot be forked

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PHOTOS = ROOT.parent / "shared/data/cifar10-photos"
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
# A training script is one that defines train(args); eval_linear.py and convert.py do not.
TRAINING = [
    path.stem
    for path in SCRIPTS
    if any(
        isinstance(node, ast.FunctionDef) and node.name == "train"
        for node in ast.parse(path.read_text()).body
    )
]
# Flags that make a run tiny, for scripts whose defaults are not tiny enough.
TINY = {
    "beit": {"tokens": 32, "tokenizer_dim": 8, "tokenizer_epochs": 1},
    "byol": {"hidden_dim": 64},
    "clip": {"text_depth": 1, "text_width": 64, "embed_dim": 64},
    "dino": {"out_dim": 64, "head_dim": 64, "local_crops": 2, "local_min_scale": 0.05},
    "dinov2": {"out_dim": 64, "head_dim": 64, "local_crops": 2, "local_min_scale": 0.05},
    "moco": {"bn_splits": 1},
    "moco_v3": {"hidden_dim": 64},
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def photos():
    """The real photos beside the checkout: required in CI, optional for users."""
    if not PHOTOS.is_dir():
        reason = f"{PHOTOS} is missing: these tests need the CIFAR-10 photos of shared/data"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return PHOTOS


def caption_all(folder):
    """captions.csv, of which clip.py learns: its images in the order in which Images has them."""
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    lines = [f"{path.relative_to(folder)},picture {path.stem}" for path in paths]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """40 small images without labels, in two levels of folders; and captions for clip.py."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        blocks = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        path = root / ("a" if i % 2 else "b/c") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks).resize((40, 36), Image.BICUBIC).save(path)
    caption_all(root)
    return root


@functools.cache
def tokenizer():
    """backbone.pt of a random tokenizer for beit.py, with about ten codes in use. So what all scripts promise
    is tested on its second stage, which is like their only one; test_beit.py tests the first."""
    import beit

    path = Path(tempfile.mkdtemp()) / "backbone.pt"
    atexit.register(shutil.rmtree, path.parent)
    torch.manual_seed(0)
    state = beit.DVAE(32, 16, 8, 2).state_dict()
    state["encoder.4.bias"] *= 0
    torch.save({"state_dict": state}, path)
    return str(path)


def tiny_flags(script, **flags):
    """Flags of a run of 20 steps on `folder`: 4 epochs of 5 batches of 8 images."""
    flags = (
        {"image_size": 32, "epochs": 4, "batch_size": 8, "workers": 0, "log_every": 1}
        | TINY.get(script, {})
        | flags
    )
    if script == "beit":
        flags = {"dvae": tokenizer()} | flags
    if script == "moco":  # a multiple of the batch
        flags = {"queue_size": 8 * (flags["batch_size"] or 1)} | flags
    return {"warmup_epochs": 1} | flags


def tiny_args(script, **flags):
    return importlib.import_module(script).Args(**tiny_flags(script, **flags))


def at_each_step(module, patch, action):
    """action(step), from 0, near the top of each step: where its random numbers are asked for, or in clip.py,
    which has none, its learning rate."""
    name, place = ("cosine_schedule", 0) if module.__name__ == "clip" else ("seeded", 2)
    call = getattr(module, name)

    def asked(*given, **options):
        if place == 0 or given[0] == 3:
            action(given[place])
        return call(*given, **options)

    patch.setattr(module, name, asked)


def command_line(script, **flags):
    """The same flags as words of a command."""
    words = [sys.executable, str(ROOT / f"{script}.py")]
    for name, value in tiny_flags(script, **flags).items():
        dashed = name.replace("_", "-")
        words += (
            [f"--{dashed}" if value else f"--no-{dashed}"]
            if isinstance(value, bool)
            else [f"--{dashed}", str(value)]
        )
    return words


def features_of(backbone, x):
    """What eval_linear.py's Backbone gives for images that are normalised already."""
    return backbone((x * backbone.std + backbone.mean) * 255)


def load(path):
    return torch.load(path, weights_only=True)


def metrics_of(folder):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith("perf/")} for line in lines]


def tensors_of(state, prefix=""):
    """{path: tensor} of all tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else ()
    items = enumerate(state) if isinstance(state, (list, tuple)) else items
    found = [tensors_of(value, f"{prefix}/{key}") for key, value in items]
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


def shaken(model, generator, size=0.1):
    """With noise on every parameter and statistic, so that what starts at 0 or 1 cannot hide."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor += noise.abs() if name.endswith("running_var") else noise
    return model.eval()


def stopped(call, match):
    """call() must end with SystemExit and one short line that matches; returns it."""
    with pytest.raises(SystemExit) as stop:
        call()
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message and len(message) < 400, message
    assert re.search(match, message), message
    return message


def refused(script, match, **flags):
    """train() with these flags must end so."""
    return stopped(lambda: importlib.import_module(script).train(tiny_args(script, **flags)), match)


def run(words, timeout=240, **options):
    options = {"capture_output": True, "text": True, "timeout": timeout} | options
    return subprocess.run([str(word) for word in words], **options)


class Forked:
    """n processes of one training, as torchrun starts them but at the price of a fork: each calls
    function(rank), with all that the test has patched. end() -> returncode, stdout, stderr, result."""

    def __init__(self, function, n=1):
        self.folder = Path(tempfile.mkdtemp())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if n > 1 else {}
        self.pids = []
        for rank in range(n):
            pid = os.fork()
            if not pid:
                self.call(function, rank, world | ({"RANK": rank, "LOCAL_RANK": rank} if world else {}))
            self.pids.append(pid)

    def call(self, function, rank, environment):
        os.setsid()
        signal.alarm(100)  # it hangs
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
        os.environ.update({name: str(value) for name, value in environment.items()})
        for number, name in enumerate((os.devnull, self.folder / f"{rank}.out", self.folder / f"{rank}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(i, "rw"[i > 0], buffering=1, closefd=False) for i in range(3)
        )
        code = 1
        try:
            torch.save(function(rank), self.folder / f"{rank}.pt")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0  # what Python makes of it
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    def end(self):
        ends = []
        for rank, pid in enumerate(self.pids):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out, err = ((self.folder / f"{rank}.{name}").read_text() for name in ("out", "err"))
            path = self.folder / f"{rank}.pt"
            result = torch.load(path, weights_only=False) if path.exists() else None
            ends.append(SimpleNamespace(returncode=code, stdout=out, stderr=err, result=result))
        shutil.rmtree(self.folder)
        return ends


def in_processes(function, n=2):
    """What function(rank) returns in each of n processes; all must succeed."""
    ends = Forked(function, n).end()
    assert not any(end.returncode for end in ends), "\n".join(end.stdout + end.stderr for end in ends)
    return [end.result for end in ends]
