# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "tyro", "tensorboard", "tqdm"]
# ///
r"""CLIP: learn features of images and of text by finding, in a batch, which caption belongs to which image.

Paper: Radford et al. 2021, arXiv 2103.00020.
N images and a caption of each go through two encoders to features I, T of length 1. With a learnt scale s
each image has to find its caption among those of all processes, and each caption its image (Fig. 3):
  L = 1/2 [ mean_i -log softmax_j(s I_i.T_j)[i] + mean_i -log softmax_j(s T_i.I_j)[i] ]
The other pairs keep the features apart. Where m pairs of a batch have one caption, a loss of ln m is left of
them: clip/floor. Later any text is a class: --classify.

Demo:   python clip.py
Photos: python clip.py --data pairs.csv --image-size 128 --arch vit_small --batch-size 1024 \
            --micro-batch-size 128 --epochs 60 --workers 8
Paper:  torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
            clip.py --data pairs/ --image-size 224 --arch vit_base --patch-size 32 --embed-dim 512 \
            --text-width 512 --text-depth 12 --context-length 77 --tokenizer bpe --epochs 32 \
            --batch-size 32768 --lr 5e-4 --warmup-epochs 0.16 --workers 12
Use:    python clip.py --classify a.jpg b.jpg --prompts "a fox" "a deer" --run-dir runs/clip

--data: a .csv or .tsv, or a folder with captions.csv, its header path|image|filepath (relative to the file)
and caption|text|title, a row a caption; Arrow files of Hugging Face with columns image and text, a caption or
a list, for 10^7 pairs and more; the demo. Each epoch draws one caption of an image.
Differs from the paper, or where it is silent from open_clip: ViTs alone, below vit_base too; bytes as tokens
by default; warm-up from 0; crops of aspect 3/4 to 4/3, resized as uint8 tensors; no decay of what has one
dimension: biases, gains, [CLS]. The end of a long text is cut: clip/cut is the share that fill it. An epoch
drops its incomplete batch. Processes and micro-batches give loss and gradient of one batch. Published weights
and other towers: open_clip.
"""

import contextlib
import csv
import hashlib
import html
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
from dataclasses import asdict, dataclass, replace
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
Arch = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large"]


@dataclass
class Args:
    data: str = "demo"  # demo, a csv of paths and captions, a folder with captions.csv, or Arrow files
    val_data: str = ""  # pairs whose recall is measured at the end, as --data; demo: others of its images
    image_size: int = 32  # side of a view in pixels (paper: 224)
    min_scale: float = 0.9  # smallest area of a crop as a share of the image (paper: unsaid)
    flip: bool = False  # mirror half of the images; not where captions say left or right (paper: off)
    tokenizer: Literal["bytes", "bpe"] = "bytes"  # bpe: CLIP's own, of open_clip (paper: bpe)
    context_length: int = 64  # tokens of a text with its start and end; the rest is cut (paper: 77)
    workers: int = 2  # processes that read images, for each training process

    arch: Arch = "vit_nano"  # encoder of images (paper: vit_base, vit_large)
    patch_size: int = 8  # side of a patch in pixels (paper: 32, 16 or 14)
    embed_dim: int = 128  # width of the features that are compared (paper: 512 to 1024)
    text_width: int = 128  # of the encoder of text, a multiple of 64 (paper: 512)
    text_depth: int = 4  # its blocks (paper: 12)
    quick_gelu: bool = True  # x sigmoid(1.702 x) for GELU, in both encoders (paper: on)

    epochs: int = 15  # passes over the data (paper: 32)
    batch_size: int = 256  # images per step, of all processes together (paper: 32768)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    lr: float = 1e-3  # learning rate (paper: 5e-4)
    weight_decay: float = 0.2  # strength of weight decay (paper: 0.2, not on biases and gains)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 2000 steps)

    init: str = ""  # backbone.pt that the encoder starts from, of convert.py or an earlier run
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere
    compile: bool = False  # torch.compile the model
    run_dir: str = ""  # default: runs/METHOD, and a hash of the flags that differ from the defaults
    log_every: int = 10  # steps
    save_minutes: float = 10.0  # between checkpoints, written at a log step, 0: at each; always at the end

    classify: tuple[str, ...] = ()  # photos to name with --prompts, by the run in --run-dir
    prompts: tuple[str, ...] = ()  # texts to choose from


# --- Augmentation -------------------------------------------------------------------------------------------
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NAMES = ("house", "tree", "car", "boat", "cat", "mushroom", "cup", "key", "bird", "flower")  # in the demo


def tokenize(texts, context_length=64, tokenizer="bytes"):
    """Texts -> ids (n, context_length): start, tokens, end (the largest id), zeros; what is too long is cut
    before its end. Bytes of UTF-8, lower case, are 1 to 256, start 257, end 258."""
    if tokenizer == "bpe":
        try:
            import open_clip  # which has CLIP's own
        except ImportError as error:
            sys.exit(f"--tokenizer bpe: needs `pip install open_clip_torch` ({error})")
        return open_clip.tokenize(texts, context_length)

    ids = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        tokens = [1 + byte for byte in text.encode(errors="replace")[: context_length - 2]]
        row[: len(tokens) + 2] = torch.tensor([257, *tokens, 258])
    return ids


def demo_caption(number):
    """What demo_image(number) shows, by its random numbers. Uses NAMES."""
    rng = random.Random(number)
    label, scale, light = rng.randrange(10), rng.uniform(0.35, 0.9), rng.uniform(0.35, 1.0)
    thing = Image.new("1", (round(48 * scale),) * 2).rotate(rng.uniform(-25, 25), expand=True)
    center = rng.randint(*sorted((0, 48 - thing.width))) + thing.width / 2
    size, side = "big" if scale > 0.625 else "small", "left" if center < 24 else "right"
    return f"a {size} {NAMES[label]} on the {side} {'by day' if light > 0.675 else 'at dusk'}"


def read_table(file):
    """{path of an image: its captions, a line each}, in bytes, of a .csv or .tsv with a header."""
    captions, header, folder = {}, [], os.path.dirname(file)
    try:
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            dialect = csv.Sniffer().sniff(opened.readline(), delimiters=",;\t|")
            opened.seek(0)
            rows = csv.reader(opened, delimiter=dialect.delimiter, skipinitialspace=True)
            header = [name.strip().lower() for name in next(rows)]
            image = next(header.index(name) for name in ("path", "image", "filepath") if name in header)
            caption = next(header.index(name) for name in ("caption", "text", "title") if name in header)

            for row in rows:
                words = row[caption].split() if len(row) > max(image, caption) else ()
                if words and "\t" in row[caption] and "\n" in row[caption]:
                    raise csv.Error(f"a quote is not closed in a caption that ends in line {rows.line_num}")
                if words:
                    path = os.fsencode(os.path.join(folder, row[image]))
                    line = " ".join(words).encode(errors="replace") + b"\n"
                    captions[path] = captions.get(path, b"") + line
    except (OSError, csv.Error, StopIteration) as error:
        words = str(error) or f"its header is {', '.join(header)[:99]}"
        sys.exit(f"--data {file}: {words}; needs columns path|image|filepath and caption|text|title")
    if not captions:
        sys.exit(f"--data {file}: has no row with a caption")
    return captions


class Pairs(Dataset):
    """Images and their captions: item epoch x n + index is a view, the ids of one of its captions, and index.
    `data` is as --data; the demo without to_train is 1,024 other images. Uses read_table, demo_caption,
    NAMES, tokenize and Plumbing."""

    def __init__(self, args, data, to_train):
        self.args, self.rows = args, None
        size, bicubic = args.image_size, v2.InterpolationMode.BICUBIC
        view = v2.Compose([v2.Resize(size, bicubic), v2.CenterCrop(size)])  # the official one
        if to_train:
            crop = v2.RandomResizedCrop(size, (args.min_scale, 1.0), interpolation=bicubic)
            view = v2.Compose([crop, v2.RandomHorizontalFlip(0.5 * args.flip)])
        shortest = size / (0.75 * args.min_scale) ** 0.5  # even a crop of 3 : 4 is not enlarged
        is_table = str(data).lower().endswith((".csv", ".tsv"))
        file = data if is_table else os.path.join(data, "captions.csv")
        of_table = is_table or os.path.isfile(file)
        self.images = Images(replace(args, data="demo" if of_table else data), (view,), shortest)
        items = self.images.items

        if hasattr(items, "column_names"):  # of Arrow; open_data took only its images
            import datasets

            rows = datasets.load_from_disk(data)
            rows = rows["train"] if isinstance(rows, dict) else rows
            if "text" not in rows.column_names:
                sys.exit(f"--data {data}: needs a column text, has {', '.join(rows.column_names)}")
            self.rows = rows.select_columns("text")
            return

        if data == "demo":
            numbers = range(len(items)) if to_train else range(10**6, 10**6 + 1024)
            self.images.items = [demo_image(number) for number in numbers]
            captions = [demo_caption(number).encode() for number in numbers]
        else:  # the table's images take the place of those that open_data gave
            table = read_table(file)
            self.images.items, captions = np.array([*table]), table.values()
        self.ends = np.cumsum([0, *map(len, captions)])
        self.lines = b"".join(captions)  # one object, which workers share

    def texts(self, index):
        """All captions of an image."""
        if self.rows is None:
            return self.lines[self.ends[index] : self.ends[index + 1]].decode().splitlines()
        found = self.rows[index]["text"]
        return [found] if isinstance(found, str) else found or [""]

    def __getitem__(self, key):
        view, index = self.images[key]
        texts = self.texts(index)
        text = texts[torch.randint(len(texts), ())]
        return view, tokenize([text], self.args.context_length, self.args.tokenizer)[0], index


# --- Model --------------------------------------------------------------------------------------------------
TOWERS = {"vit_nano": (128, 6), "vit_tiny": (192, 12), "vit_small": (384, 12)}  # width, depth; heads of 64
TOWERS |= {"vit_base": (768, 12), "vit_large": (1024, 24)}
# names of the image tower: official, and in timm and backbone.pt
TIMM = {"class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1.": "patch_embed.proj."}
TIMM |= {"ln_pre.": "norm_pre.", "ln_post.": "norm.", "transformer.resblocks.": "blocks."}
TIMM |= {".attn.in_proj_": ".attn.qkv.", ".attn.out_proj.": ".attn.proj.", ".ln_1.": ".norm1."}
TIMM |= {".ln_2.": ".norm2.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}


class CLIPBlock(nn.Module):
    """Pre-norm block of tokens (B, N, D), heads of 64; causal: no token sees those after it."""

    def __init__(self, dim, quick_gelu, causal):
        super().__init__()
        self.quick_gelu, self.causal = quick_gelu, causal
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, dim // 64, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        y, hidden = self.ln_1(x), None
        if self.causal:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=hidden)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y))


def transformer(dim, depth, quick_gelu, causal=False):
    """Blocks under the official names. Uses CLIPBlock."""
    blocks = nn.Sequential(*(CLIPBlock(dim, quick_gelu, causal) for _ in range(depth)))
    return nn.Sequential(OrderedDict(resblocks=blocks))


class ImageTower(nn.Module):
    """ViT, images (B, 3, S, S) -> image features (B, E), and the normed [CLS] before projection (B, D). Its
    blocks are initialised as PyTorch does. Uses transformer, CLIPBlock."""

    def __init__(self, dim, depth, image_size, patch_size, embed_dim, quick_gelu):
        super().__init__()
        tokens = 1 + (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, dim, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(dim**-0.5 * torch.randn(dim))
        self.positional_embedding = nn.Parameter(dim**-0.5 * torch.randn(tokens, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = transformer(dim, depth, quick_gelu)
        self.proj = nn.Parameter(dim**-0.5 * torch.randn(dim, embed_dim))

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT  # (B, N, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        h = self.ln_post(self.transformer(self.ln_pre(x))[:, 0])
        return h @ self.proj, h


class CLIP(nn.Module):
    """Image tower `visual` and causal transformer of text, in the official names and initialisation.
    arch: of TOWERS, or (width, depth); text: width, depth, number of tokens, context length. Uses TOWERS,
    ImageTower, transformer, CLIPBlock."""

    def __init__(self, arch, image_size, patch_size, embed_dim, text, quick_gelu=True):
        super().__init__()
        dim, depth = TOWERS.get(arch, arch)
        self.visual = ImageTower(dim, depth, image_size, patch_size, embed_dim, quick_gelu)
        width, depth, vocabulary, context_length = text
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = transformer(width, depth, quick_gelu, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        out_std = (2 * width * depth) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp["c_proj"].weight, std=out_std)

    def encode_image(self, images):
        return self.visual(images)[0]

    def encode_text(self, ids):
        """Ids (B, N) -> text features (B, E): of the end of the text, the largest id."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(len(x), device=x.device), ids.argmax(dim=1)] @ self.text_projection

    def forward(self, images, ids):
        """Image and text features (B, E), of any length; h (B, D); the scale, for each row (B,)."""
        image_features, h = self.visual(images)
        scale = self.logit_scale.exp().expand(len(h))  # from here, for DDP to know of its gradient
        return image_features, self.encode_text(ids), h, scale


def clip_of(args):
    """The model that the flags describe; the tokenizer's largest id is the end of a text."""
    end = int(tokenize([""], args.context_length, args.tokenizer).max())
    text = args.text_width, args.text_depth, end + 1, args.context_length
    return CLIP(args.arch, args.image_size, args.patch_size, args.embed_dim, text, args.quick_gelu)


def in_timm_names(tower):
    """The image tower but its projection {timm's name: tensor}, in the parameters' memory. Uses TIMM."""
    named = {}
    for name, tensor in tower.state_dict().items():
        for ours, theirs in TIMM.items():
            name = name.replace(ours, theirs)
        named[name] = tensor
    del named["proj"]
    return named | {"cls_token": named["cls_token"][None, None], "pos_embed": named["pos_embed"][None]}


# --- Loss ---------------------------------------------------------------------------------------------------
def clip_logits(image_features, text_features, logit_scale):
    """logit_scale x cosines (2, B, B x processes): of the images here with all texts, of the texts here with
    all images; and the column (B,) of each row's pair. Uses gather."""
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    images, texts = (F.normalize(x.to(dtype), dim=1) for x in (image_features, text_features))
    logits = logit_scale * torch.stack([images @ gather(texts).T, texts @ gather(images).T])
    rank = dist.get_rank() if dist.is_initialized() else 0
    return logits, torch.arange(len(images), device=images.device) + rank * len(images)


def clip_loss(image_features, text_features, logit_scale):
    """Symmetric cross-entropy (Fig. 3) of pairs of features (B, E) of any length; logit_scale is the factor,
    not its logarithm. The mean over processes is that of one with the whole batch, and so is its gradient,
    of the scale too. Takes 0.3 GiB at B = 4,096 in one process, 1.3 at 8,192. Uses clip_logits, gather."""
    logits, own = clip_logits(image_features, text_features, logit_scale)
    return (F.cross_entropy(logits[0], own) + F.cross_entropy(logits[1], own)) / 2


# --- Monitor ------------------------------------------------------------------------------------------------
@torch.no_grad()
def pair_statistics(z, scale, ids, index):
    """Means (5,) over the pairs z (B, 2, E) here, both ways: accuracy, is a pair strictly above all that do
    not match; gap, how far their cross-entropy is below chance, that of equal logits, without twins; chance;
    floor, the loss that is left if matches are found; share of texts as long as the context. A match shares
    the row's caption or image, a twin is one that is not the pair. ids, index are of the whole batch.
    Uses clip_logits, gather."""
    logits, own = clip_logits(z[:, 0], z[:, 1], scale)
    captions = torch.unique(ids, dim=0, return_inverse=True)[1]
    matches = (captions == captions[own, None]) | (index == index[own, None])
    twins = matches.scatter(1, own[:, None], False)

    rows = logits.masked_fill(twins, -torch.inf).flatten(0, 1)
    own = own.repeat(2)
    rivals = rows.scatter(1, own[:, None], -torch.inf).amax(dim=1)
    accuracy = (rows.gather(1, own[:, None])[:, 0] > rivals).float().mean()  # a tie is no success
    chance = rows.isfinite().sum(dim=1).log().mean()
    floor = matches.sum(dim=1).log().mean()
    cut = (ids[:, -1] > 0).float().mean()
    return torch.stack([accuracy, chance - F.cross_entropy(rows, own), chance, floor, cut])


def monitor(statistics, z, h, scale):
    """Metrics of pair_statistics, z (N, 2, E) and h (N, D) of the whole batch; and what is wrong, {words: the
    metric that shows it}. Uses collapse_metrics."""
    accuracy, gap, chance, floor, cut = statistics.tolist()
    metrics = {"clip/contrastive_accuracy": accuracy, "clip/floor": floor, "clip/gap": gap}
    metrics |= {"clip/logit_scale": scale.item(), "clip/cut": cut}
    problems, remedy = {}, "do captions fit (views.txt)? else lower --lr"
    for name, features in (("image", z[:, 0]), ("text", z[:, 1])):
        spread = collapse_metrics(features)["spread"]
        metrics[f"clip/{name}_spread"] = spread
        if spread < 0.01:
            problems[f"all {name}s have one feature; {remedy}"] = f"clip/{name}_spread"
    for name, value in collapse_metrics(h, center=True).items():
        metrics[f"monitor/{name}"] = value

    if accuracy < 2 / math.exp(chance) and gap < 0.01 * chance:
        problems[f"pairs are found by chance; {remedy}"] = "clip/gap"
    return metrics, problems


@torch.no_grad()
def zero_shot_classifier(model, classes, templates=("{}",), tokenizer="bytes"):
    """(E, C): for each class the mean, over templates, of text features of length 1, at length 1 again
    (Sec. 3.1.4). Uses tokenize."""
    texts = [template.replace("{}", name) for name in classes for template in templates]
    ids = tokenize(texts, len(model.positional_embedding), tokenizer).to(model.logit_scale.device)
    features = torch.cat([F.normalize(model.encode_text(rows), dim=1) for rows in ids.split(256)])
    means = features.unflatten(0, (len(classes), len(templates))).mean(dim=1)
    return F.normalize(means, dim=1).T


def recall(similarity, matches):
    """Of similarity and matches (images, texts), True where a text is one of the image's: share in % of the
    images that have one of their texts among the k best, and of the texts with one of their images. Ties with
    a wrong one count as lost."""
    wrong = {}  # how many are as good as the best answer
    for name, x, right in [
        ("image_to_text", similarity, matches),
        ("text_to_image", similarity.T, matches.T),
    ]:
        best = x.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        wrong[name] = (x.masked_fill(right, -torch.inf) >= best).sum(dim=1)
    shares = {f"clip/{name}_r{k}": wrong[name] < k for k in (1, 5, 10) for name in wrong}
    return {name: 100 * found.float().mean().item() for name, found in shares.items()}


@torch.no_grad()
def retrieval(model, pairs):
    """recall of 5,000 images at most and all their texts. Uses recall, zero_shot_classifier, tokenize, MEAN,
    STD, seeded, ignore_signals."""
    order = torch.randperm(len(pairs.images.items), generator=seeded(2, 0))[:5000].tolist()
    features = {}  # by index: what stood in for a broken image comes once
    workers = {"num_workers": pairs.args.workers, "worker_init_fn": ignore_signals}
    for pixels, _, index in DataLoader(pairs, 256, sampler=order, **workers):
        images = v2.functional.normalize(pixels.to(model.logit_scale.device) / 255, MEAN, STD)
        features |= zip(index.tolist(), F.normalize(model.encode_image(images), dim=1), strict=True)

    own = [pairs.texts(index) for index in features]
    texts = dict.fromkeys(text for texts in own for text in texts)
    columns = {text: column for column, text in enumerate(texts)}
    answers = torch.zeros(len(own), len(columns), dtype=torch.bool)
    for row, texts in zip(answers, own, strict=True):
        row[[columns[text] for text in texts]] = True
    images = torch.stack([*features.values()])
    similarity = images @ zero_shot_classifier(model, columns, tokenizer=pairs.args.tokenizer)
    return recall(similarity, answers.to(images.device))


@torch.no_grad()
def classify(args):
    """Print the probability of each of --prompts for each photo, by the run in --run-dir and its flags;
    returns {photo: probabilities}."""
    if not args.classify or len(args.prompts) < 2:
        sys.exit("--classify: give photos, and 2 or more --prompts")
    folder, found = Path(args.run_dir or "runs/clip"), {}
    try:
        held = json.loads((folder / "args.json").read_text())
        flags = Args(**{name: held[name] for name in asdict(args) if name in held})
        model, size = clip_of(flags), flags.image_size
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        classifier = zero_shot_classifier(model, args.prompts, tokenizer=flags.tokenizer)

        for file in args.classify:
            image = ImageOps.fit(read_image(file, size), (size, size), Image.BICUBIC)
            pixels = v2.functional.pil_to_tensor(image)[None] / 255
            feature = F.normalize(model.encode_image(v2.functional.normalize(pixels, MEAN, STD)), dim=1)
            logits = model.logit_scale.exp() * feature @ classifier
            found[file] = logits.softmax(dim=1)[0].tolist()
            for share, prompt in sorted(zip(found[file], args.prompts, strict=True), reverse=True):
                print(f"{file}  {share:6.1%}  {prompt}")
    except Exception as error:  # no such run, no photo
        words = " ".join(str(error).split())[:200]
        sys.exit(f"--classify: needs photos, and in {folder} a run of clip.py: {words}")
    return found


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Train in the run folder, from its checkpoint if it has one; returns the last metrics."""
    if args.classify or args.prompts:
        return classify(args)
    check_flags(args, may_be_zero="", at_most={"min_scale": 1})
    if args.image_size % args.patch_size:
        sys.exit(f"--image-size {args.image_size}: give a multiple of --patch-size {args.patch_size}")
    if args.text_width % 64 or args.context_length < 3:
        sys.exit("--text-width: give a multiple of 64; --context-length: 3 or more")
    rank, world, device, amp = start_processes(args.device, args.amp)
    pairs = Pairs(args, args.data, to_train=True)
    measured = None
    if args.val_data or args.data == "demo":
        measured = Pairs(args, args.val_data or "demo", to_train=False)
    images = len(pairs.images.items)
    micro = images_per_pass(args, images, world)
    per_epoch = images // args.batch_size
    total = args.epochs * per_epoch
    warmup = min(total, round(args.warmup_epochs * per_epoch))

    torch.manual_seed(args.seed)
    model = clip_of(args).to(device)
    dim, depth = TOWERS[args.arch]
    shape = {"img_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0}
    shape |= {"embed_dim": dim, "depth": depth, "num_heads": dim // 64, "pre_norm": True, "norm_eps": 1e-5}
    shape["act_layer"] = "quick_gelu" if args.quick_gelu else "gelu"
    facts = {"builder": "timm.VisionTransformer", "arch_args": shape, "feature_dim": dim}  # for backbone.pt
    encoder = in_timm_names(model.visual)
    if args.init:
        load_encoder(encoder, args.init, shape)

    trained = [*model.parameters()]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = open_run(args, "clip", parts, images, amp)  # loads its checkpoint into the parts
    step = run.step
    alarm_from = max(warmup, min(500, total // 5))
    if args.compile:
        model.compile()
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    keys = pairs.images.batches(args.batch_size, step, args.epochs, rank, world)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(pairs, batch_sampler=keys, pin_memory=device.type == "cuda", **workers)
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (MEAN, STD))
    if rank == 0:
        print(f"{args.arch}, {amp}, {world} x {device}, effective learning rate {args.lr:g}, {total} steps")

    def embed(images, ids):  # chunk -> z (b, 2, E), h (b, D), scale (b,)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            image_features, text_features, h, scale = net(images, ids)
        z = torch.stack([image_features, text_features], dim=1)
        return z.to(torch.promote_types(z.dtype, torch.float32)), h, scale

    with guarded(run, total) as signals:  # torchrun: none; adds run.bar, save_at
        for crops, ids, index in loader:  # all epochs that are left
            lr = cosine_schedule(step, total, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            if step == 0 and rank == 0:
                torchvision.utils.save_image(crops[:32] / 255, run.folder / "views.png")
                captions = [" | ".join(pairs.texts(i)) for i in index[:32].tolist()]
                (run.folder / "views.txt").write_text("\n".join(captions), "utf-8")

            longest = int(ids.argmax(dim=1).max())  # nothing reads what follows the end
            pixels = (crops.to(device, non_blocking=True) / 255 - mean) / std
            texts = ids[:, : longest + 1].to(device, non_blocking=True)
            chunks = [*zip(pixels.split(micro), texts.split(micro), strict=True)]

            two_passes = len(chunks) > 1  # all z without a graph, later each chunk again (arXiv 2101.06983)
            with torch.set_grad_enabled(not two_passes):
                embedded = [embed(*chunk) for chunk in chunks]
            z, h, scale = (torch.cat(rows) for rows in zip(*embedded, strict=True))
            z.requires_grad_()  # in two passes a leaf, with its own gradient
            scale.requires_grad_()
            loss = clip_loss(z[:, 0], z[:, 1], scale[0])  # of own rows against all; DDP takes the mean

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if two_passes:  # so far z and scale alone have a gradient
                grads = zip(z.grad.split(micro), scale.grad.split(micro), strict=True)
                for i, (chunk, grad) in enumerate(zip(chunks, grads, strict=True)):
                    net.require_backward_grad_sync = i == len(chunks) - 1  # DDP's mean, once a step
                    again, _, scale_again = embed(*chunk)
                    torch.autograd.backward([again, scale_again], grad)

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
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # Sec. 2.5: at most 100

            if at_log:
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                ids, index = gather(ids.to(device)), gather(index.to(device))
                z, scale = z.detach(), scale[0].detach()
                statistics = gather(pair_statistics(z, scale, ids, index)[None]).mean(dim=0)
                found, problems = monitor(statistics, gather(z), gather(h.detach()), scale)

                if step == total and rank == 0 and measured:
                    began = time.monotonic()
                    try:
                        metrics |= retrieval(model, measured)
                    except (OSError, RuntimeError) as error:  # photos or memory; must not cost the run
                        tqdm.write(f"--val-data {args.val_data}: {str(error).splitlines()[-1]}")
                    run.since += time.monotonic() - began  # no part of the training's pace
                log_metrics(run, step, metrics | found, problems, alarm_from)
            if at_log and time.monotonic() >= run.save_at:
                save_run(run, step, encoder, **facts)
            if signals:
                break

        save_run(run, step, encoder, **facts)
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
