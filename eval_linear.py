# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
"""Evaluate a backbone: k-NN, logistic regression, linear probe of frozen features, fine-tuning, prediction.

Every method is measured here, on the same images and labels (protocols: 2002.05709 App. B; 2104.14294):
  knn       vote of the k most similar training images, weighted by exp(cosine / 0.07); nothing is trained
  logreg    softmax regression on standardised features, to its optimum (L-BFGS), penalty by cross-validation
  linear    the papers' probe: SGD on one linear layer, the best of a grid of rates on labels kept out
  finetune  the whole network and a linear layer; of random:FILE it is training from scratch
Frozen means eval mode and not a bit changed, buffers included. No choice sees the test images.

Probe:     python eval_linear.py --backbone runs/simclr/backbone.pt --mode linear
Baseline:  python eval_linear.py --backbone random:runs/simclr/backbone.pt --mode linear --seeds 3
47 labels: python eval_linear.py --backbone backbone.pt --data photos/ --labels-csv labels.csv --mode logreg
           python eval_linear.py --backbone backbone.pt --data photos/ --mode predict
"""

import csv
import json
import math
import os
import random
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from torch.utils.data.distributed import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm


# --- Args ---------------------------------------------------------------------------------------------------
@dataclass
class Args:
    backbone: str = "runs/simclr/backbone.pt"  # file, random:FILE (untrained), pixels, resnet50, timm:NAME
    mode: Literal["linear", "finetune", "knn", "logreg", "features", "predict"] = "linear"  # see above
    preset: str = ""  # recipe of a paper, on the command line: mae-finetune, ...; a wrong name lists all
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    labels_csv: str = ""  # file with path,label lines for a flat --data folder, evaluated in 5 folds
    labels: int = 0  # labelled training images to use, the same number of each class; 0: all
    label_fraction: float = 1.0  # the same as a share of the training images
    seeds: int = 1  # repetitions with other subsets, folds, heads and untrained weights
    watch: str = ""  # run folder to follow: k-NN whenever its backbone.pt changes, into its TensorBoard log
    side: int = 0  # side of the images in pixels; 0: the backbone's
    head: str = ""  # head.pt for --mode predict; default: beside the backbone
    k: tuple[int, ...] = (20, 200)  # neighbours of k-NN
    feature: Literal["auto", "cls", "mean", "both"] = "auto"  # of ViTs: [CLS], mean patch; auto: the method's
    layers: tuple[int, ...] = (-1,)  # of ViTs: blocks whose features stand side by side (DINO: -4 -3 -2 -1)
    epochs: int = 0  # passes over the data (paper: linear 90; finetune 60 at 1 %, 30. 0: 100, finetune 30)
    batch_size: int = 256  # images per step, of all processes together
    base_lr: float = 0.05  # times batch / 256 is the learning rate (paper: of finetune 0.05 in SimCLR)
    rates: tuple[float, ...] = ()  # the same of linear, the best is kept; none: 0.001 0.003 0.01 ... 10 30
    decay_epochs: tuple[int, ...] = ()  # linear: a tenth of the rate from each on, not a cosine (MoCo: 60 80)
    solver: Literal["nesterov", "sgd", "adamw"] = "nesterov"  # momentum 0.9; adamw 0.9, 0.999
    weight_decay: float = 0.0  # strength of weight decay (paper: 0)
    warmup_epochs: float = 0.0  # linear from 0 (paper: 0 for SimCLR; MAE 10, finetune 5)
    probe_norm: bool = False  # linear: BatchNorm without weights before the layer (MAE's probe, eps 1e-6)
    augment: bool = False  # linear: crops and flips anew in each epoch, not one cached feature an image
    min_scale: float = 0.08  # smallest area of a crop as a share of the image (paper: 0.08)
    layer_decay: float = 1.0  # finetune: learning rate of a layer as a share of the next one's (MAE: 0.65)
    drop_path: float = 0.0  # stochastic depth of the last block, 0 in the first (paper: finetune of MAE 0.1)
    label_smoothing: float = 0.0  # finetune (MAE: 0.1)
    mixup: float = 0.0  # finetune: alpha of mixup, half of the batches if cutmix is on too (MAE: 0.8)
    cutmix: float = 0.0  # finetune: alpha of cutmix (MAE: 1.0)
    rand_augment: bool = False  # finetune: torchvision's RandAugment after crop and flip
    workers: int = 2  # processes that read images, for each training process
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere


# Rates are those at batch 256; cosines go by steps (MoCo v3, DINO: by epochs) to 0 (MAE's finetune: 1e-6).
# Unlike some papers, everywhere: probes start at 0 (most: normal, std 0.01); crops are bicubic (MoCo, DINO,
# BEiT: bilinear); the last norm comes after any block (BEiT's 9th: none); a whole tenth picks the rate.
PROBE = "--mode linear --augment --solver sgd --batch-size"
PRESETS = {
    "simclr-linear": f"{PROBE} 4096 --solver nesterov --rates 0.1 --epochs 90",  # 2002.05709 B.6
    "simclr-finetune": "--mode finetune --solver nesterov --batch-size 4096 --base-lr 0.05",  # B.5
    "moco-linear": f"{PROBE} 256 --rates 30 --epochs 100 --decay-epochs 60 80",  # main_lincls.py
    "moco_v3-linear": f"{PROBE} 1024 --rates 0.1 3 --epochs 90",  # CONFIG.md: 0.1 of ResNets, 3 of ViTs
    "byol-linear": f"{PROBE} 1024 --solver nesterov --rates 0.4 0.3 0.2 0.1 0.05 --epochs 80",  # C.1
    "dino-linear": f"{PROBE} 1024 --rates 0.001 --epochs 100 --layers -4 -3 -2 -1",  # eval_linear.py, ViT-S
    "beit-linear": f"{PROBE} 1024 --solver adamw --rates 0.001 --weight-decay 1e-4 --epochs 50 "
    "--layers 8 --feature mean",  # 2106.08254 D, ViT-B
    # Table 10 of 2111.06377, with SGD for LARS, as its caption allows at this batch, and so a grid of rates
    "mae-linear": f"{PROBE} 4096 --probe-norm --epochs 90 --warmup-epochs 10",
    "mae-finetune": "--mode finetune --feature mean --solver adamw --batch-size 1024 --epochs 100 "
    "--base-lr 5e-4 --warmup-epochs 5 --weight-decay 0.05 --layer-decay 0.65 --drop-path 0.1 --mixup 0.8 "
    "--cutmix 1 --label-smoothing 0.1 --rand-augment",  # FINETUNE.md, ViT-B; other RandAugment, no erasing
}


def expand_preset(words):
    """The words of a command line behind those of the preset among them, so that they win."""
    name = (re.findall(r"--preset[ =](\S+)", " ".join(words)) or [""])[0]
    return PRESETS.get(name, "").split() + words


def processes():
    """Rank, and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# --- Labels -------------------------------------------------------------------------------------------------
class Pictures(Dataset):
    """Images by index as uint8 tensors; an item is a path, a number of a demo image, or (data set, index).
    crop is random by `key`, (seed, epoch), and the index alone; without it, the centre crop."""

    def __init__(self, items, side, crop=None, min_scale=1.0):
        self.items, self.side, self.crop, self.key = items, side, crop, (0, 0)
        self.reading = (side, min_scale) if crop else (1.15 * side, 1.0)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, str):
            try:
                image = read_image(item, *self.reading)
            except Exception as error:  # whatever a decoder raises; another image would get a wrong label
                raise OSError(f"{item}: cannot be read ({error}); mend it or take it away")
        else:
            image = demo_image(item)[0] if isinstance(item, int) else item[0][item[1]][0].convert("RGB")
        if self.crop:
            torch.default_generator.manual_seed(hash((*self.key, index)) % 2**32)
            return index, self.crop(v2.functional.pil_to_tensor(image))
        bleed = 0.0625 if self.side > 32 else 0  # on each side: the centre crop of 87.5 %
        image = ImageOps.fit(image, (self.side, self.side), Image.BICUBIC, bleed=bleed)
        return index, v2.functional.pil_to_tensor(image)


def find_images(folder):
    """Paths of the images below a folder, sorted; SystemExit if there are none."""
    walk = os.walk(folder, followlinks=True)
    files = sorted(os.path.join(at, name) for at, _, names in walk for name in names)
    if not (images := [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]):
        raise SystemExit(f"--data {folder}: no images found")
    return images


def read_labels(data, labels_csv=""):
    """items, labels (n,), names of the classes, and which are test images (n,) bool, or None for 5 folds."""
    if labels_csv:
        return read_csv(data, labels_csv)
    if data == "demo":
        items = [*range(4096), *range(10**6, 10**6 + 2048)]
        labels = torch.tensor([demo_image(item)[1] for item in items])
        return items, labels, list(WORLD), torch.arange(len(items)) >= 4096
    if not os.path.isdir(data):
        return read_torchvision(data)
    train, names = os.path.join(data, "train"), ("val", "valid", "validation", "test")
    test = next((path for name in names if os.path.isdir(path := os.path.join(data, name))), None)
    if os.path.isdir(train) and test:
        found = [(path, root) for root in (train, test) for path in find_images(root)]
        files = [(path, os.path.relpath(path, root), root is test) for path, root in found]
    else:
        root = train if os.path.isdir(train) else data
        files = [(path, os.path.relpath(path, root)) for path in find_images(root)]
        files = [(path, name, zlib.crc32(name.encode()) % 5 == 0) for path, name in files]
        if processes()[0] == 0:
            print(f"{data}: no test images; one image in five, by the hash of its path, is for testing")
    names = [name.split(os.sep)[0] if os.sep in name else None for _, name, _ in files]
    classes = sorted(set(names) - {None})
    if len(classes) < 2 or None in names:
        raise SystemExit(f"--data {data}: needs a folder for each of 2 or more classes, or give --labels-csv")
    labels = torch.tensor([classes.index(name) for name in names])
    return [path for path, _, _ in files], labels, classes, torch.tensor([test for _, _, test in files])


def read_csv(data, labels_csv):
    """As read_labels, of a file with path,label lines; paths are relative to the folder `data`."""
    label_of = {}  # each file once, however written: a copy would be learnt in one fold, tested in another
    try:
        with open(labels_csv, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in filter(None, reader):
                row = [cell.strip() for cell in row]
                if len(row) != 2 or not all(row):
                    raise SystemExit(f"--labels-csv {labels_csv}: line {reader.line_num} must be path,label")
                if row != ["path", "label"]:
                    label_of[os.path.normpath(row[0])] = row[1]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"--labels-csv {labels_csv}: {error}")
    items = [os.path.join(data, path) for path in label_of]
    missing = [path for path in items if not os.path.isfile(path)]
    if missing:
        raise SystemExit(f"--labels-csv {labels_csv}: names {len(missing)} missing files, first {missing[0]}")
    classes = sorted(set(label_of.values()))
    if len(classes) < 2:
        raise SystemExit(f"--labels-csv {labels_csv}: has {len(classes)} classes, two or more are needed")
    return items, torch.tensor([classes.index(label) for label in label_of.values()]), classes, None


def read_torchvision(name):
    """As read_labels, of a torchvision data set with a training and a test split."""
    kind, parts = getattr(torchvision.datasets, name, None), []
    rank, world = processes()
    if rank:
        dist.barrier()  # the first process downloads, then the others read
    for key, names in (("train", (True, False)), ("split", ("train", "test")), ("split", ("train", "val"))):
        try:
            parts = [kind("data", download=True, **{key: value}) for value in names]
            break
        except Exception as error:  # no such name, other keywords, no network
            reason = error if kind else "torchvision has no data set of this name"
    if not parts:
        raise SystemExit(f"--data {name}: no folder, no download ({reason}). Give a folder, or demo")
    if world > 1 and not rank:
        dist.barrier()
    items = [(part, index) for part in parts for index in range(len(part))]
    labels = torch.cat([labels_of(part) for part in parts])
    classes = list(getattr(parts[0], "classes", range(int(labels.max()) + 1)))
    return items, labels, [str(name) for name in classes], torch.arange(len(items)) >= len(parts[0])


def labels_of(part):
    """Labels (n,) of a torchvision data set: as it keeps them, or else with each image decoded."""
    for name in ("targets", "labels", "_labels"):
        labels = torch.as_tensor(getattr(part, name, ()))
        if labels.shape == (len(part),):
            return labels.long()
    return torch.tensor([int(part[index][1]) for index in range(len(part))])


def stratified_subset(labels, count, seed):
    """Indices of `count` labels: count // C of each class, and one more of count % C random classes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order, counts = order[labels[order].argsort(stable=True)], labels.bincount()
    nth = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # of its class
    mix = torch.randperm(len(labels), generator=generator)
    return order[mix][nth[mix].argsort(stable=True)[:count]].sort().values


def stratified_folds(labels, folds, seed):
    """Fold 0 .. folds - 1 of each label, the classes spread evenly over them."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(labels)) % folds)


# --- Backbones ----------------------------------------------------------------------------------------------
class ViTBlock(nn.Module):
    """Pre-norm block of tokens (B, N, D) on a grid (h, w), in timm's names and with the parts in `shapes`:
    LayerScale (ls1, gamma_1), relative positions and no bias of keys (BEiT), SwiGLU, QuickGELU (CLIP)."""

    def __init__(self, shapes, heads, eps, quick_gelu=False, layer_scale=1e-5):
        super().__init__()
        dim, hidden = shapes["mlp.fc2.weight"]
        self.heads, self.drop_path, self.quick_gelu = heads, 0.0, quick_gelu
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, "attn.qkv.bias" in shapes)})
        self.attn["proj"] = nn.Linear(dim, dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, shapes["mlp.fc1.weight"][0])})
        self.mlp["fc2"] = nn.Linear(hidden, dim)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        starts = {"gamma": layer_scale, "gamma_1": 0.1, "gamma_2": 0.1, "q_bias": 0.0, "v_bias": 0.0}
        starts["relative_position_bias_table"] = 0.0  # another name is none of a network written here
        for name in (name for name in shapes if name not in self.state_dict()):
            above, _, last = name.rpartition(".")
            start = torch.full(shapes[name], starts[last])
            self.get_submodule(above).register_parameter(last, nn.Parameter(start))

    def attention(self, x, grid):
        qkv, own, bias = self.attn["qkv"], self.attn._parameters, None
        shift = qkv.bias
        if "q_bias" in own:
            shift = torch.cat([own["q_bias"], torch.zeros_like(own["q_bias"]), own["v_bias"]])
        if "relative_position_bias_table" in own:
            bias = relative_bias(own["relative_position_bias_table"], *grid)
        qkv = F.linear(x, qkv.weight, shift)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, bias if bias is None else bias.to(q.dtype))
        return self.attn["proj"](rearrange(x, "b h n d -> b n (h d)"))

    def perceptron(self, x):
        x = self.mlp["fc1"](x)
        if x.shape[-1] != self.mlp["fc2"].in_features:  # SwiGLU
            gate, x = x.chunk(2, dim=-1)
            return self.mlp["fc2"](F.silu(gate) * x)
        return self.mlp["fc2"](x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))

    def forward(self, x, grid):
        scales = dict(self.named_parameters())
        for i, branch in ((1, lambda x: self.attention(x, grid)), (2, self.perceptron)):
            y = branch(getattr(self, f"norm{i}")(x))
            y = y * scales.get(f"ls{i}.gamma", scales.get(f"gamma_{i}", 1.0))
            x = x + stochastic_depth(y, self.drop_path, "row", self.training)
        return x


# heads of the methods' ViTs; width and depth are those of the weights
HEADS = {"vit_nano": 4, "vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16}


class ViT(nn.Module):
    """Vision transformer with the parts in `shapes`, {name in timm: shape}; images (B, 3, H, W) -> feature
    (B, D): cls, mean (of patch tokens) or both, normed, of each of the blocks `layers`, side by side.
    offset: of resize_positions; xavier: initialised as MAE, "qkv" as MoCo v3; None: as CLIP, mostly by
    PyTorch. block: further arguments of ViTBlock. Uses ViTBlock, resize_positions."""

    def __init__(self, shapes, heads, feature, layers, offset=0.0, eps=1e-6, xavier=False, **block):
        super().__init__()
        dim, _, *patch = shapes["patch_embed.proj.weight"]
        conv = nn.Conv2d(3, dim, patch, patch, bias="patch_embed.proj.bias" in shapes)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        for name in (name for name in ("cls_token", "reg_token", "pos_embed") if name in shapes):
            std = {None: dim**-0.5, "qkv": 1e-6}.get(xavier, 0.02)
            self.register_parameter(name, nn.Parameter(std * torch.randn(shapes[name])))
        if "norm_pre.weight" in shapes:
            self.norm_pre = nn.LayerNorm(dim, eps=eps)
        blocks = {}
        for name, shape in shapes.items():
            if match := re.match(r"blocks\.(\d+)\.(.+)", name):
                blocks.setdefault(int(match[1]), {})[match[2]] = shape
        self.blocks = nn.ModuleList(ViTBlock(blocks[i], heads, eps, **block) for i in sorted(blocks))
        self.norm, self.fc_norm = nn.LayerNorm(dim, eps=eps), nn.Identity()
        depth, self.prefix = len(blocks), sum(shapes[n][1] for n in ("cls_token", "reg_token") if n in shapes)
        if not layers or not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"--layers {layers}: give some of {-depth} .. {depth - 1}")
        if feature != "mean" and "cls_token" not in shapes:
            raise ValueError(f"--feature {feature}: the network has no [CLS], use mean")
        self.feature, self.layers = feature, {layer % depth for layer in layers}
        self.resizing = offset, "reg_token" in shapes  # DINOv2: antialiased in the models with registers
        self.dim = dim * len(self.layers) * (2 if feature == "both" else 1)
        if xavier:
            nn.init.xavier_uniform_(conv.weight.view(dim, -1))
        if xavier == "qkv":
            nn.init.zeros_(conv.bias)
        linears = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, nn.Linear)]
        for name, layer in linears if xavier is not None else ():
            if xavier:  # "qkv": q, k and v one by one, a bound of D + D instead of 3 D + D
                nn.init.xavier_uniform_(layer.weight, 2**0.5 if xavier == name[-3:] else 1.0)
            else:
                nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images):
        x, own = self.patch_embed["proj"](images), self._parameters
        grid, x = x.shape[2:], x.flatten(2).mT
        first = [own[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in own]
        if "pos_embed" in own:
            pos_embed = own["pos_embed"]
            if math.isqrt(pos_embed.shape[1]) ** 2 == pos_embed.shape[1]:  # of patches alone
                pos_embed = F.pad(pos_embed, (0, 0, 1, 0))
            pos_embed = resize_positions(pos_embed, *grid, *self.resizing)
            first[:1] = [token + pos_embed[:, :1] for token in first[:1]]
            x = x + pos_embed[:, 1:]
        x, parts = torch.cat([*first, x], dim=1), []
        x = self.norm_pre(x) if "norm_pre" in self._modules else x
        for i, block in enumerate(self.blocks):
            x = block(x, grid)
            if i in self.layers:
                tokens = self.norm(x)
                parts += [tokens[:, 0]] if self.feature != "mean" else []
                parts += [tokens[:, self.prefix :].mean(dim=1)] if self.feature != "cls" else []
        return self.fc_norm(torch.cat(parts, dim=1))

    def start_finetune(self, drop_path):
        """Stochastic depth rising to drop_path; of mean tokens, a fresh norm after the mean (MAE, BEiT).
        Blocks behind the last of `layers` go: they get no gradient, which DistributedDataParallel refuses."""
        self.blocks = self.blocks[: max(self.layers) + 1]
        for i, block in enumerate(self.blocks):
            block.drop_path = drop_path * i / max(1, len(self.blocks) - 1)
        if self.feature == "mean":
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(self.dim, eps=1e-6)


def relative_bias(table, height, width):
    """Bias (heads, N, N) of attention among [CLS] and a grid, from BEiT's table ((2g - 1)^2 + 3, heads): by
    row and column from key to query; then [CLS] to patch, patch to [CLS], itself. Uses spline_matrix."""
    sides, old = (2 * height - 1, 2 * width - 1), math.isqrt(len(table) - 3)
    if sides != (old, old):
        to_rows, to_columns = (spline_matrix(old, side).to(table) for side in sides)
        square = table[:-3].view(old, old, -1)
        square = torch.einsum("ai,bj,ijh->abh", to_rows, to_columns, square)
        table = torch.cat([square.flatten(0, 1), table[-3:]])
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    index = torch.full((1 + len(y),) * 2, len(table) - 3)
    index[1:, 1:] = (y[:, None] - y + height - 1) * sides[1] + x[:, None] - x + width - 1
    index[1:, 0], index[0, 0] = len(table) - 2, len(table) - 1
    return table[index.to(table.device)].permute(2, 0, 1)


def spline_matrix(old, new):
    """(new, old) matrix of BEiT's resampling of one axis of its tables: a cubic spline (not-a-knot) through
    old points whose distances grow geometrically until they span the new ones, whose distances are 1."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old // 2)) / (1 - q) > new // 2 else (q, high)
    steps = torch.tensor([q**i for i in range(old // 2)], dtype=torch.float64).cumsum(0)
    x, at = torch.cat([-steps.flip(0), steps[:0].new_zeros(1), steps]), torch.arange(new) - new // 2
    knots = x[2:-2]

    def basis(points):  # truncated powers
        powers = [points.double()[:, None] ** torch.arange(4), (points[:, None] - knots).clamp(min=0) ** 3]
        return torch.cat(powers, dim=1) / x[-1] ** 3

    return torch.linalg.solve(basis(x).T, basis(at).T).T


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


class Backbone(nn.Module):
    """uint8 images (B, 3, H, W) -> features (B, D); normalises as the network was trained."""

    def __init__(self, net, dim, side, mean, std, method, arch):
        super().__init__()
        self.net, self.dim, self.side, self.method, self.arch = net, dim, side, method, arch
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):
        images = (images.float() / 255 - self.mean) / self.std
        return self.net(images.contiguous(memory_format=torch.channels_last)).flatten(1)


def published(name, side):
    """A network with its published weights, torchvision's or timm:NAME, without its last layer."""
    if name.startswith("timm:"):
        import timm

        size = {"img_size": side} if side and "patch" in name else {}
        net = timm.create_model(name[5:], pretrained=True, num_classes=0, **size)
        given = net.pretrained_cfg
        side = side or given["input_size"][1]
        dim = getattr(net, "head_hidden_size", None) or net.num_features
        return Backbone(net, dim, side, given["mean"], given["std"], "timm", name[5:])
    weights = torchvision.models.get_model_weights(name).DEFAULT
    net, given = torchvision.models.get_model(name, weights=weights), weights.transforms()
    last, layer = [pair for pair in net.named_modules() if isinstance(pair[1], nn.Linear)][-1]
    above, _, last = last.rpartition(".")
    setattr(net.get_submodule(above), last, nn.Identity())
    if name.startswith("vit") and side not in (0, given.crop_size[0]):
        raise SystemExit(f"--side {side}: {name} takes {given.crop_size[0]} alone; timm's ViTs take others")
    side = side or given.crop_size[0]
    return Backbone(net, layer.in_features, side, given.mean, given.std, "torchvision", name)


def load_backbone(path, seed=0, side=0, feature="auto", layers=(-1,), mode="linear"):
    """backbone.pt, random:FILE (its network untrained), pixels, or a name of torchvision or timm; SystemExit
    if it cannot be filled. feature auto: [CLS]; the mean token if there is none, of BEiT, of MAE to tune."""
    if path == "pixels":
        return Backbone(nn.Identity(), 3 * (side or 32) ** 2, side or 32, MEAN, STD, "pixels", "pixels")
    file = path.removeprefix("random:")
    try:
        if path.startswith("timm:") or path in torchvision.models.list_models(torchvision.models):
            return published(path, side)
        state = torch.load(file, map_location="cpu", weights_only=True)
        torch.manual_seed(seed)
        method, options = state["method"], dict(state["arch_args"])
        patch_size = options.pop("patch_size", 1)
        if state["arch"].startswith("vit"):
            shapes = {name: tensor.shape for name, tensor in state["state_dict"].items()}
            means = "cls_token" not in shapes or method == "beit" or (mode, method) == ("finetune", "mae")
            options["feature"] = ("mean" if means else "cls") if feature == "auto" else feature
            options["heads"] = options.get("heads") or HEADS[state["arch"]]
            fixed = options.pop("fixed_positions", False)
            options["xavier"] = None if method == "clip" else options.get("xavier", False)
            net = ViT(shapes, layers=layers, **options)
            dim, conv = net.dim, net.patch_embed["proj"]
            if method == "ijepa":  # draws its patches too, as ijepa.py does
                nn.init.normal_(conv.weight, std=0.02 * 16 / patch_size)
                nn.init.zeros_(conv.bias)
            if fixed:  # a part of the network, not of what it has learnt
                net.pos_embed.data.copy_(state["state_dict"]["pos_embed"])
        else:
            net, dim = resnet(state["arch"], **options)
        if path == file:
            net.load_state_dict(state["state_dict"])
    except FileNotFoundError:
        raise SystemExit(f"--backbone {path}: no such file; train one, for example with python simclr.py")
    except Exception as error:  # of pickle, a missing key, another shape
        raise SystemExit(f"--backbone {path}: cannot be loaded ({' '.join(repr(error).split())})"[:300])
    if side % patch_size:
        raise SystemExit(f"--side {side}: must be a multiple of the patches' {patch_size} pixels")
    net = net.to(memory_format=torch.channels_last)
    method = method if path == file else "random"
    return Backbone(net, dim, side or state["image_size"], state["mean"], state["std"], method, state["arch"])


def check_effect(args, backbone):
    """SystemExit at a flag for the ViTs of a backbone.pt that this network would ignore."""
    for name in ("layers", "feature", "drop_path") if not isinstance(backbone.net, ViT) else ():
        if (value := getattr(args, name)) != (default := getattr(Args, name)):
            flag = name.replace("_", "-")
            raise SystemExit(f"--{flag} {value}: has no effect on {backbone.arch}; leave it at {default}")


def fingerprint(module):
    """A number that changes when any weight or buffer does."""
    tensors = [t.detach().cpu().contiguous().numpy() for t in module.state_dict().values()]
    return zlib.crc32(b"".join(t.tobytes() for t in tensors))


@torch.no_grad()
def extract_features(backbone, pictures, workers=0, device="cpu", amp=None, batch_size=256, key=None):
    """Features (n, D) float32 of Pictures, in their order; each process computes its share, once."""
    rank, world = processes()
    backbone, pictures.key = backbone.to(device).eval(), key or pictures.key
    mine = torch.utils.data.Subset(pictures, range(rank, len(pictures), world))
    features = torch.zeros(len(pictures), backbone.dim, device=device)
    loader = DataLoader(mine, batch_size, num_workers=workers)
    for index, images in tqdm(loader, desc="features", disable=rank > 0, leave=False):
        with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
            rows = backbone(images.to(device))
        features[index.to(device)] = rows.float()
    if world > 1:
        dist.all_reduce(features)
    if not torch.isfinite(features).all():
        words = "its features are not finite; give --amp off, or train it again, it may have diverged"
        raise SystemExit(f"{backbone.method} {backbone.arch}: {words}")
    return features.cpu()


# --- Scores -------------------------------------------------------------------------------------------------
def accuracy(scores, labels):
    """top1, top5 and mean_per_class in %, and n, from scores (n, C); counted, then divided once."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    classes = labels.unique()
    per_class = [top[labels == c, 0].double().mean() for c in classes]
    right = top[:, 0].sum().item(), top.any(dim=1).sum().item()
    scores = {"top1": 100 * right[0] / len(labels), "top5": 100 * right[1] / len(labels), "n": len(labels)}
    return scores | {"mean_per_class": 100 * (sum(per_class) / len(classes)).item()}


def knn(bank, labels, queries, k, classes, temperature=0.07, memory=2**28):
    """Scores (M, C) of queries (M, D): each of the k nearest rows of the bank (n, D), by cosine, votes for
    its label with exp(cosine / temperature) (2104.14294). At most `memory` bytes of similarities at once."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    scores = torch.zeros(len(queries), classes)
    size = max(1, memory // (4 * len(bank)))
    for start in range(0, len(queries), size):
        similarity, nearest = (queries[start : start + size] @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)  # cannot overflow
        scores[start : start + size].scatter_add_(1, labels[nearest], weights)
    return scores


def fit_logreg(features, labels, penalty, classes, start=None, max_iter=1000):
    """Weight (D, C) and bias (C,) at the minimum of mean cross-entropy + penalty / 2 |W|^2, in float64."""
    x = features.double()
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64) if start is None else start[0].clone()
    bias = torch.zeros(classes, dtype=torch.float64) if start is None else start[1].clone()
    params = [weight.requires_grad_(), bias.requires_grad_()]
    options = {"max_iter": max_iter, "tolerance_grad": 1e-7, "tolerance_change": 1e-12, "history_size": 20}
    solver = torch.optim.LBFGS(params, line_search_fn="strong_wolfe", **options)

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def held_out_score(scores, labels):
    """Number of right ones, less a share of one that grows with the cross-entropy; -1 if not finite."""
    right, loss = (scores.argmax(dim=1) == labels).sum().item(), F.cross_entropy(scores, labels).item()
    return right - loss / (1 + loss) if math.isfinite(loss) else -1


def logreg(features, labels, classes, seed=0):
    """Softmax regression on standardised features, its penalty, of 10^-5 .. 10, the best in 5 folds of the
    labels, or above 2,000 on a tenth of them. Returns weight (D, C), bias (C,) and what was chosen."""
    mean, std = features.double().mean(dim=0), features.double().std(dim=0) + 1e-6
    x, penalties = (features - mean) / std, [10.0**i for i in range(1, -6, -1)]
    folds = 10 if len(labels) > 2000 else 5
    fold, score = stratified_folds(labels, folds, seed), dict.fromkeys(penalties, 0)
    for held in range(1 if folds == 10 else 5):
        train, test, head = fold != held, fold == held, None
        for penalty in penalties:  # from strong to weak, each starting at the last
            head = fit_logreg(x[train], labels[train], penalty, classes, head, max_iter=50)
            score[penalty] += held_out_score(x[test] @ head[0] + head[1], labels[test])
    best = max(penalties, key=score.get)
    weight, bias = fit_logreg(x, labels, best, classes)
    weight = weight / std[:, None]
    return weight.float(), (bias - mean @ weight).float(), {"penalty": best}


def make_optimizer(name, groups, lr):
    """nesterov or sgd with momentum 0.9, or adamw."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999))
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=name == "nesterov")


def linear_probe(features, labels, classes, args, seed=0, augmented=None, device="cpu"):
    """One linear layer for each of args.rates in one pass: weight (D, C), bias (C,), what was chosen. A tenth
    of the labels, stratified, picks the rate and is not trained on; with one rate all are. features (n, D),
    whose batches go to the device; augmented(key=(seed, epoch)) replaces them in training; probe_norm ends
    as part of the layer."""
    rates = args.rates or [10.0**power * digit for power in range(-3, 2) for digit in (1, 3)]
    held = (stratified_folds(labels, 10, seed) == 0) & (labels.bincount()[labels] > 1) & (len(rates) > 1)
    train, epochs = (~held).nonzero()[:, 0], args.epochs or 100
    steps = math.ceil(len(train) / args.batch_size)
    if args.probe_norm and len(train) < 2 * steps:
        raise SystemExit(f"--batch-size {args.batch_size}: with --probe-norm no batch may have one image")
    generator = torch.Generator().manual_seed(seed)
    norm = nn.Identity()
    if args.probe_norm:  # momentum None: statistics of all batches, not of the last ten
        norm = nn.BatchNorm1d(features.shape[1], eps=1e-6, momentum=None, affine=False)
    heads, groups = nn.ModuleList(nn.Linear(features.shape[1], classes) for _ in rates), []
    for head, rate in zip(heads, rates, strict=True):
        scale = {"lr_scale": rate * len(train) / steps / 256}
        groups.append({"params": nn.init.zeros_(head.weight), "weight_decay": args.weight_decay} | scale)
        groups.append({"params": nn.init.zeros_(head.bias), "weight_decay": 0.0} | scale)
    heads, norm = heads.to(device), norm.to(device)
    optimizer = make_optimizer(args.solver, groups, lr=0.0)
    for epoch in tqdm(range(epochs), desc="linear", leave=False, disable=processes()[0] > 0):
        rows = augmented(key=(seed, epoch)) if augmented else features
        order = train[torch.randperm(len(train), generator=generator)]
        for i, batch in enumerate(order.tensor_split(steps)):
            factor = cosine_schedule(epoch * steps + i, epochs * steps, args.warmup_epochs * steps, 1.0)
            if args.decay_epochs:
                factor = 0.1 ** sum(epoch >= decay for decay in args.decay_epochs)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * factor
            x, targets = norm(rows[batch].to(device)), labels[batch].to(device).repeat(len(rates))
            logits = torch.cat([head(x) for head in heads])
            optimizer.zero_grad()
            (F.cross_entropy(logits, targets, reduction="sum") / len(batch)).backward()
            optimizer.step()
    heads, norm = heads.cpu(), norm.cpu()
    weights = torch.stack([head.weight.detach().T for head in heads])
    biases = torch.stack([head.bias.detach() for head in heads])
    if args.probe_norm:  # W (x - mean) / std + b is a linear layer again
        weights = weights * (norm.running_var + norm.eps).rsqrt()[:, None]
        biases = biases - norm.running_mean @ weights
    scores = features[held] @ weights + biases[:, None]  # (rates, held, C)
    best = max(range(len(rates)), key=lambda i: held_out_score(scores[i], labels[held]))
    if len(rates) > 1 and not held.any():
        best = rates.index(sorted(rates)[len(rates) // 2])
        if processes()[0] == 0:
            print(f"--rates: too few labels to hold any out; the middle one, {rates[best]:g}, is taken")
    return weights[best], biases[best], {"rate": rates[best]}


# --- Fine-tuning --------------------------------------------------------------------------------------------
def layer_groups(net, head, weight_decay, layer_decay):
    """Parameter groups with lr_scale = layer_decay^(depth + 1 - id), no decay on ndim <= 1 and tokens. id:
    0 of the input, i of the i-th block (timm's ViTs) or stage (ResNets) of depth, depth + 1 of the rest."""
    named = [*net.named_parameters(), *((f"head.{name}", p) for name, p in head.named_parameters())]
    found = [re.match(r"blocks\.(\d+)|layer(\d)", name) for name, _ in named]
    ids = [int(match[2] or int(match[1]) + 1) if match else None for match in found]
    depth, groups = max((id for id in ids if id), default=0), {}
    if layer_decay != 1 and not depth:
        raise SystemExit(f"--layer-decay {layer_decay}: finds no layers in this network; leave it at 1.0")
    for (name, p), id in zip(named, ids, strict=True):
        at_input = re.match("cls_token|reg_token|pos_embed|patch_embed|norm_pre|conv1|bn1", name)
        id = (0 if at_input else depth + 1) if id is None else id
        plain = p.ndim <= 1 or name in ("cls_token", "reg_token", "pos_embed")
        options = {"lr_scale": layer_decay ** (depth + 1 - id), "params": []}
        options["weight_decay"] = 0.0 if plain else weight_decay
        groups.setdefault((id, plain), options)["params"].append(p)
    return list(groups.values())


def finetune(backbone, train, labels, classes, args, device, amp=None, seed=0):
    """Train `backbone` and a linear layer, returned as by linear_probe; by default as SimCLR (App. B.5): SGD,
    no warm-up, crops and flips, BatchNorm in train mode. Several processes share each batch."""
    rank, world = processes()
    epochs, batch_size = args.epochs or 30, min(args.batch_size, len(train)) // world
    if batch_size < (2 if any("BatchNorm" in type(m).__name__ for m in backbone.modules()) else 1):
        words = f"{batch_size} of {len(train)} images for each process are too few for this network"
        raise SystemExit(f"--batch-size {args.batch_size}: {words}")
    torch.manual_seed(hash((seed, rank)) % 2**32)
    if args.rand_augment:
        train.crop = v2.Compose([train.crop, v2.RandAugment()])
    if isinstance(backbone.net, ViT):
        backbone.net.start_finetune(args.drop_path)
    head = nn.Linear(backbone.dim, classes)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(backbone, head).to(device)
    peak_lr = args.base_lr * batch_size * world / 256
    groups = layer_groups(backbone.net, head, args.weight_decay, args.layer_decay)
    optimizer = make_optimizer(args.solver, groups, peak_lr)
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=classes)] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=classes)] if args.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else None
    sampler = DistributedSampler(train, world, rank, seed=seed, drop_last=True)
    loader = DataLoader(train, batch_size, sampler=sampler, drop_last=True, num_workers=args.workers)
    total, warmup = epochs * len(loader), args.warmup_epochs * len(loader)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    step = 0
    for epoch in tqdm(range(epochs), desc="finetune", leave=False, disable=rank > 0):
        sampler.set_epoch(epoch)
        train.key = seed, epoch
        model.train()
        for index, images in loader:
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * cosine_schedule(step, total, warmup, peak_lr)
            images, targets = images.to(device).float(), labels[index].to(device)
            torch.manual_seed(hash((seed, step, rank)) % 2**32)  # else it depends on who read the images
            if mix:
                images, targets = mix(images, targets)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
    for buffer in model.buffers() if world > 1 else ():  # each process has its own statistics of BatchNorm
        dist.broadcast(buffer, 0)
    head = head.cpu()
    return head.weight.detach().T.contiguous(), head.bias.detach(), {"base_lr": args.base_lr}


# --- Evaluation ---------------------------------------------------------------------------------------------
def splits(labels, is_test, args, seed):
    """(train, test) indices of repetition `seed`: the test split, or each of 5 stratified folds; of the
    training images only --labels or --label-fraction, stratified."""
    if is_test is None:
        fold = stratified_folds(labels, 5, seed)
        pairs = [((fold != i).nonzero()[:, 0], (fold == i).nonzero()[:, 0]) for i in range(5)]
    else:
        pairs = [((~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0])]
    for train, test in pairs:
        count = args.labels or round(args.label_fraction * len(train))
        if not len(test):
            raise SystemExit(f"--data {args.data}: has no test images, or too few labels for 5 folds")
        if not (fewest := len(labels.unique())) <= count <= len(train):
            raise SystemExit(f"{count} labels: must be {fewest}, one of each class, to all {len(train)}")
        yield (train[stratified_subset(labels[train], count, seed)] if count < len(train) else train), test


def evaluate(args: Args) -> dict:
    """Do --mode, print a table, write eval-MODE.json and head.pt beside the backbone; returns the results.
    args.preset is a note here: only the command line turns it into flags (expand_preset)."""
    if args.preset and args.preset not in PRESETS:
        raise SystemExit(f"--preset {args.preset}: must be one of {', '.join(PRESETS)}")
    zero = "labels side epochs weight_decay workers seed warmup_epochs drop_path label_smoothing mixup cutmix"
    at_most = dict.fromkeys(("label_fraction", "min_scale", "layer_decay", "drop_path", "label_smoothing"), 1)
    epochs = args.epochs or (30 if args.mode == "finetune" else 100)
    at_most |= {"warmup_epochs": epochs, "decay_epochs": epochs}
    check_flags(replace(args, layers=(), k=args.k or (0,)), zero.split(), **at_most)
    rank, world, device, amp = start_processes(args.device, args.amp)
    try:
        work = follow if args.watch else {"predict": predict, "features": export_features}.get(args.mode)
        results = (work or measure)(args, rank, device, amp)
    except (KeyboardInterrupt, OSError) as error:  # a worker's error comes behind its traceback
        raise SystemExit((str(error) or "interrupted").splitlines()[-1])
    if world > 1:
        dist.destroy_process_group()
    return results


def measure(args, rank, device, amp):
    """Modes linear, finetune, knn and logreg: fit and test in each repetition and fold."""
    tunes, features, results, options = args.mode == "finetune", None, [], (args.workers, device, amp)
    choice = args.side, args.feature, args.layers, args.mode
    items, labels, classes, is_test = read_labels(args.data, args.labels_csv)
    for seed in range(args.seed, last := args.seed + args.seeds):
        pairs = list(splits(labels, is_test, args, seed))
        if is_test is None and seed == last - 1 and args.mode != "knn":
            count = args.labels or round(args.label_fraction * len(labels))
            pairs.append((stratified_subset(labels, count, seed), None))  # folds measure, this makes a head
        if features is None or args.backbone.startswith("random:"):
            backbone = load_backbone(args.backbone, seed, *choice)
            check_effect(args, backbone)
            before, pictures = fingerprint(backbone), Pictures(items, backbone.side)
            features = None if tunes else extract_features(backbone, pictures, *options)
        for train, test in pairs:
            if args.mode == "knn":
                for k in dict.fromkeys(args.k):
                    scores = knn(features[train], labels[train], features[test], k, len(classes))
                    chosen = {"k": k, "used": min(k, len(train))}
                    results.append({"choice": chosen, "labels": len(train)} | accuracy(scores, labels[test]))
                continue
            fitted = load_backbone(args.backbone, seed, *choice) if tunes else backbone
            crop = random_crop(fitted.side, args.min_scale)
            pictures = Pictures([items[i] for i in train], fitted.side, crop, args.min_scale)
            known = labels[train], len(classes)
            if tunes:
                weight, bias, chosen = finetune(fitted, pictures, *known, args, device, amp, seed)
            elif args.mode == "logreg":
                weight, bias, chosen = logreg(features[train], *known, seed)
            else:
                augmented = partial(extract_features, fitted, pictures, *options) if args.augment else None
                weight, bias, chosen = linear_probe(features[train], *known, args, seed, augmented, device)
            if not torch.isfinite(weight).all():
                raise SystemExit(f"--mode {args.mode}: weights are not finite; lower --base-lr or --rates")
            if test is not None:
                pictures = Pictures([items[i] for i in test], fitted.side)
                rows = extract_features(fitted, pictures, *options) if tunes else features[test]
                scores = rows @ weight + bias
                results.append({"choice": chosen, "labels": len(train)} | accuracy(scores, labels[test]))
        if fingerprint(backbone) != before:
            raise RuntimeError("the frozen backbone has changed")
    if rank:
        return {}
    if args.mode != "knn":
        tuned = {name: tensor.cpu() for name, tensor in fitted.net.state_dict().items()} if tunes else None
        state = {"weight": weight, "bias": bias, "classes": classes, "finetuned": tuned, "seed": seed}
        path = output_file(args, "head.pt")
        torch.save(state | {"choice": choice, "fingerprint": before}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)  # a kill leaves the old file or the new one
    return report(args, results, backbone)


def export_features(args, rank, device, amp):
    """features.pt: features (n, D) and items, the paths of the images of a folder, which needs no labels; of
    a torchvision set their indices, first all of training, then of test."""
    items = find_images(args.data) if os.path.isdir(args.data) else read_labels(args.data)[0]
    backbone = load_backbone(args.backbone, args.seed, args.side, args.feature, args.layers)
    check_effect(args, backbone)
    features = extract_features(backbone, Pictures(items, backbone.side), args.workers, device, amp)
    if rank == 0:
        path = output_file(args, "features.pt")
        names = [str(item[1] if isinstance(item, tuple) else item) for item in items]
        torch.save({"features": features, "items": names}, path)
        print(f"{path}: {tuple(features.shape)}")
    return {"n": len(features)}


def follow(args, rank, device, amp):
    """k-NN of the run folder --watch whenever its backbone.pt is replaced, as eval/knn_top1, until Ctrl-C."""
    run, seen = Path(args.watch), None
    if not run.is_dir() or dist.is_initialized():
        reason = "works without torchrun" if run.is_dir() else "no such folder; start the training first"
        raise SystemExit(f"--watch {run}: {reason}")
    print(f"watching {run}/backbone.pt; Ctrl-C ends it")
    board = SummaryWriter(run, filename_suffix=".knn")
    try:
        while True:
            if (path := run / "backbone.pt").exists() and path.stat().st_mtime_ns != seen:
                seen, log = path.stat().st_mtime_ns, run / "metrics.jsonl"
                lines = log.read_text().split("\n")[:-1] if log.exists() else []
                now = replace(args, watch="", mode="knn", backbone=str(path))
                result = measure(now, rank, device, amp)  # not evaluate, which makes an error of Ctrl-C
                step = json.loads(lines[-1])["step"] if lines else 0
                board.add_scalar("eval/knn_top1", result["top1"], step)
                board.flush()
            time.sleep(1)
    except KeyboardInterrupt:
        return {}


def output_file(args, name):
    """Path of a result: beside the backbone's file, with -random for random:FILE; or in runs/BACKBONE."""
    file, (stem, ending) = Path(args.backbone.removeprefix("random:")), name.split(".")
    folder = file.parent if file.is_file() else Path("runs") / args.backbone
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}{'-random' if args.backbone.startswith('random:') else ''}.{ending}"


def report(args, results, backbone):
    """Print the table and write eval-MODE.json: mean over repetitions and folds, and sample deviation; labels
    are those that the first fold learnt from, others have one more at most."""
    table, labels = {}, results[0]["labels"]
    for result in results:
        name = f"k {result['choice']['k']}" if args.mode == "knn" else args.mode
        table.setdefault(name, []).append(result)
    tested = f"{len(results) // len(table)} x {results[0]['n']} test images"
    print(f"\n{args.backbone} on {args.data}: {labels} labels, {tested}")
    print(f"{'':12}{'top-1':>14}{'top-5':>8}{'per class':>11}")
    feature = f"{backbone.method} {backbone.arch} {getattr(backbone.net, 'feature', 'pooled')}"
    out = asdict(args) | {"labels": labels, "feature": feature, "results": results}
    for name, rows in table.items():
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("top1", "top5", "mean_per_class")}
        deviation = torch.tensor([row["top1"] for row in rows]).std().item() if len(rows) > 1 else 0.0
        print(f"{name:12}{mean['top1']:7.1f} +- {deviation:3.1f}{mean['top5']:8.1f}", end="")
        print(f"{mean['mean_per_class']:11.1f}")
        if "top1" not in out:  # the first k stands for k-NN: no choice on the test images
            out |= mean | {"top1_std": deviation, "n": sum(row["n"] for row in rows) // args.seeds}
    output_file(args, f"eval-{args.mode}.json").write_text(json.dumps(out, indent=1))
    return out


def predict(args, rank, device, amp):
    """Write predictions.csv (path, class, probability) for every image below --data with a head.pt."""
    path = Path(args.head or output_file(args, "head.pt"))
    try:
        head = torch.load(path, map_location="cpu", weights_only=True)
        weight, classes, choice = head["weight"], head["classes"], head["choice"]
    except Exception:
        raise SystemExit(f"--head {path}: missing or damaged; --mode logreg, linear or finetune writes it")
    backbone = load_backbone(args.backbone, head["seed"], *choice)
    if fingerprint(backbone) != head["fingerprint"]:
        raise SystemExit(f"--head {path}: was trained on another backbone than {args.backbone}")
    if head["finetuned"]:
        if isinstance(backbone.net, ViT):
            backbone.net.start_finetune(0.0)
        backbone.net.load_state_dict(head["finetuned"])
    items = find_images(args.data)
    features = extract_features(backbone, Pictures(items, backbone.side), args.workers, device, amp)
    probability = torch.softmax(features @ weight + head["bias"], dim=1)
    if rank == 0:
        path = output_file(args, "predictions.csv")
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "class", "probability"])
            for item, row in zip(items, probability, strict=True):
                writer.writerow([os.path.relpath(item, args.data), classes[row.argmax()], f"{row.max():.4f}"])
        print(f"{path}: {len(items)} images, by the head of --mode {choice[3]}")
    return {"n": len(items)}


# --- Plumbing -----------------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORLD = dict(house=0x183C7EFFFF7E6666, tree=0x183C7E3C7EFF1818, car=0x3C2CFFFFFF6600, boat=0x101814161EFF7E3C)
WORLD |= dict(cat=0x81C3FF99FF7E3C18, mushroom=0x3C7EFFFF18181C3C, cup=0x00FCFEFEFCFC7800)
WORLD |= dict(key=0x1C22221C08180C08, bird=0x060FC67EFE7C1018, flower=0x185A3C185ADB7E18)  # 8 x 8 bitmaps
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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


def random_crop(size, min_scale, max_scale=1.0):
    """In the worker: random resized crop and flip of a uint8 image (C, H, W) -> (C, size, size)."""
    crop = v2.RandomResizedCrop(size, (min_scale, max_scale), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def resnet(arch, stem):
    """torchvision's ResNet without its classifier, images (B, 3, H, W) -> h (B, D); and D."""
    net = getattr(torchvision.models, arch)()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


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


if __name__ == "__main__":
    evaluate(tyro.cli(Args, description=__doc__.replace("\n", "\n "), args=expand_preset(sys.argv[1:])))
