# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "tyro", "tensorboard", "tqdm"]
# ///
r"""SimCLR: learn features by finding the other view of the same image among all images of the batch.

Paper: Chen et al. 2020, arXiv 2002.05709; a third projector layer is that of v2, arXiv 2006.10029.
Two random views of N images go through an encoder f, h = f(x), kept, and a projector g, z = g(h), dropped.
Each of the 2N rows z_i, of length 1, has to find its partner z_p among the 2N - 1 others (Eq. 1):
  L = mean over i of  -log( exp(z_i.z_p / tau) / sum_{j != i} exp(z_i.z_j / tau) )
The negatives, all other images of all processes, with gradient, are what keeps h from collapsing.

Demo:   python simclr.py
Photos: python simclr.py --data photos/ --image-size 128 --epochs 200 --batch-size 512 --workers 8
Paper:  torchrun --nproc-per-node 8 simclr.py --data imagenet/ --image-size 224 --arch resnet50 \
            --epochs 100 --batch-size 4096 --optimizer lars --base-lr 0.3 --weight-decay 1e-6 \
            --warmup-epochs 10 --min-scale 0.08 --blur 0.5 --workers 12

Differs from the official TensorFlow code: torchvision's ResNets and initialisation; ImageNet's mean, std;
torchvision's crops (mean area .478, there .405 at --min-scale 0.08), antialiased; contrast about the mean of
the gray image, saturation not in HSV; one order of colours a batch; blur reflects at borders; the paper's
mean loss, half of the code's: decay weighs twice, LARS's steps on biases and norms are half; an epoch drops
its incomplete batch. Processes give loss and gradient of one; BatchNorm is synchronised on GPUs only.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
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
    jitter_strength: float = 1.0  # s, colour jitter of 0.8s 0.8s 0.8s 0.2s (paper: 1, on CIFAR 0.5)
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.08)
    blur: float = 0.0  # probability of Gaussian blur (paper: 0.5, on CIFAR 0)
    workers: int = 2  # processes that read images, for each training process

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"  # encoder (paper: resnet50)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 15 x the work
    proj_layers: Literal[2, 3] = 2  # linear layers of the projector (v1: 2, v2: 3)
    proj_dim: int = 128  # width of z
    temperature: float = 0.1  # tau (paper: 0.1, on CIFAR 0.5)
    negatives: bool = True  # without, only attraction is left and z collapses to a few directions: watch it

    epochs: int = 12  # passes over the data (paper: 100 to 1000)
    batch_size: int = 256  # images per step, of all processes together (paper: 4096)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    optimizer: Literal["sgd", "lars"] = "sgd"  # sgd: Nesterov; momentum 0.9 in both (paper: lars)
    base_lr: float = 0.025  # times batch / 256 is the learning rate (paper: 0.3)
    weight_decay: float = 1e-4  # strength of weight decay (paper: 1e-6, not on biases and norms)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 10)

    init: str = ""  # backbone.pt that the encoder starts from, of convert.py or an earlier run
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere
    compile: bool = False  # torch.compile the model
    run_dir: str = ""  # default: runs/METHOD, and a hash of the flags that differ from the defaults
    log_every: int = 10  # steps
    save_minutes: float = 10.0  # between checkpoints, written at a log step, 0: at each; always at the end


# --- Augmentation -------------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_crop(size, min_scale, max_scale=1.0):
    """In the worker: random resized crop and flip of a uint8 image (C, H, W) -> (C, size, size)."""
    crop = v2.RandomResizedCrop(size, (min_scale, max_scale), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


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
    """Blur by sigma (B, 1, 1, 1), 0: not at all; a kernel of 2 radius + 1 pixels, reflected borders."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    exponents = -0.5 * (offsets / sigma.clamp(min=1e-3)) ** 2
    kernel = torch.softmax(exponents, dim=-1).repeat_interleave(3, dim=0)
    x = images.flatten(0, 1)[None]  # (1, 3 B, H, W): each channel of each image is a group
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), kernel, groups=len(kernel))
    x = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="reflect"), kernel.mT, groups=len(kernel))
    return x.view_as(images)


def augment(images, u, order, jitter, blur=0.0, blur_radius=0, solarize=0.0, chance=0.8):
    """On the device: uint8 crops (B, 3, S, S) -> [0, 1], each by its own uniform random numbers u (B, 9): of
    brightness, contrast, saturation, hue, of whether these apply, gray, blur, its sigma, solarize. jitter:
    strength of the first four, which apply by `chance`; order: of these, 0 to 3, and gray, 4; blur, solarize:
    probability, of all or each (B, 1, 1, 1). Colours are as torchvision's. Uses shift_hue, gaussian_blur."""
    u = u.view(-1, 9, 1, 1, 1)
    jittered, gray_of = u[:, 4] < chance, v2.functional.rgb_to_grayscale

    def factor(i):
        low, high = max(0, 1 - jitter[i]), 1 + jitter[i]
        return torch.where(jittered, low + (high - low) * u[:, i], 1.0)

    operations = (
        lambda x: x * factor(0),
        lambda x: torch.lerp(gray_of(x).mean(dim=(2, 3), keepdim=True), x, factor(1)),
        lambda x: torch.lerp(gray_of(x), x, factor(2)),
        lambda x: shift_hue(x, jittered * jitter[3] * (2 * u[:, 3] - 1)),
        lambda x: torch.where(u[:, 5] < 0.2, gray_of(x), x),
    )
    x = images.float() / 255
    for i in order:
        x = operations[i](x).clamp(0, 1)
    if blur_radius:
        x = gaussian_blur(x, (0.1 + 1.9 * u[:, 7]) * (u[:, 6] < blur), blur_radius)
    return torch.where((u[:, 8] < solarize) & (x >= 0.5), 1 - x, x)


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


class SimCLR(nn.Module):
    """Encoder f and projector g: images (B, 3, H, W) -> z (B, proj_dim) and h (B, D). Uses resnet."""

    def __init__(self, arch="resnet18", stem="imagenet", proj_dim=128, proj_layers=2):
        super().__init__()
        self.backbone, width = resnet(arch, stem)
        layers = []
        for out in [width] * (proj_layers - 1) + [proj_dim]:
            layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        layers[-2].bias.requires_grad_(False)  # the last BatchNorm of the official code scales only
        self.projector = nn.Sequential(*layers[:-1])

    def forward(self, images):
        h = self.backbone(images)
        return self.projector(h), h


# --- Loss ---------------------------------------------------------------------------------------------------
def nt_xent(z0, z1, temperature, negatives=True):
    """NT-Xent (Eq. 1) of both views (N, D) of the whole batch, rows of any length, in float32 or better.
    Takes three matrices (2N, 2N): 0.8 GiB at N = 4,096, 3 GiB at 8,192."""
    z = torch.cat([z0, z1])
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1, eps=1e-4)  # rows can be 0
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2N, 2N): no row finds itself
    partner = torch.arange(len(z), device=z.device).roll(len(z0))
    return F.cross_entropy(logits, partner) if negatives else -logits.gather(1, partner[:, None]).mean()


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
            inside, outside = 1.0, group["lr"]
            if group["lr_inside"]:
                inside, outside = outside, inside
            for w in [w for w in group["params"] if w.grad is not None]:
                g = w.grad
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    w_norm, g_norm = w.norm(), g.norm()
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
                if w not in self.state:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                v = self.state[w]["momentum_buffer"]
                v.mul_(group["momentum"]).add_(g, alpha=inside)
                w.sub_(v, alpha=outside)


# --- Monitor ------------------------------------------------------------------------------------------------
@torch.no_grad()
def monitor(z, h, temperature, first):
    """Metrics of z (N, 2, D) and h (N, 2, D') of the whole batch; and what is wrong, {words: the metric that
    shows it}. first: metrics of the first log step. Uses nt_xent, collapse_metrics."""
    rows = F.normalize(z.float().transpose(0, 1).flatten(0, 1), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(rows), device=z.device).roll(len(z))[:, None]
    negative = cosines.scatter(1, partner, -torch.inf).amax(dim=1, keepdim=True)  # the nearest
    accuracy = (cosines.gather(1, partner) > negative).float().mean().item()  # a tie is no success
    chance = math.log(len(rows) - 1)  # NT-Xent of equal logits
    gap = chance - nt_xent(z[:, 0], z[:, 1], temperature).item()

    std, spread, rank = collapse_metrics(z.flatten(0, 1)).values()
    metrics = {"simclr/contrastive_accuracy": accuracy, "simclr/gap": gap}
    metrics |= {"monitor/projection_std": std, "monitor/projection_spread": spread}
    metrics |= {"monitor/projection_rank": rank}
    for name, value in collapse_metrics(h.flatten(0, 1), center=True).items():
        metrics[f"monitor/{name}"] = value

    problems = {}
    if spread < 0.01:
        problems["all z point one way; keep the negatives, lower --base-lr"] = "monitor/projection_spread"
    if rank < max(0.05 * min(rows.shape), 0.1 * first.get("monitor/projection_rank", 0)):
        problems["z fills few directions; keep the negatives, lower --base-lr"] = "monitor/projection_rank"
    if accuracy < 2 / len(rows) and gap < 0.01 * chance:
        problems["partners are found by chance; lower --base-lr, raise --temperature"] = "simclr/gap"
    return metrics, problems


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Pretrain in the run folder, from its checkpoint if it has one; returns the last metrics."""
    check_flags(args, may_be_zero="jitter_strength blur", at_most={"min_scale": 1, "blur": 1})
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = random_crop(args.image_size, args.min_scale)
    shortest = args.image_size / (0.75 * args.min_scale) ** 0.5  # even a crop of 3 : 4 is not enlarged
    data = Images(args, (crop, crop), shortest)
    micro = images_per_pass(args, len(data.items), world)
    per_epoch = len(data.items) // args.batch_size
    total = args.epochs * per_epoch
    warmup = min(total, round(args.warmup_epochs * per_epoch))
    peak_lr = args.base_lr * args.batch_size / 256

    torch.manual_seed(args.seed)
    model = SimCLR(args.arch, args.stem, args.proj_dim, args.proj_layers)
    facts = {"builder": "torchvision.resnet", "arch_args": {"arch": args.arch, "stem": args.stem}}
    facts["feature_dim"] = model.projector[0].in_features
    if args.init:
        load_encoder(model.backbone.state_dict(), args.init, facts["arch_args"])
    model = model.to(device, memory_format=torch.channels_last)  # twice as fast on CPUs
    if world > 1 and device.type == "cuda":  # or a process's statistics betray who is whose partner
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    if args.optimizer == "lars":
        optimizer = LARS(groups, peak_lr)
    else:  # in float16 not fused: that cannot skip its first step, before it has any momentum
        optimizer = torch.optim.SGD(groups, peak_lr, momentum=0.9, nesterov=True, fused=amp != torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = open_run(args, "simclr", parts, len(data.items), amp)  # loads its checkpoint into the parts
    step = run.step
    alarm_from = max(warmup, min(500, total // 5))
    if args.compile:
        model.compile()
    net = model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model)
        net.broadcast_buffers = False  # BatchNorm's; given as an argument, torch 2.14 warns of it

    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(data, batch_sampler=keys, pin_memory=device.type == "cuda", **workers)
    jitter = [strength * args.jitter_strength for strength in (0.8, 0.8, 0.8, 0.2)]  # App. A
    blur_radius = args.image_size // 20 if args.blur else 0  # kernel of a tenth of the side (App. A)
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (MEAN, STD))
    if rank == 0:
        print(f"{args.arch}, {amp}, {world} x {device}, effective learning rate {peak_lr:g}, {total} steps")

    def embed(images):  # (2b, 3, S, S) -> z (b, 2, D), h (b, 2, D')
        with torch.autocast(device.type, amp, enabled=amp is not None):
            z, h = net(images.contiguous(memory_format=torch.channels_last))
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # processes add up its gradient
        return z.unflatten(0, (-1, 2)), h.unflatten(0, (-1, 2))

    with guarded(run, total) as signals:  # torchrun: none; adds run.bar, save_at
        for *crops, _ in loader:  # all epochs that are left
            lr = cosine_schedule(step, total, warmup, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            raw = torch.stack([crop.to(device, non_blocking=True) for crop in crops], dim=1)
            generator = seeded(3, args.seed, step)  # 1: crops, 2: order of the images, 3: augment
            u = torch.rand(args.batch_size, 2, 9, generator=generator).chunk(world)[rank]
            u = u.flatten(0, 1).to(device, non_blocking=True)
            order = [*torch.randperm(4, generator=generator).tolist(), 4]
            images = augment(raw.flatten(0, 1), u, order, jitter, args.blur, blur_radius)
            if step == 0 and rank == 0:
                torchvision.utils.save_image(images[:32], run.folder / "views.png")

            chunks = ((images - mean) / std).split(2 * micro)  # two views of an image
            two_passes = len(chunks) > 1  # all z without a graph, later each chunk again (arXiv 2101.06983)
            with torch.set_grad_enabled(not two_passes):
                embedded = [embed(chunk) for chunk in chunks]
            z, h = (torch.cat(rows) for rows in zip(*embedded, strict=True))
            z.requires_grad_()  # in two passes a leaf, with its own gradient
            every_z = gather(z)  # of all processes; its backward sums over them, and DDP takes the mean
            loss = nt_xent(every_z[:, 0], every_z[:, 1], args.temperature, args.negatives)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if two_passes:  # so far z alone has a gradient
                for i, (chunk, grad) in enumerate(zip(chunks, z.grad.split(micro), strict=True)):
                    net.require_backward_grad_sync = i == len(chunks) - 1  # DDP's mean, once a step
                    embed(chunk)[0].backward(grad)

            step += 1
            run.bar.update()
            at_log = step == 1 or step % args.log_every == 0 or step == total
            scaler.unscale_(optimizer)
            if at_log or signals:  # only here does a step wait for the device, float16's scaler apart
                grad_norm = torch.stack([p.grad.norm() for p in trained]).norm()
                check_finite(step, loss, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()

            if at_log:
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                found, problems = monitor(every_z.detach(), gather(h.detach()), args.temperature, run.first)
                log_metrics(run, step, metrics | found, problems, alarm_from)
            if at_log and time.monotonic() >= run.save_at:
                save_run(run, step, model.backbone.state_dict(), **facts)
            if signals:
                break

        save_run(run, step, model.backbone.state_dict(), **facts)
    return run.recent[-1] if run.recent else {}


# --- Plumbing -----------------------------------------------------------------------------------------------
THINGS = (0x183C7EFFFF7E6666, 0x183C7E3C7EFF1818, 0x3C2CFFFFFF6600, 0x101814161EFF7E3C, 0x81C3FF99FF7E3C18)
THINGS += (0x3C7EFFFF18181C3C, 0xFCFEFEFCFC7800, 0x1C22221C08180C08, 0x60FC67EFE7C1018, 0x185A3C185ADB7E18)
IMAGE_ENDINGS = (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".tif", b".tiff")
TESTS = ("val", "valid", "validation", "test", "testing")
NOT_TRAINING = ("workers", "device", "compile", "run_dir", "log_every", "save_minutes")


def demo_image(index):
    """Photo `index` of a small world, 48 x 48, and its class: one of ten THINGS, from a house to a flower."""
    rng = random.Random(index)
    label, scale, light = rng.randrange(10), rng.uniform(0.35, 0.9), rng.uniform(0.35, 1.0)
    thing = Image.frombytes("1", (8, 8), THINGS[label].to_bytes(8, "big")).convert("L")
    thing = thing.resize((round(48 * scale),) * 2, Image.BICUBIC)
    thing = thing.rotate(rng.uniform(-25, 25), Image.BICUBIC, expand=True)
    corner = tuple(rng.randint(*sorted((0, 48 - side))) for side in thing.size)
    image = Image.new("RGB", (48, 48), (180, 205, 235))
    image.paste(((140, 70, 50), (50, 105, 60), (95, 75, 150))[label % 3], corner, thing)
    image = Image.blend(Image.new("RGB", (48, 48)), image, light)
    noise = Image.frombytes("L", (48, 48), rng.randbytes(48 * 48)).convert("RGB")
    return Image.blend(image, noise, 0.25), label


def image_paths(folder):
    """Paths of the images below a folder, sorted: an array of bytes, which workers share, with room for any
    name. Hidden (.thumbnails, ._IMG.jpg, @eaDir) and a run's pictures are no photos, folders that cannot be
    read are named; links are followed where nothing else leads."""
    if not os.path.isdir(folder):
        sys.exit(f"--data {folder}: there is no such folder")
    files, entered, waiting, hidden = [], set(), [os.fsencode(folder)], (b".", b"@", b"__MACOSX")
    while waiting:  # first without links
        for at, folders, names in os.walk(waiting.pop(0), onerror=print):
            if os.path.realpath(at) in entered or entered and b"metrics.jsonl" in names:
                folders.clear()
                continue
            entered.add(os.path.realpath(at))
            folders[:] = sorted(name for name in folders if not name.startswith(hidden))
            waiting += [link for name in folders if os.path.islink(link := os.path.join(at, name))]
            files += [os.path.join(at, name) for name in names if not name.startswith(hidden)]

    images = [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]
    if not images:
        found = b" ".join(sorted({os.path.splitext(file)[1] for file in files})).decode(errors="replace")
        readable = b" ".join(IMAGE_ENDINGS).decode()
        sys.exit(f"--data {folder}: no images found; reads {readable}, found {found or 'nothing'}")
    return np.array(sorted(images))


def stretched(image):
    """A picture of one deep band -> 8 bits: what is finite and not nodata, from its .1 to 99.9 percentile."""
    values = np.asarray(image, dtype=np.float64)
    nodata = float(getattr(image, "tag_v2", {}).get(42113, -9999))  # GDAL's tag, and the custom
    valid = np.isfinite(values) & ~np.isclose(values, nodata, rtol=1e-6, atol=0)
    low, high = np.percentile(values[valid], (0.1, 99.9)) if valid.any() else (0, 0)
    if low == high and valid.any():
        low, high = values[valid].min(), values[valid].max()
    if low == high:
        return Image.new("L", image.size, 128)
    values = np.where(valid, values, low).clip(low, high)
    return Image.fromarray(np.uint8((values - low) / (high - low) * 255 + 0.5))


def read_image(file, shortest):
    """Any photo, a path or an open file, as upright 8-bit RGB, on white where it is transparent. A large JPEG
    is decoded smaller, no side below `shortest` pixels. Uses stretched."""
    if not hasattr(file, "read"):
        with open(file, "rb") as opened:  # by its path a raw TIFF would be mapped, and turned wrongly
            return read_image(opened, shortest)
    Image.MAX_IMAGE_PIXELS = None  # phones make 200 megapixels
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # of a broken file we say more
    image = Image.open(file)
    if image.width * image.height > 2**28:
        raise ValueError(f"claims to have {image.width} x {image.height} pixels")
    image.draft(None, (math.ceil(shortest),) * 2)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)

    if image.mode[0] in "IF":
        image = stretched(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def seeded(*integers):
    """Random numbers by a key alone: stream (1 item, 2 epoch, 3 step, 4 layers, 5 masks), seed, number; no
    strings, whose hash differs between processes. So workers, processes and a resume change nothing."""
    return torch.Generator().manual_seed(hash(integers) % 2**63)


def ignore_signals(worker):
    """In a worker: the training process gets them too, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open_data(data):
    """What --data names, to be indexed: pairs (image, label), rows of Arrow {"image": ...}, or paths."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if data == "demo":
        return [demo_image(index) for index in range(4096)]
    if os.path.isdir(data) and {"dataset_info.json", "dataset_dict.json"} & {*os.listdir(data)}:
        try:
            import datasets  # Hugging Face's; its files are mapped, workers copy nothing

            rows = datasets.load_from_disk(data)
            rows = rows["train"] if isinstance(rows, dict) else rows
            return rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
        except Exception as error:
            sys.exit(f"--data {data}: needs `pip install datasets`, a column image, a split train ({error})")

    if os.path.isdir(data):
        paths, names = image_paths(data), os.listdir(data)
        has_train = {"train", "training"} & {name.lower() for name in names}
        for name in [name for name in names if has_train and name.lower() in TESTS]:
            is_test = np.char.startswith(paths, os.fsencode(os.path.join(data, name, "")))
            paths = paths[~is_test]
            if rank == 0:
                print(f"{is_test.sum()} images in {os.path.join(data, name)} are left out")
        return paths

    if rank > 0:
        dist.barrier()  # process 0 downloads, then the others read
    try:
        pairs = getattr(torchvision.datasets, data)("data", download=True)
    except Exception as error:
        words = f"no such folder, no download by torchvision ({' '.join(str(error).split())})"
        sys.exit(f"--data {data}: {words}; give a folder, or demo")
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return pairs


class Images(Dataset):
    """Images of --data; item epoch x n + index is (*views, index), random by that key alone: what functions
    `views` make of a uint8 image (3, H, W), read with at least `shortest` pixels a side."""

    def __init__(self, args, views, shortest):
        self.args, self.views, self.shortest = args, views, shortest
        self.items, self.broken = open_data(args.data), set()

    def __getitem__(self, key):
        for number in range(key, key + 100):
            index = number % len(self.items)
            name = f"{self.args.data}[{index}]"
            try:
                item = self.items[index]
                if isinstance(item, bytes):
                    name = item.decode(errors="backslashreplace")
                    image = read_image(item, self.shortest)
                elif isinstance(item, dict):
                    image = read_image(io.BytesIO(item["image"]["bytes"]), self.shortest)
                else:
                    image = item[0].convert("RGB")
                torch.default_generator.manual_seed(seeded(1, self.args.seed, key).initial_seed())
                pixels = v2.functional.pil_to_tensor(image)  # resizes 3 x as fast as PIL, alike to 2 of 255
            except Exception as error:  # whatever a decoder raises
                if index not in self.broken:
                    words = str(error).partition(" <")[0]  # without the name of Pillow's object
                    tqdm.write(f"{name} cannot be read, the next takes its place: {words}", sys.stderr)
                self.broken.add(index)
            else:
                return *(view(pixels) for view in self.views), index
        raise OSError(f"--data: 100 files in a row cannot be read, the last is {name}")

    def batches(self, batch_size, step, epochs, rank, world):
        """Keys of this process's slice of each global batch from `step` on; an epoch drops its rest."""
        n, per_epoch = len(self.items), len(self.items) // batch_size
        for epoch in range(step // per_epoch, epochs):
            keys = epoch * n + torch.randperm(n, generator=seeded(2, self.args.seed, epoch))
            for batch in keys.split(batch_size)[step % per_epoch : per_epoch]:
                yield batch.chunk(world)[rank].tolist()
            step = 0


def check_flags(args, may_be_zero, at_most):
    """SystemExit unless all numbers are above 0, or 0 if named in may_be_zero, and at most at_most[name]."""
    may_be_zero += " epochs micro_batch_size weight_decay warmup_epochs workers seed save_minutes"
    for name, value in asdict(args).items():
        for number in value if isinstance(value, tuple) else [value]:
            least, most = 0 if name in may_be_zero.split() else 1e-12, at_most.get(name, 2**63 - 1)
            if type(number) in (int, float) and not least <= number <= most:
                allowed = f"{'above' if least else 'at least'} 0"
                allowed += f" and at most {most}" if number > most else ""
                sys.exit(f"--{name.replace('_', '-')} {value}: must be {allowed}")


def images_per_pass(args, images, world):
    """By --micro-batch-size; SystemExit unless processes share the batch, and passes a process's, evenly."""
    if not 2 * world <= args.batch_size <= images or args.batch_size % world:
        allowed = f"give a multiple of {world}, from {2 * world} to {images}, the images in {args.data}"
        sys.exit(f"--batch-size {args.batch_size}: {allowed}")
    share = args.batch_size // world
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    micro = getattr(args, "micro_batch_size", 0) or share
    if micro not in sizes:
        sys.exit(f"--micro-batch-size {micro}: give what divides the {share} of a process: {sizes}")
    return micro


def start_processes(device, amp):
    """From torchrun's environment: rank, number of processes, device, autocast type (None: float32)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a folder whose name it cannot write
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        sys.exit(f"WORLD_SIZE is {world}, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: use torchrun")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            sys.exit(f"--device cuda: no GPU for process {local} of this machine; use --device cpu")
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")

    if amp == "auto" and device == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return rank, max(world, 1), torch.device(device, local if device == "cuda" else 0), dtype


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


def cosine_schedule(step, total, warmup, base, final=0.0):
    """From 0 in a straight line to base at step `warmup`, then in half a cosine to final at step `total`."""
    if step < warmup:
        return base * step / warmup
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup or 1)))


@torch.no_grad()
def collapse_metrics(features, center=False):
    """How much room the first 2,048 rows of features (B, D) take. feature_std: sqrt(D) x mean std of rows of
    length 1; 1 isotropic, 0 all alike. spread: 1 - |mean row|^2. effective_rank: RankMe (arXiv 2210.02885),
    directions in use of min(rows, D); center: of rows less their mean, as RankMe does not."""
    z = features[:2048].double()
    unit = F.normalize(z, dim=1)
    std = z.shape[1] ** 0.5 * unit.std(dim=0, correction=min(1, len(unit) - 1)).mean()
    spread = 1 - unit.mean(dim=0).square().sum()

    centered = z - z.mean(dim=0) if center else z
    rank = torch.ones(())  # of nearly constant rows, whose rounding noise would have a high one
    if centered.norm() > 1e-3 * z.norm():
        gram = centered.T @ centered if len(z) > z.shape[1] else centered @ centered.T
        sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
        p = sigma / sigma.sum() + 1e-7
        rank = torch.exp(-(p * p.log()).sum())
    return {"feature_std": std.item(), "spread": spread.item(), "effective_rank": rank.item()}


def open_run(args, method, parts, images, amp):
    """The run: its folder and what a checkpoint there holds, which goes into the parts, too. SystemExit if it
    is a run of other flags, another number of images or autocast type."""
    flags = asdict(args) | {"data": os.path.normpath(args.data)}  # photos/ is photos
    flags = {name: value for name, value in flags.items() if name not in NOT_TRAINING}
    changed = {name: value for name, value in flags.items() if value != getattr(type(args), name)}
    mark = "-" + hashlib.sha1(json.dumps(changed).encode()).hexdigest()[:8] if changed else ""
    folder = Path(args.run_dir or f"runs/{method}{mark}")
    record = json.loads(json.dumps({"method": method} | flags | {"images": images, "autocast": str(amp)}))
    anew = f"to begin anew delete {folder}, or give another --run-dir"
    state = {"step": 0, "logged": 0, "recent": [], "first": {}, "streak": 0, "alarm": 0.0, "words": ""}
    try:
        held = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else record
        differ = [name for name in record if held.get(name) != record[name]]
        if differ:
            words = ", ".join(f"{name} {held.get(name)}, not {record[name]}" for name in differ)
            hint = f" and --init {folder}/backbone.pt" * ({*differ} <= {"epochs", "images"})
            sys.exit(f"{folder} holds a run with {words}: {anew}{hint}")
        if (folder / "checkpoint.pt").exists():
            saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            state = {name: saved[name] for name in state}
            for name, part in parts.items():
                part.load_state_dict(saved[name])

        run = SimpleNamespace(folder=folder, args=args, method=method, parts=parts, kept=[*state], **state)
        run.rank = dist.get_rank() if dist.is_initialized() else 0
        run.per_epoch = images // args.batch_size
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "args.json").exists():
                temporary = folder / f"args.json.{os.getpid()}.tmp"  # others may read it now
                temporary.write_text(json.dumps(record | {"torch": torch.__version__}, indent=1))
                os.replace(temporary, folder / "args.json")
            with open(folder / "metrics.jsonl", "a") as log:
                log.truncate(min(log.tell(), run.logged))  # what came after the checkpoint is done again
            print(f"{images} images in {args.data}. Run folder {folder}, step {run.step}")
        return run
    except Exception as error:  # of the disk, or of a damaged file
        words = " ".join(str(error).split())[:150]
        sys.exit(f"{folder}: args.json or checkpoint.pt is damaged, or the disk is full: {words}: {anew}")


def load_encoder(encoder, path, arch_args, flag="--init", maker="convert.py"):
    """Start the encoder {name: tensor} from a backbone.pt, which `maker` makes; all of it has to fit."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        weights, built = held["state_dict"], arch_args | held.get("arch_args", {})
        needed, given = ({k: [*v.shape] for k, v in tensors.items()} for tensors in (encoder, weights))
        for name in ("num_heads", "act_layer"):  # which no shape shows
            needed[name], given[name] = arch_args.get(name), built.get(name)
        for name in [name for name in needed | given if needed.get(name) != given.get(name)]:
            found = f"{name} {given.get(name)}, not {needed.get(name)}"
            raise ValueError(f"its weights are not those of this encoder: {found}")
    except Exception as error:  # no such file, no backbone.pt
        sys.exit(f"{flag} {path}: {' '.join(str(error).split())[:200]}; {maker} makes a backbone.pt")
    for name, tensor in encoder.items():
        tensor.copy_(weights[name])


@contextlib.contextmanager
def guarded(run, total, last=True):
    """Around the loop. In one process Ctrl-C and SIGTERM go into the list it yields, so that it ends after
    the step in hand; a second one ends at once. Errors of files end in one line. last: no loop comes
    after it."""
    signals, hook = [], threading.excepthook

    def note(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    alone = not dist.is_initialized() and threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if alone}
    threading.excepthook = lambda _: None  # of TensorBoard, where the disk is full: its next call says so
    run.since, run.last = time.monotonic(), run.step
    run.save_at = run.since + 60 * run.args.save_minutes
    try:
        writer = SummaryWriter(run.folder, purge_step=run.step + 1) if run.rank == 0 else None
        writer = writer or contextlib.nullcontext()
        with tqdm(total=total, initial=run.step, disable=run.rank > 0) as run.bar, writer as run.board:
            yield signals
    except (KeyboardInterrupt, OSError) as error:
        traceback.clear_frames(error.__traceback__)  # or the loader lives on and waits for its workers
        words = (str(error) or "interrupted").splitlines()[-1]
        sys.exit(f"{words}; the same command goes on from the last checkpoint")
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if signals:
        sys.exit(f"stopped after step {run.step}, saved; the same command goes on")
    if run.rank == 0:
        print(f"{run.folder}/backbone.pt: {run.words}")
    if last and dist.is_initialized():
        dist.barrier()  # in torch 2.4 gloo may wait for ever in the next line
        dist.destroy_process_group()


def check_finite(step, loss, grad_norm, scaler):
    """SystemExit if the loss, or the gradient of a step that float16 would not skip, is absurd."""
    skips = scaler.is_enabled() and scaler.get_scale() > 1
    if not (loss if skips else loss + grad_norm) < 1e9:
        remedy = "lower the learning rate; or are the images of a batch all alike, black?"
        sys.exit(f"step {step}: loss {loss:g}, gradient {grad_norm:g}; {remedy}")


def log_metrics(run, step, metrics, problems, alarm_from):
    """Metrics {tag: value} to metrics.jsonl, TensorBoard and the bar. The alarm rings from the third time in
    a row, after step alarm_from, with a problem {words: tag} whose metric is hardly better than ten times
    ago, to the third without."""
    before = run.recent[0] if run.recent else metrics
    better = {tag: metrics[tag] > before[tag] + 0.01 + 0.1 * abs(before[tag]) for tag in problems.values()}
    lasting = [words for words, tag in problems.items() if not better[tag]]
    if step > alarm_from:
        run.streak = max(run.streak, 0) + 1 if lasting else min(run.streak, 0) - 1
    if run.streak == 3 and not run.alarm and run.rank == 0:
        tqdm.write(f"COLLAPSE at step {step}: {' | '.join(lasting)}")
    if abs(run.streak) >= 3:
        run.alarm = float(run.streak > 0)
    metrics["monitor/alarm"] = run.alarm
    now, seen = time.monotonic(), run.args.batch_size * (step - run.last)
    metrics["perf/images_per_second"] = seen / (now - run.since)

    run.since, run.last = now, step
    run.first, run.recent = run.first or metrics, [*run.recent, metrics][-10:]
    own = [tag for tag in metrics if tag.startswith(("train/loss", run.method, "monitor/effective_rank"))]
    run.words = ", ".join(f"{tag.split('/')[1]} {metrics[tag]:.4g}" for tag in own[:4])
    run.bar.set_postfix_str(run.words)
    if run.rank == 0:
        for tag, value in metrics.items():
            run.board.add_scalar(tag, value, step)
        line = {"step": step, "epoch": (step - 1) // run.per_epoch}
        line |= {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        with open(run.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")


def save_checkpoint(path, **state):
    """Write tensors and plain dicts in one step: a kill at any moment leaves the old file or the new one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)  # by its path: Ctrl-C within stays a KeyboardInterrupt
        with open(temporary, "r+b") as file:  # Windows syncs no other
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's words for a full disk
        raise OSError(f"{path}: cannot be written, is the disk full? ({str(error)[:80]})")
    finally:
        temporary.unlink(missing_ok=True)


def save_run(run, step, encoder, **facts):
    """checkpoint.pt, all that moves, and backbone.pt, the encoder {name: tensor} in public names and what
    builds it; once a step."""
    if run.rank > 0 or step == run.step and (run.folder / "checkpoint.pt").exists():
        return
    weights = {name: tensor.cpu() for name, tensor in encoder.items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):  # a skipped float16 step can do that
        sys.exit(f"step {step}: a weight is not finite, nothing is saved; lower the learning rate")
    facts |= {"method": run.method, "arch": run.args.arch, "image_size": run.args.image_size}
    facts |= {"mean": MEAN, "std": STD, "step": step, "state_dict": weights}
    save_checkpoint(run.folder / "backbone.pt", **facts)
    run.step, run.logged = step, os.path.getsize(run.folder / "metrics.jsonl")
    state = {name: getattr(run, name) for name in run.kept}
    state |= {name: part.state_dict() for name, part in run.parts.items()}
    save_checkpoint(run.folder / "checkpoint.pt", method=run.method, **state)
    run.save_at = time.monotonic() + 60 * run.args.save_minutes


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
