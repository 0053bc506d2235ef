"""convert.py: files of every official format, made here, give the features of the model they came from."""

import argparse
import functools
import importlib
import pickle
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from conftest import load, shaken, tiny_args
from safetensors.torch import save_file
from timm.models import VisionTransformer
from timm.models.beit import Beit

import convert
import moco

NANO = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 16 / 3}
NO_CLASS = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def noisy(net, by=0.1):
    """Every weight away from its start; of a huge one the first row, many times: a small file."""
    shaken(net, torch.Generator().manual_seed(0), by)
    for weight in net.parameters():
        if weight.numel() > 30_000:
            weight.data = weight.data[:1].clone().expand(weight.shape)
    return net


def vit(**options):
    return noisy(VisionTransformer(**NANO | options))


def beit_vit(**options):
    return noisy(Beit(**NANO | {"global_pool": "token"} | options))


def headless(net, head="fc"):
    """The weights of a whole network, and the network without its head."""
    state = net.state_dict()
    setattr(net, head, torch.nn.Identity())
    return state, net


def resnet(by=torchvision.models.resnet18):
    return headless(noisy(by(), 0.01))


def under(prefix, part):
    return {prefix + name: value for name, value in part.items()}


def others(part):
    """The same names and shapes, other weights: what must not be taken."""
    part = {name: others(value) if isinstance(value, dict) else value for name, value in part.items()}
    return {name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in part.items()}


def network(info):
    net = convert.build_network(info["builder"], info["arch_args"])
    net.load_state_dict(info["state_dict"])
    return net.eval()


def converted(file, path="file.pth", to="backbone.pt", **flags):
    """backbone.pt of a file, as anyone may load it."""
    torch.save(file, path)
    Path(to).unlink(missing_ok=True)
    convert.convert(convert.Args(path, to, **{"heads": 3} | flags))
    return load(to)


@pytest.fixture
def quick(monkeypatch):
    """The same without files, and with one network for all files that are of the same one."""
    built, saved, build = {}, {}, convert.build_network

    def convert_in_memory(file, **flags):
        monkeypatch.setattr(convert, "read_file", lambda path, run_program: dict(convert.flatten(file)))
        convert.convert(convert.Args("file.pth", **{"heads": 3} | flags))
        return saved.pop("info")

    def build_once(*words):
        return built.get(repr(words)) or built.setdefault(repr(words), build(*words))

    monkeypatch.setattr(convert, "build_network", build_once)
    monkeypatch.setattr(torch, "save", lambda info, path: saved.update(info=info))
    monkeypatch.setattr(convert.os, "replace", lambda temporary, path: None)
    return convert_in_memory


def refused(words, file, **flags):
    with pytest.raises(SystemExit, match=words) as stop:
        converted(file, **flags)
    assert "\n" not in str(stop.value) and not list(Path().glob("backbone.pt*"))


def same_features(info, theirs, atol=1e-4):
    """Of images of the size that the positions are for."""
    side = info["arch_args"].get("img_size", 64)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = network(info)(images)
        torch.testing.assert_close(ours, theirs.eval()(images), atol=atol, rtol=1e-4)
    assert ours.shape == (2, info["feature_dim"])


# Formats: each function yields kinds of files of a family, the method and statistics that must come out,
# the file, the published network that it is of, and flags where no tensor tells


def mae():
    net = vit()
    net.pos_embed.data[:, 0] = 0  # as in all of its files: [CLS] has no position
    yield "released", "mae imagenet", net.state_dict(), net
    net = vit()
    decoder = {"mask_token": torch.ones(1, 1, 48), "decoder_pos_embed": torch.ones(1, 17, 16)}
    decoder |= {"decoder_embed.weight": torch.ones(16, 48), "decoder_blocks.0.norm1.bias": torch.ones(16)}
    yield "training", "mae imagenet", net.state_dict() | decoder, net


def dino():
    net = vit()
    state = net.state_dict()
    yield "backbone", "timm imagenet", state, net, {"statistics": "imagenet"}
    head = {"head.mlp.0.weight": torch.ones(8, 48), "head.last_layer.weight_g": torch.ones(4, 1)}
    teacher = under("backbone.", state) | head
    file = {"teacher": teacher, "student": under("module.", others(teacher)), "epoch": 100}
    flags = argparse.Namespace(arch="vit_small", lr=1.0, output_dir=Path("run"))
    file |= {"dino_loss": {"center": torch.ones(1, 4)}, "args": flags}
    file["optimizer"] = {"param_groups": [{"lr": np.float64(1e-3), "params": [0]}]}
    yield "full", "dino imagenet", file, net
    state, net = resnet()
    head = {"module.backbone.prototypes.weight": torch.ones(9, 4), "module.head.mlp.0.weight": torch.ones(8)}
    teacher = under("module.backbone.", state) | head
    yield "resnet", "dino imagenet", {"student": others(teacher), "teacher": teacher}, net


def dinov2():
    net = vit(init_values=1.0)
    released = net.state_dict() | {"mask_token": torch.zeros(1, 48)}
    yield "released", "dinov2 imagenet", released, net
    chunks = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", name): tensor for name, tensor in released.items()}
    teacher = under("backbone.", chunks) | {"dino_head.mlp.0.weight": torch.ones(8, 48)}
    yield "training", "dinov2 imagenet", {"teacher": teacher}, net
    net = vit(init_values=1.0, reg_tokens=4, no_embed_class=True, **GATED)
    state = net.state_dict()
    giant = {name.replace("fc1", "w12").replace("fc2", "w3"): tensor for name, tensor in state.items()}
    first = torch.randn(1, 1, 48)  # the position of [CLS], which timm adds to the token
    giant["register_tokens"] = giant.pop("reg_token")
    giant["cls_token"] = state["cls_token"] - first
    giant["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    yield "giant", "dinov2 imagenet", giant | {"mask_token": torch.zeros(1, 48)}, net


def moco_v1_v2():
    for version, mlp in (("v1", False), ("v2", True)):
        model = noisy(moco.MoCo("resnet18", queue_size=16, mlp=mlp), 0.01)
        state = under("module.", model.state_dict())
        model.encoder_q.fc = torch.nn.Identity()
        file = {"epoch": 200, "arch": "resnet18", "state_dict": state}
        yield version, "moco imagenet", file, model.encoder_q


def moco_v3():
    net = vit()
    net.pos_embed.data[:, 0] = 0
    state = net.state_dict() | {"head.0.weight": torch.ones(8, 48), "head.1.running_mean": torch.ones(8)}
    file = under("module.base_encoder.", state) | under("module.momentum_encoder.", others(state))
    file |= {"module.predictor.0.weight": torch.ones(1)}
    yield "vit", "moco_v3 imagenet", {"arch": "vit_small", "state_dict": file}, net
    state, net = resnet()
    state["fc.1.running_mean"] = torch.ones(4)
    file = under("module.momentum_encoder.", others(state)) | under("module.base_encoder.", state)
    yield "resnet", "moco_v3 imagenet", {"state_dict": file}, net


def beit():
    index = torch.zeros(17, 17, dtype=torch.long)
    net = beit_vit(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    more = {"mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(9, 48)}
    more |= {"rel_pos_bias.relative_position_index": index}
    yield "shared table", "beit half", net.state_dict() | more, net
    net = beit_vit(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    more = {"blocks.0.attn.relative_position_index": index}
    yield "tables of blocks", "beit half", net.state_dict() | more, net
    net = beit_vit()  # the released file of 800 epochs: absolute positions, no tables, no layer scale
    yield "of ImageNet-1k", "beit imagenet", net.state_dict(), net


def ijepa():
    net = vit(**NO_CLASS)
    target = under("module.", net.state_dict())
    file = {"encoder": others(target), "target_encoder": target, "epoch": 300}
    file |= {"predictor": {"module.predictor_pos_embed": torch.ones(1, 16, 8)}}
    yield "training", "ijepa imagenet", file, net


def open_clip_model(quick_gelu):
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    net = noisy(open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu))
    state = net.state_dict()
    net.visual.proj = None  # features before the projection
    return state, net.visual


def clip():
    state, net = open_clip_model(True)
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8)}
    yield "of OpenAI", "clip clip", state | sizes, net
    yield "without sizes", "clip clip", state, net, {"activation": "quick_gelu"}
    yield "of open_clip", "clip clip", *open_clip_model(False), {"activation": "gelu"}
    eps = functools.partial(torch.nn.LayerNorm, eps=1e-5)
    net = vit(pre_norm=True, norm_layer=eps, act_layer="quick_gelu", num_classes=8)
    yield "of timm", "clip clip", *headless(net, "head"), {"activation": "quick_gelu"}


def of_timm():
    half = {"statistics": "half"}
    yield "with head", "timm half", *headless(vit(num_classes=10), "head"), half
    net = vit(init_values=1.0, reg_tokens=2, **GATED)  # here [CLS] and registers have positions
    yield "with registers", "timm half", net.state_dict(), net, half
    net = vit(mlp_ratio=3.0, **NO_CLASS)
    yield "without class", "timm half", net.state_dict(), net, half
    yield "resnet", "resnet imagenet", *resnet(lambda: timm.create_model("resnet18"))


def of_torchvision():
    sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 192}
    net = noisy(torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes))
    state, net = headless(net, "heads")
    yield "vit", "torchvision imagenet", state, net
    spelt = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
    older = {re.sub(r"mlp\.[03]", lambda found: spelt[found[0]], name): state[name] for name in state}
    yield "vit of older versions", "torchvision imagenet", older, net
    state, net = resnet()
    yield "resnet", "resnet imagenet", state, net
    older = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    yield "resnet of older versions", "resnet imagenet", older, net


def of_lightly():
    net = resnet()[1]
    sequential = torch.nn.Sequential(*list(net.children())[:-1], torch.nn.Flatten())
    yield "sequential", "resnet imagenet", sequential.state_dict(), sequential
    net.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = torch.nn.Identity()
    yield "small images", "resnet imagenet", net.state_dict(), net


FAMILIES = (mae, dino, dinov2, moco_v1_v2, moco_v3, beit, ijepa, clip, of_timm, of_torchvision, of_lightly)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


@functools.cache
def kinds(family):
    """{kind: what must come out, file, network, flags}"""
    torch.manual_seed(0)
    return {kind: (*rest, {})[:4] for kind, *rest in family()}


@each_family
def test_features_are_those_of_the_published_code(family):
    for kind, (expected, file, theirs, flags) in kinds(family).items():
        info = converted(file, **flags)
        same_features(info, theirs)
        method, statistics = expected.split()
        assert info["method"] == method
        assert (tuple(info["mean"]), tuple(info["std"])) == convert.STATISTICS[statistics]
        is_resnet = "stem" in info["arch_args"]
        assert info["image_size"] == (224 if is_resnet and kind != "small images" else 32)
        assert info["arch"] == ("resnet18" if is_resnet else "vit")
        for name, tensor in info["state_dict"].items():
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == torch.float32 or name.endswith("num_batches_tracked")


# what stands before the names of the encoder, or of the better of two and of the other
WRAPPERS = """state_dict. model. model.module. module. _orig_mod. _orig_mod.module. backbone. module.backbone.
encoder. module.encoder. state_dict.model.backbone. online_encoder.net. teacher.|student.
teacher.backbone.|student.module.backbone. teacher_backbone.|student_backbone. backbone.|backbone_momentum.
state_dict.encoder_q.|state_dict.encoder_k. online_encoder.net.|target_encoder.net.""".split()
BESIDE = {"queue": torch.ones(4, 4), "online_predictor.net.0.weight": torch.ones(2, 2), "epoch": 3}
BESIDE |= {"projection_head.layers.0.weight": torch.ones(2), "optimizer": {"state": {0: torch.ones(3)}}}
# a pair in the same pair, which nothing writes: four networks
UNCLEAR = {"dino full": "teacher", "dino resnet": "teacher", "dinov2 training": "teacher"}
UNCLEAR |= {"moco_v1_v2 v1": "encoder_q", "moco_v1_v2 v2": "encoder_q"}


@each_family
def test_any_wrapper_is_looked_through(family, quick):
    for kind, (_, file, _, flags) in kinds(family).items():
        expected = quick(file, **flags)
        for wrapper in WRAPPERS:
            better, _, other = wrapper.partition("|")
            wrapped = BESIDE | (under(other, others(file)) if other else {}) | under(better, file)
            if other and UNCLEAR.get(f"{family.__name__} {kind}", " ") in better:
                with pytest.raises(SystemExit, match="known networks: .*; --prefix must choose one"):
                    quick(wrapped, **flags)
                continue
            info = quick(wrapped, **flags)
            for key in ("builder", "arch_args", "mean"):
                assert info[key] == expected[key], (kind, wrapper)
            assert info["state_dict"].keys() == expected["state_dict"].keys()
            for name, tensor in info["state_dict"].items():
                same = expected["state_dict"][name]
                assert tensor.data_ptr() == same.data_ptr() or torch.equal(tensor, same), (kind, wrapper)


def test_every_resnet_is_known_by_its_convolutions(quick):
    for arch in "resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2".split():
        with torch.device("meta"):
            net = getattr(torchvision.models, arch)()
        info = quick(net.state_dict())
        assert (info["arch"], info["feature_dim"]) == (info["arch_args"]["arch"], net.fc.in_features)
        assert info["arch"] == arch


SIZES = [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16), (1408, 40, 16), (1536, 40, 24)]


@pytest.mark.parametrize("width, depth, heads", SIZES)
def test_heads_of_the_published_sizes(width, depth, heads):
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": 0}
    sizes["init_values"] = 1.0 if depth == 40 else None
    with torch.device("meta"):
        state = VisionTransformer(patch_size=16, **sizes).state_dict()

    def published(method, given=0, state=state):
        _, arch, arch_args, size, _ = convert.describe_vit(state, method, convert.Args("x", heads=given))
        assert (arch, size) == (convert.VITS[width, depth][0], 224)
        return arch_args["num_heads"]

    for method in ("dino", "dinov2", "beit", "ijepa", "torchvision", "timm"):
        assert published(method) == published(method, given=heads) == heads
    assert published("clip") == min(width // 64, 16)  # OpenAI's B, L; open_clip's H, g
    assert published("timm", given=8) == 8
    refusals = [("dino", 2, heads, state)]
    refusals += [("clip", 8, 16, state)] if width == 1024 else []
    if width == 384:
        assert published("moco_v3") == 12
        refusals += [("moco_v3", 6, 12, state)]
        refusals += [("mae", 0, "a divisor of it", state)]  # published none; MoCo v3's looks like it
    last = f"blocks.{depth - 1}."
    shallow = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
    for method, given, words, part in [*refusals, ("dino", 0, "a divisor of it", shallow)]:
        with pytest.raises(SystemExit, match=f"--heads {given}: {method} of width {width} must have {words}"):
            published(method, given, part)


# What no family says alone: names, sizes, precision, prefixes


def test_names_of_files_and_prefixes_decide_nothing():
    """A ViT is not DINOv2's, DINO's or MoCo's because its file or what holds it is called so."""
    no_tensor = "no tensor tells --statistics: imagenet .* or half"
    net = vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    refused(no_tensor, net.state_dict(), path="dinov2reg.pth")
    info = converted(net.state_dict(), path="dinov2reg.pth", statistics="imagenet")
    same_features(info, net)
    assert (info["method"], info["arch_args"]["reg_tokens"]) == ("timm", 4)
    _, full, teacher, _ = kinds(dino)["full"]
    info = converted(full, path="moco_v3.pt")
    same_features(info, teacher)
    assert info["method"] == "dino"

    state = vit().state_dict()
    for prefix in ("", "encoder_q.", "base_encoder."):  # MoCo v3 would silently give a small ViT 12 heads
        refused(no_tensor, under(prefix, state), path="dino_vitbase16.pth")
        assert converted(under(prefix, state), statistics="half")["method"] == "timm"
    state["pos_embed"] = state["pos_embed"].clone()
    state["pos_embed"][:, 0] = 0  # which has fixed positions, and none of [CLS]
    assert converted(under("base_encoder.", state))["method"] == "moco_v3"


def test_positions_are_never_resampled():
    """DINOv2 keeps its 37 x 37 positions, and is evaluated at 224 pixels; other methods at their own size."""
    options = {"patch_size": 14, "depth": 1, "init_values": 1.0}
    mask = {"mask_token": torch.zeros(1, 48)}
    state = vit(**options, img_size=518).state_dict()
    info = converted(state | mask)
    assert (info["image_size"], info["arch_args"]["img_size"]) == (224, 518)
    assert torch.equal(info["state_dict"]["pos_embed"], state["pos_embed"])
    info = converted(state, statistics="half")
    assert (info["method"], info["image_size"]) == ("timm", 518)
    assert converted(vit(**options, img_size=224).state_dict() | mask)["image_size"] == 224


def test_half_precision_becomes_float32():
    """As OpenAI's files are."""
    _, state, net, _ = kinds(clip)["of OpenAI"]
    for dtype in (torch.float16, torch.bfloat16):
        info = converted({name: tensor.to(dtype) for name, tensor in state.items()})
        assert {tensor.dtype for tensor in info["state_dict"].values()} == {torch.float32}
        same_features(info, net, atol=0.05)


def test_heads_of_beit_are_in_its_tables():
    _, state, _, _ = kinds(beit)["shared table"]
    assert converted(state, heads=0)["arch_args"]["num_heads"] == 3
    refused("--heads 4: beit of width 48 must have 3", state, heads=4)


def test_prefix_chooses():
    _, full, teacher, _ = kinds(dino)["full"]
    student = vit()
    full = {"teacher": full["teacher"], "student": under("module.backbone.", student.state_dict())}
    same_features(converted(full), teacher)
    for prefix in ("student", "student.", "student.module", "module.backbone", "student.module.backbone."):
        same_features(converted(full, prefix=prefix), student)
    same_features(converted({"state_dict": full}, prefix="student"), student)
    same_features(converted(full, prefix="backbone"), teacher)  # of both the one that the paper evaluates
    for prefix in ("stud", "encoder", "backbone.student"):
        refused("'student.module.backbone.', 'teacher.backbone.'.; --prefix must", full, prefix=prefix)
    _, file, _, _ = kinds(ijepa)["training"]
    chosen = converted(file, prefix="encoder", statistics="imagenet")["state_dict"]
    assert all(torch.equal(file["encoder"][f"module.{name}"], chosen[name]) for name in chosen)


def test_files_of_older_numpys_are_read():
    file = kinds(dino)["full"][1]
    torch.save(file, "new.pth", _use_new_zipfile_serialization=False)
    old = Path("new.pth").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    Path("old.pth").write_bytes(old)
    tensors = convert.read_file("old.pth", False)
    assert tensors.keys() == convert.read_file("new.pth", False).keys() == dict(convert.flatten(file)).keys()


def test_heads_of_a_giant_are_asked_for():
    """DINOv2's has LayerScale and 24 (above), SigLIP's of the same size 16."""
    state = {f"blocks.{i}.mlp.fc1.bias": torch.zeros(6144) for i in range(40)}
    state |= {"patch_embed.proj.weight": torch.zeros(1536, 3, 14, 14), "pos_embed": torch.zeros(1, 256, 1536)}
    state |= {"blocks.0.mlp.fc2.weight": torch.zeros(1536, 6144)}
    with pytest.raises(SystemExit, match="--heads 0: timm of width 1536 must have a divisor of it"):
        convert.describe_vit(state, "timm", convert.Args("x"))


def test_networks_that_nothing_ranks_are_refused():
    """Which of a network and its average is to be taken, nobody said."""
    net = vit()
    state = net.state_dict()
    file = {"state_dict": others(state), "state_dict_ema": state}
    refused("known networks: .'state_dict.', 'state_dict_ema.'.; --prefix must", file, statistics="half")
    same_features(converted(file, statistics="half", prefix="state_dict_ema"), net)
    three = under("teacher.", others(state)) | under("a.", state) | under("b.", others(state))
    refused("known networks: .'a.', 'b.', 'teacher.'.; --prefix must choose one", three)
    same_features(converted(three, prefix="a", statistics="half"), net)


# What is refused


def vits():
    _, state, _, _ = kinds(mae)["training"]

    def but(name, *shape):
        return {"model": state | {name: torch.ones(shape)}}

    for name in ("norm.weight", "blocks.1.mlp.fc2.bias", "pos_embed"):
        some = {"model": {key: tensor for key, tensor in state.items() if key != name}}
        yield f"file.pth: .* does not fill a network: .*{name}", some
    yield "Unexpected key.*norms.weight", but("norms.weight", 48)
    yield (
        "Missing key.*blocks.0.ls1.gamma.*blocks.0.ls2.gamma.*blocks.1.ls2.gamma",
        but("blocks.1.ls1.gamma", 48),
    )
    yield "size mismatch for blocks.0.attn.qkv.bias", but("blocks.0.attn.qkv.bias", 47)
    yield "size mismatch for pos_embed", but("pos_embed", 1, 19, 48)
    for oblong_or_gray in ((48, 3, 4, 8), (48, 1, 8, 8)):
        yield "size mismatch for patch_embed.proj", but("patch_embed.proj.weight", *oblong_or_gray)
    for heads in (0, 5, -3):
        yield f"--heads {heads}: mae of width 48 must have a divisor of it", state, {"heads": heads}


def resnets():
    _, state, _, _ = kinds(of_torchvision)["resnet"]
    for name, words in (("bn2.running_var", "Missing key.*"), ("conv2.weight", "no attribute 'resnet17'")):
        yield words, {key: tensor for key, tensor in state.items() if key != f"layer4.1.{name}"}
    yield "Unexpected key.*layer1.0.se.weight", state | {"layer1.0.se.weight": torch.ones(1)}
    with torch.device("meta"):
        grouped = torchvision.models.resnext50_32x4d().state_dict()
    yield "size mismatch", {name: torch.zeros(()).expand(tensor.shape) for name, tensor in grouped.items()}


def wrong_guesses():
    _, state, _, half = kinds(of_timm)["with head"]
    for name, width in (("attn.logit_scale", 3), ("norm3.weight", 48), ("attn.v_bias", 48)):
        more = {f"blocks.{i}.{name}": torch.ones(width) for i in range(2)}
        yield f"Unexpected key.*blocks.0.{name}.*blocks.1.{name}", state | more, half
    for name in ("attn.q_bias", "ls1.gamma"):  # parts of several families in one network
        more = {f"module.blocks.{i}.{name}": torch.ones(48) for i in range(2)}
        yield "does not fill a network", kinds(ijepa)["training"][1]["target_encoder"] | more
    _, file, _, _ = kinds(clip)["without sizes"]
    yield "no tensor tells --activation: quick_gelu .OpenAI.* or gelu .open_clip", file
    for file in ({0: torch.ones(1)}, {"model": {0: torch.ones(1)}}, {1: 2}, {}, {"model": {}}):
        yield "known networks: ..; --prefix must choose one", file


@pytest.mark.parametrize("cases", [vits, resnets, wrong_guesses])
def test_what_features_would_silently_be_wrong_with_is_refused(cases):
    for words, file, *flags in cases():
        refused(words, file, **dict(*flags))


def test_the_file_to_write_must_be_new():
    _, file, _, _ = kinds(mae)["training"]
    taken = converted(file)
    for to in ("backbone.pt", "none/x.pt", "file.pth", "."):
        words = f"--to {to}: must be a new file, in a folder that can be written"
        with pytest.raises(SystemExit, match=words):
            convert.convert(convert.Args("file.pth", to, heads=3))
    assert load("backbone.pt").keys() == taken.keys() and load("file.pth").keys() == file.keys()


class Malice:
    def __reduce__(self):
        return exec, ("open('run', 'w').write('code ran')",)


def test_files_that_cannot_be_read():
    file = {"model": kinds(mae)["training"][1]}
    converted(file, "whole.pth", to="ready.pt")
    data = Path("whole.pth").read_bytes()
    for name, content in (("half", data[: len(data) // 2]), ("text", b"<html>404</html>"), ("empty", b"")):
        Path(f"{name}.pth").write_bytes(content)
    Path("half.safetensors").write_bytes(data[: len(data) // 2])
    torch.save([1, 2], "list.pth")
    torch.save({"model": Malice()}, "malice.pth")
    Path("old.pth").write_bytes(pickle.dumps({"model": Malice()}, protocol=2))
    cases = {"none.pth": ".*No such file", ".": ".*Is a directory", "list.pth": "holds a list"}
    cases |= dict.fromkeys(("half.pth", "half.safetensors", "text.pth", "empty.pth"), "not weights alone")
    cases |= dict.fromkeys(("malice.pth", "old.pth"), ".*nothing was run: GLOBAL .*exec")
    for path, words in (cases | {"ready.pt": ".*no backbone.pt"}).items():
        with pytest.raises(SystemExit, match=f"{path}: {words}") as stop:
            convert.convert(convert.Args(path, heads=3))
        assert "\n" not in str(stop.value) and not Path("backbone.pt").exists()
    assert not Path("run").exists()
    torch.load("malice.pth", weights_only=False)  # the trap does work
    assert Path("run").read_text() == "code ran"


# Other kinds of files, the command, and what is done with backbone.pt


def test_safetensors():
    _, state, net, _ = kinds(mae)["released"]
    save_file(state, "vit.safetensors")
    convert.convert(convert.Args("vit.safetensors", heads=3))
    same_features(load("backbone.pt"), net)


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_loaded_only_with_a_flag_of_its_own():
    _, _, visual, _ = kinds(clip)["without sizes"]
    archive = torch.nn.Sequential(OrderedDict(visual=visual))  # as OpenAI's: traced, with three numbers
    archive.register_buffer("input_resolution", torch.tensor(32))
    torch.jit.trace(archive.eval(), torch.randn(1, 3, 32, 32)).save("clip.pt")
    with pytest.raises(SystemExit, match="clip.pt: is a program .TorchScript.*--run-program.*trust its auth"):
        convert.convert(convert.Args("clip.pt", heads=3))
    assert not Path("backbone.pt").exists()
    convert.convert(convert.Args("clip.pt", heads=3, run_program=True))
    info = load("backbone.pt")
    same_features(info, visual)
    assert info["arch_args"]["norm_eps"] == visual.transformer.resblocks[1].ln_1.eps == 1e-5
    assert info["arch_args"]["act_layer"] == "quick_gelu"


def test_the_command_says_what_it_found(monkeypatch, capsys):
    torch.save(kinds(dino)["full"][1], "full.pth")
    monkeypatch.setattr(sys, "argv", ["convert.py", "full.pth", "--heads", "3", "--to", "dino.pt"])
    runpy.run_path(convert.__file__, run_name="__main__")
    words = "full.pth: dino under 'teacher.backbone.', vit .*'num_heads': 3.*, 30 tensors, 32 px, imagenet"
    said = capsys.readouterr().out
    assert re.match(words, said) and said.endswith("-> dino.pt\n") and said.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"full.pth", "dino.pt"}


def test_training_goes_on_from_an_official_file(folder):
    """MAE's encoder and MoCo's ResNet, converted, are where --init starts; DINO's are in test_dino.py."""
    from mae import MAE

    model = moco.MoCo("resnet18", queue_size=16)
    files = {"mae": MAE("vit_nano", 32, 8).state_dict(), "moco": under("module.", model.state_dict())}
    for name, file in files.items():
        expected = converted(file, heads=0)["state_dict"]
        flags = {"patch_size": 8} if name == "mae" else {}
        flags |= {"data": str(folder), "epochs": 0, "init": "backbone.pt", "run_dir": name}
        importlib.import_module(name).train(tiny_args(name, **flags))
        state = load(f"{name}/backbone.pt")["state_dict"]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
        assert state.keys() == expected.keys()
