"""Speed of our data pipeline and training steps beside published implementations, in turn in one run.

    python benchmarks/throughput.py [--rounds 9] [--only dino] [--data FOLDER_WITH_PHOTOS]

Pipeline: milliseconds of one thread's processor time an image, decoding included: what a worker does, what is
left to the device, here the CPU, and one decoding alone, the floor. The peer does all in its worker.
Step: images a second of forward, loss, backward, optimiser and moving average on ready views, all cores.
Same images, network, batch, threads; medians over the rounds, and the ratio to the peer.
"""

import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision
import tyro
from lightly.models.utils import update_momentum
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers import PEERS, Peer, optimizer_of, peer_step, timm_vit  # noqa: E402

import beit  # noqa: E402
import byol  # noqa: E402
import clip  # noqa: E402
import dino  # noqa: E402
import dinov2  # noqa: E402
import ijepa  # noqa: E402
import mae  # noqa: E402
import moco  # noqa: E402
import moco_v3  # noqa: E402
import simclr  # noqa: E402


def medians(contestants, rounds, clock):
    """{name: function} -> {name: median seconds}, the functions called in turn after one warm-up each."""
    times = {name: [] for name in contestants}
    for round in range(rounds + 1):
        for name, function in contestants.items():
            start = clock()
            function()
            if round:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# Pipeline


def write_photos(folder, data, size, count):
    """JPEGs of this size: enlarged photos of --data, or of the built-in images."""
    files = sorted(Path(data).rglob("*.jpg"))[:count] if data else []
    images = [Image.open(file) for file in files] or [simclr.demo_image(i)[0] for i in range(count)]
    for i, image in enumerate(images):
        image.convert("RGB").resize(size, Image.BICUBIC).save(Path(folder, f"{i:03d}.jpg"), quality=90)


def decode(folder):
    return [Image.open(file).convert("RGB") for file in sorted(Path(folder).iterdir())]


def read(images):
    return (images[i][:-1] for i in range(len(images.items)))


def two_views(folder, side):
    """SimCLR's recipe, at 32 px that of CIFAR -> worker, device side, peer."""
    from lightly.transforms import SimCLRTransform

    strength, blur = (1.0, 0.5) if side == 224 else (0.5, 0.0)
    args = simclr.Args(data=folder, image_size=side, min_scale=0.08)
    crop, jitter = simclr.random_crop(side, 0.08), [strength * s for s in (0.8, 0.8, 0.8, 0.2)]
    images = simclr.Images(args, (crop, crop), side / (0.75 * 0.08) ** 0.5)
    theirs = SimCLRTransform(side, cj_strength=strength, gaussian_blur=blur, min_scale=0.08)
    batch = torch.stack([view for views in read(images) for view in views])
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (simclr.MEAN, simclr.STD))

    def device():
        u, order = torch.rand(len(batch), 9), [*torch.randperm(4).tolist(), 4]
        return (simclr.augment(batch, u, order, jitter, blur, side // 20 if blur else 0) - mean) / std

    return lambda: [*read(images)], device, lambda: [theirs(image) for image in decode(folder)]


def ten_crops(folder):
    """DINO's recipe: two crops of 224 px, eight of 96 px."""
    from lightly.transforms import DINOTransform

    args = dino.Args(data=folder, image_size=224, local_size=96, local_crops=8, crop_blurs=(1.0, 0.1, 0.5))
    args.min_scale, args.local_min_scale = 0.25, 0.05
    images = dino.Images(args, *dino.multi_crop(args))
    scales = {"global_crop_scale": (0.25, 1.0), "local_crop_scale": (0.05, 0.25)}
    theirs = DINOTransform(**scales, n_local_views=8, cj_strength=0.5)
    views = [torch.stack(views) for views in zip(*read(images), strict=True)]

    def device():
        u, order = torch.rand(len(views), len(views[0]), 9), [*torch.randperm(4).tolist(), 4]
        return dino.augment_crops(views, u, order, args)

    return lambda: [*read(images)], device, lambda: [theirs(image) for image in decode(folder)]


def pipelines(data, count, rounds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(
        "\nms of one thread an image         decoding   worker   device     peer   worker / peer, all / peer"
    )
    for size, views, number in (
        ((500, 375), "two views of 224", count),
        ((4000, 3000), "two views of 224", count // 8),
        ((500, 375), "ten crops of 224 and 96", count // 4),
        ((32, 32), "two views of 32", count),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write_photos(folder, data, size, number)
            made = ten_crops(folder) if "ten" in views else two_views(folder, int(views[-3:]))
            contestants = dict(zip(("worker", "device", "peer"), made, strict=True))
            contestants = {"decoding": lambda folder=folder: decode(folder)} | contestants
            times = medians(contestants, rounds, time.process_time)
        ms = [1e3 * t / number for t in times.values()]
        ratios = ms[1] / ms[3], (ms[1] + ms[2]) / ms[3]
        print(f"{size[0]} x {size[1]}, {views:24}", *(f"{t:8.2f}" for t in (*ms, *ratios)))
    torch.set_num_threads(threads)


# Steps: ours as in train(); peers.py has those of lightly


def our_simclr(args):
    model = simclr.SimCLR(args.arch)

    def loss(views):
        z = model(torch.cat(views))[0].unflatten(0, (2, -1))
        return simclr.nt_xent(*z, args.temperature)

    return Peer(model, loss)


def our_moco(args):
    model = moco.MoCo(args.arch, queue_size=args.queue_size)

    def loss(views):
        q, places = model(views[0])[0], torch.randperm(len(views[0]))
        with torch.no_grad():
            k = model(views[1][places], keys=True)[0][places.argsort()]
        result = moco.info_nce(q, k, model.queue.clone(), args.temperature)
        moco.enqueue(model.queue, model.queue_ptr, k)
        return result

    return Peer(model, loss, averages=((model.encoder_q, model.encoder_k),))


def our_byol(args):
    model = byol.BYOL(args.arch, hidden_dim=args.hidden_dim)

    def loss(views):
        predictions = [model(view)[0] for view in views]
        with torch.no_grad():
            targets = [model.target(view) for view in views]
        return byol.byol_loss(predictions[0], targets[1]) + byol.byol_loss(predictions[1], targets[0])

    return Peer(model, loss, averages=((model.online, model.target),))


def our_dino(args):
    shape = (args.image_size, args.patch_size, args.out_dim, args.head_dim, args.norm_last_layer)
    model = dino.DINO(args.arch, *shape, args.drop_path)

    def loss(views):
        batches = [torch.cat(views[:2]), torch.cat(views[2:])]
        with torch.no_grad():
            targets = model.teacher(batches[0]).unflatten(0, (2, -1))
        logits = torch.cat([model.student(images) for images in batches]).unflatten(0, (len(views), -1))
        result = dino.dino_loss(logits, targets, model.center, args.student_temp, args.teacher_temp)
        dino.update_center(model.center, targets, 0.9)
        return result

    return Peer(model, loss, averages=((model.student, model.teacher),))


def our_mae(args, mask_ratio=0.75):
    model = mae.MAE(args.arch, args.image_size, args.patch_size)
    patches = (args.image_size // args.patch_size) ** 2

    def loss(views):
        noise = torch.rand(len(views[0]), patches)
        pred, mask, _ = model(views[0], mask_ratio, noise)
        mask = mask if mask_ratio else mae.random_masking(torch.zeros(len(noise), patches, 1), 0.75, noise)[1]
        return mae.mae_loss(pred, mae.pixel_targets(views[0], args.patch_size, False)[0], mask)

    return Peer(model, loss)


def our_ijepa(args):
    model, side = ijepa.IJEPA(args.arch, args.image_size, args.patch_size), args.image_size // args.patch_size

    def loss(views):
        context, targets = ijepa.multiblock_masks(side, len(views[0]), torch.Generator())
        with torch.no_grad():
            target = ijepa.apply_masks(ijepa.target_features(model.target_encoder(views[0])), targets)
        return ijepa.ijepa_loss(model(views[0], context, targets), target)

    return Peer(model, loss, averages=((model.encoder, model.target_encoder),))


def our_moco_v3(args):
    model = moco_v3.MoCoV3(args.arch, args.image_size, args.patch_size, hidden_dim=args.hidden_dim)

    def loss(views):
        q0, q1 = (model(view)[0] for view in views)
        with torch.no_grad():
            k0, k1 = (model(view, keys=True)[0] for view in views)
        return moco_v3.ctr(q0, k1, args.temperature) + moco_v3.ctr(q1, k0, args.temperature)

    return Peer(model, loss, averages=((model.base_encoder, model.momentum_encoder),))


def transformers_mae(args):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    (dim, depth, heads), (width, blocks, parts) = mae.VITS[args.arch], mae.DECODERS[args.arch]
    shape = {"image_size": args.image_size, "patch_size": args.patch_size, "layer_norm_eps": 1e-6}
    shape |= {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads}
    shape |= {"intermediate_size": 4 * dim, "decoder_intermediate_size": 4 * width}
    shape |= {"decoder_hidden_size": width, "decoder_num_hidden_layers": blocks}
    model = ViTMAEForPreTraining(ViTMAEConfig(**shape, decoder_num_attention_heads=parts))
    return Peer(model, lambda views: model(views[0]).loss)


def beit_pair(args, batch):
    """The second stage, on given codes, 26 of 64 patches hidden: ours, transformers'."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    (dim, depth, heads), grid, rng = (
        beit.VITS[args.arch],
        args.image_size // args.patch_size,
        random.Random(0),
    )
    shape = {"image_size": args.image_size, "patch_size": args.patch_size, "layer_norm_eps": 1e-6}
    shape |= {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads}
    shape |= {"intermediate_size": 4 * dim, "use_mask_token": True, "layer_scale_init_value": 0.1}
    shape |= {"use_shared_relative_position_bias": True, "drop_path_rate": 0.0}
    theirs = BeitForMaskedImageModeling(BeitConfig(vocab_size=args.tokens, **shape))
    ours = beit.BEiT(args.arch, grid, args.patch_size, args.tokens)
    codes = torch.randint(args.tokens, (batch, grid**2))
    mask = torch.stack([beit.block_mask((grid, grid), 26, rng, 4) for _ in range(batch)])

    def our_loss(views):
        return beit.beit_loss(ours(views[0], mask), codes.view(-1, grid, grid)[mask], mask.sum())

    def their_loss(views):
        hidden = mask.flatten(1)
        return theirs(views[0], bool_masked_pos=hidden, labels=codes[hidden]).loss

    return Peer(ours, our_loss), Peer(theirs, their_loss)


def clip_pair(args, batch, context=40):
    """Ours, open_clip's: the same towers, texts of 40 bytes."""
    import open_clip

    vision = {"layers": 6, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    text = {"context_length": context, "vocab_size": 259, "width": 128, "heads": 2, "layers": 4}
    ours = clip.CLIP("vit_nano", 32, 8, 128, (128, 4, 259, context))
    theirs, their_loss = open_clip.model.CLIP(128, vision, text, quick_gelu=True), open_clip.ClipLoss()
    ids = torch.randint(1, 257, (batch, context))
    ids[:, -1] = 258

    def our_loss(views):
        return clip.clip_loss(*ours(views[0], ids)[:2], ours.logit_scale.exp())

    pair = Peer(theirs, lambda views: their_loss(*theirs(views[0], ids)))
    return Peer(ours, our_loss), pair


def dinov2_pair(args, batch):
    """All three losses on the same masks; lightly's as in its DINOv2 example, on timm's ViT."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules.heads import DINOv2ProjectionHead
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    n, side = 2 * batch, args.image_size // args.patch_size
    masks = dinov2.draw_masks(n, range(n), (side, side), args.mask_ratios, 0.5, 0)
    counts, hidden = masks.sum(dim=1), masks.flatten().nonzero()[:, 0]
    weights = 1 / (n * counts.repeat_interleave(counts))
    student, teacher = dinov2.DINOv2(args), dinov2.DINOv2(args).requires_grad_(False)
    centers = torch.zeros(2, args.out_dim)

    def our_loss(views):
        large, local = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad():
            taught = teacher(large, None, hidden)[1:]
            targets = [dinov2.teacher_targets(x, c, 0.04) for x, c in zip(taught, centers, strict=True)]
        features, cls, patches = student(large, masks, hidden, local)
        crops = cls.unflatten(0, (-1, batch)), targets[0].unflatten(0, (2, -1))
        loss = sum(dinov2.dino_losses(*crops, 0.1)) + dinov2.ibot_loss(patches, targets[1], weights, 0.1)
        for center, logits in zip(centers, taught, strict=True):
            dinov2.move_center(center, logits, 0.9)
        return loss + 0.1 * sum(dinov2.koleo_loss(x) for x in features.chunk(2))

    def network():
        vit = timm_vit(args, dynamic_img_size=True, init_values=args.layer_scale)
        sizes = 128, args.head_dim, 256, args.out_dim
        parts = {"backbone": MaskedVisionTransformerTIMM(vit)}
        return nn.ModuleDict(parts | {name: DINOv2ProjectionHead(*sizes) for name in ("dino", "ibot")})

    net, average = network(), network().requires_grad_(False)
    dino_loss, ibot_loss, koleo = DINOLoss(args.out_dim), IBOTPatchLoss(args.out_dim), KoLeoLoss()
    block, mask = masks.view(n, side, side), nn.functional.pad(masks, (1, 0))

    def their_loss(views):
        large, local = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad():
            taught = average["backbone"].encode(large)
            taught_cls, taught_patches = average["dino"](taught[:, 0]), average["ibot"](taught[mask])
        x = net["backbone"].encode(large, mask=mask)
        cls = [net["dino"](x[:, 0]), net["dino"](net["backbone"].encode(local)[:, 0])]
        crops = [crop for logits in cls for crop in logits.split(batch)]
        loss = dino_loss(taught_cls.split(batch), crops, teacher_temp=0.04)
        loss = loss + ibot_loss(taught_patches, net["ibot"](x[mask]), mask=block, teacher_temp=0.04)
        return loss + 0.1 * sum(koleo(rows) for rows in x[:, 0].chunk(2))

    ours = Peer(student, our_loss, averages=((student, teacher),))
    return ours, Peer(net, their_loss, averages=((net, average),))


OURS = {"simclr": our_simclr, "moco": our_moco, "byol": our_byol, "dino": our_dino, "mae": our_mae}
OURS |= {"ijepa": our_ijepa, "moco_v3": our_moco_v3}
PAIRS = {
    "beit": (beit_pair, "transformers"),
    "clip": (clip_pair, "open_clip"),
    "dinov2": (dinov2_pair, "lightly, timm"),
}
BATCH = {"simclr": 256, "moco": 256, "byol": 256, "mae": 256, "clip": 256, "beit": 128, "dinov2": 32}
RESNETS = ("simclr", "moco", "byol")


def contestants_of(method, args, batch):
    if method in PAIRS:
        pair, name = PAIRS[method]
        return dict(zip(("ours", name), pair(args, batch), strict=True))
    found = {"ours": OURS[method](args), "lightly": PEERS[method](args)}
    if method in RESNETS:
        found["lightly, channels_last"] = PEERS[method](args)
    if method == "mae":
        found |= {"transformers": transformers_mae(args), "ours, no token hidden": our_mae(args, 0.0)}
    return found


def steps(method, rounds):
    """The script's default sizes; batches large enough for the cores."""
    args, batch = sys.modules[method].Args(), BATCH.get(method, 64)
    count = {"mae": 1, "ijepa": 1, "beit": 1, "clip": 1}.get(method, 2)
    views = [torch.randn(batch, 3, args.image_size, args.image_size) for _ in range(count)]
    if method in ("dino", "dinov2"):
        views += [torch.randn(batch, 3, args.local_size, args.local_size) for _ in range(args.local_crops)]

    def stepper(name, peer):
        layout = torch.channels_last if method in RESNETS and name != "lightly" else torch.contiguous_format
        peer.encoder.to(memory_format=layout)
        optimizer = optimizer_of(method, args, peer.trained, fused=name.startswith("ours"))
        move = moco.momentum_update if name == "ours" else update_momentum

        def step():
            peer_step(peer, optimizer, [view.contiguous(memory_format=layout) for view in views], move=move)

        return step

    contestants = {name: stepper(name, peer) for name, peer in contestants_of(method, args, batch).items()}
    rates = {name: batch / t for name, t in medians(contestants, rounds, time.perf_counter).items()}
    print(f"\n{method}, {args.arch}, {args.image_size} px, batch {batch}, images a second")
    for name, rate in rates.items():
        print(f"  {name:26} {rate:7.1f}   ours / this {rates['ours'] / rate:.2f}")


def main(rounds: int = 9, data: str = "", count: int = 64, only: str = ""):
    """Compare with the peers; --data: a folder of photos (default: the built-in images), --count of them;
    --only pipeline or a method."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{versions}, {rounds} rounds, medians, {torch.get_num_threads()} threads")
    if only in ("", "pipeline"):
        pipelines(data, count, rounds)
    for method in [*OURS, *PAIRS]:
        if only in ("", method):
            steps(method, rounds)


if __name__ == "__main__":
    tyro.cli(main)
