# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "tyro", "tensorboard", "tqdm"]
# ///
r"""MoCo v1 and v2: find the key of the same image among a queue of keys of earlier images.

Papers: He et al. 2019, arXiv 1911.05722 (v1); Chen et al. 2020, arXiv 2003.04297 (v2: a two-layer head, other
colours, blur, a cosine schedule, tau 0.2); where papers and official PyTorch code differ, the code.
A query encoder maps a view to q, a key encoder, its slow moving average, the other view to k_+; all of length
1. The negatives k_1 .. k_K are the keys of the last batches, kept in a queue (Eq. 1):
  L = -log exp(q.k_+ / tau) / (exp(q.k_+ / tau) + sum_i exp(q.k_i / tau))
They keep it from collapsing; their number does not depend on the batch, so one GPU is enough.

Demo:   python moco.py
Photos: python moco.py --data photos/ --image-size 128 --epochs 200 --queue-size 2048 --batch-size 256 \
            --workers 8
Paper:  torchrun --nproc-per-node 8 moco.py --data imagenet/ --image-size 224 --arch resnet50 --blur 0.5 \
            --min-scale 0.2 --epochs 200 --batch-size 256 --base-lr 0.03 --queue-size 65536 \
            --momentum 0.999 --warmup-epochs 0 --workers 4

Differs from the official code: it runs on one device or a CPU, where BatchNorm takes the batch in 8 parts, as
the official CIFAR-10 demo; bicubic, antialiased crops; one order of colours a batch, not an image; the flip
comes first; blur with a kernel of a tenth of the side; the learning rate follows the batch. Several processes
give the loss, keys and queue of one, but for BatchNorm, whose parts hold other images.
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
from torchvision.transforms import v2
from tqdm import tqdm


# --- Args ---------------------------------------------------------------------------------------------------
@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    recipe: Literal["v1", "v2"] = "v2"  # head, colours, temperature, schedule, each unless its flag is given
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.2)
    colours: Literal["recipe", "v1", "v2"] = "recipe"  # v1: always, after gray; v2: as SimCLR, weaker
    blur: float = 0.0  # probability of Gaussian blur (paper: v1 0, v2 0.5; not set by the recipe)
    workers: int = 2  # processes that read images, for each training process
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"  # encoder (paper: resnet50)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 10 x the work
    mlp: Literal["recipe", "on", "off"] = "recipe"  # head of two layers, not one (paper: v1 off, v2 on)
    proj_dim: int = 128  # width of z
    queue_size: int = 512  # K, number of negatives (paper: 65536)
    momentum: float = 0.99  # of the moving average (paper: 0.999, constant)
    temperature: float = 0.0  # tau (paper: v1 0.07, v2 0.2; 0: that of the recipe)
    symmetric: bool = False  # the sum of the losses of both views as query (paper: off)
    shuffle: bool = True  # without, BatchNorm tells a query its key: the loss falls, features stay poor
    bn_splits: int = 8  # parts of the whole batch with their own BatchNorm statistics (paper: 8 GPUs)
    negatives: bool = True  # without, only attraction is left and z collapses to a few directions: watch it
    epochs: int = 12  # passes over the data (paper: 200 or 800)
    batch_size: int = 128  # images per step, of all processes together (paper: 256)
    base_lr: float = 0.03  # times batch / 256 is the learning rate (paper: 0.03)
    schedule: Literal["recipe", "steps", "cosine"] = "recipe"  # steps: a tenth at 60 and 80 % of the epochs
    weight_decay: float = 1e-4  # strength of weight decay (paper: 1e-4, of all parameters)
    warmup_epochs: float = 1.0  # linear from 0 (paper: none)
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


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that in training takes image n of (N, C, H, W) with those of the same n mod `splits`, like
    so many GPUs; running statistics are the mean over the parts."""

    splits = 1

    def forward(self, x):
        if self.splits == 1 or not self.training:
            return super().forward(x)
        state = self.running_mean, self.running_var, self.weight, self.bias
        mean, var, weight, bias = (tensor.repeat(self.splits) for tensor in state)
        parts = x.reshape(-1, self.splits * x.shape[1], *x.shape[2:])
        parts = F.batch_norm(parts, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(self.splits, -1).mean(dim=0))
        self.running_var.copy_(var.view(self.splits, -1).mean(dim=0))
        self.num_batches_tracked += 1
        return parts.reshape_as(x)


class MoCo(nn.Module):
    """Query and key encoder, queue (dim, queue_size): images (B, 3, H, W) -> q, or with keys k (B, dim) of
    length 1, and feature (B, D). splits: see SplitBatchNorm. Uses resnet, SplitBatchNorm."""

    def __init__(self, arch="resnet50", stem="imagenet", dim=128, queue_size=65536, mlp=True, splits=1):
        super().__init__()
        self.encoder_q, width = resnet(arch, stem)
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)]
        self.encoder_q.fc = nn.Sequential(*hidden, nn.Linear(width, dim)) if mlp else nn.Linear(width, dim)
        for layer in self.encoder_q.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__, layer.splits = SplitBatchNorm, splits
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, images, keys=False):
        *body, fc = (self.encoder_k if keys else self.encoder_q).children()
        for layer in body:
            images = layer(images)
        feature = images.flatten(1)
        return F.normalize(fc(feature).float(), dim=1), feature


# --- Loss ---------------------------------------------------------------------------------------------------
def queue_logits(q, k, queue):
    """Cosines (B, 1 + K) of queries (B, D) with their keys (B, D), in column 0, and the queue (D, K)."""
    return torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue], dim=1)


def info_nce(q, k, queue, temperature, negatives=True):
    """InfoNCE (Eq. 1) of q and k (B, D) with the queue (D, K) from before this step, all of length 1: mean
    over the queries here, gradient into q alone. Uses queue_logits."""
    logits = queue_logits(q.float(), k.detach().float(), queue.detach().float()) / temperature
    if not negatives:
        return -logits[:, 0].mean()
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
def enqueue(queue, queue_ptr, keys):
    """Write keys (B, D) of all processes over the oldest columns of the queue (D, K), in place."""
    if queue.shape[1] % len(keys):
        raise ValueError(f"a queue of {queue.shape[1]} is no multiple of {len(keys)} keys")
    queue[:, queue_ptr + torch.arange(len(keys), device=queue.device)] = keys.T
    queue_ptr.copy_((queue_ptr + len(keys)) % queue.shape[1])


# --- Optimiser ----------------------------------------------------------------------------------------------
def moco_schedule(epoch, epochs, base, kind):
    """Learning rate of epoch 0 .. epochs - 1: steps, a tenth from 60 and 80 % of them on (v1), or cosine."""
    if kind == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return base * 0.1 ** sum(epoch >= share * epochs for share in (0.6, 0.8))


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
    may_be_zero = "temperature workers blur momentum weight_decay warmup_epochs seed"
    at_most = dict.fromkeys(("min_scale", "blur", "momentum"), 1)
    check_flags(args, may_be_zero.split(), **at_most, warmup_epochs=args.epochs)
    new_keys = args.batch_size * (2 if args.symmetric else 1)
    if args.queue_size % new_keys:
        raise SystemExit(f"--queue-size {args.queue_size}: give a multiple of {new_keys}, the keys of a step")
    recipe = {"v1": ("off", "v1", "steps", 0.07), "v2": ("on", "v2", "cosine", 0.2)}[args.recipe]
    given = zip((args.mlp, args.colours, args.schedule, args.temperature), recipe, strict=True)
    mlp, colours, kind, temperature = (other if flag in ("recipe", 0) else flag for flag, other in given)
    rank, world, device, amp = start_processes(args.device, args.amp)
    splits = max(1, args.bn_splits // world)
    crop = random_crop(args.image_size, args.min_scale)
    data = Images(args.data, (crop, crop), args.seed, args.image_size, args.min_scale, rank)
    multiple = 2 * world * splits  # 2 at least for BatchNorm
    if args.batch_size > len(data.items) or args.batch_size % multiple:
        allowed = f"give a multiple of {multiple}, at most {data.found} (--bn-splits {args.bn_splits})"
        raise SystemExit(f"--batch-size {args.batch_size}: {allowed}")
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    peak_lr = args.base_lr * args.batch_size / 256
    torch.manual_seed(args.seed)
    model = MoCo(args.arch, args.stem, args.proj_dim, args.queue_size, mlp == "on", splits)
    if args.init:
        load_encoder(model, "encoder_q.", args.init, rank)
        model.encoder_k.load_state_dict(model.encoder_q.state_dict())
    run, checkpoint = open_run(args, "moco", rank)
    layout = torch.contiguous_format if splits > 1 else torch.channels_last  # twice as fast, not when split
    model = model.to(device, memory_format=layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"momentum": 0.9, "weight_decay": args.weight_decay}  # biases and norms decay too
    optimizer = torch.optim.SGD(trained, peak_lr, **options, fused=amp != torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
    net = model
    if world > 1:  # the queue is the same everywhere, statistics of BatchNorm are each process's own
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    blur_radius = args.image_size // 20 if args.blur else 0
    jitter, chance = ((0.4,) * 4, 1.0) if colours == "v1" else ((0.4, 0.4, 0.4, 0.1), 0.8)
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. Run folder {run}, step {step} of {total}")
        print(f"{args.arch}, {amp or torch.float32}, {world} x {device}, effective learning rate {peak_lr:g}")
        if args.queue_size > per_epoch * new_keys / 2:  # of share f, in f^2 / 2 of the queries
            print(f"--queue-size {args.queue_size} is over half of an epoch: images are their own negatives")

    def encode_keys(images, order):
        """Keys of all processes (N, D), each encoded among others than its query: BatchNorm would tell."""
        shuffled = gather(images)[order.chunk(world)[rank]].contiguous(memory_format=layout)
        with torch.no_grad(), torch.autocast(device.type, amp, enabled=amp is not None):
            key, _ = model(shuffled, keys=True)
        return gather(key)[order.argsort()]

    bar = tqdm(total=total, initial=step, disable=rank > 0)
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for crops in loader:
            waited += time.perf_counter() - asked
            for group in optimizer.param_groups:
                group["lr"] = moco_schedule(step // per_epoch, args.epochs, peak_lr, kind)
                group["lr"] *= min(1.0, step / warmup) if warmup else 1.0
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            numbers, order = draw_numbers((args.batch_size, 2), jitter, args.blur, 0.0, generator, chance)
            order = [4, *order[:4]] if colours == "v1" else order  # gray comes first
            numbers = numbers.chunk(world)[rank].to(device, non_blocking=True)
            places = torch.randperm(args.batch_size, generator=generator)
            places = (places if args.shuffle else places.sort().values).to(device, non_blocking=True)
            views = [crop.to(device, non_blocking=True) for crop in crops]
            views = [augment(views[i], numbers[:, i], order, blur_radius) for i in range(2)]
            views = [view.contiguous(memory_format=layout) for view in views]
            momentum_update(model.encoder_q, model.encoder_k, args.momentum)  # before the keys
            loss, queue, new = 0.0, model.queue.clone(), []
            for query, key in ((0, 1), (1, 0)) if args.symmetric else ((0, 1),):
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    q, h = net(views[query])
                new.append(encode_keys(views[key], places))
                k = new[-1].chunk(world)[rank]
                loss = loss + info_nce(q, k, queue, temperature, args.negatives)
            enqueue(model.queue, model.queue_ptr, torch.cat(new[::-1]))
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
            bar.update()
            if logs:
                logits = queue_logits(q.detach(), k, queue) / temperature
                accuracy = (logits[:, 0] > logits[:, 1:].amax(dim=1)).float().mean()  # a tie is no success
                gap = math.log(logits.shape[1]) - (logits.logsumexp(dim=1) - logits[:, 0]).mean()
                values = torch.stack([loss.detach(), accuracy, gap])
                mean, accuracy, gap = gather(values[None]).mean(dim=0).tolist()
                projection, feature = collapse_metrics(q), collapse_metrics(h, center=True)
                candidates, rank_z = logits.shape[1], projection["effective_rank"]
                first_rank = alarm.setdefault("first_rank", rank_z)
                low = rank_z < max(0.05 * min(args.batch_size, args.proj_dim), 0.1 * first_rank)
                chance_level = accuracy < 2 / candidates and gap < 0.01 * math.log(candidates)
                problems = {
                    "all z point one way; keep the negatives, lower --base-lr": projection["spread"] < 0.01,
                    f"z fills {rank_z:.1f} directions; keep negatives, raise --momentum, lower the rate": low,
                    "positives are found by chance; lower --base-lr, raise --momentum": chance_level,
                }
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": mean, "train/lr": group["lr"], "train/grad_norm": grad_norm.item()}
                metrics |= {"moco/contrastive_accuracy": accuracy, "moco/gap": gap}
                metrics |= {f"monitor/{k}": v for k, v in feature.items()}
                metrics |= {f"monitor/projection_{k.split('_')[-1]}": v for k, v in projection.items()}
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
                    bar.set_postfix_str(f"loss {mean:.3f} accuracy {accuracy:.3f} rank {rank_z:.0f}")
            if rank == 0 and step == 1:
                pairs = torch.stack(views, dim=1)[:32].flatten(0, 1).cpu()  # side by side
                pixels = pairs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                grid = torchvision.utils.make_grid(pixels.clamp(0, 1))
                torchvision.utils.save_image(grid, run / "views.png")
                board.add_image("views", grid, step)
            if saves and rank == 0:
                weights = model.encoder_q.state_dict()
                weights = {name: weights[name] for name in weights if not name.startswith("fc.")}
                export_backbone(run, "moco", args, h.shape[1], weights, stem=args.stem)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "moco", "step": step, "metrics": metrics, "alarm": alarm}
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
