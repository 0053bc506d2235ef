# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "tyro", "tensorboard", "tqdm"]
# ///
r"""BYOL: learn features by predicting what a moving average of oneself sees in another view; no negatives.

Paper: Grill et al. 2020, arXiv 2006.07733; where paper and official JAX code differ, the code.
The online network f, g turns view v into a projection, and a predictor q into a guess p = q(g(f(v))) of the
projection z' of the other view v' by the target network, whose weights are a moving average (Eq. 1, 2):
  L = |p / |p| - z' / |z'||^2 = 2 - 2 cos(p, z'), plus the same with the views exchanged
A constant would give L = 0. What keeps it away: the predictor on one side only, no gradient into the target,
and its slowness. --no-predictor, --no-stop-gradient and --momentum 0 take each away.

Demo:   python byol.py
Photos: python byol.py --data photos/ --image-size 128 --epochs 200 --batch-size 256 --optimizer lars \
            --base-lr 2 --weight-decay 1e-6 --momentum 0.99 --blurs 1 0.1 --workers 8
Paper:  torchrun --nnodes 4 --nproc-per-node 8 byol.py --data imagenet/ --image-size 224 --arch resnet50 \
            --blurs 1 0.1 --min-scale 0.08 --epochs 1000 --batch-size 4096 --optimizer lars --base-lr 0.2 \
            --weight-decay 1.5e-6 --warmup-epochs 10 --momentum 0.996 --hidden-dim 4096 --zero-init

Differs from the official code: torchvision's ResNets and PyTorch's initialisation; the target starts as a
copy of the online network; no classifier beside it; brightness and contrast as in all PyTorch versions;
antialiased resizing, torchvision's crops; one order of colours a batch, not an image; reflected borders of
blur; an epoch, and so the schedule, drops its last incomplete batch. Several processes give the loss and
gradient of one, but for BatchNorm: synchronised on GPUs, as in the paper, each process's own on CPUs.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import random
import time
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import v2
from tqdm import tqdm

# --- Args ---------------------------------------------------------------------------------------------------
Pair, Quadruple = tuple[float, float], tuple[float, float, float, float]


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.08)
    jitter: Quadruple = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation, hue (paper: the same)
    blurs: Pair = (0.0, 0.0)  # probability of Gaussian blur of the first, the second view (paper: 1 0.1)
    solarize: float = 0.2  # probability of solarization (paper: 0.2, of the second view)
    workers: int = 2  # processes that read images, for each training process
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"  # encoder (paper: resnet50)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 10 x the work
    zero_init: bool = False  # residual branches start at 0; slower on small images (paper: off, its code on)
    hidden_dim: int = 1024  # hidden layer of projector and predictor (paper: 4096)
    proj_dim: int = 256  # width of z
    momentum: float = 0.98  # of the moving average (paper: 0.996, rising to 1 as here; 0 collapses: 0.3 %)
    predictor: bool = True  # without, online and target agree on a constant: watch it (paper: 0.1 to 0.2 %)
    stop_gradient: bool = True  # without, the target is the online network, which gets its gradient: watch it
    epochs: int = 12  # passes over the data (paper: 40 to 1000)
    batch_size: int = 64  # images per step, of all processes together (paper: 4096)
    optimizer: Literal["sgd", "lars"] = "sgd"  # sgd: Nesterov; momentum 0.9 in both (paper: lars)
    base_lr: float = 0.03  # times batch / 256 is the learning rate (paper: 0.2)
    weight_decay: float = 2e-3  # strength of weight decay (paper: 1.5e-6, not on biases and norms)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 10)
    init: str = ""  # backbone.pt that the encoder starts from, of convert.py or an earlier run
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere
    compile: bool = False  # torch.compile the model
    run_dir: str = ""  # default: runs/METHOD, and a hash of the flags that differ from the defaults
    restart: bool = False  # begin anew in a run folder that is in use
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps


# --- Augmentation -------------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_crop(size, min_scale, max_scale=1.0):
    """In the worker: random resized crop and flip of a uint8 image (C, H, W) -> (C, size, size)."""
    crop = v2.RandomResizedCrop(size, (min_scale, max_scale), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def draw_numbers(shape, jitter, blur, solarize, generator, chance=0.8):
    """Random numbers of augment for `shape` images, (*shape, 7), and its order of colours: factor of
    brightness, contrast, saturation; turns of hue; gray 0 or 1; sigma of blur, 0: none; solarize 0 or 1.
    jitter: strength of the first four, applied by chance; blur, solarize: probability, one or one a view."""
    u, neutral = torch.rand((*shape, 9), generator=generator), torch.tensor([1.0, 1, 1, 0])
    low, high = (neutral - torch.tensor(jitter)).clamp(min=neutral - 1), neutral + torch.tensor(jitter)
    factors = torch.where(u[..., 4:5] < chance, torch.lerp(low, high, u[..., :4]), neutral)
    sigma = torch.where(u[..., 5] < torch.tensor(blur), 0.1 + 1.9 * u[..., 6], 0.0)
    others = torch.stack([u[..., 7] < 0.2, sigma, u[..., 8] < torch.tensor(solarize)], dim=-1)
    numbers = torch.cat([factors, others], dim=-1)
    return numbers, [*torch.randperm(4, generator=generator).tolist(), 4]


def shift_hue(images, turns):
    """Turn the hue of RGB images in [0, 1] by turns (B, 1, 1, 1), as a round trip through HSV would."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    sixths = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sixths = torch.where(value == red, green - blue, sixths) / chroma.clamp(min=1e-8)
    k = (torch.arange(5, 0, -2, device=images.device).view(3, 1, 1) + sixths + 6 * turns) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(images, sigma, radius):
    """Blur with a sigma (B, 1, 1, 1) per image, 0: not at all, and a kernel of 2 radius + 1 pixels."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma.clamp(min=1e-3)) ** 2, dim=-1).repeat_interleave(3, dim=0)
    x = images.flatten(0, 1)[None]  # (1, 3 B, H, W): each channel of each image is a group
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), kernel, groups=len(kernel))
    x = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="reflect"), kernel.mT, groups=len(kernel))
    return x.view_as(images)


def augment(images, numbers, order, blur_radius):
    """On the device: uint8 (B, 3, H, W) -> normalised, each image by its numbers (B, 7) of draw_numbers; with
    the results of torchvision's adjust_* functions. Uses shift_hue, gaussian_blur."""
    x = images.float() / 255
    gray_of = v2.functional.rgb_to_grayscale
    brightness, contrast, saturation, hue, gray, sigma, solarize = numbers.view(-1, 7, 1, 1, 1).unbind(1)
    operations = (
        lambda x: x * brightness,
        lambda x: torch.lerp(gray_of(x).mean(dim=(2, 3), keepdim=True), x, contrast),
        lambda x: torch.lerp(gray_of(x), x, saturation),
        lambda x: shift_hue(x, hue),
        lambda x: torch.where(gray > 0, gray_of(x), x),
    )
    for i in order:
        x = operations[i](x).clamp(0, 1)
    if blur_radius:
        x = gaussian_blur(x, sigma, blur_radius)
    x = torch.where((solarize > 0) & (x >= 0.5), 1 - x, x)
    return torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)


# --- Model --------------------------------------------------------------------------------------------------
def resnet(arch, stem):
    """torchvision's ResNet without its classifier, images (B, 3, H, W) -> h (B, D); and D."""
    net = getattr(torchvision.models, arch)()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


def head(in_dim, hidden_dim, out_dim):
    """Projector or predictor, (B, in_dim) -> (B, out_dim); official: no BatchNorm, no bias at its end."""
    layers = nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim, bias=False))


class BYOL(nn.Module):
    """Online and target network, each backbone and projector, and predictor: images (B, 3, H, W) -> the
    online prediction and projection (B, proj_dim) and feature (B, D). Uses resnet, head."""

    def __init__(self, arch="resnet50", stem="imagenet", proj_dim=256, hidden_dim=4096, zero_init=True):
        super().__init__()
        backbone, dim = resnet(arch, stem)
        self.online = nn.Sequential(OrderedDict(backbone=backbone, projector=head(dim, hidden_dim, proj_dim)))
        self.predictor = head(proj_dim, hidden_dim, proj_dim)
        for block in backbone.modules() if zero_init else ():
            if isinstance(block, (BasicBlock, Bottleneck)):
                nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, images):
        feature = self.online.backbone(images)
        projection = self.online.projector(feature)
        return self.predictor(projection), projection, feature


# --- Loss ---------------------------------------------------------------------------------------------------
def byol_loss(prediction, target):
    """Mean of 2 - 2 cos of predictions (B, D) and target projections (B, D): one direction of Eq. 2."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=1)).mean()


# --- Optimiser ----------------------------------------------------------------------------------------------
class LARS(torch.optim.Optimizer):
    """Momentum SGD with lr x trust_coefficient x |w| / |g| for each tensor, g with decay (arXiv 1708.03888).
    lr_in_momentum: v = m v + lr g, w -= v (SimCLR); else v = m v + g, w -= lr v (BYOL). Biases and norms
    (ndim <= 1) take plain momentum steps without decay."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0, trust_coefficient=1e-3, lr_in_momentum=True):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust": trust_coefficient, "lr_inside": lr_in_momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            inside, outside = (group["lr"], 1.0) if group["lr_inside"] else (1.0, group["lr"])
            for w, g in ((w, w.grad) for w in group["params"] if w.grad is not None):
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    w_norm, g_norm = w.norm(), g.norm()
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                v = self.state[w]["momentum_buffer"]
                v.mul_(group["momentum"]).add_(g, alpha=inside)
                w.sub_(v, alpha=outside)


@torch.no_grad()
def momentum_update(encoder_q, encoder_k, m):
    """k <- m k + (1 - m) q for all parameters of encoder_k (key, target, teacher), not for buffers."""
    for q, k in zip(encoder_q.parameters(), encoder_k.parameters(), strict=True):
        k.lerp_(q, 1 - m)


# --- Monitor ------------------------------------------------------------------------------------------------
def gather(rows):
    """Rows (B, ...) of this process -> of all, by rank; with gradient, the sum of what all processes send."""
    if not dist.is_initialized():
        return rows
    parts = [*rows.new_empty(dist.get_world_size(), *rows.shape)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows  # the only part with a way back
    gathered = torch.cat(parts)
    if gathered.requires_grad:
        gathered.register_hook(lambda grad: (total := grad.clone(), dist.all_reduce(total))[0])
    return gathered


@torch.no_grad()
def collapse_metrics(features, center=False):
    """How much room features (B, D) take, of all processes together (all must call it). Uses gather.
    feature_std: sqrt(D) x mean std of rows of length 1; 1 isotropic, 0 all alike. spread: 1 - |mean row|^2.
    effective_rank: RankMe (arXiv 2210.02885), directions in use of min(rows, D); center departs, for h."""
    z = gather(features.detach().float())
    z = (z.cpu() if z.is_mps else z).double()
    unit = F.normalize(z, dim=1)
    std, spread = (
        z.shape[1] ** 0.5 * unit.std(dim=0, correction=min(1, len(unit) - 1)).mean(),
        1 - unit.mean(dim=0).square().sum(),
    )
    centered = z - z.mean(dim=0) if center else z
    rank = torch.ones(())  # of nearly constant rows, whose rounding noise would have a high one
    if centered.norm() > 1e-3 * z.norm():
        gram = centered.T @ centered if len(z) > z.shape[1] else centered @ centered.T
        sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
        p = sigma / sigma.sum() + 1e-7
        rank = torch.exp(-(p * p.log()).sum())
    return {"feature_std": std.item(), "spread": spread.item(), "effective_rank": rank.item()}


def collapse_alarm(state, step, armed_after, problems):
    """1.0 from the third log point in a row with a problem, {words: holds}, printed once, to the third
    without; counts after step armed_after. state: {} at first, kept in the checkpoint."""
    if step > armed_after:
        last = state["last"] = [*state.get("last", ()), any(problems.values())][-3:]
        if last == [True] * 3 and not state.get("rings"):
            tqdm.write(f"COLLAPSE at step {step}: " + " | ".join(w for w in problems if problems[w]))
        state["rings"] = last == [True] * 3 or (state.get("rings", False) and last != [False] * 3)
    return float(state.get("rings", False))


# --- Plumbing -----------------------------------------------------------------------------------------------
WORLD = dict(house=0x183C7EFFFF7E6666, tree=0x183C7E3C7EFF1818, car=0x3C2CFFFFFF6600, boat=0x101814161EFF7E3C)
WORLD |= dict(cat=0x81C3FF99FF7E3C18, mushroom=0x3C7EFFFF18181C3C, cup=0x00FCFEFEFCFC7800)
WORLD |= dict(key=0x1C22221C08180C08, bird=0x060FC67EFE7C1018, flower=0x185A3C185ADB7E18)  # 8 x 8 bitmaps
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
NOT_TRAINING = "workers device compile run_dir restart log_every checkpoint_every picture_every".split()


def demo_image(index):
    """Photo `index` of a small built-in world: 48 x 48 RGB, its class 0..9, its caption."""
    rng = random.Random(index)
    label, scale, light = rng.randrange(10), rng.uniform(0.35, 0.9), rng.uniform(0.35, 1.0)
    name, bitmap = list(WORLD.items())[label]
    thing = Image.frombytes("1", (8, 8), bitmap.to_bytes(8, "big")).convert("L")
    thing = thing.resize((round(48 * scale),) * 2, Image.BICUBIC)
    thing = thing.rotate(rng.uniform(-25, 25), Image.BICUBIC, expand=True)
    x, y = (rng.randint(*sorted((0, 48 - side))) for side in thing.size)
    image = Image.new("RGB", (48, 48), (180, 205, 235))
    image.paste(((140, 70, 50), (50, 105, 60), (95, 75, 150))[label % 3], (x, y), thing)
    image = Image.blend(Image.new("RGB", (48, 48)), image, light)
    noise = Image.frombytes("L", (48, 48), rng.randbytes(48 * 48)).convert("RGB")
    size, side = "big" if scale > 0.625 else "small", "left" if x + thing.width / 2 < 24 else "right"
    caption = f"a {size} {name} on the {side} {'by day' if light > 0.675 else 'at dusk'}"
    return Image.blend(image, noise, 0.25), label, caption


def read_image(path, image_size, min_scale):
    """Any photo as upright 8-bit RGB. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size if even then the
    smallest crop (min_scale of the area, aspect 3/4) has image_size pixels a side."""
    Image.MAX_IMAGE_PIXELS = None  # phones make 200 megapixels
    with open(path, "rb") as file:  # by its path a raw TIFF would be mapped into memory, and turned wrongly
        image = Image.open(file)
        shrink = max(1, min(*image.size, math.sqrt(0.75 * min_scale * math.prod(image.size))) / image_size)
        image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257)  # 16 bits, which convert() would clip
    return image.convert("RGB")


class Images(Dataset):
    """Images of --data, no labels: item epoch x len + index is a list of views, random by that key alone."""

    def __init__(self, data, views, seed, image_size, min_scale, rank):
        self.views, self.seed, self.reading, ignored = views, seed, (image_size, min_scale), 0
        if data == "demo":
            self.items = [demo_image(index) for index in range(4096)]
        elif os.path.isdir(data):
            root = os.path.join(data, "train" if os.path.isdir(os.path.join(data, "train")) else "")
            walk = os.walk(root, followlinks=True)
            files = sorted(os.path.join(at, name) for at, _, names in walk for name in names)
            self.items = [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]
            ignored = len(files) - len(self.items)
        else:
            if rank:
                dist.barrier()  # the first process downloads, then the others read
            try:
                self.items = getattr(torchvision.datasets, data)("data", download=True)
            except Exception as error:  # no such name, no network
                raise SystemExit(f"--data {data}: no folder, no download ({error}). Give a folder, or demo")
            if dist.is_initialized() and not rank:
                dist.barrier()
        self.found = f"{len(self.items)} images in {data}, {ignored} other files ignored"

    def __getitem__(self, key):
        for number in range(key, key + 100):
            item = index = number % len(self.items)
            try:
                item = self.items[index]
                image = read_image(item, *self.reading) if isinstance(item, str) else item[0].convert("RGB")
                torch.default_generator.manual_seed(hash((self.seed, 1, key)) % 2**32)
                pixels = v2.functional.pil_to_tensor(image)  # resizes 3 x as fast as PIL, alike to 2 of 255
                return self.sample(index, pixels)
            except Exception as error:  # whatever a decoder raises
                warnings.warn(f"{item} cannot be read, the next one takes its place: {error}", stacklevel=2)
        raise OSError(f"--data: 100 files in a row cannot be read, the last is {item}")

    def sample(self, index, pixels):
        return [view(pixels) for view in self.views]

    def batches(self, batch_size, step, epochs, rank, world):
        """Keys of this process's slice of each global batch from `step` on, dropping an epoch's rest."""
        n = len(self.items)
        start, skip = divmod(step, n // batch_size)
        for epoch in range(start, epochs):
            shuffle = torch.Generator().manual_seed(hash((self.seed, 2, epoch)) % 2**32)
            for batch in torch.randperm(n, generator=shuffle).split(batch_size)[skip : n // batch_size]:
                yield (epoch * n + batch.chunk(world)[rank]).tolist()
            skip = 0


def check_flags(args, may_be_zero, **at_most):
    """SystemExit unless all numbers are above 0, or 0 if in may_be_zero, and at most at_most[name]."""
    for name, value in asdict(args).items():
        least, limit = 0 if name in may_be_zero else 1e-12, 2**63 - 1 if name == "seed" else 1e99
        most = at_most.get(name, limit)
        numbers = [x for x in (value if isinstance(value, tuple) else [value]) if type(x) in (int, float)]
        if not all(least <= number <= most for number in numbers):
            allowed = ("above 0" if least else "0 or more") + (f", at most {most}" if most < 1e99 else "")
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must be {allowed}")


def start_processes(device, amp):
    """From torchrun's environment: rank, number of processes, device, autocast type (None: float32)."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    mps = torch.backends.mps.is_available() and world < 2  # gloo cannot gather its tensors
    here = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    kind = next(kind for kind in here if here[kind]) if device == "auto" else device
    if not here[kind]:
        raise SystemExit(f"--device {kind}: PyTorch finds none on this machine; use --device auto")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise SystemExit(f"process {local + 1} of this machine has no GPU; lower --nproc-per-node")
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    auto = "off" if kind != "cuda" else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[auto if amp == "auto" else amp]
    return rank, max(world, 1), torch.device(kind, local if kind == "cuda" else 0), dtype


def cosine_schedule(step, total, warmup, base, final=0.0):
    """From 0 in a straight line to base at step `warmup`, then in half a cosine to final at step `total`."""
    if step < warmup:
        return base * step / warmup
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def save_checkpoint(path, **state):
    """Write tensors and plain dicts in one step: a kill at any moment leaves the old file or the new one."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, method):
    """What save_checkpoint wrote, on the CPU; SystemExit if it is damaged or another method's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of zip, pickle or the disk
        state = {}
    if not isinstance(state, dict) or state.get("method") != method:
        raise SystemExit(f"{path} is damaged, or not of {method}: use another --run-dir, or --restart")
    return state


def load_encoder(model, prefix, path, rank):
    """Start the encoder, `prefix` in the model, from a backbone.pt (--init); SystemExit unless all of it
    matches. What stays as it was, heads and decoders, is printed."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        if not {"arch_args", "state_dict"} <= file.keys():
            raise ValueError("is no backbone.pt; convert.py makes one of published weights")
        state, given = file["state_dict"], file["arch_args"]
        given = given.get("num_heads", given.get("heads"))
        fresh, wrong = model.load_state_dict({prefix + k: v for k, v in state.items()}, strict=False)
    except Exception as error:  # no such file, no backbone.pt, other shapes
        raise SystemExit(f"--init {path}: {' '.join(str(error).split())[:300]}")
    heads = tuple(prefix + part for part in ("fc.", "head.", "decoder_", "mask_token", "lm_head.", "proj"))
    blocks = getattr(model.get_submodule(prefix.rstrip(".")), "blocks", None)
    if given and blocks and blocks[0].attn.heads != given:  # of the same shape, and another network
        wrong += [f"{given} heads"]
    wrong += [name for name in fresh if name.startswith(prefix) and not name.startswith(heads)]
    if wrong:
        raise SystemExit(f"--init {path}: {len(wrong)} do not fit this encoder: {', '.join(wrong[:4])}")
    if rank == 0:
        new = {name.removeprefix(prefix).split(".")[0] for name in fresh}
        print(f"--init {path}: new are {', '.join(sorted(new))}")


def export_backbone(folder, method, args, dim, weights, **arch_args):
    """backbone.pt: the encoder in public names and what its use takes. Uses save_checkpoint, MEAN, STD."""
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):  # a skipped float16 step
        raise SystemExit(f"{folder}: a weight is not finite, nothing is saved; lower the rate, or --amp off")
    info = {"method": method, "arch": args.arch, "arch_args": arch_args, "image_size": args.image_size}
    save_checkpoint(folder / "backbone.pt", **info, mean=MEAN, std=STD, feature_dim=dim, state_dict=weights)


def restore(parts, checkpoint, folder):
    """Give each of the parts its state in the checkpoint; SystemExit if one does not fit."""
    for name in (part for part in parts if checkpoint and checkpoint.get(part) != {}):  # {}: no scaler in use
        try:
            parts[name].load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError) as error:  # of another version of the file
            words = f"{folder}/checkpoint.pt does not fit ({' '.join(str(error).split())[:150]})"
            raise SystemExit(f"{words}: use another --run-dir, or --restart")


def name_images(run, data, batch_size, start, stop, why):
    """Write down the images of the steps after `start` up to `stop`; returns `why` and in which file."""
    batches = data.batches(batch_size, start, stop, 0, 1)
    steps = [(step, key % len(data.items)) for step in range(start + 1, stop + 1) for key in next(batches)]
    items = data.items if isinstance(data.items[0], str) else range(len(data.items))
    lines = "".join(f"{step}\t{items[index]}\n" for step, index in steps)
    try:
        (run / "not-finite.txt").write_text(lines, errors="surrogateescape")
    except OSError:  # a full disk must not hide the reason
        return f"step {stop}: {why}"
    return f"step {stop}: {why}. {run}/not-finite.txt names the images since step {start}"


def open_run(args, method, rank):
    """The run folder and the checkpoint in it, or {}; SystemExit if it holds another run."""
    flags = {"method": method} | {k: v for k, v in asdict(args).items() if k not in NOT_TRAINING}
    changed = {k: v for k, v in flags.items() if v != getattr(type(args), k, method)}
    mark = "-" + hashlib.sha1(json.dumps(changed).encode()).hexdigest()[:8] if changed else ""
    folder = Path(args.run_dir or f"runs/{method}{mark}")
    record, path = folder / "args.json", folder / "checkpoint.pt"
    try:
        if record.exists() and not args.restart:
            ours, new = json.loads(json.dumps(flags)), {k: getattr(type(args), k, None) for k in flags}
            held = json.loads(json.dumps(new)) | json.loads(record.read_text())  # flags newer than the run
            differ = [k for k in ours if held.get(k) != ours[k]]
            other = ", ".join(f"--{k.replace('_', '-')} {held.get(k)}" for k in differ)
            if other:
                raise SystemExit(f"{folder} holds a run with {other}: use another --run-dir, or --restart")
        checkpoint = load_checkpoint(path, method) if path.exists() and not args.restart else {}
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if args.restart:
                path.unlink(missing_ok=True)
            Path(f"{record}.tmp").write_text(json.dumps(flags | asdict(args), indent=1))
            os.replace(f"{record}.tmp", record)
            with open(folder / "metrics.jsonl", "a") as log:
                log.truncate(min(log.tell(), checkpoint.get("logged", 0)))  # what came after is done again
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{record}: {error}; use another --run-dir, or --restart")
    return folder, checkpoint


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Pretrain in the run folder, from its checkpoint if it has one; returns the metrics of the last step."""
    may_be_zero = "workers jitter blurs solarize momentum weight_decay warmup_epochs seed"
    at_most = dict.fromkeys(("min_scale", "blurs", "solarize", "momentum"), 1)
    check_flags(args, may_be_zero.split(), **at_most, warmup_epochs=args.epochs)
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = random_crop(args.image_size, args.min_scale)
    data = Images(args.data, (crop, crop), args.seed, args.image_size, args.min_scale, rank)
    if not 2 * world <= args.batch_size <= len(data.items) or args.batch_size % world:  # 2 for BatchNorm
        allowed = f"give a multiple of {world}, from {2 * world} to {data.found}"
        raise SystemExit(f"--batch-size {args.batch_size}: {allowed}")
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    peak_lr = args.base_lr * args.batch_size / 256
    torch.manual_seed(args.seed)
    model = BYOL(args.arch, args.stem, args.proj_dim, args.hidden_dim, args.zero_init)
    if args.init:
        load_encoder(model, "online.backbone.", args.init, rank)
        model.target.load_state_dict(model.online.state_dict())
    run, checkpoint = open_run(args, "byol", rank)
    if not args.predictor:
        model.predictor = nn.Identity()
    model = model.to(device, memory_format=torch.channels_last)  # twice as fast on CPUs
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = LARS(groups, peak_lr, lr_in_momentum=False)
    if args.optimizer == "sgd":  # fused leaves its first buffer unset where float16 overflows
        optimizer = torch.optim.SGD(groups, peak_lr, momentum=0.9, nesterov=True, fused=amp != torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
        model.target.compile()
    net = model
    if world > 1:  # no broadcast of buffers: it would write into those that the other view's gradient needs
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    blur_radius = args.image_size // 20 if any(args.blurs) else 0  # kernel of a tenth of the side
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. Run folder {run}, step {step} of {total}")
        print(f"{args.arch}, {amp or torch.float32}, {world} x {device}, effective learning rate {peak_lr:g}")
    bar = tqdm(total=total, initial=step, disable=rank > 0)
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for crops in loader:
            waited += time.perf_counter() - asked
            for group in optimizer.param_groups:
                group["lr"] = cosine_schedule(step, total, warmup, peak_lr)
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            shape, solarize = (args.batch_size, 2), (0.0, args.solarize)  # for all processes
            numbers, order = draw_numbers(shape, args.jitter, args.blurs, solarize, generator)
            numbers = numbers.chunk(world)[rank].to(device, non_blocking=True)
            views = [crop.to(device, non_blocking=True) for crop in crops]
            views = [augment(views[i], numbers[:, i], order, blur_radius) for i in range(2)]
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
            with torch.autocast(device.type, amp, enabled=amp is not None):
                p0, z0, h0 = net(views[0])  # one by one: BatchNorm of each view
                p1, z1, h1 = net(views[1])
                if args.stop_gradient:
                    with torch.no_grad():
                        t0, t1 = model.target(views[0]), model.target(views[1])
                else:
                    t0, t1 = z0, z1
            loss = byol_loss(p0, t1) + byol_loss(p1, t0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            step += 1
            logs = step == 1 or step % args.log_every == 0 or step == total
            saves = step % args.checkpoint_every == 0 or step == total
            if logs or saves:  # only here does a step wait for the device
                grad_norm = torch.stack([p.grad.norm() for p in trained]).norm()
                if not torch.isfinite(loss if scaler.get_scale() > 1 else loss + grad_norm):
                    why = f"loss {loss:g}, gradient {grad_norm:g}; lower --base-lr"
                    raise SystemExit(name_images(run, data, args.batch_size, logged, step, why))
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale  # float16 overflowed
            momentum = args.momentum and cosine_schedule(step - 1, total, 0, args.momentum, 1.0)
            momentum_update(model.online, model.target, momentum)  # after the step, as the official code
            bar.update()
            if logs:
                mean = gather(loss.detach()[None]).mean().item()
                projection = collapse_metrics(torch.cat([z0, z1]))
                target = collapse_metrics(torch.cat([t0, t1]))
                feature = collapse_metrics(torch.cat([h0, h1]), center=True)
                rank_z = projection["effective_rank"]
                first_rank = alarm.setdefault("first_rank", rank_z)
                low = rank_z < max(0.05 * min(2 * args.batch_size, args.proj_dim), 0.1 * first_rank)
                alike = min(projection["spread"], target["spread"]) < 0.01
                remedy = "keep the predictor and the stop-gradient, raise --momentum, lower --base-lr"
                problems = {
                    f"all projections point one way; {remedy}": alike,
                    f"projections fill {rank_z:.1f} directions; {remedy}": low,
                }
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": mean, "train/lr": group["lr"], "train/grad_norm": grad_norm.item()}
                metrics |= {f"monitor/{k}": v for k, v in feature.items()}
                metrics |= {f"monitor/projection_{k.split('_')[-1]}": v for k, v in projection.items()}
                metrics |= {"monitor/target_std": target["feature_std"], "byol/momentum": momentum}
                metrics["perf/images_per_second"] = args.batch_size * (step - logged) / (now - since)
                metrics["perf/data_wait"] = waited / (now - since)
                metrics["perf/skipped_steps"] = skipped  # since the last log
                logged, skipped, since, waited = step, 0, now, 0.0
                if rank == 0:
                    metrics["monitor/alarm"] = collapse_alarm(alarm, step, armed_after, problems)
                    for tag, value in metrics.items():
                        board.add_scalar(tag, value, step)
                    line = {"step": step, "epoch": (step - 1) // per_epoch}
                    line |= {tag: value for tag, value in metrics.items() if math.isfinite(value)}
                    with open(run / "metrics.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
                    std = projection["feature_std"]
                    bar.set_postfix_str(f"loss {mean:.3f} std {std:.2f} rank {rank_z:.0f}")
            if rank == 0 and step == 1:
                pairs = torch.stack(views, dim=1)[:32].flatten(0, 1).cpu()  # side by side
                pixels = pairs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                grid = torchvision.utils.make_grid(pixels.clamp(0, 1))
                torchvision.utils.save_image(grid, run / "views.png")
                board.add_image("views", grid, step)
            if saves and rank == 0:
                weights = model.online.backbone.state_dict()
                export_backbone(run, "byol", args, h0.shape[1], weights, stem=args.stem)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "byol", "step": step, "metrics": metrics, "alarm": alarm}
                save_checkpoint(run / "checkpoint.pt", **state, logged=os.path.getsize(run / "metrics.jsonl"))
            asked = time.perf_counter()
    except (KeyboardInterrupt, OSError) as error:  # a worker's error comes behind its traceback
        reason = (str(error) or "interrupted").splitlines()[-1]
        raise SystemExit(f"{reason} (step {step}); the same command, without --restart, continues")
    finally:
        bar.close()
        if rank == 0:
            with contextlib.suppress(OSError):  # a full disk, of which the message speaks
                board.close()
    if rank == 0:
        print(f"{run}/backbone.pt: " + ", ".join(f"{tag} {value:.4g}" for tag, value in metrics.items()))
    if world > 1:
        dist.barrier()  # in torch 2.4 gloo may wait for ever in the next line
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
