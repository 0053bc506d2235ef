# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "timm>=1.0.31", "tyro", "tensorboard", "tqdm"]
# ///
r"""Evaluate a backbone: k-NN, logistic regression, linear probe of frozen features, fine-tuning, prediction.

Every method is measured here, on the same images and labels (protocols: 2002.05709 App. B; 2104.14294):
  knn       vote of the k most similar training images, weighted by exp(cosine / 0.07); nothing is trained
  logreg    softmax regression on standardised features, to its optimum (L-BFGS), penalty by labels kept out
  linear    the papers' probe: SGD on one linear layer, the best of a grid of rates on labels kept out
  finetune  the whole network and a linear layer; of random:FILE it is training from scratch
  features  of every image, into features.pt for code of your own; predict: classes of every image, by the
            newest head, into predictions-DATA.csv
Frozen means eval mode and not a bit changed, buffers included. No choice sees the test images.

Probe:     python eval_linear.py --backbone runs/simclr/backbone.pt --mode linear
Baseline:  python eval_linear.py --backbone random:runs/simclr/backbone.pt --mode linear --seeds 3
47 labels: python eval_linear.py --backbone runs/photos/backbone.pt --data photos/ \
               --labels-csv labels.csv --mode logreg
           python eval_linear.py --backbone runs/photos/backbone.pt --data photos/ --mode predict

labels.csv has lines path,label as spreadsheets write them, with or without a header; a column group (camera,
video, patient, site) keeps a group in one fold. RESULTS.md has the papers' protocols as commands.
Unlike some papers: probes start at 0 (most: normal, std 0.01), crops are bicubic (MoCo, DINO, BEiT:
bilinear), cosines go by steps (MoCo v3, DINO: by epochs) to 0 (MAE's fine-tuning: 1e-6),
test crops are of 87.5 % (CLIP: all), BEiT's table of positions stays one when it is tuned.
"""

import contextlib
import csv
import io
import json
import logging
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
from typing import Literal, NamedTuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm


# --- Args ---------------------------------------------------------------------------------------------------
@dataclass
class Args:
    backbone: str = "runs/simclr/backbone.pt"  # file, random:FILE (untrained), pixels, resnet50, timm:NAME
    mode: Literal["linear", "finetune", "knn", "logreg", "features", "predict"] = "linear"  # as listed above
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    labels_csv: str = ""  # file with path,label lines for a flat --data folder, evaluated in 5 folds
    group_pattern: str = ""  # of class folders: a regular expression, its first group in a path is the group
    labels: int = 0  # labelled training images to use, the same number of each class; 0: all
    seeds: int = 1  # repetitions with other subsets, folds, heads and untrained weights
    watch: str = ""  # run folder to follow: k-NN whenever its backbone.pt changes, into its TensorBoard log
    side: int = 0  # side of the images in pixels; 0: the backbone's
    head: str = ""  # file for --mode predict; default: the newest head of this backbone
    out: str = ""  # folder for the results; default: the backbone's

    k: tuple[int, ...] = (20, 200)  # neighbours of k-NN
    feature: Literal["auto", "cls", "mean", "both"] = "auto"  # of ViTs: [CLS], mean patch; auto: the method's
    layers: tuple[int, ...] = (-1,)  # of ViTs: blocks whose features stand side by side (DINO: -4 -3 -2 -1)

    epochs: int = 0  # passes over the data (paper: linear 90; finetune 60 at 1 %, 30. 0: 100, finetune 30)
    batch_size: int = 256  # images per step, of all processes together
    base_lr: float = 0.05  # times batch / 256 is the learning rate (paper: of finetune, 0.05 in SimCLR)
    rates: tuple[float, ...] = ()  # linear: such rates, the best is kept; none: 0.001 0.003 0.01 ... 10 30
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
    rand_augment: bool = False  # finetune: torchvision's RandAugment after crop and flip (MAE: timm's)

    workers: int = 2  # processes that read images, for each training process
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere


def processes():
    """Rank, and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(words):
    """Print in process 0 alone."""
    if processes()[0] == 0:
        print(words)


# --- Labels -------------------------------------------------------------------------------------------------
DEMO_CLASSES = ("house", "tree", "car", "boat", "cat", "mushroom", "cup", "key", "bird", "flower")


class Labelled(NamedTuple):
    """n images and what is known of them. A group is never split between learning and testing."""

    items: tuple  # paths, numbers of demo images, or (torchvision data set, index)
    labels: torch.Tensor  # (n,) number of the class
    classes: list
    groups: torch.Tensor  # (n,) number of the group; without groups each image is one
    is_test: torch.Tensor | None  # (n,) bool; None: in 5 folds each image learns and tests


def read_labels(data, labels_csv="", group_pattern=""):
    """Labelled images of --data: by a csv, by class folders, or of a data set. Prints the classes."""
    if labels_csv:
        rows = csv_rows(data, labels_csv)
    elif os.path.isdir(data):
        rows = folder_rows(data)
    elif data == "demo":
        items = [*range(4096), *range(10**6, 10**6 + 2048)]
        rows = [(item, DEMO_CLASSES[demo_image(item)[1]], "", item >= 4096) for item in items]
    else:
        rows = torchvision_rows(data)

    items, names, groups, is_test = zip(*rows, strict=True)
    classes, labels, counts = np.unique(names, return_inverse=True, return_counts=True)
    shown = ", ".join(f"{name} {count}" for name, count in zip(classes[:20], counts[:20], strict=True))
    if len(classes) < 2:
        raise SystemExit(f"{labels_csv or data}: has one class ({shown}), two or more are needed")

    if group_pattern:
        groups = groups_by(group_pattern, data, items)
    groups = [f"group {group}" if group else f"{i}" for i, group in enumerate(groups)]
    different, groups = np.unique(groups, return_inverse=True)
    grouped = f" in {len(different)} groups" if len(different) < len(items) else ""
    say(f"{len(items)} images{grouped}, {len(classes)} classes: {shown}{', ...' * (len(classes) > 20)}")
    in_folds = None in is_test or (group_pattern and not find_splits(data))
    is_test = None if in_folds else torch.tensor(is_test)
    found = Labelled(items, torch.tensor(labels), classes.tolist(), torch.tensor(groups), is_test)
    check_learnable(found, labels_csv or data)
    return found


def groups_by(pattern, data, items):
    """What the first group of a regular expression finds in the path of each image below `data`."""
    try:
        expression = re.compile(pattern)
        found = [expression.search(os.path.relpath(item, data)) for item in items]
        groups = [match and match[1] for match in found]
    except (re.error, IndexError, TypeError, ValueError) as error:
        words = f"must be a regular expression with parentheses round the group, for folders: {error}"
        raise SystemExit(f"--group-pattern {pattern}: {words}")
    if not all(groups):
        first = next(item for item, group in zip(items, groups, strict=True) if not group)
        raise SystemExit(f"--group-pattern {pattern}: finds nothing in {first}")
    return groups


def check_learnable(data, source):
    """SystemExit if no class can be learnt and tested; prints those that cannot."""
    pairs = torch.stack([data.labels, data.groups]).unique(dim=1)
    lost = pairs[0].bincount(minlength=len(data.classes)) == 1  # of one image or group
    n = len(data.groups.unique())
    if data.is_test is None and n < 5:
        raise SystemExit(f"{source}: {n} images or groups are too few for 5 folds, label more")
    if data.is_test is not None:
        lost = data.labels[~data.is_test].bincount(minlength=len(data.classes)) == 0
        both = set(data.groups[data.is_test].tolist()) & set(data.groups[~data.is_test].tolist())
        if both:
            raise SystemExit(f"{source}: {len(both)} groups have images to learn from and to test on")

    if lost.all():
        raise SystemExit(f"{source}: each class has one image or group: none can be both learnt and tested")
    if lost.any():
        names = [data.classes[i] for i in lost.nonzero()[:20, 0]]
        say(f"{source}: never learnt where they are tested, so never right: {', '.join(names)}")


def folder_items(folder):
    """Paths of the images below a folder."""
    return [os.fsdecode(path) for path in image_paths(folder)]


TESTS = ("val", "valid", "validation", "test", "testing")


def find_splits(data):
    """The folders to learn from and to test on: train beside val or test, by any of their names; else ()."""
    if not os.path.isdir(data):
        return ()
    folders = {name.lower(): os.path.join(data, name) for name in os.listdir(data)}
    learn = [folders[name] for name in ("train", "training") if name in folders]
    test = [folders[name] for name in TESTS if name in folders]
    return (learn[0], test[0]) if learn and test else ()


def folder_rows(data):
    """(path, class, "", whether for testing) of class folders, or of train/ and val/ or test/ with such.
    Without that pair one image in five is for testing, by the hash of its path."""
    splits, rows = find_splits(data), []
    words = "has no train/ beside val/ or test/: one image in five is for testing, of groups 5 folds"
    say(f"--data {data}: " + (f"learns from {splits[0]}, tests on {splits[1]}" if splits else words))
    for root in splits or (data,):
        paths = folder_items(root)
        above = root if splits else os.path.commonpath([os.path.dirname(path) for path in paths])
        for path in paths:
            name = os.path.relpath(path, above)
            if os.sep not in name:
                instead = f"--data {splits[0]}, " if splits and root != splits[0] else ""
                raise SystemExit(f"--data {data}: no class folder around {path}; give {instead}--labels-csv")
            is_test = root == splits[1] if splits else zlib.crc32(os.fsencode(name)) % 5 == 0
            rows.append((path, name.split(os.sep)[0], "", is_test))

    if {row[1].lower() for row in rows} <= {"train", "training", *TESTS}:
        raise SystemExit(f"--data {data}: its folders are no classes; images to learn from go to train/")
    return rows


COLUMNS = {  # what a csv may call them
    "path": ("path", "image", "file", "filename", "filepath", "file_name"),
    "label": ("label", "species", "class", "category"),
    "group": ("group", "camera", "video", "patient", "site"),
}


def csv_cells(lines, delimiter):
    """[(path, label, group)] of the rows of a csv, and its header in small letters. Its columns are named as
    in COLUMNS or, where no name is there, path and label."""
    cells = csv.reader(lines, delimiter=delimiter)
    rows = [[cell.strip().replace("\n", " ") for cell in row] for row in cells if row]
    header = [cell.lower() for cell in rows[0]] if rows else []
    named = [[header.index(name) for name in names if name in header] for names in COLUMNS.values()]
    places = [found[0] if found else -1 for found in named] if any(named) else [0, 1, -1]
    cells = [dict(enumerate(row)) for row in (rows[1:] if any(named) else rows)]
    return [tuple(row.get(place, "") for place in places) for row in cells], header


def csv_rows(data, file):
    """(path, class, group, None) of the labelled rows of a csv file, each image once; SystemExit at one that
    is missing, or stands there twice with other words. Of commas, semicolons and tabs those part its columns
    that make the most names of files."""
    try:
        raw = Path(file).read_bytes()
        if raw.startswith(b"PK\3\4"):
            raise UnicodeError("is a spreadsheet; save it as CSV UTF-8")
        coding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        text = raw.decode(coding, "surrogateescape")  # which keeps names of files that are no UTF-8
        lines = io.StringIO(text, newline=None).readlines()
        tried = {mark: csv_cells(lines[:100], mark)[0] for mark in ",;\t"}
        found = {mark: sum(bool(find_file(data, cells[0])) for cells in tried[mark]) for mark in tried}
        rows, header = csv_cells(lines, max(found, key=found.get))
    except (OSError, UnicodeError, csv.Error) as error:
        raise SystemExit(f"--labels-csv {file}: {error}")

    known, missing, labelled = {}, [], [row for row in rows if row[0] and row[1]]
    for name, *words in labelled:
        path = find_file(data, name)
        if not path:
            missing.append(name)
        elif known.setdefault(path, words) != words:
            raise SystemExit(f"--labels-csv {file}: {name} is {known[path]}, and {words}")

    strange = re.search("[\udc80-\udcff]", " ".join([*missing, *(label for label, _ in known.values())]))
    if strange:
        raise SystemExit(f"--labels-csv {file}: is not in UTF-8; save it as CSV UTF-8")
    if missing:
        words = f"names {len(missing)} missing files, first {os.path.join(data, missing[0])}"
        raise SystemExit(f"--labels-csv {file}: {words}")
    if not known:
        raise SystemExit(f"--labels-csv {file}: no row has a path and a label; its first row is {header}")
    groups = [bool(group) for _, group in known.values()]
    named = [name for name in COLUMNS["label"] if name in header]
    if len(named) > 1:
        say(f"--labels-csv {file}: the label is {named[0]}, not {', '.join(named[1:])}; rename them if not")
    if any(groups) and not all(groups):
        words = f"{groups.count(False)} of {len(groups)} labelled rows have no group; fill or drop the column"
        raise SystemExit(f"--labels-csv {file}: {words}")
    if not any(groups) and len(header) > 2:
        words = f"none of its columns {', '.join(header)} is headed {', '.join(COLUMNS['group'])}"
        say(f"--labels-csv {file}: {words}; without it or --group-pattern each image is a group")
    if len(rows) > len(labelled):
        say(f"--labels-csv {file}: {len(rows) - len(labelled)} rows without a label are skipped")
    return [(path, label, group, None) for path, (label, group) in known.items()]


def find_file(data, name):
    """Where the file of a csv lies, or None: below `data`, beside it (photos/a.jpg), or from here; written as
    on Windows too."""
    for written in (name, name.replace("\\", "/")):
        for folder in (data, os.path.join(data, ".."), ""):
            path = os.path.normpath(os.path.join(folder, written))
            if os.path.isfile(path):
                return path
    return None


SPLITS = [("split", parts) for parts in (("train", "test"), ("trainval", "test"), ("train", "val"))]


def torchvision_rows(name):
    """((data set, index), class, "", whether for testing) of a torchvision data set with two parts."""
    kind, parts = getattr(torchvision.datasets, name, None), []
    reason = "it has no training and test part" if kind else "torchvision has no data set of this name"
    rank, world = processes()
    if rank:
        dist.barrier()  # the first process downloads, then the others read
    for key, names in (("train", (True, False)), *SPLITS):
        try:
            parts = parts or [kind("data", download=True, **{key: value}) for value in names]
        except (TypeError, ValueError):  # other keywords
            continue
        except Exception as error:  # no network
            reason = error
    if not parts:
        raise SystemExit(f"--data {name}: no folder, no download ({reason}). Give a folder, or demo")
    if world > 1 and not rank:
        dist.barrier()

    rows = []
    for part in parts:
        kept = [list(getattr(part, name, ())) for name in ("targets", "labels", "_labels")]
        labels = max(kept, key=len)
        if not labels or np.ndim(labels[0]):  # QMNIST's are rows of numbers
            labels = [part[i][1] for i in range(len(part))]  # decodes each image
        names = getattr(part, "classes", None) or [f"{number:05d}" for number in range(1 + max(labels))]
        rows += [((part, i), str(names[label]), "", part is parts[1]) for i, label in enumerate(labels)]
    return rows


def by_class(labels, seed):
    """Indices of `labels`, class after class, shuffled within each."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[labels[order].argsort(stable=True)]


def stratified_subset(labels, count, seed):
    """Indices of `count` labels: count // C of each class, and one more of count % C random classes."""
    order, counts = by_class(labels, seed), labels.bincount()
    nth = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # of its class
    mix = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[mix][nth[mix].argsort(stable=True)[:count]].sort().values


def stratified_folds(labels, groups, folds, seed):
    """Fold 0 .. folds - 1 of each image: the classes spread evenly over them, each group whole in one."""
    members, groups = groups.unique(return_inverse=True)
    if len(members) == len(labels):
        order = by_class(labels, seed)
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(labels)) % folds)

    counts = torch.zeros(len(members), int(labels.max()) + 1)  # images of each class in each group
    counts.index_put_((groups, labels), torch.ones(len(labels)), accumulate=True)
    share = counts / counts.sum(dim=0).clamp(min=1)
    held, fold_of = torch.zeros(folds, counts.shape[1]), torch.zeros(len(members), dtype=torch.long)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    for group in order[counts[order].sum(dim=1).argsort(descending=True, stable=True)]:
        crowded = held @ share[group] + 1e-3 * held.sum(dim=1)  # with its classes, then with any
        fold_of[group] = crowded.argmin()
        held[fold_of[group]] += counts[group]
    return fold_of[groups]


def held_out(labels, groups, seed):
    """(n,) bool: about a tenth of the labels, or 10,000, to choose by: whole groups, never all of a class."""
    folds = max(10, math.ceil(len(labels) / 10_000))
    fold = stratified_folds(labels, groups, folds, seed)
    pairs = torch.stack([labels, groups]).unique(dim=1)
    only = (pairs[0].bincount() == 1)[labels]  # of a class with one group
    free = ~torch.isin(groups, groups[only])
    sizes = fold[free].bincount(minlength=folds).double()
    sizes[sizes == 0] = math.inf

    held = free & (fold == (sizes - len(labels) / folds).abs().argmin())
    kept = labels[~held].bincount(minlength=int(labels.max()) + 1)
    return held & ~torch.isin(groups, groups[kept[labels] == 0])


class Pictures(Dataset):
    """By index: the index, the uint8 image (3, side, side), and whether its file could be read. crop is
    random by `key`, (seed, epoch), and the index alone; without it, the centre crop."""

    def __init__(self, items, side, crop=None, min_scale=1.0):
        self.items, self.side, self.crop, self.key = items, side, crop, (0, 0)
        self.shortest = side / (0.75 * min_scale) ** 0.5 if crop else 1.15 * side

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        try:
            if isinstance(item, str):
                image = read_image(item, self.shortest)
            else:
                image = demo_image(item)[0] if isinstance(item, int) else item[0][item[1]][0].convert("RGB")
        except Exception:  # whatever a decoder raises
            return index, torch.zeros(3, self.side, self.side, dtype=torch.uint8), False

        if self.crop:
            torch.default_generator.manual_seed(hash((*self.key, index)) % 2**32)
            return index, self.crop(v2.functional.pil_to_tensor(image)), True
        bleed = 0.0625 if self.side > 32 else 0  # on each side: the centre crop of 87.5 %
        image = ImageOps.fit(image, (self.side, self.side), Image.BICUBIC, bleed=bleed)
        return index, v2.functional.pil_to_tensor(image), True


def require_readable(readable, items):
    """SystemExit if some images could not be read: learning from the others would be another task."""
    broken = (~readable).nonzero()[:, 0].tolist()
    if broken:
        words = f"{len(broken)} of {len(items)} images cannot be read, first {items[broken[0]]}"
        raise SystemExit(f"{words}; mend them or take them away")


# --- Backbones ----------------------------------------------------------------------------------------------
FIXED_POSITIONS = ("mae", "moco_v3", "ijepa")  # sin-cos tables, which only fine-tuning moves
# heads of the methods' ViTs, which files of the first edition leave out
HEADS = {"vit_nano": 4, "vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16}


def build_network(builder, arch_args):
    """The untrained network that a backbone.pt describes; norm_eps and mlp_layer stand there for what timm
    takes as classes. Uses resnet."""
    arch_args = dict(arch_args)
    if builder == "torchvision.resnet":
        return resnet(**arch_args)[0]
    if "norm_eps" in arch_args:
        arch_args["norm_layer"] = partial(nn.LayerNorm, eps=arch_args.pop("norm_eps"))
    if "mlp_layer" in arch_args:
        arch_args["mlp_layer"] = getattr(timm.layers, arch_args["mlp_layer"])
    classes = {"timm.VisionTransformer": timm.models.VisionTransformer, "timm.Beit": timm.models.Beit}
    return classes[builder](**arch_args)


def first_edition(file):
    """builder and arch_args for a backbone.pt of the first edition, whose arch_args are its own."""
    old, state = file["arch_args"], file["state_dict"]
    if "conv1.weight" in state:
        return "torchvision.resnet", {"arch": file["arch"]} | old

    new = {"img_size": file["image_size"], "patch_size": old["patch_size"], "num_classes": 0}
    new["embed_dim"] = len(state["norm.weight"])
    new["depth"] = sum(name.endswith(".norm1.weight") for name in state)
    new["num_heads"] = old.get("heads") or HEADS[file["arch"]]
    if file["method"] == "beit":
        relative = "blocks.0.attn.relative_position_bias_table" in state
        new |= {"use_abs_pos_emb": "pos_embed" in state, "use_rel_pos_bias": relative}
        return "timm.Beit", new | {"init_values": 0.1, "global_pool": "token"}

    if "blocks.0.ls1.gamma" in state:
        new["init_values"] = old.get("layer_scale", 1e-5)
    hidden = len(state["blocks.0.mlp.fc1.weight"])
    if hidden != state["blocks.0.mlp.fc2.weight"].shape[1]:
        new |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": hidden / new["embed_dim"]}
    if "reg_token" in state:
        new |= {"reg_tokens": state["reg_token"].shape[1], "no_embed_class": True}
    if "eps" in old:
        act_layer = "quick_gelu" if old.get("quick_gelu") else "gelu"
        new |= {"pre_norm": True, "norm_eps": old["eps"], "act_layer": act_layer}
    if "cls_token" not in state:
        new |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return "timm.VisionTransformer", new


class Backbone(nn.Module):
    """uint8 images (B, 3, side, side) -> features (B, dim), normalised as the network was trained. feature:
    of ViTs cls, mean (of patch tokens) or both, normed, of each of the blocks `layers`, side by side; pooled
    is what the network itself returns."""

    def __init__(self, net, side, mean, std, name, feature="pooled", layers=(-1,)):
        super().__init__()
        self.net, self.side, self.name = net.to(memory_format=torch.channels_last), side, name
        self.feature, self.layers = feature, list(layers)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        with torch.no_grad():
            self.dim = self.eval()(torch.zeros(1, 3, side, side)).shape[1]

    def forward(self, images):
        images = (images.float() / 255 - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)
        if self.feature == "pooled":
            return self.net(images).flatten(1)

        parts, options = [], {"return_prefix_tokens": True, "norm": True, "intermediates_only": True}
        for tokens in self.net.forward_intermediates(images, self.layers, output_fmt="NLC", **options):
            patches, prefix = tokens if isinstance(tokens, tuple) else (tokens, None)
            parts += [prefix[:, 0]] if self.feature != "mean" else []
            parts += [patches.mean(dim=1)] if self.feature != "cls" else []
        return torch.cat(parts, dim=1)


def published(name, side):
    """The network of torchvision, or timm:NAME, with its published weights and without its last layer."""
    if name.startswith("timm:"):
        size = {"img_size": side} if side and "patch" in name else {}
        net = timm.create_model(name[5:], pretrained=True, num_classes=0, **size)
        given = net.pretrained_cfg
        return Backbone(net, side or given["input_size"][1], given["mean"], given["std"], name)

    weights = torchvision.models.get_model_weights(name).DEFAULT
    net, given = torchvision.models.get_model(name, weights=weights), weights.transforms()
    last = [part for part, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1]
    above, _, last = last.rpartition(".")
    setattr(net.get_submodule(above), last, nn.Identity())
    return Backbone(net, side or given.crop_size[0], given.mean, given.std, name)


def filled_vit(file, builder, args, untrained, feature, tunes, drop_path):
    """timm's network of a backbone.pt with its weights, or as timm starts it (MAE's by xavier). If it tunes,
    timm pools: a mean gets a norm of its own behind it in place of the last one (MAE, BEiT)."""
    state, method = file["state_dict"], file["method"]
    if tunes:
        args = {name: value for name, value in args.items() if name != "fc_norm"}
        args |= {"global_pool": "avg" if feature == "mean" else "token", "drop_path_rate": drop_path}
    net = build_network(builder, args)
    for layer in net.modules() if untrained and method == "mae" else ():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))

    start = net.state_dict()
    if method in FIXED_POSITIONS:
        start["pos_embed"] = state["pos_embed"]
        net.pos_embed.requires_grad_(tunes)
    if tunes and feature == "mean":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
        state |= {name: tensor for name, tensor in start.items() if name.startswith("fc_norm.")}
    net.load_state_dict(start if untrained else state)
    return net


def from_file(path, side, feature, layers, tunes, drop_path):
    """The Backbone of a backbone.pt, or of random:FILE untrained; SystemExit if a flag does not fit it."""
    file = torch.load(path.removeprefix("random:"), map_location="cpu", weights_only=True)
    untrained, size = path.startswith("random:"), side or file["image_size"]
    name = f"{'untrained' if untrained else file['method']} {file['arch']}"
    builder, args = (file["builder"], file["arch_args"]) if "builder" in file else first_edition(file)
    if builder == "torchvision.resnet":
        net = build_network(builder, args)
        net.load_state_dict(net.state_dict() if untrained else file["state_dict"])
        return Backbone(net, size, file["mean"], file["std"], name)

    tokens, patch = "cls_token" in file["state_dict"], args["patch_size"]
    if size % patch:
        raise SystemExit(f"--side {side}: must be a multiple of the patches' {patch} pixels")
    if feature == "auto":
        means = not tokens or file["method"] == "beit" or (tunes and file["method"] == "mae")
        feature = "mean" if means else "cls"
    if feature == "both" and tunes:
        raise SystemExit("--feature both: to be fine-tuned, take cls or mean")
    if feature != "mean" and not tokens:
        raise SystemExit(f"--feature {feature}: the network has no [CLS], use mean")
    if not layers or not all(-args["depth"] <= layer < args["depth"] for layer in layers):
        raise SystemExit(f"--layers {layers}: give some of {-args['depth']} .. {args['depth'] - 1}")

    net = filled_vit(file, builder, args, untrained, feature, tunes, drop_path)
    if size != args["img_size"]:
        net.set_input_size(size)
    name, kind = f"{name} {feature}", "pooled" if tunes else feature
    return Backbone(net, size, file["mean"], file["std"], name, kind, layers)


def load_backbone(path, seed=0, side=0, feature="auto", layers=(-1,), tunes=False, drop_path=0.0):
    """The Backbone of a backbone.pt, random:FILE (its network untrained), pixels, or a name of torchvision or
    timm; SystemExit if it cannot be filled. feature auto: [CLS]; the mean token where there is none, of BEiT,
    and of MAE if the network `tunes`, that is, will be fine-tuned."""
    torch.manual_seed(seed)
    try:
        if path == "pixels":
            backbone = Backbone(nn.Identity(), side or 32, MEAN, STD, path)
        elif path.startswith("timm:") or path in torchvision.models.list_models(torchvision.models):
            backbone = published(path, side)
        else:
            backbone = from_file(path, side, feature, layers, tunes, drop_path)
    except FileNotFoundError:
        raise SystemExit(
            f"--backbone {path}: no such file, nor a network of torchvision; python simclr.py trains one"
        )
    except Exception as error:  # of pickle, a missing key, another shape
        words = f"cannot be loaded ({' '.join(repr(error).split()):.250})"
        raise SystemExit(f"--backbone {path}: {words}; python convert.py makes a backbone.pt of other files")

    vit = os.path.exists(path.removeprefix("random:")) and hasattr(backbone.net, "blocks")
    useless = {"--feature": feature != "auto" and not vit, "--drop-path": drop_path and not (vit and tunes)}
    useless["--layers"] = tuple(layers) != (-1,) and not (vit and not tunes)
    if any(useless.values()):
        flag = next(flag for flag in useless if useless[flag])
        raise SystemExit(f"{flag}: has no effect on {backbone.name} in this mode; leave it out")
    return backbone


@torch.no_grad()
def settle_statistics(backbone, items, device):
    """Give an untrained ResNet's BatchNorms the statistics of up to 1,000 images for learning (in 5 folds: of
    all), as they have after the first steps of any training: with mean 0 and variance 1, which no training
    starts from, features are worth 5 to 15 points more. Nothing of ViTs changes."""
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms or len(items) < 2:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches

    some = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:1000].tolist()
    pictures = Subset(Pictures(items, backbone.side), some)
    backbone.to(device).train()
    for _, images, _ in DataLoader(pictures, min(250, len(some)), drop_last=True):
        backbone(images.to(device))
    for norm in norms:
        norm.momentum = 0.1


def fingerprint(module):
    """A number that changes when any weight or buffer does."""
    mark = 0
    for tensor in module.state_dict().values():
        mark = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), mark)
    return mark


@torch.no_grad()
def extract_features(backbone, pictures, workers=0, device="cpu", amp=None, key=None):
    """Features (n, D) float32 of Pictures, in their order, NaN where one cannot be read; each process
    computes its share, once. SystemExit if the network gives numbers that are not finite."""
    rank, world = processes()
    backbone, pictures.key = backbone.to(device).eval(), key or pictures.key
    before = fingerprint(backbone)
    features = torch.zeros(len(pictures), backbone.dim)
    loader = DataLoader(Subset(pictures, range(rank, len(pictures), world)), 256, num_workers=workers)
    for index, images, readable in tqdm(loader, desc="features", disable=rank > 0, leave=False):
        with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
            rows = backbone(images.to(device))
        features[index] = rows.float().cpu().nan_to_num(math.inf, math.inf, -math.inf)
        features[index[~readable]] = math.nan

    if fingerprint(backbone) != before:
        raise RuntimeError("the frozen backbone has changed")
    for part in features.split(2**15) if world > 1 else ():
        mine = part.to(device)
        dist.all_reduce(mine)
        part.copy_(mine)
    if features.isinf().any():
        words = "its features are not finite; give --amp off, or train it again, it may have diverged"
        raise SystemExit(f"{backbone.name}: {words}")
    return features


# --- Scores -------------------------------------------------------------------------------------------------
def accuracy(scores, labels):
    """top1, top5 and mean_per_class in %, and n, from scores (n, C); counted, then divided once."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    per_class = [top[labels == c, 0].double().mean().item() for c in labels.unique()]
    return {
        "top1": 100 * top[:, 0].sum().item() / len(labels),
        "top5": 100 * top.any(dim=1).sum().item() / len(labels),
        "mean_per_class": 100 * sum(per_class) / len(per_class),
        "n": len(labels),
    }


def knn(bank, labels, queries, ks, classes, temperature=0.07, device="cpu", memory=2**28):
    """{k: scores (M, C)} of queries (M, D): each of the k nearest rows of the bank (n, D), by cosine, votes
    for its label with exp(cosine / temperature) (2104.14294). The bank lies on the device, with `memory`
    bytes of similarities at once."""
    bank, most = bank.to(device, copy=True), min(max(ks), len(bank))
    bank /= bank.norm(dim=1, keepdim=True).clamp(min=1e-12)  # in place: ImageNet's is 10 GB
    scores = {k: torch.zeros(len(queries), classes) for k in ks}
    for rows in torch.arange(len(queries)).split(max(1, memory // (4 * len(bank)))):
        similarity = F.normalize(queries[rows].to(device), dim=1) @ bank.T
        similarity, nearest = (part.cpu() for part in similarity.topk(most, dim=1))
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)  # cannot overflow
        for k in ks:
            votes = torch.zeros(len(rows), classes)
            scores[k][rows] = votes.scatter_add_(1, labels[nearest[:, :k]], weights[:, :k])
    return scores


def fit_logreg(x, labels, penalty, classes, rows=None, start=None, max_iter=1000):
    """Weight (D, C) and bias (C,) at the minimum of mean cross-entropy + penalty / 2 |W|^2 over the given
    rows of x (n, D), by default all; on the device of x, in float64, of a float32 x in chunks."""
    rows = torch.arange(len(x), device=x.device) if rows is None else rows.to(x.device)
    start = start or (torch.zeros(x.shape[1], classes), torch.zeros(classes))
    weight, bias = (part.to(x.device, torch.float64).clone().requires_grad_() for part in start)
    options = {"max_iter": max_iter, "tolerance_grad": 1e-7, "tolerance_change": 1e-12, "history_size": 20}
    solver = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **options)
    whole = (x[rows], labels[rows]) if x.dtype == torch.float64 else None

    def chunks():
        for part in rows.split(2**13):
            yield x[part].double(), labels[part]

    def objective():
        solver.zero_grad()
        total = penalty / 2 * weight.square().sum()
        total.backward()
        for part, targets in [whole] if whole else chunks():
            loss = F.cross_entropy(part @ weight + bias, targets, reduction="sum") / len(rows)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    solver.step(objective)
    return weight.detach(), bias.detach()


def held_out_score(scores, labels):
    """Number of right ones, less a share of one that grows with the cross-entropy; -1 if not finite."""
    right, loss = (scores.argmax(dim=1) == labels).sum().item(), F.cross_entropy(scores, labels).item()
    return right - loss / (1 + loss) if math.isfinite(loss) else -1


def logreg(features, labels, groups, classes, seed=0, device="cpu"):
    """Softmax regression on standardised features, its penalty, of 10^-5 .. 10, the best in 5 folds of the
    groups, or above 2,000 labels on a tenth of them. Returns weight (D, C), bias (C,), what was chosen."""
    kept = torch.float64 if features.numel() < 2**27 else torch.float32  # ImageNet's are 10 GB as float32
    deviation, mean = (part.to(device) for part in torch.std_mean(features, dim=0))
    x = features.to(device, kept, copy=True).sub_(mean).div_(deviation + 1e-6)

    y, fold = labels.to(device), stratified_folds(labels, groups, 5, seed)
    tests = [fold == i for i in range(5)] if len(labels) <= 2000 else [held_out(labels, groups, seed)]
    penalties = [10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5]
    score = dict.fromkeys(penalties, 0)
    for held in tests:
        if held.all() or not held.any():
            continue
        head, test = None, held.nonzero()[:, 0].to(device)
        for penalty in penalties:  # from strong to weak, each starting at the last
            head = fit_logreg(x, y, penalty, classes, (~held).nonzero()[:, 0], head, max_iter=50)
            score[penalty] += held_out_score(x[test].double() @ head[0] + head[1], y[test])

    if not any(score.values()):
        say("all labels are of one group: none can be kept out to choose the penalty by, 0.01 is taken")
        score[0.01] = 1
    best = max(penalties, key=score.get)
    weight, bias = fit_logreg(x, y, best, classes)
    weight = weight / (deviation + 1e-6)[:, None]
    bias = bias - mean.double() @ weight
    return weight.float().cpu(), bias.float().cpu(), {"penalty": best}


def make_optimizer(name, groups):
    """nesterov or sgd with momentum 0.9, or adamw; the loop sets the rate."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=name == "nesterov")


def linear_probe(features, labels, groups, classes, args, seed=0, augmented=None, device="cpu"):
    """One linear layer for each of args.rates in one pass: weight (D, C), bias (C,), what was chosen. A tenth
    of the labels, in whole groups, picks the rate and is not trained on; with one rate all are. features
    (n, D); augmented(key=(seed, epoch)) replaces them in training; probe_norm ends as part of the layer."""
    rates = args.rates or [10.0**power * digit for power in range(-3, 2) for digit in (1, 3)]
    held = held_out(labels, groups, seed)
    if len(rates) > 1 and (held.all() or not held.any()):
        rates = [sorted(rates)[len(rates) // 2]]
        say(f"--rates: too few labels to hold any out; the middle one, {rates[0]:g}, is taken")
    train = (~held).nonzero()[:, 0] if len(rates) > 1 else torch.arange(len(labels))
    epochs, steps = args.epochs or 100, math.ceil(len(train) / args.batch_size)
    if args.probe_norm and len(train) < 2 * steps:
        raise SystemExit(f"--batch-size {args.batch_size}: with --probe-norm no batch may have one image")

    norm = nn.Identity()
    if args.probe_norm:  # momentum None: statistics of all batches, not of the last ten
        norm = nn.BatchNorm1d(features.shape[1], eps=1e-6, momentum=None, affine=False).to(device)
    heads = nn.ModuleList(nn.Linear(features.shape[1], classes) for _ in rates).to(device)
    options = []
    for head, rate in zip(heads, rates, strict=True):
        scale = {"lr_scale": rate * len(train) / steps / 256}
        options.append({"params": nn.init.zeros_(head.weight), "weight_decay": args.weight_decay} | scale)
        options.append({"params": nn.init.zeros_(head.bias), "weight_decay": 0.0} | scale)
    optimizer, generator = make_optimizer(args.solver, options), torch.Generator().manual_seed(seed)

    for epoch in tqdm(range(epochs), desc="linear", leave=False, disable=processes()[0] > 0):
        rows = augmented(key=(seed, epoch)) if augmented else features
        order = train[torch.randperm(len(train), generator=generator)]
        for i, batch in enumerate(order.tensor_split(steps)):
            factor = cosine_schedule(epoch * steps + i, epochs * steps, args.warmup_epochs * steps, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * factor

            x, targets = norm(rows[batch].to(device)), labels[batch].to(device)
            loss = sum(F.cross_entropy(head(x), targets) for head in heads)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    fitted = [as_layer(head.cpu(), norm.cpu()) for head in heads]
    scores = [held_out_score(features[held] @ weight + bias, labels[held]) for weight, bias in fitted]
    best = scores.index(max(scores))
    if len(rates) > 1:
        right = (f"{rate:g}: {max(0, math.ceil(score))}" for rate, score in zip(rates, scores, strict=True))
        say(f"--rates: right ones of {held.sum()} labels kept out: {', '.join(right)}")
    if not fitted[best][0].isfinite().all():
        raise SystemExit("--mode linear: weights are not finite; lower --rates")
    return *fitted[best], {"rate": rates[best]}


def as_layer(head, norm):
    """Weight (D, C) and bias (C,) of a linear layer behind BatchNorm: W (x - mean) / std + b is one again."""
    weight, bias = head.weight.detach().T.contiguous(), head.bias.detach()
    if isinstance(norm, nn.BatchNorm1d):
        weight = weight * (norm.running_var + norm.eps).rsqrt()[:, None]
        bias = bias - norm.running_mean @ weight
    return weight, bias


# --- Fine-tuning --------------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """A backbone and a linear layer. group_matcher tells timm's layer decay what lies how deep: the input, a
    ViT's blocks or a ResNet's stages, and the rest, which learns at the full rate."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.backbone(images))

    def group_matcher(self, coarse=False):
        stem = r"backbone\.net\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|conv1|bn1)"
        return {"stem": stem, "blocks": r"backbone\.net\.(?:blocks\.|layer|stages\.)(\d+)"}


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups of a Classifier with lr_scale = layer_decay^(depth + 1 - id) (MAE, BEiT); no decay of
    biases, norms, tokens and positions."""
    plain = ("*cls_token", "*reg_token", "*pos_embed")
    groups = param_groups_layer_decay(model, weight_decay, plain, layer_decay=layer_decay)
    first, scales = next(model.parameters()), [group["lr_scale"] for group in groups]
    lowest = groups[scales.index(min(scales))]["params"]
    if layer_decay != 1 and (len(set(scales)) < 3 or not any(p is first for p in lowest)):
        raise SystemExit(f"--layer-decay {layer_decay}: finds no layers in this network; leave it at 1.0")
    return groups


def share_of_batch(args, backbone, n):
    """Images in a process's share of a batch; SystemExit if too few for BatchNorm, or odd for mixup."""
    share = min(args.batch_size, n) // processes()[1]
    normed = any("BatchNorm" in type(layer).__name__ for layer in backbone.modules())
    if share < 1 + normed or (share % 2 and args.mixup + args.cutmix):
        words = f"{share} of {n} images for each process are too few for this network, or odd for mixup"
        raise SystemExit(f"--batch-size {args.batch_size}: {words}")
    return share


def finetune(backbone, train, labels, classes, args, device, amp=None, seed=0):
    """Train `backbone` and a linear layer, returned as by linear_probe; by default as SimCLR (App. B.5): SGD,
    no warm-up, crops and flips, BatchNorm in train mode. Several processes share each batch."""
    (rank, world), step, mixes = processes(), 0, args.mixup + args.cutmix > 0
    epochs, batch_size = args.epochs or 30, share_of_batch(args, backbone, len(train))
    torch.manual_seed(hash((seed, rank)) % 2**32)
    model, peak_lr = Classifier(backbone, classes).to(device), args.base_lr * batch_size * world / 256
    optimizer = make_optimizer(args.solver, layer_groups(model, args.weight_decay, args.layer_decay))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    mix = Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=classes)
    sampler = DistributedSampler(train, world, rank, seed=seed, drop_last=True)
    loader = DataLoader(train, batch_size, sampler=sampler, drop_last=True, num_workers=args.workers)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    for epoch in tqdm(range(epochs), desc="finetune", leave=False, disable=rank > 0):
        sampler.set_epoch(epoch)
        train.key = seed, epoch
        net.train()
        for index, images, readable in loader:
            require_readable(readable, [train.items[i] for i in index])
            lr = cosine_schedule(step, epochs * len(loader), args.warmup_epochs * len(loader), peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * lr

            images, targets = images.to(device).float(), labels[index].to(device)
            torch.manual_seed(hash((seed, step, rank)) % 2**32)  # else it depends on who read the images
            np.random.seed(hash((seed, step, rank)) % 2**32)
            if mixes:
                images, targets = mix(images, targets)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
        if not loss.isfinite():
            raise SystemExit(f"--mode finetune: the loss is {loss:g} in epoch {epoch + 1}; lower --base-lr")

    for buffer in model.buffers() if world > 1 else ():  # each process has its own statistics of BatchNorm
        dist.broadcast(buffer, 0)
    return *as_layer(model.head.cpu(), None), {"base_lr": args.base_lr}


# --- Evaluation ---------------------------------------------------------------------------------------------
ONLY_IN = {  # modes: flags that no other mode reads
    "finetune": "base_lr layer_decay drop_path label_smoothing mixup cutmix rand_augment",
    "linear": "rates probe_norm augment",
    "linear, finetune": "solver weight_decay warmup_epochs min_scale",
    "knn": "k",
    "predict": "head",
    "linear, finetune, knn, logreg": "labels seeds",
    "linear, finetune, knn, logreg, features": "side feature layers",
}


def splits(data, args, seed):
    """(train, test) indices of repetition `seed`: the test split, or each of 5 folds of the groups; of the
    training images only --labels, stratified."""
    fold, folds = data.is_test, (True,)
    if fold is None:
        fold, folds = stratified_folds(data.labels, data.groups, 5, seed), range(5)
    for held in folds:
        train, test = (fold != held).nonzero()[:, 0], (fold == held).nonzero()[:, 0]
        fewest, count = len(data.labels[train].unique()), args.labels or len(train)
        if not len(test):
            raise SystemExit(f"--data {args.data}: has no test images; give more, val/, or --labels-csv")
        if not fewest <= count <= len(train):
            raise SystemExit(f"--labels {count}: must be {fewest}, one of each class, to all {len(train)}")
        yield train[stratified_subset(data.labels[train], count, seed)], test


def plain(words):
    """As a part of a file's name: without slashes and the like; of a long one its end, and a checksum."""
    name = re.sub(r"\W+", "-", os.path.normpath(words)).strip("-") or "here"
    return name if len(name) <= 40 else f"{name[-31:]}-{zlib.crc32(os.fsencode(words)):08x}"


def result_path(args, name):
    """Where a result goes: beside the backbone, or to --out. What it is of is in its name, so that results of
    other data, or of a backbone beside, are not written over."""
    file, name = Path(args.backbone.removeprefix("random:")), Path(name)
    folder = Path(args.out or (file.parent if file.is_file() else f"runs/{plain(args.backbone)}"))
    words = [name.stem, args.data, args.labels_csv.removesuffix(".csv"), args.group_pattern]
    if args.out or (file.is_file() and file.stem != "backbone"):
        words = [str(file).removesuffix(".pt") if args.out else file.stem, *words]
    if args.backbone.startswith("random:"):
        words = ["random", *words]
    return folder / f"{'-'.join(plain(word) for word in words if word)}{name.suffix}"


def save_result(args, name, content=""):
    """Write text, or tensors to .pt, in process 0, under a temporary name until it is whole; its path.
    SystemExit if it cannot be written; without content that is all it finds out."""
    path = result_path(args, name)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    if processes()[0]:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if content and path.suffix == ".pt":
            torch.save(content, temporary)
        else:
            temporary.write_text(content, encoding="utf-8", errors="surrogateescape", newline="")
        if content:
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else f"{error}; is the disk full?"
        words = " ".join(reason.split())[:200]
        raise SystemExit(f"{path}: cannot be written ({words}); --out names another folder")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def evaluate(args: Args) -> dict:
    """Do --mode, print a table, write its results beside the backbone or to --out, and return them."""
    zero = "labels side epochs weight_decay workers seed warmup_epochs drop_path label_smoothing mixup cutmix"
    at_most = dict.fromkeys(("min_scale", "layer_decay", "drop_path", "label_smoothing"), 1)
    at_most["warmup_epochs"] = args.epochs or (30 if args.mode == "finetune" else 100)
    check_flags(replace(args, layers=()), zero, at_most)
    for name in ("k", "layers"):
        if not getattr(args, name):
            raise SystemExit(f"--{name}: give a number, or more")
    mode = "knn" if args.watch else args.mode
    for modes, names in ONLY_IN.items():
        for name in () if mode in modes.split(", ") else names.split():
            if getattr(args, name) != getattr(Args, name):
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag}: is for --mode {modes}, not {mode}; leave it out")

    rank, world, device, amp = start_processes(args.device, args.amp)
    work = {"predict": predict, "features": export_features}.get(args.mode, measure)
    try:
        results = (follow if args.watch else work)(args, device, amp)
    except (KeyboardInterrupt, OSError) as error:  # a worker's error comes behind its traceback
        raise SystemExit((str(error) or "interrupted").splitlines()[-1])
    if world > 1:
        dist.destroy_process_group()
    return results


def learn_head(args, data, backbone, features, train, seed, device, amp):
    """Weight (D, C) and bias (C,) learnt from the images `train`, and what was chosen. finetune changes the
    backbone, too."""
    labels, groups, classes = data.labels[train], data.groups[train], len(data.classes)
    if args.mode == "logreg":
        return logreg(features[train], labels, groups, classes, seed, device)

    crop = random_crop(backbone.side, args.min_scale)
    if args.rand_augment:
        crop = v2.Compose([crop, v2.RandAugment()])
    pictures = Pictures([data.items[i] for i in train.tolist()], backbone.side, crop, args.min_scale)
    if args.mode == "finetune":
        return finetune(backbone, pictures, labels, classes, args, device, amp, seed)
    augmented = None
    if args.augment:
        augmented = partial(extract_features, backbone, pictures, args.workers, device, amp)
    return linear_probe(features[train], labels, groups, classes, args, seed, augmented, device)


def readable_features(args, backbone, items, device, amp):
    """Features (n, D) of images to learn from or to test on; SystemExit if some cannot be read."""
    features = extract_features(backbone, Pictures(items, backbone.side), args.workers, device, amp)
    require_readable(~features.isnan().any(dim=1), items)
    return features


def answer(args, data, backbone, features, train, test, seed, device, amp):
    """{row of the table: scores (M, C) of the images `test`}, what was chosen, weight and bias, after
    learning from the images `train`."""
    if args.mode == "knn":
        known = features[train], data.labels[train], features[test]
        scores = knn(*known, args.k, len(data.classes), device=device)
        return {f"k {k}": scores[k] for k in args.k}, {"used": min(max(args.k), len(train))}, None, None

    weight, bias, chosen = learn_head(args, data, backbone, features, train, seed, device, amp)
    if args.mode == "finetune":
        items = [data.items[i] for i in test.tolist()]
        rows = readable_features(args, backbone, items, device, amp)
    else:
        rows = features[test]
    return {args.mode: rows @ weight + bias}, chosen, weight, bias


def measure(args, device, amp):
    """Modes linear, finetune, knn and logreg: fit and test in each repetition and fold; save a head."""
    data = read_labels(args.data, args.labels_csv, args.group_pattern)
    learns = torch.arange(len(data.items)) if data.is_test is None else (~data.is_test).nonzero()[:, 0]
    tunes, untrained, results = args.mode == "finetune", args.backbone.startswith("random:"), []
    choice = {"side": args.side, "feature": args.feature, "layers": args.layers, "tunes": tunes}
    load = partial(load_backbone, args.backbone, **choice, drop_path=args.drop_path)
    for seed in range(args.seed, args.seed + args.seeds):
        if untrained or not results:
            backbone, features = load(seed=seed), None
            given = fingerprint(backbone)
            save_result(args, f"eval-{args.mode}.json")  # nothing yet: only that it can be written
        if features is None and not tunes:
            if untrained:
                settle_statistics(backbone, [data.items[i] for i in learns.tolist()], device)
            features = readable_features(args, backbone, data.items, device, amp)

        folds, tested = [], []
        for train, test in splits(data, args, seed):
            backbone = load(seed=seed) if tunes else backbone
            folds.append(answer(args, data, backbone, features, train, test, seed, device, amp))
            tested.append(test)
        for row in folds[0][0]:  # folds differ in size: all their images are counted together
            scores = torch.cat([fold[0][row] for fold in folds])
            counted = accuracy(scores, data.labels[torch.cat(tested)])
            chosen = [fold[1] for fold in folds]
            results.append({"row": row, "choice": chosen, "labels": len(train)} | counted)

    report = tell_results(args, results, backbone.name)
    _, _, weight, bias = folds[-1]
    if data.is_test is None and args.mode != "knn":  # the folds have measured; all labels make the head
        train = stratified_subset(data.labels, args.labels or len(data.labels), seed)
        backbone = load(seed=seed) if tunes else backbone
        weight, bias, _ = learn_head(args, data, backbone, features, train, seed, device, amp)
    if args.mode != "knn":
        head = {"weight": weight, "bias": bias, "classes": data.classes, "choice": choice | {"seed": seed}}
        network = backbone.cpu().net.state_dict() if tunes or untrained else None
        save_result(args, f"head-{args.mode}.pt", head | {"network": network, "given": given})
    return report


def tell_results(args, results, name):
    """Print the table and write eval-MODE.json: mean over repetitions, and their sample deviation."""
    labels, tested = results[0]["labels"], results[0]["n"]
    out = asdict(args) | {"labels": labels, "n": tested, "network": name, "results": results}
    say(f"\n{args.backbone} on {args.data}: {labels} labels, {tested} test images, {args.seeds} repetitions")
    say(f"{'':12}{'top-1':>14}{'top-5':>8}{'per class':>11}")
    for row in dict.fromkeys(result["row"] for result in results):
        found = [result for result in results if result["row"] == row]
        mean = {key: sum(r[key] for r in found) / len(found) for key in ("top1", "top5", "mean_per_class")}
        deviation = torch.tensor([r["top1"] for r in found]).std().item() if len(found) > 1 else 0.0
        spread = f"{mean['top1']:7.1f} +- {deviation:3.1f}"
        say(f"{row:12}{spread}{mean['top5']:8.1f}{mean['mean_per_class']:11.1f}")
        if "top1" not in out:  # the first k stands for k-NN: no choice on the test images
            out |= mean | {"top1_std": deviation}
    save_result(args, f"eval-{args.mode}.json", json.dumps(out, indent=1))
    return out


def export_features(args, device, amp):
    """features.pt: features (n, D), NaN where an image cannot be read, and items: paths of images, which need
    no labels, or indices in a data set, first all for training."""
    items = folder_items(args.data) if os.path.isdir(args.data) else read_labels(args.data).items
    backbone = load_backbone(args.backbone, args.seed, args.side, args.feature, args.layers)
    save_result(args, "features.pt")
    if args.backbone.startswith("random:"):
        settle_statistics(backbone, items, device)
    features = extract_features(backbone, Pictures(items, backbone.side), args.workers, device, amp)
    names = [str(item[1]) if isinstance(item, tuple) else str(item) for item in items]
    path = save_result(args, "features.pt", {"features": features, "items": names})
    unreadable = int(features.isnan().any(dim=1).sum())
    say(f"{path}: {tuple(features.shape)}; {unreadable} images cannot be read")
    return {"n": len(items), "unreadable": unreadable}


def predict(args, device, amp):
    """predictions.csv (path, class, probability) for every image below --data with a head of this backbone;
    the row of an image that cannot be read is empty."""
    own = replace(args, data="", labels_csv="", group_pattern="")
    likes = [result_path(replace(own, out=out), "head.pt") for out in (args.out, "")]
    found = [path for like in likes for path in like.parent.glob(f"{like.stem}-*.pt")]
    path = Path(args.head or max(found, key=os.path.getmtime, default=likes[0]))
    try:
        head = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias, classes, given = (head[key] for key in ("weight", "bias", "classes", "given"))
        choice, network = dict(head["choice"]), head["network"]
    except Exception:
        raise SystemExit(f"--head {path}: missing or damaged; --mode logreg, linear or finetune writes it")
    backbone = load_backbone(args.backbone, **choice)
    if fingerprint(backbone) != given:
        raise SystemExit(f"--head {path}: was trained on another backbone than {args.backbone}")
    if network:
        backbone.net.load_state_dict(network)

    items = folder_items(args.data)
    save_result(args, "predictions.csv")
    features = extract_features(backbone, Pictures(items, backbone.side), args.workers, device, amp)
    probability = torch.softmax(features @ weight + bias, dim=1)
    lines = io.StringIO()
    rows = csv.writer(lines)
    rows.writerow(["path", "class", "probability"])
    for item, row in zip(items, probability, strict=True):
        answer = ["", ""] if row.isnan().any() else [classes[row.argmax()], f"{row.max():.4f}"]
        rows.writerow([os.path.relpath(item, args.data), *answer])
    unreadable = int(probability.isnan().any(dim=1).sum())
    written = save_result(args, "predictions.csv", lines.getvalue())
    say(f"{written}: {len(items)} images, {unreadable} of them cannot be read; by {path}")
    return {"n": len(items), "unreadable": unreadable}


def follow(args, device, amp):
    """k-NN of the run folder --watch whenever its backbone.pt is replaced, as eval/knn_top1, until Ctrl-C."""
    run, seen = Path(args.watch), None
    if not run.is_dir() or dist.is_initialized():
        reason = "works without torchrun" if run.is_dir() else "no such folder; start the training first"
        raise SystemExit(f"--watch {run}: {reason}")
    say(f"watching {run}/backbone.pt; Ctrl-C ends it")
    board = SummaryWriter(run, filename_suffix=".knn")
    path = run / "backbone.pt"
    try:
        while True:
            if path.exists() and path.stat().st_mtime_ns != seen:
                seen = path.stat().st_mtime_ns
                step = torch.load(path, map_location="cpu", weights_only=True).get("step", 0)
                result = measure(replace(args, watch="", mode="knn", backbone=str(path)), device, amp)
                board.add_scalar("eval/knn_top1", result["top1"], step)
                board.flush()
            time.sleep(1)
    except KeyboardInterrupt:
        return {}


# --- Plumbing -----------------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THINGS = (0x183C7EFFFF7E6666, 0x183C7E3C7EFF1818, 0x3C2CFFFFFF6600, 0x101814161EFF7E3C, 0x81C3FF99FF7E3C18)
THINGS += (0x3C7EFFFF18181C3C, 0xFCFEFEFCFC7800, 0x1C22221C08180C08, 0x60FC67EFE7C1018, 0x185A3C185ADB7E18)
IMAGE_ENDINGS = (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".tif", b".tiff")


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


def cosine_schedule(step, total, warmup, base, final=0.0):
    """From 0 in a straight line to base at step `warmup`, then in half a cosine to final at step `total`."""
    if step < warmup:
        return base * step / warmup
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup or 1)))


if __name__ == "__main__":
    evaluate(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
