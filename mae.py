# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""MAE: learn features by painting in the three quarters of an image that were hidden.

Paper: He et al. 2021, arXiv 2111.06377; where paper and official PyTorch code differ, the code.
The encoder sees only the visible quarter of the N patches of an image, so it is cheap. A small decoder gets
its output and, for every hidden patch, the same learnt mask token, and predicts the pixels x of all patches.
The loss is the mean squared error on the hidden patches M alone (Sec. 3):
  L = 1 / |M|  sum over i in M of  |decoder(encoder(visible))_i - x_i|^2 / values of a patch
The target is fixed, so nothing can collapse; what can go wrong is to predict the mean: R2 = 0.

Demo:   python mae.py
Photos: python mae.py --data photos/ --image-size 128 --patch-size 8 --arch vit_small --norm-pix --epochs 400
Paper: torchrun --nproc-per-node 8 mae.py --data imagenet/ --image-size 224 --patch-size 16 --arch vit_base \
            --norm-pix --epochs 800 --warmup-epochs 40 --batch-size 4096 --base-lr 1.5e-4 --workers 12

Differs from the official code: encoders below vit_base too, with small decoders, because the paper's decoder
costs more than a small encoder saves; crops resized as uint8 tensors (within 2 of 255 of Pillow's), of large
JPEGs decoded at reduced size; bfloat16 on GPUs that have it.
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
    patch_size: int = 4  # side of a patch in pixels (paper: 16)
    mask_ratio: float = 0.75  # share of the patches that is hidden (paper: 0.75)
    norm_pix: bool = False  # targets with mean 0 and variance 1 in each patch (paper: on, recommended)
    min_scale: float = 0.2  # smallest area of a crop as a share of the image (paper: 0.2)
    workers: int = 2  # processes that read images, for each training process
    arch: Arch = "vit_nano"  # encoder, 128 to 1280 wide (paper: vit_base to vit_huge)
    decoder_dim: int = 0  # width of the decoder; 0: by the encoder, 64 to 512 (paper: 512)
    decoder_depth: int = 0  # its blocks; 0: by the encoder, 2 to 8 (paper: 8)
    decoder_heads: int = 0  # its heads; 0: by the encoder, 2 to 16 (paper: 16)
    epochs: int = 26  # passes over the data (paper: 800 to 1600)
    batch_size: int = 256  # images per step, of all processes together (paper: 4096)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    base_lr: float = 1e-3  # times batch / 256 is the learning rate (paper: 1.5e-4)
    weight_decay: float = 0.05  # strength of weight decay (paper: 0.05, not on biases and norms)
    warmup_epochs: float = 2.0  # linear from 0 (paper: 40)
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


def patchify(images, patch_size):
    """(B, 3, H, W) -> (B, N, p p 3): patches row by row, in each rows, columns, channels (official order)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size):
    """Inverse of patchify for square images: (B, N, p p 3) -> (B, 3, H, W)."""
    h, p = math.isqrt(patches.shape[1]), patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)


def random_masking(x, mask_ratio, noise=None):
    """The K = int(N (1 - mask_ratio)) tokens of x (B, N, D) with the least noise (B, N), in its order; mask
    (B, N), 1 where a token was removed; ids_restore (B, N), the place of each token in the shuffled order."""
    noise = torch.rand(x.shape[:2], device=x.device) if noise is None else noise
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    keep = int(x.shape[1] * (1 - mask_ratio))  # the official expression, rounding of floats included
    kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
    return kept, (ids_restore >= keep).float(), ids_restore


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
DECODERS = {"vit_nano": (64, 2, 2), "vit_tiny": (96, 2, 3), "vit_small": (192, 4, 6)}  # larger: 512, 8, 16


def sincos_positions(dim, side):
    """Fixed positions (1, 1 + side^2, dim): zeros for [CLS], then [e(column), e(row)] of a square grid, where
    e(t) has all sines, then all cosines, of t / 10000^(k / (dim / 4)), k = 0 .. dim / 4 - 1."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0)).float()[None]


class MAE(nn.Module):
    """Encoder and decoder of square images in the official names; decoder: width, depth, heads, 0 by arch.
    Uses VITS, DECODERS, Block, Attention, sincos_positions, random_masking."""

    def __init__(self, arch="vit_base", image_size=224, patch_size=16, decoder=(0, 0, 0)):
        super().__init__()
        dim, depth, heads = VITS[arch]
        defaults = DECODERS.get(arch, (512, 8, 16))
        dec_dim, dec_depth, dec_heads = (a or b for a, b in zip(decoder, defaults, strict=True))
        side = image_size // patch_size
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, side), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.decoder_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dec_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, dec_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dec_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(dec_dim, side), requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(dec_dim, dec_heads) for _ in range(dec_depth)))
        self.decoder_pred = nn.Linear(dec_dim, 3 * patch_size**2)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))  # its bias as PyTorch's
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, images, mask_ratio, noise=None):
        """Latent (B, 1 + K, D) of [CLS] and the visible patches, mask and ids_restore of random_masking."""
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed[:, 1:]  # (B, N, D)
        x, mask, ids_restore = random_masking(x, mask_ratio, noise)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks(x)), mask, ids_restore

    def decode(self, latent, ids_restore):
        """Prediction (B, N, p p 3) for all patches, the visible ones too."""
        x = self.decoder_embed(latent)
        hidden = ids_restore.shape[1] + 1 - x.shape[1]
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(len(x), hidden, -1)], dim=1)
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = self.decoder_blocks(torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images, mask_ratio=0.75, noise=None, return_latent=False):
        latent, mask, ids_restore = self.encode(images, mask_ratio, noise)
        pred = self.decode(latent, ids_restore)
        return (pred, mask, latent) if return_latent else (pred, mask)


# --- Loss ---------------------------------------------------------------------------------------------------
def pixel_targets(images, patch_size, norm_pix):
    """Patches (B, N, p p 3) to predict; with norm_pix each less its mean, over its deviation; and these
    (B, N, 1), without norm_pix 0 and 1. Uses patchify."""
    patches = patchify(images.float(), patch_size)
    mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)  # unbiased
    mean, std = (mean, (variance + 1e-6).sqrt()) if norm_pix else (0 * mean, 1 + 0 * mean)
    return (patches - mean) / std, mean, std


def mae_loss(pred, target, mask):
    """Mean squared error of the patches (B, N, p p 3) where mask (B, N) is 1, the hidden ones (Sec. 3)."""
    return ((pred.float() - target).square().mean(dim=2) * mask).sum() / mask.sum()


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


def patch_moments(pred, target, mask):
    """Means over the hidden patches of prediction, its square, target, its square, error^2 (5, p p 3)."""
    pred, share = pred.float(), (mask / mask.sum())[:, :, None]
    moments = pred, pred.square(), target, target.square(), (pred - target).square()
    return torch.stack([(share * moment).sum(dim=(0, 1)) for moment in moments])


def reconstruction_metrics(moments):
    """R2 against predicting the mean patch (with norm_pix nearly 0), and variance of the prediction over the
    target's: 0 for the mean, 1 if perfect. moments: of patch_moments; all must call it. Uses gather."""
    pred, pred2, target, target2, error = gather(moments[None]).mean(dim=0)
    variance = (target2 - target.square()).mean()
    return 1 - error.mean() / variance, (pred2 - pred.square()).mean() / variance


def reconstruction_picture(images, pred, mask, mean, std, patch_size):
    """uint8 page (3, H, W) of up to 8 images (B, 3, H, W) in labelled columns: original, masked, predicted,
    prediction pasted where masked. mean, std: of pixel_targets. Uses unpatchify, MEAN, STD."""
    images, pred, mask, mean, std = (rows[:8] for rows in (images, pred, mask, mean, std))
    hidden = unpatchify(mask[:, :, None].expand_as(pred), patch_size)
    drawn = unpatchify(pred.float() * std + mean, patch_size)
    columns = images, images * (1 - hidden), drawn, torch.where(hidden > 0, drawn, images)
    rows = torch.stack(columns, dim=1).flatten(0, 1).cpu()
    pixels = (rows * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
    pixels = F.interpolate(pixels, scale_factor=math.ceil(128 / pixels.shape[3]))  # room for the words
    grid = v2.functional.to_pil_image(torchvision.utils.make_grid(pixels, nrow=4, padding=4, pad_value=1))
    page = ImageOps.expand(grid, (0, 30, 0, 0), "white")
    hint = "" if std.amin() == std.amax() == 1 else "true mean, deviation"  # which the network does not know
    for i, name in enumerate(("original\n", "masked\n", f"predicted\n{hint}", f"pasted\n{hint}")):
        ImageDraw.Draw(page).text((4 + i * (pixels.shape[3] + 4), 0), name, fill="black")
    return v2.functional.pil_to_tensor(page)


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
    zero = "decoder_dim decoder_depth decoder_heads micro_batch_size workers weight_decay seed warmup_epochs"
    check_flags(args, zero.split(), min_scale=1, warmup_epochs=args.epochs)
    side = args.image_size // args.patch_size
    if args.image_size % args.patch_size:
        raise SystemExit(f"--image-size {args.image_size}: give a multiple of --patch-size {args.patch_size}")
    if not (args.mask_ratio < 1 and 1 <= int(side**2 * (1 - args.mask_ratio)) < side**2):
        raise SystemExit(f"--mask-ratio {args.mask_ratio}: must hide some of the {side**2} patches, not all")
    rank, world, device, amp = start_processes(args.device, args.amp)
    crop = (random_crop(args.image_size, args.min_scale),)  # one view
    data = Images(args.data, crop, args.seed, args.image_size, args.min_scale, rank)
    if args.batch_size > len(data.items) or args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size}: give a multiple of {world}, at most {data.found}")
    per_epoch = len(data.items) // args.batch_size
    total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
    peak_lr = args.base_lr * args.batch_size / 256
    torch.manual_seed(args.seed)
    decoder = args.decoder_dim, args.decoder_depth, args.decoder_heads
    model = MAE(args.arch, args.image_size, args.patch_size, decoder).to(device)
    if (width := model.mask_token.shape[2]) % math.lcm(4, heads := model.decoder_blocks[0].attn.heads):
        raise SystemExit(f"--decoder-dim {width}: give a multiple of 4 and of --decoder-heads {heads}")
    if args.init:
        load_encoder(model, "", args.init, rank)
    run, checkpoint = open_run(args, "mae", rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, peak_lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
    micro = args.micro_batch_size or args.batch_size
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
            images = v2.functional.normalize(crops.to(device, non_blocking=True) / 255, MEAN, STD)
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            noise = torch.rand(args.batch_size, side**2, generator=generator).chunk(world)[rank].to(device)
            logs = step in (0, total - 1) or (step + 1) % args.log_every == 0
            optimizer.zero_grad()
            loss, moments, latents = 0.0, 0.0, []
            chunks = list(zip(images.split(micro), noise.split(micro), strict=True))
            for i, (chunk, chunk_noise) in enumerate(chunks, start=1):
                target, *statistics = pixel_targets(chunk, args.patch_size, args.norm_pix)
                share = len(chunk) / len(images)
                with net.no_sync() if world > 1 and i < len(chunks) else torch.enable_grad():  # averages once
                    with torch.autocast(device.type, amp, enabled=amp is not None):
                        pred, mask, latent = net(chunk, args.mask_ratio, chunk_noise, return_latent=True)
                    part = mae_loss(pred, target, mask) * share
                    scaler.scale(part).backward()
                loss, pred = loss + part.detach(), pred.detach()
                if logs:
                    moments = moments + share * patch_moments(pred, target, mask)
                    latents.append(latent.detach()[:, 1:].mean(dim=1))
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
                r2, variance = (value.item() for value in reconstruction_metrics(moments))
                feature = collapse_metrics(torch.cat(latents), center=True)
                words = f"R2 {r2:.3f}: no better than a mean; lower --base-lr if R2 was higher, else raise it"
                now, armed_after = time.perf_counter(), max(min(500, 0.2 * total), warmup)
                metrics = {"train/loss": gather(loss[None]).mean().item(), "train/lr": group["lr"]}
                metrics |= {"train/grad_norm": grad_norm.item()}
                metrics |= {"mae/r2": r2, "mae/prediction_variance": variance}
                metrics |= {f"monitor/{k}": v for k, v in feature.items()}
                metrics["perf/images_per_second"] = args.batch_size * (step - logged) / (now - since)
                metrics["perf/data_wait"] = waited / (now - since)
                metrics["perf/skipped_steps"] = skipped  # since the last log
                logged, skipped, since, waited = step, 0, now, 0.0
                if rank == 0:
                    metrics["monitor/alarm"] = collapse_alarm(alarm, step, armed_after, {words: r2 < 0.01})
                    for tag, value in metrics.items():
                        board.add_scalar(tag, value, step)
                    line = {"step": step, "epoch": (step - 1) // per_epoch}
                    line |= {tag: value for tag, value in metrics.items() if math.isfinite(value)}
                    with open(run / "metrics.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
                    bar.set_postfix_str(f"loss {metrics['train/loss']:.3f} R2 {r2:.3f}")
            if rank == 0 and (step in (1, total) or step % args.picture_every == 0):
                picture = reconstruction_picture(chunk, pred, mask, *statistics, args.patch_size)
                name = f"reconstruction-{step:06d}.png" if step > 1 else "views.png"  # what the network sees
                v2.functional.to_pil_image(picture).save(run / name)
                board.add_image("reconstruction", picture, step)
            if saves and rank == 0:
                weights, rest = model.state_dict(), ("decoder", "mask_token")
                encoder = {name: weights[name] for name in weights if not name.startswith(rest)}
                arch_args = {"patch_size": args.patch_size, "xavier": True, "fixed_positions": True}
                export_backbone(run, "mae", args, model.cls_token.shape[2], encoder, **arch_args)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "mae", "step": step, "metrics": metrics, "alarm": alarm}
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
