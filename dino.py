# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""DINO: learn features by saying of any crop of an image what an average of oneself says of other crops.

Paper: Caron et al. 2021, arXiv 2104.14294; where paper and official PyTorch code differ, the code.
A student and a teacher, its moving average, turn crops into logits over K prototypes: s_v of the student for
every crop, two global and some small local ones, t_u of the teacher for the global ones, of moving mean c:
  q_u = softmax((t_u - c) / T_t),  p_v = softmax(s_v / T_s),  L = mean over pairs u != v of  -sum q_u log p_v
There are no negatives. Two opposite forces on the teacher stop the collapse (Sec. 5.3): centering (- c) keeps
one prototype from taking all, sharpening (T_t below T_s) keeps all from being alike.

Demo:   python dino.py
Photos: python dino.py --data photos/ --image-size 96 --local-size 48 --patch-size 8 --arch vit_tiny \
            --epochs 200 --batch-size 256 --base-lr 1e-3 --warmup-epochs 10 --momentum 0.996 --workers 8
Paper:  torchrun --nnodes 2 --nproc-per-node 8 dino.py --data imagenet/ --image-size 224 --local-size 96 \
            --local-crops 8 --local-min-scale 0.05 --crop-blurs 1 0.1 0.5 --patch-size 16 --arch vit_small \
            --drop-path 0.1 --head-dim 2048 --out-dim 65536 --teacher-temp 0.04 --momentum 0.996 \
            --epochs 100 --batch-size 1024 --base-lr 5e-4 --warmup-epochs 10 --workers 10

Differs from the official code: crops resized as uint8 tensors (within 2 of 255 of Pillow's), of large JPEGs
decoded at reduced size; one order of colours a batch, not an image; a true Gaussian blur, cut at 5 pixels;
AdamW for ResNets too; bfloat16 on GPUs that have it; a T_t of .02, because in short runs the teacher stays
nearly uniform at .04 (demo at batch 64: entropy 6.5 of 6.9 after 5 epochs). Several processes give the loss,
gradient and centre of one, but for stochastic depth, drawn by each process, and ResNets' BatchNorm:
synchronised on GPUs, each process's own on CPUs.
"""

import contextlib
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
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

# --- Args ---------------------------------------------------------------------------------------------------
Arch = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "resnet18", "resnet34", "resnet50"]
Triple, Quadruple = tuple[float, float, float], tuple[float, float, float, float]


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    local_size: int = 16  # side of a local crop in pixels (paper: 96)
    local_crops: int = 2  # local crops of an image (paper: 8; 0: none, then --min-scale 0.14)
    patch_size: int = 8  # side of a patch in pixels (paper: 16 or 8)
    min_scale: float = 0.4  # smallest area of a crop as a share of the image (paper: 0.4, global crops)
    local_min_scale: float = 0.15  # that of the local crops, which reach from it to min_scale (paper: 0.05)
    jitter: Quadruple = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation, hue (paper: the same)
    crop_blurs: Triple = (0.0, 0.0, 0.0)  # chance of blur: first, second global, local (paper: 1 0.1 0.5)
    solarize: float = 0.2  # probability of solarization (paper: 0.2, of the second global crop)
    workers: int = 2  # processes that read images, for each training process
    arch: Arch = "vit_nano"  # encoder (paper: vit_small, vit_base, resnet50)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 10 x the work
    drop_path: float = 0.0  # stochastic depth of the last block, 0 in the first (paper: 0.1)
    head_dim: int = 512  # width of the head's hidden layers (paper: 2048)
    out_dim: int = 1024  # K, number of prototypes (paper: 65536)
    norm_last_layer: bool = True  # prototypes of length 1 (paper: on, off for vit_small's long runs)
    teacher_temp: float = 0.02  # T_t; lower it where the teacher stays uniform (paper: 0.04 or 0.07)
    warmup_teacher_temp: float = 0.04  # T_t at the start of its warm-up (paper: 0.04)
    warmup_teacher_temp_epochs: int = 0  # epochs from it to --teacher-temp, in even steps (paper: 0 or 30)
    student_temp: float = 0.1  # T_s (paper: 0.1)
    momentum: float = 0.99  # of the moving average (paper: 0.996, rising to 1 in a cosine as here)
    centering: bool = True  # without, the teacher names one prototype for all: watch it with --momentum 0.9
    sharpening: bool = True  # without, T_t is T_s, and the teacher likes all prototypes alike: watch it
    epochs: int = 8  # passes over the data (paper: 100 to 800)
    batch_size: int = 32  # images per step, of all processes together (paper: 1024)
    base_lr: float = 8e-3  # times batch / 256 is the learning rate (paper: 5e-4)
    weight_decay: float = 0.04  # strength of weight decay (paper: 0.04, not on biases and norms)
    final_weight_decay: float = 0.4  # reached in a cosine (paper: 0.4)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 10)
    freeze_last_layer: int = 1  # epochs in which the prototypes stay as they are (paper: 1)
    clip_grad: float = 3.0  # largest norm of the gradient of each tensor on its own (paper: 3)
    init: str = ""  # backbone.pt that the encoder starts from, of convert.py or an earlier run
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere
    compile: bool = False  # torch.compile the model
    run_dir: str = ""  # default: runs/METHOD, and a hash of the flags that differ from the defaults
    restart: bool = False  # begin anew in a run folder that is in use
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps
    picture_every: int = 500  # steps


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


VITS = {"vit_nano": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6)}  # width, depth, heads
VITS |= {"vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}


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


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) of any size that patches divide -> [CLS] after the norm (B, D), in timm's names.
    drop_path: rate of the last block, 0 in the first. Uses VITS, Block, Attention, resize_positions."""

    def __init__(self, arch="vit_small", image_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        dim, depth, heads = VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, images):
        x = self.patch_embed(images)  # its weights and bias start as PyTorch's
        pos_embed = resize_positions(self.pos_embed, *x.shape[2:], offset=0.1)
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


class Prototypes(nn.Module):
    """Linear layer (B, D) -> (B, K) without bias; its rows are weight_v, with length 1, times weight_g."""

    def __init__(self, dim, out_dim, norm_last_layer=True):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(dim, out_dim, bias=False).weight.detach())

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """Features (B, in_dim) -> logits (B, out_dim), cosines with prototypes. Uses Prototypes."""

    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True):
        super().__init__()
        widths, layers = (in_dim, hidden_dim, hidden_dim, bottleneck_dim), []
        for left, right in pairwise(widths):
            layers += [nn.Linear(left, right), nn.GELU()]
            nn.init.normal_(layers[-2].weight, std=0.02)
            nn.init.zeros_(layers[-2].bias)
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(bottleneck_dim, out_dim, norm_last_layer)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=1))


def build(args, drop_path=0.0):
    """Student or teacher, images -> logits (B, K): backbone, images -> features (B, D), and head."""
    if args.arch.startswith("vit"):
        backbone = VisionTransformer(args.arch, args.image_size, args.patch_size, drop_path)
        dim = VITS[args.arch][0]
    else:
        backbone, dim = resnet(args.arch, args.stem)
    head = DINOHead(dim, args.out_dim, args.head_dim, norm_last_layer=args.norm_last_layer)
    return nn.Sequential(OrderedDict(backbone=backbone, head=head))


# --- Loss ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def teacher_targets(teacher_logits, center, teacher_temp):
    """Targets q = softmax((t - c) / T_t) of teacher logits (..., K)."""
    centered = teacher_logits.float() - center  # no prototype is ahead: against one-hot collapse
    return torch.softmax(centered / teacher_temp, dim=-1)  # sharpened: against uniform collapse


def dino_loss(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """Mean cross-entropy of student logits (V, B, K) with the targets of teacher logits (2, B, K), of views 0
    and 1, over the 2 V - 2 pairs of different views (Eq. 3), for the images here. Uses teacher_targets."""
    log_p = torch.log_softmax(student_logits.float() / student_temp, dim=-1)
    q = teacher_targets(teacher_logits, center, teacher_temp)
    others = log_p.sum(dim=0) - log_p[: len(q)]  # (2, B, K): of all views but the target's own
    return -(q * others).sum(dim=-1).mean() / (len(log_p) - 1)


@torch.no_grad()
def update_center(center, teacher_logits, m):
    """c <- m c + (1 - m) mean of teacher logits (2, B, K) of all processes (Eq. 4), in place. Uses gather."""
    mean = gather(teacher_logits.float().mean(dim=(0, 1))[None]).mean(dim=0)
    return center.lerp_(mean.expand_as(center), 1 - m)


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


@torch.no_grad()
def teacher_metrics(targets, loss):
    """Of targets (2, B, K) and the mean loss of all processes (all must call it): entropy of a target; KL
    divergence, what the student does not know; information, entropy of the mean target less that of one;
    number of prototypes that are some target's first. Uses gather."""
    entropy = gather(torch.special.entr(targets).sum(dim=-1).mean()[None]).mean()
    mean = gather(targets.mean(dim=(0, 1))[None]).mean(dim=0)
    information = torch.special.entr(mean).sum() - entropy
    used = gather(targets.argmax(dim=-1).flatten()).unique()
    values = {"teacher_entropy": entropy, "kl": loss - entropy, "information": information}
    return {name: value.item() for name, value in values.items()} | {"prototypes_used": len(used)}


@torch.no_grad()
def cls_attention(vit, images):
    """Attention (B, heads, h, w) of the last block's [CLS] to the patches of images (B, 3, H, W)."""
    attn, seen = vit.blocks[-1].attn, []
    hook = attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    vit.forward(images)  # not compiled, where hooks may be lost
    hook.remove()
    q, k, _ = rearrange(seen[0], "b n (three h d) -> three b h n d", three=3, h=attn.heads)
    weights = torch.softmax(q[:, :, :1] @ k.mT / q.shape[3] ** 0.5, dim=3)[:, :, 0, 1:]
    return weights.unflatten(2, (images.shape[2] // vit.patch_embed.proj.stride[0], -1))


def mass_mask(attention, keep=0.6):
    """The fewest patches of attention (..., h, w) that hold the share `keep` of it, as bool."""
    mass, order = attention.flatten(-2).sort(dim=-1)
    kept = (mass / mass.sum(dim=-1, keepdim=True)).cumsum(dim=-1) > 1 - keep
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)


def attention_picture(images, attention):
    """Page (3, H, W) in [0, 1]: each image (B, 3, H, W), the attention (B, heads, h, w) of each of its heads,
    and the image under the mass_mask of each head. Uses mass_mask."""
    zoom = images.shape[2] // attention.shape[2]
    maps = torch.stack([attention, mass_mask(attention)])  # (2, B, heads, h, w)
    heat, mask = maps.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)[:, :, :, None]
    panels = torch.cat([images[:, None], heat.expand(-1, -1, 3, -1, -1), images[:, None] * mask], dim=1)
    rows = F.interpolate(panels.flatten(0, 1), scale_factor=math.ceil(96 / images.shape[3]))
    return torchvision.utils.make_grid(rows, panels.shape[1], normalize=True, scale_each=True, pad_value=1)


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
    zero = "local_crops workers jitter crop_blurs solarize drop_path weight_decay final_weight_decay seed"
    zero += " warmup_epochs warmup_teacher_temp_epochs freeze_last_layer momentum"
    most = dict.fromkeys("min_scale crop_blurs solarize drop_path momentum".split(), 1)
    most |= {"local_min_scale": args.min_scale} if args.local_crops else {}
    most |= {"warmup_teacher_temp": args.teacher_temp} if args.warmup_teacher_temp_epochs else {}
    check_flags(args, zero.split(), **most, warmup_epochs=args.epochs)
    vit = args.arch.startswith("vit")
    sides = [args.image_size] * 2 + [args.local_size] * args.local_crops
    if vit and any(side % args.patch_size for side in sides):
        flags = f"--image-size {args.image_size} --local-size {args.local_size}"
        raise SystemExit(f"{flags}: give multiples of --patch-size {args.patch_size}")
    rank, world, device, amp = start_processes(args.device, args.amp)
    views = [random_crop(args.image_size, args.min_scale)] * 2
    small = args.local_size, args.local_min_scale, args.min_scale
    views += [random_crop(*small) for _ in range(args.local_crops)]
    smallest = min(args.min_scale, args.local_min_scale * (args.image_size / args.local_size) ** 2)
    data = Images(args.data, views, args.seed, args.image_size, smallest, rank)
    if args.batch_size > len(data.items) or args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size}: give a multiple of {world}, at most {data.found}")
    if not vit and args.batch_size * args.local_crops == world:
        raise SystemExit(f"--batch-size {args.batch_size}: BatchNorm needs two local crops in each process")
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    peak_lr = args.base_lr * args.batch_size / 256
    torch.manual_seed(args.seed)
    student, teacher = build(args, args.drop_path), build(args).requires_grad_(False)
    if args.init:
        load_encoder(student, "backbone.", args.init, rank)
    run, checkpoint = open_run(args, "dino", rank)
    teacher.load_state_dict(student.state_dict())
    if world > 1 and device.type == "cuda":
        student, teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (student, teacher))
    student, teacher = (net.to(device, memory_format=torch.channels_last) for net in (student, teacher))
    center = checkpoint.get("center") if checkpoint else torch.zeros(1, args.out_dim)
    if getattr(center, "shape", None) != (1, args.out_dim):
        raise SystemExit(f"{run}/checkpoint.pt does not fit (center): use another --run-dir, or --restart")
    center = center.to(device)
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, peak_lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    for part in (*student, *teacher) if args.compile else ():
        part.compile()
    net = student
    if world > 1:  # no broadcast of buffers: it would write into those that the other pass's gradient needs
        net = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. Run folder {run}, step {step} of {total}")
        print(f"{args.arch}, {amp or torch.float32}, {world} x {device}, effective learning rate {peak_lr:g}")
    bar = tqdm(total=total, initial=step, disable=rank > 0)
    blurs = [*args.crop_blurs[:2], *args.crop_blurs[2:] * args.local_crops]  # of each crop
    blur_radius = min(5, min(sides) - 1) if any(blurs) else 0
    solarize = [0.0, args.solarize] + [0.0] * args.local_crops
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for crops in loader:
            waited += time.perf_counter() - asked
            epoch = step // per_epoch
            for group in optimizer.param_groups:
                group["lr"] = dino_schedule(step, total, warmup, peak_lr, 1e-6)
            decay = dino_schedule(step, total, 0, args.weight_decay, args.final_weight_decay)
            optimizer.param_groups[0]["weight_decay"] = decay
            warm = args.warmup_teacher_temp_epochs
            ramp = min(1.0, epoch / max(1, warm - 1)) if warm else 1.0
            temp = args.warmup_teacher_temp + ramp * (args.teacher_temp - args.warmup_teacher_temp)
            temps = args.student_temp, temp if args.sharpening else args.student_temp
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            shape = args.batch_size, len(crops)  # for all processes
            numbers, order = draw_numbers(shape, args.jitter, blurs, solarize, generator)
            numbers = numbers.chunk(world)[rank].to(device, non_blocking=True)
            views = [crop.to(device, non_blocking=True) for crop in crops]
            views = [augment(view, numbers[:, i], order, blur_radius) for i, view in enumerate(views)]
            # global crops (2 B, 3, S, S) and, if there are any, local ones (L B, 3, s, s)
            batches = [torch.cat(part) for part in (views[:2], views[2:]) if part]
            torch.manual_seed(hash((args.seed, 4, step, rank)) % 2**32)  # of stochastic depth
            logs = step in (0, total - 1) or (step + 1) % args.log_every == 0
            with torch.autocast(device.type, amp, enabled=amp is not None):
                with torch.no_grad():
                    h = teacher.backbone(batches[0])
                    teacher_logits = teacher.head(h).float().unflatten(0, (2, -1))
                logits = torch.cat([net(images) for images in batches]).unflatten(0, (len(crops), -1))
            loss = dino_loss(logits, teacher_logits, center, *temps)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            targets = teacher_targets(teacher_logits, center, temps[1]) if logs else None
            if args.centering:
                update_center(center, teacher_logits, 0.9)  # after its use
            norms = [nn.utils.clip_grad_norm_(p, args.clip_grad) for p in trained]  # each on its own
            if epoch < args.freeze_last_layer:
                student.head.last_layer.zero_grad()  # to None: AdamW would still decay what has zeros
            step += 1
            saves = step % args.checkpoint_every == 0 or step == total
            if logs or saves:  # only here does a step wait for the device
                grad_norm = torch.stack(norms).norm()
                if not torch.isfinite(loss if scaler.get_scale() > 1 else loss + grad_norm):
                    why = f"loss {loss:g}, gradient {grad_norm:g}; lower --base-lr"
                    raise SystemExit(name_images(run, data, args.batch_size, logged, step, why))
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale  # float16 overflowed
            momentum = dino_schedule(step - 1, total, 0, args.momentum, 1.0)
            momentum_update(student, teacher, momentum)
            bar.update()
            if logs:
                mean = gather(loss.detach()[None]).mean()
                teaching = teacher_metrics(targets, mean)
                feature = collapse_metrics(h, center=True)
                # crops too alike also have a KL near 0; targets of one image alone have no information
                low = teaching["information"] < 0.1 if args.batch_size > 1 else teaching["kl"] < 0.01
                certain = teaching["teacher_entropy"] < 0.5 * math.log(args.out_dim)
                problems = {
                    "one-hot teacher: keep the centering, raise --teacher-temp": low and certain,
                    "uniform teacher: keep the sharpening, lower --teacher-temp": low and not certain,
                }
                settled = per_epoch * max(args.freeze_last_layer, args.warmup_teacher_temp_epochs)
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup, settled)
                metrics = {"train/loss": mean.item(), "train/lr": group["lr"]}
                metrics |= {"train/grad_norm": grad_norm.item(), "train/weight_decay": decay}
                metrics |= {f"dino/{k}": v for k, v in teaching.items()}
                metrics |= {"dino/center_norm": center.norm().item(), "dino/momentum": momentum}
                metrics |= {f"monitor/{k}": v for k, v in feature.items()}
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
                    entropy, kl = teaching["teacher_entropy"], teaching["kl"]
                    bar.set_postfix_str(f"loss {mean:.3f} entropy {entropy:.2f} KL {kl:.2f}")
            if rank == 0 and step == 1:  # a row for each image
                rows = [F.interpolate(view[:16].cpu(), args.image_size) for view in views]
                pixels = torch.stack(rows, dim=1).flatten(0, 1)
                pixels = pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                grid = torchvision.utils.make_grid(pixels.clamp(0, 1), len(views))
                torchvision.utils.save_image(grid, run / "views.png")
                board.add_image("views", grid, step)
            if rank == 0 and vit and (step in (1, total) or step % args.picture_every == 0):
                shown = views[0][:8]  # the first global crop of each image
                page = attention_picture(shown, cls_attention(teacher.backbone, shown)).cpu()
                torchvision.utils.save_image(page, run / f"attention-{step:06d}.png")
                board.add_image("attention", page, step)
            if saves and rank == 0:
                arch_args = {"patch_size": args.patch_size, "offset": 0.1} if vit else {"stem": args.stem}
                export_backbone(run, "dino", args, h.shape[1], teacher.backbone.state_dict(), **arch_args)
                state = {name: part.state_dict() for name, part in moving.items()} | {"center": center.cpu()}
                state |= {"method": "dino", "step": step, "metrics": metrics, "alarm": alarm}
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
