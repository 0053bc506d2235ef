# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "tyro"]
# ///
"""Convert weights: official and foreign checkpoints to backbone.pt, and backbone.pt to timm and torchvision.

In:   python convert.py dino_deitsmall16_pretrain.pth --to dino.pt
      python eval_linear.py --backbone dino.pt --data photos/ --mode logreg
Out:  python convert.py runs/dino/backbone.pt --export timm --to vit.pth

It knows, by what is in a file, the official ones of MAE, DINO (backbone, or full), DINOv2 (released, or of a
training; with and without registers), MoCo v1, v2, v3, BEiT (pretrained), I-JEPA, CLIP (its ViT of images),
and flat dicts of timm and torchvision (ResNets, ViTs); says which; and refuses what does not fill a network
completely, with the names. It takes the network that the paper evaluates: DINO's teacher, I-JEPA's target
encoder, MoCo's query encoder. backbone.pt has torchvision's names for ResNets and timm's for ViTs: in DINOv2
with registers, [CLS] then holds its position; BEiT's one table of relative positions stands in every block.
Nothing in a file is run: torch.load(weights_only=True). But CLIP's official files are programs (TorchScript);
only --format clip loads them, with torch.jit.load: do that with files of their authors alone.
"""

import argparse
import math
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torchvision
import tyro


@dataclass
class Args:
    file: tyro.conf.Positional[str]  # checkpoint of someone else, or with --export a backbone.pt
    to: str = "backbone.pt"  # file to write
    export: Literal["", "timm", "torchvision", "safetensors"] = ""  # the other way; prints lines that load it
    format: str = "auto"  # dino, mae, timm, ... where files look alike; a wrong name lists all
    network: str = ""  # DINO: teacher or student; I-JEPA: target_encoder or encoder; default: the first
    heads: int = 0  # of attention, which no tensor shows; 0: those of the published model of this width
    statistics: Literal["auto", "imagenet", "half", "clip"] = "auto"  # mean and deviation that images get


STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
# width of ViTs: name, depth, heads; in MoCo v3 the small one has 12 heads
VITS = {128: ("vit_nano", 6, 4), 192: ("vit_tiny", 12, 3), 384: ("vit_small", 12, 6)}
VITS |= {768: ("vit_base", 12, 12), 1024: ("vit_large", 24, 16), 1280: ("vit_huge", 32, 16)}
VITS |= {1408: ("vit_giant", 40, 16), 1536: ("vit_giant", 40, 24)}
RESNETS = "resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2".split()

# names there: names in timm
TORCHVISION = {"class_token": "cls_token", "conv_proj.": "patch_embed.proj.", "encoder.ln.": "norm."}
TORCHVISION |= {"encoder.pos_embedding": "pos_embed", "encoder.layers.encoder_layer_": "blocks."}
TORCHVISION |= {".self_attention.in_proj_": ".attn.qkv.", ".self_attention.out_proj.": ".attn.proj."}
TORCHVISION |= {".ln_1.": ".norm1.", ".ln_2.": ".norm2.", ".mlp.0.": ".mlp.fc1.", ".mlp.3.": ".mlp.fc2."}
TORCHVISION |= {".mlp.linear_1.": ".mlp.fc1.", ".mlp.linear_2.": ".mlp.fc2."}  # files of older versions
CLIP = {"class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1.": "patch_embed.proj."}
CLIP |= {"ln_pre.": "norm_pre.", "ln_post.": "norm.", "transformer.resblocks.": "blocks."}
CLIP |= {".attn.in_proj_": ".attn.qkv.", ".attn.out_proj.": ".attn.proj.", ".mlp.c_fc.": ".mlp.fc1."}
CLIP |= {".ln_1.": ".norm1.", ".ln_2.": ".norm2.", ".mlp.c_proj.": ".mlp.fc2."}
DINOV2 = {"register_tokens": "reg_token", ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


@dataclass
class Format:
    """A kind of file: how to know it, where the encoder's tensors lie in it, and what their use takes."""

    title: str
    sign: str  # regular expression of a name that tells it from the formats below it
    inside: tuple[str, ...]  # key of the tensors, the first one there; "": the file itself
    prefixes: tuple[str, ...] = ("",)  # of the encoder's names, the first one there; others are left out
    names: dict = field(default_factory=dict)
    needs: str = "cls_token pos_embed"  # besides what every ViT has
    arch_args: dict = field(default_factory=dict)  # of eval_linear.py's ViT


NOT_ENCODER = r"^(head|heads|fc|mask_token|decoder_\w+|dino_head|ibot_head|lm_head|proj)\b|_position_index$"
ANY, QUERY, STUDENT = ("state_dict", "model", ""), ("module.encoder_q.", "encoder_q."), "module.backbone."
SCALED = "cls_token pos_embed blocks.0.ls1.gamma blocks.0.ls2.gamma"
PRENORM, EPS = "cls_token pos_embed norm_pre.weight norm_pre.bias", {"eps": 1e-5}
VISUAL, QUICK = r"^visual\.conv1\.", EPS | {"quick_gelu": True}
OFFSET, FIXED = {"offset": 0.1}, {"xavier": True, "fixed_positions": True}
MOCO_V3 = "MoCo v3, base encoder", r"^module\.base_", ANY, ("module.base_encoder.",)
PATCHES, PLAIN = r"^patch_embed\.proj\.weight$", "cls_token pos_embed"
FORMATS = {
    "clip": Format("CLIP, image tower", VISUAL, ANY, ("visual.",), CLIP, PRENORM, QUICK),
    "open_clip": Format("open_clip, image tower", VISUAL, ANY, ("visual.",), CLIP, PRENORM, EPS),
    "moco": Format("MoCo v1 or v2, query encoder", r"^(module\.)?encoder_q\.conv1\.", ANY, QUERY),
    "moco_v3": Format(*MOCO_V3, arch_args=FIXED | {"xavier": "qkv"}),
    "ijepa": Format("I-JEPA", "^module", ("target_encoder", "encoder"), ("module.",), {}, "pos_embed"),
    "dinov2_training": Format("DINOv2, teacher", "^dino_head", ("teacher",), ("backbone.",), DINOV2, SCALED),
    "dino_full": Format(
        "DINO", r"^(module\.)?head\.last", ("teacher", "student"), (STUDENT, "backbone."), {}, PLAIN, OFFSET
    ),
    "beit": Format("BEiT", r"\.attn\.q_bias$", ("model", "module", ""), needs="cls_token"),
    "dinov2": Format("DINOv2, released", r"^mask_token$", ("",), ("",), DINOV2, SCALED),
    "mae": Format("MAE, encoder", r"^(decoder_embed\.weight|cls_token)$", ("model",), arch_args=FIXED),
    "torchvision": Format("torchvision, ViT", r"^conv_proj\.weight$", ANY, names=TORCHVISION),
    "resnet": Format("torchvision or timm, ResNet", r"^layer1\.0\.conv1\.weight$", ANY),
    "dino": Format("DINO, backbone", PATCHES, ("",), arch_args=OFFSET),
    "timm": Format("timm, ViT", PATCHES, ANY, needs="pos_embed"),
}


# --- Reading ------------------------------------------------------------------------------------------------
def read_file(path, programs=False):
    """What lies in a checkpoint, on the CPU; SystemExit if it is no file, damaged, or more than weights.
    programs: load TorchScript too, which may run code."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in names):
            if programs:
                return torch.jit.load(path, map_location="cpu").state_dict()
            raise SystemExit(
                f"{path}: is a program (TorchScript), as CLIP's official files. --format clip loads it;"
                " do that only with a file of someone you trust"
            )
        torch.serialization.add_safe_globals([argparse.Namespace])  # the flags in files of DINO and MAE
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise SystemExit(f"{path}: {error}; pip install it")
    except Exception as error:  # of zip, pickle, the disk
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise SystemExit(f"{path}: holds more than weights ({found[1]}); nothing of it was run")
        raise SystemExit(f"{path}: cannot be read: damaged, or no checkpoint ({error!r:.120})")


def tensors(file, key):
    """The tensors under a key of the file, {} if there is no such dict."""
    part = file.get(key) if key else file
    part = part if isinstance(part, dict) else {}
    return {k: v for k, v in part.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def is_format(name, state):
    """Whether the names are those of a format; MAE's encoder alone is known by [CLS], which has no place."""
    positions = state.get("pos_embed", torch.zeros(1, 1, 1))
    placed = positions.ndim == 3 and positions.numel() and positions[0, 0].any()
    found = any(re.search(FORMATS[name].sign, tensor) for tensor in state)
    return found and not (name == "mae" and placed and "decoder_embed.weight" not in state)


def recognise(file, args):
    """Name of the format, and the encoder's tensors in the names of timm or torchvision, in float32."""
    if not isinstance(file, dict):
        raise SystemExit(f"{args.file}: holds a {type(file).__name__}, not a dict of tensors")
    if args.format not in ("auto", *FORMATS):
        raise SystemExit(f"--format {args.format}: must be auto or one of {', '.join(FORMATS)}")
    names = [name for name in FORMATS if args.format in ("auto", name)]
    if args.format == "auto" and "dino" not in Path(args.file).name:
        names.remove("dino")  # looks like timm's, but for the file's name
    for name in names:
        keys = [key for key in FORMATS[name].inside if args.network in ("", key)]
        key, state = next(((key, state) for key in keys if (state := tensors(file, key))), ("", {}))
        if is_format(name, state):
            break
    else:
        found = next((state for key in (*file, "") if (state := tensors(file, key))), file)
        network = f" with --network {args.network}" if args.network else ""
        wanted = "of a known format" if args.format == "auto" else f"of format {args.format}"
        some = ", ".join(map(str, [*found][:4])) or "nothing"
        raise SystemExit(f"{args.file}: is not {wanted}{network}; it has {some}, ...")
    form = FORMATS[name]
    if {"teacher", "target_encoder"} & {form.inside[0]} and key not in (form.inside[0], args.network):
        raise SystemExit(f"{args.file}: {form.title} without {form.inside[0]}; take --network {key}?")
    if args.format == "auto" and name == "clip" and "input_resolution" not in state:
        raise SystemExit(f"{args.file}: give --format clip (QuickGELU, OpenAI's files) or open_clip (GELU)")
    prefix = next((p for p in form.prefixes if any(k.startswith(p) for k in state)), "")
    state = {k[len(prefix) :]: v.float() for k, v in state.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not re.search(NOT_ENCODER, k)}
    if "clip" in name and "layer1.0.conv1.weight" in state:
        raise SystemExit(f"{args.file}: is a CLIP with a ResNet of its own kind; only its ViTs are converted")
    for there, here in form.names.items():
        state = {k.replace(there, here): v for k, v in state.items()}
    return name, state


# --- ViTs and ResNets ---------------------------------------------------------------------------------------
def adapt(name, state):
    """The tensors as timm has them, where more than a name differs."""
    chunk = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2's trainings count the blocks in chunks
    state = {chunk.sub(r"blocks.\1.", k): v for k, v in state.items()}
    for k in {"cls_token", "pos_embed"} & state.keys() if "clip" in name else ():
        state[k] = state[k].view(1, -1, state[k].shape[-1])
    if "reg_token" in state and name.startswith("dinov2") and "cls_token" in state and "pos_embed" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        blocks = {k.split(".")[1] for k in state if k.startswith("blocks.")}
        state |= {f"blocks.{i}.attn.relative_position_bias_table": shared.clone() for i in blocks}
    return state


def vit_shapes(state, needs):
    """{name: shape} that a ViT of the width, patch and depth of `state` must have: what all ViTs have, the
    names `needs`, and in every block what one block has."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    blocks = {}
    for name, tensor in state.items():
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            blocks.setdefault(int(match[1]), {})[match[2]] = tuple(tensor.shape)
    some = {name: shape for block in blocks.values() for name, shape in block.items()}
    ins, outs = some.get("mlp.fc2.weight", (dim, 4 * dim))[1], some.get("mlp.fc1.weight", (4 * dim, dim))[0]
    block = {"norm1": (dim,), "norm2": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    block |= {"mlp.fc1": (outs, dim), "mlp.fc2": (dim, ins)}
    block = {f"{k}.{end}": s[:n] for k, s in block.items() for end, n in (("weight", 2), ("bias", 1))}
    pairs = [{"ls1.gamma", "ls2.gamma"}]
    if "attn.q_bias" in some:  # BEiT: no bias of the keys
        del block["attn.qkv.bias"]
        pairs += [{"attn.q_bias", "attn.v_bias"}, {"gamma_1", "gamma_2"}]
        table = "attn.relative_position_bias_table"
        block |= {table: some[table]} if table in some else {}
    block |= {name: (dim,) for pair in pairs if pair & some.keys() for name in pair}
    shapes = {"patch_embed.proj.weight": (dim, 3, patch, patch), "norm.weight": (dim,), "norm.bias": (dim,)}
    if "norm_pre.weight" not in needs:
        shapes["patch_embed.proj.bias"] = (dim,)
    single = {"cls_token": (1, 1, dim), "norm_pre.weight": (dim,), "norm_pre.bias": (dim,)}
    optional = [name for name in ("cls_token", "reg_token", "pos_embed") if name in state]
    for name in (*needs.split(), *optional):
        shape = tuple(state[name].shape[:2]) + (dim,) if name in state and state[name].ndim == 3 else (dim,)
        shapes[name] = single.get(name, shape)
    depth = max(blocks, default=0) + 1
    return shapes | {f"blocks.{i}.{k}": shape for i in range(depth) for k, shape in block.items()}


def describe_vit(name, state, args, hint):
    """arch, arch_args and image_size of a ViT; SystemExit if heads or size are not the published ones."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    arch, published, heads = VITS.get(dim, ("vit", depth, 0))
    free = name == "timm" or (name == "mae" and dim <= 384)  # not published: --heads decides
    if name == "moco_v3" and dim == 384:
        heads = 12
    elif "clip" in name:
        heads = 16 if name == "open_clip" and dim in (1280, 1408, 1664) else dim // 64
    elif depth != published or (free and name == "mae"):
        heads = 0
    if not free and "clip" not in name and depth != published:
        raise SystemExit(f"{args.file}: has {depth} blocks; the {arch} of width {dim} has {published}")
    if isinstance(hint, str) and hint != arch and hint in [other for other, _, _ in VITS.values()]:
        raise SystemExit(f"{args.file}: says that it is a {hint}, but its width {dim} is that of a {arch}")
    table, positions = state.get("blocks.0.attn.relative_position_bias_table"), state.get("pos_embed")
    heads = heads if table is None else table.shape[1]
    if args.heads and heads and args.heads != heads and not free:
        raise SystemExit(f"--heads {args.heads}: the {arch} of {FORMATS[name].title} has {heads}")
    heads = args.heads or heads
    if heads < 1 or dim % heads:
        raise SystemExit(f"--heads {heads}: give the number of heads, a divisor of the width {dim}")
    options = {"patch_size": patch, "heads": heads} | FORMATS[name].arch_args
    if table is None and positions is None:
        raise SystemExit(f"{args.file}: has neither pos_embed nor a table of relative positions")
    side = math.isqrt(max(0, len(table) - 3) if table is not None else positions.shape[1])
    if table is not None:
        fits, side = side % 2 and side**2 == len(table) - 3, (side + 1) // 2
    else:
        fits = positions.shape[1] - side**2 in ((0, 1) if "cls_token" in state else (0,))
    if not fits:
        raise SystemExit(f"{args.file}: its positions are no square grid, with or without [CLS]")
    if name.startswith("dinov2"):
        options |= {} if "reg_token" in state else {"offset": 0.1}
        side = 224 // 14 if (patch, side) == (14, 37) else side  # trained at 518 px at last, evaluated at 224
    options |= {"fixed_positions": True} if name in ("ijepa", "moco_v3") else {}
    return arch, options, side * patch


def describe_resnet(state):
    """arch and arch_args of the ResNet whose names and shapes fit best."""
    ours = {(k, tuple(v.shape)) for k, v in state.items()}
    options = {"stem": "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet"}
    return max(RESNETS, key=lambda arch: len(ours & set(resnet_shapes(arch, **options).items()))), options


def resnet_shapes(arch, stem):
    """{name: shape} of torchvision's ResNet without its classifier."""
    with torch.device("meta"):
        net = getattr(torchvision.models, arch)()
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith("fc.")}
    return shapes | ({"conv1.weight": (64, 3, 3, 3)} if stem == "cifar" else {})


def convert(args):
    """Write backbone.pt from a foreign checkpoint, or with --export the other way."""
    if args.export:
        return export(args)
    file = read_file(args.file, programs="clip" in args.format)
    if isinstance(file, dict) and {"method", "arch_args", "state_dict"} <= file.keys():
        raise SystemExit(f"{args.file}: is a backbone.pt already; --export turns it into other formats")
    writable(args.to, args.file)
    name, state = recognise(file, args)
    form, statistics = FORMATS[name], args.statistics
    if "conv1.weight" in state:
        arch, options = describe_resnet(state)
        shapes, image_size = resnet_shapes(arch, **options), 32 if options["stem"] == "cifar" else 224
        counters = [k for k in shapes if k.endswith("num_batches_tracked") and k not in state]
        state |= {k: torch.tensor(0) for k in counters}  # not in files of torch 0.4.0
    elif state.get("patch_embed.proj.weight", torch.zeros(1)).ndim == 4:
        state = adapt(name, state)
        shapes = vit_shapes(state, form.needs)
        if name == "ijepa":  # with [CLS] it is another method's
            shapes.pop("cls_token", None)
    else:
        raise SystemExit(f"{args.file}: {form.title}, but without conv1.weight or patch_embed.proj.weight")
    faults = {"missing": shapes.keys() - state.keys(), "unexpected": state.keys() - shapes.keys()}
    both = shapes.keys() & state.keys()
    faults["of another shape"] = {k for k in both if shapes[k] != tuple(state[k].shape)}
    if any(faults.values()):
        listed = (f"{len(v)} {k}: {', '.join(sorted(v)[:6])}" for k, v in faults.items() if v)
        raise SystemExit(f"{args.file}: {form.title}, but not complete: {'; '.join(listed)}")
    if "conv1.weight" not in state:
        flags = file.get("args")
        hint = file.get("arch") or (getattr(flags, "arch", "") if flags else "")
        arch, options, image_size = describe_vit(name, state, args, hint)
    if statistics == "auto" and name == "timm":
        raise SystemExit(
            f"{args.file}: {form.title}: give --statistics imagenet or half; timm has models of both"
        )
    if statistics == "auto":  # BEiT's file with positions was trained on ImageNet-1k, with its statistics
        half = name == "beit" and "pos_embed" not in state
        statistics = "half" if half else "clip" if "clip" in name else "imagenet"
    mean, std = STATISTICS[statistics]
    width = [len(v) for k, v in state.items() if re.search(r"^(norm|layer4\..*)\.bias$", k)][-1]
    method = {"moco_v3": "moco_v3", "open_clip": "clip"}.get(name, name.split("_")[0])
    info = {"method": method, "arch": arch, "arch_args": options}
    info |= {"image_size": image_size, "mean": mean, "std": std, "feature_dim": width}
    torch.save(info | {"state_dict": state}, f"{args.to}.tmp")
    os.replace(f"{args.to}.tmp", args.to)
    title = form.title + (f", {args.network}" if args.network else "")
    print(f"{args.file}: {title}, {arch} {options}, {len(state)} tensors, ", end="")
    print(f"images of {image_size} px, {statistics} mean and deviation -> {args.to}")
    return info


def writable(to, file):
    """SystemExit unless `to` can be written and is another file than the one that is read."""
    path = Path(to)
    if path.is_dir() or not path.parent.is_dir() or path.resolve() == Path(file).resolve():
        raise SystemExit(f"--to {to}: must be a new file, in a folder that exists")


# --- The other way ------------------------------------------------------------------------------------------
def export(args):
    """Write the weights of a backbone.pt as timm, torchvision or safetensors users want them."""
    info = read_file(args.file)
    if not isinstance(info, dict) or not {"method", "arch_args", "state_dict"} <= info.keys():
        raise SystemExit(f"{args.file}: is no backbone.pt; without --export it is converted to one")
    state, options = info["state_dict"], info["arch_args"]
    to = args.to if args.to != "backbone.pt" else f"{Path(args.file).with_suffix('')}-{args.export}.pth"
    if args.export == "safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise SystemExit("--export safetensors: needs the package safetensors (pip install safetensors)")
        to = str(Path(to).with_suffix(".safetensors"))
        writable(to, args.file)
        save_file({k: v.contiguous() for k, v in state.items()}, to)
        lines = ["from safetensors.torch import load_file", f"state_dict = load_file({to!r})"]
    else:
        lines = timm_lines(info) if args.export == "timm" else torchvision_lines(info, args)
        if args.export == "torchvision" and "conv1.weight" not in state:
            for there, here in TORCHVISION.items():
                state = {k.replace(here, there): v for k, v in state.items()}
        writable(to, args.file)
        torch.save(state, to)
        lines.append(f"net.load_state_dict(torch.load({to!r}))")
    if options.get("offset"):
        print("At other image sizes the positions of this method sit a little aside, not so in timm.")
    print(f"{to}: {len(state)} tensors. To load it:", *lines, sep="\n  ")
    return lines


def vit_numbers(info):
    """width, depth, heads, patch, hidden width of the MLP, side of the grid of a ViT."""
    state, options = info["state_dict"], info["arch_args"]
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    heads = options.get("heads") or VITS[dim][2]
    positions = state.get("pos_embed")
    side = math.isqrt(positions.shape[1]) if positions is not None else info["image_size"] // patch
    return dim, depth, heads, patch, state["blocks.0.mlp.fc1.weight"].shape[0], side


def timm_lines(info):
    """Python that builds timm's network for the weights of a backbone.pt."""
    state, options = info["state_dict"], info["arch_args"]
    if "conv1.weight" in state:
        lines = ["import timm, torch", f"net = timm.create_model({info['arch']!r}, num_classes=0)"]
        return lines + cifar_lines(options)
    dim, depth, heads, patch, hidden, side = vit_numbers(info)
    words = f"img_size={side * patch}, patch_size={patch}, embed_dim={dim}, depth={depth}, num_heads={heads}"
    words += ", num_classes=0"
    if "blocks.0.attn.q_bias" in state:
        words += "" if "pos_embed" in state else ", use_abs_pos_emb=False, use_rel_pos_bias=True"
        words += ", init_values=0.1" if "blocks.0.gamma_1" in state else ""
        return ["import timm, torch", f"net = timm.models.beit.Beit({words}, global_pool='token')"]
    if "blocks.0.ls1.gamma" in state:
        words += ", init_values=1.0"
    if "cls_token" not in state:
        words += ", class_token=False, global_pool='avg', fc_norm=False"
    if "reg_token" in state:
        words += f", reg_tokens={state['reg_token'].shape[1]}"
    if "cls_token" in state and side**2 == state["pos_embed"].shape[1]:
        words += ", no_embed_class=True"
    if hidden != state["blocks.0.mlp.fc2.weight"].shape[1]:
        words += f", mlp_ratio={hidden / dim}, mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU"
    elif hidden != 4 * dim:
        words += f", mlp_ratio={hidden / dim}"
    if "norm_pre.weight" in state:
        words += ", pre_norm=True, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5)"
    if options.get("quick_gelu"):
        words += ", act_layer=timm.layers.QuickGELU"
    return ["import functools, timm, torch", f"net = timm.models.VisionTransformer({words})"]


def torchvision_lines(info, args):
    """Python that builds torchvision's network for the weights of a backbone.pt."""
    state = info["state_dict"]
    if "conv1.weight" in state:
        lines = ["import torch, torchvision", f"net = torchvision.models.{info['arch']}()"]
        return [*lines, "net.fc = torch.nn.Identity()", *cifar_lines(info["arch_args"])]
    foreign = [k for k in state if re.search(r"\.ls\d|gamma_|reg_token|norm_pre|q_bias|bias_table", k)]
    if foreign or "cls_token" not in state:
        words = f"no {foreign[0]}" if foreign else "always a cls_token"
        raise SystemExit(f"{args.file}: torchvision's ViT has {words}; use --export timm")
    dim, depth, heads, patch, hidden, side = vit_numbers(info)
    words = f"image_size={side * patch}, patch_size={patch}, num_layers={depth}, num_heads={heads}"
    words += f", hidden_dim={dim}, mlp_dim={hidden}"
    lines = ["import torch, torchvision", f"net = torchvision.models.VisionTransformer({words})"]
    return [*lines, "net.heads = torch.nn.Identity()"]


def cifar_lines(options):
    """For the small stem, two layers to exchange."""
    if options.get("stem") != "cifar":
        return []
    conv = "net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)"
    return [conv, "net.maxpool = torch.nn.Identity()"]


if __name__ == "__main__":
    convert(tyro.cli(Args, description=__doc__.replace("\n", "\n ")))  # or tyro joins lines
