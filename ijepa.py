# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""I-JEPA: learn features by predicting those of hidden blocks of an image from the rest of it.

Paper: Assran et al. 2023, arXiv 2301.08243; where it and the official PyTorch code differ, the code.
The context encoder f sees a block of an image less four target blocks, its moving average f' all of it. From
f(context) and the places i of a target block a narrow predictor g guesses t_i = layer_norm(f'(image)_i):
  L = mean over target blocks and their patches i of  smooth-L1(g(f(context), places of the block)_i - t_i)
A constant f would give L = 0; but no gradient reaches the target, and the target is slow. A low L
proves nothing: watch the effective rank, which must rise again; the alarm rings when all targets are alike.

Demo:   python ijepa.py
Photos: python ijepa.py --data photos/ --image-size 96 --arch vit_tiny --epochs 300 --batch-size 256 \
            --warmup-epochs 20 --workers 8
Paper:  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
            ijepa.py --data imagenet/ --image-size 224 --patch-size 14 \
            --arch vit_huge --epochs 300 --batch-size 2048 --warmup-epochs 40 \
            --workers 10

Differs from the official code: blocks lie anywhere, as in the paper, and may fill the grid; there never in
the last row and column. Contexts are cut to one length at random, there the lowest patches go; small targets
are kept, there drawn again. Below 7 x 7 patches a context may have 10 or fewer. Masks are drawn, and
contexts cut, for the global batch (of 2048 a tenth shorter than of 128): processes give loss and gradient of
one. Crops are uint8, large JPEGs decoded smaller. Patch embeddings start with 0.02 x 16 / patch size, or
small patches drown in their positions; predictors with 0.02 x sqrt(384 / width), as narrow ones of 0.02 learn
late. Warm-up from 0, there from 2e-4. Crops are flipped and bicubic, there neither. Encoders below vit_base
too, with smaller predictors.
"""

import contextlib
import copy
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
from collections import OrderedDict
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
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

# --- Args ---------------------------------------------------------------------------------------------------
Arch = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    patch_size: int = 8  # side of a patch in pixels (paper: 14 or 16)
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.3)
    targets: int = 4  # target blocks of an image (paper: 4)
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block (paper: 0.15 0.2)
    workers: int = 2  # processes that read images, for each training process

    arch: Arch = "vit_nano"  # encoder, and its predictor (paper: the last three)
    stop_gradient: bool = True  # without, the trained network is its own target: watch it
    momentum: float = 0.996  # of the moving average (paper: 0.996, rising to 1 as here)

    epochs: int = 28  # passes over the data (paper: 300 to 600)
    batch_size: int = 32  # images per step, of all processes together (paper: 2048)
    lr: float = 1e-3  # learning rate (paper: 1e-3)
    weight_decay: float = 0.04  # strength of weight decay (paper: 0.04, not on biases and norms)
    final_weight_decay: float = 0.4  # reached in a cosine (paper: 0.4)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 40)

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


def multiblock_masks(
    grid, batch_size, generator, targets=4, target_scale=(0.15, 0.2), min_keep=10, context_scale=(0.85, 1.0)
):
    """Patches of a grid x grid (Sec. 3): context (B, K) and target blocks (targets, B, M), in raster order.
    Sizes are shared by the batch, places are each image's own. A context is a block less the targets, drawn
    anew if it has min_keep patches or fewer; after 20 times the last target is not cut out, and so on."""
    u, context_u = torch.rand(2, generator=generator).tolist()

    def places(number, scale, u, aspect):  # (number, B, height x width)
        low, high = scale
        area = int(grid**2 * (low + u * (high - low)))
        height = max(1, min(grid, round(math.sqrt(area * aspect))))
        width = max(1, min(grid, round(math.sqrt(area / aspect))))
        top = torch.randint(grid - height + 1, (number, batch_size, 1, 1), generator=generator)
        left = torch.randint(grid - width + 1, (number, batch_size, 1, 1), generator=generator)
        rows = top + torch.arange(height)[:, None]
        return (rows * grid + left + torch.arange(width)).flatten(2)

    aspect = 0.75 + u * (1.5 - 0.75)  # by the same number, as official
    blocks = places(targets, target_scale, u, aspect)
    context = torch.zeros(batch_size, grid**2, dtype=torch.bool)
    for attempt in range(20 * (targets + 1)):  # ends, whatever the grid
        short = context.sum(dim=1, keepdim=True) <= min_keep
        if not short.any():
            break
        drawn = torch.zeros_like(context).scatter(1, places(1, context_scale, context_u, 1)[0], True)
        for block in blocks[: targets - attempt // 20]:
            drawn = drawn.scatter(1, block, False)
        context = torch.where(short, drawn, context)

    order = torch.rand(context.shape, generator=generator).masked_fill(~context, -1)
    kept = order.topk(context.sum(dim=1).min(), dim=1).indices  # all to one length
    return kept.sort(dim=1).values, blocks


def apply_masks(x, masks):
    """Tokens of x (B, N, D) at masks (T, B, K) -> (T B, K, D), first those of masks[0]."""
    return torch.cat([x.gather(1, mask[:, :, None].expand(-1, -1, x.shape[2])) for mask in masks])


# --- Model --------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block of tokens (B, N, D), in timm's names. Uses Attention."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.drop_path = Attention(dim, heads), drop_path
        layers = OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(layers)

    def forward(self, x):
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


VITS = {"vit_nano": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6)}  # width, depth, heads
VITS |= {"vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}
PREDICTORS = {"vit_nano": (64, 3), "vit_tiny": (96, 4), "vit_small": (192, 6)}  # width, depth
PREDICTORS |= {"vit_base": (384, 6), "vit_large": (384, 12), "vit_huge": (384, 12)}


def sincos_positions(dim, side):
    """Fixed positions (1, 1 + side^2, dim): zeros for [CLS], then [e(column), e(row)] of a square grid, where
    e(t) has all sines, then all cosines, of t / 10000^(k / (dim / 4)), k = 0 .. dim / 4 - 1."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0)).float()[None]


class IJEPAEncoder(nn.Module):
    """ViT without [CLS]: images (B, 3, S, S) -> tokens of all patches (B, N, D), or of those at keep (B, K).
    Uses VITS, Block, sincos_positions, apply_masks."""

    def __init__(self, arch, image_size, patch_size):
        super().__init__()
        dim, depth, heads = VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        positions = sincos_positions(dim, image_size // patch_size)[:, 1:]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images, keep=None):
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed  # before the mask
        return self.norm(self.blocks(x if keep is None else apply_masks(x, keep[None])))


class IJEPAPredictor(nn.Module):
    """Tokens (B, K, D) of the patches at context (B, K), targets (T, B, M) -> prediction (T B, M, D), each
    block on its own. Uses Block, sincos_positions, apply_masks."""

    def __init__(self, dim, side, width, depth, heads):
        super().__init__()
        self.predictor_embed, self.predictor_proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(width, side)[:, 1:], requires_grad=False)
        self.predictor_blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, context, targets):
        positions = self.predictor_pos_embed.expand(len(x), -1, -1)
        x = self.predictor_embed(x) + apply_masks(positions, context[None])
        queries = self.mask_token + apply_masks(positions, targets)  # (T B, M, width)
        x = self.predictor_blocks(torch.cat([x.repeat(len(targets), 1, 1), queries], dim=1))
        return self.predictor_proj(self.predictor_norm(x[:, -queries.shape[1] :]))


class IJEPA(nn.Module):
    """Context encoder, predictor and target encoder in the official names: images and masks -> prediction
    (T B, M, D). Uses VITS, PREDICTORS, IJEPAEncoder, IJEPAPredictor."""

    def __init__(self, arch="vit_base", image_size=224, patch_size=16):
        super().__init__()
        dim, _, heads = VITS[arch]
        self.encoder = IJEPAEncoder(arch, image_size, patch_size)
        self.predictor = IJEPAPredictor(dim, image_size // patch_size, *PREDICTORS[arch], heads)
        narrow = (384 / PREDICTORS[arch][0]) ** 0.5
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                scale = narrow if "predictor" in name else 1.0
                if isinstance(layer, nn.Conv2d):
                    scale = 16 / patch_size
                nn.init.trunc_normal_(layer.weight, std=0.02 * scale)
                nn.init.zeros_(layer.bias)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images, context, targets):
        return self.predictor(self.encoder(images, context), context, targets)


# --- Loss ---------------------------------------------------------------------------------------------------
def target_features(tokens):
    """Tokens (B, N, D), each with mean 0 and variance 1, in float32 or better."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return F.layer_norm(tokens.to(dtype), tokens.shape[-1:])


def ijepa_loss(pred, target):
    """Mean smooth-L1: .5 d^2 for |d| < 1, else |d| - .5 (paper: squares)."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return F.smooth_l1_loss(pred.to(dtype), target)


# --- Optimiser ----------------------------------------------------------------------------------------------
@torch.no_grad()
def momentum_update(encoder_q, encoder_k, m):
    """k <- m k + (1 - m) q for all parameters of encoder_k (key, target, teacher), not for buffers."""
    for q, k in zip(encoder_q.parameters(), encoder_k.parameters(), strict=True):
        k.lerp_(q, 1 - m)


# --- Monitor ------------------------------------------------------------------------------------------------
def monitor(moments, features):
    """Metrics of moments (W, 2, N, D), each process's mean over images of targets and of their squares, and
    of features (B, D); and what is wrong, {words: metric that shows it}. Uses collapse_metrics."""
    mean, square = moments.mean(dim=0)
    variance = (square - mean.square()).mean().item()  # between images, 0: all alike
    metrics = {"ijepa/target_variance": variance}
    for name, value in collapse_metrics(features, center=True).items():
        metrics[f"monitor/{name}"] = value

    words = "targets hardly differ; keep the stop-gradient, raise --momentum, lower --lr"
    problems = {words: "ijepa/target_variance"} if variance < 0.02 else {}
    return metrics, problems


def masks_picture(images, masks, patch_size):
    """Up to 8 images (B, 3, S, S), each followed by what each mask (B, K) shows of it."""
    images, side = images[:8], images.shape[2] // patch_size
    columns = [images]
    for mask in masks:
        shown = images.new_zeros(len(images), side**2).scatter(1, mask[:8], 1.0)
        shown = F.interpolate(shown.view(-1, 1, side, side), scale_factor=patch_size)
        columns.append(images * shown + 0.5 * (1 - shown))
    return torch.stack(columns, dim=1).flatten(0, 1)


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Pretrain in the run folder, from its checkpoint if it has one; returns the last metrics."""
    at_most = {"min_scale": 1, "targets": 16, "target_scale": 0.5, "momentum": 1}
    check_flags(args, may_be_zero="momentum final_weight_decay", at_most=at_most)
    side = args.image_size // args.patch_size
    if args.image_size % args.patch_size or side < 4:
        sys.exit(f"--image-size {args.image_size}: give 4, 5, .. times --patch-size {args.patch_size}")
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = random_crop(args.image_size, args.min_scale)
    shortest = args.image_size / (0.75 * args.min_scale) ** 0.5  # even a crop of 3 : 4 is not enlarged
    data = Images(args, (crop,), shortest)
    images_per_pass(args, len(data.items), world)  # only checks
    per_epoch = len(data.items) // args.batch_size
    total = args.epochs * per_epoch
    warmup = min(total - 1, round(args.warmup_epochs * per_epoch))

    torch.manual_seed(args.seed)
    model = IJEPA(args.arch, args.image_size, args.patch_size).to(device)
    dim, depth, heads = VITS[args.arch]
    shape = {"img_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0}
    shape |= {"embed_dim": dim, "depth": depth, "num_heads": heads}
    shape |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    facts = {"builder": "timm.VisionTransformer", "arch_args": shape, "feature_dim": dim}
    if args.init:
        load_encoder(model.encoder.state_dict(), args.init, shape)
        model.target_encoder.load_state_dict(model.encoder.state_dict())
    target_encoder = model.target_encoder if args.stop_gradient else model.encoder

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = open_run(args, "ijepa", parts, len(data.items), amp)  # loads its checkpoint into the parts
    step = run.step
    alarm_from = max(warmup, min(500, total // 5))
    if args.compile:
        model.compile()
        target_encoder.compile()
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(data, batch_sampler=keys, pin_memory=device.type == "cuda", **workers)
    min_keep = min(10, side**2 // 4)  # official: 10
    block_rules = args.targets, args.target_scale, min_keep
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (MEAN, STD))
    if rank == 0:
        print(f"{args.arch}, {amp}, {world} x {device}, effective learning rate {args.lr:g}, {total} steps")

    with guarded(run, total) as signals:  # torchrun: none; adds run.bar, save_at
        for crops, _ in loader:  # all epochs that are left
            lr = cosine_schedule(step + 1, total, warmup, args.lr, 1e-6)  # as official
            for group in optimizer.param_groups:
                group["lr"] = lr
            decay = cosine_schedule(step + 1, total, 0, args.weight_decay, args.final_weight_decay)
            optimizer.param_groups[0]["weight_decay"] = decay
            momentum = args.momentum + step / total * (1 - args.momentum)

            images = (crops.to(device, non_blocking=True) / 255 - mean) / std
            generator = seeded(3, args.seed, step)  # 1: crops, 2: order of the images, 3: masks
            masks = multiblock_masks(side, args.batch_size, generator, *block_rules)
            masks = (mask.chunk(world, dim=-2)[rank] for mask in masks)
            context, targets = (mask.to(device, non_blocking=True) for mask in masks)
            if step == 0 and rank == 0:
                picture = masks_picture(images * std + mean, [context, *targets], args.patch_size)
                torchvision.utils.save_image(picture, run.folder / "views.png", nrow=2 + args.targets)

            with torch.autocast(device.type, amp, enabled=amp is not None):
                with torch.set_grad_enabled(not args.stop_gradient):
                    tokens = target_encoder(images)  # of all patches
                pred = net(images, context, targets)
            h = target_features(tokens)
            loss = ijepa_loss(pred, apply_masks(h, targets))

            optimizer.zero_grad()
            scaler.scale(loss).backward()  # DDP takes the mean of all processes

            step += 1
            run.bar.update()
            at_log = step == 1 or step % args.log_every == 0 or step == total
            scaler.unscale_(optimizer)
            if at_log or signals:  # only here does a step wait for the device, float16's scaler apart
                loss = gather(loss.detach()[None]).mean()
                grad_norm = torch.stack([p.grad.norm() for p in trained]).norm()
                check_finite(step, loss, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()
            momentum_update(model.encoder, model.target_encoder, momentum)  # after the step

            if at_log:
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                moments = torch.stack([h.mean(dim=0), h.square().mean(dim=0)]).detach()
                found, problems = monitor(gather(moments[None]), gather(tokens.detach().mean(dim=1)))
                log_metrics(run, step, metrics | {"ijepa/momentum": momentum} | found, problems, alarm_from)
            if at_log and time.monotonic() >= run.save_at:
                save_run(run, step, model.target_encoder.state_dict(), **facts)
            if signals:
                break

        save_run(run, step, model.target_encoder.state_dict(), **facts)
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
