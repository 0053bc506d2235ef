"""Does our code learn what the shortest loop of lightly's documented parts learns?

    python benchmarks/peers.py --data ../shared/data/cifar10-photos [--methods simclr mae] [--seeds 0 1 2]

For each method our script with its defaults (or --epochs; MoCo's BatchNorm whole) and a loop of lightly's
transforms, heads and losses on torchvision's or timm's backbone, as in lightly's examples: same images,
steps, batch, optimiser, schedules, widths. Both backbones and the untrained one go through eval_linear.py.
Prints the table and writes peers.json into --to. throughput.py times the steps of both.
"""

import contextlib
import copy
import importlib
import io
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
import tyro
from lightly.models.utils import update_momentum
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_linear  # noqa: E402
import ijepa  # noqa: E402
import moco_v3  # noqa: E402
from simclr import MEAN, STD, cosine_schedule  # noqa: E402


@dataclass
class Peer:
    """A published implementation's parts, and what our script calls the same."""

    encoder: nn.Module  # goes to backbone.pt
    loss: callable  # views (B, 3, H, W) each -> loss
    trained: list = None  # parameters; default: of encoder, those that take gradients
    transform: callable = None  # PIL image -> views
    averages: tuple = ()  # pairs (network, its moving average), moved before the forward pass as in lightly
    after_backward: callable = lambda progress: None  # from 0 to 1

    def __post_init__(self):
        self.trained = self.trained or [p for p in self.encoder.parameters() if p.requires_grad]


def resnet(arch="resnet18"):
    net = getattr(torchvision.models, arch)()
    net.fc = nn.Identity()
    return net


def timm_vit(args, **options):
    import timm

    dim, depth, heads = ijepa.VITS[args.arch]
    options = {"img_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0} | options
    return timm.models.VisionTransformer(**options, embed_dim=dim, depth=depth, num_heads=heads)


def frozen(net):
    return copy.deepcopy(net).requires_grad_(False)


def simclr(args):
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    net = nn.Sequential(resnet(), SimCLRProjectionHead(512, 512, args.proj_dim))
    criterion = NTXentLoss(temperature=args.temperature)
    flags = {"cj_strength": args.jitter_strength, "min_scale": args.min_scale, "gaussian_blur": args.blur}

    def loss(views):
        return criterion(*(net(view) for view in views))

    return Peer(net[0], loss, [*net.parameters()], SimCLRTransform(args.image_size, **flags))


def moco(args):
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle
    from lightly.transforms import MoCoV2Transform

    query = nn.Sequential(resnet(), MoCoProjectionHead(512, 512, args.dim))
    key = frozen(query)
    criterion = NTXentLoss(temperature=args.temperature, memory_bank_size=(args.queue_size, args.dim))

    def loss(views):
        q = query(views[0])
        shuffled, places = batch_shuffle(views[1])
        return criterion(q, batch_unshuffle(key(shuffled), places).detach())

    flags = {"min_scale": args.min_scale, "gaussian_blur": args.blur}
    transform = MoCoV2Transform(args.image_size, **flags)
    return Peer(query[0], loss, [*query.parameters()], transform, ((query, key),))


def byol_views(args):
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    flags = {"input_size": args.image_size, "min_scale": args.min_scale}
    first = BYOLView1Transform(**flags, gaussian_blur=args.blurs[0])
    second = BYOLView2Transform(**flags, gaussian_blur=args.blurs[1], solarization_prob=args.solarize)
    return BYOLTransform(first, second)


def byol(args):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

    online = nn.Sequential(resnet(), BYOLProjectionHead(512, args.hidden_dim, args.proj_dim))
    target, predictor = frozen(online), BYOLPredictionHead(args.proj_dim, args.hidden_dim, args.proj_dim)
    criterion = NegativeCosineSimilarity()

    def loss(views):
        targets = [target(view).detach() for view in views]
        predictions = [predictor(online(view)) for view in views]
        # twice lightly's mean of both directions: the paper's 2 - 2 cos, summed over them
        return 2 * (criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0]))

    views = byol_views(args)
    for view in views.transforms:  # as ours; its own crops are bilinear
        view.transform.transforms[0].interpolation = InterpolationMode.BICUBIC
    trained = [*online.parameters(), *predictor.parameters()]
    return Peer(online[0], loss, trained, views, ((online, target),))


def dino(args):
    from lightly.loss import DINOLoss
    from lightly.models.modules.heads import DINOProjectionHead
    from lightly.transforms import DINOTransform

    def network():
        sizes = ijepa.VITS[args.arch][0], args.head_dim, 256, args.out_dim
        head = DINOProjectionHead(*sizes, freeze_last_layer=args.freeze_last_layer)
        return nn.Sequential(timm_vit(args, dynamic_img_size=True), head)

    student, teacher = network(), network().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(args.out_dim, student_temp=args.student_temp)

    def loss(views):
        targets = [teacher(view) for view in views[:2]]
        return criterion(targets, [student(view) for view in views], teacher_temp=args.teacher_temp)

    def after_backward(progress):
        for p in student.parameters():
            if p.grad is not None:
                nn.utils.clip_grad_norm_(p, args.clip_grad)
        student[1].cancel_last_layer_gradients(int(progress * args.epochs))

    transform = DINOTransform(
        global_crop_size=args.image_size,
        global_crop_scale=(args.min_scale, 1.0),
        local_crop_size=args.local_size,
        local_crop_scale=(args.local_min_scale, args.min_scale),
        n_local_views=args.local_crops,
        gaussian_blur=args.crop_blurs,
        solarization_prob=args.solarize,
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    return Peer(teacher[0], loss, trained, transform, ((student, teacher),), after_backward)


def mae(args):
    """The encoder and decoder of lightly's MAE example, on timm's ViT."""
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from lightly.models.utils import get_at_index, patchify, random_token_mask
    from lightly.transforms import MAETransform

    from mae import DECODERS

    vit, (width, depth, heads) = timm_vit(args), DECODERS[args.arch]
    encoder, length = MaskedVisionTransformerTIMM(vit), (args.image_size // args.patch_size) ** 2 + 1
    sizes = {"decoder_embed_dim": width, "decoder_depth": depth, "decoder_num_heads": heads}
    decoder = MAEDecoderTIMM(length - 1, args.patch_size, 3, vit.embed_dim, **sizes, mlp_ratio=4.0)
    nn.init.normal_(decoder.mask_token, std=0.02)

    def loss(views):
        kept, hidden = random_token_mask((len(views[0]), length), mask_ratio=args.mask_ratio)
        tokens = decoder.embed(encoder.encode(views[0], idx_keep=kept))
        full = decoder.mask_token.expand(len(tokens), length, -1).to(tokens.dtype).clone()
        full.scatter_(1, kept[..., None].expand_as(tokens), tokens)
        pred = decoder.predict(get_at_index(decoder.decode(full), hidden))
        return F.mse_loss(pred, get_at_index(patchify(views[0], args.patch_size), hidden - 1))

    trained = [p for net in (encoder, decoder) for p in net.parameters() if p.requires_grad]
    return Peer(vit, loss, trained, MAETransform(args.image_size, min_scale=args.min_scale))


def ijepa_peer(args):
    """The encoder and predictor of lightly's I-JEPA example; on our masks, its own have other rules."""
    from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
    from lightly.models.utils import apply_masks

    vit, side = timm_vit(args, class_token=False, global_pool=""), args.image_size // args.patch_size
    encoder = MaskedVisionTransformerTIMM(vit)
    target = frozen(encoder)
    (dim, _, heads), (width, depth) = ijepa.VITS[args.arch], ijepa.PREDICTORS[args.arch]
    predictor = IJEPAPredictorTIMM(side**2, depth, dim, width, heads)

    def loss(views):
        masks = ijepa.multiblock_masks(
            side, len(views[0]), torch.Generator().manual_seed(torch.randint(2**31, ()).item())
        )
        context, targets = masks
        with torch.no_grad():
            taught = target.encode(views[0])
            taught = apply_masks(F.layer_norm(taught, taught.shape[-1:]), list(targets))
        tokens = encoder.encode(views[0], idx_keep=context)
        return F.smooth_l1_loss(predictor(tokens, context, list(targets)), taught)

    crop = [
        torchvision.transforms.RandomResizedCrop(args.image_size, (args.min_scale, 1.0), interpolation=3),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(MEAN, STD),
    ]
    crop = torchvision.transforms.Compose(crop)
    trained = [p for net in (encoder, predictor) for p in net.parameters() if p.requires_grad]
    return Peer(target.vit, loss, trained, lambda image: [crop(image)], ((encoder, target),))


def moco_v3_peer(args):
    """timm's ViT with a frozen patch projection, lightly's heads; the paper's loss, which lightly lacks."""
    from lightly.models.modules.heads import MoCoProjectionHead

    dim, depth, heads = moco_v3.MOCO_VITS[args.arch]
    import timm

    shape = {"img_size": args.image_size, "patch_size": args.patch_size, "num_classes": 0}
    vit = timm.models.VisionTransformer(**shape, embed_dim=dim, depth=depth, num_heads=heads)
    vit.patch_embed.requires_grad_(False)
    hidden = args.hidden_dim
    base = nn.Sequential(vit, MoCoProjectionHead(dim, hidden, 256, num_layers=3, batch_norm=True))
    average, predictor = frozen(base), MoCoProjectionHead(256, hidden, 256, num_layers=2, batch_norm=True)

    def ctr(q, k):
        logits = F.normalize(q) @ F.normalize(k).T / args.temperature
        return 2 * args.temperature * F.cross_entropy(logits, torch.arange(len(q)))

    def loss(views):
        q0, q1 = (predictor(base(view)) for view in views)
        with torch.no_grad():
            k0, k1 = (average(view) for view in views)
        return ctr(q0, k1) + ctr(q1, k0)

    trained = [p for net in (base, predictor) for p in net.parameters() if p.requires_grad]
    return Peer(vit, loss, trained, byol_views(args), ((base, average),))


PEERS = {"simclr": simclr, "moco": moco, "byol": byol, "dino": dino, "mae": mae}
PEERS |= {"ijepa": ijepa_peer, "moco_v3": moco_v3_peer}


def optimizer_of(method, args, trained, fused=False):
    """Our script's; its rates are set at each step."""
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}
    others = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    if method in ("simclr", "byol"):
        return torch.optim.SGD([matrices, others], 1e-3, momentum=0.9, nesterov=True, fused=fused)
    if method == "moco":
        return torch.optim.SGD(trained, 1e-3, 0.9, weight_decay=args.weight_decay, fused=fused)
    if method == "moco_v3":
        return torch.optim.AdamW(trained, 1e-3, weight_decay=args.weight_decay, fused=fused)
    betas = (0.9, 0.95) if method == "mae" else (0.9, 0.999)
    return torch.optim.AdamW([matrices, others], 1e-3, betas=betas, fused=fused)


def peer_step(peer, optimizer, views, momentum=0.99, progress=0.0, move=update_momentum):
    for net, average in peer.averages:
        move(net, average, momentum)
    loss = peer.loss(views)
    optimizer.zero_grad()
    loss.backward()
    peer.after_backward(progress)
    optimizer.step()
    return loss


def train_peer(method, args):
    """The peer's whole training -> seconds, encoder."""
    torch.manual_seed(args.seed)
    peer = PEERS[method](args)
    optimizer = optimizer_of(method, args, peer.trained)
    root = Path(args.data) / "train"
    images = torchvision.datasets.ImageFolder(str(root if root.is_dir() else args.data), peer.transform)
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    total = args.epochs * len(loader)
    warmup = min(total, round(args.warmup_epochs * len(loader)))
    peak = args.base_lr * args.batch_size / 256 if hasattr(args, "base_lr") else args.lr
    final = 1e-6 if method in ("dino", "ijepa") else 0.0
    step, start = 0, time.perf_counter()

    for _ in range(args.epochs):
        for views, _ in loader:
            for group in optimizer.param_groups:
                group["lr"] = cosine_schedule(step + (method == "ijepa"), total, warmup, peak, final)
            if hasattr(args, "final_weight_decay"):
                decay = cosine_schedule(step, total, 0, args.weight_decay, args.final_weight_decay)
                optimizer.param_groups[0]["weight_decay"] = decay
            momentum = getattr(args, "momentum", 0.0)
            if method in ("byol", "dino", "moco_v3"):
                momentum = cosine_schedule(step, total, 0, momentum, getattr(args, "final_momentum", 1.0))
            if method == "ijepa":
                momentum += step / total * (1 - momentum)

            peer_step(peer, optimizer, views, momentum, step / total)
            step += 1

    return time.perf_counter() - start, peer.encoder


def accuracy(backbone, data):
    """logreg and k-NN of a backbone.pt by eval_linear.py."""
    top1 = {}
    for mode in ("logreg", "knn"):
        with contextlib.redirect_stdout(io.StringIO()):
            results = eval_linear.evaluate(eval_linear.Args(backbone, mode, data=data))["results"]
        top1[mode] = results[0]["top1"]  # of k-NN: k = 20; the test images choose nothing
    return top1


def compare(method, data, epochs, seed, folder):
    """{ours, peer, untrained: {seconds, logreg, knn}}"""
    module = importlib.import_module(method)
    args = module.Args(data=data, seed=seed, run_dir=f"{folder}/{method}-{seed}")
    args.epochs = epochs or args.epochs
    if method == "moco":
        args.bn_splits = 1  # lightly's BatchNorm has no parts
    start = time.perf_counter()
    module.train(args)
    ours, path = time.perf_counter() - start, Path(args.run_dir) / "backbone.pt"
    table = {
        "untrained": accuracy(f"random:{path}", data),
        "ours": {"seconds": ours} | accuracy(str(path), data),
    }

    seconds, encoder = train_peer(method, args)
    file = torch.load(path, weights_only=True)
    missing = file["state_dict"].keys() - encoder.state_dict().keys()
    assert not missing, f"the peer of {method} has no {sorted(missing)}"
    file["state_dict"] = {name: encoder.state_dict()[name] for name in file["state_dict"]}
    path = path.with_name("peer.pt")
    torch.save(file, path)
    table["peer"] = {"seconds": seconds} | accuracy(str(path), data)
    return table


def main(
    data: str,
    methods: tuple[str, ...] = tuple(PEERS),
    seeds: tuple[int, ...] = (0,),
    epochs: int = 0,
    to: str = "runs/peers",
):
    """--methods of which; --epochs 0: the script's default; --to: folder of runs and of peers.json."""
    tables = {}
    for method in methods:
        for seed in seeds:
            tables.setdefault(method, []).append(compare(method, data, epochs, seed, to))
            Path(to, "peers.json").write_text(json.dumps(tables, indent=1))
        print(f"{method:8}", end="")
        for who in ("untrained", "peer", "ours"):
            rows = [table[who] for table in tables[method]]
            found = [statistics.mean(row[mode] for row in rows) for mode in ("logreg", "knn")]
            print(f"  {who} {found[0]:.1f} / {found[1]:.1f}", end="")
        print(flush=True)


if __name__ == "__main__":
    tyro.cli(main)
