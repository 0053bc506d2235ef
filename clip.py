# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""CLIP: learn features of images and of text by finding, in a batch, which caption belongs to which image.

Paper: Radford et al. 2021, arXiv 2103.00020; what it leaves open is as in OpenAI's model.py and in open_clip.
B images and their captions go through two encoders to features I, T of length 1. With a learnt scale s each
image has to find its caption among those of all processes, and each caption its image (Fig. 3):
  L = 1/2 [ mean_i -log softmax_j(s I_i.T_j)[i] + mean_i -log softmax_j(s T_i.I_j)[i] ]
The other pairs keep the features apart. Equal captions count as negatives of each other, so that C different
ones leave a loss of about ln(B / C): clip/floor. A class can then be named in words: zero-shot accuracy.

Demo:   python clip.py
Pairs:  python clip.py --data pairs.csv --image-size 128 --arch vit_small --batch-size 1024 \
            --micro-batch-size 128 --epochs 60 --workers 8
Paper:  torchrun --nnodes 32 --nproc-per-node 8 clip.py --data pairs.tsv --image-size 224 \
            --arch vit_base --patch-size 32 --embed-dim 512 --text-width 512 --text-depth 12 \
            --context-length 77 --bpe-path bpe_simple_vocab_16e6.txt.gz --epochs 32 --batch-size 32768 \
            --lr 5e-4 --warmup-epochs 0.16 --workers 12
Use:    python clip.py --classify photo.jpg --prompts "a fox" "a deer" "an owl" --checkpoint RUN/checkpoint.pt

--data: a .csv or .tsv with a header, or a .jsonl, with the path of an image (relative to the file) and its
caption or list of captions; a folder with photo.txt beside photo.jpg, a caption in each line; class folders,
whose names fill --templates; a torchvision data set; the demo.
Differs from the official code: torchvision's ResNets with a linear projection for its modified ones; bytes as
tokens if no vocabulary is given; of the repair of broken text only quotes and Unicode's NFC; no special
tokens within a text; encoders below vit_base; crops of aspect 3/4 to 4/3, no decay on class_embedding,
positions and scale, and a warm-up that does not start at 0, as in open_clip; crops resized as uint8 tensors
(within 2 of 255 of Pillow's), large JPEGs decoded at reduced size; the end of a text that is too long is cut,
and told; an epoch drops its last incomplete batch. Several processes give the loss and gradient of one, but
for ResNets' BatchNorm: each process's and chunk's own.
"""

import contextlib
import copy
import csv
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import time
import unicodedata
import warnings
from collections import OrderedDict
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
RESNETS = ("resnet18", "resnet34", "resnet50")
Arch = Literal[
    "vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "resnet18", "resnet34", "resnet50"
]
TEMPLATES = ("a photo of a {}.", "itap of a {}.", "a bad photo of the {}.", "a photo of the large {}.")
TEMPLATES += ("a photo of the small {}.", "art of the {}.", "a {} in a video game.")


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    val_data: str = ""  # pairs to measure at the end, as --data; default: its val/ or test/, or some of it
    image_size: int = 32  # side of a view in pixels (paper: 224)
    min_scale: float = 0.9  # smallest area of a crop as a share of the image (paper: unsaid)
    flip: bool = False  # mirror half of the images; not where captions say left or right (paper: off)
    templates: tuple[str, ...] = TEMPLATES  # texts for the name {} of a class (paper: 80 of its own)
    bpe_path: str = ""  # the official bpe_simple_vocab_16e6.txt.gz; default: bytes are the tokens
    context_length: int = 64  # tokens of a text with its start and end; the rest is cut (paper: 77)
    workers: int = 2  # processes that read images, for each training process
    arch: Arch = "vit_nano"  # encoder of images
    patch_size: int = 8  # side of a patch in pixels (paper: 32, 16 or 14)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3, stride 1, no max-pool; 10 x the work
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
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on cuda, off elsewhere
    compile: bool = False  # torch.compile the model
    run_dir: str = ""  # default: runs/METHOD, and a hash of the flags that differ from the defaults
    restart: bool = False  # begin anew in a run folder that is in use
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps
    classify: tuple[str, ...] = ()  # images to name with --prompts, by --checkpoint; nothing is trained
    prompts: tuple[str, ...] = ()  # texts to choose from
    checkpoint: str = ""  # checkpoint.pt of a run, or a ViT's weights of open_clip (LAION: --no-quick-gelu)


# --- Augmentation -------------------------------------------------------------------------------------------
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clean(text):
    """As the official tokenizer: HTML's escapes undone, one space between words, lower case."""
    text = html.unescape(html.unescape(text.encode("utf-8", "replace").decode()))  # half an emoji: a "?"
    text = unicodedata.normalize("NFC", text).translate(str.maketrans("ʼ‘’‚‛“”„‟", 5 * "'" + 4 * '"'))
    return " ".join(text.split()).lower()


class ByteTokenizer:
    """Text -> ids without a vocabulary: bytes of UTF-8 are 1 .. 256, start 257, end 258. Uses clean."""

    vocab_size = 259

    def encode(self, text):
        return [1 + byte for byte in clean(text).encode()]


class BPETokenizer:
    """Text -> ids of the official vocabulary file: 256 bytes, the same at the end of a word, 48,894 merges,
    start, end. Uses clean, words_of."""

    def __init__(self, path):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 48894 + 1]]
        except Exception as error:  # of the disk, gzip, UTF-8
            raise SystemExit(f"--bpe-path {path}: {error}")
        if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
            raise SystemExit(f"--bpe-path {path}: is not CLIP's bpe_simple_vocab_16e6.txt.gz")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        points = [*printable, *range(256, 256 + len(others))]
        self.symbols = {byte: chr(point) for byte, point in zip(printable + others, points, strict=True)}
        names = [*self.symbols.values()]
        names += [name + "</w>" for name in names] + ["".join(pair) for pair in merges]
        self.ids = {name: i for i, name in enumerate(names)}
        self.rank, self.known = {pair: i for i, pair in enumerate(merges)}, {}
        self.vocab_size = len(names) + 2

    def word(self, word):
        parts = [self.symbols[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in zip(parts, parts[1:], strict=False)]
            if (best := min(ranks)) == math.inf:
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def encode(self, text):
        words = words_of(clean(text))
        self.known |= {word: self.word(word) for word in words if word not in self.known}
        return [i for word in words for i in self.known[word]]


def words_of(text):
    """'s 't 're 've 'm 'll 'd | letters | one numeral | other characters: by Unicode's categories, for which
    Python's \\w is no substitute."""
    kinds = [" " if c.isspace() else unicodedata.category(c)[0] for c in text]
    kinds, words, at = "".join(k if k in " LN" else "x" for k in kinds), [], 0
    while at < len(text):
        match = re.compile("'(s|t|re|ve|m|ll|d)").match(text, at) or re.compile("L+|N|x+| +").match(kinds, at)
        words += [text[at : match.end()]]
        at = match.end()
    return [word for word in words if not word.isspace()]


def tokenize(texts, context_length=64, tokenizer=None):
    """Texts -> ids (n, context_length): start, tokens, end (the largest id), zeros. What is too long is cut
    before its end. tokenizer: bytes by default. Uses ByteTokenizer, clean."""
    tokenizer = tokenizer or ByteTokenizer()
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    rows = [[start, *tokenizer.encode(text)[: context_length - 2], end] for text in texts]
    return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


IMAGE_KEYS = "image image_path filepath file_path file_name filename path file".split()
CAPTION_KEYS = "caption captions title text description".split()


def read_index(path):
    """Rows of a .csv or .tsv with a header (the separator is found out) or a .jsonl: [(image, captions)].
    SystemExit if it cannot be read or lacks a column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.lower().endswith(".jsonl"):
                rows = [json.loads(line) for line in file if line.strip()]
                names = list(dict.fromkeys(name for row in rows for name in row.keys()))
            else:
                header = file.readline()
                separator = max("\t,;|", key=header.count)
                reader = csv.DictReader(io.StringIO(header + file.read(), newline=""), delimiter=separator)
                rows, names = list(reader), reader.fieldnames or []
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read: {str(error)[:200]}")
    known = {name.strip().lower(): name for name in names}
    image = next((known[key] for key in IMAGE_KEYS if key in known), None)
    caption = next((known[key] for key in CAPTION_KEYS if key in known), None)
    if not image or not caption:
        wanted = ", ".join(CAPTION_KEYS if image else IMAGE_KEYS)
        raise SystemExit(f"{path}: needs one of {wanted}; it has {', '.join(known)[:150] or 'nothing'}")
    pairs = []
    for row in rows:
        texts = row.get(caption)
        texts = texts if isinstance(texts, list) else [texts]
        texts = [str(text) for text in texts if isinstance(text, (str, int, float)) and str(text).strip()]
        pairs.append((os.path.join(os.path.dirname(path), str(row.get(image))), texts))
    return pairs


# --- Model --------------------------------------------------------------------------------------------------
TOWERS = {"vit_nano": (128, 6), "vit_tiny": (192, 12), "vit_small": (384, 12)}  # width, depth
TOWERS |= {"vit_base": (768, 12), "vit_large": (1024, 24)}


def resnet(arch, stem):
    """torchvision's ResNet without its classifier, images (B, 3, H, W) -> h (B, D); and D."""
    net = getattr(torchvision.models, arch)()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


class CLIPBlock(nn.Module):
    """Pre-norm block of tokens (B, N, D), heads of 64; causal: no token sees those after it."""

    def __init__(self, dim, quick_gelu, causal):
        super().__init__()
        self.attn, self.causal = nn.MultiheadAttention(dim, dim // 64, batch_first=True), causal
        self.ln_1, self.ln_2, self.quick_gelu = nn.LayerNorm(dim), nn.LayerNorm(dim), quick_gelu
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        y, hidden = self.ln_1(x), None
        if self.causal:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=hidden)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y))


def transformer(dim, depth, quick_gelu, causal=False):
    blocks = nn.Sequential(*(CLIPBlock(dim, quick_gelu, causal) for _ in range(depth)))
    return nn.Sequential(OrderedDict(resblocks=blocks))


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


# names of the image tower: in timm and backbone.pt
TIMM = {"class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1.": "patch_embed.proj."}
TIMM |= {"ln_pre.": "norm_pre.", "ln_post.": "norm.", "transformer.resblocks.": "blocks."}
TIMM |= {".attn.in_proj_": ".attn.qkv.", ".attn.out_proj.": ".attn.proj.", ".ln_1.": ".norm1."}
TIMM |= {".ln_2.": ".norm2.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}


def timm_name(name):
    for ours, theirs in TIMM.items():
        name = name.replace(ours, theirs)
    return name


def tower_from_timm(tower, state, prefix, *_):
    """Before loading: the names and shapes of a backbone.pt become the tower's."""
    for name, own in tower.named_parameters():
        if (there := prefix + timm_name(name)) in state and there != prefix + name:
            tensor = state.pop(there)
            state[prefix + name] = tensor.reshape(own.shape) if tensor.numel() == own.numel() else tensor


class ImageTower(nn.Module):
    """ViT in the official names: images (B, 3, H, W) -> image features (B, E), and the normed [CLS] before
    projection (B, D). Uses transformer, CLIPBlock, resize_positions, tower_from_timm, timm_name, TIMM."""

    def __init__(self, dim, depth, image_size, patch_size, embed_dim, quick_gelu):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, patch_size, patch_size, bias=False)
        shapes = (dim,), (1 + (image_size // patch_size) ** 2, dim), (dim, embed_dim)
        tensors = (nn.Parameter(dim**-0.5 * torch.randn(shape)) for shape in shapes)
        self.class_embedding, self.positional_embedding, self.proj = tensors
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = transformer(dim, depth, quick_gelu)
        self._register_load_state_dict_pre_hook(tower_from_timm, with_module=True)  # public in torch 2.5

    def forward(self, images):
        x = self.conv1(images)
        positions = resize_positions(self.positional_embedding[None], *x.shape[2:])
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x.flatten(2).mT], dim=1) + positions
        h = self.ln_post(self.transformer(self.ln_pre(x))[:, 0])
        return h @ self.proj, h

    def exported(self):
        """Weights in timm's names, without the projection, and what else their use takes."""
        new = {timm_name(name): tensor for name, tensor in self.state_dict().items() if name != "proj"}
        new |= {"cls_token": new["cls_token"][None, None], "pos_embed": new["pos_embed"][None]}
        block, patch_size = self.transformer.resblocks[0], self.conv1.kernel_size[0]
        options = {"heads": block.attn.num_heads, "quick_gelu": block.quick_gelu, "eps": 1e-5}
        return new, options | {"patch_size": patch_size}


class ResNetTower(nn.Module):
    """torchvision's ResNet and a linear projection: images (B, 3, H, W) -> image features (B, E), h (B, D).
    Uses resnet."""

    def __init__(self, arch, stem, embed_dim):
        super().__init__()
        (self.backbone, dim), self.stem = resnet(arch, stem), stem
        self.proj = nn.Parameter(dim**-0.5 * torch.randn(dim, embed_dim))

    def forward(self, images):
        h = self.backbone(images)
        return h @ self.proj, h

    def exported(self):
        return self.backbone.state_dict(), {"stem": self.stem}


class CLIP(nn.Module):
    """Image tower `visual` and causal transformer of text in the official names; initialised as those: the
    blocks of the ViT have PyTorch's initialisation. arch: of TOWERS or RESNETS, or (width, depth) of a ViT.
    text: width, depth, number of tokens, context length. Uses ImageTower, ResNetTower, resnet, RESNETS,
    TOWERS, transformer, CLIPBlock, resize_positions, tower_from_timm, timm_name, TIMM."""

    def __init__(self, arch, image_size, patch_size, embed_dim, text, quick_gelu=True, stem="imagenet"):
        super().__init__()
        text_width, text_depth, vocab_size, context_length = text
        if arch in RESNETS:
            self.visual = ResNetTower(arch, stem, embed_dim)
        else:
            dim, depth = TOWERS.get(arch, arch)
            self.visual = ImageTower(dim, depth, image_size, patch_size, embed_dim, quick_gelu)
        self.transformer = transformer(text_width, text_depth, quick_gelu, causal=True)
        self.token_embedding, self.ln_final = nn.Embedding(vocab_size, text_width), nn.LayerNorm(text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.text_projection = nn.Parameter(text_width**-0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            out_std = (2 * text_width * text_depth) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=text_width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * text_width) ** -0.5)
            nn.init.normal_(block.mlp["c_proj"].weight, std=out_std)

    def encode_image(self, images):
        return self.visual(images)[0]

    def encode_text(self, ids):
        """Ids (B, N) -> text features (B, E): of the end of the text, the largest id."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(len(x), device=x.device), ids.argmax(dim=1)] @ self.text_projection

    def forward(self, images, ids):
        """Image and text features (B, E), of any length, and h (B, D), of the image before projection."""
        image_features, h = self.visual(images)
        return image_features, self.encode_text(ids), h


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


def clip_logits(image_features, text_features, logit_scale):
    """logit_scale x cosines, (2, B, B x processes): of the images here with all texts, of the texts here with
    all images; column (B,) of each row's pair. Uses gather."""
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    images, texts = (F.normalize(x.to(dtype), dim=1) for x in (image_features, text_features))
    logits = logit_scale * torch.stack([images @ gather(texts).T, texts @ gather(images).T])
    rank = dist.get_rank() if dist.is_initialized() else 0
    return logits, torch.arange(len(images), device=images.device) + rank * len(images)


def clip_loss(image_features, text_features, logit_scale):
    """Symmetric cross-entropy (Fig. 3) of pairs of features (B, E) of any length; logit_scale is the factor,
    not its logarithm. The mean over processes is that of one with the whole batch, and so is its gradient,
    of the scale too. Uses clip_logits, gather."""
    logits, own = clip_logits(image_features, text_features, logit_scale)
    return (F.cross_entropy(logits[0], own) + F.cross_entropy(logits[1], own)) / 2


def backward_in_chunks(embed, chunks, loss_of, scaler, params):
    """Gradients of loss_of(z of all chunks) with the activations of one chunk in memory (arXiv 2101.06983).
    embed(chunk) -> z, h runs twice: without gradient for the loss, then with the gradient of its z. Without
    DDP, it averages over processes once, at the end. Returns loss, z, h."""
    with torch.no_grad():
        parts = [embed(chunk) for chunk in chunks]
    z, h = (torch.cat(rows) for rows in zip(*parts, strict=True))
    loss = loss_of(z.requires_grad_())
    scaler.scale(loss).backward()
    for chunk, grad in zip(chunks, z.grad.split([len(part[0]) for part in parts]), strict=True):
        embed(chunk)[0].backward(grad)
    for p in params if dist.is_initialized() else ():
        dist.all_reduce(p.grad.div_(dist.get_world_size()))
    return loss.detach(), z.detach(), h


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


@torch.no_grad()
def clip_metrics(image_features, text_features, ids, logit_scale):
    """Of all processes: contrastive_accuracy, share of rows whose pair is STRICTLY above all others, and gap,
    how far cross-entropy is below chance, that of equal logits, all without other pairs with the row's
    caption, by ids (B, N); floor: the loss that those leave. Uses clip_logits, gather."""
    logits, own = clip_logits(image_features, text_features, logit_scale)
    weights = torch.randint(2**62, ids.shape[1:], generator=torch.Generator().manual_seed(0))
    keys = (ids * weights.to(ids.device)).sum(dim=1)  # one number for each caption
    again = (keys[:, None] == gather(keys)).scatter(1, own[:, None], False)
    rows, own = logits.masked_fill(again, -torch.inf).flatten(0, 1), own.repeat(2)[:, None]
    right = rows.gather(1, own)[:, 0] > rows.scatter(1, own, -torch.inf).amax(dim=1)
    chance = rows.isfinite().sum(dim=1).log()
    gap = chance - F.cross_entropy(rows, own[:, 0], reduction="none")
    floor = (1 + again.sum(dim=1)).log().repeat(2)
    values = torch.stack([right.float(), gap, chance, floor]).mean(dim=1)
    names = "contrastive_accuracy", "gap", "chance", "floor"
    return dict(zip(names, gather(values[None]).mean(dim=0).tolist(), strict=True))


def collapse_alarm(state, step, armed_after, problems):
    """1.0 from the third log point in a row with a problem, {words: holds}, printed once, to the third
    without; counts after step armed_after. state: {} at first, kept in the checkpoint."""
    if step > armed_after:
        last = state["last"] = [*state.get("last", ()), any(problems.values())][-3:]
        if last == [True] * 3 and not state.get("rings"):
            tqdm.write(f"COLLAPSE at step {step}: " + " | ".join(w for w in problems if problems[w]))
        state["rings"] = last == [True] * 3 or (state.get("rings", False) and last != [False] * 3)
    return float(state.get("rings", False))


@torch.no_grad()
def embed_texts(model, texts, tokenizer=None):
    """Texts -> features (n, E) of length 1. Uses tokenize, ByteTokenizer, clean."""
    ids = tokenize(texts, len(model.positional_embedding), tokenizer).to(model.logit_scale.device)
    return torch.cat([F.normalize(model.encode_text(rows).float(), dim=1) for rows in ids.split(256)])


def zero_shot_classifier(model, classes, templates, tokenizer=None):
    """(E, C): for each class the mean of the text features of length 1 of all templates, of length 1 again
    (Sec. 3.1.4). Uses embed_texts, tokenize, ByteTokenizer, clean."""
    texts = [template.replace("{}", name) for name in classes for template in templates]
    features = embed_texts(model, texts, tokenizer).unflatten(0, (len(classes), -1))
    return F.normalize(features.mean(dim=1), dim=1).T


def recall(similarity):
    """Of similarity (n, n) of images and texts: share of rows, and of columns, in %, whose pair, on the
    diagonal, is among the 1, 5, 10 best; ties count as lost."""
    result, own = {}, similarity.diagonal()
    for name, rows in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        rank = (rows >= own[:, None]).sum(dim=1)
        for k in (1, 5, 10):
            result[f"{name}_r{k}"] = 100 * (rank <= k).float().mean().item()
    return result


def caption_page(images, texts):
    """uint8 page (3, H, W) of images (n, 3, H, W) in [0, 1], beside each its list of texts."""
    side, texts = max(96, images.shape[-1]), [[" ".join(x.split())[:100] for x in lines] for lines in texts]
    width = side + 8 + 6 * max(len(line) for lines in texts for line in lines)
    page = Image.new("RGB", (width, (side + 4) * len(images)), "white")
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        picture = v2.functional.to_pil_image(image.clamp(0, 1).float().cpu()).resize((side, side))
        page.paste(picture, (0, i * (side + 4)))
        text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
        ImageDraw.Draw(page).multiline_text((side + 8, i * (side + 4)), text, fill="black")
    return v2.functional.pil_to_tensor(page)


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
class Pairs(Images):
    """Images and captions of --data: item epoch x len + index is a view, the ids of one of its captions, and
    index. captions: a list for each image; classes and labels where captions are made of class names."""

    def __init__(self, args, data, view, tokenizer, rank=0, test=False):
        self.tokenizer, self.context, self.templates = tokenizer, args.context_length, args.templates
        self.classes, self.labels, self.reading = [], [], (args.image_size, args.min_scale)
        if os.path.isfile(data) or data.lower().endswith((".csv", ".tsv", ".jsonl")):
            self.views, self.seed, rows = (view,), args.seed, read_index(data)
            missing = dict.fromkeys(path for path, texts in rows if texts and not os.path.isfile(path))
            kept = [row for row in rows if row[1] and row[0] not in missing]
            self.items, self.captions = [path for path, _ in kept], [texts for _, texts in kept]
            blank = sum(not texts for _, texts in rows)
            lost = f"{len(rows) - len(kept) - blank} without image{f' ({[*missing][0]})' if missing else ''}"
            self.found = f"{len(kept)} pairs in {data}; left out: {blank} without caption, {lost}"
        else:
            super().__init__(data, (view,), args.seed, *self.reading, rank)
            read = self.of_demo if data == "demo" else self.of_folder if os.path.isdir(data) else self.of_set
            self.captions = read(data, test)
        texts = {text for texts in self.captions for text in texts}
        longer = [text for text in texts if len(text.encode("utf-8", "replace")) > self.context - 2]
        if cut := sum(len(tokenizer.encode(text)) > self.context - 2 for text in longer):
            self.found += f"; {cut} captions cut to --context-length {self.context}"
        if self.items and not test and (len(texts) < 2 or len(self.classes) == 1):
            alike = f"all captions are alike ({[*texts][0][:50]})"
            raise SystemExit(f"--data {data}: {alike}: nothing to learn")

    def of_demo(self, data, test):
        if test:
            self.items, self.found = [demo_image(10**6 + index) for index in range(2048)], "2048 other images"
        ways = itertools.product(("big", "small"), ("left", "right"), ("by day", "at dusk"))
        self.templates = [f"a {size} {{}} on the {side} {time}" for size, side, time in ways]
        self.classes, self.labels = [*WORLD], [label for _, label, _ in self.items]
        return [[caption] for _, _, caption in self.items]

    def of_folder(self, data, test):
        files = [Path(item).with_suffix(".txt") for item in self.items]
        texts = [file.read_text("utf-8", "replace") if file.is_file() else "" for file in files]
        texts = [[line for line in text.splitlines() if line.strip()] for text in texts]
        if any(texts):
            self.found += f"; left out: {sum(not lines for lines in texts)} without caption"
            self.items = [item for item, lines in zip(self.items, texts, strict=True) if lines]
            return [lines for lines in texts if lines]
        root = os.path.join(data, "train" if os.path.isdir(os.path.join(data, "train")) else "")
        names = [os.path.relpath(item, root).split(os.sep) for item in self.items]
        if min(map(len, names), default=2) < 2:
            raise SystemExit(f"{data}: no captions; give class folders, .txt files, a .csv or .jsonl")
        classes = sorted({name[0] for name in names})
        return self.of_classes(classes, [classes.index(name[0]) for name in names])

    def of_set(self, data, test):
        for option in ({"train": False}, {"split": "test"}, {"split": "val"}) if test else ():
            with contextlib.suppress(TypeError, ValueError):
                self.items = type(self.items)("data", download=True, **option)
                break
        keys = ("targets", "labels", "_labels", "_samples")
        labels = next((getattr(self.items, key) for key in keys if hasattr(self.items, key)), None)
        classes = getattr(self.items, "classes", None)
        if labels is None or classes is None:
            raise SystemExit(f"{data}: torchvision gives no labels or names of classes; give a .csv")
        classes = [name if isinstance(name, str) else name[0] for name in classes]
        return self.of_classes(classes, [int(x[1] if isinstance(x, tuple) else x) for x in labels])

    def of_classes(self, classes, labels):
        self.found += f"; captions of {len(classes)} class names"
        self.classes, self.labels = [name.replace("_", " ") for name in classes], labels
        texts = [[text.replace("{}", name) for text in self.templates] for name in self.classes]
        return [texts[label] for label in labels]

    def sample(self, index, pixels):
        texts = self.captions[index]
        text = texts[int(torch.randint(len(texts), ()))]
        return self.views[0](pixels), tokenize([text], self.context, self.tokenizer)[0], index


def measured_pairs(args, data, tokenizer, rank):
    """Pairs to measure, and their order: of --val-data, val/ or test/ beside train/, the demo's or a test
    split; else 1,000 of those to learn from."""
    here = [os.path.join(args.data, name) for name in ("train", "val", "valid", "validation", "test")]
    beside = [path for path in here if os.path.isdir(path)] if os.path.isdir(here[0]) else here[:1]
    where = args.val_data or (beside[1:] or [args.data])[0]
    if where == args.data and os.path.exists(where):
        test, count = copy.copy(data), min(len(data.items), 1000)
        test.found, test.views = f"{count} of the training pairs", (photo_view(args.image_size),)
    else:
        test = Pairs(args, where, photo_view(args.image_size), tokenizer, rank, test=True)
        count = len(test.items)
        test.found += f", to measure ({where})"
    if not count:
        raise SystemExit(f"{where}: nothing to measure: {test.found}")
    if test.classes and set(test.classes) <= set(data.classes):  # some may have no image there
        test.labels = [data.classes.index(test.classes[label]) for label in test.labels]
        test.classes = data.classes
    order = torch.randperm(len(test.items), generator=torch.Generator().manual_seed(0))
    return test, order[:count].tolist()


def photo_view(size):
    """The official test transform: shorter side to `size`, centre crop; uint8 (C, H, W)."""
    return v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])


@torch.no_grad()
def zero_shot(model, pairs, order, args, device, amp):
    """Of the pairs in `order`: zero-shot accuracy where there are classes, recall where captions are unique
    (of 5,000 at most), in %; and a page of images with the texts that fit best."""
    features, indices, shown = [], [], {}
    model.eval()
    for pixels, _, index in DataLoader(pairs, 256, sampler=order, num_workers=args.workers):
        images = v2.functional.normalize(pixels.to(device) / 255, MEAN, STD)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            features.append(F.normalize(model.encode_image(images).float(), dim=1))
        indices += index.tolist()
        shown = shown or dict(zip(indices, pixels, strict=True))
    places = {index: place for place, index in enumerate(indices)}  # once each, where one replaced a bad one
    features, results = torch.cat(features)[[*places.values()]], {"n": len(places)}
    if pairs.classes:
        weights = zero_shot_classifier(model, pairs.classes, pairs.templates, pairs.tokenizer)
        labels = torch.tensor([pairs.labels[index] for index in places], device=device)
        right = (features @ weights).argmax(dim=1) == labels
        results["zero_shot_top1"] = 100 * right.float().mean().item()
    captions = [pairs.captions[index][0] for index in [*places][:5000]]
    texts = list(dict.fromkeys(captions))
    similarity = features[:5000] @ embed_texts(model, texts, pairs.tokenizer).T
    if 1 < len(texts) == len(captions):
        results |= recall(similarity)
    best = (model.logit_scale.exp() * similarity[:8]).softmax(dim=1).topk(min(3, len(texts)))
    lines = [[f"own: {caption}"] for caption in captions[:8]]
    for own, shares, found in zip(lines, best.values.tolist(), best.indices.tolist(), strict=True):
        own += [f"{share:4.0%} {texts[place]}" for share, place in zip(shares, found, strict=True)]
    return results, caption_page(torch.stack([shown[index] for index in [*places][:8]]) / 255, lines)


def sizes_of(weights):
    """Arguments of CLIP, from the shapes of official weights of a ViT."""
    dim, _, patch, _ = weights["visual.conv1.weight"].shape
    vocabulary, width = weights["token_embedding.weight"].shape
    firsts = [name for name in weights if name.endswith(".ln_1.weight")]
    depth, text_depth = (sum(name.startswith(x) for name in firsts) for x in ("visual.", "transformer."))
    if dim in (1280, 1408, 1664):
        raise ValueError(f"a ViT of {dim} has 16 heads, not one for each 64; only eval_linear.py reads it")
    side = patch * math.isqrt(len(weights["visual.positional_embedding"]) - 1)
    sizes = {"arch": (dim, depth), "image_size": side, "patch_size": patch}
    sizes["text"] = width, text_depth, vocabulary, len(weights["positional_embedding"])
    return sizes | {"embed_dim": weights["text_projection"].shape[1]}


def load_clip(path, quick_gelu):
    """Model and side of its images, of a run's checkpoint.pt or open_clip's weights of a ViT."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        weights, sizes = file.get("model"), file.get("sizes")
        if file.get("method") != "clip":
            extra = ("input_resolution", "context_length", "vocab_size", "attn_mask")
            weights = {k.removeprefix("module."): v for k, v in file.get("state_dict", file).items()}
            weights = {name: tensor.float() for name, tensor in weights.items() if name not in extra}
            sizes = sizes_of(weights) | {"quick_gelu": quick_gelu}
        model = CLIP(**sizes)
        model.load_state_dict(weights)
    except KeyError as error:
        raise SystemExit(f"--checkpoint {path}: not of a run, not of a ViT of open_clip: it lacks {error}")
    except Exception as error:  # of the disk, of another file, of other names and shapes
        raise SystemExit(f"--checkpoint {path}: {' '.join(str(error).split())[:300]}")
    return model.eval(), sizes["image_size"]


@torch.no_grad()
def classify(args):
    """Print the probability of each of --prompts for each image of --classify; returns {image: [share]}."""
    if not args.checkpoint or len(args.prompts) < 2:
        raise SystemExit("--classify: give --checkpoint and 2 or more --prompts")
    model, side = load_clip(args.checkpoint, args.quick_gelu)
    device, context = start_processes(args.device, "off")[2], len(model.positional_embedding)
    tokenizer = BPETokenizer(args.bpe_path) if args.bpe_path else ByteTokenizer()
    if (tokens := model.token_embedding.num_embeddings) != tokenizer.vocab_size:
        remedy = "leave out" if args.bpe_path else "give"
        raise SystemExit(f"--checkpoint has {tokens} tokens: {remedy} --bpe-path")
    model = model.to(device)
    if any(len(tokenizer.encode(text)) > context - 2 for text in args.prompts):
        print(f"the model reads {context} tokens: longer prompts are cut")
    texts, results = embed_texts(model, args.prompts, tokenizer), {}
    for path in args.classify:
        try:
            image = v2.functional.pil_to_tensor(read_image(path, side, 1.0)).to(device)
        except Exception as error:  # whatever a decoder raises
            raise SystemExit(f"--classify {path}: {error}")
        image = v2.functional.normalize(photo_view(side)(image)[None] / 255, MEAN, STD)
        logits = model.logit_scale.exp() * F.normalize(model.encode_image(image), dim=1) @ texts.T
        results[path] = logits.softmax(dim=1)[0].tolist()
        for share, prompt in sorted(zip(results[path], args.prompts, strict=True), reverse=True):
            print(f"{path}  {share:6.1%}  {prompt}")
    return results


def train(args: Args) -> dict:
    """Train in the run folder, from its checkpoint if it has one; returns the metrics of the last step and of
    the evaluation. With --classify: see classify."""
    if args.classify:
        return classify(args)
    if args.prompts or args.checkpoint:
        raise SystemExit("--prompts and --checkpoint: give --classify too, images to name")
    zero = "micro_batch_size workers weight_decay warmup_epochs seed"
    check_flags(args, zero.split(), min_scale=1, warmup_epochs=args.epochs)
    if args.arch not in RESNETS and args.image_size % args.patch_size:
        raise SystemExit(f"--image-size {args.image_size}: give a multiple of --patch-size {args.patch_size}")
    if args.text_width % 64 or args.context_length < 3:
        raise SystemExit("--text-width: give a multiple of 64; --context-length: 3 or more")
    if not args.templates or not all("{}" in text for text in args.templates):
        raise SystemExit(f"--templates {' '.join(args.templates)}: each needs {{}}, the place of the name")
    rank, world, device, amp = start_processes(args.device, args.amp)
    tokenizer = BPETokenizer(args.bpe_path) if args.bpe_path else ByteTokenizer()
    scale, bicubic = (args.min_scale, 1.0), v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(args.image_size, scale, interpolation=bicubic)
    view = v2.Compose([crop, v2.RandomHorizontalFlip()]) if args.flip else crop
    data = Pairs(args, args.data, view, tokenizer, rank)
    if args.batch_size > len(data.items) or args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size}: give a multiple of {world}, at most {data.found}")
    test, order = measured_pairs(args, data, tokenizer, rank)
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    torch.manual_seed(args.seed)
    text = args.text_width, args.text_depth, tokenizer.vocab_size, args.context_length
    sizes = {"arch": args.arch, "image_size": args.image_size, "patch_size": args.patch_size, "text": text}
    sizes |= {"embed_dim": args.embed_dim, "quick_gelu": args.quick_gelu, "stem": args.stem}
    model = CLIP(**sizes).to(device, memory_format=torch.channels_last)  # twice as fast for ResNets on CPUs
    encoder = "visual.backbone." if args.arch in RESNETS else "visual."
    if args.init:
        load_encoder(model, encoder, args.init, rank)
        given = torch.load(args.init, map_location="cpu", weights_only=True)["arch_args"]
        quick = given.get("quick_gelu", given.get("act_layer") == "quick_gelu")
        if encoder == "visual." and quick != args.quick_gelu:
            raise SystemExit(f"--init {args.init}: of the other --quick-gelu")
    run, checkpoint = open_run(args, "clip", rank)
    trained, named = [*model.parameters()], [*model.named_parameters()]
    free = [p for name, p in named if p.ndim < 2 or "positional" in name]
    decayed = [p for name, p in named if p.ndim > 1 and "positional" not in name]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": free, "weight_decay": 0.0}]
    betas, eps = ((0.9, 0.999), 1e-8) if args.arch in RESNETS else ((0.9, 0.98), 1e-6)
    optimizer = torch.optim.AdamW(groups, args.lr, betas=betas, eps=eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
    micro = args.micro_batch_size if args.micro_batch_size < args.batch_size // world else 0
    net = nn.parallel.DistributedDataParallel(model) if world > 1 and not micro else model
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. {test.found}. Run folder {run}, step {step} of {total}")
        print(f"{args.arch}, {amp or torch.float32}, {world} x {device}, effective learning rate {args.lr:g}")

    def embed(chunk):  # images (b, C, H, W), ids (b, N) -> z (b, 2, E), h (b, D)
        images, ids = chunk
        with torch.autocast(device.type, amp, enabled=amp is not None):
            image_features, text_features, h = net(images, ids)
        return torch.stack([image_features, text_features], dim=1), h

    def loss_of(z):
        return clip_loss(z[:, 0], z[:, 1], model.logit_scale.exp())

    bar = tqdm(total=total, initial=step, disable=rank > 0)
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for pixels, ids, indices in loader:
            waited += time.perf_counter() - asked
            rising = (step + 1) / max(1, warmup)  # open_clip's warm-up: not from 0
            lr = args.lr * rising if rising <= 1 else cosine_schedule(step, total, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if step == 0 and rank == 0:
                page = caption_page(pixels[:8] / 255, [data.captions[i] for i in indices[:8].tolist()])
                v2.functional.to_pil_image(page).save(run / "views.png")
                board.add_image("views", page, step)
            images = v2.functional.normalize(pixels.to(device, non_blocking=True) / 255, MEAN, STD)
            images, longest = images.contiguous(memory_format=torch.channels_last), int(ids.argmax(1).max())
            ids = ids.to(device, non_blocking=True)
            read = ids[:, : longest + 1]  # nothing reads what follows the end
            optimizer.zero_grad()
            if micro:
                chunks = list(zip(images.split(micro), read.split(micro), strict=True))
                loss, z, h = backward_in_chunks(embed, chunks, loss_of, scaler, trained)
            else:
                z, h = embed((images, read))
                loss = loss_of(z)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            step += 1
            logs = step == 1 or step % args.log_every == 0 or step == total
            saves = step % args.checkpoint_every == 0 or step == total
            if logs or saves:  # only here does a step wait for the device
                grad_norm = torch.stack([p.grad.norm() for p in trained]).norm()
                if not torch.isfinite(loss if scaler.get_scale() > 1 else loss + grad_norm):
                    why = f"loss {loss:g}, gradient {grad_norm:g}; lower --lr"
                    raise SystemExit(name_images(run, data, args.batch_size, logged, step, why))
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale  # float16 overflowed
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # Sec. 2.5: at most 100
            bar.update()
            if logs:
                scale, feature = model.logit_scale.detach().exp(), collapse_metrics(h, center=True)
                ours = clip_metrics(z[:, 0].detach(), z[:, 1].detach(), ids, scale)
                ours["image_spread"] = collapse_metrics(z[:, 0])["spread"]
                ours["text_spread"] = collapse_metrics(z[:, 1])["spread"]
                accuracy, chance = ours["contrastive_accuracy"], ours.pop("chance")
                by_chance = accuracy < 2 / math.exp(chance) and ours["gap"] < 0.01 * chance
                problems = {
                    "all images have one feature; lower --lr": ours["image_spread"] < 0.01,
                    "all texts have one feature; lower --lr": ours["text_spread"] < 0.01,
                    "pairs are found by chance; do captions fit (views.png)? else change --lr": by_chance,
                }
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": gather(loss.detach()[None]).mean().item(), "train/lr": lr}
                metrics |= {"train/grad_norm": grad_norm.item(), "clip/logit_scale": scale.item()}
                metrics |= {f"clip/{k}": v for k, v in ours.items()}
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
                    words = f"loss {metrics['train/loss']:.3f} (floor {ours['floor']:.2f})"
                    bar.set_postfix_str(f"{words} accuracy {accuracy:.3f}")
            if saves and rank == 0:
                weights, arch_args = model.visual.exported()
                export_backbone(run, "clip", args, h.shape[1], weights, **arch_args)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "clip", "step": step, "metrics": metrics, "alarm": alarm, "sizes": sizes}
                save_checkpoint(run / "checkpoint.pt", **state, logged=os.path.getsize(run / "metrics.jsonl"))
            asked = time.perf_counter()
        if rank == 0:
            results, page = zero_shot(model, test, order, args, device, amp)
            v2.functional.to_pil_image(page).save(run / "captions.png")
            board.add_image("captions", page, step)
            for name, value in results.items():
                board.add_scalar(f"eval/{name}", value, step)
            results["pairs"] = test.found
            (run / "eval-zero-shot.json").write_text(json.dumps(results, indent=1))
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
        print(", ".join(f"{k} {v if isinstance(v, (int, str)) else round(v, 1)}" for k, v in results.items()))
    if world > 1:
        dist.barrier()  # in torch 2.4 gloo may wait for ever in the next line
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
