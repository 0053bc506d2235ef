"""Speed of our pipeline and training step beside those of published implementations, in turn in one run.

    python benchmarks/throughput.py [--rounds 9] [--data FOLDER_WITH_PHOTOS]

Pipeline: milliseconds of one core for one view, decoding not counted (it is the same for all).
Step: images a second of forward, loss, backward and optimiser step on ready views, all cores.
Same network, batch, threads and inputs; medians over the rounds, and the ratio to the peer.
MAE: the step also beside the same model with all tokens in the encoder, and its multiply-adds.
"""

import random
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision
import tyro
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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


def medians(contestants, rounds):
    """{name: function} -> {name: median seconds}, the functions called in turn after one warm-up each."""
    times = {name: [] for name in contestants}
    for round in range(rounds + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if round:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title, contestants, batch_size, rounds):
    """Print images a second of each, and how often faster the first one is."""
    rates = {name: batch_size / t for name, t in medians(contestants, rounds).items()}
    print(f"\n{title}, {torch.get_num_threads()} threads, images a second")
    for name, rate in rates.items():
        print(f"  {name:32} {rate:7.1f}   ours / this {next(iter(rates.values())) / rate:.2f}")


def photos(data, side, count):
    """`count` photos as PIL images, 32 x 32, or enlarged to ImageNet's usual 500 x 375 for views of 224."""
    files = sorted(Path(data).rglob("*.jpg"))[:count] if data else []
    images = [Image.open(file).convert("RGB") for file in files] or [
        simclr.demo_image(i)[0] for i in range(count)
    ]
    return [image.resize((500, 375) if side == 224 else (32, 32), Image.BICUBIC) for image in images]


def simclr_pipeline(side, images, rounds):
    from lightly.transforms import SimCLRTransform

    strength, scale, blur = (
        (1.0, 0.08, 0.5) if side == 224 else (0.5, 0.08, 0.0)
    )  # the paper's, ImageNet and CIFAR
    theirs = SimCLRTransform(input_size=side, cj_strength=strength, gaussian_blur=blur, min_scale=scale)
    crop, jitter = simclr.random_crop(side, scale), [strength * s for s in (0.8, 0.8, 0.8, 0.2)]
    batch = torch.stack([crop(pil_to_tensor(image)) for image in images])
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (simclr.MEAN, simclr.STD))

    def device_side():
        u = torch.rand(len(batch), 9, generator=generator)
        order = [*torch.randperm(4, generator=generator).tolist(), 4]
        return (simclr.augment(batch, u, order, jitter, blur, side // 20 if blur else 0) - mean) / std

    contestants = {
        "ours, worker": lambda: [(crop(pixels), crop(pixels)) for pixels in map(pil_to_tensor, images)],
        "ours, device (CPU)": lambda: (device_side(), device_side()),
        "lightly": lambda: [theirs(image) for image in images],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {name: 1e3 * t / (2 * len(images)) for name, t in medians(contestants, rounds).items()}
    torch.set_num_threads(threads)
    both = times["ours, worker"] + times["ours, device (CPU)"]
    print(f"\nSimCLR pipeline at {side} px, ms of one core a view")
    for name, value in times.items():
        print(f"  {name:20} {value:7.3f}")
    print(f"  worker / lightly {times['ours, worker'] / times['lightly']:.2f}, ", end="")
    print(f"worker + device / lightly {both / times['lightly']:.2f}")


def simclr_step(batch_size, rounds):
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    views = torch.randn(batch_size, 2, 3, 32, 32)

    def stepper(params, loss_of, **options):
        params = [p for p in params if p.requires_grad]
        optimizer = torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4, **options)

        def step():
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

        return step

    def ours():
        model = simclr.SimCLR("resnet18").to(memory_format=torch.channels_last)

        def loss_of():
            z, _ = model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last))
            z = z.unflatten(0, (-1, 2))
            return simclr.nt_xent(z[:, 0], z[:, 1], 0.1)

        return stepper(model.parameters(), loss_of, fused=True)  # as simclr.py does

    def theirs(memory_format):
        """As in lightly's SimCLR example: one pass for each view."""
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(memory_format=memory_format)
        criterion = NTXentLoss(temperature=0.1)

        def loss_of():
            z0, z1 = (model(views[:, i].contiguous(memory_format=memory_format)) for i in (0, 1))
            return criterion(z0, z1)

        return stepper(model.parameters(), loss_of)

    contestants = {
        "ours": ours(),
        "lightly as shipped": theirs(torch.contiguous_format),
        "lightly channels_last": theirs(torch.channels_last),
    }
    show(f"SimCLR step, ResNet-18, 32 px, batch {batch_size}", contestants, batch_size, rounds)


def mae_step(batch_size, rounds, image_size=32, patch_size=4):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images, (dim, depth, heads) = torch.randn(batch_size, 3, image_size, image_size), mae.VITS["vit_nano"]
    ddim, ddepth, dheads = mae.DECODERS["vit_nano"]
    config = ViTMAEConfig(
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
        **dict(
            hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim
        ),
        **dict(
            decoder_hidden_size=ddim, decoder_num_hidden_layers=ddepth, decoder_num_attention_heads=dheads
        ),
        decoder_intermediate_size=4 * ddim,
    )
    ours, theirs = mae.MAE("vit_nano", image_size, patch_size), ViTMAEForPreTraining(config)

    def stepper(model, loss_of):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, betas=(0.9, 0.95), fused=True)

        def step():
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

        return step

    patches = (image_size // patch_size) ** 2
    hidden = mae.random_masking(torch.zeros(batch_size, patches, 1), 0.75, torch.rand(batch_size, patches))[1]

    def loss_of(mask_ratio):
        pred, mask, _ = ours(images, mask_ratio, torch.rand(batch_size, patches))
        mask = mask if mask_ratio else hidden  # the same loss where the encoder has seen everything
        return mae.mae_loss(pred, mae.pixel_targets(images, patch_size, False)[0], mask)

    contestants = {
        "ours, mask 0.75": stepper(ours, lambda: loss_of(0.75)),
        "ours, all tokens in the encoder": stepper(ours, lambda: loss_of(0.0)),
        "transformers, mask 0.75": stepper(theirs, lambda: theirs(images).loss),
    }
    show(
        f"MAE step, vit_nano, {image_size} px, patch {patch_size}, batch {batch_size}",
        contestants,
        batch_size,
        rounds,
    )

    def multiply_adds(tokens, width, blocks):
        return blocks * (12 * tokens * width**2 + 2 * tokens**2 * width)

    decoder = multiply_adds(patches + 1, ddim, ddepth)
    masked, full = (multiply_adds(1 + kept, dim, depth) + decoder for kept in (patches // 4, patches))
    print(f"  multiply-adds of the blocks, all tokens / mask 0.75: {full / masked:.2f}")


def beit_step(batch_size, rounds, image_size=32, patch_size=4, tokens=512):
    """The second stage, with given codes: one table of relative positions, LayerScale, 26 of 64 hidden."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    dim, depth, heads = beit.VITS["vit_nano"]
    grid, rng = image_size // patch_size, random.Random(0)
    config = BeitConfig(
        vocab_size=tokens,
        **dict(
            hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim
        ),
        **dict(image_size=image_size, patch_size=patch_size, layer_norm_eps=1e-6, use_mask_token=True),
        **dict(use_shared_relative_position_bias=True, layer_scale_init_value=0.1, drop_path_rate=0.0),
    )
    ours, theirs = beit.BEiT("vit_nano", grid, patch_size, tokens), BeitForMaskedImageModeling(config)
    images, codes = (
        torch.randn(batch_size, 3, image_size, image_size),
        torch.randint(tokens, (batch_size, 64)),
    )
    mask = torch.stack([beit.block_mask((grid, grid), 26, rng, 4) for _ in images])

    def stepper(model, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def step():
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

        return step

    def our_loss():
        return beit.beit_loss(ours(images, mask), codes.view(-1, grid, grid)[mask], mask.sum())

    def their_loss():
        return theirs(images, bool_masked_pos=mask.flatten(1), labels=codes[mask.flatten(1)]).loss

    contestants = {"ours": stepper(ours, our_loss), "transformers": stepper(theirs, their_loss)}
    title = f"BEiT step, vit_nano, {image_size} px, patch {patch_size}, batch {batch_size}"
    show(title, contestants, batch_size, rounds)


def clip_step(batch_size, rounds, context=40):
    """Both with the same towers and texts of 40 bytes."""
    import open_clip

    vision = {"layers": 6, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    text = {"context_length": context, "vocab_size": 259, "width": 128, "heads": 2, "layers": 4}
    ours = clip.CLIP("vit_nano", 32, 8, 128, (128, 4, 259, context))
    theirs, their_loss = open_clip.model.CLIP(128, vision, text, quick_gelu=True), open_clip.ClipLoss()
    images, ids = torch.randn(batch_size, 3, 32, 32), torch.randint(1, 257, (batch_size, context))
    ids[:, -1] = 258

    def stepper(model, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def step():
            optimizer.zero_grad()
            loss_of(model(images, ids)).backward()
            optimizer.step()

        return step

    def our_loss(out):
        return clip.clip_loss(*out[:2], ours.logit_scale.exp())

    contestants = {
        "ours": stepper(ours, our_loss),
        "open_clip": stepper(theirs, lambda out: their_loss(*out)),
    }
    show(f"CLIP step, vit_nano, 32 px, patch 8, batch {batch_size}", contestants, batch_size, rounds)


def dino_step(batch_size, rounds):
    """Both with their own loop's order: teacher, student, loss, centre, gradients, AdamW, moving average."""
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules.heads import DINOProjectionHead
    from lightly.models.utils import update_momentum

    args = dino.Args(drop_path=0.0)
    sides = [args.image_size] * 2 + [args.local_size] * args.local_crops
    views = [torch.randn(batch_size, 3, side, side) for side in sides]

    def ours():
        shape = (args.image_size, args.patch_size, args.out_dim, args.head_dim, args.norm_last_layer)
        model = dino.DINO(args.arch, *shape, args.drop_path)
        student, teacher = model.student, model.teacher
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
        batches = [torch.cat(views[:2]), torch.cat(views[2:])]

        def step():
            with torch.no_grad():
                teacher_logits = teacher(batches[0]).unflatten(0, (2, -1))
            logits = torch.cat([student(images) for images in batches]).unflatten(0, (len(views), -1))
            loss = dino.dino_loss(logits, teacher_logits, model.center, 0.1, 0.04)
            optimizer.zero_grad()
            loss.backward()
            dino.update_center(model.center, teacher_logits, 0.9)
            optimizer.step()
            dino.momentum_update(student, teacher, 0.99)

        return step

    def theirs():
        """As in lightly's DINO example: one pass for each view; the ViT is timm's."""

        def network():
            dim, depth, heads = dino.VITS[args.arch]
            options = {"img_size": args.image_size, "patch_size": args.patch_size, "dynamic_img_size": True}
            backbone = timm.models.VisionTransformer(
                **options, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0
            )
            head = DINOProjectionHead(dim, args.head_dim, 256, args.out_dim, freeze_last_layer=1)
            return nn.Sequential(backbone, head)

        student, teacher, criterion = network(), network().requires_grad_(False), DINOLoss(args.out_dim)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

        def step():
            update_momentum(student, teacher, m=0.99)
            targets = [teacher(view) for view in views[:2]]
            loss = criterion(targets, [student(view) for view in views], teacher_temp=0.04)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    contestants = {"ours": ours(), "lightly and timm": theirs()}
    crops = f"2 x {args.image_size} px, {args.local_crops} x {args.local_size} px, patch {args.patch_size}"
    show(f"DINO step, {args.arch}, {crops}, batch {batch_size}", contestants, batch_size, rounds)


def timm_vit(sizes, image_size, patch_size, **options):
    import timm

    dim, depth, heads = sizes
    options = {"img_size": image_size, "patch_size": patch_size, "num_classes": 0} | options
    return timm.models.VisionTransformer(**options, embed_dim=dim, depth=depth, num_heads=heads)


def moco_v3_step(batch_size, rounds, image_size=32, patch_size=8):
    """Peer: timm's ViT, lightly's heads and moving average, and the loss of the paper's Algorithm 1, which
    lightly does not have; both with a frozen patch projection."""
    from lightly.models.modules.heads import MoCoProjectionHead
    from lightly.models.utils import update_momentum

    views = torch.randn(2, batch_size, 3, image_size, image_size)
    network = moco_v3.MoCoV3("vit_nano", image_size, patch_size, hidden_dim=512)

    def ours():
        model = network
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.1, fused=True)

        def step():
            q0, q1 = (model(view)[0] for view in views)
            moco_v3.momentum_update(model.base_encoder, model.momentum_encoder, 0.99)
            with torch.no_grad():
                k0, k1 = (model(view, keys=True)[0] for view in views)
            loss = moco_v3.ctr(q0, k1, 0.2) + moco_v3.ctr(q1, k0, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def theirs():
        def encoder():
            vit = timm_vit(moco_v3.MOCO_VITS["vit_nano"], image_size, patch_size)
            vit.patch_embed.requires_grad_(False)
            head = MoCoProjectionHead(128, 512, 256, num_layers=3, batch_norm=True)
            return nn.Sequential(vit, head)

        base, momentum = encoder(), encoder().requires_grad_(False)
        predictor = MoCoProjectionHead(256, 512, 256, num_layers=2, batch_norm=True)
        trained = [p for net in (base, predictor) for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.1)

        def ctr(q, k):
            q, k = nn.functional.normalize(q), nn.functional.normalize(k)
            return 0.4 * nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(len(q)))

        def step():
            q0, q1 = (predictor(base(view)) for view in views)
            update_momentum(base, momentum, m=0.99)
            with torch.no_grad():
                k0, k1 = (momentum(view) for view in views)
            loss = ctr(q0, k1) + ctr(q1, k0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    contestants = {"ours": ours(), "lightly and timm": theirs()}
    title = f"MoCo v3 step, vit_nano, {image_size} px, patch {patch_size}, batch {batch_size}"
    show(title, contestants, batch_size, rounds)


def ijepa_step(batch_size, rounds, image_size=32, patch_size=4):
    """Both on the same masks; lightly's as in its I-JEPA example, its encoder on timm's ViT."""
    from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
    from lightly.models.utils import apply_masks, update_momentum

    images, side = torch.randn(batch_size, 3, image_size, image_size), image_size // patch_size
    context, targets = ijepa.multiblock_masks(side, batch_size, torch.Generator().manual_seed(0))
    width, depth = ijepa.PREDICTORS["vit_nano"]

    def ours():
        model = ijepa.IJEPA("vit_nano", image_size, patch_size)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)

        def step():
            with torch.no_grad():
                target = ijepa.apply_masks(ijepa.target_features(model.target_encoder(images)), targets)
            loss = ijepa.ijepa_loss(model(images, context, targets), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ijepa.momentum_update(model.encoder, model.target_encoder, 0.996)

        return step

    def theirs():
        def encoder():
            options = {"class_token": False, "global_pool": ""}
            vit = timm_vit(ijepa.VITS["vit_nano"], image_size, patch_size, **options)
            return MaskedVisionTransformerTIMM(vit)

        base, target_encoder = encoder(), encoder().requires_grad_(False)
        dim, _, heads = ijepa.VITS["vit_nano"]
        predictor = IJEPAPredictorTIMM(side**2, depth, dim, width, heads)
        trained = [p for net in (base, predictor) for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3)

        def step():
            with torch.no_grad():
                target = target_encoder.encode(images)
                target = apply_masks(nn.functional.layer_norm(target, target.shape[-1:]), list(targets))
            x = base.encode(images, idx_keep=context)
            loss = nn.functional.smooth_l1_loss(predictor(x, context, list(targets)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_momentum(base, target_encoder, m=0.996)

        return step

    contestants = {"ours": ours(), "lightly and timm": theirs()}
    title = f"I-JEPA step, vit_nano, {image_size} px, patch {patch_size}, batch {batch_size}"
    show(title, contestants, batch_size, rounds)


def dinov2_step(batch_size, rounds):
    """All three losses on the same crops and masks; lightly's as in its DINOv2 example, on timm's ViT."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules.heads import DINOv2ProjectionHead
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
    from lightly.models.utils import update_momentum

    args = dinov2.Args()
    n, side = 2 * batch_size, args.image_size // args.patch_size
    large = torch.randn(n, 3, args.image_size, args.image_size)
    local = torch.randn(args.local_crops * batch_size, 3, args.local_size, args.local_size)
    masks = dinov2.draw_masks(n, range(n), (side, side), args.mask_ratios, 0.5, 0)
    counts, hidden = masks.sum(dim=1), masks.flatten().nonzero()[:, 0]
    weights = 1 / (n * counts.repeat_interleave(counts))

    def ours():
        student, teacher = dinov2.DINOv2(args), dinov2.DINOv2(args).requires_grad_(False)
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3, fused=True)
        centers = torch.zeros(2, args.out_dim)

        def step():
            with torch.no_grad():
                taught = teacher(large, None, hidden)[1:]
                targets = [
                    dinov2.teacher_targets(logits, center, 0.04)
                    for logits, center in zip(taught, centers, strict=True)
                ]
            features, cls, patches = student(large, masks, hidden, local)
            crops = cls.unflatten(0, (-1, batch_size)), targets[0].unflatten(0, (2, -1))
            loss = sum(dinov2.dino_losses(*crops, 0.1)) + dinov2.ibot_loss(patches, targets[1], weights, 0.1)
            loss = loss + 0.1 * sum(dinov2.koleo_loss(x) for x in features.chunk(2))
            optimizer.zero_grad()
            loss.backward()
            for center, logits in zip(centers, taught, strict=True):
                dinov2.move_center(center, logits, 0.9)
            optimizer.step()
            dinov2.momentum_update(student, teacher, 0.99)

        return step

    def theirs():
        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                options = {"dynamic_img_size": True, "init_values": args.layer_scale}
                vit = timm_vit(dinov2.VITS[args.arch], args.image_size, args.patch_size, **options)
                self.backbone = MaskedVisionTransformerTIMM(vit)
                sizes = 128, args.head_dim, 256, args.out_dim
                self.dino_head, self.ibot_head = DINOv2ProjectionHead(*sizes), DINOv2ProjectionHead(*sizes)

        student, teacher = Network(), Network().requires_grad_(False)
        dino_loss, ibot_loss, koleo = DINOLoss(args.out_dim), IBOTPatchLoss(args.out_dim), KoLeoLoss()
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
        block = masks.view(n, side, side)
        mask = nn.functional.pad(masks, (1, 0))

        def step():
            update_momentum(student, teacher, m=0.99)
            with torch.no_grad():
                taught = teacher.backbone.encode(large)
                taught_cls = teacher.dino_head(taught[:, 0])
                taught_patches = teacher.ibot_head(taught[mask])
            x = student.backbone.encode(large, mask=mask)
            cls = [student.dino_head(x[:, 0]), student.dino_head(student.backbone.encode(local)[:, 0])]
            crops = [crop for logits in cls for crop in logits.split(batch_size)]
            loss = dino_loss(taught_cls.split(batch_size), crops, teacher_temp=0.04)
            loss = loss + ibot_loss(taught_patches, student.ibot_head(x[mask]), mask=block, teacher_temp=0.04)
            loss = loss + 0.1 * sum(koleo(rows) for rows in x[:, 0].chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    contestants = {"ours": ours(), "lightly and timm": theirs()}
    crops = f"2 x {args.image_size} px, {args.local_crops} x {args.local_size} px, patch {args.patch_size}"
    show(f"DINOv2 step, {args.arch}, {crops}, batch {batch_size}", contestants, batch_size, rounds)


def moco_step(batch_size, rounds, queue_size=4096):
    """Both with plain BatchNorm and shuffled keys; lightly's as in its MoCo example, v2 heads."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

    views = torch.randn(2, batch_size, 3, 32, 32)

    def ours():
        model = moco.MoCo("resnet18", queue_size=queue_size).to(memory_format=torch.channels_last)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.03, momentum=0.9, weight_decay=1e-4, fused=True)

        def step():
            query, key = (view.contiguous(memory_format=torch.channels_last) for view in views)
            moco.momentum_update(model.encoder_q, model.encoder_k, 0.99)
            q, _ = model(query)
            places = torch.randperm(batch_size)
            with torch.no_grad():
                k = model(key[places], keys=True)[0][places.argsort()]
            loss = moco.info_nce(q, k, model.queue.clone(), 0.2)
            moco.enqueue(model.queue, model.queue_ptr, k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def theirs(memory_format):
        def network(head):
            backbone = torchvision.models.resnet18()
            backbone.fc = nn.Identity()
            return nn.Sequential(backbone, head).to(memory_format=memory_format)

        model = network(MoCoProjectionHead(512, 512, 128))
        momentum = network(MoCoProjectionHead(512, 512, 128)).requires_grad_(False)
        momentum.load_state_dict(model.state_dict())
        criterion = NTXentLoss(temperature=0.2, memory_bank_size=(queue_size, 128))
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)

        def step():
            query, key = (view.contiguous(memory_format=memory_format) for view in views)
            update_momentum(model, momentum, 0.99)
            q = model(query)
            key, places = batch_shuffle(key)
            k = batch_unshuffle(momentum(key), places)
            loss = criterion(q, k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    contestants = {
        "ours": ours(),
        "lightly as shipped": theirs(torch.contiguous_format),
        "lightly channels_last": theirs(torch.channels_last),
    }
    show(
        f"MoCo v2 step, ResNet-18, 32 px, K {queue_size}, batch {batch_size}", contestants, batch_size, rounds
    )


def byol_step(batch_size, rounds):
    """lightly's as in its BYOL example: heads 1024 and 256, four passes, cosines of both directions."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    views = torch.randn(2, batch_size, 3, 32, 32)

    def stepper(model, target, loss_of, update, memory_format, **options):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=1e-4, **options)

        def step():
            batch = [view.contiguous(memory_format=memory_format) for view in views]
            with torch.no_grad():
                t0, t1 = target(batch[0]), target(batch[1])
            loss = loss_of(batch[0], t1) + loss_of(batch[1], t0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update()

        return step

    def ours():
        model = byol.BYOL("resnet18", hidden_dim=1024).to(memory_format=torch.channels_last)
        update = lambda: byol.momentum_update(model.online, model.target, 0.99)  # noqa: E731
        loss_of = lambda view, target: byol.byol_loss(model(view)[0], target)  # noqa: E731
        return stepper(model, model.target, loss_of, update, torch.channels_last, fused=True)

    def theirs(memory_format):
        def network():
            backbone = torchvision.models.resnet18()
            backbone.fc = nn.Identity()
            return nn.Sequential(backbone, BYOLProjectionHead(512, 1024, 256))

        online = nn.Sequential(network(), BYOLPredictionHead(256, 1024, 256)).to(memory_format=memory_format)
        target = network().to(memory_format=memory_format).requires_grad_(False)
        target.load_state_dict(online[0].state_dict())
        criterion = NegativeCosineSimilarity()
        update = lambda: update_momentum(online[0], target, m=0.99)  # noqa: E731
        return stepper(online, target, lambda view, t: criterion(online(view), t), update, memory_format)

    contestants = {
        "ours": ours(),
        "lightly as shipped": theirs(torch.contiguous_format),
        "lightly channels_last": theirs(torch.channels_last),
    }
    show(f"BYOL step, ResNet-18, 32 px, batch {batch_size}", contestants, batch_size, rounds)


def main(rounds: int = 9, data: str = "", batch_size: int = 256, count: int = 128, only: str = ""):
    """Compare with the peers; --data: a folder of photos (default: the built-in images), --count
    of them; --only METHOD."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {rounds} rounds, medians")
    if only in ("", "simclr"):
        for side in (224, 32):
            simclr_pipeline(side, photos(data, side, count), rounds)
        simclr_step(batch_size, rounds)
    if only in ("", "moco"):
        moco_step(batch_size, rounds)
    if only in ("", "byol"):
        byol_step(batch_size, rounds)
    if only in ("", "mae"):
        mae_step(batch_size, rounds)
    if only in ("", "beit"):
        beit_step(batch_size // 2, rounds)
    if only in ("", "dino"):
        dino_step(batch_size // 4, rounds)
    if only in ("", "moco_v3"):
        moco_v3_step(batch_size // 4, rounds)
    if only in ("", "ijepa"):
        ijepa_step(batch_size // 4, rounds)
    if only in ("", "dinov2"):
        dinov2_step(batch_size // 8, rounds)
    if only in ("", "clip"):
        clip_step(batch_size, rounds)


if __name__ == "__main__":
    tyro.cli(main)
