# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""Pretext tasks: learn features from a question whose answer the image itself gives, --task one of
rotation      which of the four turns is this?   Gidaris et al. 2018, arXiv 1803.07728
jigsaw        how were the nine tiles shuffled?  Noroozi and Favaro 2016, arXiv 1603.09246
colorization  what colour is each gray pixel?    Zhang et al. 2016, arXiv 1603.08511

Each is one class: the model; make() asks, score() marks, picture() shows. The loop knows no task. A model
gives each of K answers a probability p_k; over all questions of a batch the loss is
  L = mean of  -w sum_k q_k log p_k
with q one-hot and w = 1; in colorization (Eq. 2) q is spread over near colours, w is high for rare ones.
Nothing can collapse, but a cue that is no understanding may give the answer: most lines of a task close such
a shortcut; nearly 100 % after an epoch mean that one is open. Rotation fails without a natural up, jigsaw on
textures, colorization where colour has no meaning.

Demo:   python pretext.py
Photos: python pretext.py --task rotation --data photos/ --image-size 128 --epochs 100 --workers 8
Paper:  torchrun --nproc-per-node 4 pretext.py --task rotation --data CIFAR10 --stem cifar --epochs 200 \
            --batch-size 128 --base-lr 0.2 --weight-decay 5e-4 --warmup-epochs 0

Differs from the papers: torchvision's ResNets; Nesterov SGD, a cosine, decay of every tensor (papers: steps;
jigsaw: no Nesterov, no decay of biases; colorization: Adam); resized crops of the central square (RotNet on
CIFAR: shifts of 4 pixels); ImageNet's mean, std. Jigsaw: permutations by largest minimal distance, not mean;
tiles of 3/4 of a cell; a linear layer with BatchNorm on each, one on all. Colorization: lightness in three
channels; a head on the maps of four stages; the prior of 2,048 images, smoothed by the soft targets alone; T
.38 (code: .3837); a mean over coloured pixels, not an image's sum, to which 1e-3 of decay belongs. Processes
give loss and gradient of one, BatchNorm apart.
"""

import contextlib
import hashlib
import io
import itertools
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
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm


# --- Args ---------------------------------------------------------------------------------------------------
@dataclass
class Args:
    task: Literal["rotation", "jigsaw", "colorization"] = "rotation"  # what is asked of the encoder
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224, colorization 176, jigsaw's code 255)
    min_scale: float = 0.6  # smallest area of a crop as a share of the image (paper: 0.08, rotation)
    permutations: int = 100  # jigsaw: answers to choose from (paper: 1000)
    gray: float = 0.3  # jigsaw: share of gray images, the others get their colours shifted (paper: 0.3)
    neighbors: int = 5  # colorization: bins that share a pixel's colour (paper: 5, its code 10)
    rebalance: float = 0.5  # colorization: lambda; the lower, the more rare colours count (paper: 0.5)
    workers: int = 2  # processes that read images, for each training process

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"  # encoder
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 15 x the work

    epochs: int = 10  # passes over the data (paper: 14 to 200)
    batch_size: int = 128  # images per step, of all processes together (paper: 40 to 256)
    base_lr: float = 0.03  # times batch / 256 is the learning rate (paper: rotation 0.2, jigsaw 0.01)
    weight_decay: float = 5e-4  # strength of weight decay (paper: rotation and jigsaw 5e-4)
    warmup_epochs: float = 0.5  # linear from 0 (paper: none)

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


def central_square(image):
    """Of an image (C, H, W). Large crops of a wide one are wide and get squeezed, which tells the turn."""
    return v2.functional.center_crop(image, [min(image.shape[1:])] * 2)


def normalize(images):
    """Images (B, 3, H, W) in [0, 1] -> by ImageNet's mean and deviation. Uses MEAN, STD."""
    channels = zip(images.unbind(dim=1), MEAN, STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def rotate_batch(images):
    """(B, C, H, W) -> (4 B, C, H, W), each image by 0, 90, 180, 270 degrees counter-clockwise, and labels
    (4 B,) 0..3. Exact: an interpolating rotation would leave traces to read the answer from."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], dim=1)
    return turned.flatten(0, 1), torch.arange(4, device=images.device).repeat(len(images))


def jigsaw_permutations(n, seed=0):
    """n permutations (n, 9) of 0..8: the first is random, each next one has the largest minimal Hamming
    distance to those before it, among these the largest mean."""
    every = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.uint8)
    least, total = torch.full((len(every),), 9), torch.zeros(len(every), dtype=torch.long)
    chosen = [random.Random(seed).randrange(len(every))]
    while len(chosen) < n:
        distance = (every != every[chosen[-1]]).sum(dim=1)
        least, total = torch.minimum(least, distance), total + distance
        chosen.append((least * 10 * n + total).argmax().item())
    return every[chosen].long()


def jigsaw_tiles(images, permutations, corners, tile):
    """Square images (B, 3, S, S) -> tiles (B, 9, 3, tile, tile): slot t shows cell permutations[:, t] (B, 9)
    of the 3 x 3, cut at corners (B, 9, 3, 2), row and column in that cell, for each slot and channel."""
    side = images.shape[2] // 3 * 3
    images = images[:, :, :side, :side]
    cells = rearrange(images, "b c (r h) (s w) -> b (r s) c h w", r=3, s=3)
    x = cells.take_along_dim(permutations[:, :, None, None, None], dim=1)
    rows, columns = (corners[..., None] + torch.arange(tile, device=corners.device)).unbind(dim=3)
    x = x.take_along_dim(rows[..., None], dim=3)
    return x.take_along_dim(columns[..., None, :], dim=4)


RGB_TO_XYZ = (0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)
WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees


def rgb_to_lab(rgb):
    """sRGB (..., 3, H, W) in [0, 1] -> CIE Lab: L 0..100, a -86..98, b -108..94. Uses RGB_TO_XYZ, WHITE."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    red, green, blue = linear.unbind(dim=-3)
    rows = zip(RGB_TO_XYZ, WHITE, strict=True)  # numbers: a tensor would wait for the device
    xyz = torch.stack([(r * red + g * green + b * blue) / white for (r, g, b), white in rows])
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def lab_to_rgb(lab):
    """Inverse of rgb_to_lab; what no screen shows is clipped to [0, 1]. Uses RGB_TO_XYZ, WHITE."""
    lightness, a, b = lab.unbind(dim=-3)
    y = (lightness + 16) / 116
    f = torch.stack([a / 500 + y, y, (y - b / 200).clamp(min=0)], dim=-3)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    matrix = lab.new_tensor(RGB_TO_XYZ) / lab.new_tensor(WHITE)[:, None]
    linear = torch.einsum("ij,...jhw->...ihw", torch.linalg.inv(matrix), xyz)
    curved = 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, 12.92 * linear).clamp(0, 1)


LOWEST_B = (5, 2, 0, -2, -3, -4, -5, -5, -6, -7, -8, -8, -9, -10, -10, -11, -11, -11, -11, -9)
HIGHEST_B = (9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 9, 9, 9, 9, 8, 8, 8, 7, 7, 0)  # tens, for a = -90 to 100


def ab_gamut():
    """The paper's 313 colours (313, 2), a ascending, then b: the multiples of 10 in the convex hull of all
    sRGB colours, and their 8 neighbours. Uses LOWEST_B, HIGHEST_B."""
    rows = zip(range(-9, 11), LOWEST_B, HIGHEST_B, strict=True)
    return 10.0 * torch.tensor([(a, b) for a, low, high in rows for b in range(low, high + 1)])


def soft_bins(ab, bins, neighbors):
    """Colours (B, 2, h, w) -> their nearest bins (B, h, w, k), nearest first, with shares, sum 1; and
    whether images (B, 1, 1) have a colour: a gray photo has no answer to learn."""
    distance = torch.cdist(ab.movedim(1, -1), bins, compute_mode="donot_use_mm_for_euclid_dist")
    distance, index = distance.topk(neighbors, largest=False)
    share = torch.softmax(-distance.square() / (2 * 5**2), dim=-1)
    return index, share, ab.abs().amax(dim=(1, 2, 3)).view(-1, 1, 1) > 5


def colour_weights(data, bins, args):
    """From up to 2,048 images: weights (K,) of the bins, on average 1 (Eq. 4); logits (K,) of the best
    constant answer. SystemExit if 90 % are gray. Uses rgb_to_lab, RGB_TO_XYZ, WHITE, soft_bins,
    ignore_signals."""
    keys = range(0, len(data.items), math.ceil(len(data.items) / 2048))
    n, gray = len(bins), 0
    pairs = torch.zeros(n * n, dtype=torch.float64)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    try:
        for images, _ in DataLoader(data, 64, sampler=keys, **workers):
            ab = rgb_to_lab(images / 255)[:, 1:, ::4, ::4]
            index, share, coloured = soft_bins(ab, bins, args.neighbors)
            pair = index[..., :1] * n + index  # of the nearest bin and one with a share
            share = (share * coloured[..., None]).double()
            pairs += torch.bincount(pair.flatten(), share.flatten(), n * n)
            gray += (~coloured).sum().item()
    except OSError as error:  # no image can be read
        traceback.clear_frames(error.__traceback__)  # or the loader lives on and waits for its workers
        sys.exit(str(error).splitlines()[-1])
    if gray > 0.9 * len(keys):
        sys.exit(f"--task colorization: {gray} of {len(keys)} images are gray; take rotation or jigsaw")

    pairs = pairs.view(n, n) / pairs.sum()
    prior = pairs.sum(dim=0)  # smooth, for the targets are soft
    weights = 1 / ((1 - args.rebalance) * prior + args.rebalance / n)
    weights /= (prior * weights).sum()
    return weights.float(), (weights @ pairs).clamp(min=1e-6).log().float()


def annealed_mean(logits, bins, temperature=0.38):
    """Logits (B, K, h, w) of bins (K, 2) -> colours (B, 2, h, w): their mean under softmax(logits / T),
    between the mode (T = 0) and the brown mean (T = 1)."""
    share = torch.softmax(logits.to(bins.dtype) / temperature, dim=1)
    return torch.einsum("bkhw,kc->bchw", share, bins)


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


# A task has
#   backbone, width; constant, logits of the best constant answer
#   random_numbers, how many make() gets for each image, uniform, as u (B, random_numbers)
#   make(images, u) -> inputs, targets; forward(inputs) -> logits (R, K, ...), h (N, D)
#   score(logits, targets) -> error, weight, right, (R, ...); weight 0: not asked
#   picture(inputs, targets, logits) -> rows of pictures (rows, n, 3, H, W) in [0, 1]
# To add one, name it in TASKS and in Args.task.


class Rotation(nn.Module):
    """Which way is up? All four turns of an image, after its crop and flip: a flip after the turn would make
    90 and 270 degrees one."""

    def __init__(self, args, data):
        super().__init__()
        self.random_numbers = 0  # for each image
        self.backbone, self.width = resnet(args.arch, args.stem)
        self.head = nn.Linear(self.width, 4)
        self.register_buffer("constant", torch.zeros(4))  # logits of the best constant answer

    def make(self, images, u):
        """Images (B, 3, S, S) in [0, 1] -> inputs (4 B, 3, S, S), targets (4 B,)."""
        return rotate_batch(images)

    def forward(self, inputs):
        h = self.backbone(normalize(inputs).contiguous(memory_format=torch.channels_last))
        return self.head(h), h  # logits (4 B, 4)

    def score(self, logits, targets):
        """Of each answer: cross-entropy, its weight, whether it is right."""
        errors = cross_entropy(logits, targets[:, None])
        return errors, torch.ones_like(errors), logits.argmax(dim=1) == targets

    def picture(self, inputs, targets, logits):
        """Rows of pictures (2, n, 3, S, S): the turns of four images; each turned back as answered."""
        inputs, turns = inputs[:16], logits[:16].argmax(dim=1).tolist()
        back = [torch.rot90(x, -k, (1, 2)) for x, k in zip(inputs, turns, strict=True)]
        return torch.stack([inputs, torch.stack(back)])


class Jigsaw(nn.Module):
    """In which of --permutations orders, the same in all runs, are the nine tiles? Gaps, gray images, shifted
    colours and tiles of mean 0 and deviation 1 leave no edges, fringes and shades to go by."""

    def __init__(self, args, data):
        super().__init__()
        if args.image_size < 24:
            sys.exit(f"--image-size {args.image_size}: jigsaw needs tiles of 6 pixels, so 24 or more")
        if args.permutations < 2:
            sys.exit(f"--permutations {args.permutations}: give 2 or more answers to choose from")
        self.random_numbers = 2 + 9 * 2 + 9 * 6
        self.gray, cell = args.gray, args.image_size // 3
        self.tile = round(0.75 * cell)
        self.room = cell - self.tile  # for a tile's corner in its cell
        self.backbone, self.width = resnet(args.arch, args.stem)
        self.tile_head = nn.Sequential(nn.Linear(self.width, 1000), nn.BatchNorm1d(1000), nn.ReLU())
        self.head = nn.Linear(9 * 1000, args.permutations)
        self.register_buffer("permutations", jigsaw_permutations(args.permutations))
        self.register_buffer("constant", torch.zeros(args.permutations))

    def make(self, images, u):
        """Images (B, 3, S, S) in [0, 1] and u (B, 74), uniform, of permutation, gray, corners, shifts ->
        inputs (B, 9, 3, t, t), targets (B,)."""
        labels = (u[:, 0] * len(self.permutations)).long()
        gray = (u[:, 1] < self.gray).view(-1, 1, 1, 1)
        images = torch.where(gray, v2.functional.rgb_to_grayscale(images), images)

        most = (2 if self.room > 4 else 1) * ~gray  # the authors': 2
        corners = (u[:, 2:20].view(-1, 9, 1, 2) * (self.room + 1 - most)).long()
        shifts = (u[:, 20:].view(-1, 9, 3, 2) * (most + 1)).long()
        tiles = jigsaw_tiles(images, self.permutations[labels], corners + shifts, self.tile)

        mean, std = tiles.mean(dim=(3, 4), keepdim=True), tiles.std(dim=(3, 4), keepdim=True)
        return (tiles - mean) / torch.where(std > 1e-4, std, 1), labels

    def forward(self, inputs):
        h = self.backbone(inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return self.head(self.tile_head(h).view(len(inputs), -1)), h  # logits (B, permutations)

    def score(self, logits, targets):
        errors = cross_entropy(logits, targets[:, None])
        return errors, torch.ones_like(errors), logits.argmax(dim=1) == targets

    def picture(self, inputs, targets, logits):
        """Rows of pictures (3, n, 3, H, W): the tiles as shuffled, as answered, in the right order."""
        rows = [F.pad(inputs[:8] / 5 + 0.5, (1, 1, 1, 1), value=1.0)]
        for labels in (logits[:8].argmax(dim=1), targets[:8]):
            slots = self.permutations[labels].argsort(dim=1)[:, :, None, None, None]
            rows.append(rows[0].take_along_dim(slots, dim=1))
        return rearrange(torch.stack(rows), "n b (r s) c h w -> n b c (r h) (s w)", r=3)


class Colorization(nn.Module):
    """Which of 313 colours is every fourth pixel of every fourth row, given lightness alone, as three equal
    channels? The nearest colours share the answer; rare ones count more, else all would be brown."""

    def __init__(self, args, data):
        super().__init__()
        self.random_numbers = 0
        self.backbone, self.width = resnet(args.arch, args.stem)
        hidden = nn.Conv2d(self.width * 15 // 8, 256, 1), nn.BatchNorm2d(256), nn.ReLU()
        self.head = nn.Sequential(*hidden, nn.Conv2d(256, 313, 1))
        self.register_buffer("bins", ab_gamut())
        self.neighbors = args.neighbors
        weights, constant = colour_weights(data, self.bins, args)
        self.register_buffer("weights", weights)
        self.register_buffer("constant", constant.view(-1, 1, 1))

    def make(self, images, u):
        """Images (B, 3, S, S) in [0, 1] -> inputs L (B, 1, S, S), targets a, b (B, 2, S / 4, S / 4)."""
        lab = rgb_to_lab(images)
        return lab[:, :1], lab[:, 1:, ::4, ::4]

    def forward(self, inputs):
        x = normalize((inputs / 100).expand(-1, 3, -1, -1))
        x = x.contiguous(memory_format=torch.channels_last)
        net, maps = self.backbone, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        size = [math.ceil(side / 4) for side in inputs.shape[2:]]
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(F.interpolate(x, size, mode="bilinear"))
        return self.head(torch.cat(maps, dim=1)), x.mean(dim=(2, 3))  # logits (B, 313, S / 4, S / 4)

    def score(self, logits, targets):
        index, share, coloured = soft_bins(targets, self.bins, self.neighbors)
        nearest = index[..., 0]
        errors = cross_entropy(logits, index, share)
        return errors, self.weights[nearest] * coloured, logits.argmax(dim=1) == nearest

    def picture(self, inputs, targets, logits):
        """Rows of pictures (3, n, 3, S, S): lightness; with the colours as answered; as they are."""
        ab = targets[:8]
        rows = torch.cat([torch.zeros_like(ab), annealed_mean(logits[:8], self.bins), ab])
        rows = F.interpolate(rows, inputs.shape[2:], mode="bilinear")
        lab = torch.cat([inputs[:8].repeat(3, 1, 1, 1), rows], dim=1)
        return lab_to_rgb(lab).unflatten(0, (3, -1))


TASKS = {"rotation": Rotation, "jigsaw": Jigsaw, "colorization": Colorization}


# --- Loss ---------------------------------------------------------------------------------------------------
def cross_entropy(logits, index, share=1.0):
    """Of logits (R, K, ...) -> (R, ...), with targets `index` (R, ..., k), which have these shares."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays
    log_p = F.log_softmax(logits, dim=1).movedim(1, -1)
    return -(log_p.gather(-1, index) * share).sum(dim=-1)


# --- Monitor ------------------------------------------------------------------------------------------------
@torch.no_grad()
def monitor(scores, features):
    """Metrics of scores (R, 4): cross-entropy, that of a constant answer, weight, right or not; and of
    features (N, D). And what is wrong, {words: the metric that shows it}. Uses collapse_metrics."""
    error, constant, weight, right = scores[scores[:, 2] > 0].T  # weight 0: not asked
    accuracy = right.mean().item()
    ratio = (weight * error).mean() / (weight * constant).mean()
    gain = 1 - ratio.item()  # 0: no better than one answer to all
    metrics = {"pretext/accuracy": accuracy, "pretext/gain": gain}
    metrics["pretext/plain_loss"] = error.mean().item()
    for name, value in collapse_metrics(features, center=True).items():
        metrics[f"monitor/{name}"] = value

    problems = {}
    if gain < 0.01:
        words = f"no better than one answer to all, accuracy {accuracy:.3f}"
        problems[f"{words}; raise or lower --base-lr"] = "pretext/accuracy"
    return metrics, problems


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Pretrain in the run folder, from its checkpoint if it has one; returns the last metrics."""
    at_most = {"min_scale": 1, "gray": 1, "rebalance": 1, "permutations": 5000, "neighbors": 313}
    check_flags(args, may_be_zero="gray", at_most=at_most)
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = v2.Compose([central_square, random_crop(args.image_size, args.min_scale)])
    shortest = args.image_size / (0.75 * args.min_scale) ** 0.5  # even a crop of 3 : 4 is not enlarged
    data = Images(args, (crop,), shortest)
    images_per_pass(args, len(data.items), world)  # SystemExit unless processes share evenly
    per_epoch = len(data.items) // args.batch_size
    total = args.epochs * per_epoch
    warmup = min(total, round(args.warmup_epochs * per_epoch))
    peak_lr = args.base_lr * args.batch_size / 256

    torch.manual_seed(args.seed)
    model = TASKS[args.task](args, data)
    facts = {"builder": "torchvision.resnet", "arch_args": {"arch": args.arch, "stem": args.stem}}
    facts["feature_dim"] = model.width
    if args.init:
        load_encoder(model.backbone.state_dict(), args.init, facts["arch_args"])
    model = model.to(device, memory_format=torch.channels_last)  # twice as fast on CPUs

    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": args.weight_decay}
    # in float16 not fused: that cannot skip its first step, before it has any momentum
    optimizer = torch.optim.SGD(model.parameters(), peak_lr, **sgd, fused=amp != torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = open_run(args, "pretext", parts, len(data.items), amp)  # loads its checkpoint into the parts
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
    if rank == 0:
        print(f"{args.arch}, {amp}, {world} x {device}, effective learning rate {peak_lr:g}, {total} steps")

    with guarded(run, total) as signals:  # torchrun: none; adds run.bar, save_at
        for crops, _ in loader:  # all epochs that are left
            lr = cosine_schedule(step, total, warmup, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            u = torch.rand(args.batch_size, model.random_numbers, generator=seeded(3, args.seed, step))
            u = u.chunk(world)[rank].to(device, non_blocking=True)
            inputs, targets = model.make(crops.to(device, non_blocking=True) / 255, u)

            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits, h = net(inputs)
            errors, weights, right = model.score(logits, targets)
            sums = torch.stack([(weights * errors).sum(), (weights > 0).sum()])
            error, asked = gather(sums[None]).sum(dim=0)  # of all processes; DDP takes the mean
            loss = error / asked.clamp(min=1)  # of gray images nothing is asked

            optimizer.zero_grad()
            scaler.scale(loss).backward()

            step += 1
            run.bar.update()
            at_log = step == 1 or step % args.log_every == 0 or step == total
            scaler.unscale_(optimizer)
            if at_log or signals:  # only here does a step wait for the device, float16's scaler apart
                grad_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                check_finite(step, loss, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()

            saves = at_log and time.monotonic() >= run.save_at
            if at_log:
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                constant, _, _ = model.score(model.constant.expand_as(logits), targets)
                scores = torch.stack([errors.detach(), constant, weights, right], dim=-1).flatten(0, -2)
                found, problems = monitor(gather(scores), gather(h.detach()))
                log_metrics(run, step, metrics | found, problems, alarm_from)

            if rank == 0 and (saves or step in (1, total)):
                panels = model.picture(inputs, targets, logits.detach())
                path = run.folder / "answers.png"
                torchvision.utils.save_image(panels.flatten(0, 1), path, nrow=panels.shape[1])
            if saves:
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
