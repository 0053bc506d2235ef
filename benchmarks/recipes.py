"""Which recipe learns most from small data? Many of dino.py, dinov2.py or ijepa.py trained at once on a GPU.

    python benchmarks/recipes.py dino --data cifar10-photos --batch-size 128 --epochs 15 --seconds 100

Recipes are drawn at random and trained side by side as lanes of one stacked network (torch.func.vmap), by the
script's own modules and augmentation, on the same crops; a step is one CUDA graph. Chosen on a fifth of the
training photos; the best and the default then train again from three seeds and meet the test photos once.
Not as in train(): crops by bicubic sampling on the device; masks of dinov2.py from a pool of 300 batches.
Without a GPU it runs, too, for tests. Images are those of DATA/train/CLASS and DATA/val/CLASS, all of a size.
"""

import importlib
import json
import math
import os
import random
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = {"dino": (3e-4, 8e-3), "dinov2": (3e-4, 4e-3), "ijepa": (3e-4, 4e-3)}  # of AdamW
DEFAULTS = {"rate": 1e-3, "momentum": 0.99, "end": 1.0, "decay": 0.4, "T": 0.02, "start": 0.0, "warm": 0.0}
DEFAULTS |= {"T_s": 0.1, "K": 1024, "center": 0.9, "sinkhorn": 0, "ibot": 1.0, "koleo": 0.1}


def draw(method, rng):
    """A recipe: what differs from DEFAULTS. end: of the momentum; start, warm: of T_t, for that share."""
    low, high = RATES[method]
    recipe = {"rate": round(low * (high / low) ** rng.random(), 6), "decay": rng.choice([0.04, 0.4])}
    recipe["momentum"] = rng.choice([0.98, 0.99, 0.996, 0.999] if method == "ijepa" else [0.97, 0.99, 0.996])
    if rng.random() < 0.3:
        recipe["end"] = recipe["momentum"]
    if method == "ijepa":
        return recipe

    recipe |= {"T": rng.choice([0.01, 0.02, 0.03, 0.04]), "K": rng.choice([64, 256, 1024])}
    recipe |= {"T_s": rng.choice([0.1, 0.1, 0.2]), "center": rng.choice([0.9, 0.9, 0.97])}
    recipe["sinkhorn"] = int(rng.random() < 0.33)
    if rng.random() < 0.25:
        recipe |= {"start": 2 * recipe["T"], "warm": 0.3}
    if method == "dinov2":
        recipe |= {"ibot": rng.choice([0.3, 1.0, 1.0]), "koleo": rng.choice([0.1, 0.1, 0.5])}
    return recipe


def photos(folder):
    """uint8 (N, 3, S, S) and labels of FOLDER/CLASS/*.jpg, on the device."""
    files = sorted(Path(folder).rglob("*.jpg"))
    classes = sorted({file.parent.name for file in files})
    pixels = [np.array(Image.open(file).convert("RGB")) for file in files]
    labels = [classes.index(file.parent.name) for file in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images.to(DEVICE), torch.tensor(labels, device=DEVICE)


def cropped(images, size, low, high):
    """RandomResizedCrop and flip of uint8 (B, 3, S, S), by bicubic sampling."""
    b, side = len(images), images.shape[3]
    area = (low + (high - low) * torch.rand(b, 10, device=DEVICE)) * side**2
    ratio = torch.exp((2 * torch.rand(b, 10, device=DEVICE) - 1) * math.log(4 / 3))
    sizes = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (sizes[0] <= side) & (sizes[1] <= side)
    first, none = fits.float().argmax(dim=1, keepdim=True), ~fits.any(dim=1)
    at, grids = torch.arange(size, device=DEVICE) + 0.5, []
    for length in (torch.where(none, float(side), choice.gather(1, first)[:, 0]) for choice in sizes):
        start = (torch.rand(b, device=DEVICE) * (side - length + 1)).floor()
        grids.append(2 * (start[:, None] + at * length[:, None] / size) / side - 1)
    x = torch.where(torch.rand(b, 1, device=DEVICE) < 0.5, grids[0].flip(1), grids[0])
    grid = torch.stack([x[:, None].expand(b, size, size), grids[1][:, :, None].expand(b, size, size)], dim=3)
    return F.grid_sample(images.float(), grid, "bicubic", "border", align_corners=False).round().clamp(0, 255)


class Patches(nn.Module):
    """The patch embedding as a matrix product, which vmap turns into a fast one."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias, self.side = conv.weight, conv.bias, conv.kernel_size[0]

    def forward(self, x):
        x = F.unfold(x, self.side, stride=self.side).mT  # (B, N, 3 p p)
        x, side = F.linear(x, self.weight.flatten(1), self.bias).mT, math.isqrt(x.shape[1])
        return x.unflatten(2, (side, side))


class Lanes:
    """N networks as one, with AdamW; rates and decays (N,)."""

    def __init__(self, networks):
        for network in networks:
            for module in [m for m in network.modules() if isinstance(getattr(m, "proj", None), nn.Conv2d)]:
                module.proj = Patches(module.proj)
        self.base = deepcopy(networks[0]).to("meta")
        stacked, _ = stack_module_state(networks)
        learns = {name for name, p in networks[0].named_parameters() if p.requires_grad}
        self.params = {k: p.detach().to(DEVICE).requires_grad_(k in learns) for k, p in stacked.items()}
        self.moments = {k: torch.zeros(2, *self.params[k].shape, device=DEVICE) for k in learns}
        self.steps = torch.zeros((), device=DEVICE)

    def __call__(self, *inputs, part=""):
        """Outputs of all lanes of the network, or of its part, for the same inputs."""
        base = self.base.get_submodule(part) if part else self.base
        prefix = f"{part}." if part else ""
        names = [k for k in self.params if k.startswith(prefix)]
        params = {k.removeprefix(prefix): self.params[k] for k in names}
        dims = (0, *(None for _ in inputs))
        return vmap(lambda p, *x: functional_call(base, p, x), in_dims=dims)(params, *inputs)

    @torch.no_grad()
    def step(self, rate, decay, clip, scale_of, groups):
        """AdamW in place, without waiting for the host. groups: prefixes clipped together, () for none."""
        self.steps += 1
        grads = {k: p.grad for k, p in self.params.items() if p.grad is not None}
        norms = {k: g.flatten(1).norm(dim=1) for k, g in grads.items()}
        for prefix in groups:
            together = [k for k in norms if k.startswith(prefix)]
            norm = torch.stack([norms[k] for k in together]).norm(dim=0)
            norms |= dict.fromkeys(together, norm)
        for k, g in grads.items():
            p, (m, v) = self.params[k], self.moments[k]
            shape = -1, *[1] * (p.ndim - 1)
            g = g * (clip / (norms[k] + 1e-6)).clamp(max=1).view(shape)
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            lr = (rate * scale_of(k)).view(shape)
            if p.ndim > 2:  # a stacked matrix
                p.mul_(1 - lr * decay.view(shape))
            root = (v / (1 - 0.999**self.steps)).sqrt() + 1e-8
            p.sub_(lr * m / (1 - 0.9**self.steps) / root)
            p.grad = None

    @torch.no_grad()
    def follow(self, other, prefix, momentum):
        for k, p in self.params.items():
            p.add_((1 - momentum).view(-1, *[1] * (p.ndim - 1)) * (other.params[prefix + k] - p))


def accuracies(features, train, labels, test, answers):
    """[[ridge regression, k-NN with k = 20] of each lane] of features (L, N, D) at rows train, test, in %."""
    rows = []
    for x in features.double():
        z = (x - x[train].mean(dim=0)) / (x[train].std(dim=0) + 1e-8)
        z = F.pad(z, (0, 1), value=1.0)
        known, ridge = z[train], 0.003 * len(train) * torch.eye(z.shape[1], device=DEVICE, dtype=z.dtype)
        weights = torch.linalg.solve(known.T @ known + ridge, known.T @ F.one_hot(labels).double())
        near = F.normalize(x, dim=1)
        similarity, nearest = (near[test] @ near[train].T).topk(20)
        votes = torch.zeros_like(z[test] @ weights).scatter_add_(
            1, labels[nearest], (similarity / 0.07).exp()
        )
        for scores in (z[test] @ weights, votes):
            rows.append((scores.argmax(dim=1) == answers).float().mean())
    return (100 * torch.stack(rows).double().view(-1, 2)).round(decimals=1).tolist()


class Search:
    """Of one method: its networks, losses and images."""

    def __init__(self, method, data, flags):
        self.method, self.module = method, importlib.import_module(method)
        self.args = self.module.Args(**flags)
        self.images, self.labels = photos(f"{data}/train")
        self.test_images, self.answers = photos(f"{data}/val")
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(5)).to(DEVICE)
        self.learn, self.choose = order.split([len(order) - len(order) // 5, len(order) // 5])
        numbers = self.module.MEAN, self.module.STD
        self.mean, self.std = (torch.tensor(x, device=DEVICE).view(3, 1, 1) for x in numbers)

    def network(self, seed):
        torch.manual_seed(seed)
        args, sizes = self.args, (self.args.arch, self.args.image_size, self.args.patch_size)
        if self.method == "dino":
            return self.module.DINO(*sizes, args.out_dim, args.head_dim, True, 0.0).student
        return self.module.DINOv2(args) if self.method == "dinov2" else self.module.IJEPA(*sizes)

    def features(self, images):
        found = []
        with torch.no_grad():
            for part in ((images / 255 - self.mean) / self.std).split(500):
                if self.method == "ijepa":
                    found.append(self.teacher(part).mean(dim=2))
                else:
                    x = self.teacher(part, part="backbone")
                    found.append(x if self.method == "dino" else x[:, :, 0])
        return torch.cat(found, dim=1)

    def targets(self, logits, center, padding=None):
        """(L, R, K) of the lanes' own temperatures, prototypes and centring."""
        q = ((logits - center) / self.state["T"]).masked_fill(self.unused, -1e9).softmax(dim=-1)
        if self.any_sinkhorn:
            log_q = (logits / self.state["T"]).masked_fill(self.unused, -1e9)
            for _ in range(3):
                rows = log_q if padding is None else log_q.masked_fill(padding, -1e9)
                log_q = log_q - rows.logsumexp(dim=1, keepdim=True)
                log_q = log_q.masked_fill(self.unused, -1e9).log_softmax(dim=-1)
            q = torch.where(self.lanes["sinkhorn"] > 0, log_q.exp(), q)
        return q

    def log_p(self, logits):
        return (logits / self.lanes["T_s"]).masked_fill(self.unused, -1e9).log_softmax(dim=-1)

    def loss(self, *inputs):
        """(L,) of a step; moves the centres."""
        if self.method == "ijepa":
            images, context, targets = inputs
            with torch.no_grad():
                tokens = self.teacher(images)
                rows = F.layer_norm(tokens, tokens.shape[-1:])
                target = vmap(lambda x: self.module.apply_masks(x, targets))(rows)
            pred = self.student(images, context, targets)
            return F.smooth_l1_loss(pred, target, reduction="none").mean(dim=(1, 2, 3))

        large, *local = inputs
        views, keep = 2 + self.args.local_crops, self.lanes["center"]
        if self.method == "dino":
            with torch.no_grad():
                taught = self.teacher(large)
                q = self.targets(taught, self.centers[0])
                self.centers[0].lerp_(taught.mean(dim=1, keepdim=True), 1 - keep)
            logits = torch.cat([self.student(x) for x in inputs], dim=1)
            log_p, q = (x.unflatten(1, (-1, self.args.batch_size)) for x in (self.log_p(logits), q))
            others = log_p.sum(dim=1, keepdim=True) - log_p[:, :2]
            return -(q * others).sum(dim=-1).mean(dim=(1, 2)) / (views - 1)

        masks, weights, hidden = (self.state[name] for name in ("masks", "weights", "hidden"))
        padding = (weights == 0)[None, :, None]
        with torch.no_grad():
            _, cls, patches = self.teacher(large, None, hidden)
            q = self.targets(cls, self.centers[0]), self.targets(patches, self.centers[1], padding)
            self.centers[0].lerp_(cls.mean(dim=1, keepdim=True), 1 - keep)
            real = (~padding).float()
            mean = (patches * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
            self.centers[1].lerp_(mean, 1 - keep)
        h, cls, patches = self.student(large, masks, hidden, *local)
        log_p, crops = (x.unflatten(1, (-1, self.args.batch_size)) for x in (self.log_p(cls), q[0]))
        pairs = -torch.einsum("lubk,lvbk->luv", crops, log_p) / self.args.batch_size
        dino = pairs[:, :, 2:].sum(dim=(1, 2)) + pairs[:, 0, 1] + pairs[:, 1, 0]
        ibot = -(weights[:, None] * q[1] * self.log_p(patches)).sum(dim=(1, 2))
        koleo = sum(vmap(self.module.koleo_loss)(x) for x in h.chunk(2, dim=1))
        parts = self.lanes["ibot"].flatten() * ibot, self.lanes["koleo"].flatten() * koleo
        return dino / (2 + max(2 * (views - 2), 1)) + sum(parts)

    def step(self, *inputs):
        loss = self.loss(*inputs)
        loss.sum().backward()
        self.losses.copy_(loss.detach())
        state, clip, groups = self.state, 1e9 if self.method == "ijepa" else 3.0, ()
        if self.method == "dinov2":
            groups = "backbone", "dino_head", "ibot_head"

        def scale_of(name):
            if "last_layer" in name:
                return state["thawed"]
            return 0.2 if self.method == "dinov2" and "patch_embed" in name else 1.0

        self.student.step(state["rate"], state["decay"], clip, scale_of, groups)
        self.teacher.follow(self.student, "encoder." if self.method == "ijepa" else "", state["momentum"])

    def inputs(self, batch, step):
        """What the network sees of images, and the shapes by which steps differ."""
        args, module = self.args, self.module
        if self.method == "ijepa":
            x = (cropped(batch, args.image_size, args.min_scale, 1.0) / 255 - self.mean) / self.std
            side = args.image_size // args.patch_size
            rules = args.targets, args.target_scale, min(10, side**2 // 4)
            masks = module.multiblock_masks(side, len(batch), module.seeded(3, 7, step), *rules)
            return [x, *(mask.to(DEVICE) for mask in masks)]
        crops = [cropped(batch, args.image_size, args.min_scale, 1.0) for _ in range(2)]
        small = args.local_size, args.local_min_scale, args.min_scale
        crops += [cropped(batch, *small) for _ in range(args.local_crops)]
        u, order = torch.rand(len(crops), len(batch), 9, device=DEVICE), [*torch.randperm(4).tolist(), 4]
        return [(x - self.mean) / self.std for x in module.augment_crops(crops, u, order, args)]

    def mask_pool(self, count=300):
        """Masks, weights, places of hidden patches of dinov2.py, places padded to one length by weight 0."""
        args, pool, crops = self.args, [], 2 * self.args.batch_size
        grid = (args.image_size // args.patch_size,) * 2
        for i in range(count):
            seed = self.module.seeded(5, 0, i).initial_seed()
            masks = self.module.draw_masks(crops, range(crops), grid, args.mask_ratios, 0.5, seed)
            counts = masks.sum(dim=1)
            weights = 1 / (crops * counts.repeat_interleave(counts))
            pool.append((masks, weights, masks.flatten().nonzero()[:, 0]))
        longest = max(len(weights) for _, weights, _ in pool)
        padded = [(m, *(F.pad(x, (0, longest - len(x))) for x in rest)) for m, *rest in pool]
        return [[x.to(DEVICE) for x in masks] for masks in padded]

    def train(self, recipes, seeds, data_seed, seconds):
        """All lanes -> lines; fewer steps than the epochs have if the seconds do not suffice."""
        started, args = time.time(), self.args
        per_epoch = len(self.images) // args.batch_size
        total, warmup = args.epochs * per_epoch, round(args.warmup_epochs * per_epoch)
        networks = [self.network(seed) for seed in seeds]
        self.student = Lanes(networks)
        self.teacher = Lanes([net.encoder for net in networks] if self.method == "ijepa" else networks)
        for p in self.teacher.params.values():
            p.requires_grad_(False)
        columns = {k: [float({**DEFAULTS, **recipe}[k]) for recipe in recipes] for k in DEFAULTS}
        self.lanes = {k: torch.tensor(column, device=DEVICE).view(-1, 1, 1) for k, column in columns.items()}
        lane = {k: column.flatten() for k, column in self.lanes.items()}
        self.any_sinkhorn = bool(lane["sinkhorn"].any())
        prototypes = getattr(args, "out_dim", 1)
        self.unused = torch.arange(prototypes, device=DEVICE) >= self.lanes["K"]
        self.centers = torch.zeros(2, len(recipes), 1, prototypes, device=DEVICE)
        self.losses = torch.zeros(len(recipes), device=DEVICE)
        names = "rate", "decay", "momentum"
        self.state = {k: torch.zeros(len(recipes), device=DEVICE) for k in names}
        self.state |= {"T": self.lanes["T"].clone(), "thawed": torch.zeros((), device=DEVICE)}
        pool = self.mask_pool() if self.method == "dinov2" else [()]
        self.state |= dict(zip(("masks", "weights", "hidden"), (x.clone() for x in pool[0]), strict=False))
        torch.manual_seed(1000 + data_seed)
        graphs, memory, order, step, settled = {}, None, [], 0, 0.0

        while step < total:
            order = (
                order or [*torch.randperm(len(self.images), device=DEVICE).split(args.batch_size)][:per_epoch]
            )
            inputs = self.inputs(self.images[order.pop()], step)
            at = step + (self.method == "ijepa")
            factor = self.module.cosine_schedule(at, total, warmup, 1.0)
            if at < warmup and self.method != "ijepa":  # officially it ends a step earlier
                factor *= warmup / max(1, warmup - 1)
            half = (1 + math.cos(math.pi * step / total)) / 2
            along = 1 - step / total if self.method == "ijepa" else half
            self.state["rate"].copy_(lane["rate"] * factor)
            self.state["decay"].copy_(lane["decay"] + (0.04 - lane["decay"]) * half)
            self.state["momentum"].copy_(lane["end"] + (lane["momentum"] - lane["end"]) * along)
            share = (step / total / self.lanes["warm"].clamp(min=1e-9)).clamp(max=1)
            warming = self.lanes["start"] + (self.lanes["T"] - self.lanes["start"]) * share
            self.state["T"].copy_(torch.where(self.lanes["warm"] > 0, warming, self.lanes["T"]))
            self.state["thawed"].fill_(float(step >= getattr(args, "freeze_last_layer", 0) * per_epoch))
            for name, x in zip(("masks", "weights", "hidden"), pool[step % len(pool)], strict=False):
                self.state[name].copy_(x)

            key = tuple(x.shape for x in inputs)
            if DEVICE == "cpu":
                self.step(*inputs)
            elif step < 3:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.step(*inputs)
                torch.cuda.current_stream().wait_stream(stream)
            else:
                if key not in graphs:
                    graphs[key] = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graphs[key][0], pool=memory):
                        self.step(*graphs[key][1])
                    memory = memory or graphs[key][0].pool()
                for place, x in zip(graphs[key][1], inputs, strict=True):
                    place.copy_(x)
                graphs[key][0].replay()

            step += 1
            if step == 60:
                settled = self.losses.sum().item() * 0 + time.time()  # waits for the device
            if step == 300:
                pace = (self.losses.sum().item() * 0 + time.time() - settled) / 240
                total = min(total, max(400, step + int((seconds - (time.time() - started) - 3) / pace)))
                print(f"{1e3 * pace:.1f} ms a step, {total} steps", flush=True)

        trained, tested = self.features(self.images), self.features(self.test_images)
        chosen_on = accuracies(
            trained, self.learn, self.labels[self.learn], self.choose, self.labels[self.choose]
        )
        rows = torch.arange(len(trained[0]) + len(tested[0]), device=DEVICE).split(
            [len(trained[0]), len(tested[0])]
        )
        test = accuracies(torch.cat([trained, tested], dim=1), rows[0], self.labels, rows[1], self.answers)
        steps = {"steps": step, "of": args.epochs * per_epoch}
        lines = zip(recipes, seeds, chosen_on, test, self.losses.tolist(), strict=True)
        names = "recipe", "seed", "chosen_on", "test", "loss"
        return [steps | dict(zip(names, line, strict=True)) for line in lines]


def main(
    method: tyro.conf.Positional[Literal["dino", "dinov2", "ijepa"]],
    data: str,
    batch_size: int = 64,
    epochs: int = 15,
    patch_size: int = 8,
    count: int = 24,
    finalists: int = 3,
    seed: int = 0,
    seconds: float = 100.0,
    to: str = "recipes.jsonl",
):
    """--count recipes beside the default, half of --seconds; then the --finalists and it from three seeds."""
    F.scaled_dot_product_attention = lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    search = Search(method, data, {"batch_size": batch_size, "epochs": epochs, "patch_size": patch_size})
    rng, default = random.Random(seed), {"momentum": 0.996} if method == "ijepa" else {}
    recipes = [default, *(draw(method, rng) for _ in range(count))]
    lines = search.train(recipes, [0] * len(recipes), 0, seconds / 2)
    lines.sort(key=lambda line: -line["chosen_on"][0] - 0.3 * line["chosen_on"][1])
    best = [line["recipe"] for line in lines[:finalists]]
    best += [default] if default not in best else []
    finals = search.train([r for r in best for _ in range(3)], [1, 2, 3] * len(best), 1, seconds / 2)

    with open(to, "a") as file:
        for line in [line | {"test": None} for line in lines] + finals:  # these meet the test photos
            line |= {"method": method, "batch_size": batch_size, "patch_size": patch_size}
            file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
