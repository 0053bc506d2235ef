# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""Pretext tasks: learn features from a question whose answer the image itself gives, --task one of
rotation      which of the four turns is this?   Gidaris et al. 2018, arXiv 1803.07728
jigsaw        how were the nine tiles shuffled?  Noroozi and Favaro 2016, arXiv 1603.09246
colorization  what colour has each gray pixel?   Zhang et al. 2016, arXiv 1603.08511
Each is a classification with cross-entropy: of 4 turns, of --permutations orders, of 313 colours.
The labels are real, so nothing collapses; but each can be answered by a cue that is no understanding, and
most lines of a task close such a shortcut. Nearly 100 % after an epoch means that one is open.
Rotation fails where there is no natural up (from above, microscopes, textures, the digits 0, 1, 8). Jigsaw
fails on textures, and where a thing fills one tile alone; what it learns depends on grid and permutations.
Colorization fails where colour has no meaning (made things, stains), and on gray or infrared data.

Demo:   python pretext.py
Photos: python pretext.py --task rotation --data photos/ --image-size 128 --epochs 100 --workers 8
Paper: torchrun --nproc-per-node 4 pretext.py --task rotation --data CIFAR10 --stem cifar --epochs 200 \
            --batch-size 128 --base-lr 0.2 --weight-decay 5e-4 --warmup-epochs 0

Differs from the papers: torchvision's ResNets for their NIN, AlexNet and VGG; one optimiser, SGD with a
cosine, for steps (rotation, jigsaw) and Adam (colorization); ImageNet's mean and std; random resized crops of
the central square, mirrored. Jigsaw: permutations by largest minimal distance, not mean; tiles of 3/4 of a
cell at any size, colours shifted within their cell; one linear layer with BatchNorm and ReLU on each tile,
then one on all. Colorization: a head on the maps of all four stages, for dilated layers; frequencies of
colours from 2,048 images, not smoothed; the loss is the mean over the pixels of images with colour. Several
processes give the loss and gradient of one, but for BatchNorm: each process's own.
"""

import contextlib
import hashlib
import itertools
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
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
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
    image_size: int = 32  # side of a view in pixels (paper: 224, jigsaw 225, colorization 176)
    min_scale: float = 0.6  # smallest area of a crop as a share of the image (paper: 0.08, rotation)
    permutations: int = 100  # jigsaw: answers to choose from (paper: 1000)
    gray: float = 0.3  # jigsaw: share of gray images, the others get their colours shifted (paper: 0.3)
    neighbors: int = 5  # colorization: bins that share a pixel's colour (paper: 5, its code 10)
    rebalance: float = 0.5  # colorization: lambda; the lower, the more rare colours count (paper: 0.5)
    workers: int = 2  # processes that read images, for each training process
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"  # encoder
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 10 x the work
    epochs: int = 10  # passes over the data (paper: 14 to 200)
    batch_size: int = 128  # images per step, of all processes together (paper: 40 to 256)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    base_lr: float = 0.03  # times batch / 256 is the learning rate (paper: rotation 0.2, jigsaw 0.01)
    weight_decay: float = 5e-4  # strength of weight decay (paper: 5e-4, colorization 1e-3)
    warmup_epochs: float = 0.5  # linear from 0 (paper: none)
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


def central_square(image):
    """Of an image (C, H, W). Large crops of a wide one are wide and get squeezed, which tells the turn."""
    return v2.functional.center_crop(image, [min(image.shape[1:])] * 2)


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
    cell = images.shape[2] // 3
    images = images[:, :, : 3 * cell, : 3 * cell]
    cells = rearrange(images, "b c (r h) (s w) -> b (r s) c h w", r=3, s=3)
    x = cells.gather(1, permutations[:, :, None, None, None].expand_as(cells))
    rows, columns = (corners[..., None] + torch.arange(tile, device=corners.device)).unbind(dim=3)
    x = x.gather(3, rows[..., None].expand(-1, -1, -1, -1, cell))
    return x.gather(4, columns[..., None, :].expand(-1, -1, -1, tile, -1))


RGB_TO_XYZ = (0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)
WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees


def rgb_to_lab(rgb):
    """sRGB (..., 3, H, W) in [0, 1] -> CIE Lab: L 0..100, a -86..98, b -108..94. Uses RGB_TO_XYZ, WHITE."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = rgb.new_tensor(RGB_TO_XYZ) / rgb.new_tensor(WHITE)[:, None]
    xyz = torch.einsum("ij,...jhw->...ihw", matrix, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(dim=-3)
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


def ab_gamut():
    """The paper's 313 colours (313, 2), a ascending, then b: the multiples of 10 inside the convex hull of
    all sRGB colours, and their 8 neighbours. Uses rgb_to_lab, RGB_TO_XYZ, WHITE."""
    levels = torch.arange(6, dtype=torch.float64) / 5
    cube = torch.cartesian_prod(levels, levels, levels)
    colours = rgb_to_lab(cube.T[:, :, None])[1:, :, 0].T
    ticks = torch.arange(-120, 121, 10, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks)
    angles = torch.atan2(*(colours - grid[:, None]).unbind(dim=2)).sort(dim=1).values
    around = torch.cat([angles, angles[:, :1] + 2 * math.pi], dim=1)
    inside = around.diff(dim=1).amax(dim=1) < math.pi  # of a point outside, all lie on one side
    near = F.max_pool2d(inside.view(1, len(ticks), -1).float(), 3, stride=1, padding=1)
    return grid[near.flatten() > 0].float()


def is_coloured(ab):
    """Which images, by their a, b (B, 2, h, w), have a colour; a gray photo has no answer to learn."""
    return ab.abs().amax(dim=(1, 2, 3)) > 5


def annealed_mean(logits, bins, temperature=0.38):
    """Logits (B, K, h, w) of bins (K, 2) -> colours (B, 2, h, w): their mean under softmax(logits / T),
    between the mode (T = 0) and the brown mean (T = 1)."""
    return torch.einsum("bkhw,kc->bchw", torch.softmax(logits.float() / temperature, dim=1), bins)


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


class Task(nn.Module):
    """An encoder, a head and a question with K answers; R rows of logits. Uses resnet. Each task adds
    batch(images, numbers): uint8 images (B, 3, H, W) -> inputs, targets (B, ...), the numbers of draw;
    forward(inputs) -> logits (R, K, ...), h (R', D) of all that the encoder saw; columns(inputs, targets,
    logits) -> {title: pictures}. constant: the logits of the best answer that does not look at the image."""

    def __init__(self, args, constant):
        super().__init__()
        self.backbone, self.width = resnet(args.arch, args.stem)
        self.register_buffer("constant", constant)

    def loss(self, logits, targets):
        """Cross-entropy (R, ...) of each answer, as trained, and without weights."""
        loss = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
        return loss, loss

    def right(self, logits, targets):
        """Which answers (R, ...) are right."""
        return logits.argmax(dim=1) == targets.flatten()

    def answers(self, targets):
        """How many answers are asked for."""
        return torch.full((), targets.numel(), device=targets.device)

    def prepare(self, data, workers):
        """What the task must know of the data set: nothing."""

    def draw(self, n, generator):
        """Random numbers (n, ...) for n images: none."""
        return torch.zeros(n, 0)


class Rotation(Task):
    """Which way is up? All four turns of an image, after its crop and flip: a flip after the turn would make
    90 and 270 degrees one. Uses Task, rotate_batch, MEAN, STD."""

    def __init__(self, args):
        super().__init__(args, torch.zeros(4))
        self.head = nn.Linear(self.width, 4)

    def batch(self, images, numbers):
        turned, labels = rotate_batch(v2.functional.normalize(images / 255, MEAN, STD))
        return turned.unflatten(0, (-1, 4)), labels.view(-1, 4)

    def forward(self, inputs):
        h = self.backbone(inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return self.head(h), h

    def columns(self, inputs, targets, logits):
        seen = inputs * inputs.new_tensor(STD).view(3, 1, 1) + inputs.new_tensor(MEAN).view(3, 1, 1)
        answered = zip(seen.flatten(0, 1), logits.argmax(dim=1).tolist(), strict=True)
        back = torch.stack([torch.rot90(x, -k, (1, 2)) for x, k in answered]).view_as(seen)
        shown = {f"{90 * k}": seen[:, k] for k in range(4)}
        return shown | {f"{90 * k}, turned\nback as answered": back[:, k] for k in range(4)}


class Jigsaw(Task):
    """In which of --permutations orders, the same in all runs, are the nine tiles? Gaps, gray images, shifted
    colours and tiles of mean 0 and deviation 1 leave no edges, fringes and shades to go by. Uses Task,
    jigsaw_tiles, jigsaw_permutations."""

    def __init__(self, args):
        super().__init__(args, torch.zeros(args.permutations))
        self.gray, self.cell = args.gray, args.image_size // 3
        self.tile = round(0.75 * self.cell)
        self.register_buffer("permutations", jigsaw_permutations(args.permutations))
        self.tile_head = nn.Sequential(nn.Linear(self.width, 1000), nn.BatchNorm1d(1000), nn.ReLU())
        self.head = nn.Linear(9000, args.permutations)

    def draw(self, n, generator):
        """Which permutation, gray or not, then the corners (9, 3, 2) of jigsaw_tiles: (n, 56)."""
        labels = torch.randint(len(self.permutations), (n, 1), generator=generator)
        gray = torch.rand(n, 1, generator=generator) < self.gray
        room = self.cell - self.tile
        corners = torch.randint(room + 1, (n, 9, 1, 2), generator=generator)
        most = 2 if room > 4 else 1
        shifts = torch.randint(-most, most + 1, (n, 9, 3, 2), generator=generator)
        corners = (corners + shifts * ~gray[:, :, None, None]).clamp(0, room)
        return torch.cat([labels, gray, corners.flatten(1)], dim=1)

    def batch(self, images, numbers):
        labels, gray, corners = numbers[:, 0], numbers[:, 1], numbers[:, 2:].view(-1, 9, 3, 2)
        x = images / 255
        x = torch.where(gray.view(-1, 1, 1, 1) > 0, v2.functional.rgb_to_grayscale(x), x)
        x = jigsaw_tiles(x, self.permutations[labels], corners, self.tile)
        mean, std = x.mean(dim=(3, 4), keepdim=True), x.std(dim=(3, 4), keepdim=True)
        return (x - mean) / torch.where(std > 1e-4, std, 1), labels

    def forward(self, inputs):
        h = self.backbone(inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return self.head(self.tile_head(h).view(len(inputs), -1)), h

    def columns(self, inputs, targets, logits):
        tiles = F.pad(inputs / 5 + 0.5, (1, 1, 1, 1), value=1.0)
        columns = {"shuffled": tiles}
        for title, labels in (("as answered", logits.argmax(dim=1)), ("right", targets)):
            slots = self.permutations[labels].argsort(dim=1)[:, :, None, None, None]
            columns[title] = tiles.gather(1, slots.expand_as(tiles))
        return {title: rearrange(x, "b (r s) c h w -> b c (r h) (s w)", r=3) for title, x in columns.items()}


class Colorization(Task):
    """Which of 313 colours has each fourth pixel of each fourth row, given lightness alone? Its colour is
    shared by the nearest bins, rare colours count more, else all would be brown; images without colour do not
    count. Lightness enters as three equal channels, so the encoder takes RGB as well. Uses Task, ab_gamut,
    rgb_to_lab, lab_to_rgb, is_coloured, annealed_mean, colorization_loss, MEAN, STD."""

    def __init__(self, args):
        bins = ab_gamut()
        super().__init__(args, torch.zeros(len(bins), 1, 1))
        self.neighbors, self.rebalance = args.neighbors, args.rebalance
        self.register_buffer("bins", bins)
        self.register_buffer("weights", torch.ones(len(bins)))
        hidden = nn.Conv2d(self.width * 15 // 8, 256, 1), nn.BatchNorm2d(256), nn.ReLU()
        self.head = nn.Sequential(*hidden, nn.Conv2d(256, len(bins), 1))

    def prepare(self, data, workers):
        """Weights and the constant answer, from up to 2,048 images; SystemExit if 90 % of them are gray."""
        n, some = len(self.bins), range(0, len(data.items), math.ceil(len(data.items) / 2048))
        pairs, gray = torch.zeros(n * n, dtype=torch.float64), 0
        for (images,) in DataLoader(data, 64, sampler=some, num_workers=workers):
            ab = self.batch(images, None)[1]
            ab = ab[is_coloured(ab)]
            index, share = self.encode(ab)
            pairs += torch.bincount((index[..., :1] * n + index).flatten(), share.flatten().double(), n * n)
            gray += len(images) - len(ab)
        if gray > 0.9 * len(some):
            words = f"{gray} of {len(some)} images are gray: nothing to colour; take rotation or jigsaw"
            raise SystemExit(f"--task colorization: {words}")
        pairs = pairs.view(n, n) / pairs.sum()  # share of nearest bin x bin
        p = pairs.sum(dim=0)
        weights = 1 / ((1 - self.rebalance) * p + self.rebalance / n)
        weights /= (p * weights).sum()
        self.weights.copy_(weights)
        self.constant.copy_((weights @ pairs).clamp(min=1e-6).log().view(-1, 1, 1))

    def encode(self, ab):
        """Colours (B, 2, h, w) -> their nearest bins (B, h, w, k), nearest first, and shares, sum 1."""
        distance = torch.cdist(ab.movedim(1, -1), self.bins, compute_mode="donot_use_mm_for_euclid_dist")
        distance, index = distance.topk(self.neighbors, largest=False)
        return index, torch.softmax(-distance.square() / (2 * 5**2), dim=-1)

    def batch(self, images, numbers):
        lab = rgb_to_lab(images / 255)
        return lab, lab[:, 1:, ::4, ::4]

    def forward(self, inputs):
        gray = v2.functional.normalize((inputs[:, :1] / 100).expand(-1, 3, -1, -1), MEAN, STD)
        net, maps = self.backbone, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(gray.contiguous(memory_format=torch.channels_last)))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            maps.append(x := layer(x))
        size = [math.ceil(side / 4) for side in inputs.shape[2:]]
        maps = [F.interpolate(m, size, mode="bilinear") for m in maps]
        return self.head(torch.cat(maps, dim=1)), x.mean(dim=(2, 3))

    def loss(self, logits, targets):
        return colorization_loss(logits, *self.encode(targets), self.weights, is_coloured(targets))

    def right(self, logits, targets):
        nearest = self.encode(targets)[0][..., 0]
        return (logits.argmax(dim=1) == nearest) & is_coloured(targets)[:, None, None]

    def answers(self, targets):
        return is_coloured(targets).sum() * targets[0, 0].numel()

    def columns(self, inputs, targets, logits):
        gray = inputs * inputs.new_tensor([1, 0, 0]).view(3, 1, 1)
        ab = F.interpolate(annealed_mean(logits, self.bins), inputs.shape[2:], mode="bilinear")
        columns = {"lightness": gray, "predicted": torch.cat([inputs[:, :1], ab], dim=1), "original": inputs}
        return {title: lab_to_rgb(lab) for title, lab in columns.items()}


TASKS = {"rotation": Rotation, "jigsaw": Jigsaw, "colorization": Colorization}


# --- Loss ---------------------------------------------------------------------------------------------------
def colorization_loss(logits, index, share, weights, coloured):
    """Cross-entropy (B, h, w) of logits (B, K, h, w) with soft targets, shares of bins `index` (B, h, w, k):
    times the weight (K,) of the nearest, the first, and without; 0 in images that are not coloured (B,)."""
    log_p = F.log_softmax(logits.float(), dim=1).movedim(1, -1)
    loss = -(log_p.gather(-1, index) * share).sum(dim=-1) * coloured[:, None, None]
    return loss * weights[index[..., 0]], loss


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


def page(columns):
    """{title: pictures (n, 3, H, W)} -> uint8 page (3, H, W) of up to 8 rows, a title above each column."""
    columns = {title: x.float().cpu()[:8].clamp(0, 1) for title, x in columns.items()}
    pixels = torch.stack([*columns.values()], dim=1).flatten(0, 1)
    pixels = F.interpolate(pixels, scale_factor=math.ceil(96 / pixels.shape[3]))  # room for the words
    grid = torchvision.utils.make_grid(pixels, nrow=len(columns), padding=4, pad_value=1)
    image = ImageOps.expand(v2.functional.to_pil_image(grid), (0, 30, 0, 0), "white")
    for i, title in enumerate(columns):
        ImageDraw.Draw(image).text((4 + i * (pixels.shape[3] + 4), 0), title, fill="black")
    return v2.functional.pil_to_tensor(image)


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
    zero = "gray micro_batch_size workers weight_decay warmup_epochs seed".split()
    most = {"permutations": 5000, "neighbors": 313}
    check_flags(args, zero, min_scale=1, gray=1, rebalance=1, warmup_epochs=args.epochs, **most)
    if args.task == "jigsaw" and args.image_size < 24:
        raise SystemExit(f"--image-size {args.image_size}: jigsaw needs tiles of 6 pixels, so 24 or more")
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = (v2.Compose([central_square, random_crop(args.image_size, args.min_scale)]),)  # one view
    data = Images(args.data, crop, args.seed, args.image_size, args.min_scale / 2, rank)  # half: the square
    if args.batch_size > len(data.items) or args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size}: give a multiple of {world}, at most {data.found}")
    micro = args.micro_batch_size or args.batch_size
    alone = (args.batch_size // world) % micro == 1 % micro
    if alone and args.task == "colorization" and args.image_size < 33:  # the last map has 1 pixel
        raise SystemExit(f"--micro-batch-size {micro}: leaves one image alone, BatchNorm needs two")
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    peak_lr = args.base_lr * args.batch_size / 256
    torch.manual_seed(args.seed)
    model = TASKS[args.task](args)
    if args.init:
        load_encoder(model, "backbone.", args.init, rank)
    try:
        model.prepare(data, args.workers)
    except OSError as error:  # no image can be read
        raise SystemExit(str(error).splitlines()[-1])
    run, checkpoint = open_run(args, "pretext", rank)
    model = model.to(device, memory_format=torch.channels_last)  # twice as fast on CPUs
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": args.weight_decay}
    # fused leaves its first buffer unset where float16 overflows
    optimizer = torch.optim.SGD(trained, peak_lr, **sgd, fused=amp != torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. Run folder {run}, step {step} of {total}")
        print(f"{args.arch}, {amp or torch.float32}, {world} x {device}, effective learning rate {peak_lr:g}")
    bar = tqdm(total=total, initial=step, disable=rank > 0)
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for (crops,) in loader:
            waited += time.perf_counter() - asked
            for group in optimizer.param_groups:
                group["lr"] = cosine_schedule(step, total, warmup, peak_lr)
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            numbers = model.draw(args.batch_size, generator).chunk(world)[rank].to(device, non_blocking=True)
            inputs, targets = model.batch(crops.to(device, non_blocking=True), numbers)
            answers = model.answers(targets)
            if world > 1:  # images without colour have none
                dist.all_reduce(answers)
            logs = step in (0, total - 1) or (step + 1) % args.log_every == 0
            optimizer.zero_grad()
            loss, sums, features = 0.0, 0.0, []
            chunks = list(zip(inputs.split(micro), targets.split(micro), strict=True))
            for i, (chunk, chunk_targets) in enumerate(chunks, start=1):
                with net.no_sync() if world > 1 and i < len(chunks) else torch.enable_grad():  # averages once
                    with torch.autocast(device.type, amp, enabled=amp is not None):
                        logits, h = net(chunk)
                    weighted, plain = model.loss(logits, chunk_targets)
                    part = weighted.sum() * world / answers.clamp(min=1)
                    scaler.scale(part).backward()
                loss, logits = loss + part.detach(), logits.detach()
                if logs:
                    constant = model.loss(model.constant.expand_as(logits), chunk_targets)[0]
                    terms = weighted.detach(), constant, plain.detach(), model.right(logits, chunk_targets)
                    sums = sums + torch.stack([term.sum() for term in terms])
                    features.append(h.detach())
            scaler.unscale_(optimizer)
            step += 1
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
                n = max(answers.item(), 1)
                mean, constant, plain, accuracy = (gather(sums[None]).sum(dim=0) / n).tolist()
                gain, chance = 1 - mean / max(constant, 1e-6), 1 / len(model.constant)
                feature = collapse_metrics(torch.cat(features), center=True)
                lucky = accuracy <= chance + 3 * (chance * (1 - chance) / n) ** 0.5
                stuck = gain < 0.01 if args.task == "colorization" else lucky
                words = f"accuracy {accuracy:.3f}, gain {gain:.1%} over a constant answer: it learns nothing"
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": mean, "train/lr": group["lr"], "train/grad_norm": grad_norm.item()}
                metrics |= {"pretext/accuracy": accuracy, "pretext/gain": gain, "pretext/plain_loss": plain}
                metrics |= {f"monitor/{k}": v for k, v in feature.items()}
                metrics["perf/images_per_second"] = args.batch_size * (step - logged) / (now - since)
                metrics["perf/data_wait"] = waited / (now - since)
                metrics["perf/skipped_steps"] = skipped  # since the last log
                logged, skipped, since, waited = step, 0, now, 0.0
                if rank == 0:
                    problems = {f"{words}; raise or lower --base-lr": stuck}
                    metrics["monitor/alarm"] = collapse_alarm(alarm, step, armed_after, problems)
                    if accuracy > 0.97 and step <= per_epoch and not alarm.get("shortcut"):
                        alarm["shortcut"] = True
                        tqdm.write(f"{accuracy:.0%} in the first epoch: a shortcut? See views.png, try k-NN")
                    for tag, value in metrics.items():
                        board.add_scalar(tag, value, step)
                    line = {"step": step, "epoch": (step - 1) // per_epoch}
                    line |= {tag: value for tag, value in metrics.items() if math.isfinite(value)}
                    with open(run / "metrics.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
                    bar.set_postfix_str(f"loss {mean:.3f} accuracy {accuracy:.3f}")
            if rank == 0 and (step in (1, total) or step % args.picture_every == 0):
                picture = page(model.columns(chunk, chunk_targets, logits))
                name = f"answers-{step:06d}.png" if step > 1 else "views.png"  # what the network sees
                v2.functional.to_pil_image(picture).save(run / name)
                board.add_image("answers", picture, step)
            if saves and rank == 0:
                export_backbone(run, "pretext", args, h.shape[1], model.backbone.state_dict(), stem=args.stem)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "pretext", "step": step, "metrics": metrics, "alarm": alarm}
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
