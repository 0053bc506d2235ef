"""clip.py against its fact sheet's oracles, slow versions written here, and open_clip."""

import dataclasses
import json
import math
import random
import re
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import ROOT, command_line, features_of, run, run_processes, tiny_args
from PIL import Image

import clip
import convert
from clip import CLIP, BPETokenizer, ByteTokenizer, backward_in_chunks, clip_loss, tokenize
from eval_linear import load_backbone

DOUBLE = torch.float64
VOCABULARY = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
SMALL = {"arch": (128, 2), "image_size": 32, "patch_size": 8, "embed_dim": 64, "text": (64, 2, 259, 16)}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def shaken(model, generator, size=0.1):
    """With noise on every parameter, so that biases and gains of 0 and 1 cannot hide."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def some_ids(n, context, vocabulary, generator):
    """Texts of different lengths: start, tokens, end, zeros."""
    ids = torch.randint(1, vocabulary - 2, (n, context), generator=generator)
    ids[:, 0] = vocabulary - 2
    for i, row in enumerate(ids):
        end = 3 + i % (context - 3)
        row[end], row[end + 1 :] = vocabulary - 1, 0
    return ids


# The loss: oracles 1, 2, 10


def test_equal_features_give_ln_of_the_batch(generator):
    for features in (torch.zeros(12, 8), torch.ones(12, 8)):
        for scale in (1.0, 1 / 0.07, 100.0):
            assert clip_loss(features, features, scale).item() == pytest.approx(math.log(12), abs=1e-6)


def test_orthonormal_pairs():
    eye = torch.eye(12, dtype=DOUBLE)
    assert clip_loss(eye, eye, 1 / 0.07).item() == pytest.approx(6.8736e-6, rel=1e-4)
    assert clip_loss(eye, eye, 3.0).item() == pytest.approx(math.log(1 + 11 * math.exp(-3)), rel=1e-9)


def test_repeated_captions_leave_their_floor():
    """250 pairs, 10 captions: ln 25 = 3.2189 at best."""
    features = torch.eye(10, dtype=DOUBLE).repeat(25, 1)
    assert clip_loss(features, features, 100.0).item() == pytest.approx(3.2189, abs=1e-4)
    ids = torch.arange(10)[:, None].repeat(25, 4)
    assert clip.clip_metrics(features, features, ids, 100.0)["floor"] == pytest.approx(math.log(25), abs=1e-5)


def test_loss_is_a_slow_one_and_open_clip_s_and_symmetric(generator):
    images, texts = torch.randn(2, 7, 5, generator=generator, dtype=DOUBLE)
    scale, losses = 6.5, []
    for rows, columns in ((images, texts), (texts, images)):
        for i in range(7):
            scores = [scale * (rows[i] @ c) / rows[i].norm() / c.norm() for c in columns]
            losses.append(-torch.log(torch.exp(scores[i]) / sum(torch.exp(s) for s in scores)))
    ours = clip_loss(images, texts, scale)
    torch.testing.assert_close(ours, sum(losses) / 14)
    theirs = open_clip.ClipLoss()(F.normalize(images, dim=1), F.normalize(texts, dim=1), scale)
    torch.testing.assert_close(ours, theirs)
    order = torch.randperm(7, generator=generator)
    torch.testing.assert_close(clip_loss(images[order], texts[order], scale), ours)
    torch.testing.assert_close(clip_loss(texts, images, scale), ours)
    assert clip_loss(images[order], texts, scale) != pytest.approx(ours.item(), rel=1e-3)


def test_metrics_are_slow_ones(generator):
    images, texts = torch.randn(2, 9, 4, generator=generator)
    texts[:5] = images[:5] + 0.1 * texts[:5]
    captions = [0, 1, 2, 0, 3, 4, 5, 5, 5]
    ids = torch.tensor([[7, caption] for caption in captions])
    metrics = clip.clip_metrics(images, texts, ids, 5.0)
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    right, gaps = [], []
    for rows, columns in ((images, texts), (texts, images)):
        for i, row in enumerate(rows):
            keep = [j for j in range(9) if j == i or captions[j] != captions[i]]
            scores = torch.stack([5 * row @ columns[j] for j in keep])
            own = keep.index(i)
            right.append(float(all(scores[own] > s for j, s in enumerate(scores) if j != own)))
            gaps.append(math.log(len(keep)) + scores.log_softmax(0)[own].item())
    accuracy = metrics["contrastive_accuracy"]
    assert accuracy == pytest.approx(sum(right) / 18) and 0.2 < accuracy < 1
    assert metrics["gap"] == pytest.approx(sum(gaps) / 18, abs=1e-5)
    assert metrics["chance"] == pytest.approx((2 * math.log(8) + 3 * math.log(7) + 4 * math.log(9)) / 9)
    assert metrics["floor"] == pytest.approx((2 * math.log(2) + 3 * math.log(3)) / 9)
    alike = clip.clip_metrics(torch.ones(9, 4), torch.ones(9, 4), ids, 5.0)
    assert alike["contrastive_accuracy"] == 0 and alike["gap"] == pytest.approx(
        0, abs=1e-6
    )  # a tie is no success


# The model: oracles 3, 4, 6, 9


def test_sizes_and_names():
    with torch.device("meta"):
        large = CLIP("vit_base", 224, 32, 512, (512, 12, 49408, 77))
        theirs = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).state_dict()
    ours = large.state_dict()
    assert sum(p.numel() for p in large.parameters()) == 151_277_313 and len(ours) == 302
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    small = CLIP(**SMALL)
    assert sum(p.numel() for p in small.parameters()) == 553_921 and len(small.state_dict()) == 62
    assert small.logit_scale.exp().item() == pytest.approx(14.2857, abs=1e-4)
    names = CLIP(**SMALL | {"arch": "resnet18"}).state_dict()
    wanted = {f"visual.backbone.{k}" for k in torchvision.models.resnet18().state_dict() if k[:3] != "fc."}
    assert {k for k in names if k.startswith("visual.")} == wanted | {"visual.proj"}


def test_initialisation():
    torch.manual_seed(0)
    model = CLIP("vit_small", 224, 16, 256, (256, 8, 2000, 32))
    stds = {
        "visual.class_embedding": 384**-0.5,
        "visual.positional_embedding": 384**-0.5,
        "visual.proj": 384**-0.5,
        "visual.transformer.resblocks.3.attn.in_proj_weight": math.sqrt(2 / (4 * 384)),  # Xavier over (3w, w)
        "visual.transformer.resblocks.3.mlp.c_fc.weight": 384**-0.5 / math.sqrt(3),
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "transformer.resblocks.5.attn.in_proj_weight": 256**-0.5,
        "transformer.resblocks.5.attn.out_proj.weight": 256**-0.5 * 16**-0.5,
        "transformer.resblocks.5.mlp.c_proj.weight": 256**-0.5 * 16**-0.5,
        "transformer.resblocks.5.mlp.c_fc.weight": 512**-0.5,
        "text_projection": 256**-0.5,
    }
    parameters = dict(model.named_parameters())
    for name, std in stds.items():
        tolerance = 0.15 if parameters[name].ndim == 1 else 0.02
        assert parameters[name].std().item() == pytest.approx(std, rel=tolerance), name
    assert parameters["transformer.resblocks.0.attn.in_proj_bias"].abs().max() == 0
    assert parameters["transformer.resblocks.0.mlp.c_fc.bias"].abs().max() > 0.01  # PyTorch's, not 0


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_features_and_loss_are_open_clip_s(quick_gelu, generator):
    """Weights are copied both ways, strictly."""
    vision = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 259, "width": 64, "heads": 1, "layers": 2}
    theirs = open_clip.model.CLIP(64, vision, text, quick_gelu=quick_gelu)
    ours = shaken(CLIP(**SMALL, quick_gelu=quick_gelu), generator)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(shaken(theirs, generator).state_dict())
    images, ids = torch.randn(6, 3, 32, 32, generator=generator), some_ids(6, 16, 259, generator)
    image_features, text_features, h = ours(images, ids)
    torch.testing.assert_close(image_features, theirs.encode_image(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_features, theirs.encode_text(ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode_image(images), image_features)
    torch.testing.assert_close(h @ ours.visual.proj, image_features)
    expected = open_clip.ClipLoss()(*theirs(images, ids))
    loss = clip_loss(image_features, text_features, ours.logit_scale.exp())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    other = CLIP(**SMALL, quick_gelu=not quick_gelu).eval()
    other.load_state_dict(ours.state_dict())
    assert (other.encode_image(images) - image_features).abs().max() > 1e-3


def test_quick_gelu(generator):
    block = clip.CLIPBlock(64, True, False)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        block.mlp["c_fc"].bias[0], block.mlp["c_proj"].weight[5, 0] = 1.0, 1.0
        assert block(torch.zeros(1, 1, 64))[0, 0, 5].item() == pytest.approx(0.845796, abs=1e-6)
        block.quick_gelu = False
        assert block(torch.zeros(1, 1, 64))[0, 0, 5].item() == pytest.approx(0.841345, abs=1e-6)


@pytest.mark.slow
def test_untrained_loss_is_that_of_chance(generator):
    torch.manual_seed(0)
    model = CLIP("vit_base", 224, 32, 512, (512, 12, 49408, 77))
    images, ids = torch.randn(16, 3, 224, 224, generator=generator), some_ids(16, 77, 49408, generator)
    with torch.no_grad():
        loss = clip_loss(*model(images, ids)[:2], model.logit_scale.exp())
    assert loss.item() == pytest.approx(2.78, abs=0.07)  # the sheet: 0.05, of photos


def test_nothing_reads_what_follows_the_end(generator):
    model = shaken(CLIP(**SMALL), generator)
    ids = torch.tensor([[257, 5, 6, 7, 258, 0, 0, 0]])
    features = model.encode_text(ids)
    for changed in (torch.tensor([[257, 5, 6, 7, 258, 9, 9, 9]]), ids[:, :5]):
        torch.testing.assert_close(model.encode_text(changed), features, atol=1e-6, rtol=1e-6)
    assert (model.encode_text(torch.tensor([[257, 5, 9, 7, 258, 0, 0, 0]])) - features).abs().max() > 1e-2


def test_positions_of_another_size(generator):
    model = shaken(CLIP(**SMALL), generator)
    assert model.encode_image(torch.randn(2, 3, 48, 64, generator=generator)).shape == (2, 64)


# Several processes and chunks: oracles 7, 8


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (DOUBLE, 1e-12)])
def test_gradient_in_chunks_is_that_of_the_batch(dtype, tolerance, generator):
    torch.manual_seed(0)
    model = CLIP(**SMALL).to(dtype)
    images = torch.randn(7, 3, 32, 32, generator=generator, dtype=dtype)
    ids = some_ids(7, 16, 259, generator)

    def embed(chunk):
        image_features, text_features, h = model(*chunk)
        return torch.stack([image_features, text_features], dim=1), h

    def loss_of(z):
        return clip_loss(z[:, 0], z[:, 1], model.logit_scale.exp())

    params, scaler = [*model.parameters()], torch.amp.GradScaler("cpu", enabled=False)
    whole = loss_of(embed((images, ids))[0])
    expected = torch.autograd.grad(whole, params)
    chunks = list(zip(images.split(3), ids.split(3), strict=True))
    loss, z, h = backward_in_chunks(embed, chunks, loss_of, scaler, params)
    torch.testing.assert_close(loss, whole.detach())
    assert z.shape == (7, 2, 64) and h.shape == (7, 128)
    scale = max(g.abs().max() for g in expected)
    assert max((p.grad - g).abs().max() for p, g in zip(params, expected, strict=True)) < tolerance * scale
    own = [g for p, g in zip(params, expected, strict=True) if p is model.logit_scale][0]
    assert abs(own) > 1e-4 and abs(model.logit_scale.grad - own) < 10 * tolerance * abs(own)


def test_training_is_the_same_in_chunks_and_in_processes(tmp_path):
    """train() itself: 1 process = chunks = 2 processes = 2 in chunks; in loss, scale and every weight."""
    code = """
import torch, torch.distributed as dist, clip
flags = dict(data="pairs.csv", image_size=16, batch_size=24, epochs=2, warmup_epochs=0.5, workers=0)
flags |= dict(log_every=1, patch_size=8, embed_dim=32, text_width=64, text_depth=1, context_length=40)
start, destroy = dist.init_process_group, dist.destroy_process_group
ready = []
dist.init_process_group = lambda *a: ready or ready.append(start(*a))
dist.destroy_process_group = lambda: None
for micro in (0, 5):
    clip.train(clip.Args(**flags, micro_batch_size=micro, run_dir=f"runWORLD{micro}"))
if ready:
    destroy()
"""
    lines = ["image,caption"]
    for i in range(96):
        image, _, caption = clip.demo_image(i)
        image.save(tmp_path / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{caption}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    for world in (1, 2):
        run_processes(tmp_path, code.replace("WORLD", str(world)), world)
    curves, weights = {}, {}
    for name in ("run10", "run15", "run20", "run25"):
        curves[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        weights[name] = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        assert len(curves[name]) == 8
        for line, first in zip(curves[name], curves["run10"], strict=True):
            for tag, value in first.items():
                if not tag.startswith("perf/"):
                    assert line[tag] == pytest.approx(value, rel=2e-4, abs=1e-5), (name, tag)
        for key, tensor in weights["run10"].items():
            torch.testing.assert_close(weights[name][key], tensor, atol=2e-4, rtol=2e-3, msg=f"{name} {key}")
    assert curves["run10"][-1]["train/loss"] < curves["run10"][0]["train/loss"] - 0.05
    assert curves["run10"][-1]["clip/logit_scale"] != pytest.approx(1 / 0.07, abs=1e-4)


# Text: oracle 5


def varied_strings():
    rng = random.Random(0)
    words = (
        "a photo of the Café naïve Straße Ünïted 東京 Привет don't we're I'll x86 3.14 100% e-mail".split()
    )
    words += [
        "it's",
        "rock'n'roll",
        "&amp;",
        "&lt;b&gt;",
        "&amp;amp;",
        "snake_case",
        "C++",
        "#1",
        "²",
        "½",
        "१२",
    ]
    words += [
        "👩‍🚀",
        "🦊🦊",
        "e\u0301",
        "‘quoted’",
        "“double”",
        "...",
        "!!",
        "--",
        "\t",
        "\n",
        "$5,000",
        "O'Neill's",
    ]
    words += [
        "ﬂuffy"[1:],
        "antidisestablishmentarianism",
        "'s",
        "''",
        "a'b",
        "café's",
        "ΑΒΓ",
        "ñ",
        "שלום",
        "ไทย",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(200)]


def test_ids_are_open_clip_s():
    ours, theirs = BPETokenizer(VOCABULARY), open_clip.SimpleTokenizer()
    assert ours.vocab_size == 49408
    assert tokenize(["a"], 8, ours).tolist() == [[49406, 320, 49407, 0, 0, 0, 0, 0]]
    for text in varied_strings():
        assert ours.encode(text) == theirs.encode(text), text
    rows = tokenize(varied_strings(), 12, ours)  # too long ones keep the end
    assert torch.equal(rows, theirs(varied_strings(), context_length=12))


@pytest.mark.parametrize(
    "text, ids",
    [
        ("a photo of a cat.", [320, 1125, 539, 320, 2368, 269]),
        ("a diagram", [320, 22697]),
        ("Hello   WORLD!!", [3306, 1002, 748]),
        ("12 345", [272, 273, 274, 275, 276]),
        ("it's", [585, 568]),
        ("", []),
        ("!", [256]),
    ],
)
def test_ids_of_the_sheet(text, ids):
    assert BPETokenizer(VOCABULARY).encode(text) == ids


def decoded(ids):
    return bytes(i - 1 for i in ids.tolist() if 1 <= i <= 256).decode(errors="replace")


def test_bytes_are_reversible():
    for text in (*varied_strings(), "a fox", ""):
        ids = tokenize([text], 400)[0]
        assert decoded(ids) == clip.clean(text)
        assert ids[0] == 257 and ids.max() == 258 and (ids == 258).sum() == 1
    assert clip.clean("half \ud83d") == "half ?"  # of an emoji, as in scraped json


def test_a_long_text_keeps_its_end():
    ids = tokenize(["x" * 50, "é" * 20, "ok"], 16)
    assert ids.shape == (3, 16) and ids[0].tolist() == [257] + [1 + ord("x")] * 14 + [258]
    assert ids[2].tolist() == [257, 1 + ord("o"), 1 + ord("k"), 258] + [0] * 12
    odd = tokenize(["é" * 20], 16 + 1)[0]  # cut within a character
    assert decoded(odd) == "é" * 7 + "�"


@pytest.mark.parametrize("content", [b"no gzip", b"", None])
def test_bad_vocabularies(content, tmp_path):
    if content is not None:
        (tmp_path / "vocabulary").write_bytes(content)
    with pytest.raises(SystemExit, match="--bpe-path vocabulary: "):
        BPETokenizer("vocabulary")


# Data


def pictures(folder, names):
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(path)


def pairs(data, **flags):
    args = clip.Args(data=str(data), workers=0, image_size=16, **flags)
    return clip.Pairs(args, args.data, clip.photo_view(16), ByteTokenizer())


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "image,caption\n{}/0.png,a fox\n{}/1.png,'a deer'\n{}/2.png,\"one, two\"\n"),
        ("a.tsv", "title\tfilepath\na fox\t{}/0.png\n'a deer'\t{}/1.png\none, two\t{}/2.png\n"),
        ("b.csv", "﻿File_Name;Text;score\n{}/0.png;a fox;1\n{}/1.png;'a deer';2\n{}/2.png;one, two;3"),
        (
            "a.jsonl",
            '{{"image": "{}/0.png", "text": "a fox"}}\n\n{{"text": ["\'a deer\'"], "image": "{}/1.png"}}\n'
            '{{"image": "{}/2.png", "text": "one, two"}}',
        ),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_indexes(tmp_path, monkeypatch, name, content, absolute):
    """Paths are relative to the index, whatever the working directory."""
    pictures(tmp_path / "set/photos", ["0.png", "1.png", "2.png"])
    where = str(tmp_path / "set/photos") if absolute else "photos"
    (tmp_path / "set" / name).write_text(content.format(where, where, where), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = pairs(tmp_path / "set" / name)
    assert data.captions == [["a fox"], ["'a deer'"], ["one, two"]]
    view, ids, index = data[4]
    assert index == 1 and view.shape == (3, 16, 16) and view[0, 0, 0] == 10
    assert decoded(ids) == "'a deer'"


def test_bad_rows_are_counted(tmp_path):
    pictures(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    rows = [
        {"image": f"{i}.png", "caption": c} for i, c in enumerate(["fox", "  ", None, 7, "lost", {"a": 1}])
    ]
    rows[4]["image"] = "lost.png"
    rows.append({"image": "3.png", "caption": ["", "a", 5, None]})
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = pairs("a.jsonl")
    assert data.captions == [["fox"], ["7"], ["a", "5"]] and [Path(p).name for p in data.items] == [
        "0.png",
        "3.png",
        "3.png",
    ]
    assert data.found == "3 pairs in a.jsonl; left out: 3 without caption, 1 without image (lost.png)"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "picture,words\n0.png,fox", "needs one of image, .*; it has picture, words"),
        ("a.csv", "image,words\n0.png,fox", "needs one of caption, .*; it has image, words"),
        ("a.csv", "", "it has nothing"),
        ("a.csv", "picture,words\n", "it has picture, words"),
        ("none.csv", None, "cannot be read: .*No such file"),
        ("a.jsonl", "[1, 2]", "cannot be read"),
        ("a.jsonl", "{no json", "cannot be read"),
        ("a.csv", b"\xff\xfe\x00\x01", "cannot be read"),
        ("a.csv", "image,caption\n0.png,fox\n0.png,fox", "all captions are alike"),
    ],
)
def test_bad_indexes_say_what_is_wrong(tmp_path, name, content, words):
    pictures(tmp_path, ["0.png"])
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=f"{name}: .*{words}") as stop:
        pairs(name)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400


def test_texts_beside_images_and_class_folders(tmp_path):
    pictures(tmp_path / "a", ["x/0.png", "1.jpg", "2.png", "3.png"])
    for name, text in (("x/0", "a fox\n\nred fox\n"), ("1", "a deer"), ("2", " \n")):
        (tmp_path / "a" / f"{name}.txt").write_text(text)
    data = pairs("a")
    assert data.captions == [["a deer"], ["a fox", "red fox"]] and "left out: 2 without caption" in data.found
    seen = {decoded(data[2 * epoch + 1][1]) for epoch in range(20)}
    assert seen == {"a fox", "red fox"}  # drawn anew in each epoch
    pictures(tmp_path / "b/train", ["polar_bear/0.png", "polar_bear/deep/1.png", "fox/2.png"])
    data = pairs("b", templates=("a {}.", "{} {}"))
    assert data.classes == ["fox", "polar bear"] and data.labels == [0, 1, 1]
    assert data.captions[1] == ["a polar bear.", "polar bear polar bear"]
    pictures(tmp_path / "b/train", ["3.png"])
    with pytest.raises(SystemExit, match="b: no captions; give class folders"):
        pairs("b")


def test_an_image_that_cannot_be_read_takes_its_caption_along(tmp_path):
    pictures(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "1.png").write_text("no image")
    (tmp_path / "a.csv").write_text("image,caption\n0.png,zero\n1.png,one\n2.png,two")
    with pytest.warns(UserWarning, match="1.png cannot be read"):
        view, ids, index = pairs("a.csv")[1]
    assert index == 2 and view[0, 0, 0] == 20 and decoded(ids) == "two"


def test_long_captions_are_told_once(tmp_path, capsys):
    pictures(tmp_path, [f"{i}.png" for i in range(16)])
    lines = [f"{i}.png,{'very ' * (i % 2) * 20}{i}" for i in range(16)]
    Path("a.csv").write_text("\n".join(["image,caption", *lines]))
    clip.train(tiny_args("clip", data="a.csv", context_length=24, epochs=1, run_dir="run"))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("8 captions cut to --context-length 24") == 1


# After training


def test_zero_shot_classifier_is_a_slow_one(generator):
    model = shaken(CLIP(**SMALL), generator)
    classes, templates = ["fox", "polar bear"], ["a {}.", "the {}", "{} {}"]
    for column, name in zip(clip.zero_shot_classifier(model, classes, templates).T, classes, strict=True):
        rows = [model.encode_text(tokenize([t.replace("{}", name)], 16))[0] for t in templates]
        mean = sum(row / row.norm() for row in rows) / 3
        torch.testing.assert_close(column, (mean / mean.norm()).detach())


def test_recall(generator):
    similarity = torch.randn(30, 30, generator=generator)
    results = clip.recall(similarity)
    for name, table in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        for k in (1, 5, 10):
            hits = [sorted(row.tolist())[::-1].index(row[i].item()) < k for i, row in enumerate(table)]
            assert results[f"{name}_r{k}"] == pytest.approx(100 * sum(hits) / 30)
    assert len(set(results.values())) > 3
    assert set(clip.recall(torch.ones(30, 30)).values()) == {0}  # ties are no success


def slow_zero_shot(checkpoint, folder, templates):
    """Top-1 of class folders, image by image."""
    model, side = clip.load_clip(checkpoint, True)
    right = []
    classes = sorted(path.name for path in folder.iterdir())
    for path in sorted(folder.rglob("*.png")):
        image = torchvision.transforms.functional.pil_to_tensor(Image.open(path).convert("RGB"))
        pixels = clip.photo_view(side)(image) / 255
        pixels = (pixels - torch.tensor(clip.MEAN)[:, None, None]) / torch.tensor(clip.STD)[:, None, None]
        feature = F.normalize(model.encode_image(pixels[None])[0], dim=0)
        scores = []
        for name in classes:
            ids = tokenize([template.replace("{}", name) for template in templates], 64)
            mean = F.normalize(model.encode_text(ids), dim=1).mean(dim=0)
            scores.append((feature @ F.normalize(mean, dim=0)).item())
        right.append(scores.index(max(scores)) == classes.index(path.parent.name))
    return 100 * sum(right) / len(right)


def test_a_run_is_evaluated_and_read(tmp_path, capsys):
    """Zero-shot of the val folder, pictures, --classify, the same command again, eval_linear."""
    for i in range(120):
        image, label, _ = clip.demo_image(i)
        if label < 3:
            path = tmp_path / "set" / ("val" if i % 3 == 0 else "train") / [*clip.WORLD][label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    flags = {"data": "set", "epochs": 12, "lr": 2e-3, "run_dir": "run", "log_every": 5}
    metrics = clip.train(tiny_args("clip", **flags))
    results = json.loads(Path("run/eval-zero-shot.json").read_text())
    assert (
        re.fullmatch(r"\d+ images in set/val, .*to measure .set/val.", results["pairs"])
        and 5 < results["n"] < 25
        and "text_to_image_r1" not in results
    )
    slow = slow_zero_shot("run/checkpoint.pt", tmp_path / "set/val", clip.TEMPLATES)
    assert results["zero_shot_top1"] == pytest.approx(slow)
    assert "zero_shot_top1" in capsys.readouterr().out
    for name in ("views", "captions"):
        assert Image.open(f"run/{name}.png").width > 200
    assert clip.train(tiny_args("clip", **flags)) == metrics  # finished: evaluates, trains nothing
    printed = capsys.readouterr().out
    assert re.search(r"step (\d+) of \1\n", printed) and "zero_shot_top1" in printed
    photo = str(next((tmp_path / "set/val").rglob("*.png")))
    words = ["--classify", photo, "--prompts", "a house", "a tree", "--checkpoint", "run/checkpoint.pt"]
    done = run([sys.executable, ROOT / "clip.py", *words])
    assert done.returncode == 0 and done.stdout.count("%") == 2, done.stderr
    shares = [float(share) for share in re.findall(r"([\d.]+)%", done.stdout)]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)
    model, side = clip.load_clip("run/checkpoint.pt", True)
    images = torch.randn(3, 3, side, side)
    torch.testing.assert_close(
        features_of(load_backbone("run/backbone.pt"), images),
        model(images, tokenize("abc"))[2],
        atol=1e-5,
        rtol=1e-5,
    )


def test_pairs_to_measure(tmp_path):
    """val/ counts only beside train/; its classes are those of the training; a sample is a random one."""
    pictures(tmp_path / "a", [f"train/{name}/{i}.png" for name in ("fox", "owl", "ram") for i in range(5)])
    pictures(tmp_path / "a", ["val/owl/0.png", "val/owl/1.png"])
    args = clip.Args(data="a", workers=0, image_size=16)
    data = pairs("a")
    test, order = clip.measured_pairs(args, data, ByteTokenizer(), 0)
    assert test.classes == ["fox", "owl", "ram"] and test.labels == [1, 1] and sorted(order) == [0, 1]
    Path("captions.csv").write_text("image,caption\na/val/owl/0.png,an owl\na/val/owl/1.png,two owls")
    mixed = dataclasses.replace(args, val_data="captions.csv")  # of captions, where the training has classes
    test, order = clip.measured_pairs(mixed, data, ByteTokenizer(), 0)
    assert test.classes == test.labels == [] and len(order) == 2
    pictures(tmp_path / "b", ["fox/0.png", "owl/0.png", "val/0.png"])
    test, order = clip.measured_pairs(dataclasses.replace(args, data="b"), pairs("b"), ByteTokenizer(), 0)
    assert "training pairs" in test.found and test.classes == ["fox", "owl", "val"]
    pictures(tmp_path / "c", [f"{name}/{i:04d}.png" for name in ("fox", "owl") for i in range(600)])
    test, order = clip.measured_pairs(dataclasses.replace(args, data="c"), pairs("c"), ByteTokenizer(), 0)
    assert len(set(order)) == 1000 and 450 < sum(test.labels[i] for i in order) < 550
    (tmp_path / "a/val/owl/0.png").unlink(), (tmp_path / "a/val/owl/1.png").unlink()
    with pytest.raises(SystemExit, match="a/val: nothing to measure"):
        clip.measured_pairs(args, data, ByteTokenizer(), 0)
    pictures(tmp_path / "d", ["photos/0.png", "photos/1.png"])
    with pytest.raises(SystemExit, match="--data d: all captions are alike"):
        pairs("d")


def test_data_sets_of_torchvision(monkeypatch):
    class Set(list):
        classes = ["polar_bear", ("fox", "red fox")]

        def __init__(self, root, download, split="train"):
            if split == "test":
                raise ValueError("train or val")
            self._samples = [("path", i % 2) for i in range(6 if split == "train" else 4)]
            super().__init__((Image.new("RGB", (20, 20)), i % 2) for i in range(len(self._samples)))

    monkeypatch.setattr(torchvision.datasets, "Imagenette", Set)
    data = pairs("Imagenette", templates=("a {}",))
    assert data.captions[:2] == [["a polar bear"], ["a fox"]] and len(data.captions) == 6
    test, order = clip.measured_pairs(clip.Args(data="Imagenette"), data, ByteTokenizer(), 0)
    assert len(order) == 4 and test.labels == [0, 1, 0, 1]


def test_unique_captions_give_recall(tmp_path):
    pictures(tmp_path, [f"{i}.png" for i in range(24)])
    rows = [f"{i}.png,number {i}" for i in range(24)]
    Path("a.csv").write_text("\n".join(["image,caption", *rows]))
    clip.train(tiny_args("clip", data="a.csv", epochs=1, run_dir="run"))
    results = json.loads(Path("run/eval-zero-shot.json").read_text())
    assert results["pairs"] == "24 of the training pairs" and results["n"] == 24
    recalls = [results[f"image_to_text_r{k}"] for k in (1, 5, 10)]
    assert recalls == sorted(recalls) and "zero_shot_top1" not in results
    Path("b.csv").write_text("\n".join(["image,caption", *rows[:10]]))
    clip.train(tiny_args("clip", data="a.csv", val_data="b.csv", epochs=1, run_dir="run2"))
    assert json.loads(Path("run2/eval-zero-shot.json").read_text())["n"] == 10


def test_weights_of_open_clip_classify(tmp_path, generator, capsys):
    vision = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    theirs = shaken(open_clip.model.CLIP(64, vision, text, quick_gelu=True), generator, 0.02)
    torch.save(
        {"state_dict": {f"module.{k}": v.half() for k, v in theirs.state_dict().items()}}, "weights.pt"
    )
    theirs.load_state_dict({k: v.half() for k, v in theirs.state_dict().items()})
    pictures(tmp_path, ["0.png", "1.png"])
    args = clip.Args(
        classify=("0.png", "1.png"), prompts=("a fox", "a deer", "an owl"), checkpoint="weights.pt"
    )
    with pytest.raises(SystemExit, match="has 49408 tokens: give --bpe-path"):
        clip.train(args)
    shares = clip.train(dataclasses.replace(args, bpe_path=str(VOCABULARY)))
    ids = open_clip.SimpleTokenizer(context_length=16)(["a fox", "a deer", "an owl"])
    for name, share in shares.items():
        image = torchvision.transforms.functional.pil_to_tensor(
            Image.open(name).resize((32, 32), Image.BICUBIC)
        )
        image = torchvision.transforms.functional.normalize(image[None] / 255, clip.MEAN, clip.STD)
        image_features, text_features, scale = theirs(image, ids)
        expected = (scale * image_features @ text_features.T).softmax(dim=1)[0]
        torch.testing.assert_close(torch.tensor(share), expected, atol=2e-3, rtol=0)
    model = CLIP(**SMALL)
    weights = model.state_dict() | {"visual.conv1.weight": torch.ones(1280, 3, 8, 8)}
    torch.save(weights, "huge.pt")  # its heads are not 64 wide
    torch.save({"a": torch.ones(2)}, "other.pt")
    torch.save({"method": "clip", "arch_args": {}, "state_dict": {}}, "backbone.pt")
    Path("text.pt").write_text("no weights")
    for name in ("other.pt", "text.pt", "none.pt", "backbone.pt", "huge.pt"):
        with pytest.raises(SystemExit, match=f"--checkpoint {name}: "):
            clip.train(dataclasses.replace(args, checkpoint=name))
    capsys.readouterr()
    torch.save({"method": "clip", "model": model.state_dict(), "sizes": SMALL}, "ours.pt")
    clip.train(dataclasses.replace(args, checkpoint="ours.pt", prompts=("a", "b" * 30)))
    assert "the model reads 16 tokens" in capsys.readouterr().out


def test_a_start_of_the_other_activation_is_refused(folder, tmp_path):
    flags = {"data": str(folder), "epochs": 1}
    clip.train(tiny_args("clip", **flags, quick_gelu=False, run_dir="a"))
    with pytest.raises(SystemExit, match="--init a/backbone.pt: of the other --quick-gelu"):
        clip.train(tiny_args("clip", **flags, init="a/backbone.pt", run_dir="b"))


def test_backbone_is_what_convert_makes_of_the_weights(tmp_path, generator):
    model = shaken(CLIP(**SMALL), generator)
    torch.save(model.state_dict(), "weights.pt")
    convert.convert(convert.Args("weights.pt", to="converted.pt", activation="quick_gelu"))
    file = torch.load("converted.pt", weights_only=True)
    weights, _ = model.visual.exported()
    assert file["state_dict"].keys() == weights.keys()
    assert all(torch.equal(file["state_dict"][k], v) for k, v in weights.items())
    assert file["arch_args"]["act_layer"] == "quick_gelu" and file["arch_args"]["norm_eps"] == 1e-5
    assert file["arch_args"]["num_heads"] == model.visual.transformer.resblocks[0].attn.num_heads


def test_a_resnet_trains_and_its_backbone_is_torchvision_s(folder):
    clip.train(
        tiny_args("clip", data=str(folder), arch="resnet18", epochs=1, run_dir="run", micro_batch_size=4)
    )
    net = torchvision.models.resnet18()
    missing, unexpected = net.load_state_dict(torch.load("run/backbone.pt")["state_dict"], strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


# Training


def test_schedule_decay_and_scale(folder, tmp_path):
    """Oracle 10, and the scale held to [1, 100] after every step."""
    flags = {"data": str(folder), "epochs": 4, "warmup_epochs": 1, "lr": 1.0, "run_dir": "run"}
    groups, scales = [], []

    class Spy(torch.optim.AdamW):
        def __init__(self, params, *args, **options):
            groups.append((params, options))
            super().__init__(params, *args, **options)

        def step(self, *args):
            super().step(*args)
            with torch.no_grad():
                scale = next(p for p in self.param_groups[1]["params"] if p.ndim == 0)
                scales.append(scale)
                scale += 10 if len(scales) < 12 else -20

    original, torch.optim.AdamW = torch.optim.AdamW, Spy
    try:
        clip.train(tiny_args("clip", **flags | {"lr": 1e-4}))
    finally:
        torch.optim.AdamW = original
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").open()]
    rates = [line["train/lr"] for line in lines]
    expected = [
        1e-4 * (s + 1) / 5 if s < 5 else 1e-4 * (1 + math.cos(math.pi * (s - 5) / 15)) / 2 for s in range(20)
    ]
    assert rates == pytest.approx(expected)
    assert lines[3]["clip/logit_scale"] == pytest.approx(100) and lines[-1][
        "clip/logit_scale"
    ] == pytest.approx(1)
    (decayed, free), options = groups[0]
    model = CLIP(**torch.load("run/checkpoint.pt", weights_only=True)["sizes"])
    kept = [name for name, p in model.named_parameters() if p.ndim < 2 or "positional" in name]
    assert len(free["params"]) == len(kept) and free["weight_decay"] == 0 and decayed["weight_decay"] == 0.2
    assert {"visual.positional_embedding", "positional_embedding", "logit_scale"} < {*kept}
    assert options["betas"] == (0.9, 0.98) and options["eps"] == 1e-6


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"image_size": 30}, "--image-size 30: give a multiple of --patch-size"),
        ({"text_width": 100}, "--text-width: give a multiple of 64"),
        ({"context_length": 2}, "--context-length: 3 or more"),
        ({"templates": ("a photo",)}, "--templates a photo: each needs {}"),
        ({"templates": ()}, "--templates"),
        ({"prompts": ("a", "b")}, "give --classify too"),
        ({"classify": ("a.png",), "prompts": ("a",)}, "give --checkpoint and 2 or more --prompts"),
        ({"val_data": "nowhere"}, "--data nowhere: no folder"),
        ({"bpe_path": "nowhere"}, "--bpe-path nowhere: "),
    ],
)
def test_bad_flags(folder, tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words):
        clip.train(tiny_args("clip", data=str(folder), **flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_64_pairs_are_learnt_by_heart(photos, tmp_path):
    files = sorted(photos.glob("train/*/*.jpg"))[::150][:64]
    Path("a.csv").write_text(
        "image,caption\n" + "\n".join(f"{f},photo {i} of a {f.parent.name}" for i, f in enumerate(files))
    )
    clip.train(
        clip.Args(data="a.csv", batch_size=64, epochs=300, warmup_epochs=10, run_dir="run", min_scale=1.0)
    )
    results = json.loads(Path("run/eval-zero-shot.json").read_text())
    assert results["n"] == 64 and results["image_to_text_r1"] == results["text_to_image_r1"] == 100


def test_paper_command_is_the_sheet_s():
    command = re.search(
        r"torchrun --nnodes 32 --nproc-per-node 8 clip\.py(.*?)(?<!\\)\n", clip.__doc__, re.S
    )[1]
    args = tyro.cli(clip.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.patch_size, args.embed_dim) == (224, "vit_base", 32, 512)
    assert (args.text_width, args.text_depth, args.context_length) == (512, 12, 77)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (32, 32768, 5e-4, 0.2)
    assert args.quick_gelu and not args.flip and args.min_scale == 0.9
    steps = 400_000_000 // args.batch_size  # 400 million pairs
    assert args.warmup_epochs * steps == pytest.approx(2000, rel=0.03)
    assert command_line("clip")
