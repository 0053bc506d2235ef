# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "einops", "tyro", "tensorboard", "tqdm"]
# ///
r"""BEiT: learn features by naming the visual tokens of the patches that were hidden.

Paper: Bao et al. 2021, arXiv 2106.08254; where it differs from the official PyTorch code, as in the code.
First a tokenizer, a discrete VAE (arXiv 2102.12092), learns to write each patch of an image as one of K codes
and to paint the image from them. Then a ViT sees images with blocks of patches M replaced by a mask token,
and predicts the codes z of these patches:
  L = 1 / |M|  sum over i in M of  -log softmax(lm_head(h_i))[z_i],   z = argmax_k tokenizer(image)
The targets are fixed, so nothing can collapse; what can go wrong is a tokenizer that uses few codes, or a
model that learns no more than how frequent each is.

Demo:   python beit.py
Photos: python beit.py --data photos/ --image-size 128 --patch-size 8 --tokenizer-layers 3 --arch vit_small \
            --tokens 1024 --tokenizer-dim 128 --tokenizer-epochs 20 --min-block 20 --epochs 400 --workers 8
Paper:  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
            beit.py --data imagenet/ --image-size 224 --patch-size 16 --tokenizer-layers 3 --tokens 8192 \
            --tokenizer-dim 256 --mask-ratio 0.383 --min-block 16 --min-scale 0.08 --arch vit_base \
            --drop-path 0.1 --epochs 800 --warmup-epochs 10 --batch-size 2048 --lr 1.5e-3 --workers 12

Differs from the official code: its own tokenizer, of the official layers and sizes, for DALL-E's, whose files
are gone; no schedule for one is published, this is ours; it sees the same crop, reduced, not a second resize
by Lanczos. Encoders below vit_base. Colours are jittered after the crop, in one order a batch. The loss is
the mean over the hidden patches of all processes; stochastic depth depends on the number of these and of
micro-batches.
"""

import contextlib
import hashlib
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
from functools import partial
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
    min_scale: float = 0.3  # smallest area of a crop as a share of the image (paper: 0.08)
    color_jitter: float = 0.4  # of brightness, contrast and saturation (paper: 0.4)
    mask_ratio: float = 0.4  # share of the patches that is hidden (paper: 0.4, its code 75 of 196)
    min_block: int = 4  # patches of the smallest block of the mask (paper: 16)
    workers: int = 2  # processes that read images, for each training process

    dvae: str = ""  # tokenizer/backbone.pt of an earlier run; default: train one first
    tokens: int = 128  # K, codes of the tokenizer (paper: 8192)
    tokenizer_dim: int = 32  # width of the tokenizer's layers, half of a code's (paper: 256)
    tokenizer_layers: int = 2  # each halves the sides: a code stands for 2^layers pixels a side (paper: 3)
    tokenizer_epochs: int = 4  # passes over the data for the tokenizer, before the others
    tokenizer_lr: float = 5e-3  # its learning rate, falling to 0; no warm-up (DALL-E: 1e-4)
    kl_weight: float = 0.02  # of the KL divergence of a position's codes from the uniform distribution
    arch: Arch = "vit_nano"  # encoder, 128 to 1280 wide (paper: vit_base, vit_large)
    layer_scale: float = 0.1  # start of LayerScale (paper: 0.1, vit_large 1e-5)
    drop_path: float = 0.0  # stochastic depth of the last block, 0 in the first (paper: 0.1)

    epochs: int = 8  # passes over the data (paper: 800)
    batch_size: int = 64  # images per step, of all processes together (paper: 2048)
    micro_batch_size: int = 0  # images per pass and process, 0: all; same gradient, BatchNorm apart
    lr: float = 1e-3  # learning rate (paper: 1.5e-3)
    weight_decay: float = 0.05  # strength of weight decay (paper: 0.05, not on biases and norms)
    warmup_epochs: float = 0.5  # linear from 0 (paper: 10)

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


def block_mask(grid, num_masked, rng, min_block=16):
    """Blockwise mask (BEiT's Algorithm 1, 2106.08254, by its code): bool (H, W), at most num_masked True, in
    blocks of about min_block patches up, the last ones smaller. rng: random.Random."""
    mask, missing, tries = torch.zeros(grid, dtype=torch.bool), num_masked, 0
    while missing > 0 and tries < 10:
        tries += 1
        area = rng.uniform(min_block, missing)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < grid[0] and width < grid[1]:
            top, left = rng.randint(0, grid[0] - height), rng.randint(0, grid[1] - width)
            block = mask[top : top + height, left : left + width]
            new = (~block).sum().item()
            if 0 < new <= missing:
                block.fill_(True)
                missing, tries = missing - new, 0
    return mask


def mask_view(pixels, grid, num_masked, min_block):
    """In the worker: a block mask for the image, by torch's random numbers. Uses block_mask."""
    rng = random.Random(torch.randint(2**31, ()).item())
    return block_mask(grid, num_masked, rng, min_block)


def jitter_colors(images, u, order, strength):
    """On the device: uint8 (B, 3, H, W) -> [0, 1], brightness, contrast, saturation, in `order`, times
    1 - strength to 1 + strength by uniform random numbers u (B, 3) of each image, as torchvision's."""
    factors = 1 + strength * (2 * u.view(-1, 3, 1, 1, 1) - 1)
    x = images.float() / 255
    for i in order:  # away from black, from the mean gray, from gray
        gray = v2.functional.rgb_to_grayscale(x)
        origin = (0 * gray, gray.mean(dim=(2, 3), keepdim=True), gray)[i]
        x = torch.lerp(origin, x, factors[:, i]).clamp(0, 1)
    return x


# --- Model --------------------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    """x + three convolutions of it, maps (B, D, H, W)."""

    def __init__(self, dim):
        super().__init__()
        first, second = (nn.Conv2d(dim, dim, 3, padding=1) for _ in "12")
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        return x + self.net(x)


class DVAE(nn.Module):
    """Discrete VAE in the official names: images (B, 3, H, W) in [-1, 1] <-> one of K codes (B, h, w) for
    each 2^layers pixels a side. Uses ResBlock."""

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

    def forward(self, images, noise, temperature):
        """Logits (B, K, h, w), and the image painted from softmax((logits + noise) / temperature), of Gumbel
        noise of this shape: soft forward and backward."""
        logits = self.encoder(images)
        shares = torch.softmax((logits + noise) / temperature, dim=1)
        return logits, self.decoder(torch.einsum("bkhw,kd->bdhw", shares, self.codebook.weight))


def gumbel_noise(seeds, shape, device):
    """(B, *shape), each row by its seed (B,): the same for any number of processes, and not drawn for all."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
    rows = [torch.empty(shape, device=device).exponential_(generator=g) for g in generators]
    return -torch.stack(rows).clamp(min=1e-9).log()


class RelativePositionBias(nn.Module):
    """Learnt bias (heads, 1 + N, 1 + N) of attention, row the query, by the offset of two patches of a square
    grid; [CLS] to patch, patch to [CLS] and [CLS] to itself have one each."""

    def __init__(self, side, heads):
        super().__init__()
        y, x = torch.arange(side**2) // side, torch.arange(side**2) % side
        span = 2 * side - 1
        index = (y[:, None] - y + side - 1) * span + x[:, None] - x + side - 1
        index = F.pad(index, (1, 0, 1, 0), value=span**2)
        index[1:, 0], index[0, 0] = span**2 + 1, span**2 + 2
        self.register_buffer("relative_position_index", index)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span**2 + 3, heads))

    def forward(self):
        return self.relative_position_bias_table[self.relative_position_index].movedim(2, 0)


class BEiTAttention(nn.Module):
    """Self-attention of tokens (B, N, D) with a bias (heads, N, N) of its logits. Keys have no bias, which
    would change nothing."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x, bias):
        shift = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, shift)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class BEiTBlock(nn.Module):
    """Pre-norm block of tokens (B, N, D) with LayerScale. Uses BEiTAttention."""

    def __init__(self, dim, heads, layer_scale=0.1, drop_path=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.drop_path = BEiTAttention(dim, heads), drop_path
        layers = OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(layers)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in "12")

    def forward(self, x, bias):
        y = self.gamma_1 * self.attn(self.norm1(x), bias)
        x = x + stochastic_depth(y, self.drop_path, "row", self.training)
        y = self.gamma_2 * self.mlp(self.norm2(x))
        return x + stochastic_depth(y, self.drop_path, "row", self.training)


VITS = {"vit_nano": (128, 6, 4), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6)}  # width, depth, heads
VITS |= {"vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}


class BEiT(nn.Module):
    """ViT of side x side patches in the official names, with one table of relative positions for all blocks.
    Uses VITS, BEiTBlock, BEiTAttention, RelativePositionBias."""

    def __init__(self, arch, side, patch_size, tokens, layer_scale=0.1, drop_path=0.0):
        super().__init__()
        dim, depth, heads = VITS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, dim)) for _ in "12")
        self.rel_pos_bias = RelativePositionBias(side, heads)
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(BEiTBlock(dim, heads, layer_scale, rate) for rate in rates)
        self.norm, self.lm_head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, tokens)

        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1 and not name.endswith("table"):
                nn.init.trunc_normal_(p, std=0.02, a=-0.02, b=0.02)  # cut at one deviation, as in the code
        for i, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data /= math.sqrt(2 * i)
            block.mlp.fc2.weight.data /= math.sqrt(2 * i)

    def forward(self, images, mask, return_tokens=False):
        """Logits (M, K) of the M patches where mask (B, H, W) is True, image by image, row by row; on request
        also tokens (B, 1 + N, D) of [CLS] and all patches."""
        mask = mask.flatten(1)
        x = self.patch_embed(images).flatten(2).mT
        x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias = self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        logits = self.lm_head(x[:, 1:][mask])
        return (logits, x) if return_tokens else logits


# --- Loss ---------------------------------------------------------------------------------------------------
def dvae_loss(logits, painted, images, kl_weight):
    """Squared error of what is painted + kl_weight x KL(q || uniform) of a position, in [0, ln K], q of
    the logits (B, K, h, w) without noise and temperature; and both parts."""
    log_q = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    kl = math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1).mean()
    error = (painted - images).square().mean()  # images are float32
    return error + kl_weight * kl, error, kl


def beit_loss(logits, codes, hidden):
    """Cross-entropy of logits (M, K) with codes (M,), summed, over `hidden`, the mean M of processes."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, codes, reduction="sum") / hidden


# --- Monitor ------------------------------------------------------------------------------------------------
def code_shares(codes, tokens):
    """Shares (K,) of the codes, and exp of their entropy, the perplexity: how many are in use."""
    shares = torch.bincount(codes.flatten(), minlength=tokens) / codes.numel()
    return shares, torch.special.entr(shares).sum().exp().item()


def tokenizer_monitor(codes, tokens, error, kl):
    """Metrics of codes (B, h, w) of a batch or chunk, of K = tokens, and of parts of dvae_loss; and what is
    wrong, {words: the metric that shows it}. Uses code_shares."""
    perplexity = code_shares(codes, tokens)[1]
    metrics = {"dvae/error": error.item(), "dvae/kl": kl.item(), "dvae/perplexity": perplexity}
    remedy = "lower --kl-weight" if kl < 0.1 else "raise --kl-weight, or lower --tokens"
    few = perplexity < tokens / 20
    return metrics, {f"few codes are in use; {remedy}": "dvae/perplexity"} if few else {}


def monitor(codes, pred, tokens, features):
    """Metrics of codes (B, H, W) of K = tokens, pred (B, H, W), -1 where nothing is hidden, and features
    (B, D) of a batch or chunk; and what is wrong, {words: the metric that shows it}.
    Uses code_shares, collapse_metrics."""
    hidden = pred >= 0
    accuracy = (pred == codes)[hidden].float().mean().item()
    shares, perplexity = code_shares(codes[hidden], tokens)
    majority = shares.max().item()
    metrics = {"beit/masked_accuracy": accuracy, "beit/majority": majority}
    metrics |= {"beit/codebook_perplexity": perplexity}
    for name, value in collapse_metrics(features, center=True).items():
        metrics[f"monitor/{name}"] = value

    problems = {}
    if accuracy <= majority + 3 * math.sqrt(majority * (1 - majority) / hidden.sum()):  # standard errors
        problems["no better than always the most frequent code; lower --lr"] = "beit/masked_accuracy"
    if perplexity < 2:
        problems["perplexity 1: one code is in use; train another tokenizer"] = "beit/codebook_perplexity"
    return metrics, problems


# --- Training -----------------------------------------------------------------------------------------------
def train(args: Args) -> dict:
    """Pretrain in the run folder, the tokenizer first, from their checkpoints; returns the last metrics."""
    most = dict.fromkeys(("min_scale", "color_jitter", "mask_ratio", "drop_path"), 1)
    check_flags(args, may_be_zero="color_jitter kl_weight drop_path", at_most=most)
    if args.image_size % args.patch_size:
        sys.exit(f"--image-size {args.image_size}: give a multiple of --patch-size {args.patch_size}")
    side = args.image_size // args.patch_size
    hidden = round(args.mask_ratio * side**2)
    if not 2 * args.min_block <= hidden < side**2:
        words = f"{hidden} of {side**2} patches to hide, must be twice --min-block {args.min_block}, not all"
        sys.exit(f"--mask-ratio {args.mask_ratio}: {words}")
    processes = rank, world, device, amp = start_processes(args.device, args.amp)
    crop = random_crop(args.image_size, args.min_scale)
    blocks = partial(mask_view, grid=(side, side), num_masked=hidden, min_block=args.min_block)
    shortest = args.image_size / (0.75 * args.min_scale) ** 0.5  # even a crop of 3 : 4 is not enlarged
    data = Images(args, (crop, blocks), shortest)
    micro = images_per_pass(args, len(data.items), world)

    torch.manual_seed(args.seed)
    width = args.tokenizer_dim
    tokenizer = DVAE(args.tokens, 2 * width, width, args.tokenizer_layers).to(device)
    if args.dvae:
        load_encoder(tokenizer.state_dict(), args.dvae, {}, "--dvae", "an earlier run")
    model = BEiT(args.arch, side, args.patch_size, args.tokens, args.layer_scale, args.drop_path).to(device)
    left_out = ("lm_head", "mask_token", "rel_pos_bias.relative_position_index")
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(left_out)}
    dim, depth, heads = VITS[args.arch]
    shape = {"img_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0}
    shape |= {"embed_dim": dim, "depth": depth, "num_heads": heads, "init_values": args.layer_scale}
    shape |= {"global_pool": "token", "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    facts = {"builder": "timm.Beit", "arch_args": shape, "feature_dim": dim}  # for backbone.pt
    if args.init:
        load_encoder(encoder, args.init, shape)

    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name == "cls_token"]
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "cls_token"]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    groups += [{"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = open_run(args, "beit", parts, len(data.items), amp)  # loads its checkpoint into the parts
    if args.epochs and not args.dvae:
        train_tokenizer(args, tokenizer, run.folder / "tokenizer", data, micro, processes)
    tokenizer.requires_grad_(False)
    return train_beit(args, tokenizer, run, encoder, facts, data, micro, processes)


def train_tokenizer(args, tokenizer, folder, data, micro, processes):
    """First stage: the tokenizer, in this folder, from its checkpoint if it has one."""
    rank, world, device, amp = processes
    optimizer = torch.optim.AdamW(tokenizer.parameters(), args.tokenizer_lr, weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    parts = {"model": tokenizer, "optimizer": optimizer, "scaler": scaler}
    run = open_run(replace(args, run_dir=str(folder)), "dvae", parts, len(data.items), amp)
    step = run.step
    total = args.tokenizer_epochs * run.per_epoch
    shape = {"tokens": args.tokens, "code_dim": 2 * args.tokenizer_dim}
    shape |= {"hidden_dim": args.tokenizer_dim, "layers": args.tokenizer_layers}
    facts = {"builder": "beit.DVAE", "arch_args": shape, "feature_dim": 2 * args.tokenizer_dim}
    net = nn.parallel.DistributedDataParallel(tokenizer) if world > 1 else tokenizer

    keys = data.batches(args.batch_size, step, args.tokenizer_epochs, rank, world)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(data, batch_sampler=keys, pin_memory=device.type == "cuda", **workers)
    side = args.image_size // args.patch_size
    size = side * 2**args.tokenizer_layers

    with guarded(run, total, last=False) as signals:
        for crops, _, _ in loader:
            lr = cosine_schedule(step, total, 0, args.tokenizer_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # cold after 0.3 of the steps, or the shares and not the codes carry the image
            temperature = cosine_schedule(min(step / total, 0.3), 0.3, 0, 1.0, 1 / 16)
            kl_weight = args.kl_weight * min(1.0, 10 * step / total)

            generator = seeded(3, args.seed, step)  # 1: crops and masks, 2: order of the images
            u = torch.rand(args.batch_size, 3, generator=generator).chunk(world)[rank]
            order = torch.randperm(3, generator=generator).tolist()
            seeds = torch.randint(2**62, (args.batch_size,), generator=generator).chunk(world)[rank]
            crops, u = (rows.to(device, non_blocking=True) for rows in (crops, u))
            pixels = jitter_colors(crops, u, order, args.color_jitter)
            pixels = 2 * F.interpolate(pixels, (size, size), mode="bilinear", antialias=True) - 1
            chunks = [*zip(pixels.split(micro), seeds.split(micro), strict=True)]

            optimizer.zero_grad()
            loss = 0.0
            for i, (images, image_seeds) in enumerate(chunks):
                net.require_backward_grad_sync = i == len(chunks) - 1  # DDP's mean, once a step
                noise = gumbel_noise(image_seeds, (args.tokens, side, side), device)
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    logits, painted = net(images, noise, temperature)
                total_loss, error, kl = dvae_loss(logits, painted, images, kl_weight)
                part = total_loss / len(chunks)  # chunks are of one size
                scaler.scale(part).backward()
                loss = loss + part.detach()

            step += 1
            run.bar.update()
            at_log = step == 1 or step % args.log_every == 0 or step == total
            scaler.unscale_(optimizer)
            if at_log or signals:  # only here does a step wait for the device, float16's scaler apart
                loss = gather(loss[None]).mean()
                grad_norm = torch.stack([p.grad.norm() for p in tokenizer.parameters()]).norm()
                check_finite(step, loss, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()

            saves = at_log and time.monotonic() >= run.save_at
            if at_log:  # error, KL and codes: of the last chunk
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                error, kl = gather(torch.stack([error, kl]).detach()[None]).mean(dim=0)
                found, problems = tokenizer_monitor(gather(logits.argmax(dim=1)), args.tokens, error, kl)
                log_metrics(run, step, metrics | found, problems, int(0.3 * total))

            if rank == 0 and (saves or step in (1, total)):
                rows = torch.cat([images[:8], painted.detach()[:8]]) / 2 + 0.5
                torchvision.utils.save_image(rows, run.folder / "painted.png", nrow=len(rows) // 2)
            if saves:
                save_run(run, step, tokenizer.state_dict(), **facts)
            if signals:
                break

        save_run(run, step, tokenizer.state_dict(), **facts)


def train_beit(args, tokenizer, run, encoder, facts, data, micro, processes):
    """Second stage: the run's model, with the tokenizer's codes as targets; returns the last metrics."""
    rank, world, device, amp = processes
    model, optimizer, scaler = run.parts.values()
    step = run.step
    total = args.epochs * run.per_epoch
    warmup = min(total, round(args.warmup_epochs * run.per_epoch))
    alarm_from = max(warmup, min(500, total // 5))
    if args.compile:
        model.compile()
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    keys = data.batches(args.batch_size, step, args.epochs, rank, world)
    workers = {"num_workers": args.workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(data, batch_sampler=keys, pin_memory=device.type == "cuda", **workers)
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (MEAN, STD))
    size = args.image_size // args.patch_size * 2**args.tokenizer_layers
    if rank == 0:
        print(f"{args.arch}, {amp}, {world} x {device}, effective learning rate {args.lr:g}, {total} steps")

    with guarded(run, total) as signals:  # torchrun: none; adds run.bar, save_at
        for crops, masks, _ in loader:  # all epochs that are left
            lr = cosine_schedule(step, total, warmup, args.lr, args.lr / 150)  # the official 1e-5 of 1.5e-3
            if step < warmup:  # in the official code the line is at its end one step earlier
                lr *= warmup / max(1, warmup - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr

            generator = seeded(3, args.seed, step)
            u = torch.rand(args.batch_size, 3, generator=generator).chunk(world)[rank]
            order = torch.randperm(3, generator=generator).tolist()
            crops, u, masks = (rows.to(device, non_blocking=True) for rows in (crops, u, masks))
            pixels = jitter_colors(crops, u, order, args.color_jitter)
            if step == 0 and rank == 0:
                torchvision.utils.save_image(pixels[:32], run.folder / "views.png")
            hidden = gather(masks.sum()[None]).sum().clamp(min=1)  # patches, of all processes
            chunks = [*zip(pixels.split(micro), masks.split(micro), strict=True)]
            torch.manual_seed(seeded(4, args.seed, step, rank).initial_seed())  # of stochastic depth

            optimizer.zero_grad()
            loss = 0.0
            for i, (images, mask) in enumerate(chunks):
                net.require_backward_grad_sync = i == len(chunks) - 1  # DDP's mean, once a step
                reduced = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
                codes = tokenizer.encoder(2 * reduced - 1).argmax(dim=1)
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    logits, tokens = net((images - mean) / std, mask, return_tokens=True)
                part = beit_loss(logits, codes[mask], hidden / world)
                scaler.scale(part).backward()
                loss = loss + part.detach()

            step += 1
            run.bar.update()
            at_log = step == 1 or step % args.log_every == 0 or step == total
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            if at_log or signals:
                loss = gather(loss[None]).mean()
                check_finite(step, loss, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()

            if at_log:  # codes, pred and features: of the last chunk
                metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item()}
                pred = torch.full_like(codes, -1).masked_scatter(mask, logits.argmax(dim=1))
                features = gather(tokens.detach()[:, 1:].mean(dim=1))
                found, problems = monitor(gather(codes), gather(pred), args.tokens, features)
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
