# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision>=0.20", "tyro", "tensorboard", "tqdm"]
# ///
"""Evaluate a backbone: k-NN, logistic regression, linear probe of frozen features, fine-tuning, prediction.

Every method is measured here, on the same images and labels (protocols: 2002.05709 App. B; 2104.14294):
  knn       vote of the k most similar training images, weighted by exp(cosine / 0.07); nothing is trained
  logreg    softmax regression on standardised features, to its optimum (L-BFGS), penalty by cross-validation
  linear    the papers' probe: SGD on one linear layer, a grid of learning rates at once, the best on labels
            kept out of training
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
import time
import zlib
from dataclasses import asdict, dataclass, replace
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
    backbone: str = "runs/simclr/backbone.pt"  # a file, random:FILE (untrained), pixels, a torchvision model
    mode: Literal["linear", "finetune", "knn", "logreg", "features", "predict"] = "linear"  # see above
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    labels_csv: str = ""  # file with path,label lines for a flat --data folder, evaluated in 5 folds
    labels: int = 0  # labelled training images to use, the same number of each class; 0: all
    label_fraction: float = 1.0  # the same as a share of the training images
    seeds: int = 1  # repetitions with other subsets, folds, heads and untrained weights
    watch: str = ""  # run folder to follow: k-NN whenever its backbone.pt changes, into its TensorBoard log
    side: int = 0  # side of the images in pixels; 0: the backbone's
    head: str = ""  # head.pt for --mode predict; default: beside the backbone
    k: tuple[int, ...] = (20, 200)  # neighbours of k-NN
    epochs: int = 0  # passes over the data (paper: 90; finetune 60 or 30. 0: 100; 60 up to 1 % labels, 30)
    batch_size: int = 256  # images per step, of all processes together
    base_lr: float = 0.05  # times batch / 256 is the learning rate (paper: 0.05 for SimCLR's finetune)
    weight_decay: float = 0.0  # not on biases and norms (paper: 0)
    probe_norm: bool = False  # linear: BatchNorm without weights before the layer (MAE's probe, eps 1e-6)
    augment: bool = False  # linear: crops and flips anew in each epoch, not one cached feature an image
    min_scale: float = 0.08  # smallest area of a crop as a share of the image (paper: 0.08)
    tuner: Literal["sgd", "adamw"] = "sgd"  # of finetune: SGD with Nesterov momentum (SimCLR), AdamW (MAE)
    warmup_epochs: float = 0.0  # linear from 0 (paper: 0 for SimCLR, 5 for MAE)
    layer_decay: float = 1.0  # finetune: learning rate of a layer as a share of the next one's (MAE: 0.65)
    label_smoothing: float = 0.0  # finetune (MAE: 0.1)
    mixup: float = 0.0  # finetune: alpha of mixup, half of the batches if cutmix is on too (MAE: 0.8)
    cutmix: float = 0.0  # finetune: alpha of cutmix (MAE: 1.0)
    rand_augment: bool = False  # finetune: torchvision's RandAugment after crop and flip
    workers: int = 2  # processes that read images, for each training process
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere


# --- Labels -------------------------------------------------------------------------------------------------
class Pictures(Dataset):
    """Images by index as uint8 tensors; an item is a path, a number of a demo image, or (data set, index)."""

    def __init__(self, items, side, transform=None):
        self.items, self.side, self.transform = items, side, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, str):
            image = read_image(item, 1.15 * self.side, 1.0)
        else:
            image = demo_image(item)[0] if isinstance(item, int) else item[0][item[1]][0].convert("RGB")
        if self.transform:
            return index, self.transform(v2.functional.pil_to_tensor(image))
        bleed = 0.0625 if self.side > 32 else 0  # on each side: the centre crop of 87.5 %
        image = ImageOps.fit(image, (self.side, self.side), Image.BICUBIC, bleed=bleed)
        return index, v2.functional.pil_to_tensor(image)


def find_images(folder):
    """Paths of the images below a folder, sorted."""
    walk = os.walk(folder, followlinks=True)
    files = sorted(os.path.join(at, name) for at, _, names in walk for name in names)
    return [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]


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
    split = next((name for name in ("val", "test") if os.path.isdir(os.path.join(data, name))), None)
    if os.path.isdir(os.path.join(data, "train")) and split:
        parts = [os.path.join(data, "train"), os.path.join(data, split)]
        found = [(path, root) for root in parts for path in find_images(root)]
        files = [(path, os.path.relpath(path, root), root is parts[1]) for path, root in found]
    else:
        files = [(path, os.path.relpath(path, data), None) for path in find_images(data)]
        files = [(path, name, zlib.crc32(name.encode()) % 5 == 0) for path, name, _ in files]
        print(
            f"{data}: no train/ and val/ or test/; one image in five, by the hash of its path, is for testing"
        )
    names = [name.split(os.sep)[0] if os.sep in name else None for _, name, _ in files]
    classes = sorted(set(names) - {None})
    if len(classes) < 2 or None in names:
        raise SystemExit(f"--data {data}: needs a folder for each of 2 or more classes, or give --labels-csv")
    labels = torch.tensor([classes.index(name) for name in names])
    return [path for path, _, _ in files], labels, classes, torch.tensor([test for _, _, test in files])


def read_csv(data, labels_csv):
    """As read_labels, of a file with path,label lines; paths are relative to the folder `data`."""
    try:
        with open(labels_csv, newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise SystemExit(f"--labels-csv {labels_csv}: {error.strerror}")
    rows = rows[1:] if rows and rows[0][:2] == ["path", "label"] else rows
    if any(len(row) != 2 for row in rows):
        raise SystemExit(f"--labels-csv {labels_csv}: every line must be path,label")
    items = [os.path.join(data, path) for path, _ in rows]
    missing = [path for path in items if not os.path.isfile(path)]
    if missing:
        raise SystemExit(f"--labels-csv {labels_csv}: names {len(missing)} missing files, first {missing[0]}")
    classes = sorted({label for _, label in rows})
    if len(classes) < 2:
        raise SystemExit(f"--labels-csv {labels_csv}: has {len(classes)} classes, two or more are needed")
    return items, torch.tensor([classes.index(label) for _, label in rows]), classes, None


def read_torchvision(name):
    """As read_labels, of a torchvision data set with a training and a test split."""
    kind, parts = getattr(torchvision.datasets, name, None), []
    by_train, by_test, by_val = ({"train": True}, {"train": False}), ("train", "test"), ("train", "val")
    for pair in (by_train, *([{"split": name} for name in names] for names in (by_test, by_val))):
        try:
            parts = [kind("data", download=True, **split) for split in pair]
            break
        except Exception as error:  # no such name, other keywords, no network
            reason = error
    if not parts:
        raise SystemExit(f"--data {name}: no folder, no download ({reason}). Give a folder, or demo")
    items = [(part, index) for part in parts for index in range(len(part))]
    labels = torch.tensor([int(part[index][1]) for part, index in items])
    classes = list(getattr(parts[0], "classes", range(int(labels.max()) + 1)))
    return items, labels, [str(name) for name in classes], torch.arange(len(items)) >= len(parts[0])


def stratified_subset(labels, count, seed):
    """Indices of `count` labels: count // C of each class, and one more of count % C random classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique()
    extra = classes[torch.randperm(len(classes), generator=generator)[: count % len(classes)]]
    chosen = []
    for c in classes:
        indices = (labels == c).nonzero()[:, 0]
        shuffled = indices[torch.randperm(len(indices), generator=generator)]
        chosen.append(shuffled[: count // len(classes) + int(c in extra)])
    return torch.cat(chosen).sort().values


def stratified_folds(labels, folds, seed):
    """Fold 0 .. folds - 1 of each label, the classes spread evenly over them."""
    generator = torch.Generator().manual_seed(seed)
    fold, start = torch.empty(len(labels), dtype=torch.long), 0
    for c in labels.unique():
        indices = (labels == c).nonzero()[:, 0]
        indices = indices[torch.randperm(len(indices), generator=generator)]
        fold[indices] = (start + torch.arange(len(indices))) % folds
        start += len(indices)
    return fold


# --- Backbones ----------------------------------------------------------------------------------------------
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


def load_backbone(path, seed=0, side=0):
    """backbone.pt, random:FILE (its network with random weights), pixels, or a name of torchvision.models.

    SystemExit if the file is missing or damaged, or does not fill the network exactly.
    """
    if path == "pixels":
        return Backbone(nn.Identity(), 3 * (side or 32) ** 2, side or 32, MEAN, STD, "pixels", "pixels")
    if hasattr(torchvision.models, path):
        net = torchvision.models.get_model(path, weights="DEFAULT")
        dim, net.fc = net.fc.in_features, nn.Identity()
        return Backbone(net, dim, side or 224, MEAN, STD, "torchvision", path)
    file = path.removeprefix("random:")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        torch.manual_seed(seed)
        net, dim = resnet(state["arch"], **state["arch_args"])
        if path == file:
            net.load_state_dict(state["state_dict"])
    except FileNotFoundError:
        raise SystemExit(f"--backbone {path}: no such file; train one, for example with python simclr.py")
    except Exception as error:
        raise SystemExit(f"--backbone {path}: cannot be loaded ({str(error).splitlines()[0]})")
    net = net.to(memory_format=torch.channels_last)
    method = state["method"] if path == file else "random"
    return Backbone(net, dim, side or state["image_size"], state["mean"], state["std"], method, state["arch"])


def fingerprint(module):
    """A number that changes when any weight or buffer does."""
    tensors = [t.detach().cpu().contiguous().numpy() for t in module.state_dict().values()]
    return zlib.crc32(b"".join(t.tobytes() for t in tensors))


@torch.no_grad()
def extract_features(backbone, pictures, batch_size=256, workers=0, device="cpu", amp=None):
    """Features (n, D) float32 of Pictures, in their order; each process computes its share, once."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    backbone = backbone.to(device).eval()
    mine = torch.utils.data.Subset(pictures, range(rank, len(pictures), world))
    features = torch.zeros(len(pictures), backbone.dim, device=device)
    loader = DataLoader(mine, batch_size, num_workers=workers)
    for index, images in tqdm(loader, desc="features", disable=rank > 0, leave=False):
        with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
            rows = backbone(images.to(device))
        features[index.to(device)] = rows.float()
    if world > 1:
        dist.all_reduce(features)
    return features.cpu()


# --- Scores -------------------------------------------------------------------------------------------------
def accuracy(scores, labels):
    """top1, top5 and mean_per_class in %, and n, from scores (n, C); counted, then divided once."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    classes = labels.unique()
    per_class = [top[labels == c, 0].double().mean() for c in classes]
    return {
        "top1": 100 * top[:, 0].sum().item() / len(labels),
        "top5": 100 * top.any(dim=1).sum().item() / len(labels),
        "mean_per_class": 100 * (sum(per_class) / len(classes)).item(),
        "n": len(labels),
    }


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


def logreg(features, labels, classes, seed=0):
    """Softmax regression whose penalty, of 10^-5 .. 10, is the best in 5 folds of the labels, or above 2,000
    labels on a tenth of them. Returns weight (D, C), bias (C,) and what was chosen."""
    penalties = [10.0**i for i in range(1, -6, -1)]
    fold = stratified_folds(labels, 10 if len(labels) > 2000 else 5, seed)
    right = dict.fromkeys(penalties, 0)
    for held in range(1 if len(labels) > 2000 else 5):
        train, test, head = fold != held, fold == held, None
        for penalty in penalties:  # from strong to weak, each starting at the last
            head = fit_logreg(features[train], labels[train], penalty, classes, head, max_iter=50)
            scores = features[test].double() @ head[0] + head[1]
            right[penalty] += (scores.argmax(dim=1) == labels[test]).sum().item()
    best = max(penalties, key=right.get)
    return *fit_logreg(features, labels, best, classes), {"penalty": best}


def linear_probe(
    features_of, labels, classes, epochs=100, batch_size=256, weight_decay=0.0, seed=0, norm=False
):
    """SGD with Nesterov momentum and a cosine on one linear layer, for a grid of learning rates in one pass.

    features_of(epoch) -> (n, D). A tenth of the labels, stratified, picks the rate and is not trained on.
    norm: features pass BatchNorm without weights, which becomes part of the layer returned.
    Returns weight (D, C), bias (C,) of the last epoch and what was chosen.
    """
    held = stratified_folds(labels, 10, seed) == 0
    train = (~held).nonzero()[:, 0]
    rates = torch.tensor([10.0**i * j for i in range(-3, 2) for j in (1, 3)]) * batch_size / 256
    features = features_of(0)
    params = [torch.zeros(len(rates), features.shape[1], classes), torch.zeros(len(rates), 1, classes)]
    buffers = [torch.zeros_like(p) for p in params]
    batch_norm = nn.BatchNorm1d(features.shape[1], eps=1e-6, affine=False) if norm else None
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, len(train) // batch_size)
    for epoch in tqdm(range(epochs), desc="linear", leave=False):
        features = features_of(epoch)
        order = train[torch.randperm(len(train), generator=generator)]
        for i, batch in enumerate(order.chunk(steps)):
            lr = rates[:, None, None] * cosine_schedule(epoch * steps + i, epochs * steps, 0, 1.0)
            x, y = features[batch], F.one_hot(labels[batch], classes)
            x = batch_norm(x) if norm else x
            error = (torch.softmax(x @ params[0] + params[1], dim=2) - y) / len(batch)  # (rates, B, C)
            grads = [x.T @ error + weight_decay * params[0], error.sum(dim=1, keepdim=True)]
            for p, v, g in zip(params, buffers, grads, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
    weights, biases = params
    if norm:  # W (x - mean) / std + b is a linear layer again
        scale = (batch_norm.running_var + batch_norm.eps).rsqrt()
        weights = weights * scale[:, None]
        biases = biases - (batch_norm.running_mean @ weights)[:, None]
    right = ((features_of(0)[held] @ weights + biases).argmax(dim=2) == labels[held]).sum(dim=1)
    best = right.argmax().item()
    return weights[best], biases[best, 0], {"base_lr": rates[best].item() * 256 / batch_size}


# --- Fine-tuning --------------------------------------------------------------------------------------------
def layer_id(name, depth):
    """0 for the input layers, i for the i-th of `depth` blocks or stages, depth + 1 for what comes after.

    Names of timm's ViTs (blocks.0 is block 1) and of torchvision's ResNets (layer1 is stage 1).
    """
    if name.split(".")[0] in ("cls_token", "mask_token", "pos_embed", "patch_embed", "conv1", "bn1"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return int(name[5]) if name.startswith("layer") else depth + 1


def layer_groups(net, head, weight_decay, layer_decay):
    """Parameter groups with lr_scale = layer_decay^(depth + 1 - id); no decay on ndim <= 1 and tokens."""
    named = [*net.named_parameters(), *((f"head.{name}", p) for name, p in head.named_parameters())]
    depth = max([layer_id(name, 0) for name, _ in named if name.startswith(("blocks.", "layer"))], default=0)
    groups = {}
    for name, p in named:
        plain = p.ndim <= 1 or name in ("cls_token", "mask_token", "pos_embed")
        id = layer_id(name, depth)
        options = {
            "lr_scale": layer_decay ** (depth + 1 - id),
            "weight_decay": 0.0 if plain else weight_decay,
        }
        groups.setdefault((id, plain), options | {"params": []})["params"].append(p)
    return list(groups.values())


def finetune(backbone, train, labels, classes, epochs, args, device, amp=None, seed=0):
    """Train the whole network and a linear layer; by default as SimCLR does (App. B.5): SGD with Nesterov
    momentum, no warm-up, crops and flips, BatchNorm in train mode. Returns the layer, changes `backbone`."""
    torch.manual_seed(seed)
    head = nn.Linear(backbone.dim, classes)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(backbone, head).to(device)
    batch_size = min(args.batch_size, len(train))
    peak_lr = args.base_lr * batch_size / 256
    groups = layer_groups(backbone.net, head, args.weight_decay, args.layer_decay)
    if args.tuner == "adamw":
        optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.999))
    else:
        optimizer = torch.optim.SGD(groups, peak_lr, momentum=0.9, nesterov=True)
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=classes)] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=classes)] if args.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else None
    per_epoch = len(train) // batch_size
    total, warmup = epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    options = {"shuffle": True, "drop_last": True, "num_workers": args.workers, "generator": generator}
    loader = DataLoader(train, batch_size, persistent_workers=args.workers > 0, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    step = 0
    for _ in tqdm(range(epochs), desc="finetune", leave=False):
        model.train()
        for index, images in loader:
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * cosine_schedule(step, total, warmup, peak_lr)
            images, targets = images.to(device).float(), labels[index].to(device)
            if mix:
                images, targets = mix(images, targets)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
    return head.cpu()


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
        if count > len(train):
            raise SystemExit(f"--labels {count}: there are only {len(train)} labelled training images")
        if count < len(labels.unique()):
            raise SystemExit(f"{count} labels for {len(labels.unique())} classes: needs one of each at least")
        if not len(test):
            raise SystemExit(f"--data {args.data}: has no test images")
        yield (train[stratified_subset(labels[train], count, seed)] if count < len(train) else train), test


def fit_head(args, backbone, items, labels, classes, features, train, device, amp, seed):
    """(weight, bias, center, scale) of a linear layer on (features - center) / scale, and what was chosen."""
    center, scale = torch.zeros(backbone.dim), torch.ones(backbone.dim)
    if args.mode == "logreg":  # one penalty for all channels asks for channels of one size
        center, scale = features[train].mean(dim=0), features[train].std(dim=0) + 1e-6
        weight, bias, chosen = logreg((features[train] - center) / scale, labels[train], classes, seed)
        return (weight.float(), bias.float(), center, scale), chosen
    crop = random_crop(backbone.side, args.min_scale)
    if args.rand_augment and args.mode == "finetune":
        crop = v2.Compose([crop, v2.RandAugment()])
    pictures = Pictures([items[i] for i in train], backbone.side, crop)
    if args.mode == "finetune":
        epochs = args.epochs or (60 if len(train) <= 0.01 * len(items) else 30)
        head = finetune(backbone, pictures, labels[train], classes, epochs, args, device, amp, seed)
        layer = head.weight.detach().T.contiguous(), head.bias.detach()
        return (*layer, center, scale), {"base_lr": args.base_lr}

    def features_of(epoch):
        if not args.augment:
            return features[train]
        torch.manual_seed(hash((seed, epoch)) % 2**32)
        return extract_features(backbone, pictures, 256, args.workers, device, amp)

    options = {"batch_size": args.batch_size, "weight_decay": args.weight_decay, "seed": seed}
    options["norm"] = args.probe_norm
    weight, bias, chosen = linear_probe(features_of, labels[train], classes, args.epochs or 100, **options)
    return (weight, bias, center, scale), chosen


def evaluate(args: Args) -> dict:
    """Do --mode, print a table, write eval-MODE.json and head.pt beside the backbone; returns the results."""
    may_be_zero = "labels side epochs weight_decay workers seed warmup_epochs label_smoothing mixup cutmix"
    check_flags(args, may_be_zero.split(), label_fraction=1, min_scale=1, layer_decay=1, label_smoothing=1)
    rank, world, device, amp = start_processes(args.device, args.amp)
    if args.watch:
        return follow(args)
    if args.mode == "predict":
        return predict(args, device, amp)
    if args.mode == "finetune" and world > 1:
        raise SystemExit("--mode finetune: runs in one process, start it without torchrun")
    backbone = load_backbone(args.backbone, args.seed, args.side)
    items, labels, classes, is_test = read_labels(args.data, args.labels_csv)
    results, features, folder = [], None, output_folder(args.backbone)
    for seed in range(args.seed, args.seed + args.seeds):
        if args.backbone.startswith("random:") or args.mode == "finetune":
            backbone, features = load_backbone(args.backbone, seed, args.side), None
        before = fingerprint(backbone)
        if features is None and args.mode != "finetune":
            pictures = Pictures(items, backbone.side)
            features = extract_features(backbone, pictures, args.batch_size, args.workers, device, amp)
        if args.mode == "features":
            break
        for train, test in splits(labels, is_test, args, seed):
            if args.mode == "knn":
                for k in args.k:
                    scores = knn(features[train], labels[train], features[test], k, len(classes))
                    results.append({"choice": f"k {k}"} | accuracy(scores, labels[test]))
                continue
            data = items, labels, len(classes), features, train
            head, chosen = fit_head(args, backbone, *data, device, amp, seed)
            rows = features[test] if features is not None else None
            if args.mode == "finetune":
                pictures = Pictures([items[i] for i in test], backbone.side)
                rows = extract_features(backbone, pictures, args.batch_size, args.workers, device, amp)
            weight, bias, center, scale = head
            scores = (rows - center) / scale @ weight + bias
            results.append({"choice": f"{chosen}"} | accuracy(scores, labels[test]))
        if args.mode != "finetune" and fingerprint(backbone) != before:
            raise RuntimeError("the frozen backbone has changed")
    if rank:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    if args.mode == "features":
        state = {"features": features, "labels": labels, "items": [str(item) for item in items]}
        torch.save(state, folder / "features.pt")
        print(f"{folder}/features.pt: {tuple(features.shape)}")
        return {"n": len(features)}
    if args.mode != "knn":
        if is_test is None and args.mode != "finetune":  # the folds have measured; now learn from every label
            data = items, labels, len(classes), features, torch.arange(len(labels))
            head, _ = fit_head(args, backbone, *data, device, amp, args.seed)
        names = ("weight", "bias", "center", "scale")
        state = dict(zip(names, head, strict=True)) | {"classes": classes, "side": backbone.side}
        weights = {name: tensor.cpu() for name, tensor in backbone.net.state_dict().items()}
        tuned = weights if args.mode == "finetune" else None
        torch.save(state | {"fingerprint": before, "finetuned": tuned}, folder / f"head{suffix(args)}.pt")
    return report(args, results, folder, len(train), backbone)


def follow(args):
    """k-NN of the run folder --watch whenever its backbone.pt is replaced, as eval/knn_top1, until Ctrl-C."""
    path, seen = Path(args.watch) / "backbone.pt", None
    print(f"watching {path}; Ctrl-C ends it")
    board = SummaryWriter(args.watch, filename_suffix=".knn")
    try:
        while True:
            if path.exists() and path.stat().st_mtime_ns != seen:
                seen = path.stat().st_mtime_ns
                lines = (Path(args.watch) / "metrics.jsonl").read_text().splitlines()
                result = evaluate(replace(args, watch="", mode="knn", backbone=str(path)))
                board.add_scalar("eval/knn_top1", result["top1"], json.loads(lines[-1])["step"])
                board.flush()
            time.sleep(1)
    except KeyboardInterrupt:
        return {}


def output_folder(backbone):
    """Beside a file, else runs/NAME."""
    file = Path(backbone.removeprefix("random:"))
    return file.parent if file.is_file() else Path("runs") / backbone


def suffix(args):
    """Keeps the results of random:FILE apart from those of FILE, which lie in the same folder."""
    return "-random" if args.backbone.startswith("random:") else ""


def report(args, results, folder, labels, backbone):
    """Print the table and write eval-MODE.json: mean over repetitions and folds, and sample deviation."""
    table = {}
    for result in results:
        table.setdefault(result["choice"] if args.mode == "knn" else args.mode, []).append(result)
    count = f"{labels} labels, {results[0]['n']} test images, {len(results)} results"
    print(f"\n{args.backbone} on {args.data}: {count}")
    print(f"{'':12}{'top-1':>14}{'top-5':>8}{'per class':>11}")
    out = {"mode": args.mode, "backbone": args.backbone, "data": args.data}
    out["feature"] = f"{backbone.method} {backbone.arch}"
    out |= {"labels": labels, "seeds": args.seeds, "results": results}
    for name, rows in table.items():
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("top1", "top5", "mean_per_class")}
        deviation = torch.tensor([row["top1"] for row in rows]).std().item() if len(rows) > 1 else 0.0
        top = f"{mean['top1']:7.1f} +- {deviation:3.1f}{mean['top5']:8.1f}"
        print(f"{name:12}{top}{mean['mean_per_class']:11.1f}")
        if "top1" not in out:  # the first k stands for k-NN: the best would be a choice on the test images
            out |= mean | {"top1_std": deviation, "n": rows[0]["n"]}
    (folder / f"eval-{args.mode}{suffix(args)}.json").write_text(json.dumps(out, indent=1))
    return out


def predict(args, device, amp):
    """Write predictions.csv (path, class, probability) for every image below --data with a head.pt."""
    path = Path(args.head or output_folder(args.backbone) / f"head{suffix(args)}.pt")
    try:
        head = torch.load(path, map_location="cpu", weights_only=True)
        weight, classes = head["weight"], head["classes"]
    except Exception:
        raise SystemExit(f"--head {path}: missing or damaged; --mode logreg, linear or finetune writes it")
    backbone = load_backbone(args.backbone, args.seed, head["side"])
    if fingerprint(backbone) != head["fingerprint"]:
        raise SystemExit(f"--head {path}: was trained on another backbone than {args.backbone}")
    if head["finetuned"]:
        backbone.net.load_state_dict(head["finetuned"])
    items = find_images(args.data)
    if not items:
        raise SystemExit(f"--data {args.data}: no images found")
    pictures = Pictures(items, head["side"])
    features = extract_features(backbone, pictures, args.batch_size, args.workers, device, amp)
    probability = torch.softmax((features - head["center"]) / head["scale"] @ weight + head["bias"], dim=1)
    with open(path.parent / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "probability"])
        for item, row in zip(items, probability, strict=True):
            writer.writerow([os.path.relpath(item, args.data), classes[row.argmax()], f"{row.max():.4f}"])
    print(f"{path.parent}/predictions.csv: {len(items)} images")
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
    image = Image.open(path)
    shrink = max(1, min(*image.size, math.sqrt(0.75 * min_scale * math.prod(image.size))) / image_size)
    image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257)  # 16 bits, which convert() would clip
    return image.convert("RGB")


def random_crop(size, min_scale):
    """In the worker: random resized crop and flip of a uint8 image (C, H, W) -> (C, size, size) (App. A)."""
    crop = v2.RandomResizedCrop(size, (min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
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
        least, most = 0 if name in may_be_zero else 1e-12, at_most.get(name, math.inf)
        if type(value) in (int, float) and not least <= value <= most:
            allowed = ("above 0" if least else "0 or more") + (f", at most {most}" if name in at_most else "")
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must be {allowed}")


def start_processes(device, amp):
    """From torchrun's environment: rank, number of processes, device, autocast type (None: float32)."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in here if here[kind]) if device == "auto" else device
    if not here[kind]:
        raise SystemExit(f"--device {kind}: PyTorch finds none on this machine; use --device auto")
    if kind == "cuda":
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
    evaluate(tyro.cli(Args, description=__doc__))
