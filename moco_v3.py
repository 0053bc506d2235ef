# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""MoCo v3: find the other view of the same image in the batch; what it takes to train ViTs so.

Paper: Chen, Xie, He 2021, arXiv 2104.02057; where paper and official PyTorch code differ, the code.
A base network with a predictor turns view x into a query q, the momentum network, its moving average, turns
the other view into a key k. Each q_i has to find k_i among the keys of the batch (Algorithm 1):
  ctr(q, k) = -2 tau * mean over i of log(exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau)),  |q| = |k| = 1
  L = ctr(q, k') + ctr(q', k), where q', k' are those of the views exchanged
The other keys of the batch, of all processes, keep it from collapsing; there is no queue. ViTs are unstable
so, and less if their patch projection stays as it was drawn (Sec. 4): --no-freeze-patch-embed trains it.

Demo:   python moco_v3.py
Photos: python moco_v3.py --data photos/ --image-size 96 --patch-size 8 --arch vit_tiny --epochs 200 \
            --batch-size 512 --base-lr 5e-4 --warmup-epochs 20 --hidden-dim 2048 --workers 8
Paper:  torchrun --nnodes 4 --nproc-per-node 8 moco_v3.py --data imagenet/ --image-size 224 --patch-size 16 \
            --arch vit_small --min-scale 0.08 --blurs 1 0.1 --epochs 300 --batch-size 4096 --base-lr 1.5e-4 \
            --weight-decay 0.1 --warmup-epochs 40 --hidden-dim 4096 --workers 10
ResNet: torchrun --nnodes 2 --nproc-per-node 8 moco_v3.py --data imagenet/ --image-size 224 --arch resnet50 \
            --zero-init --min-scale 0.2 --blurs 1 0.1 --temperature 1 --hidden-dim 4096 --epochs 100 \
            --batch-size 4096 --base-lr 0.6 --weight-decay 1e-6 --warmup-epochs 10 --workers 10

Differs from the official code: no ViTs with convolutional stems; antialiased bicubic crops; one order of
colours a batch, not an image; the flip comes first; a true Gaussian blur, cut at 5 pixels; bfloat16 on GPUs
that have it; an image of another size gets interpolated positions. Several processes give the loss and
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
from itertools import pairwise
from pathlib import Path
from typing import Literal

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
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

# --- Args ---------------------------------------------------------------------------------------------------
Vit = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
ResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Pair, Quadruple = tuple[float, float], tuple[float, float, float, float]


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    patch_size: int = 8  # side of a patch in pixels (paper: 16)
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.08, ResNets 0.2)
    jitter: Quadruple = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation, hue (paper: the same)
    blurs: Pair = (0.0, 0.0)  # probability of Gaussian blur of the first, the second view (paper: 1 0.1)
    solarize: float = 0.2  # probability of solarization (paper: 0.2, of the second view)
    workers: int = 2  # processes that read images, for each training process
    arch: Vit | ResNet = "vit_nano"  # ResNets: LARS, --base-lr 0.3, decay 1e-6 (paper: vit_base, resnet50)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 10 x the work
    zero_init: bool = False  # residual branches start at 0; slower on small images (paper: its code on)
    freeze_patch_embed: bool = True  # the patch projection stays as drawn (paper: on, off is less stable)
    hidden_dim: int = 512  # hidden layer of projector and predictor (paper: 4096)
    proj_dim: int = 256  # width of z
    momentum: float = 0.99  # of the moving average (paper: 0.99, rising to 1 in a cosine as here)
    temperature: float = 0.2  # tau (paper: 0.2, ResNets 1)
    negatives: bool = True  # without, only attraction is left and z collapses to a few directions: watch it
    epochs: int = 10  # passes over the data (paper: 300, ResNets 100 to 1000)
    batch_size: int = 64  # images per step, of all processes together (paper: 4096)
    base_lr: float = 4e-3  # times batch / 256 is the learning rate (paper: 1.5e-4, ResNets 0.3 to 0.6)
    weight_decay: float = 0.1  # strength of weight decay (paper: 0.1 of all weights, ResNets 1e-6)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 40, ResNets 10)
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


MOCO_VITS = {"vit_nano": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 12)}  # 12, not 6 heads
MOCO_VITS |= {"vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}


def sincos_positions(dim, side):
    """Fixed positions (1, 1 + side^2, dim): zeros for [CLS], then [e(column), e(row)] of a square grid, where
    e(t) has all sines, then all cosines, of t / 10000^(k / (dim / 4)), k = 0 .. dim / 4 - 1."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0)).float()[None]


def resize_positions(pos_embed, height, width, offset=0.0, antialias=False):
    """Positions (1, 1 + N, D) of [CLS] and a square grid -> of height x width, bicubic; equal ones stay. An
    offset, 0.1 in DINO's official code, is added to the new sides and so shifts the grid a little."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (side, side) == (height, width):
        return pos_embed
    grid = rearrange(pos_embed[:, 1:], "one (h w) d -> one d h w", h=side)
    scale = ((height + offset) / side, (width + offset) / side)
    new = {"scale_factor": scale} if offset else {"size": (height, width)}
    grid = F.interpolate(grid, **new, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([pos_embed[:, :1], rearrange(grid, "one d h w -> one (h w) d")], dim=1)


class MoCoViT(nn.Module):
    """Images (B, 3, H, W) of any size that patches divide -> [CLS] after the norm (B, D), in timm's names.
    Uses MOCO_VITS, Block, Attention, sincos_positions, resize_positions."""

    def __init__(self, arch="vit_small", image_size=224, patch_size=16):
        super().__init__()
        dim, depth, heads = MOCO_VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))
        positions = sincos_positions(dim, image_size // patch_size).roll(dim // 2, dims=2)  # e(row) first
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                rows = dim if name.endswith("qkv") else len(layer.weight)  # Xavier, of q, k, v one by one
                bound = math.sqrt(6 / (rows + layer.weight[0].numel()))
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)
        self.patch_embed.requires_grad_(False)  # stays as drawn (Sec. 4)

    def forward(self, images):
        x = self.patch_embed(images)
        pos_embed = resize_positions(self.pos_embed, *x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + pos_embed
        return self.norm(self.blocks(x))[:, 0]


def resnet(arch, stem):
    """torchvision's ResNet without its classifier, images (B, 3, H, W) -> h (B, D); and D."""
    net = getattr(torchvision.models, arch)()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


def mlp_head(widths, last_norm=True):
    """Projector or predictor, (B, widths[0]) -> (B, widths[-1]), no biases: BatchNorm and ReLU after each
    layer but the last, which has BatchNorm without weights, or nothing."""
    layers = []
    for left, right in pairwise(widths):
        layers += [nn.Linear(left, right, bias=False), nn.BatchNorm1d(right), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2], *[nn.BatchNorm1d(widths[-1], affine=False)] * last_norm)


class MoCoV3(nn.Module):
    """Base and momentum encoder, each with its projector (`head` of ViTs, `fc` of ResNets), and predictor:
    images (B, 3, H, W) -> query, or with keys key, (B, dim), of any length, and feature (B, D).
    Uses MOCO_VITS, MoCoViT, Block, Attention, sincos_positions, resize_positions, resnet, mlp_head."""

    def __init__(
        self, arch, image_size=224, patch_size=16, stem="imagenet", dim=256, hidden_dim=4096, zero_init=True
    ):
        super().__init__()
        vit, self.projector = arch.startswith("vit"), "head" if arch.startswith("vit") else "fc"
        if vit:
            encoder, width = MoCoViT(arch, image_size, patch_size), MOCO_VITS[arch][0]
        else:
            encoder, width = resnet(arch, stem)
        for block in encoder.modules() if zero_init else ():
            if isinstance(block, (BasicBlock, Bottleneck)):
                nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
        hidden = (hidden_dim, hidden_dim) if vit else (hidden_dim,)
        setattr(encoder, self.projector, mlp_head((width, *hidden, dim)))
        self.base_encoder, self.momentum_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = mlp_head((dim, hidden_dim, dim), last_norm=vit)

    def forward(self, images, keys=False):
        encoder = self.momentum_encoder if keys else self.base_encoder
        if self.projector == "head":
            feature = encoder(images)
        else:
            for layer in list(encoder.children())[:-1]:
                images = layer(images)
            feature = images.flatten(1)
        projection = encoder.get_submodule(self.projector)(feature)
        return projection if keys else self.predictor(projection), feature


# --- Loss ---------------------------------------------------------------------------------------------------
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


def key_logits(q, k, temperature):
    """Cosines / tau of the queries (B, D) here with the keys (B, D) of all processes, and the column of each
    positive. No gradient into the keys. Uses gather."""
    q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (q, k.detach()))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return q @ gather(k).T / temperature, torch.arange(len(q), device=q.device) + rank * len(q)


def ctr(q, k, temperature, negatives=True):
    """One direction of Algorithm 1: 2 tau x InfoNCE of queries and keys (B, D) of any length, mean over the
    queries here; 2 tau keeps the gradient alike for any tau. Uses key_logits, gather."""
    logits, positive = key_logits(q, k, temperature)
    loss = F.cross_entropy(logits, positive) if negatives else -logits.gather(1, positive[:, None]).mean()
    return 2 * temperature * loss


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


def contrastive_metrics(logits, positive):
    """Share of rows whose positive is STRICTLY above all negatives (a tie is no success), and how far their
    cross-entropy is below that of equal logits, ln(candidates)."""
    best_negative = logits.scatter(1, positive[:, None], -torch.inf).amax(dim=1)
    accuracy = (logits.gather(1, positive[:, None])[:, 0] > best_negative).float().mean()
    return accuracy, logits[0].isfinite().sum().log() - F.cross_entropy(logits, positive)


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
    vit = args.arch.startswith("vit")
    if vit and args.image_size % args.patch_size:
        raise SystemExit(f"--image-size {args.image_size}: give a multiple of --patch-size {args.patch_size}")
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
    options = args.stem, args.proj_dim, args.hidden_dim, args.zero_init
    model = MoCoV3(args.arch, args.image_size, args.patch_size, *options)
    if vit and not args.freeze_patch_embed:
        model.base_encoder.patch_embed.requires_grad_(True)
    if args.init:
        load_encoder(model, "base_encoder.", args.init, rank)
        model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())
    run, checkpoint = open_run(args, "moco_v3", rank)
    model = model.to(device, memory_format=torch.channels_last)  # ResNets: twice as fast on CPUs
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if vit:  # biases, norms and [CLS] decay too, as in the official code
        optimizer = torch.optim.AdamW(trained, peak_lr, weight_decay=args.weight_decay, fused=True)
    else:
        optimizer = LARS(trained, peak_lr, weight_decay=args.weight_decay, lr_in_momentum=False)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
    # No broadcast of buffers: it would write into those that the other view's gradient needs
    net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    blur_radius = min(5, args.image_size - 1) if any(args.blurs) else 0  # 2.5 times the largest sigma
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
            momentum = cosine_schedule(step, total, 0, args.momentum, 1.0)
            momentum_update(model.base_encoder, model.momentum_encoder, momentum)  # before the step, official
            with torch.autocast(device.type, amp, enabled=amp is not None):
                (q0, h0), (q1, h1) = net(views[0]), net(views[1])  # one by one: BatchNorm of each view
                with torch.no_grad():
                    (k0, _), (k1, _) = model(views[0], keys=True), model(views[1], keys=True)
            loss = sum(ctr(q, k, args.temperature, args.negatives) for q, k in ((q0, k1), (q1, k0)))
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
                logits, positive = key_logits(q0.detach(), k1, args.temperature)
                values = torch.stack([loss.detach(), *contrastive_metrics(logits, positive)])
                mean, accuracy, gap = gather(values[None]).mean(dim=0).tolist()
                projection = collapse_metrics(torch.cat([q0, q1]))
                feature = collapse_metrics(torch.cat([h0, h1]), center=True)
                candidates, rank_z = logits.shape[1], projection["effective_rank"]
                first_rank = alarm.setdefault("first_rank", rank_z)
                low = rank_z < max(0.05 * min(2 * candidates, args.proj_dim), 0.1 * first_rank)
                chance = accuracy < 2 / candidates and gap < 0.01 * math.log(candidates)
                problems = {
                    "all z point one way; keep the negatives, lower --base-lr": projection["spread"] < 0.01,
                    f"z fills {rank_z:.1f} directions; keep the negatives, warm up to a lower --base-lr": low,
                    "positives are found by chance; keep the negatives, lower --base-lr": chance,
                }
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": mean, "train/lr": group["lr"], "train/grad_norm": grad_norm.item()}
                metrics |= {"moco_v3/contrastive_accuracy": accuracy, "moco_v3/gap": gap}
                metrics |= {"moco_v3/momentum": momentum}
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
                weights = model.base_encoder.state_dict()
                weights = {k: v for k, v in weights.items() if not k.startswith(f"{model.projector}.")}
                arch_args = {"stem": args.stem}
                if vit:
                    heads, fixed = MOCO_VITS[args.arch][2], {"xavier": "qkv", "fixed_positions": True}
                    arch_args = {"patch_size": args.patch_size, "heads": heads} | fixed
                export_backbone(run, "moco_v3", args, h0.shape[1], weights, **arch_args)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "moco_v3", "step": step, "metrics": metrics, "alarm": alarm}
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
