# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""DINO: learn features by predicting, from any crop of an image, what the teacher says of other crops.

Paper: Caron et al. 2021, arXiv 2104.14294; where paper and official PyTorch code differ, the code.
Student and teacher, its moving average, turn crops into logits over K prototypes: the student all crops, two
global and some small local ones, into s_v; the teacher the global ones into t_u, of moving mean c:
  q_u = softmax((t_u - c) / T_t),  p_v = softmax(s_v / T_s),  L = mean over pairs u != v of  -sum q_u log p_v
There are no negatives. Two forces on the teacher stop the collapse (Sec. 5.3): centering (- c) keeps one
prototype from taking all, sharpening (T_t below T_s) keeps all from being alike.

Demo:   python dino.py
Photos: python dino.py --data photos/ --image-size 96 --local-size 48 --patch-size 8 --arch vit_tiny \
            --epochs 200 --batch-size 256 --base-lr 1e-3 --warmup-epochs 10 --final-momentum 1 --workers 8
Paper:  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
            dino.py --data imagenet/ --image-size 224 --local-size 96 --local-crops 8 \
            --local-min-scale 0.05 --crop-blurs 1 0.1 0.5 --patch-size 16 --arch vit_small \
            --drop-path 0.1 --head-dim 2048 --out-dim 65536 --teacher-temp 0.04 \
            --final-momentum 1 --epochs 100 --batch-size 1024 --base-lr 5e-4 --warmup-epochs 10 \
            --workers 10

Differs from the official code: without the paper's ResNets, with its --sinkhorn; tensor crops,
large JPEGs decoded smaller; colours in one order a batch; a true Gaussian blur, cut at 5 pixels; bfloat16 on
GPUs that have it. Processes give loss, gradient and centre of one; each draws its own stochastic depth.
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
@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    local_size: int = 16  # side of a local crop in pixels (paper: 96)
    local_crops: int = 2  # of an image (paper: 8; 0: none, then give --min-scale 0.14)
    patch_size: int = 8  # side of a patch in pixels (paper: 16 or 8)
    min_scale: float = 0.4  # smallest area of a crop as a share of the image (paper: 0.4)
    local_min_scale: float = 0.15  # of local crops, which reach up to min_scale (paper: 0.05)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    crop_blurs: tuple[float, float, float] = (0.0, 0.0, 0.0)  # chance: 1st, 2nd, local (paper: 1 0.1 0.5)
    solarize: float = 0.2  # probability of solarization (paper: 0.2, of the 2nd crop)
    workers: int = 2  # processes that read images, for each training process

    arch: Literal["vit_nano", "vit_tiny", "vit_small", "vit_base"] = "vit_nano"  # encoder (paper: last two)
    drop_path: float = 0.0  # stochastic depth of the last block, 0 in the first (paper: 0.1)
    head_dim: int = 512  # width of the head's hidden layers (paper: 2048)
    out_dim: int = 1024  # K, number of prototypes (paper: 65536)
    norm_last_layer: bool = True  # prototypes of length 1 (paper: on; off in long runs of ViT-S)
    teacher_temp: float = 0.02  # T_t; lower it if the teacher stays uniform (paper: 0.04 or 0.07)
    warmup_teacher_temp: float = 0.04  # T_t at the start of its warm-up (paper: 0.04)
    warmup_teacher_temp_epochs: int = 0  # epochs of its warm-up (paper: 0 or 30)
    student_temp: float = 0.1  # T_s (paper: 0.1)
    momentum: float = 0.996  # of the moving average (paper: 0.996)
    final_momentum: float = 0.996  # reached in a cosine (paper: 1)
    sinkhorn: bool = False  # Sinkhorn-Knopp for centering (paper: Table 7)
    centering: bool = True  # without it and --sinkhorn targets become one-hot: watch it (--momentum 0.9)
    sharpening: bool = True  # without, T_t is T_s and the teacher uniform: watch it

    epochs: int = 8  # passes over the data (paper: 100 to 800)
    batch_size: int = 32  # images per step, of all processes together (paper: 1024)
    base_lr: float = 4.7e-3  # times batch / 256 is the learning rate (paper: 5e-4)
    weight_decay: float = 0.04  # strength of weight decay (paper: 0.04, not on biases and norms)
    final_weight_decay: float = 0.4  # reached in a cosine (paper: 0.4)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 10)
    freeze_last_layer: int = 1  # epochs before the prototypes move (paper: 1)
    clip_grad: float = 3.0  # largest norm of each tensor's gradient (paper: 3; 1e9: any)

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


def multi_crop(args):
    """In the worker: random_crop for each crop of an image, two global, then local ones; and how many pixels
    its shorter side needs. Uses random_crop."""
    crops = [random_crop(args.image_size, args.min_scale)] * 2
    shortest = args.image_size / (0.75 * args.min_scale) ** 0.5  # even a crop of 3 : 4 is not enlarged
    sides = [args.image_size]
    if args.local_crops:
        crop = random_crop(args.local_size, args.local_min_scale, args.min_scale)
        crops += [crop] * args.local_crops
        shortest = max(shortest, args.local_size / (0.75 * args.local_min_scale) ** 0.5)
        sides += [args.local_size]
    if any(side % args.patch_size for side in sides):
        words = f"give multiples of --patch-size {args.patch_size}"
        sys.exit(f"--image-size, --local-size {sides}: {words}")
    return crops, shortest


def augment_crops(crops, u, order, args):
    """On the device, a call for each size: uint8 crops, 2 global (B, 3, S, S) and L local (B, 3, s, s), u of
    (2 + L, B, 9) -> (2 B, 3, S, S) and, if L > 0, (L B, 3, s, s), in [0, 1]. Uses augment."""
    crops = [crop.to(u.device, non_blocking=True) for crop in crops]
    sides = [crop.shape[3] for crop in crops]
    radius = min(5, min(sides) - 1) if any(args.crop_blurs) else 0
    first, second, local = args.crop_blurs
    is_second = torch.arange(2 * u.shape[1], device=u.device) >= u.shape[1]
    is_second = is_second.view(-1, 1, 1, 1)
    blur = torch.where(is_second, second, first)
    solarize = args.solarize * is_second

    x, numbers = torch.cat(crops[:2]), u[:2].flatten(0, 1)
    augmented = [augment(x, numbers, order, args.jitter, blur, radius, solarize)]
    if len(crops) > 2:
        x, numbers = torch.cat(crops[2:]), u[2:].flatten(0, 1)
        augmented += [augment(x, numbers, order, args.jitter, local, radius)]
    return augmented


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


def resize_positions(pos_embed, height, width):
    """Positions (1, 1 + N, D) of [CLS] and a square grid -> of height x width, bicubic; equal ones stay.
    As officially 0.1 is added to the new sides, which scales the grid a little."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (side, side) == (height, width):
        return pos_embed
    grid = rearrange(pos_embed[:, 1:], "one (h w) d -> one d h w", h=side)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    patches = rearrange(grid, "one d h w -> one (h w) d")
    return torch.cat([pos_embed[:, :1], patches], dim=1)


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) of any size that patches divide -> [CLS] after the norm (B, D), in timm's names.
    drop_path: rate of the last block, 0 in the first. Uses VITS, Block, Attention, resize_positions."""

    def __init__(self, arch="vit_small", image_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        dim, depth, heads = VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        patches = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, dim))
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(dim, heads, rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def embed(self, images):
        """Tokens (B, 1 + N, D) of [CLS] and the patches, with their positions."""
        x = self.patch_embed(images)
        pos_embed = resize_positions(self.pos_embed, *x.shape[2:])
        cls = self.cls_token.expand(len(x), -1, -1)
        return torch.cat([cls, x.flatten(2).mT], dim=1) + pos_embed

    def forward(self, images):
        return self.norm(self.blocks(self.embed(images)))[:, 0]


class DINOHead(nn.Module):
    """Features (B, in_dim) -> logits (B, out_dim): cosines with prototypes, the rows of weight_v, times
    weight_g, which norm_last_layer keeps at 1."""

    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True):
        super().__init__()
        first, second = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        third = nn.Linear(hidden_dim, bottleneck_dim)
        for layer in (first, second, third):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        lengths = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        directions = nn.Linear(bottleneck_dim, out_dim, bias=False).weight
        self.last_layer = nn.ParameterDict({"weight_g": lengths, "weight_v": directions})

    def forward(self, x):
        prototypes = self.last_layer.weight_g * F.normalize(self.last_layer.weight_v, dim=1)
        return F.linear(F.normalize(self.mlp(x), dim=1), prototypes)


class DINO(nn.Module):
    """Student and teacher, both backbone and head, images (B, 3, H, W) -> logits (B, out_dim); and the centre
    (1, out_dim) of the teacher's. Uses VisionTransformer, DINOHead, VITS."""

    def __init__(self, arch, image_size, patch_size, out_dim, head_dim, norm_last_layer, drop_path):
        super().__init__()
        self.student, self.teacher = nn.Sequential(), nn.Sequential()
        for network, rate in ((self.student, drop_path), (self.teacher, 0.0)):
            network.backbone = VisionTransformer(arch, image_size, patch_size, rate)
            network.head = DINOHead(VITS[arch][0], out_dim, head_dim, norm_last_layer=norm_last_layer)
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, out_dim))


# --- Loss ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def teacher_targets(teacher_logits, center, teacher_temp):
    """q = softmax((t - c) / T_t) of teacher logits (..., K), as precise as the center."""
    return torch.softmax((teacher_logits - center) / teacher_temp, dim=-1)


def dino_loss(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """Mean cross-entropy of student logits (V, B, K) with targets of teacher logits (2, B, K), of views 0, 1,
    over pairs of different views (Eq. 3), in float32 or better. Uses teacher_targets."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = torch.log_softmax(student_logits.to(dtype) / student_temp, dim=-1)
    q = teacher_targets(teacher_logits, center, teacher_temp)
    others = log_p.sum(dim=0) - log_p[:2]  # (2, B, K): of all views but the target's own
    return -(q * others).sum(dim=-1).mean() / (len(log_p) - 1)


@torch.no_grad()
def update_center(center, teacher_logits, m):
    """c <- m c + (1 - m) mean of all teacher logits (2, B, K), after the loss. Uses gather."""
    mean = teacher_logits.to(center.dtype).mean(dim=(0, 1))
    return center.lerp_(gather(mean[None]).mean(dim=0, keepdim=True), 1 - m)


@torch.no_grad()
def sinkhorn_center(teacher_logits, teacher_temp, iterations=3):
    """The centre (1, K) by which the targets of teacher logits (2, B, K) use all prototypes alike: that of
    Sinkhorn-Knopp (2006.09882), which divides by sums of prototypes and of targets in turn. Uses gather."""
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    log_q = teacher_logits.to(dtype).flatten(0, 1) / teacher_temp
    shift = torch.zeros_like(log_q[:1])
    for _ in range(iterations):
        excess = gather(log_q.logsumexp(dim=0)[None]).logsumexp(dim=0)  # by prototype
        log_q = (log_q - excess).log_softmax(dim=1)
        shift += excess
    return teacher_temp * shift


# --- Optimiser ----------------------------------------------------------------------------------------------
def dino_schedule(step, total, warmup, base, final=0.0):
    """cosine_schedule with the official warm-up: at base one step earlier. Uses cosine_schedule."""
    if step < warmup:
        return base * step / max(1, warmup - 1)
    return cosine_schedule(step, total, warmup, base, final)


@torch.no_grad()
def momentum_update(encoder_q, encoder_k, m):
    """k <- m k + (1 - m) q for all parameters of encoder_k (key, target, teacher), not for buffers."""
    for q, k in zip(encoder_q.parameters(), encoder_k.parameters(), strict=True):
        k.lerp_(q, 1 - m)


# --- Monitor ------------------------------------------------------------------------------------------------
def target_moments(targets):
    """Targets (2, B, K) -> (K + 1): their mean, and behind it the mean of their entropies."""
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    return torch.cat([targets.mean(dim=(0, 1)), entropy[None]])


def monitor(moments, h, loss):
    """Metrics of target_moments, features h (N, D) and loss of the whole batch; and what is wrong, {words:
    the metric that shows it}. kl: what the student does not know of a target; information: what the target
    tells of its image. Uses collapse_metrics."""
    mean, entropy = moments[:-1], moments[-1].item()
    information = torch.special.entr(mean).sum().item() - entropy
    metrics = {"dino/teacher_entropy": entropy, "dino/kl": loss.item() - entropy}
    metrics["dino/information"] = information
    for name, value in collapse_metrics(h, center=True).items():
        metrics[f"monitor/{name}"] = value

    problems = {}
    if information < 0.1 and entropy < 0.5 * math.log(len(mean)):
        words = "one-hot teacher; keep the centering, raise --teacher-temp"
        problems[words] = "dino/information"
    elif information < 0.1:
        words = "uniform teacher; keep the sharpening, lower --teacher-temp"
        problems[words] = "dino/information"
    return metrics, problems


@torch.no_grad()
def attention_page(vit, images, pixels):
    """Images (B, 3, S, S), the same as `pixels` in [0, 1], and how [CLS] attends to them in each head of the
    last block, each over its maximum: (B (1 + heads), 3, S, S)."""
    *earlier, last = vit.blocks
    x = last.norm1(nn.Sequential(*earlier)(vit.embed(images)))
    qkv, heads = last.attn.qkv(x), last.attn.heads
    q, k, _ = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
    weights = torch.softmax(q[:, :, :1] @ k.mT / q.shape[3] ** 0.5, dim=3)

    maps = weights[:, :, 0, 1:].unflatten(2, vit.patch_embed(images).shape[2:])
    maps = F.interpolate(maps / maps.amax(dim=(2, 3), keepdim=True), images.shape[2:])
    maps = maps[:, :, None].expand(-1, -1, 3, -1, -1)
    return torch.cat([pixels[:, None], maps], dim=1).flatten(0, 1)


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Pretrain in the run folder, from its checkpoint if it has one; returns the last metrics."""
    may_be_zero = "local_crops jitter crop_blurs solarize drop_path final_weight_decay momentum"
    may_be_zero += " warmup_teacher_temp_epochs freeze_last_layer"
    at_most = dict.fromkeys("min_scale crop_blurs solarize drop_path momentum final_momentum".split(), 1)
    at_most |= {"local_min_scale": args.min_scale if args.local_crops else 1}
    check_flags(args, may_be_zero, at_most)
    transforms, shortest = multi_crop(args)
    rank, world, device, amp = start_processes(args.device, args.amp)
    data = Images(args, transforms, shortest)
    local_batch = images_per_pass(args, len(data.items), world)
    per_epoch = len(data.items) // args.batch_size
    total = args.epochs * per_epoch
    warmup = min(total, round(args.warmup_epochs * per_epoch))
    peak_lr = args.base_lr * args.batch_size / 256
    warm = np.linspace(args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
    temps = [*warm.tolist(), *[args.teacher_temp] * args.epochs]  # T_t of each epoch

    torch.manual_seed(args.seed)
    sizes = args.image_size, args.patch_size, args.out_dim, args.head_dim
    model = DINO(args.arch, *sizes, args.norm_last_layer, args.drop_path).to(device)
    student, teacher = model.student, model.teacher
    dim, depth, heads = VITS[args.arch]
    shape = {"img_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0}
    shape |= {"embed_dim": dim, "depth": depth, "num_heads": heads}
    facts = {"builder": "timm.VisionTransformer", "arch_args": shape, "feature_dim": dim}
    if args.init:
        load_encoder(student.backbone.state_dict(), args.init, shape)
    teacher.load_state_dict(student.state_dict())

    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, peak_lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = open_run(args, "dino", parts, len(data.items), amp)  # loads its checkpoint into the parts
    step = run.step
    settled = per_epoch * max(args.freeze_last_layer, args.warmup_teacher_temp_epochs)
    alarm_from = max(warmup, settled, min(500, total // 5))
    if args.compile:
        for part in (*student, *teacher):
            part.compile()
    net = nn.parallel.DistributedDataParallel(student) if world > 1 else student

    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(data, batch_sampler=keys, pin_memory=device.type == "cuda", **workers)
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (MEAN, STD))
    if rank == 0:
        print(f"{args.arch}, {amp}, {world} x {device}, effective learning rate {peak_lr:g}, {total} steps")

    with guarded(run, total) as signals:  # torchrun: none; adds run.bar, save_at
        for *crops, _ in loader:  # all epochs that are left
            epoch = step // per_epoch
            lr = dino_schedule(step, total, warmup, peak_lr, 1e-6)
            for group in optimizer.param_groups:
                group["lr"] = lr
            decay = cosine_schedule(step, total, 0, args.weight_decay, args.final_weight_decay)
            optimizer.param_groups[0]["weight_decay"] = decay
            momentum = cosine_schedule(step, total, 0, args.momentum, args.final_momentum)
            teacher_temp = temps[epoch] if args.sharpening else args.student_temp

            generator = seeded(3, args.seed, step)  # 1: crops, 2: order of the images, 3: augment
            u = torch.rand(len(crops), args.batch_size, 9, generator=generator)
            u = u.chunk(world, dim=1)[rank].to(device, non_blocking=True)
            order = [*torch.randperm(4, generator=generator).tolist(), 4]
            augmented = augment_crops(crops, u, order, args)

            views = [(x - mean) / std for x in augmented]
            torch.manual_seed(seeded(4, args.seed, step, rank).initial_seed())  # of stochastic depth
            with torch.autocast(device.type, amp, enabled=amp is not None):
                h = teacher.backbone(views[0])  # global crops
                teacher_logits = teacher.head(h).unflatten(0, (2, -1))
                student_logits = torch.cat([net(x) for x in views]).unflatten(0, (len(crops), -1))
            center = model.center.clone()  # before this step
            center = sinkhorn_center(teacher_logits, teacher_temp) if args.sinkhorn else center
            loss = dino_loss(student_logits, teacher_logits, center, args.student_temp, teacher_temp)
            if args.centering and not args.sinkhorn:
                update_center(model.center, teacher_logits, 0.9)  # official

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms = [nn.utils.clip_grad_norm_(p, args.clip_grad) for p in trained]  # each by itself
            if epoch < args.freeze_last_layer:
                student.head.last_layer.zero_grad()  # to None, not to 0: AdamW would decay

            step += 1
            run.bar.update()
            at_log = step == 1 or step % args.log_every == 0 or step == total
            if at_log or signals:  # only here does a step wait for the device, float16's scaler apart
                loss = gather(loss.detach()[None]).mean()  # of all processes
                grad_norm = torch.stack(norms).norm()
                check_finite(step, loss, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()
            momentum_update(student, teacher, momentum)  # after the step

            saves = at_log and time.monotonic() >= run.save_at
            if at_log:
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                targets = teacher_targets(teacher_logits, center, teacher_temp)
                moments = gather(target_moments(targets)[None]).mean(dim=0)
                found, problems = monitor(moments, gather(h), loss)
                log_metrics(run, step, metrics | found | {"dino/momentum": momentum}, problems, alarm_from)

            if rank == 0 and (saves or step in (1, total)):
                rows = torch.cat([F.interpolate(x, args.image_size) for x in augmented])
                rows = rows.unflatten(0, (-1, local_batch))[:, :8].flatten(0, 1)  # a column for each image
                torchvision.utils.save_image(rows, run.folder / "views.png", nrow=min(8, local_batch))
                page = attention_page(teacher.backbone, views[0][:8], augmented[0][:8])
                torchvision.utils.save_image(page, run.folder / "attention.png", nrow=1 + heads)
            if saves:
                save_run(run, step, teacher.backbone.state_dict(), **facts)
            if signals:
                break

        save_run(run, step, teacher.backbone.state_dict(), **facts)
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
