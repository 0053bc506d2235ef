"""convert.py: files of every official format, made here, give the features of the model they came from."""

import argparse
import dataclasses
import functools
import importlib
import math
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import TRAINING, tiny_args
from timm.models import VisionTransformer

import convert
from eval_linear import load_backbone

NANO = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}


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


def converted(file, feature="auto", **flags):
    """backbone.pt of a file, as eval_linear.py loads it."""
    torch.save(file, path := flags.pop("path", "file.pth"))
    convert.convert(convert.Args(path, **{"heads": 3} | flags))
    return load_backbone("backbone.pt", feature=feature)


def same_features(backbone, theirs, side=32, atol=1e-4):
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        ours = backbone.net.eval()(images)
        torch.testing.assert_close(ours, theirs(images), atol=atol, rtol=1e-4)
    return ours


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


# Official formats


def vit(**options):
    return shaken(VisionTransformer(**NANO | options))


def with_positions(state, resized, **options):
    """timm's ViT at 48 px with the positions that the method's own rule gives."""
    net = VisionTransformer(**NANO | {"img_size": 48} | options).eval()
    net.load_state_dict(state | {"pos_embed": resized})
    return net


def resized(pos_embed, prefix=1, **how):
    """Positions of a 4 x 4 grid -> 6 x 6, the first `prefix` rows stay."""
    grid = pos_embed[:, prefix:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    how = how or {"size": (6, 6)}
    grid = torch.nn.functional.interpolate(grid, mode="bicubic", align_corners=False, **how)
    return torch.cat([pos_embed[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def test_mae(capsys):
    net = vit()
    state = net.state_dict()
    others = {"mask_token": torch.zeros(1, 1, 48), "decoder_embed.weight": torch.zeros(16, 48)}
    file = {"model": state | others, "epoch": 3, "args": argparse.Namespace(model="mae_vit", lr=1.0)}
    same_features(converted(file), net)
    assert "MAE, encoder, vit " in capsys.readouterr().out
    same_features(load_backbone("backbone.pt"), with_positions(state, resized(state["pos_embed"])), 48)
    state["pos_embed"][:, 0] = 0  # as in all of its files: [CLS] has no place
    same_features(converted({"model": state}), net)  # a file of the encoder alone
    assert "MAE, encoder" in capsys.readouterr().out


def test_dino(capsys):
    teacher, student = vit(), vit()
    same_features(converted(teacher.state_dict(), path="dino_x.pth"), teacher)
    assert "DINO, backbone" in capsys.readouterr().out
    state = teacher.state_dict()
    by_factor = resized(state["pos_embed"], scale_factor=(6.1 / 4, 6.1 / 4))
    same_features(load_backbone("backbone.pt"), with_positions(state, by_factor), 48)
    head = {"head.mlp.0.weight": torch.zeros(8, 48), "head.last_layer.weight_g": torch.ones(4, 1)}
    full = {"teacher": under("backbone.", state) | head, "args": argparse.Namespace(arch="vit_mini")}
    full["student"] = under("module.", under("backbone.", student.state_dict()) | head)
    same_features(converted(full), teacher)
    same_features(converted(full, network="student"), student)
    resnet = shaken(torchvision.models.resnet18(), 0.01)
    resnet.fc = torch.nn.Identity()
    full["teacher"] = under("module.", under("backbone.", resnet.state_dict()) | head)
    same_features(converted(full), resnet, 48)


def test_dinov2(capsys):
    net = vit(init_values=1.0)
    state = net.state_dict()
    released = state | {"mask_token": torch.zeros(1, 48)}
    same_features(converted(released), net)
    assert "DINOv2, released" in capsys.readouterr().out
    by_factor = resized(state["pos_embed"], scale_factor=(6.1 / 4, 6.1 / 4))
    theirs = with_positions(state, by_factor, init_values=1.0)
    same_features(load_backbone("backbone.pt"), theirs, 48)
    chunks = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", k): v for k, v in released.items()}
    teacher = under("backbone.", chunks) | {"dino_head.mlp.0.weight": torch.zeros(8, 48)}
    same_features(converted({"teacher": teacher}), net)
    assert "DINOv2, teacher" in capsys.readouterr().out


def test_dinov2_with_registers_and_swiglu():
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 16 / 3}
    options = {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True} | gated
    net = vit(**options)
    state = net.state_dict()
    released = {re.sub("fc1", "w12", re.sub("fc2", "w3", k)): v for k, v in state.items()}
    first = torch.randn(1, 1, 48)  # the position of [CLS], which timm adds to the token
    released["register_tokens"] = released.pop("reg_token")
    released["cls_token"] = state["cls_token"] - first
    released["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    released["mask_token"] = torch.zeros(1, 48)
    same_features(converted(released), net)
    larger = resized(state["pos_embed"], prefix=0, size=(6, 6), antialias=True)
    same_features(load_backbone("backbone.pt"), with_positions(state, larger, **options), 48)
    backbone = load_backbone("backbone.pt", feature="both")
    tokens = net.forward_features(images := torch.randn(2, 3, 32, 32))
    expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1)  # registers are no patches
    torch.testing.assert_close(backbone.net.eval()(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_moco(version):
    import moco

    model = shaken(moco.MoCo("resnet18", queue_size=16, mlp=version == 2), 0.01)
    net = model.encoder_q
    file = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": under("module.", model.state_dict()),
        "optimizer": {},
    }
    backbone = converted(file)
    net.fc = torch.nn.Identity()
    for side in (32, 48):
        same_features(backbone, net, side)
    assert backbone.method == "moco"


def test_moco_v3():
    net = vit(embed_dim=384, depth=12, num_heads=12)
    head = {"head.0.weight": torch.zeros(8, 384), "head.1.bias": torch.zeros(8)}
    state = under("module.base_encoder.", net.state_dict() | head)
    state |= {
        "module.momentum_encoder.cls_token": torch.zeros(1, 1, 384),
        "module.predictor.0.weight": torch.ones(1),
    }
    file = {"arch": "vit_small", "state_dict": state}
    same_features(converted(file, heads=0), net)
    assert torch.load("backbone.pt", weights_only=True)["arch_args"]["heads"] == 12
    with pytest.raises(SystemExit, match="--heads 6: the vit_small of MoCo v3, base encoder has 12"):
        converted(file, heads=6)
    with pytest.raises(SystemExit, match="is a vit_base, but its width 384 is that of a vit_small"):
        converted(file | {"arch": "vit_base"}, heads=0)
    resnet = shaken(torchvision.models.resnet50(), 0.01)
    fc = {"fc.0.weight": torch.zeros(4, 2048), "fc.1.running_mean": torch.zeros(4)}
    state = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")} | fc
    resnet.fc = torch.nn.Identity()
    same_features(converted({"state_dict": under("module.base_encoder.", state)}), resnet, 64, atol=1e-3)


def geometric_spline(table, side):
    """BEiT's table (old^2, heads) for side x side offsets, by SciPy."""
    from scipy.interpolate import make_interp_spline
    from scipy.optimize import brentq

    old = math.isqrt(len(table))
    q = brentq(lambda q: sum(q**i for i in range(old // 2)) - side // 2, 1.0001, 3)
    half = [sum(q**i for i in range(n)) for n in range(1, old // 2 + 1)]
    x, new = [-h for h in reversed(half)] + [0] + half, [i - side // 2 for i in range(side)]
    square = make_interp_spline(x, table.view(old, old, -1).double().numpy())(new)
    square = make_interp_spline(x, square, axis=1)([n for n in new])
    return torch.tensor(square).float().flatten(0, 1)


def test_beit(capsys):
    options = {"use_abs_pos_emb": False, "init_values": 0.1, "global_pool": "token"}
    net = shaken(timm.models.beit.Beit(**NANO | options, use_shared_rel_pos_bias=True))
    others = {"mask_token": torch.zeros(1, 1, 48), "lm_head.weight": torch.zeros(9, 48)}
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    backbone = converted({"model": net.state_dict() | others | index}, feature="cls")
    same_features(backbone, net)
    assert "BEiT, vit" in capsys.readouterr().out and backbone.mean.flatten().tolist() == [0.5] * 3
    larger = timm.models.beit.Beit(**NANO | options | {"img_size": 48}, use_shared_rel_pos_bias=True).eval()
    state, name = net.state_dict(), "rel_pos_bias.relative_position_bias_table"
    state[name] = torch.cat([geometric_spline(state[name][:-3], 11), state[name][-3:]])
    larger.load_state_dict(state)
    same_features(backbone, larger, 48, atol=1e-3)  # q by bisection to 1e-6, as the official code


def test_beit_with_absolute_positions():
    """The released file of 800 epochs on ImageNet-1k: no tables, no layer scale."""
    net = shaken(timm.models.beit.Beit(**NANO, global_pool="token"))
    backbone = converted({"model": net.state_dict()}, feature="cls")
    same_features(backbone, net)
    assert backbone.mean[0].item() == pytest.approx(0.485)


def test_ijepa():
    target, context = (vit(class_token=False, global_pool="avg", fc_norm=False) for _ in range(2))
    file = {"target_encoder": under("module.", target.state_dict()), "predictor": {}, "epoch": 300}
    file["encoder"] = under("module.", context.state_dict())
    same_features(converted(file), target)
    same_features(converted(file, network="encoder"), context)
    with pytest.raises(SystemExit, match="the network has no .CLS., use mean"):
        load_backbone("backbone.pt", feature="cls")


class Archive(torch.nn.Module):
    """What CLIP's official files are: a traced program with half-precision weights and three numbers."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, images):
        return self.visual(images)


@pytest.mark.parametrize("archive", [True, False, "open_clip"])
def test_clip(archive, capsys):
    import open_clip

    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    net = shaken(open_clip.CLIP(24, vision, text, quick_gelu=archive != "open_clip"))
    visual = net.visual
    if archive == "open_clip":
        backbone = converted(net.state_dict(), format="open_clip")
    elif archive:
        torch.jit.trace(Archive(visual).eval(), torch.randn(1, 3, 32, 32)).save("clip.pt")
        with pytest.raises(SystemExit, match="clip.pt: is a program .TorchScript.*--format clip loads it"):
            convert.convert(convert.Args("clip.pt", heads=3))
        convert.convert(convert.Args("clip.pt", heads=3, format="clip"))
        backbone = load_backbone("backbone.pt")
    else:
        refused("give --format clip .QuickGELU, OpenAI's files. or open_clip .GELU.", net.state_dict())
        backbone = converted(net.state_dict(), format="clip")
    visual.proj = None  # features before the projection
    same_features(backbone, visual)
    assert backbone.net.blocks[1].norm1.eps == visual.transformer.resblocks[1].ln_1.eps == 1e-5
    assert ("open_clip" if archive == "open_clip" else "CLIP") + ", image tower" in capsys.readouterr().out
    assert backbone.mean[0].item() == pytest.approx(0.48145466)
    larger = resized(visual.positional_embedding.detach()[None])[0]
    visual.positional_embedding = torch.nn.Parameter(larger)
    same_features(backbone, visual, 48)


def test_timm_and_torchvision(capsys):
    net = vit(num_classes=10)
    refused("timm, ViT: give --statistics imagenet or half", net.state_dict())
    backbone = converted(net.state_dict(), statistics="half")
    net.head = torch.nn.Identity()
    same_features(backbone, net)
    assert backbone.std[0].item() == 0.5
    assert "timm, ViT" in capsys.readouterr().out
    sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 192}
    net = shaken(torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes))
    state = net.state_dict()
    older = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    assert any("linear_1" in name for name in older)
    net.heads = torch.nn.Identity()
    same_features(converted(state), net)
    same_features(converted(older), net)
    for name in ("resnet18", "resnet50", "wide_resnet50_2"):
        net = shaken(getattr(torchvision.models, name)(), 0.01)
        state = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
        backbone = converted({"state_dict": state})
        net.fc = torch.nn.Identity()
        same_features(backbone, net, atol=1e-3)
        assert backbone.arch == name and backbone.dim == (512 if name == "resnet18" else 2048)


# What is refused


def refused(words, file, **flags):
    with pytest.raises(SystemExit, match=words) as stop:
        converted(file, **flags)
    assert not Path("backbone.pt").exists()
    return str(stop.value)


def test_what_is_not_complete_is_refused():
    state = vit().state_dict()
    state["pos_embed"][:, 0] = 0
    some = {k: v for k, v in state.items() if k not in ("blocks.1.mlp.fc2.bias", "norm.weight")}
    refused(r"MAE, encoder, but not complete: 2 missing: blocks.1.mlp.fc2.bias, norm.weight", {"model": some})
    refused("1 unexpected: norms.weight", {"model": state | {"norms.weight": torch.ones(48)}})
    scaled = state | {"blocks.1.ls1.gamma": torch.ones(48)}
    refused("3 missing: blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls2.gamma", {"model": scaled})
    short = state | {"blocks.0.attn.qkv.bias": torch.ones(47)}
    refused("1 of another shape: blocks.0.attn.qkv.bias", {"model": short})
    refused("its positions are no square grid", {"model": state | {"pos_embed": torch.ones(1, 19, 48)}})
    prefixed = under("encoder.backbone.", state)
    said = refused("is not of a known format; it has encoder.backbone.cls_token", prefixed)
    assert "pos_embed" in said
    refused("is not of format moco", {"model": state}, format="moco")
    refused("--format mea: must be auto or one of clip, open_clip, moco", {"model": state}, format="mea")
    refused("known format with --network student", {"model": state}, network="student")
    refused("give the number of heads, a divisor of the width 48", {"model": state}, heads=0)
    refused("give the number of heads, a divisor of the width 48", {"model": state}, heads=5)
    resnet = torchvision.models.resnet18().state_dict()
    del resnet["layer4.1.bn2.running_var"]
    refused("1 missing: layer4.1.bn2.running_var", resnet)
    refused("holds a list", [1, 2])
    deep = vit(embed_dim=192, depth=11).state_dict()
    deep["pos_embed"][:, 0] = 0
    refused("has 11 blocks; the vit_tiny of width 192 has 12", deep, heads=0, path="dino_x.pth")


def test_guesses_that_would_be_wrong_are_refused(tmp_path):
    """Parts and networks that features would silently be wrong with."""
    state = vit().state_dict()
    flags = {"format": "timm", "statistics": "half"}
    for name, shape in (("attn.logit_scale", (3,)), ("norm3.weight", (48,)), ("attn.v_bias", (48,))):
        more = {f"blocks.{i}.{name}": torch.ones(shape) for i in range(2)}
        refused(f"2 unexpected: blocks.0.{name}, blocks.1.{name}", state | more, **flags)
    mae = state | {"pos_embed": state["pos_embed"].index_fill(1, torch.tensor([0]), 0)}
    wide = vit(embed_dim=192, depth=12).state_dict() | {"pos_embed": torch.zeros(1, 17, 192)}
    refused("give the number of heads", {"model": wide}, heads=0)  # MAE published none of this width
    student = under("module.", under("backbone.", state) | {"head.last_layer.weight_g": torch.ones(2, 1)})
    refused("DINO without teacher; take --network student", {"student": student})
    target = {"target_encoder": under("module.", state)}
    refused("I-JEPA, but not complete: 1 unexpected: cls_token", target)
    for file in ({0: torch.ones(1)}, {"model": {0: torch.ones(1)}}, {1: 2}, {}):
        refused("is not of a known format; it has ", file)
    refused("no square", {"model": mae | {"pos_embed": torch.zeros(1, 19, 48)}})
    refused("give the number of heads", {"model": mae}, heads=-3)
    refused("must be a new file, in a folder that exists", {"model": mae}, to="none/x.pt")
    refused("must be a new file, in a folder that exists", {"model": mae}, to="file.pth")
    assert torch.load("file.pth", weights_only=True)["model"].keys() == mae.keys()


SIZES = [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16)]


@pytest.mark.parametrize("width, depth, heads", SIZES)
def test_heads_of_the_published_widths(width, depth, heads):
    shapes = {f"blocks.{depth - 1}.norm1.weight": (width,), "patch_embed.proj.weight": (width, 3, 16, 16)}
    shapes |= {"pos_embed": (1, 197, width), "cls_token": (1, 1, width)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for name in ("dino", "dinov2", "beit", "ijepa", "torchvision", "timm"):
        _, options, side = convert.describe_vit(name, state, convert.Args("x"), "")
        assert (options["heads"], side) == (heads, 224)
    assert convert.describe_vit("clip", state, convert.Args("x"), "")[1]["heads"] == width // 64
    with pytest.raises(SystemExit, match=f"the vit_.* has {heads}"):
        convert.describe_vit("dino", state, convert.Args("x", heads=2), "")


class Malice:
    def __reduce__(self):
        return exec, ("open('run', 'w').write('code ran')",)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SystemExit, match="none.pth: no such file"):
        convert.convert(convert.Args("none.pth"))
    torch.save({"model": vit().state_dict()}, "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("half.pth", "text.pth"):
        with pytest.raises(SystemExit, match=f"{name}: cannot be read: damaged, or no checkpoint"):
            convert.convert(convert.Args(name))
    torch.save({"model": Malice()}, "malice.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": Malice()}, protocol=2))
    for name in ("malice.pth", "old.pth"):
        with pytest.raises(SystemExit, match="holds more than weights .*exec.*; nothing of it was run"):
            convert.convert(convert.Args(name))
    assert not (tmp_path / "run").exists()
    torch.load("malice.pth", weights_only=False)  # the trap does work
    assert (tmp_path / "run").read_text() == "code ran"


# The other way


def loaded(lines):
    """The network that the printed lines build."""
    names = {"torch": torch, "timm": timm, "torchvision": torchvision, "functools": functools}
    exec("\n".join(lines), names)
    return names["net"].eval()


@pytest.mark.parametrize("script", TRAINING)
def test_every_backbone_loads_in_timm_and_torchvision(script, folder):
    module = importlib.import_module(script)
    module.train(tiny_args(script, data=str(folder), epochs=1, run_dir="run"))
    backbone = load_backbone("run/backbone.pt", feature="cls" if script == "beit" else "auto")
    timm_alone = script in ("beit", "ijepa")  # torchvision has no place for its parts, and always a [CLS]
    for library in ("timm",) if timm_alone else ("timm", "torchvision"):
        args = convert.Args("run/backbone.pt", to=f"{library}.pth", export=library)
        same_features(backbone, loaded(convert.convert(args)))
    args = convert.Args("run/backbone.pt", to="weights.safetensors", export="safetensors")
    names = {}
    exec("\n".join(convert.convert(args)), names)
    backbone.net.load_state_dict(names["state_dict"])


def test_converted_variants_load_in_timm(capsys):
    """DINOv2 with registers and SwiGLU, BEiT, I-JEPA, CLIP's norms: what torchvision has no place for."""
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 16 / 3}
    relative = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
    nets = [
        vit(init_values=1.0, reg_tokens=4, no_embed_class=True, **gated),
        shaken(timm.models.beit.Beit(**NANO | relative, global_pool="token")),
        vit(class_token=False, global_pool="avg", fc_norm=False),
    ]
    for net, name in zip(nets, ("timm", "beit", "timm"), strict=True):
        statistics = "half" if name == "timm" else "auto"
        converted(net.state_dict(), format=name, statistics=statistics)
        feature = "cls" if "cls_token" in net.state_dict() else "mean"
        backbone = load_backbone("backbone.pt", feature=feature)
        same_features(backbone, net)
        same_features(
            backbone, loaded(convert.convert(convert.Args("backbone.pt", to="t.pth", export="timm")))
        )
        with pytest.raises(SystemExit, match="torchvision's ViT has .*; use --export timm"):
            convert.convert(convert.Args("backbone.pt", export="torchvision"))
    with pytest.raises(SystemExit, match="is a backbone.pt already"):
        convert.convert(convert.Args("backbone.pt"))
    torch.save(nets[0].state_dict(), "foreign.pth")
    with pytest.raises(SystemExit, match="foreign.pth: is no backbone.pt"):
        convert.convert(convert.Args("foreign.pth", export="timm"))


def test_training_goes_on_from_an_official_file(folder, capsys):
    """MAE's encoder, a DINO teacher and MoCo's ResNet, converted, are where --init starts."""
    import dino
    import mae
    import moco

    encoder = mae.MAE("vit_nano", 32, 8)
    torch.save({"model": encoder.state_dict()}, "mae.pth")
    teacher = dino.VisionTransformer("vit_nano", 32, 8)
    torch.save(
        {"teacher": under("backbone.", teacher.state_dict()) | {"head.last_layer.weight_g": torch.ones(1)}},
        "dino.pth",
    )
    state = moco.MoCo("resnet18", queue_size=16).state_dict()
    torch.save({"state_dict": under("module.", state)}, "moco.pth")
    for module, name in ((mae, "mae"), (dino, "dino"), (moco, "moco")):
        convert.convert(convert.Args(f"{name}.pth", to=f"{name}.pt", heads=4 if name != "moco" else 0))
        flags = {"data": str(folder), "epochs": 1, "init": f"{name}.pt", "run_dir": f"run-{name}"}
        flags |= {"patch_size": 8} if name != "moco" else {}
        assert math.isfinite(module.train(tiny_args(name, **flags))["train/loss"])
        assert f"--init {name}.pt: new are" in capsys.readouterr().out
    file = torch.load("dino.pt", weights_only=True)
    file["arch_args"]["heads"] = 8  # the same shapes, another network
    torch.save(file, "eight.pt")
    args = tiny_args("dino", data=str(folder), init="eight.pt", patch_size=8, run_dir="run-eight")
    with pytest.raises(SystemExit, match="--init eight.pt: 1 do not fit this encoder: 8 heads"):
        dino.train(args)
    with pytest.raises(SystemExit, match="--init dino.pth: is no backbone.pt; convert.py makes one"):
        dino.train(dataclasses.replace(args, init="dino.pth"))
