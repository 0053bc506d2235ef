"""clip.py against its fact sheet's oracles, slow versions written here, open_clip and torchmetrics."""

import csv
import importlib
import json
import math
import os
import random
import re
import sys
from pathlib import Path
from unittest import mock

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
from clip import CLIP, clip_loss, pair_statistics, recall, tokenize
from eval_linear import load_backbone

DOUBLE = torch.float64
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


def statistics_of(images, texts, scale, captions, index=None):
    """pair_statistics by name; captions: a number for each pair."""
    ids = torch.tensor([[1, 2 + caption, 0] for caption in captions])
    index = torch.arange(len(ids)) if index is None else torch.tensor(index)
    numbers = pair_statistics(torch.stack([images, texts], dim=1), scale, ids, index)
    return dict(zip(("accuracy", "gap", "chance", "floor", "cut"), numbers.tolist(), strict=True))


def test_repeated_captions_leave_their_floor():
    """250 pairs, 10 captions: ln 25 = 3.2189 at best."""
    features = torch.eye(10, dtype=DOUBLE).repeat(25, 1)
    assert clip_loss(features, features, 100.0).item() == pytest.approx(3.2189, abs=1e-4)
    found = statistics_of(features, features, 100.0, [*range(10)] * 25)
    assert found["floor"] == pytest.approx(math.log(25), abs=1e-5) and found["accuracy"] == 1


def test_captions_of_one_image_are_no_failure():
    """Two images, two captions of each, perfect features: their tie is no failure, and the loss is at
    its floor. Equal captions of two images neither."""
    features = torch.eye(2, 8, dtype=DOUBLE).repeat_interleave(2, dim=0)
    loss = clip_loss(features, features, 100.0).item()
    for captions, index in (([0, 1, 2, 3], [5, 5, 7, 7]), ([0, 0, 1, 1], [4, 5, 6, 7])):
        found = statistics_of(features, features, 100.0, captions, index)
        assert found["accuracy"] == 1 and found["floor"] == pytest.approx(math.log(2)) == loss
    found = statistics_of(features, features, 100.0, [0, 1, 2, 3])
    assert found["accuracy"] == found["floor"] == 0  # four images and captions that it cannot tell apart


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


def test_statistics_are_slow_ones(generator):
    images, texts = torch.randn(2, 9, 4, generator=generator)
    texts[:5] = images[:5] + 0.1 * texts[:5]
    captions, index = [0, 1, 2, 0, 3, 4, 5, 5, 5], [0, 1, 2, 3, 1, 5, 6, 7, 8]
    found = statistics_of(images, texts, 5.0, captions, index)
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    right, gaps, chances = [], [], []
    for rows, columns in ((images, texts), (texts, images)):
        for i, row in enumerate(rows):
            wrong = [j for j in range(9) if captions[j] != captions[i] and index[j] != index[i]]
            keep = [i, *wrong]
            scores = torch.stack([5 * row @ columns[j] for j in keep])
            right.append(float(all(scores[0] > s for s in scores[1:])))
            chances.append(math.log(len(keep)))
            gaps.append(math.log(len(keep)) + scores.log_softmax(0)[0].item())
    assert found["accuracy"] == pytest.approx(sum(right) / 18) and 0.2 < found["accuracy"] < 1
    assert found["gap"] == pytest.approx(sum(gaps) / 18, abs=1e-5)
    assert found["chance"] == pytest.approx(sum(chances) / 18)
    assert found["floor"] == pytest.approx((4 * math.log(2) + 3 * math.log(3)) / 9)
    alike = statistics_of(torch.ones(9, 4), torch.ones(9, 4), 5.0, captions, index)
    assert alike["accuracy"] == 0 and alike["gap"] == pytest.approx(0, abs=1e-6)  # a tie is no success


def test_long_texts_are_counted(generator):
    z = torch.randn(4, 2, 8, generator=generator)
    ids = tokenize(["abc", "abcd", "abcde", ""], 6)
    assert pair_statistics(z, 1.0, ids, torch.arange(4))[4].item() == 0.5


def test_monitor_tells_what_is_wrong(generator):
    good, same = torch.randn(2, 32, 2, 8, generator=generator)
    same[:, 0] = 1 + 1e-3 * same[:, 0]
    statistics = torch.tensor([0.5, 1.0, math.log(32), 0.2, 0.25])
    metrics, problems = clip.monitor(statistics, good, good[:, 0], torch.tensor(20.0))
    assert not problems and metrics["clip/contrastive_accuracy"] == 0.5 and metrics["clip/gap"] == 1
    assert metrics["clip/floor"] == pytest.approx(0.2) and metrics["clip/logit_scale"] == 20
    assert metrics["clip/cut"] == 0.25 and metrics["clip/image_spread"] > 0.5
    words, tag = [*clip.monitor(statistics, same, good[:, 0], torch.tensor(20.0))[1].items()][0]
    assert words.startswith("all images have one feature") and metrics[tag] > 0.01
    chance = torch.tensor([1.9 / 32, 0.0, math.log(32), 0.2, 0.0])
    problems = clip.monitor(chance, good, good[:, 0], torch.tensor(20.0))[1]
    assert [*problems.values()] == ["clip/gap"] and "found by chance" in [*problems][0]
    chance[0] = 2.1 / 32
    assert not clip.monitor(chance, good, good[:, 0], torch.tensor(20.0))[1]


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
    image_features, text_features, h, scale = ours(images, ids)
    torch.testing.assert_close(image_features, theirs.encode_image(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_features, theirs.encode_text(ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode_image(images), image_features)
    torch.testing.assert_close(h @ ours.visual.proj, image_features)
    assert scale.tolist() == [ours.logit_scale.exp().item()] * 6
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


# Several processes and chunks: oracles 7, 8


def one_step(data, run_dir, micro, dtype):
    """train() for one step of 24 pairs; the sizes of the passes through the network."""
    passes = []

    class Wide(CLIP):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.to(dtype)

        def forward(self, images, ids):
            passes.append(len(images))
            return super().forward(images.to(dtype), ids)

    with mock.patch("clip.CLIP", Wide):
        flags = {"batch_size": 24, "epochs": 1, "image_size": 16, "context_length": 24}
        flags |= {"micro_batch_size": micro, "data": str(data), "run_dir": str(run_dir)}
        clip.train(tiny_args("clip", **flags))
    return passes


def saved(run_dir):
    """Weights, gradient, by its first moment, and metrics that one_step left."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    gradients = [moments["exp_avg"] for moments in state["optimizer"]["state"].values()]
    return state["model"], gradients, state["recent"][0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (DOUBLE, 1e-12)])
def test_gradient_in_chunks_is_that_of_the_batch(folder, tmp_path, dtype, tolerance):
    """Of train() itself, the scale's too, at the rate 0 of its first step."""
    for micro, sizes in ((0, [24]), (8, [8] * 6)):
        assert one_step(folder, tmp_path / str(micro), micro, dtype) == sizes
    (weights, whole, metrics), (_, parts, others) = (saved(tmp_path / name) for name in ("0", "8"))
    scale = max(g.abs().max() for g in whole)
    assert len(whole) == len(parts) > 20 and scale > 1e-4
    assert max((a - b).abs().max() for a, b in zip(whole, parts, strict=True)) < tolerance * scale
    assert metrics["train/loss"] == pytest.approx(others["train/loss"], rel=1e-6)
    own = [(a, b) for a, b in zip(whole, parts, strict=True) if a.ndim == 0]
    assert len(own) == 1 and abs(own[0][0]) > 1e-5
    assert abs(own[0][0] - own[0][1]) < 10 * tolerance * abs(own[0][0])


@pytest.mark.parametrize("micro", [0, 4])
def test_two_processes_are_one(folder, tmp_path, micro):
    """Loss, gradient and metrics of train() under DDP, in one pass and in chunks."""
    code = f"""
import torch, clip
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_clip import one_step
from pathlib import Path
assert one_step({str(folder)!r}, Path("two"), {micro}, torch.float64) == ([12] if {micro} == 0 else [4] * 6)
"""
    run_processes(tmp_path, code)
    one_step(folder, tmp_path / "one", 0, DOUBLE)
    (weights, two, metrics), (initial, one, expected) = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    assert max((a - b).abs().max() for a, b in zip(two, one, strict=True)) < 1e-12
    assert max(g.abs().max() for g in one) > 1e-4
    for tag in expected:
        if tag != "perf/images_per_second":
            assert metrics[tag] == pytest.approx(expected[tag], abs=1e-6), tag


def test_training_is_the_same_in_chunks_and_in_processes(tmp_path):
    """Several steps of train(): 1 process = chunks = 2 processes = 2 in chunks; in every weight."""
    code = """
import torch, torch.distributed as dist, clip
flags = dict(data="pairs.csv", image_size=16, batch_size=24, epochs=2, warmup_epochs=0.5, workers=0)
flags |= dict(log_every=1, patch_size=8, embed_dim=32, text_width=64, text_depth=1, context_length=40)
start, destroy = dist.init_process_group, dist.destroy_process_group
ready = []
dist.init_process_group = lambda *a: ready or ready.append(start(*a))
dist.destroy_process_group = lambda: None
for micro in (0, 6):
    clip.train(clip.Args(**flags, micro_batch_size=micro, run_dir=f"runWORLD{micro}"))
if ready:
    destroy()
"""
    lines = ["image,caption"]
    for i in range(96):
        clip.demo_image(i)[0].save(tmp_path / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{clip.demo_caption(i)}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    for world in (1, 2):
        run_processes(tmp_path, code.replace("WORLD", str(world)), world)
    curves, weights = {}, {}
    for name in ("run10", "run16", "run20", "run26"):
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
    row = tokenize([text], 10, "bpe")[0].tolist()
    assert row == [49406, *ids, 49407] + [0] * (8 - len(ids))


def test_bpe_is_open_clip_s_or_says_what_is_missing(monkeypatch, tmp_path):
    rows = tokenize(varied_strings(), 12, "bpe")  # too long ones keep the end
    assert torch.equal(rows, open_clip.SimpleTokenizer()(varied_strings(), context_length=12))
    assert (rows.max(dim=1).values == 49407).all()
    args = tiny_args("clip", tokenizer="bpe", epochs=0, run_dir="run")
    assert clip.clip_of(args).token_embedding.num_embeddings == 49408
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SystemExit, match="--tokenizer bpe: needs `pip install open_clip_torch`"):
        clip.train(args)
    assert not list(tmp_path.iterdir())


def decoded(ids):
    return bytes(i - 1 for i in ids.tolist() if 1 <= i <= 256).decode(errors="replace")


def test_bytes_are_reversible():
    for text in (*varied_strings(), "a fox", ""):
        ids = tokenize([text], 400)[0]
        plain = text.replace("&amp;amp;", "&").replace("&amp;", "&").replace("&lt;b&gt;", "<b>")
        assert decoded(ids) == " ".join(plain.split()).lower()
        assert ids[0] == 257 and ids.max() == 258 and (ids == 258).sum() == 1
    assert decoded(tokenize(["half \ud83d"])[0]) == "half ?"  # of an emoji, as in scraped json


def test_a_long_text_keeps_its_end():
    ids = tokenize(["x" * 50, "é" * 20, "ok"], 16)
    assert ids.shape == (3, 16) and ids[0].tolist() == [257] + [1 + ord("x")] * 14 + [258]
    assert ids[2].tolist() == [257, 1 + ord("o"), 1 + ord("k"), 258] + [0] * 12
    odd = tokenize(["é" * 20], 16 + 1)[0]  # cut within a character
    assert decoded(odd) == "é" * 7 + "�"


# Data


def test_demo_captions_say_what_is_seen(monkeypatch):
    """By the calls that draw the image: the size of the thing, its place, its light."""
    seen, paste, blend = {}, Image.Image.paste, Image.blend

    def pasted(image, color, corner, thing):
        seen["center"] = corner[0] + thing.width / 2
        paste(image, color, corner, thing)

    def blended(black, image, light):
        seen.setdefault("light", light)
        return blend(black, image, light)

    monkeypatch.setattr(Image.Image, "paste", pasted)
    monkeypatch.setattr(Image, "blend", blended)
    captions = set()
    for number in (*range(300), *range(10**6, 10**6 + 20)):
        seen.clear()
        _, label = clip.demo_image(number)
        caption = clip.demo_caption(number)
        captions.add(caption)
        found = re.fullmatch(r"a (big|small) (\w+) on the (left|right) (by day|at dusk)", caption)
        assert found[2] == clip.NAMES[label] and (found[3] == "left") == (seen["center"] < 24)
        assert (found[4] == "by day") == (seen["light"] > 0.675)
        scale = random.Random(number)
        scale.randrange(10)
        assert (found[1] == "big") == (scale.uniform(0.35, 0.9) > 0.625)
    assert len(captions) > 75


def test_the_demo_is_measured_on_other_images():
    seen, unseen = pairs("demo"), pairs("demo", to_train=False)
    ours, theirs = ({image.tobytes() for image, _ in data.images.items} for data in (seen, unseen))
    assert len(ours) == 4096 and len(theirs) == 1024 and not ours & theirs
    assert seen.texts(3) == [clip.demo_caption(3)] and unseen.texts(3) == [clip.demo_caption(10**6 + 3)]


def pictures(folder, names):
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(path)


def pairs(data, to_train=True, **flags):
    args = clip.Args(data=str(data), workers=0, image_size=16, **flags)
    return clip.Pairs(args, args.data, to_train)


def texts_of(data):
    return {os_name(path): data.texts(i) for i, path in enumerate(data.images.items)}


def os_name(path):
    return Path(path.decode()).name


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "image,caption\n{}/0.png,a fox\n{}/1.png,'a deer'\n{}/2.png,\"one, two\"\n"),
        ("a.tsv", "title\tfilepath\na fox\t{}/0.png\n'a deer'\t{}/1.png\none, two\t{}/2.png\n"),
        ("b.csv", "\ufeffPath;Text;score\n{}/0.png;a fox;1\n{}/1.png;'a deer';2\n{}/2.png;one, two;3"),
        (
            "c.CSV",
            '"image" , "Caption"\r\n{}/0.png,a fox\r\n\r\n{}/1.png,\'a deer\'\r\n{}/2.png,"one,\ntwo"\r\n',
        ),
        ("d.csv", "image|text\n{}/0.png|a fox\n{}/1.png|'a deer'\n{}/2.png|one, two"),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_tables(tmp_path, monkeypatch, name, content, absolute):
    """Paths are relative to the table, whatever the working directory."""
    pictures(tmp_path / "set/photos", ["0.png", "1.png", "2.png"])
    where = str(tmp_path / "set/photos") if absolute else "photos"
    (tmp_path / "set" / name).write_text(content.format(where, where, where), "utf-8", newline="")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = pairs(tmp_path / "set" / name)
    assert texts_of(data) == {"0.png": ["a fox"], "1.png": ["'a deer'"], "2.png": ["one, two"]}
    view, ids, index = data[4]
    assert index == 1 and view.shape == (3, 16, 16) and view[0, 0, 0] == 10
    assert decoded(ids) == "'a deer'"


def test_an_image_has_all_its_captions(tmp_path):
    """One item an image, wherever its rows are; each epoch draws one of them; an empty one is left out."""
    pictures(tmp_path / "set", ["0.png", "1.png"])
    rows = ["0.png,zero", "1.png,one", "0.png,nought", "1.png,  ", "1.png", "0.png,nil\u2028\x85 nil"]
    (tmp_path / "set/captions.csv").write_text("\n".join(["image,caption", *rows]), "utf-8")
    for path in ("set/captions.csv", "set", "set/"):  # a folder with this table is named by itself, too
        data = pairs(path)
        assert texts_of(data) == {"0.png": ["zero", "nought", "nil nil"], "1.png": ["one"]}
    seen = [decoded(data[2 * epoch][1]) for epoch in range(60)]
    assert {word: 10 < seen.count(word) < 30 for word in {*seen}} == dict.fromkeys(
        texts_of(data)["0.png"], True
    )
    assert torch.equal(data[8][1], data[8][1])  # by its key alone


def test_names_that_are_not_utf8(tmp_path):
    Image.new("RGB", (20, 20), (7, 0, 0)).save("0.png")
    Path("0.png").rename(os.fsdecode(b"F\xfcchsin.png"))
    Path("a.csv").write_bytes(b"image,caption\nF\xfcchsin.png,a vixen\nF\xfcchsin.png,eine F\xfcchsin\n")
    data = pairs("a.csv")
    assert data.images.items.tolist() == [b"F\xfcchsin.png"] and data[0][0][0, 0, 0] == 7
    assert data.texts(0) == ["a vixen", "eine F?chsin"]


def test_no_file_is_looked_at_before_its_turn(tmp_path, capsys):
    """One that is missing gives its place to the next, which brings its own caption."""
    pictures(tmp_path, ["0.png", "2.png"])
    Path("a.csv").write_text("image,caption\n0.png,zero\n1.png,one\n2.png,two")
    data = pairs("a.csv")
    assert len(data.images.items) == 3
    view, ids, index = data[1]
    assert index == 2 and view[0, 0, 0] == 10 and decoded(ids) == "two"
    assert "1.png cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "picture,words\n0.png,fox", "its header is picture, words; needs columns path.image"),
        ("a.csv", "image,words\n0.png,fox", "its header is image, words; needs .*caption.text.title"),
        ("a.csv", "", "Could not determine delimiter; needs columns"),
        ("a.csv", "image,caption\n0.png, \n0.png", "has no row with a caption"),
        ("none.csv", None, "No such file"),
        ("a.csv", b"\xff\xfe\x00\x01", "Could not determine delimiter"),
        ("a.csv", "image,caption\n" + '0.png,"' + 200_000 * "x", "field larger than field limit"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=f"--data {name}: .*{words}") as stop:
        pairs(name)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400


def test_a_folder_without_captions_says_so(tmp_path):
    pictures(tmp_path, ["a/0.png"])
    with pytest.raises(SystemExit, match="--data a/captions.csv: .*No such file.*needs columns"):
        pairs("a")


def arrow(path, columns, split=False):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (20, 20), (10 * i, 0, 0)) for i in range(4)]
    rows = datasets.Dataset.from_dict({"image": images} | columns)
    (datasets.DatasetDict(train=rows) if split else rows).save_to_disk(path)


@pytest.mark.parametrize("split", [False, True])
def test_arrow_files(tmp_path, split):
    """A caption or a list of some; read where they lie."""
    arrow("one", {"text": ["zero", "one", "two", None]}, split)
    data = pairs("one")
    view, ids, index = data[6]
    assert index == 2 and view[0, 0, 0] == 20 and decoded(ids) == "two" and data.texts(3) == [""]
    arrow("more", {"text": [["zero"], ["one", "uno"], [], ["three"]]}, split)
    data = pairs("more")
    assert data.texts(1) == ["one", "uno"] and data.texts(2) == [""]
    assert {decoded(data[4 * epoch + 1][1]) for epoch in range(20)} == {"one", "uno"}
    arrow("other", {"words": ["a", "b", "c", "d"]}, split)
    with pytest.raises(SystemExit, match="--data other: needs a column text, has image, words"):
        pairs("other")


def test_trains_on_arrow_files(tmp_path):
    arrow("rows", {"text": ["zero", "one", "two", "three"]})
    flags = {"data": "rows", "batch_size": 2, "epochs": 1, "workers": 1, "run_dir": "run", "warmup_epochs": 0}
    assert math.isfinite(clip.train(tiny_args("clip", **flags))["train/loss"])
    assert set(Path("run/views.txt").read_text().splitlines()) < {"zero", "one", "two", "three"}


# After training


def test_zero_shot_classifier_is_a_slow_one(generator):
    model = shaken(CLIP(**SMALL), generator)
    classes, templates = ["fox", "polar bear"], ["a {}.", "the {}", "{} {}"]
    for column, name in zip(clip.zero_shot_classifier(model, classes, templates).T, classes, strict=True):
        rows = [model.encode_text(tokenize([t.replace("{}", name)], 16))[0] for t in templates]
        mean = sum(row / row.norm() for row in rows) / 3
        torch.testing.assert_close(column, (mean / mean.norm()).detach())


def slow_recall(images, texts, owners):
    """Of features and, for each text, the list of its images: by sorting each list of scores, best first."""
    result = {}
    answers = [[j for j, own in enumerate(owners) if i in own] for i in range(len(images))]
    for name, rows, columns, right in (
        ("image_to_text", images, texts, answers),
        ("text_to_image", texts, images, owners),
    ):
        for k in (1, 5, 10):
            hits = 0
            for row, own in zip(rows, right, strict=True):
                scores = [(row @ column).item() for column in columns]
                order = sorted(range(len(columns)), key=lambda j: (-scores[j], j in own))  # wrong ones first
                hits += any(j in own for j in order[:k])
            result[f"clip/{name}_r{k}"] = 100 * hits / len(rows)
    return result


def fast_recall(images, texts, owners):
    answers = torch.zeros(len(images), len(texts), dtype=torch.bool)
    for column, own in enumerate(owners):
        answers[own, column] = True
    return recall(images @ texts.T, answers)


@pytest.mark.parametrize("captions, shared", [(1, False), (5, False), (3, True)])
def test_recall_is_a_slow_one(generator, captions, shared):
    images = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    owners = [[i] for i in range(30) for _ in range(captions)]
    if shared:  # a caption of two images
        for own in owners[::4]:
            own.append((own[0] + 7) % 30)
    texts = torch.stack([images[own[0]] for own in owners])
    texts = F.normalize(texts + 0.4 * torch.randn(texts.shape, generator=generator), dim=1)
    found, slow = fast_recall(images, texts, owners), slow_recall(images, texts, owners)
    assert found == pytest.approx(slow) and len({*found.values()}) > 3
    assert 20 < found["clip/text_to_image_r1"] < 95


def test_recall_is_that_of_torchmetrics(generator):
    """Its hit rate: any of the answers among the best k."""
    metrics = pytest.importorskip("torchmetrics.functional.retrieval")
    images = F.normalize(torch.randn(20, 8, generator=generator), dim=1)
    owners = [[i] for i in range(20) for _ in range(5)]
    texts = F.normalize(
        images.repeat_interleave(5, dim=0) + 0.5 * torch.randn(100, 8, generator=generator), dim=1
    )
    found = fast_recall(images, texts, owners)
    answers = torch.tensor([[i in own for own in owners] for i in range(20)])
    for name, scores, right in (
        ("image_to_text", images @ texts.T, answers),
        ("text_to_image", texts @ images.T, answers.T),
    ):
        for k in (1, 5, 10):
            hits = [metrics.retrieval_hit_rate(s, r, top_k=k) for s, r in zip(scores, right, strict=True)]
            assert found[f"clip/{name}_r{k}"] == pytest.approx(100 * torch.stack(hits).mean().item())


def test_recall_of_one_caption_is_open_clip_s(generator):
    train = importlib.import_module("open_clip_train.train")
    images, texts = F.normalize(torch.randn(2, 40, 6, generator=generator), dim=2)
    texts = F.normalize(images + 0.6 * texts, dim=1)
    theirs = train.get_clip_metrics(images, texts, torch.tensor(1.0))
    ours = fast_recall(images, texts, [[i] for i in range(40)])
    for k in (1, 5, 10):
        for name in ("image_to_text", "text_to_image"):
            assert ours[f"clip/{name}_r{k}"] == pytest.approx(100 * theirs[f"{name}_R@{k}"])


def test_recall_counts_images(generator):
    """20 images with five close captions each: none is lost to another caption of the same image. Equal
    captions of two images are a success of both; a tie with a wrong one is none."""
    images = F.normalize(torch.randn(20, 64, generator=generator), dim=1)
    texts = images.repeat_interleave(5, dim=0)
    owners = [[i] for i in range(20) for _ in range(5)]
    for noise in (0.0, 0.01):
        close = F.normalize(texts + noise * torch.randn(texts.shape, generator=generator), dim=1)
        assert set(fast_recall(images, close, owners).values()) == {100}
    twins = torch.cat([images, images])
    assert set(fast_recall(twins, images, [[i, i + 20] for i in range(20)]).values()) == {100}
    found = fast_recall(twins, images, [[i] for i in range(20)])
    assert found["clip/text_to_image_r1"] == 0 and found["clip/text_to_image_r5"] == 100
    assert set(recall(torch.ones(30, 30), torch.eye(30) > 0).values()) == {0}


def test_retrieval_is_per_image(tmp_path, monkeypatch, generator):
    """Five rows an image in the table; a model that sees which image it is gets all; equal captions, too."""
    pictures(tmp_path, [f"{i}.png" for i in range(20)])
    rows = [
        f"{i}.png,{'shared' if i < 2 and way == 0 else f'image {i:02d} way {way}'}"
        for way in range(5)
        for i in range(20)
    ]
    Path("a.csv").write_text("\n".join(["image,caption", *rows]))
    table = F.normalize(torch.randn(20, 64, generator=generator), dim=1)

    class Perfect(torch.nn.Module):
        logit_scale, positional_embedding, shift = torch.zeros(()), torch.zeros(64, 1), 0

        def encode_image(self, images):
            red = (images[:, 0, 0, 0] * clip.STD[0] + clip.MEAN[0]) * 25.5
            return 3 * table[(red.round().long() + self.shift) % 20]

        def encode_text(self, ids):
            found = [re.search(r"image (\d+)", decoded(row)) for row in ids]
            return torch.stack([table[int(f[1])] if f else table[0] + table[1] for f in found])

    found = clip.retrieval(Perfect(), pairs("a.csv", to_train=False))
    assert set(found.values()) == {100} and len(found) == 6
    assert set(found) == {
        f"clip/{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    Perfect.shift = 1  # each image as the next one
    found = clip.retrieval(Perfect(), pairs("a.csv", to_train=False))
    assert found["clip/image_to_text_r1"] < 20 and found["clip/text_to_image_r1"] < 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on photos of three kinds, and what it printed."""
    root = tmp_path_factory.mktemp("trained")
    lines = {"train": ["image,caption"], "val": ["image,caption"]}
    for i in range(240):
        image, label = clip.demo_image(i)
        if label < 3:
            image.save(root / f"{i}.png")
            lines["val" if i % 3 == 0 else "train"].append(f"{i}.png,a photo of a {clip.NAMES[label]}")
    for name, rows in lines.items():
        (root / f"{name}.csv").write_text("\n".join(rows))
    flags = {"data": str(root / "train.csv"), "val_data": str(root / "val.csv"), "epochs": 12, "lr": 2e-3}
    metrics = clip.train(tiny_args("clip", **flags, run_dir=str(root / "run"), log_every=5))
    return root, metrics


def model_of(run_dir):
    args = clip.Args(
        **{k: v for k, v in json.loads((run_dir / "args.json").read_text()).items() if hasattr(clip.Args, k)}
    )
    model = clip.clip_of(args)
    model.load_state_dict(torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"])
    return model


def normalized(file, size):
    """As the official code does it: shorter side to size, centre crop."""
    image = torchvision.transforms.functional.pil_to_tensor(Image.open(file).convert("RGB"))
    image = torchvision.transforms.functional.resize(
        image, size, torchvision.transforms.InterpolationMode.BICUBIC
    )
    image = torchvision.transforms.functional.center_crop(image, size) / 255
    return (image - torch.tensor(clip.MEAN)[:, None, None]) / torch.tensor(clip.STD)[:, None, None]


def test_a_run_is_measured_by_its_val_data(trained):
    """Three captions: image to text is the accuracy of naming them, here image by image."""
    root, metrics = trained
    model, right, n = model_of(root / "run"), 0, 0
    prompts = sorted({row["caption"] for row in csv.DictReader((root / "val.csv").open())})
    with torch.no_grad():
        texts = F.normalize(model.encode_text(tokenize(prompts)), dim=1)
        for row in csv.DictReader((root / "val.csv").open()):
            feature = F.normalize(model.encode_image(normalized(root / row["image"], 32)[None])[0], dim=0)
            right, n = right + (prompts[(texts @ feature).argmax()] == row["caption"]), n + 1
    assert metrics["clip/image_to_text_r1"] == pytest.approx(100 * right / n) and 10 < n < 40
    assert metrics["clip/image_to_text_r1"] > 50  # chance: 33
    assert metrics["clip/image_to_text_r5"] == 100
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").open()]
    assert ["clip/text_to_image_r1" in line for line in lines] == [False] * (len(lines) - 1) + [True]
    views = (root / "run/views.txt").read_text().splitlines()
    assert len(views) == 8 and {*views} <= {*prompts} and Image.open(root / "run/views.png").width > 200


def test_photos_are_named(trained, tmp_path, capsys):
    root, _ = trained
    photos = sorted(root.glob("*.png"))[:3]
    words = ["--classify", *photos, "--prompts", "a photo of a house", "a photo of a tree", "x", "--run-dir"]
    done = run([sys.executable, ROOT / "clip.py", *words, root / "run"])
    assert done.returncode == 0 and done.stdout.count("%") == 9, done.stderr
    lines = [re.fullmatch(r"(\S+) +([\d.]+)%  (.*)", line) for line in done.stdout.splitlines()]
    model = model_of(root / "run")
    for i, photo in enumerate(photos):
        own = lines[3 * i : 3 * i + 3]
        assert {line[1] for line in own} == {str(photo)}
        shares = [float(line[2]) for line in own]
        assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)
        with torch.no_grad():
            texts = F.normalize(model.encode_text(tokenize([line[3] for line in own])), dim=1)
            feature = F.normalize(model.encode_image(normalized(photo, 32)[None]), dim=1)
            expected = (model.logit_scale.exp() * feature @ texts.T).softmax(dim=1)[0]
        assert shares == pytest.approx((100 * expected).tolist(), abs=2)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    args = {"classify": (str(photos[0]),), "prompts": ("a", "b"), "run_dir": str(root / "run")}
    for wrong, said in (
        ({"prompts": ("a",)}, "give photos, and 2 or more --prompts"),
        ({"run_dir": "none"}, "in none a run of clip.py: .*No such file"),
        ({"classify": ("none.png",)}, "No such file"),
        ({"classify": (str(root / "train.csv"),)}, "cannot identify image"),
    ):
        with pytest.raises(SystemExit, match=said) as stop:
            clip.train(clip.Args(**args | wrong))
        assert "\n" not in stop.value.code
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_backbone_gives_what_training_reads(trained):
    root, _ = trained
    model, images = model_of(root / "run"), torch.randn(3, 3, 32, 32)
    features = features_of(load_backbone(str(root / "run/backbone.pt")), images)
    torch.testing.assert_close(features, model(images, tokenize("abc"))[2], atol=1e-5, rtol=1e-5)


def test_backbone_is_what_convert_makes_of_the_weights(tmp_path, generator):
    """The same tensors under the same names, of the same network; and --init takes either."""
    flags = {"epochs": 0, "patch_size": 8, "arch": "vit_nano"}
    clip.train(tiny_args("clip", **flags, run_dir="run"))
    state = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    torch.save(state, "weights.pt")
    convert.convert(convert.Args("weights.pt", to="converted.pt", activation="quick_gelu"))
    ours, theirs = (torch.load(name, weights_only=True) for name in ("run/backbone.pt", "converted.pt"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(ours["state_dict"][k], v) for k, v in theirs["state_dict"].items())
    assert ours["arch_args"] == theirs["arch_args"] and ours["builder"] == theirs["builder"]
    assert ours["arch_args"]["act_layer"] == "quick_gelu" and ours["arch_args"]["norm_eps"] == 1e-5
    clip.train(tiny_args("clip", **flags, seed=1, init="converted.pt", run_dir="again"))
    again = torch.load("again/checkpoint.pt", weights_only=True)["model"]
    same = {name for name in state if torch.equal(state[name], again[name])}
    visual = {name for name in state if name.startswith("visual.") and name != "visual.proj"}
    assert visual <= same and not {"visual.proj", "token_embedding.weight"} & same
    clip.train(tiny_args("clip", **flags, quick_gelu=False, run_dir="gelu"))
    assert torch.load("gelu/backbone.pt", weights_only=True)["arch_args"]["act_layer"] == "gelu"


# Training


def test_schedule_decay_and_scale(folder, tmp_path):
    """Oracle 10, warm-up from 0; and the scale held to [1, 100] after every step."""
    flags = {"data": str(folder), "epochs": 4, "warmup_epochs": 1, "lr": 1e-4, "run_dir": "run"}
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

    with mock.patch("torch.optim.AdamW", Spy):
        clip.train(tiny_args("clip", **flags))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").open()]
    warm = [1e-4 * s / 5 for s in range(5)]
    rates = warm + [1e-4 * (1 + math.cos(math.pi * (s - 5) / 15)) / 2 for s in range(5, 20)]
    assert [line["train/lr"] for line in lines] == pytest.approx(rates)
    scales = [line["clip/logit_scale"] for line in lines]  # of the loss: after the step before
    assert scales[0] == pytest.approx(1 / 0.07) and scales[3] == pytest.approx(100)
    assert scales[-1] == pytest.approx(1)
    (decayed, free), options = groups[0]
    model = model_of(Path("run"))
    kept = [name for name, p in model.named_parameters() if p.ndim < 2]
    assert len(free["params"]) == len(kept) and free["weight_decay"] == 0 and decayed["weight_decay"] == 0.2
    assert {"visual.class_embedding", "logit_scale", "ln_final.weight"} < {*kept}
    assert options["betas"] == (0.9, 0.98) and options["eps"] == 1e-6


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"image_size": 30}, "--image-size 30: give a multiple of --patch-size"),
        ({"text_width": 100}, "--text-width: give a multiple of 64"),
        ({"context_length": 2}, "--context-length: 3 or more"),
        ({"val_data": "nowhere"}, "--data nowhere: no such folder"),
        ({"val_data": "nowhere.csv"}, "--data nowhere.csv: .*No such file"),
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
    flags = {"data": "a.csv", "val_data": "a.csv", "min_scale": 1.0, "run_dir": "run"}
    metrics = clip.train(clip.Args(batch_size=64, epochs=300, warmup_epochs=10, **flags))
    assert metrics["clip/image_to_text_r1"] == metrics["clip/text_to_image_r1"] == 100


def test_paper_command_is_the_sheet_s():
    command = re.search(
        r"torchrun --nnodes 32 --nproc-per-node 8 clip\.py(.*?)(?<!\\)\n", clip.__doc__, re.S
    )[1]
    args = tyro.cli(clip.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.patch_size, args.embed_dim) == (224, "vit_base", 32, 512)
    assert (args.text_width, args.text_depth, args.context_length) == (512, 12, 77)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (32, 32768, 5e-4, 0.2)
    assert args.quick_gelu and not args.flip and args.min_scale == 0.9 and args.tokenizer == "bpe"
    steps = 400_000_000 // args.batch_size  # 400 million pairs
    assert args.warmup_epochs * steps == pytest.approx(2000, rel=0.03)
    assert command_line("clip")
