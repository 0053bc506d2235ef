# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "timm>=1.0.31", "tyro"]
# ///
"""Convert a checkpoint, official or of any training code, to a backbone.pt.

  python convert.py dinov2_vits14_reg4_pretrain.pth --to dinov2.pt
  python eval_linear.py --backbone dinov2.pt --data photos/ --mode logreg

By names and shapes alone it knows MAE, DINO, DINOv2, MoCo v1 to v3 (not of its CIFAR notebook), BEiT, I-JEPA,
CLIP's ViTs, and ViTs and ResNets of timm and torchvision, under any prefix; of several networks it takes the
one the paper evaluates (teacher, query encoder), and refuses what does not fill its network to the last
tensor. What no tensor shows it cannot see: anti-aliased ResNets, SigLIP's tanh-GELU.
"""

import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import timm
import torch
import torchvision
import tyro
from safetensors.torch import load_file
from torch import nn


@dataclass
class Args:
    file: tyro.conf.Positional[str]  # checkpoint to convert: .pth, .pt, .ckpt, .safetensors
    to: str = "backbone.pt"  # file to write, a new one
    prefix: str = ""  # of several networks one: what its names begin with, as "student"
    heads: int = 0  # of attention, where no tensor tells; 0: as published for this size
    statistics: Literal["", "imagenet", "half", "clip"] = ""  # mean and deviation, where no tensor tells
    activation: Literal["", "quick_gelu", "gelu"] = ""  # of a CLIP, where no tensor tells
    run_program: bool = False  # load TorchScript, which may run code: only files whose authors you trust


STATISTICS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3)}
STATISTICS |= {"clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}
# width and depth of a ViT: name, heads
VITS = {(128, 6): ("vit_nano", 4), (192, 12): ("vit_tiny", 3), (384, 12): ("vit_small", 6)}
VITS |= {(768, 12): ("vit_base", 12), (1024, 24): ("vit_large", 16), (1280, 32): ("vit_huge", 16)}
VITS |= {(1408, 40): ("vit_giant", 16), (1536, 40): ("vit_giant", 24)}

# a tensor that each encoder has: ViTs of timm, torchvision, CLIP; ResNets, also in a Sequential
ANCHOR = r"\b(patch_embed\.proj\.weight|conv_proj\.weight|class_embedding|(layer1|4)\.0\.conv1\.weight)$"
# what the paper evaluates: what stands beside it
RIVALS = {"online": "target", "teacher": "student", "encoder_q": "encoder_k", "target_encoder": r"\bencoder"}
RIVALS |= {"^(?!.*momentum)": "momentum"}  # MoCo v3, lightly
NOT_ENCODER = r"^(\w*heads?|fc|proj|prototypes|mask_token|decoder\w*|\w+_(resolution|length|size))\b|_index$"

# names in torchvision, CLIP, DINOv2: in timm; in a Sequential: in torchvision's ResNets
NAMES = {"class_(token|embedding)": "cls_token", r"(encoder\.pos|positional)_embedding": "pos_embed"}
NAMES |= {"conv_proj": "patch_embed.proj", "register_tokens": "reg_token", r"encoder\.ln\b|ln_post": "norm"}
NAMES |= {r"encoder\.layers\.encoder_layer_|transformer\.resblocks\.|^blocks\.\d+\.(?=\d)": "blocks."}
NAMES |= {"ln_pre": "norm_pre", "ln_": "norm", r"self_\w+": "attn", "in_proj_": "qkv.", "out_proj": "proj"}
NAMES |= {r"mlp\.(0|linear_1|c_fc|w12)\b": "mlp.fc1", r"mlp\.(3|linear_2|c_proj|w3)\b": "mlp.fc2"}
NAMES |= {r"^0\.": "conv1.", r"^1\.": "bn1."} | {rf"^{n + 3}\.": f"layer{n}." for n in (1, 2, 3, 4)}

# classes beside the weights in files of DINO, MAE, BEiT, open_clip: flags, paths, learning rates
IGNORED = "argparse.Namespace pathlib.PosixPath pathlib._local.PosixPath numpy.dtype".split()
IGNORED += ["numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"]


def flatten(part, start=""):
    """Dicts in dicts -> pairs of a name with dots and a tensor."""
    for key, value in part.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{start}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{start}{key}", value.detach()


def read_file(path, run_program):
    """{name with dots: tensor} of a whole checkpoint. Uses flatten."""
    inert = {"__init__": lambda *given: None, "__setstate__": lambda *given: None}
    for path_of_class in IGNORED:  # a class of that name takes its place, which keeps nothing
        module, name = path_of_class.rsplit(".", 1)
        torch.serialization.add_safe_globals([type(name, (), inert | {"__module__": module})])
    try:
        if run_program:
            file = torch.jit.load(path, map_location="cpu").state_dict()
        elif path.endswith(".safetensors"):
            file = load_file(path)
        else:
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the disk, zip, pickle
        if "TorchScript" in str(error):
            sys.exit(f"{path}: is a program (TorchScript); --run-program, if you trust its authors")
        reason = re.search(r"GLOBAL \S+|$", str(error))[0] or repr(error)
        sys.exit(f"{path}: not weights alone, and nothing was run: {reason:.120}")

    if not isinstance(file, dict) or {"method", "arch_args", "state_dict"} <= file.keys():
        sys.exit(f"{path}: holds a {type(file).__name__}; must be a dict of tensors, and no backbone.pt yet")
    return dict(flatten(file))


def find_encoder(tensors, args):
    """What stands before the names of the encoder to convert."""
    found = sorted({name[: match.start()] for name in tensors if (match := re.search(ANCHOR, name))})
    wanted = "." + args.prefix.strip(".") + "."
    chosen = [prefix for prefix in found if not args.prefix or wanted in "." + prefix]
    for better, other in RIVALS.items():
        if any(re.search(better, prefix) for prefix in chosen):
            chosen = [p for p in chosen if re.search(better, p) or not re.search(other, p)]

    if len(chosen) != 1:
        sys.exit(f"{args.file}: {[*tensors][:2]}, ...; known networks: {found}; --prefix must choose one")
    return chosen[0]


def recognise(state, prefix):
    """The method, and the encoder's tensors in the names of timm or torchvision."""
    is_vit = "patch_embed.proj.weight" in state
    of_pair = re.search("teacher|student", prefix)
    unplaced = "cls_token" in state and not state.get("pos_embed", torch.ones(1, 1))[:, :1].any()
    marks = {
        "beit": "blocks.0.attn.q_bias" in state,
        "clip": "class_embedding" in state or "norm_pre.weight" in state,
        "torchvision": "conv_proj.weight" in state,
        "moco_v3": re.search("(base|momentum)_encoder", prefix) and (unplaced or not is_vit),
        "mae": unplaced or "decoder_embed.weight" in state,
        "dinov2": "ls1" in " ".join(state) and (of_pair or "mask_token" in state),
        "ijepa": is_vit and "cls_token" not in state and "target_encoder" in prefix,
        "dino": of_pair,
        "moco": not is_vit and re.search("encoder_[qk]", prefix),
    }
    method = next((method for method, found in marks.items() if found), "timm" if is_vit else "resnet")

    if "class_embedding" in state:  # CLIP; a ResNet's conv1 keeps its name
        state["conv_proj.weight"] = state.pop("conv1.weight")
        state["class_embedding"] = state["class_embedding"][None, None]
        state["positional_embedding"] = state["positional_embedding"][None]
    if "register_tokens" in state:  # DINOv2; in timm only patches have positions
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    for there, here in NAMES.items():
        state = {re.sub(there, here, name): tensor for name, tensor in state.items()}
    return method, {name: tensor for name, tensor in state.items() if not re.search(NOT_ENCODER, name)}


def describe_resnet(state, method, args):
    """builder, arch, arch_args, image_size and feature_dim of a ResNet, for backbone.pt."""
    layers = 1 + sum("conv" in name for name in state)  # 1: fc
    wide = len(state["layer1.0.conv1.weight"]) == 128
    arch = f"wide_resnet{layers}_2" if wide else f"resnet{layers}"
    small = state["conv1.weight"].shape[-1] == 3
    arch_args = {"arch": arch, "stem": "cifar" if small else "imagenet"}
    return "torchvision.resnet", arch, arch_args, 32 if small else 224, 512 if layers < 50 else 2048


def describe_vit(state, method, args):
    """The same of a ViT. MoCo v3's small one without its prefix looks like MAE's, which published none."""
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    hidden = len(state["blocks.0.mlp.fc1.bias"])
    gated = state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden
    tables = [tensor for name, tensor in state.items() if "bias_table" in name]
    places = 0 if tables else state["pos_embed"].shape[1]
    side = (int(len(tables[0]) ** 0.5) + 1) // 2 if tables else int(places**0.5)
    size = side * patch

    arch, published = VITS.get((dim, depth), ("vit", 0))
    special = {("moco_v3", 384): 12, ("mae", 384): 0, ("clip", dim): min(dim // 64, 16)}
    special[("timm", 1536)] = 24 * ("gamma" in " ".join(state))  # DINOv2's; SigLIP's has 16
    published = tables[0].shape[1] if tables else special.get((method, dim), published)
    heads = args.heads or published
    if heads < 1 or dim % heads or (published not in (0, heads) and method != "timm"):
        sys.exit(f"--heads {heads}: {method} of width {dim} must have {published or 'a divisor of it'}")

    options = dict(img_size=size, patch_size=patch, embed_dim=dim, depth=depth)
    options |= dict(num_heads=heads, num_classes=0)
    parts = [
        (hidden != 4 * dim, dict(mlp_ratio=hidden / dim)),
        (gated, dict(mlp_layer="SwiGLUPacked", act_layer="silu")),
        ("gamma" in " ".join(state), dict(init_values=1e-5)),
        ("cls_token" not in state, dict(class_token=False, global_pool="avg", fc_norm=False)),
        ("cls_token" in state and places == side**2, dict(no_embed_class=True)),
        (method == "clip", dict(pre_norm=True, norm_eps=1e-5, act_layer=args.activation or "quick_gelu")),
        (method == "beit", dict(global_pool="token")),
        (len(tables) == 1, dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True)),
        (len(tables) > 1, dict(use_abs_pos_emb=False, use_rel_pos_bias=True)),
    ]
    for present, more in parts:
        options |= more if present else {}
    if "reg_token" in state:
        options["reg_tokens"] = state["reg_token"].shape[1]

    builder = "timm.Beit" if method == "beit" else "timm.VisionTransformer"
    image_size = 224 if (method, size) == ("dinov2", 518) else size  # at 518 only its training ends
    return builder, arch, options, image_size, dim


def resnet(arch, stem):
    """torchvision's ResNet without its classifier, images (B, 3, H, W) -> h (B, D); and D."""
    net = getattr(torchvision.models, arch)()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


def build_network(builder, arch_args):
    """The untrained network that a backbone.pt describes; norm_eps and mlp_layer stand there for what timm
    takes as classes. Uses resnet."""
    arch_args = dict(arch_args)
    if builder == "torchvision.resnet":
        return resnet(**arch_args)[0]
    if "norm_eps" in arch_args:
        arch_args["norm_layer"] = partial(nn.LayerNorm, eps=arch_args.pop("norm_eps"))
    if "mlp_layer" in arch_args:
        arch_args["mlp_layer"] = getattr(timm.layers, arch_args["mlp_layer"])
    classes = {"timm.VisionTransformer": timm.models.VisionTransformer, "timm.Beit": timm.models.Beit}
    return classes[builder](**arch_args)


def convert(args):
    """Write backbone.pt from a checkpoint."""
    if os.path.lexists(args.to) or not os.access(os.path.join(os.path.dirname(args.to), "."), os.W_OK):
        sys.exit(f"--to {args.to}: must be a new file, in a folder that can be written")

    tensors = read_file(args.file, args.run_program)
    prefix = find_encoder(tensors, args)
    try:
        state = {n[len(prefix) :]: t.float() for n, t in tensors.items() if n.startswith(prefix)}
        method, state = recognise(state, prefix)
        describe = describe_vit if "patch_embed.proj.weight" in state else describe_resnet
        builder, arch, arch_args, image_size, width = describe(state, method, args)
        with torch.device("meta"):
            net = build_network(builder, arch_args)
        net.load_state_dict(state, assign=True)
    except Exception as error:  # a name that is missing, a shape that does not fit
        sys.exit(f"{args.file}: '{prefix}' does not fill a network: {' '.join(str(error).split()):.600}")

    half = "imagenet" if "pos_embed" in state else "half"  # BEiT's of 22k have tables instead
    statistics = args.statistics or {"beit": half, "clip": "clip", "timm": ""}.get(method, "imagenet")
    if not statistics:
        sys.exit(f"{args.file}: no tensor tells --statistics: imagenet (DINO, DeiT) or half (most of timm)")
    if method == "clip" and not (args.activation or any("input_resolution" in name for name in tensors)):
        words = "quick_gelu (OpenAI) or gelu (open_clip; laion2b's ViT-L-14 needs --statistics half, too)"
        sys.exit(f"{args.file}: no tensor tells --activation: {words}")

    mean, std = STATISTICS[statistics]
    info = dict(method=method, arch=arch, builder=builder, arch_args=arch_args, image_size=image_size)
    info |= dict(mean=mean, std=std, feature_dim=width, state_dict=net.state_dict())
    torch.save(info, temporary := f"{args.to}.{os.getpid()}")
    os.replace(temporary, args.to)
    print(f"{args.file}: {method} under '{prefix}', {arch} {arch_args}, {len(state)} tensors, ", end="")
    print(f"{image_size} px, {statistics} mean and deviation -> {args.to}")


if __name__ == "__main__":
    convert(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
