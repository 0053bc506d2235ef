"""convert.py: files of every official format, made here, give the features of the model they came from."""

import argparse
import functools
import pickle
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import run, tiny_args
from safetensors.torch import save_file
from timm.models import VisionTransformer
from timm.models.beit import Beit

import convert
import moco

NANO = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 16 / 3}
NO_CLASS = {"class_token": False, "global_pool": "avg", "fc_norm": False}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def shaken(net, by=0.1):
    """Every weight away from its start, so that no part can be left out unnoticed; statistics too."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                noise = by * torch.randn_like(tensor)
                tensor.add_(noise.abs() if name.endswith("var") else noise)
    return net.eval()


def vit(**options):
    return shaken(VisionTransformer(**NANO | options))


def resnet(arch="resnet18"):
    net = shaken(getattr(torchvision.models, arch)(), 0.01)
    weights = net.state_dict()
    net.fc = torch.nn.Identity()
    return weights, net


def under(prefix, part):
    return {prefix + name: value for name, value in part.items()}


def others(part):
    """The same names and shapes, other weights: what must not be taken."""
    part = {name: others(value) if isinstance(value, dict) else value for name, value in part.items()}
    return {name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in part.items()}


def converted(file, path="file.pth", to="backbone.pt", **flags):
    """backbone.pt of a file, as anyone may load it."""
    torch.save(file, path)
    Path(to).unlink(missing_ok=True)
    convert.convert(convert.Args(path, to, **{"heads": 3} | flags))
    return torch.load(to, weights_only=True)


def refused(words, file, **flags):
    with pytest.raises(SystemExit, match=words) as stop:
        converted(file, **flags)
    assert not [path for path in Path().iterdir() if path.name.startswith("backbone.pt")]
    return str(stop.value)


def network(info):
    net = convert.build_network(info["builder"], info["arch_args"])
    net.load_state_dict(info["state_dict"])
    return net.eval()


def same_features(info, theirs, atol=1e-4):
    """Of images of the size that the positions are for."""
    side = info["arch_args"].get("img_size", 64)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        ours = network(info)(images)
        torch.testing.assert_close(ours, theirs.eval()(images), atol=atol, rtol=1e-4)
    assert ours.shape == (2, info["feature_dim"])


# Formats: each function makes the tensors of a file, and the published network that they are of

FORMATS = {}


def form(method, expected="imagenet", **flags):
    """Enter a function in FORMATS, with what must come out and the flags that it takes."""

    def enter(make):
        @functools.cache
        def made():
            torch.manual_seed(0)
            return make()

        FORMATS[make.__name__] = (made, method, expected, flags)
        return made

    return enter


@form("mae")
def mae_released():
    net = vit()
    net.pos_embed.data[:, 0] = 0  # as in all of its files: [CLS] has no position
    return net.state_dict(), net


@form("mae")
def mae_training():
    net = vit()
    decoder = {"mask_token": torch.ones(1, 1, 48), "decoder_pos_embed": torch.ones(1, 17, 16)}
    decoder |= {"decoder_embed.weight": torch.ones(16, 48), "decoder_blocks.0.norm1.bias": torch.ones(16)}
    return net.state_dict() | decoder, net


@form("timm", statistics="imagenet")
def dino_backbone():
    net = vit()
    return net.state_dict(), net


@form("dino")
def dino_full():
    teacher = vit()
    head = {"head.mlp.0.weight": torch.ones(8, 48), "head.last_layer.weight_g": torch.ones(4, 1)}
    state = under("backbone.", teacher.state_dict()) | head
    file = {"teacher": state, "student": under("module.", others(state)), "epoch": 100}
    file |= {"dino_loss": {"center": torch.ones(1, 4)}, "args": argparse.Namespace(arch="vit_small", lr=1.0)}
    return file, teacher


@form("dino")
def dino_resnet():
    state, net = resnet()
    state = under("module.backbone.", state | {"prototypes.weight": torch.ones(9, 4)}) | {
        "module.head.mlp.0.weight": torch.ones(8, 512)
    }
    return {"student": others(state), "teacher": state}, net


@form("dinov2")
def dinov2_released():
    net = vit(init_values=1.0)
    return net.state_dict() | {"mask_token": torch.zeros(1, 48)}, net


@form("dinov2")
def dinov2_giant():
    """With registers and SwiGLU."""
    net = vit(init_values=1.0, reg_tokens=4, no_embed_class=True, **GATED)
    state = net.state_dict()
    released = {name.replace("fc1", "w12").replace("fc2", "w3"): tensor for name, tensor in state.items()}
    first = torch.randn(1, 1, 48)  # the position of [CLS], which timm adds to the token
    released["register_tokens"] = released.pop("reg_token")
    released["cls_token"] = state["cls_token"] - first
    released["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    return released | {"mask_token": torch.zeros(1, 48)}, net


@form("dinov2")
def dinov2_training():
    state, net = dinov2_released()
    chunks = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", name): tensor for name, tensor in state.items()}
    teacher = under("backbone.", chunks) | {"dino_head.mlp.0.weight": torch.ones(8, 48)}
    return {"teacher": teacher}, net


@form("moco")
def moco_v1():
    model = shaken(moco.MoCo("resnet18", queue_size=16, mlp=False), 0.01)
    state = under("module.", model.state_dict())
    model.encoder_q.fc = torch.nn.Identity()
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, model.encoder_q


@form("moco")
def moco_v2():
    model = shaken(moco.MoCo("resnet18", queue_size=16, mlp=True), 0.01)
    state = under("module.", model.state_dict())
    model.encoder_q.fc = torch.nn.Identity()
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, model.encoder_q


@form("moco_v3")
def moco_v3_vit():
    net = vit()
    net.pos_embed.data[:, 0] = 0
    state = net.state_dict() | {"head.0.weight": torch.ones(8, 48), "head.1.running_mean": torch.ones(8)}
    file = under("module.base_encoder.", state) | under("module.momentum_encoder.", others(state))
    return {"arch": "vit_small", "state_dict": file | {"module.predictor.0.weight": torch.ones(1)}}, net


@form("moco_v3")
def moco_v3_resnet():
    state, net = resnet()
    state["fc.1.running_mean"] = torch.ones(4)
    file = under("module.momentum_encoder.", others(state)) | under("module.base_encoder.", state)
    return {"state_dict": file}, net


def beit(**options):
    return shaken(Beit(**NANO | {"global_pool": "token"} | options))


@form("beit", "half")
def beit_shared_table():
    net = beit(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    more = {"mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(9, 48)}
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    return net.state_dict() | more | index, net


@form("beit", "half")
def beit_tables_of_blocks():
    net = beit(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    index = torch.zeros(17, 17, dtype=torch.long)
    return net.state_dict() | {"blocks.0.attn.relative_position_index": index}, net


@form("beit")
def beit_of_imagenet_1k():
    """The released file of 800 epochs: absolute positions, no tables, no layer scale."""
    net = beit()
    return net.state_dict(), net


@form("ijepa")
def ijepa():
    target = vit(**NO_CLASS)
    file = {"target_encoder": under("module.", target.state_dict()), "epoch": 300}
    predictor = {"module.predictor_pos_embed": torch.ones(1, 16, 8)}
    return {"encoder": others(file["target_encoder"]), "predictor": predictor} | file, target


def clip(quick_gelu):
    import open_clip

    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    net = shaken(open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu))
    state = net.state_dict()
    net.visual.proj = None  # features before the projection
    return state, net.visual


@form("clip", "clip")
def clip_of_openai():
    state, net = clip(True)
    return state | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8)}, net


@form("clip", "clip", activation="quick_gelu")
def clip_without_sizes():
    return clip(True)


@form("clip", "clip", activation="gelu")
def clip_of_open_clip():
    return clip(False)


@form("clip", "clip", activation="quick_gelu")
def clip_of_timm():
    eps = functools.partial(torch.nn.LayerNorm, eps=1e-5)
    net = vit(pre_norm=True, norm_layer=eps, act_layer="quick_gelu", num_classes=8)
    state = net.state_dict()
    net.head = torch.nn.Identity()
    return state, net


@form("timm", "half", statistics="half")
def timm_with_head():
    net = vit(num_classes=10)
    state = net.state_dict()
    net.head = torch.nn.Identity()
    return state, net


@form("timm", "half", statistics="half")
def timm_with_registers():
    net = vit(init_values=1.0, reg_tokens=2, **GATED)  # here [CLS] and registers have positions
    return net.state_dict(), net


@form("timm", "half", statistics="half")
def timm_without_class():
    net = vit(mlp_ratio=3.0, **NO_CLASS)
    return net.state_dict(), net


@form("torchvision")
def torchvision_vit():
    sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 192}
    net = shaken(torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes))
    state = net.state_dict()
    net.heads = torch.nn.Identity()
    return state, net


@form("torchvision")
def torchvision_vit_of_older_versions():
    state, net = torchvision_vit()
    spelt = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
    older = {re.sub(r"mlp\.[03]", lambda found: spelt[found[0]], name): state[name] for name in state}
    assert older.keys() != state.keys()
    return older, net


@form("resnet")
def torchvision_resnet():
    return resnet()


@form("resnet")
def resnet_of_older_versions():
    state, net = resnet()
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}, net


@form("resnet")
def resnet_of_timm():
    net = shaken(timm.create_model("resnet18"), 0.01)
    state = net.state_dict()
    net.fc = torch.nn.Identity()
    return state, net


@form("resnet")
def resnet_for_small_images():
    state, net = resnet()
    net.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = torch.nn.Identity()
    return state | {"conv1.weight": net.conv1.weight.detach()}, net


@form("resnet")
def resnet_of_lightly():
    _, net = resnet()
    sequential = torch.nn.Sequential(*list(net.children())[:-1], torch.nn.Flatten())
    return sequential.state_dict(), sequential


@pytest.mark.parametrize("name", FORMATS)
def test_features_are_those_of_the_published_code(name):
    make, method, statistics, flags = FORMATS[name]
    file, theirs = make()
    info = converted(file, **flags)
    same_features(info, theirs)
    assert info["method"] == method
    assert (tuple(info["mean"]), tuple(info["std"])) == convert.STATISTICS[statistics]
    is_resnet = "stem" in info["arch_args"]
    assert info["image_size"] == (224 if is_resnet and "small" not in name else 32)
    assert info["arch"] == ("resnet18" if is_resnet else "vit")
    for tensor_name, tensor in info["state_dict"].items():
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == torch.float32 or tensor_name.endswith("num_batches_tracked")


def trained_alone(state):
    """What DistributedDataParallel and torch.compile leave, with the rest of a training."""
    state = under("module.", state)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    return {"model": state, "optimizer": optimizer, "epoch": 3, "args": argparse.Namespace(lr=1.0)}


WRAPPERS = {
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state},
    "training": trained_alone,
    "lightning": lambda state: {"state_dict": under("model.backbone.", state), "epoch": 1, "loops": {}},
    "student and teacher": lambda state: under("student.", others(state)) | under("teacher.", state),
    "teacher and student": lambda state: {
        "teacher": under("backbone.", state),
        "student": under("module.backbone.", others(state)),
    },
    "key and query": lambda state: {
        "state_dict": under("encoder_k.", others(state)) | under("encoder_q.", state),
        "queue": torch.ones(4, 4),
    },
    "online and target": lambda state: (
        under("online_encoder.net.", state)
        | under("target_encoder.net.", others(state))
        | {"online_predictor.net.0.weight": torch.ones(2, 2)}
    ),
    "lightly's momentum": lambda state: (
        under("backbone_momentum.", others(state))
        | under("backbone.", state)
        | {"projection_head.layers.0.weight": torch.ones(2, 2)}
    ),
    "lightly's DINO": lambda state: (
        under("student_backbone.", others(state)) | under("teacher_backbone.", state)
    ),
}
PREFIXES = """module. _orig_mod. _orig_mod.module. backbone. module.backbone. encoder. module.encoder.
online_encoder.net.""".split()
WRAPPERS |= {prefix: functools.partial(under, prefix) for prefix in PREFIXES}


# a pair in the same pair, which nothing writes: four networks
PAIRS = ("student and teacher", "teacher and student", "lightly's DINO")
UNCLEAR = {(name, pair) for name in ("dino_full", "dino_resnet", "dinov2_training") for pair in PAIRS}
UNCLEAR |= {(name, "key and query") for name in ("moco_v1", "moco_v2")}


def thin(part):
    """The same names and shapes in small files: a large tensor is one number, many times."""
    thinned = {}
    for name, value in part.items():
        if isinstance(value, dict):
            value = thin(value)
        elif isinstance(value, torch.Tensor) and value.numel() > 1000:
            value = value.flatten()[:1].clone().expand(value.shape)
        thinned[name] = value
    return thinned


@functools.cache
def alone(name):
    """backbone.pt of a file without anything around."""
    make, _, _, flags = FORMATS[name]
    return converted(thin(make()[0]), **flags)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", FORMATS)
def test_any_wrapper_is_looked_through(name, wrapper):
    make, _, _, flags = FORMATS[name]
    expected = alone(name)
    file = thin(WRAPPERS[wrapper](make()[0]))
    if (name, wrapper) in UNCLEAR:
        refused("known networks: .*; --prefix must choose one", file, **flags)
        return
    info = converted(file, **flags)
    assert (info["builder"], info["arch_args"]) == (expected["builder"], expected["arch_args"])
    assert info["state_dict"].keys() == expected["state_dict"].keys()
    assert all(torch.equal(info["state_dict"][k], expected["state_dict"][k]) for k in info["state_dict"])
    assert info["mean"] == expected["mean"]


RESNETS = "resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2".split()


@pytest.mark.parametrize("name", RESNETS)
def test_every_resnet_is_known_by_its_convolutions(name):
    with torch.device("meta"):
        net = getattr(torchvision.models, name)()
    _, arch, arch_args, _, width = convert.describe_resnet(net.state_dict(), "", None)
    assert (arch, arch_args["arch"], width) == (name, name, net.fc.in_features)


def test_features_of_a_resnet50():
    state, net = resnet("resnet50")
    same_features(converted({"state_dict": state}), net, atol=1e-3)


def test_names_of_files_decide_nothing():
    """timm's DINOv2 in a file called so, and DINO under any name, come out by what is in them."""
    net = vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    refused("no tensor tells --statistics: imagenet .* or half", net.state_dict(), path="dinov2reg.pth")
    info = converted(net.state_dict(), path="dinov2reg.pth", statistics="imagenet")
    same_features(info, net)
    assert (info["method"], info["arch_args"]["reg_tokens"]) == ("timm", 4)
    full, teacher = dino_full()
    for path in ("mae.pth", "clip.ckpt", "moco_v3.pt"):
        info = converted(full, path=path)
        same_features(info, teacher)
        assert info["method"] == "dino"
    refused(
        "no tensor tells --statistics: imagenet .* or half", dino_backbone()[0], path="dino_vitbase16.pth"
    )


def test_positions_are_never_resampled():
    """DINOv2 keeps its 37 x 37 positions, and is evaluated at 224 pixels; other methods at their own size."""
    options = {"img_size": 518, "patch_size": 14, "depth": 1}
    net = vit(**options, init_values=1.0)
    info = converted(net.state_dict() | {"mask_token": torch.zeros(1, 48)})
    assert (info["image_size"], info["arch_args"]["img_size"]) == (224, 518)
    assert torch.equal(info["state_dict"]["pos_embed"], net.pos_embed)
    same_features(info, net)
    info = converted(net.state_dict(), statistics="half")
    assert (info["method"], info["image_size"]) == ("timm", 518)
    smaller = vit(img_size=224, patch_size=14, depth=1, init_values=1.0).state_dict()
    assert converted(smaller | {"mask_token": torch.zeros(1, 48)})["image_size"] == 224


def test_half_precision_becomes_float32():
    """As OpenAI's files are."""
    state, net = clip_of_openai()
    for dtype in (torch.float16, torch.bfloat16):
        info = converted({name: tensor.to(dtype) for name, tensor in state.items()})
        assert {tensor.dtype for tensor in info["state_dict"].values()} == {torch.float32}
        same_features(info, net, atol=0.05)


def test_safetensors():
    state, net = torchvision_vit()
    save_file(state, "vit.safetensors")
    convert.convert(convert.Args("vit.safetensors", heads=3))
    same_features(torch.load("backbone.pt", weights_only=True), net)


class Archive(torch.nn.Module):
    """What CLIP's official files are: a traced program with three numbers."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, images):
        return self.visual(images)


def test_a_program_is_loaded_only_with_a_flag_of_its_own(capsys):
    _, visual = clip(True)
    torch.jit.trace(Archive(visual).eval(), torch.randn(1, 3, 32, 32)).save("clip.pt")
    with pytest.raises(SystemExit, match="clip.pt: is a program .TorchScript.*--run-program.*trust its auth"):
        convert.convert(convert.Args("clip.pt", heads=3))
    assert not Path("backbone.pt").exists()
    convert.convert(convert.Args("clip.pt", heads=3, run_program=True))
    info = torch.load("backbone.pt", weights_only=True)
    same_features(info, visual)
    assert info["arch_args"]["norm_eps"] == visual.transformer.resblocks[1].ln_1.eps == 1e-5
    assert info["arch_args"]["act_layer"] == "quick_gelu"


def test_the_command_says_what_it_found():
    torch.save(dino_full()[0], "full.pth")
    result = run([sys.executable, convert.__file__, "full.pth", "--heads", 3, "--to", "dino.pt"])
    words = "full.pth: dino under 'teacher.backbone.', vit .*'num_heads': 3.*, 30 tensors, 32 px, imagenet"
    assert result.returncode == 0 and re.match(words, result.stdout), result.stdout + result.stderr
    assert result.stdout.endswith("-> dino.pt\n") and result.stdout.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"full.pth", "dino.pt"}


# Several networks in a file


def test_prefix_chooses():
    full, teacher = dino_full()
    student = vit()
    full = {"teacher": full["teacher"]}
    full["student"] = {
        name.replace("x.", ""): t for name, t in under("module.backbone.", student.state_dict()).items()
    }
    same_features(converted(full), teacher)
    for prefix in ("student", "student.", "student.module", "module.backbone", "student.module.backbone."):
        same_features(converted(full, prefix=prefix), student)
    same_features(converted({"state_dict": full}, prefix="student"), student)
    same_features(converted(full, prefix="backbone"), teacher)  # of both the one that the paper evaluates
    for prefix in ("stud", "encoder", "backbone.student"):
        refused("'student.module.backbone.', 'teacher.backbone.'.; --prefix must", full, prefix=prefix)
    file, target = ijepa()
    info = converted(file, prefix="encoder", statistics="imagenet")
    expected = others(network(converted(file)).state_dict())
    assert all(torch.equal(expected[name], info["state_dict"][name]) for name in expected)


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


def test_what_is_not_complete_is_refused():
    state = mae_training()[0]
    some = {name: t for name, t in state.items() if name not in ("blocks.1.mlp.fc2.bias", "norm.weight")}
    said = refused("file.pth: .* does not fill a network: .*Missing key.*norm.weight", {"model": some})
    assert "blocks.1.mlp.fc2.bias" in said and "\n" not in said
    refused("Unexpected key.*norms.weight", {"model": state | {"norms.weight": torch.ones(48)}})
    scaled = state | {"blocks.1.ls1.gamma": torch.ones(48)}
    refused("Missing key.*blocks.0.ls1.gamma.*blocks.0.ls2.gamma.*blocks.1.ls2.gamma", {"model": scaled})
    short = state | {"blocks.0.attn.qkv.bias": torch.ones(47)}
    refused("size mismatch for blocks.0.attn.qkv.bias", {"model": short})
    refused("size mismatch for pos_embed", {"model": state | {"pos_embed": torch.ones(1, 19, 48)}})
    refused("does not fill .*'pos_embed'", {"model": {k: v for k, v in state.items() if k != "pos_embed"}})
    oblong = state | {"patch_embed.proj.weight": torch.ones(48, 3, 4, 8)}
    refused("size mismatch for patch_embed.proj.weight", {"model": oblong})
    gray = state | {"patch_embed.proj.weight": torch.ones(48, 1, 8, 8)}
    refused("size mismatch for patch_embed.proj.weight", {"model": gray})
    for heads in (0, 5, -3):
        refused(f"--heads {heads}: mae of width 48 must have a divisor of it", {"model": state}, heads=heads)


def test_incomplete_resnets_are_refused():
    state, _ = resnet()
    some = {name: tensor for name, tensor in state.items() if name != "layer4.1.bn2.running_var"}
    refused("Missing key.*layer4.1.bn2.running_var", some)
    some = {name: tensor for name, tensor in state.items() if name != "layer4.1.conv2.weight"}
    refused("has no attribute 'resnet17'", some)
    refused("Unexpected key.*layer1.0.se.weight", state | {"layer1.0.se.weight": torch.ones(1)})
    with torch.device("meta"):
        grouped = torchvision.models.resnext50_32x4d().state_dict()
    refused("size mismatch", {name: torch.zeros(()).expand(tensor.shape) for name, tensor in grouped.items()})


def test_guesses_that_would_be_wrong_are_refused():
    """Parts and networks that features would silently be wrong with."""
    state = timm_with_head()[0]
    for name, shape in (("attn.logit_scale", (3,)), ("norm3.weight", (48,)), ("attn.v_bias", (48,))):
        more = {f"blocks.{i}.{name}": torch.ones(shape) for i in range(2)}
        refused(f"Unexpected key.*blocks.0.{name}.*blocks.1.{name}", state | more, statistics="half")
    refused("no tensor tells --activation: quick_gelu .OpenAI.* or gelu .open_clip", clip(True)[0])
    for names in ("attn.q_bias", "ls1.gamma"):  # parts of several families in one network
        mixed = ijepa()[0]["target_encoder"] | {
            f"module.blocks.{i}.{names}": torch.ones(48) for i in range(2)
        }
        refused("does not fill a network", mixed)
    for file in ({0: torch.ones(1)}, {"model": {0: torch.ones(1)}}, {1: 2}, {}, {"model": {}}):
        refused("known networks: ..; --prefix must choose one", file)
    taken = converted({"model": mae_training()[0]})
    with pytest.raises(
        SystemExit, match="--to backbone.pt: must be a new file, in a folder that can be written"
    ):
        convert.convert(convert.Args("file.pth", heads=3))
    assert torch.load("backbone.pt", weights_only=True).keys() == taken.keys()
    for to in ("none/x.pt", "file.pth", "."):
        with pytest.raises(
            SystemExit, match=f"--to {to}: must be a new file, in a folder that can be written"
        ):
            convert.convert(convert.Args("file.pth", to, heads=3))
    assert torch.load("file.pth", weights_only=False)["model"].keys() == mae_training()[0].keys()


SIZES = [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16), (1408, 40, 16), (1536, 40, 24)]


@pytest.mark.parametrize("width, depth, heads", SIZES)
def test_heads_of_the_published_sizes(width, depth, heads):
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": 0}
    with torch.device("meta"):
        state = VisionTransformer(patch_size=16, **sizes).state_dict()
    last = f"blocks.{depth - 1}."
    shallow = {name: tensor for name, tensor in state.items() if not name.startswith(last)}

    def published(method, state=state, given=0):
        _, arch, arch_args, size, _ = convert.describe_vit(state, method, convert.Args("x", heads=given))
        assert (arch, size) == (convert.VITS[width, depth][0], 224)
        return arch_args["num_heads"]

    for method in ("dino", "dinov2", "beit", "ijepa", "torchvision", "timm"):
        assert published(method) == heads
    assert published("clip") == min(width // 64, 16)  # OpenAI's B, L; open_clip's H, g
    assert published("timm", given=8) == 8
    with pytest.raises(SystemExit, match=f"--heads 2: dino of width {width} must have {heads}"):
        published("dino", given=2)
    with pytest.raises(SystemExit, match="--heads 0: .* must have a divisor of it"):
        published("dino", shallow)
    if width == 1024:
        assert published("clip", given=16) == 16
        with pytest.raises(SystemExit, match="--heads 8: clip of width 1024 must have 16"):
            published("clip", given=8)
    if width == 384:
        assert published("moco_v3") == 12
        with pytest.raises(SystemExit, match="--heads 6: moco_v3 of width 384 must have 12"):
            published("moco_v3", given=6)
        with pytest.raises(SystemExit, match="--heads 0: .* must have a divisor of it"):
            published("mae")  # it published none, and MoCo v3's without a prefix looks like it


def test_vits_of_any_query_encoder_are_not_moco_s():
    refused("no tensor tells --statistics", under("encoder_q.", dino_backbone()[0]))


def test_any_base_encoder_is_not_moco_v3():
    """Which has fixed positions, and none of [CLS]; else a small ViT would silently get 12 heads."""
    state = vit().state_dict()
    file = under("base_encoder.", state)
    refused("no tensor tells --statistics", file)
    assert converted(file, statistics="half")["method"] == "timm"
    state["pos_embed"][:, 0] = 0
    assert converted(under("base_encoder.", state))["method"] == "moco_v3"


def test_heads_of_beit_are_in_its_tables():
    assert converted(beit_shared_table()[0], heads=0)["arch_args"]["num_heads"] == 3
    refused("--heads 4: beit of width 48 must have 3", beit_shared_table()[0], heads=4)


class Malice:
    def __reduce__(self):
        return exec, ("open('run', 'w').write('code ran')",)


def test_files_that_cannot_be_read(tmp_path):
    def fails(path, words):
        with pytest.raises(SystemExit, match=f"{path}: {words}") as stop:
            convert.convert(convert.Args(path, heads=3))
        assert "\n" not in str(stop.value) and not Path("backbone.pt").exists()

    fails("none.pth", ".*No such file")
    fails(".", ".*Is a directory")
    torch.save({"model": mae_training()[0]}, "whole.pth")
    data = Path("whole.pth").read_bytes()
    Path("half.pth").write_bytes(data[: len(data) // 2])
    Path("half.safetensors").write_bytes(data[: len(data) // 2])
    Path("text.pth").write_text("<html>404</html>")
    Path("empty.pth").write_text("")
    for name in ("half.pth", "half.safetensors", "text.pth", "empty.pth"):
        fails(name, "not weights alone")
    torch.save([1, 2], "list.pth")
    fails("list.pth", "holds a list")
    converted({"model": mae_training()[0]}, to="ready.pt")
    fails("ready.pt", ".*no backbone.pt")
    torch.save({"model": Malice()}, "malice.pth")
    Path("old.pth").write_bytes(pickle.dumps({"model": Malice()}, protocol=2))
    for name in ("malice.pth", "old.pth"):
        fails(name, ".*nothing was run: GLOBAL .*exec")
    assert not Path("run").exists()
    torch.load("malice.pth", weights_only=False)  # the trap does work
    assert Path("run").read_text() == "code ran"


def test_training_goes_on_from_an_official_file(folder, capsys):
    """MAE's encoder, a DINO teacher and MoCo's ResNet, converted, are where --init starts."""
    import dino
    import mae

    torch.save({"model": mae.MAE("vit_nano", 32, 8).state_dict()}, "mae.pth")
    teacher = under("backbone.", dino.VisionTransformer("vit_nano", 32, 8).state_dict())
    torch.save({"teacher": teacher | {"head.last_layer.weight_g": torch.ones(1)}}, "dino.pth")
    state = moco.MoCo("resnet18", queue_size=16).state_dict()
    torch.save({"state_dict": under("module.", state)}, "moco.pth")
    for module, name in ((mae, "mae"), (dino, "dino"), (moco, "moco")):
        convert.convert(convert.Args(f"{name}.pth", to=f"{name}.pt"))
        flags = {"data": str(folder), "epochs": 1, "init": f"{name}.pt", "run_dir": f"run-{name}"}
        flags |= {"patch_size": 8} if name != "moco" else {}
        assert module.train(tiny_args(name, **flags))["train/loss"] < 1e3
