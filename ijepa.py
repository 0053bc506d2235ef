# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""I-JEPA: learn features by predicting those of hidden blocks of an image from the rest of it.

Paper: Assran et al. 2023, arXiv 2301.08243; where paper and official PyTorch code differ, the code.
Four target blocks are cut out of a large context block. The context encoder f sees what is left of it. The
target encoder f', its moving average, sees the whole image; its features, each with mean 0 and variance 1,
are the targets t. A narrow predictor g gets the context's features and, for each patch i of one target block
M, the same mask token with that patch's position:
  L = mean over blocks M and patches i in M of  smooth-L1(g(f(context), positions of M)_i - t_i)
No pixel is painted and no view is distorted. A constant would give L = 0. What keeps it away is that no
gradient reaches the target, and its slowness; --no-stop-gradient and --momentum 0 take each away. L says
little, its target moves; watch the effective rank, which falls at first and must rise again.

Demo:   python ijepa.py
Photos: python ijepa.py --data photos/ --image-size 96 --patch-size 8 --arch vit_tiny --epochs 300 \
            --batch-size 256 --warmup-epochs 20 --workers 8
Paper:  torchrun --nnodes 2 --nproc-per-node 8 ijepa.py --data imagenet/ --image-size 224 --patch-size 14 \
            --arch vit_huge --min-keep 10 --epochs 300 --batch-size 2048 --lr 1e-3 --start-lr 2e-4 \
            --warmup-epochs 40 --momentum 0.996 --workers 10

Differs from the official code: blocks can lie anywhere, as in the paper; there the last row and column are
never used (--official-masks). Contexts are cut to one length at random, there from below, which hides the
lower half of the image in large batches. Too small target blocks are kept; there they are drawn again, for
ever on small grids. Masks are drawn for the batch of all processes, and contexts cut to its shortest. Patch
embeddings start with deviation 0.02 x 16 / patch size: small patches would drown in their positions. Crops
also flipped, bicubic, resized as uint8 tensors. Encoders below vit_base, smaller predictors; no vit_giant.
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
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

# --- Args ---------------------------------------------------------------------------------------------------
Arch = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    patch_size: int = 8  # side of a patch in pixels (paper: 14 or 16)
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.3)
    targets: int = 4  # target blocks of an image, each predicted on its own (paper: 4)
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block, from to (paper: 0.15 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)  # its height / width, from to (paper: 0.75 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block, a square (paper: 0.85 1)
    min_keep: int = 4  # a context must have more patches, if need be of the targets (paper: 10)
    official_masks: bool = False  # never use the last row and column, and cut contexts from below
    workers: int = 2  # processes that read images, for each training process
    arch: Arch = "vit_nano"  # encoder, 128 to 1280 wide (paper: vit_base to vit_huge)
    predictor_dim: int = 0  # width of the predictor; 0: by the encoder, 64 to 384 (paper: 384)
    predictor_depth: int = 0  # its blocks; 0: by the encoder, 3 to 12 (paper: 6 for vit_base, else 12)
    stop_gradient: bool = True  # without, the target is the online network, which gets its gradient: watch it
    momentum: float = 0.996  # of the moving average (paper: 0.996, rising to 1 in a line as here)
    epochs: int = 28  # passes over the data (paper: 300 to 600)
    batch_size: int = 32  # images per step, of all processes together (paper: 2048)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    lr: float = 1e-3  # learning rate (paper: 1e-3)
    start_lr: float = 0.0  # that at the start of the warm-up (paper: 2e-4)
    weight_decay: float = 0.04  # strength of weight decay (paper: 0.04, not on biases and norms)
    final_weight_decay: float = 0.4  # reached in a cosine (paper: 0.4)
    warmup_epochs: float = 1.0  # linear from 0 (paper: 40, here too from --start-lr)
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


def multiblock_masks(
    grid,
    batch_size,
    generator,
    targets=4,
    target_scale=(0.15, 0.2),
    target_aspect=(0.75, 1.5),
    context_scale=(0.85, 1.0),
    min_keep=10,
    official=False,
):
    """Patches of a grid x grid: indices of the context (B, K) and of target blocks (targets, B, M), in raster
    order. One size of blocks for the batch, scale and aspect of the targets by one number, a place for each
    image (Sec. 3, multiblock.py). The context is a block less the targets; drawn anew while it has min_keep
    patches or fewer, after 20 times each with one target less taken out; then cut to the shortest in the
    batch, at random or, official, from below. official: the last row and column stay unused."""
    room = grid - 1 if official else grid
    share, context_share = torch.rand(2, generator=generator).tolist()

    def places(n, area, aspect):
        """Indices (n, B, height width) of blocks of one size, anywhere in the room."""
        area = int(grid**2 * area)
        height, width = (max(1, min(room, round(math.sqrt(x)))) for x in (area * aspect, area / aspect))
        top = torch.randint(room - height + 1, (n, batch_size, 1, 1), generator=generator)
        left = torch.randint(room - width + 1, (n, batch_size, 1, 1), generator=generator)
        return ((top + torch.arange(height)[:, None]) * grid + left + torch.arange(width)).flatten(2)

    area, aspect = (low + share * (high - low) for low, high in (target_scale, target_aspect))
    context_area = context_scale[0] + context_share * (context_scale[1] - context_scale[0])
    blocks = places(targets, area, aspect)
    context = torch.zeros(batch_size, grid**2, dtype=torch.bool)
    for attempt in range(20 * (targets + 1)):  # ends, whatever the grid
        short = context.sum(dim=1, keepdim=True) <= min_keep
        if not short.any():
            break
        drawn = torch.zeros_like(context).scatter(1, places(1, context_area, 1)[0], True)
        for block in blocks[: targets - attempt // 20]:
            drawn = drawn.scatter(1, block, False)
        context = torch.where(short, drawn, context)
    order = -torch.arange(grid**2.0) if official else torch.rand(context.shape, generator=generator)
    order = order.masked_fill(~context, -math.inf)
    return order.topk(context.sum(dim=1).min(), dim=1).indices.sort(dim=1).values, blocks


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
PREDICTORS = {"vit_nano": (64, 3), "vit_tiny": (96, 4), "vit_small": (192, 6)}  # width, depth
PREDICTORS |= {"vit_base": (384, 6), "vit_large": (384, 12), "vit_huge": (384, 12)}


def sincos_positions(dim, side):
    """Fixed positions (1, 1 + side^2, dim): zeros for [CLS], then [e(column), e(row)] of a square grid, where
    e(t) has all sines, then all cosines, of t / 10000^(k / (dim / 4)), k = 0 .. dim / 4 - 1."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0)).float()[None]


def apply_masks(x, masks):
    """The tokens of x (B, N, D) at masks (T, B, K): (T B, K, D), first those of masks[0] of all images."""
    return torch.cat([x.gather(1, mask[:, :, None].expand(-1, -1, x.shape[2])) for mask in masks])


class IJEPAEncoder(nn.Module):
    """ViT without [CLS] of square images, in the official names: images (B, 3, H, W) -> tokens of all patches
    (B, N, D) after the norm, or of those at keep (B, K). Uses VITS, Block, Attention, sincos_positions,
    apply_masks."""

    def __init__(self, arch="vit_base", image_size=224, patch_size=16):
        super().__init__()
        dim, depth, heads = VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        positions = sincos_positions(dim, image_size // patch_size)[:, 1:]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images, keep=None):
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed  # first the positions, then the mask
        return self.norm(self.blocks(x if keep is None else apply_masks(x, keep[None])))


class IJEPAPredictor(nn.Module):
    """Tokens (B, K, D) of the patches at context (B, K), targets (T, B, M) -> prediction (T B, M, D), each
    block on its own; in the official names. Uses Block, Attention, sincos_positions, apply_masks."""

    def __init__(self, dim, side, width=384, depth=12, heads=12):
        super().__init__()
        self.predictor_embed, self.predictor_proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(width, side)[:, 1:], requires_grad=False)
        self.predictor_blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, context, targets):
        positions = self.predictor_pos_embed.expand(len(x), -1, -1)
        x = self.predictor_embed(x) + apply_masks(positions, context[None])
        queries = self.mask_token + apply_masks(positions, targets)  # (T B, M, P)
        x = self.predictor_blocks(torch.cat([x.repeat(len(targets), 1, 1), queries], dim=1))
        return self.predictor_proj(self.predictor_norm(x[:, -queries.shape[1] :]))


class IJEPA(nn.Module):
    """Context encoder and predictor, initialised as the official code ends up doing: images and masks ->
    prediction (T B, M, D); with whole also the tokens of all patches. predictor: width and depth, 0 by arch.
    Uses VITS, PREDICTORS, IJEPAEncoder, IJEPAPredictor, Block, Attention, sincos_positions, apply_masks."""

    def __init__(self, arch="vit_base", image_size=224, patch_size=16, predictor=(0, 0)):
        super().__init__()
        dim, _, heads = VITS[arch]
        sizes = (a or b for a, b in zip(predictor, PREDICTORS[arch], strict=True))
        self.encoder = IJEPAEncoder(arch, image_size, patch_size)
        self.predictor = IJEPAPredictor(dim, image_size // patch_size, *sizes, heads)
        for layer in (layer for layer in self.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))):
            std = 0.02 * 16 / patch_size if isinstance(layer, nn.Conv2d) else 0.02
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.predictor.mask_token, std=0.02)

    def forward(self, images, context, targets, whole=False):
        pred = self.predictor(self.encoder(images, context), context, targets)
        return (pred, self.encoder(images)) if whole else pred


# --- Loss ---------------------------------------------------------------------------------------------------
def target_features(tokens):
    """Target encoder's tokens (B, N, D), each with mean 0 and variance 1, so that they cannot just shrink."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def ijepa_loss(pred, target):
    """Mean smooth-L1 of all values, .5 d^2 for |d| < 1, else |d| - .5 (paper: squared distance; the code)."""
    return F.smooth_l1_loss(pred.float(), target)


# --- Optimiser ----------------------------------------------------------------------------------------------
def ijepa_schedule(step, total, warmup, base, final=0.0, start=0.0):
    """cosine_schedule one step ahead, as the official code, warming up from start. Uses cosine_schedule."""
    if step < warmup:
        return start + (base - start) * (step + 1) / warmup
    return cosine_schedule(step + 1, total, warmup, base, final)


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


def target_variance(moments):
    """Share of the normalised targets that differs from image to image at the same place, 0: all alike, of
    moments (2, N, D): means over the images here of targets and squares; all must call it. Uses gather."""
    mean, square = gather(moments[None]).mean(dim=0)
    return (square - mean.square()).mean()


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


def masks_picture(images, context, targets, patch_size):
    """Page of images (B, 3, H, W), of what the encoder sees of them, and of each target block. Uses page."""
    pixels = images * images.new_tensor(STD).view(3, 1, 1) + images.new_tensor(MEAN).view(3, 1, 1)
    columns, side = {"original": pixels}, images.shape[2] // patch_size
    names = ["context", *(f"target {i + 1}" for i in range(len(targets)))]
    for name, indices in zip(names, (context, *targets), strict=True):
        seen = pixels.new_zeros(len(pixels), side**2).scatter(1, indices, 1.0).view(-1, 1, side, side)
        seen = F.interpolate(seen, scale_factor=patch_size)
        columns[name] = pixels * seen + 0.5 * (1 - seen)
    return page(columns)


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
    zero = "predictor_dim predictor_depth micro_batch_size min_keep workers momentum start_lr weight_decay"
    zero += " final_weight_decay seed warmup_epochs"
    at_most = dict.fromkeys("min_scale target_scale context_scale momentum".split(), 1)
    check_flags(args, zero.split(), **at_most, warmup_epochs=args.epochs)
    side = args.image_size // args.patch_size
    if args.image_size % args.patch_size or side < 4:
        allowed = f"4 or more times --patch-size {args.patch_size}"
        raise SystemExit(f"--image-size {args.image_size}: give a multiple, {allowed}")
    heads = VITS[args.arch][2]
    if args.predictor_dim % math.lcm(4, heads):
        raise SystemExit(f"--predictor-dim {args.predictor_dim}: give a multiple of 4 and of {heads} heads")
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = (random_crop(args.image_size, args.min_scale),)  # one view
    data = Images(args.data, crop, args.seed, args.image_size, args.min_scale, rank)
    if args.batch_size > len(data.items) or args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size}: give a multiple of {world}, at most {data.found}")
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    torch.manual_seed(args.seed)
    predictor = args.predictor_dim, args.predictor_depth
    model = IJEPA(args.arch, args.image_size, args.patch_size, predictor).to(device)
    if args.init:
        load_encoder(model, "encoder.", args.init, rank)
    run, checkpoint = open_run(args, "ijepa", rank)
    target_encoder = copy.deepcopy(model.encoder).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "target_encoder": target_encoder, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
        target_encoder.compile()
    micro = args.micro_batch_size or args.batch_size
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. Run folder {run}, step {step} of {total}")
        print(f"{args.arch}, {amp or torch.float32}, {world} x {device}, effective learning rate {args.lr:g}")
    bar = tqdm(total=total, initial=step, disable=rank > 0)
    blocks = args.targets, args.target_scale, args.target_aspect, args.context_scale, args.min_keep
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for (crops,) in loader:
            waited += time.perf_counter() - asked
            for group in optimizer.param_groups:
                group["lr"] = ijepa_schedule(step, total, warmup, args.lr, 1e-6, args.start_lr)
            decay = ijepa_schedule(step, total, 0, args.weight_decay, args.final_weight_decay)
            optimizer.param_groups[0]["weight_decay"] = decay
            images = v2.functional.normalize(crops.to(device, non_blocking=True) / 255, MEAN, STD)
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            masks = multiblock_masks(side, args.batch_size, generator, *blocks, args.official_masks)
            masks = [mask.chunk(world, dim=-2)[rank].to(device, non_blocking=True) for mask in masks]
            logs = step in (0, total - 1) or (step + 1) % args.log_every == 0
            optimizer.zero_grad()
            loss, moments, features = 0.0, 0.0, []
            parts = images.split(micro), *(mask.split(micro, dim=-2) for mask in masks)
            chunks = list(zip(*parts, strict=True))
            for i, (chunk, context, targets) in enumerate(chunks, start=1):
                share = len(chunk) / len(images)
                with net.no_sync() if world > 1 and i < len(chunks) else torch.enable_grad():  # averages once
                    with torch.autocast(device.type, amp, enabled=amp is not None):
                        if args.stop_gradient:
                            with torch.no_grad():
                                tokens = target_encoder(chunk)
                            pred = net(chunk, context, targets)
                        else:
                            pred, tokens = net(chunk, context, targets, whole=True)
                    target = target_features(tokens)
                    part = ijepa_loss(pred, apply_masks(target, targets)) * share
                    scaler.scale(part).backward()
                loss = loss + part.detach()
                if logs:
                    target = target.detach()
                    moments = moments + share * torch.stack([target.mean(dim=0), target.square().mean(dim=0)])
                    features.append(tokens.detach().mean(dim=1))
            scaler.unscale_(optimizer)
            step += 1
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
            momentum = args.momentum and args.momentum + (step - 1) / total * (1 - args.momentum)
            momentum_update(model.encoder, target_encoder, momentum)  # after the step
            bar.update()
            if logs:
                mean, variance = gather(loss[None]).mean().item(), target_variance(moments).item()
                feature = collapse_metrics(torch.cat(features), center=True)
                words = "targets hardly differ from image to image; keep the stop-gradient, raise --momentum"
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": mean, "train/lr": group["lr"], "train/weight_decay": decay}
                metrics |= {"train/grad_norm": grad_norm.item()}
                metrics |= {"ijepa/momentum": momentum, "ijepa/target_variance": variance}
                metrics |= {f"monitor/{k}": v for k, v in feature.items()}
                metrics["perf/images_per_second"] = args.batch_size * (step - logged) / (now - since)
                metrics["perf/data_wait"] = waited / (now - since)
                metrics["perf/skipped_steps"] = skipped  # since the last log
                logged, skipped, since, waited = step, 0, now, 0.0
                if rank == 0:
                    problems = {f"{words}, lower --lr": variance < 0.02 and args.batch_size > 1}
                    metrics["monitor/alarm"] = collapse_alarm(alarm, step, armed_after, problems)
                    for tag, value in metrics.items():
                        board.add_scalar(tag, value, step)
                    line = {"step": step, "epoch": (step - 1) // per_epoch}
                    line |= {tag: value for tag, value in metrics.items() if math.isfinite(value)}
                    with open(run / "metrics.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
                    bar.set_postfix_str(f"loss {mean:.3f} variance {variance:.2f}")
            if rank == 0 and (step in (1, total) or step % args.picture_every == 0):
                picture = masks_picture(chunk[:8], context[:8], targets[:, :8], args.patch_size)
                name = f"masks-{step:06d}.png" if step > 1 else "views.png"  # what the network sees
                v2.functional.to_pil_image(picture).save(run / name)
                board.add_image("masks", picture, step)
            if saves and rank == 0:
                arch_args = {"patch_size": args.patch_size, "fixed_positions": True}
                dim = target_encoder.pos_embed.shape[2]
                export_backbone(run, "ijepa", args, dim, target_encoder.state_dict(), **arch_args)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "ijepa", "step": step, "metrics": metrics, "alarm": alarm}
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
