# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""BEiT: learn features by naming the visual tokens of the patches that were hidden.

Paper: Bao et al. 2021, arXiv 2106.08254; where paper and official PyTorch code differ, the code.
First a tokenizer learns to write each patch of an image as one of K codes and to paint the image from them:
a discrete VAE (dVAE, arXiv 2102.12092). Then a ViT sees the image with blocks of patches M replaced by a mask
token and predicts the codes z of these patches:
  L = 1 / |M|  sum over i in M of  -log softmax(lm_head(h_i))[z_i],   z = argmax_k tokenizer(image)
The targets are fixed, so nothing can collapse; but if the tokenizer uses few codes, they are trivial, and a
model may learn how frequent they are and no more. Both are watched.

Demo:   python beit.py
Photos: python beit.py --data photos/ --image-size 128 --patch-size 8 --tokenizer-layers 3 --arch vit_small \
            --tokens 1024 --tokenizer-dim 128 --tokenizer-epochs 20 --min-block 20 --epochs 400 --workers 8
Paper: torchrun --nnodes 2 --nproc-per-node 8 beit.py --data imagenet/ --image-size 224 --patch-size 16 \
            --tokenizer-layers 3 --tokens 8192 --code-dim 512 --tokenizer-dim 256 --mask-ratio 0.383 \
            --min-block 16 --min-scale 0.08 --arch vit_base --drop-path 0.1 --epochs 800 --warmup-epochs 10 \
            --batch-size 2048 --lr 1.5e-3 --workers 12

Differs from the official code: its own tokenizer, of the official layers and sizes, with a softmax that gets
colder and a KL term, for DALL-E's, whose files are gone; no schedule for one is published, these are ours.
Encoders below vit_base. The tokenizer's view is resized bicubic, not Lanczos; ImageNet's mean and deviation;
colours are jittered after the crop, in one order a batch. The loss is the mean over the hidden patches of all
processes. Drop path depends on the number of processes and on --micro-batch-size.
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
from dataclasses import asdict, dataclass, replace
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
from torchvision.transforms import RandomResizedCrop, v2
from tqdm import tqdm

# --- Args ---------------------------------------------------------------------------------------------------
Arch = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]


@dataclass
class Args:
    data: str = "demo"  # demo, a folder of images in any layout, or a torchvision data set such as CIFAR10
    image_size: int = 32  # side of a view in pixels (paper: 224)
    patch_size: int = 4  # side of a patch in pixels (paper: 16)
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.08)
    color_jitter: float = 0.4  # of brightness, contrast and saturation (paper: 0.4)
    mask_ratio: float = 0.4  # share of the patches that is hidden (paper: 0.4, its code 75 of 196)
    min_block: int = 4  # patches of the smallest block of the mask (paper: 16)
    tokenizer: str = ""  # run folder, or TorchScript: images in [0, 1] to codes (B, h, w); default: train one
    tokens: int = 128  # K, codes of the tokenizer (paper: 8192)
    code_dim: int = 32  # width of a code (DALL-E: 128)
    tokenizer_dim: int = 32  # width of the tokenizer's layers (paper: 256)
    tokenizer_layers: int = 2  # each halves the sides: tokens stand for 2^layers pixels (paper: 3)
    tokenizer_epochs: int = 4  # passes over the data for the tokenizer, before the others
    tokenizer_lr: float = 5e-3  # its learning rate, falling to 0; no warm-up (DALL-E: 1e-4)
    kl_weight: float = 0.02  # of its KL divergence, of each position's shares from equal ones
    workers: int = 2  # processes that read images, for each training process
    arch: Arch = "vit_nano"  # encoder, 128 to 1280 wide (paper: vit_base, vit_large)
    positions: Literal["shared", "blocks", "absolute"] = "shared"  # a relative table, one a block, absolute
    layer_scale: float = 0.1  # start of LayerScale, 0: none (paper: 0.1, vit_large 1e-5)
    drop_path: float = 0.0  # stochastic depth of the last block, 0 in the first (paper: 0.1)
    epochs: int = 8  # passes over the data (paper: 800)
    batch_size: int = 64  # images per step, of all processes together (paper: 2048)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    lr: float = 1e-3  # learning rate (paper: 1.5e-3)
    weight_decay: float = 0.05  # strength of weight decay (paper: 0.05, not on biases and norms)
    warmup_epochs: float = 0.5  # linear from 0 (paper: 10)
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


def block_mask(grid, num_masked, rng, min_block=16):
    """Blockwise mask (Algorithm 1, as in masking_generator.py): bool (H, W) with at most num_masked True, in
    blocks of min_block patches or more, as far as there is room. rng: random.Random."""
    (height, width), mask, count = grid, torch.zeros(grid, dtype=torch.bool), 0
    while count < num_masked:
        most = num_masked - count
        for _ in range(10):
            area, aspect = rng.uniform(min_block, most), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                block = mask[top : top + h, left : left + w]
                if 0 < (new := block.numel() - block.sum().item()) <= most:
                    block.fill_(True)
                    count += new
                    break
        else:
            break
    return mask


class MaskedViews:
    """In the worker: uint8 image (C, H, W) -> the same crop and flip at both sizes, and a mask of patches.
    Uses block_mask."""

    def __init__(self, size, token_size, min_scale, side, num_masked, min_block):
        self.sizes, self.scale = (size, token_size), (min_scale, 1.0)
        self.mask = (side, side), num_masked, min_block

    def __call__(self, pixels):
        top, left, height, width = RandomResizedCrop.get_params(pixels, self.scale, (3 / 4, 4 / 3))
        box = pixels[:, top : top + height, left : left + width]
        box = box.flip(2) if torch.rand(()) < 0.5 else box
        views = [v2.functional.resize(box, [size, size], v2.InterpolationMode.BICUBIC) for size in self.sizes]
        (grid, num_masked, min_block), seed = self.mask, torch.randint(2**31, ()).item()
        return *views, block_mask(grid, num_masked, random.Random(seed), min_block)


def jitter_colors(images, factors, order):
    """uint8 (B, 3, H, W) -> [0, 1]: brightness, contrast, saturation of each image times its factors (B, 3),
    in this order; with the results of torchvision's adjust_* functions."""
    x, gray_of = images.float() / 255, v2.functional.rgb_to_grayscale
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    operations = (
        lambda x: x * brightness,
        lambda x: torch.lerp(gray_of(x).mean(dim=(2, 3), keepdim=True), x, contrast),
        lambda x: torch.lerp(gray_of(x), x, saturation),
    )
    for i in order:
        x = operations[i](x).clamp(0, 1)
    return x


# --- Model --------------------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    """x + three convolutions of it, maps (B, D, H, W)."""

    def __init__(self, dim):
        super().__init__()
        convs = [nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)]
        self.net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x):
        return self.net(x) + x


class DVAE(nn.Module):
    """Discrete VAE in the names of modeling_discrete_vae.py: images (B, 3, H, W) in [-1, 1] <-> one of K
    codes for each 2^layers pixels a side. Uses ResBlock."""

    def __init__(self, tokens=512, code_dim=64, hidden_dim=64, layers=2):
        super().__init__()
        self.codebook = nn.Embedding(tokens, code_dim)
        encoder, decoder = [], []
        for i in range(layers):
            down = nn.Conv2d(hidden_dim if i else 3, hidden_dim, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(hidden_dim if i else code_dim, hidden_dim, 4, stride=2, padding=1)
            encoder += [nn.Sequential(down, nn.ReLU()), ResBlock(hidden_dim)]
            decoder += [nn.Sequential(up, nn.ReLU()), ResBlock(hidden_dim)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(hidden_dim, tokens, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(hidden_dim, 3, 1))

    def decode(self, codes):
        """Codes (B, h, w), or shares of them (B, K, h, w) -> images in [-1, 1]."""
        if codes.ndim == 3:
            return self.decoder(self.codebook(codes).movedim(3, 1))
        return self.decoder(torch.einsum("bkhw,kd->bdhw", codes, self.codebook.weight))

    def forward(self, images, noise, temperature):
        """Logits (B, K, h, w), and the image painted from softmax((logits + noise) / temperature), of Gumbel
        noise of this shape: soft forward and backward."""
        logits = self.encoder(images)
        shares = torch.softmax((logits.float() + noise) / temperature, dim=1)
        return logits, self.decode(shares.to(logits.dtype))


def gumbel_noise(seeds, shape, device):
    """(B, *shape), each row by its seed (B,): the same for any number of processes, and not drawn for all."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
    rows = [torch.empty(shape, device=device).exponential_(generator=g) for g in generators]
    return -torch.stack(rows).clamp(min=1e-9).log()


def relative_index(height, width):
    """Rows of the table of relative positions for [CLS] and a grid, (1 + N, 1 + N), row the query: by offset
    from key to query, then one row each for [CLS] to patch, patch to [CLS], [CLS] to itself."""
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    n = (2 * height - 1) * (2 * width - 1)
    index = torch.full((1 + len(y),) * 2, n)
    index[1:, 1:] = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    index[1:, 0], index[0, 0] = n + 1, n + 2
    return index


class RelativePositionBias(nn.Module):
    """Learnt bias (heads, 1 + N, 1 + N) of attention. Uses relative_index."""

    def __init__(self, grid, heads):
        super().__init__()
        self.register_buffer("relative_position_index", relative_index(*grid))
        size = self.relative_position_index.max() + 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(size, heads))

    def forward(self):
        return self.relative_position_bias_table[self.relative_position_index].movedim(2, 0)


class BEiTAttention(nn.Module):
    """Self-attention of tokens (B, N, D), with a bias (heads, N, N) or, if it has a grid, its own. Keys have
    no bias, it would change nothing. Uses relative_index."""

    def __init__(self, dim, heads, grid=None):
        super().__init__()
        self.relative_position_bias_table = None
        if grid:
            self.register_buffer("relative_position_index", relative_index(*grid))
            size = self.relative_position_index.max() + 1
            self.relative_position_bias_table = nn.Parameter(torch.zeros(size, heads))
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x, bias=None):
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias_table[self.relative_position_index].movedim(2, 0)
        shift = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, shift)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class BEiTBlock(nn.Module):
    """Pre-norm block of tokens (B, N, D) with LayerScale. Uses BEiTAttention."""

    def __init__(self, dim, heads, grid=None, layer_scale=0.1, drop_path=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.drop_path = BEiTAttention(dim, heads, grid), drop_path
        layers = OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(layers)
        self.gamma_1 = self.gamma_2 = 1.0
        if layer_scale:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in "12")

    def forward(self, x, bias=None):
        y = self.gamma_1 * self.attn(self.norm1(x), bias)
        x = x + stochastic_depth(y, self.drop_path, "row", self.training)
        y = self.gamma_2 * self.mlp(self.norm2(x))
        return x + stochastic_depth(y, self.drop_path, "row", self.training)


VITS = {"vit_nano": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6)}  # width, depth, heads
VITS |= {"vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}


def from_timm(model, state, *_):
    """Before loading: one table in all blocks, as in timm and backbone.pt, is the shared one; an index that
    is missing is the model's own."""
    table = "relative_position_bias_table"
    own = [name for name in state if name.startswith("blocks.") and name.endswith(table)]
    if model.rel_pos_bias is not None and own and all(torch.equal(state[own[0]], state[k]) for k in own):
        state[f"rel_pos_bias.{table}"] = [state.pop(name) for name in own][0]
    for name, index in model.named_buffers():
        state.setdefault(name, index)


class BEiT(nn.Module):
    """ViT of side x side patches in the official names. positions: one relative table ("shared"), one in each
    block ("blocks"), or learnt ones ("absolute"). Uses VITS, BEiTBlock, BEiTAttention, RelativePositionBias,
    relative_index, from_timm."""

    def __init__(self, arch, side, patch_size, tokens, positions="shared", layer_scale=0.1, drop_path=0.0):
        super().__init__()
        dim, depth, heads = VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, 1, dim)) for _ in "12")
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side**2, dim)) if positions == "absolute" else None
        self.rel_pos_bias = RelativePositionBias((side, side), heads) if positions == "shared" else None
        grid, rates = (side, side) if positions == "blocks" else None, torch.linspace(0, drop_path, depth)
        blocks = [BEiTBlock(dim, heads, grid, layer_scale, rate.item()) for rate in rates]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim, eps=1e-6)
        self.lm_head = nn.Linear(dim, tokens)
        layers = [layer for layer in self.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        vectors = [x for x in (self.cls_token, self.mask_token, self.pos_embed) if x is not None]
        for weight in [layer.weight for layer in layers] + vectors:
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)  # cut at one deviation, as in the code
        for layer in (layer for layer in layers if layer.bias is not None):
            nn.init.zeros_(layer.bias)
        for i, block in enumerate(blocks, start=1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                weight.data.div_(math.sqrt(2 * i))
        self._register_load_state_dict_pre_hook(from_timm, with_module=True)  # public in torch 2.5

    def forward(self, images, mask, return_tokens=False):
        """Logits (hidden patches, K) where mask (B, H, W) is True, image by image, row by row; on request
        also tokens (B, 1 + N, D) of [CLS] and all patches."""
        mask = mask.flatten(1)
        x = self.patch_embed(images).flatten(2).mT
        x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x if self.pos_embed is None else x + self.pos_embed
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        logits = self.lm_head(x[:, 1:][mask])
        return (logits, x) if return_tokens else logits


# --- Loss ---------------------------------------------------------------------------------------------------
def dvae_loss(logits, painted, images, kl_weight):
    """Of each image (B,): squared error of the painting plus kl_weight x KL(codes || uniform) a position, in
    [0, ln K], of the logits (B, K, h, w) without noise and temperature; and both parts."""
    error = (painted.float() - images).square().mean(dim=(1, 2, 3))
    log_q = F.log_softmax(logits.float(), dim=1)
    kl = (math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)).mean(dim=(1, 2))
    return error + kl_weight * kl, error, kl


def beit_loss(logits, codes, mask):
    """Cross-entropy (M,) of logits (M, K) with the codes (B, H, W) of the M patches where mask is True."""
    return F.cross_entropy(logits.float(), codes[mask], reduction="none")


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


def code_metrics(counts):
    """Of counts (K,) of codes: perplexity exp(H), H in nats, codes in use, share of the most frequent one."""
    share = counts / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    values = torch.stack([entropy.exp(), entropy, (counts > 0).sum(), share.max()]).tolist()
    return dict(zip(("perplexity", "entropy", "active", "majority"), values, strict=True))


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
# A stage is a model with its optimiser's numbers, and batch(views, generator, share) -> tensors whose rows
# are this process's images, and number of the loss's terms in all processes; loss(net, chunk, progress, logs)
# -> their sum and, if logs, sums for metrics(), features; metrics(sums, n) -> metrics, problems; columns() ->
# pictures. settled: share of the run before the alarm can ring.
class TokenizerStage:
    def __init__(self, args, grid):
        self.args, self.grid, self.title = args, grid, f"tokenizer, learning rate {args.tokenizer_lr:g}"
        self.model = DVAE(args.tokens, args.code_dim, args.tokenizer_dim, args.tokenizer_layers)
        self.groups = [{"params": [*self.model.parameters()], "weight_decay": 1e-4}]
        self.lr, self.final, self.clip, self.flag = args.tokenizer_lr, 0.0, math.inf, "--tokenizer-lr"
        self.epochs, self.warmup_epochs, self.settled = args.tokenizer_epochs, 0.0, 0.3

    def batch(self, views, generator, share):
        seeds = torch.randint(2**62, (self.args.batch_size,), generator=generator)
        return (2 * views[1] - 1, share(seeds)), self.args.batch_size

    def loss(self, net, chunk, progress, logs):
        images, seeds = chunk
        noise = gumbel_noise(seeds, (self.args.tokens, self.grid, self.grid), images.device)
        # soon cold, or the shares and not the codes carry the image
        temperature = cosine_schedule(min(progress, self.settled), self.settled, 0, 1.0, 1 / 16)
        logits, painted = net(images, noise, temperature)
        terms = dvae_loss(logits, painted, images, self.args.kl_weight * min(1.0, 10 * progress))
        if not logs:
            return terms[0].sum(), None, None
        codes = logits.detach().argmax(dim=1)
        with torch.no_grad():
            hard = self.model.decode(codes).float()
        errors = *terms, (hard - images).square().mean(dim=(1, 2, 3))
        counts = torch.bincount(codes.flatten(), minlength=self.args.tokens)
        sums = torch.cat([torch.stack([error.detach().sum() for error in errors]), counts])
        self.shown = images, painted.detach(), hard
        return terms[0].sum(), sums, logits.detach().mean(dim=(2, 3))

    def metrics(self, sums, n):
        loss, soft, kl, hard = (sums[:4] / n).tolist()
        codes = code_metrics(sums[4:])
        remedy = "lower --kl-weight" if kl < 0.1 else "raise --kl-weight, or lower --tokens"
        few = f"perplexity {codes['perplexity']:.1f}: few codes are in use; {remedy}"
        metrics = {"train/loss": loss, "dvae/error": soft, "dvae/hard_error": hard, "dvae/kl": kl}
        metrics |= {"dvae/perplexity": codes["perplexity"], "dvae/active": codes["active"]}
        return metrics, {few: codes["perplexity"] < self.args.tokens / 20}

    def columns(self):
        columns = zip(("original", "soft codes", "codes"), self.shown, strict=True)
        return {title: x.float() / 2 + 0.5 for title, x in columns}

    def save(self, folder):
        """All that other runs need is in checkpoint.pt."""


class BEiTStage:
    def __init__(self, args, grid, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.title = f"{args.arch}, effective learning rate {args.lr:g}"
        options = args.positions, args.layer_scale, args.drop_path
        tokens = tokenizer.tokens if tokenizer else args.tokens
        self.model = BEiT(args.arch, grid, args.patch_size, tokens, *options)
        decayed, plain = [], []
        for name, p in self.model.named_parameters():
            (decayed if p.ndim > 1 and name not in ("cls_token", "pos_embed") else plain).append(p)
        self.groups = [{"params": decayed, "weight_decay": args.weight_decay}]
        self.groups += [{"params": plain, "weight_decay": 0.0}]
        self.lr, self.final, self.flag = args.lr, args.lr / 150, "--lr"  # the official 1e-5 of 1.5e-3
        self.epochs, self.warmup_epochs, self.settled, self.clip = args.epochs, args.warmup_epochs, 0.0, 3.0

    def batch(self, views, generator, share):
        images, pixels, mask = views
        n = mask.sum()
        if dist.is_initialized():
            dist.all_reduce(n)
        return (v2.functional.normalize(images, MEAN, STD), pixels, mask), n.clamp(min=1)

    def loss(self, net, chunk, progress, logs):
        images, pixels, mask = chunk
        codes = self.tokenizer(pixels)
        logits, x = net(images, mask, return_tokens=True)
        loss = beit_loss(logits, codes, mask).sum()
        if not logs:
            return loss, None, None
        answers, tokens = logits.detach().argmax(dim=1), self.tokenizer.tokens
        counts = [torch.bincount(ids, minlength=tokens) for ids in (codes[mask], answers)]
        sums = torch.cat([loss.detach()[None], (answers == codes[mask]).sum()[None], *counts])
        self.shown = images, mask, codes, answers
        return loss, sums, x.detach()[:, 1:].mean(dim=1)

    def metrics(self, sums, n):
        loss, accuracy = (sums[:2] / n).tolist()
        target, answer = (code_metrics(counts) for counts in sums[2:].chunk(2))
        majority = target["majority"]
        chance = majority + 3 * math.sqrt(majority * (1 - majority) / n)
        words = f"accuracy {accuracy:.3f}, always the most frequent code gives {majority:.3f}"
        metrics = {"train/loss": loss, "beit/masked_accuracy": accuracy, "beit/majority": majority}
        metrics |= {"beit/target_entropy": target["entropy"], "beit/predicted_tokens": answer["active"]}
        metrics["beit/codebook_perplexity"] = target["perplexity"]
        one = f"perplexity {target['perplexity']:.1f}: the tokenizer has few codes in use; train another"
        return metrics, {f"{words}; lower --lr": accuracy <= chance, one: target["perplexity"] < 2}

    def columns(self):
        images, mask, codes, answers = self.shown
        pixels = images * images.new_tensor(STD).view(3, 1, 1) + images.new_tensor(MEAN).view(3, 1, 1)
        hidden = mask.repeat_interleave(self.args.patch_size, 1).repeat_interleave(self.args.patch_size, 2)
        columns = {"original": pixels, "masked": pixels * ~hidden[:, None]}
        if hasattr(self.tokenizer, "decode"):  # a TorchScript module does not paint
            columns["true codes"] = self.tokenizer.decode(codes)
            columns["hidden codes\nas predicted"] = self.tokenizer.decode(codes.masked_scatter(mask, answers))
        return {title: F.interpolate(x, pixels.shape[2:]) for title, x in columns.items()}

    def save(self, folder):
        weights, table = self.model.state_dict(), "relative_position_bias_table"
        rest = ("lm_head", "mask_token", "rel_pos_bias")
        encoder = {k: v for k, v in weights.items() if not k.startswith(rest) and not k.endswith("_index")}
        if self.model.rel_pos_bias is not None:
            shared = weights[f"rel_pos_bias.{table}"]
            encoder |= {f"blocks.{i}.attn.{table}": shared.clone() for i in range(len(self.model.blocks))}
        dim = self.model.cls_token.shape[2]
        export_backbone(folder, "beit", self.args, dim, encoder, patch_size=self.args.patch_size)


class Tokenizer:
    """Images (B, 3, h, w) in [0, 1] -> codes (B, grid, grid), by a DVAE or a module of the user's."""

    def __init__(self, net, tokens, size):
        self.net, self.tokens, self.size = net.eval(), tokens, size
        if isinstance(net, DVAE):
            self.decode = lambda codes: net.decode(codes) / 2 + 0.5

    @torch.no_grad()
    def __call__(self, images):
        if isinstance(self.net, DVAE):
            return self.net.encoder(2 * images - 1).argmax(dim=1)
        codes = self.net(images)
        if not 0 <= codes.min() <= codes.max() < self.tokens:
            words = f"{codes.min()} to {codes.max()}, must be 0 to below --tokens {self.tokens}"
            raise SystemExit(f"--tokenizer: gives codes {words}")
        return codes.long()


def load_tokenizer(path, tokens, layers, grid):
    """Of another run's folder, or of a TorchScript file with this number of codes and of halvings."""
    if os.path.isdir(path):
        file = Path(path) / "tokenizer" / "checkpoint.pt"
        if not file.exists():
            raise SystemExit(f"--tokenizer {path}: holds no tokenizer/checkpoint.pt; give a run with one")
        state = load_checkpoint(file, "beit")["model"]
        (tokens, dim), hidden = state["codebook.weight"].shape, len(state["encoder.0.0.weight"])
        layers = max(int(name.split(".")[1]) for name in state if name.startswith("encoder.")) // 2
        net = DVAE(tokens, dim, hidden, layers)
        net.load_state_dict(state)
        return Tokenizer(net, tokens, grid * 2**layers)
    size = grid * 2**layers
    try:
        net = torch.jit.load(path, map_location="cpu")
        codes = net(torch.zeros(1, 3, size, size))
        if codes.shape != (1, grid, grid) or codes.is_floating_point():
            raise ValueError(f"gives {tuple(codes.shape)} {codes.dtype}, not (1, {grid}, {grid}) integers")
    except Exception as error:  # no such file, another format, another size
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"--tokenizer {path}, images of {size} pixels (--tokenizer-layers): {reason}")
    return Tokenizer(net, tokens, size)


def fit(stage, args, data, run, checkpoint, rank, world, device, amp):
    """Train a stage in its folder, from its checkpoint; returns the metrics of the last step."""
    per_epoch = len(data.items) // args.batch_size
    total, warmup = stage.epochs * per_epoch, round(stage.warmup_epochs * per_epoch)
    model = stage.model.to(device)
    trained = [p for group in stage.groups for p in group["params"]]
    optimizer = torch.optim.AdamW(stage.groups, stage.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    moving = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, metrics, alarm = (checkpoint.get(*pair) for pair in (("step", 0), ("metrics", {}), ("alarm", {})))
    restore(moving, checkpoint, run)
    if args.compile:
        model.compile()
    micro = args.micro_batch_size or args.batch_size
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    keys = data.batches(args.batch_size, step, stage.epochs, rank, world)
    loader = DataLoader(data, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda")
    if rank == 0:
        board = SummaryWriter(run, purge_step=step + 1)
        print(f"{data.found}. Run folder {run}, step {step} of {total}")
        print(f"{stage.title}, {amp or torch.float32}, {world} x {device}")

    def share(rows):  # of this process
        return rows.chunk(world)[rank]

    def forward(*inputs, **options):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return net(*inputs, **options)

    bar = tqdm(total=total, initial=step, disable=rank > 0)
    logged, skipped, since, asked, waited = step, 0, time.perf_counter(), time.perf_counter(), 0.0
    try:
        for (crops,) in loader:
            waited += time.perf_counter() - asked
            for group in optimizer.param_groups:
                group["lr"] = cosine_schedule(step, total, warmup, stage.lr, stage.final)
            generator = torch.Generator().manual_seed(hash((args.seed, 3, step)) % 2**32)
            factors = 1 + args.color_jitter * (2 * torch.rand(args.batch_size, 3, generator=generator) - 1)
            factors, order = share(factors).to(device), torch.randperm(3, generator=generator).tolist()
            large, small, mask = (crop.to(device, non_blocking=True) for crop in crops)
            images = jitter_colors(large, factors, order)
            pixels = images if large.shape == small.shape else jitter_colors(small, factors, order)
            rows, n = stage.batch((images, pixels, mask), generator, share)
            draws = (step + 1) % args.picture_every == 0 or step in (0, total - 1)
            logs = draws or (step + 1) % args.log_every == 0
            torch.manual_seed(hash((args.seed, 4, step, rank)) % 2**32)  # of drop path
            optimizer.zero_grad()
            loss, sums, features = 0.0, 0.0, []
            chunks = list(zip(*(tensor.split(micro) for tensor in rows), strict=True))
            for i, chunk in enumerate(chunks, start=1):
                with net.no_sync() if world > 1 and i < len(chunks) else torch.enable_grad():  # averages once
                    part, part_sums, h = stage.loss(forward, chunk, step / total, logs)
                    part = part * world / n
                    scaler.scale(part).backward()
                loss = loss + part.detach()
                if logs:
                    sums = sums + part_sums
                    features.append(h)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(trained, stage.clip)
            step += 1
            saves = step % args.checkpoint_every == 0 or step == total
            if (logs or saves) and not torch.isfinite(loss if scaler.get_scale() > 1 else loss + grad_norm):
                why = f"loss {loss:g}, gradient {grad_norm:g}; lower {stage.flag}"
                raise SystemExit(name_images(run, data, args.batch_size, logged, step, why))
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale  # float16 overflowed
            bar.update()
            if logs:
                metrics, problems = stage.metrics(gather(sums[None]).sum(dim=0), n)
                feature = collapse_metrics(torch.cat(features), center=True)
                now = time.perf_counter()
                armed_after = max(min(500, 0.2 * total), warmup, stage.settled * total)
                metrics |= {"train/lr": group["lr"], "train/grad_norm": grad_norm.item()}
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
                    bar.set_postfix_str(f"loss {metrics['train/loss']:.3f}")
            if rank == 0 and draws:
                picture = page(stage.columns())
                name = f"reconstruction-{step:06d}.png" if step > 1 else "views.png"  # what the network sees
                v2.functional.to_pil_image(picture).save(run / name)
                board.add_image("reconstruction", picture, step)
            if saves and rank == 0:
                stage.save(run)
                state = {name: part.state_dict() for name, part in moving.items()}
                state |= {"method": "beit", "step": step, "metrics": metrics, "alarm": alarm}
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
        print(f"{run}: " + ", ".join(f"{tag} {value:.4g}" for tag, value in metrics.items()))
    return metrics


def train(args: Args) -> dict:
    """Pretrain in the run folder, the tokenizer first, from their checkpoints if it has them; returns the
    metrics of the last step."""
    zero = "color_jitter kl_weight layer_scale drop_path micro_batch_size workers weight_decay warmup_epochs"
    zero += " seed"
    most = {"min_scale": 1, "color_jitter": 1, "mask_ratio": 1, "drop_path": 1, "warmup_epochs": args.epochs}
    check_flags(args, zero.split(), **most)
    grid = args.image_size // args.patch_size
    if args.image_size % args.patch_size:
        raise SystemExit(f"--image-size {args.image_size}: give a multiple of --patch-size {args.patch_size}")
    if not 2 * args.min_block <= (masked := round(args.mask_ratio * grid**2)) < grid**2:
        words = f"{masked} of {grid**2} patches to hide, must be twice --min-block {args.min_block}, not all"
        raise SystemExit(f"--mask-ratio {args.mask_ratio}: {words}")
    processes = rank, world, device, amp = start_processes(args.device, args.amp)
    tokenizer, size = None, grid * 2**args.tokenizer_layers
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, args.tokens, args.tokenizer_layers, grid)
        size = tokenizer.size
    views = (MaskedViews(args.image_size, size, args.min_scale, grid, masked, args.min_block),)
    data = Images(args.data, views, args.seed, max(args.image_size, size), args.min_scale, rank)
    if args.batch_size > len(data.items) or args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size}: give a multiple of {world}, at most {data.found}")
    torch.manual_seed(args.seed)
    stage = BEiTStage(args, grid, tokenizer)
    if args.init:
        load_encoder(stage.model, "", args.init, rank)
    run, checkpoint = open_run(args, "beit", rank)
    if not tokenizer:
        first = TokenizerStage(args, grid)
        folder, held = open_run(replace(args, run_dir=str(run / "tokenizer")), "beit", rank)
        fit(first, args, data, folder, held, *processes)
        stage.tokenizer = Tokenizer(first.model, args.tokens, size)
    stage.tokenizer.net.to(device)
    metrics = fit(stage, args, data, run, checkpoint, *processes)
    if world > 1:
        dist.barrier()  # in torch 2.4 gloo may wait for ever in the next line
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
