"""clip.py against its fact sheet's oracles, slow versions written here, open_clip and torchmetrics."""

import csv
import functools
import importlib
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import datasets
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.retrieval as metrics
import tyro
from conftest import in_processes, load, metrics_of, refused, shaken, stopped, tensors_of, tiny_args
from PIL import Image
from torchvision.transforms import v2

import clip
import convert
from clip import CLIP, clip_loss, pair_statistics, recall, tokenize, zero_shot_classifier
from eval_linear import load_backbone

DOUBLE = torch.float64
SMALL = {"arch": (128, 2), "image_size": 32, "patch_size": 8, "embed_dim": 64, "text": (64, 2, 259, 16)}


@pytest.fixture(autouse=True, scope="module")
def faster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "demo_image", functools.cache(clip.demo_image))  # of which a table asks for all
        patch.setitem(clip.TOWERS, "vit_nano", (64, 2))
        yield


# Text: oracle 5


def varied_strings():
    """Of words between single spaces, for there are blanks among them."""
    words = (
        "a photo of the Café naïve Straße Ünïted 東京 Привет don't we're I'll x86 3.14 100% e-mail \t \n ñ "
    )
    words += "rock'n'roll &amp; &lt;b&gt; &amp;amp; snake_case C++ #1 ² ½ १२ 👩‍🚀 🦊🦊 e\u0301 ‘quoted’ ΑΒΓ "
    words += (
        "“double” ... !! -- $5,000 O'Neill's ﬂuffy 's '' a'b café's שלום ไทย antidisestablishmentarianism"
    )
    rng = random.Random(0)
    return [" ".join(rng.choices(words.split(" "), k=rng.randint(1, 9))) for _ in range(200)]


def decoded(ids):
    return bytes(i - 1 for i in ids.tolist() if 1 <= i <= 256).decode(errors="replace")


def test_bpe_is_the_sheet_s_and_open_clip_s_or_says_what_is_missing(monkeypatch):
    for text, ids in {
        "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
        "a diagram": [320, 22697],
        "Hello   WORLD!!": [3306, 1002, 748],
        "12 345": [272, 273, 274, 275, 276],
        "it's": [585, 568],
        "": [],
        "!": [256],
    }.items():
        assert tokenize([text], 10, "bpe")[0].tolist() == [49406, *ids, 49407] + [0] * (8 - len(ids))
    rows = tokenize(varied_strings(), 12, "bpe")  # too long ones keep the end
    assert torch.equal(rows, open_clip.SimpleTokenizer()(varied_strings(), context_length=12))
    assert (rows.max(dim=1).values == 49407).all()
    assert clip.clip_of(tiny_args("clip", tokenizer="bpe")).token_embedding.num_embeddings == 49408
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused("clip", "--tokenizer bpe: needs `pip install open_clip_torch`", tokenizer="bpe")


def test_bytes_are_reversible_and_a_long_text_keeps_its_end():
    for text in (*varied_strings(), "a fox", ""):
        ids = tokenize([text], 400)[0]
        plain = text.replace("&amp;amp;", "&").replace("&amp;", "&").replace("&lt;b&gt;", "<b>")
        assert decoded(ids) == " ".join(plain.split()).lower()
        assert ids[0] == 257 and ids.max() == 258 and (ids == 258).sum() == 1
    assert decoded(tokenize(["half \ud83d"])[0]) == "half ?"  # of an emoji, as in scraped json

    ids = tokenize(["x" * 50, "x" * 14, "ok"], 16)
    assert ids.tolist()[:2] == [[257] + [1 + ord("x")] * 14 + [258]] * 2
    assert ids[2].tolist() == [257, 1 + ord("o"), 1 + ord("k"), 258] + [0] * 12
    assert decoded(tokenize(["é" * 20], 17)[0]) == "é" * 7 + "�"  # cut within a character


# Data


def test_demo_captions_say_what_is_seen(monkeypatch):
    """By the calls that draw the image: the size of the thing, its place, its light."""
    seen, paste, blend = {}, Image.Image.paste, Image.blend

    def pasted(image, color, corner, thing):
        seen["center"] = corner[0] + thing.width / 2
        paste(image, color, corner, thing)

    monkeypatch.setattr(Image.Image, "paste", pasted)
    monkeypatch.setattr(Image, "blend", lambda *a: seen.setdefault("light", a[2]) and blend(*a))
    captions = set()
    for number in (*range(300), *range(10**6, 10**6 + 20)):
        seen.clear()
        _, label = clip.demo_image.__wrapped__(number)
        rng = random.Random(number)
        is_big = (rng.randrange(10), rng.uniform(0.35, 0.9))[1] > 0.625
        place = "left" if seen["center"] < 24 else "right"
        light = "by day" if seen["light"] > 0.675 else "at dusk"
        captions.add(clip.demo_caption(number))
        expected = f"a {'big' if is_big else 'small'} {clip.NAMES[label]} on the {place} {light}"
        assert clip.demo_caption(number) == expected
    assert len(captions) > 75


def pairs(data, to_train=True, **flags):
    args = clip.Args(data=str(data), workers=0, **{"image_size": 16} | flags)
    return clip.Pairs(args, args.data, to_train)


def test_the_demo_is_measured_on_other_images(monkeypatch):
    monkeypatch.setattr(clip, "demo_image", lambda number: number)
    for flip, to_train, numbers in (
        (False, True, range(4096)),
        (True, True, range(4096)),
        (False, False, range(10**6, 10**6 + 1024)),
    ):
        data = pairs("demo", to_train, flip=flip)
        assert data.images.items == [*numbers] and data.texts(3) == [clip.demo_caption(numbers[3])]
        first, second = data.images.views[0].transforms
        assert not to_train or (first.scale, second.p) == ((0.9, 1.0), 0.5 * flip)


def pictures(folder, names):
    """Each of its own red."""
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(path)


def texts_of(data):
    return {Path(path.decode()).name: data.texts(i) for i, path in enumerate(data.images.items)}


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "image,caption\n{}/0.png,a fox\n{}/1.png,'a deer'\n{}/2.png,\"one, two\"\n"),
        ("a.tsv", "title\tfilepath\na fox\t{}/0.png\n'a deer'\t{}/1.png\none, two\t{}/2.png\n"),
        ("b.csv", "\ufeffPath;Text;score\n{}/0.png;a fox;1\n{}/1.png;'a deer';2\n{}/2.png;one, two;3"),
        ("c.CSV", '"image" , "Caption"\r\n{}/0.png,a fox\r\n\r\n{}/1.png,\'a deer\'\r\n{}/2.png,"one,\ntwo"'),
        ("d.csv", "image|text\n{}/0.png|a fox\n{}/1.png|'a deer'\n{}/2.png|one, two"),
    ],
)
def test_paths_of_a_table_are_relative_to_it(tmp_path, monkeypatch, name, content):
    pictures("set/photos", ["0.png", "1.png", "2.png"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for where in ("photos", tmp_path / "set/photos"):
        (tmp_path / "set" / name).write_text(content.format(where, where, where), "utf-8", newline="")
        data = pairs(tmp_path / "set" / name)
        assert texts_of(data) == {"0.png": ["a fox"], "1.png": ["'a deer'"], "2.png": ["one, two"]}
        view, ids, index = data[4]
        assert index == 1 and view.shape == (3, 16, 16) and view[0, 0, 0] == 10
        assert decoded(ids) == "'a deer'"


def test_an_image_has_all_its_captions():
    """One item an image, wherever its rows are; each epoch draws one of them; an empty one is left out."""
    pictures("set", ["0.png", "1.png"])
    rows = ["0.png,zero", "1.png,one", "0.png,nought", "1.png,  ", "1.png", "0.png,nil\u2028\x85 nil"]
    Path("set/captions.csv").write_text("\n".join(["image,caption", *rows]), "utf-8")
    for path in ("set/captions.csv", "set", "set/"):  # a folder with this table is named by itself, too
        data = pairs(path)
        assert texts_of(data) == {"0.png": ["zero", "nought", "nil nil"], "1.png": ["one"]}
    drawn = [decoded(data[2 * epoch][1]) for epoch in range(60)]
    assert all(10 < drawn.count(text) < 30 for text in data.texts(0)) and len({*drawn}) == 3
    assert torch.equal(data[8][1], data[8][1])  # by its key alone


def test_names_that_are_not_utf8_and_files_that_are_missing(capsys):
    """A file is not looked at before its turn; then the next takes its place, with its own caption."""
    pictures(".", ["0.png", os.fsdecode(b"F\xfcchsin.png")])
    rows = b"0.png,zero\n1.png,one\nF\xfcchsin.png,a vixen\nF\xfcchsin.png,eine F\xfcchsin\n"
    Path("a.csv").write_bytes(b"image,caption\n" + rows)
    data = pairs("a.csv")
    assert [os.path.basename(path) for path in data.images.items] == [b"0.png", b"1.png", b"F\xfcchsin.png"]
    view, ids, index = data[1]
    assert index == 2 and view[0, 0, 0] == 10 and decoded(ids) in data.texts(2) == ["a vixen", "eine F?chsin"]
    assert "1.png cannot be read" in capsys.readouterr().err


def test_bad_tables_say_what_is_wrong():
    for content, words in (
        (b"picture,words\n0.png,fox", "its header is picture, words; needs columns path.image"),
        (b"image,words\n0.png,fox", "its header is image, words; needs .*caption.text.title"),
        (b"", "Could not determine delimiter; needs columns"),
        (b"image,caption\n0.png, \n0.png", "has no row with a caption"),
        (b"\xff\xfe\x00\x01", "Could not determine delimiter"),
        (b"image,caption\n" + b'0.png,"' + 200_000 * b"x", "field larger than field limit"),
        (b'image\tcaption\n0.png\t"the last fox\n1.png\ta "deer"\n', "a quote is not closed .* line 3"),
    ):
        Path("a.csv").write_bytes(content)
        stopped(lambda: pairs("a.csv"), f"--data a.csv: .*{words}")
    pictures("a", ["0.png"])
    for name, file in (("none.csv", "none.csv"), ("a", "a/captions.csv")):
        stopped(functools.partial(pairs, name), f"--data {file}: .*No such file.*needs columns")


@pytest.mark.parametrize("split", [False, True])
def test_arrow_files(split):
    """A caption or a list of some; read where they lie, by workers, too."""

    def arrow(path, **columns):
        images = [Image.new("RGB", (20, 20), (10 * i, 0, 0)) for i in range(4)]
        rows = datasets.Dataset.from_dict({"image": images} | columns)
        (datasets.DatasetDict(train=rows) if split else rows).save_to_disk(path)
        return path

    data = pairs(arrow("one", text=["zero", "one", "two", None]))
    view, ids, index = data[6]
    assert index == 2 and view[0, 0, 0] == 20 and decoded(ids) == "two" and data.texts(3) == [""]
    data = pairs(arrow("more", text=[["zero"], ["one", "uno"], [], ["three"]]))
    assert data.texts(1) == ["one", "uno"] and data.texts(2) == [""]
    assert {decoded(data[4 * epoch + 1][1]) for epoch in range(20)} == {"one", "uno"}
    stopped(lambda: pairs(arrow("other", words=[*"abcd"])), "needs a column text, has image, words")

    flags = {"data": "one", "batch_size": 2, "epochs": 1, "workers": 1, "run_dir": "run", "warmup_epochs": 0}
    assert math.isfinite(clip.train(tiny_args("clip", **flags))["train/loss"])
    assert {*Path("run/views.txt").read_text().splitlines()} <= {"zero", "one", "two", ""}


# Model: oracles 3, 4, 6, 9


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


def test_initialisation_is_open_clip_s():
    """The blocks of images as PyTorch has them, those of text by their width and number."""
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 384, "head_width": 64, "patch_size": 16, "image_size": 224}
    text = {"context_length": 32, "vocab_size": 2000, "width": 256, "heads": 4, "layers": 8}
    theirs = open_clip.model.CLIP(256, vision, text).state_dict()
    for name, ours in CLIP((384, 1), 224, 16, 256, (256, 8, 2000, 32)).state_dict().items():
        stds = [tensor.std(correction=0).item() for tensor in (ours, theirs[name])]
        assert stds[0] == pytest.approx(stds[1], rel=0.02 if ours.ndim > 1 else 0.2), name


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_features_and_loss_are_open_clip_s(quick_gelu, generator):
    """Weights are copied both ways, strictly."""
    vision = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 259, "width": 64, "heads": 1, "layers": 2}
    theirs = open_clip.model.CLIP(64, vision, text, quick_gelu=quick_gelu).eval()
    ours = shaken(CLIP(**SMALL, quick_gelu=quick_gelu), generator)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(shaken(theirs, generator).state_dict())
    images, ids = torch.randn(6, 3, 32, 32, generator=generator), tokenize(["", *varied_strings()[:5]], 16)
    image_features, text_features, h, scale = ours(images, ids)
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    close(image_features, theirs.encode_image(images))
    close(text_features, theirs.encode_text(ids))
    close(ours.encode_image(images), h @ ours.visual.proj)
    assert scale.tolist() == [ours.logit_scale.exp().item()] * 6
    close(clip_loss(image_features, text_features, scale[0]), open_clip.ClipLoss()(*theirs(images, ids)))

    block = clip.CLIPBlock(64, quick_gelu, False)
    block.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in block.state_dict().items()})
    with torch.no_grad():
        block.mlp["c_fc"].bias[0], block.mlp["c_proj"].weight[5, 0] = 1.0, 1.0
    expected = 0.845796 if quick_gelu else 0.841345
    assert block(torch.zeros(1, 1, 64))[0, 0, 5].item() == pytest.approx(expected, abs=1e-6)


def test_nothing_reads_what_follows_the_end(generator):
    model, start = shaken(CLIP(**SMALL), generator), [257, 5, 6, 7, 258]
    whole, other, cut, early = (
        model.encode_text(torch.tensor([ids]))
        for ids in ([*start, 0, 0], [*start, 9, 9], start, [257, 5, 9, 7, 258])
    )
    assert (whole - other).abs().max() < 1e-5 and (whole - cut).abs().max() < 1e-5
    assert (whole - early).abs().max() > 1e-2


# The loss and the monitor: oracles 1, 2, 10


def test_loss_by_hand():
    for features in (torch.zeros(12, 8), torch.ones(12, 8)):
        for scale in (1.0, 1 / 0.07, 100.0):
            assert clip_loss(features, features, scale).item() == pytest.approx(math.log(12), abs=1e-6)
    eye = torch.eye(12, dtype=DOUBLE)
    assert clip_loss(eye, eye, 1 / 0.07).item() == pytest.approx(6.8736e-6, rel=1e-4)
    assert clip_loss(eye, eye, 3.0).item() == pytest.approx(math.log(1 + 11 * math.exp(-3)), rel=1e-9)


def test_loss_and_gradient_are_slow_ones_and_open_clip_s_and_symmetric(generator):
    both = (3 * torch.randn(2, 7, 5, generator=generator, dtype=DOUBLE)).requires_grad_()
    images, texts = both
    unit, slow = [F.normalize(rows, dim=1) for rows in (images, texts)], 0
    for rows, columns in (unit, unit[::-1]):
        for i in range(7):
            odds = [torch.exp(6.5 * rows[i] @ column) for column in columns]
            slow -= torch.log(odds[i] / sum(odds)) / 14
    order = torch.randperm(7, generator=generator)
    for pair in ((images, texts), (images[order], texts[order]), (texts, images)):
        torch.testing.assert_close(clip_loss(*pair, 6.5), slow)
    theirs = open_clip.ClipLoss()(*unit, 6.5)
    torch.testing.assert_close(theirs, slow)
    ours, theirs = (torch.autograd.grad(loss, both) for loss in (clip_loss(images, texts, 6.5), theirs))
    torch.testing.assert_close(ours, theirs)
    assert abs(clip_loss(images[order], texts, 6.5) - slow) > 1e-2


def slow_statistics(images, texts, captions, index):
    """Accuracy, gap and chance over rows and columns, less what is a caption or an image of the row, too."""
    images, texts = (F.normalize(rows, dim=1) for rows in (images, texts))
    right, gaps, chances = [], [], []
    for scores in (100 * images @ texts.T, 100 * texts @ images.T):
        for i, row in enumerate(scores):
            wrong = [j for j in range(len(row)) if captions[j] != captions[i] and index[j] != index[i]]
            row = row[[i, *wrong]]
            right.append(float((row[1:] < row[0]).all()))  # a tie is no success
            chances.append(math.log(len(row)))
            gaps.append(chances[-1] + row.log_softmax(0)[0].item())
    return [sum(numbers) / len(right) for numbers in (right, gaps, chances)]


def test_statistics_are_slow_ones_and_what_is_alike_leaves_its_floor(generator):
    """Captions of one image, and images of one caption."""
    near = torch.randn(2, 9, 4, generator=generator)
    near[1, :5] = near[0, :5] + 0.1 * near[1, :5]
    mixed = [0, 1, 2, 0, 3, 4, 5, 5, 5], [0, 1, 2, 3, 1, 5, 6, 7, 8]
    ten, two = torch.eye(10).repeat(25, 1), torch.eye(2, 8).repeat_interleave(2, dim=0)
    for pair, captions, index, accuracy, floor in (
        (near, *mixed, 5 / 9, (4 * math.log(2) + 3 * math.log(3)) / 9),
        (torch.ones(2, 9, 4), *mixed, 0, (4 * math.log(2) + 3 * math.log(3)) / 9),
        ([ten] * 2, [*range(10)] * 25, range(250), 1, 3.2189),  # 250 pairs, 10 captions: ln 25
        ([two] * 2, [0, 1, 2, 3], [5, 5, 7, 7], 1, math.log(2)),
        ([two] * 2, [0, 0, 1, 1], [4, 5, 6, 7], 1, math.log(2)),
        ([two] * 2, [0, 1, 2, 3], [4, 5, 6, 7], 0, 0),  # which it cannot tell apart
    ):
        ids = torch.tensor([[1, 2 + caption, 0] for caption in captions])
        found = pair_statistics(torch.stack([*pair], dim=1), 100.0, ids, torch.tensor(index)).tolist()
        assert found[:3] == pytest.approx(slow_statistics(*pair, captions, index), abs=1e-5)
        assert (found[0], found[3], found[4]) == pytest.approx((accuracy, floor, 0), abs=1e-4)
        assert accuracy != 1 or clip_loss(*pair, 100.0).item() == pytest.approx(floor, abs=1e-4)
    ids = tokenize(["abc", "abcd", "abcde", ""], 6)  # two are as long as the context
    assert pair_statistics(torch.randn(4, 2, 8), 1.0, ids, torch.arange(4))[4].item() == 0.5


def test_monitor_tells_what_is_wrong(generator):
    good = torch.randn(32, 2, 8, generator=generator)
    images, texts, h = good.clone(), good.clone(), good[:, 0] + 5
    images[:, 0], texts[:, 1] = 1 + 1e-3 * good[:, 0], 1 + 1e-3 * good[:, 1]
    for share, gap, z, expected in (
        (0.5, 1.0, good, {}),
        (0.5, 1.0, images, {"all images have one feature": "clip/image_spread"}),
        (0.5, 1.0, texts, {"all texts have one feature": "clip/text_spread"}),
        (1.9 / 32, 0.0, good, {"pairs are found by chance": "clip/gap"}),
        (2.1 / 32, 0.0, good, {}),
    ):
        statistics = torch.tensor([share, gap, math.log(32), 0.2, 0.25])
        metrics, problems = clip.monitor(statistics, z, h, torch.tensor(20.0))
        assert {words.split(";")[0]: tag for words, tag in problems.items()} == expected
        assert set(problems.values()) <= set(metrics)
        tags = ("contrastive_accuracy", "gap", "floor", "cut", "logit_scale")
        assert [metrics[f"clip/{tag}"] for tag in tags] == pytest.approx([share, gap, 0.2, 0.25, 20])
    for name, value in clip.collapse_metrics(h, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)


# After training


def test_zero_shot_classifier_is_a_slow_one(generator):
    model = shaken(CLIP(**SMALL), generator)
    classes, templates = ["fox", "polar bear"], ["a {}.", "the {}", "{} {}"]
    for column, name in zip(zero_shot_classifier(model, classes, templates).T, classes, strict=True):
        rows = [model.encode_text(tokenize([t.replace("{}", name)], 16))[0] for t in templates]
        mean = sum(row / row.norm() for row in rows) / 3
        torch.testing.assert_close(column, (mean / mean.norm()).detach())


def slow_recall(scores, answers):
    """By sorting each list of scores, the best first, and wrong ones before right ones that are as good."""
    shares = {}
    for name, x, right in (("image_to_text", scores, answers), ("text_to_image", scores.T, answers.T)):
        best_first = right.gather(1, (x - 1e-6 * right).argsort(dim=1, descending=True))
        for k in (1, 5, 10):
            shares[f"clip/{name}_r{k}"] = 100 * best_first[:, :k].any(dim=1).float().mean().item()
    return shares


@pytest.mark.parametrize("captions, shared", [(1, False), (5, False), (3, True)])
def test_recall_is_a_slow_one_and_torchmetrics_and_open_clip_s(generator, captions, shared):
    """Shared: some captions are of two images. open_clip's has one caption of an image."""
    images = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    texts = images.repeat_interleave(captions, dim=0)
    texts = F.normalize(texts + 0.4 * torch.randn(texts.shape, generator=generator), dim=1)
    answers = torch.eye(30).repeat_interleave(captions, dim=1) > 0
    if shared:
        answers[:, ::4] |= answers.roll(7, 0)[:, ::4]
    scores = images @ texts.T
    found = recall(scores, answers)
    assert found == pytest.approx(slow_recall(scores, answers))
    assert len({*found.values()}) > 3 and 20 < found["clip/text_to_image_r1"] < 95

    theirs = importlib.import_module("open_clip_train.train").get_clip_metrics(images, texts[:30], 1)
    for name, x, right in (("image_to_text", scores, answers), ("text_to_image", scores.T, answers.T)):
        for k in (1, 5, 10):
            hits = [metrics.retrieval_hit_rate(s, r, top_k=k) for s, r in zip(x, right, strict=True)]
            assert found[f"clip/{name}_r{k}"] == pytest.approx(100 * torch.stack(hits).mean().item())
            assert captions > 1 or found[f"clip/{name}_r{k}"] == pytest.approx(100 * theirs[f"{name}_R@{k}"])


def test_recall_counts_images_and_a_tie_with_a_wrong_one_is_lost():
    """No image is lost to another of its captions; equal captions of two images are a success of both."""
    eye = torch.eye(20) > 0
    one_of_two = recall(eye.repeat(2, 1).float(), torch.cat([eye, eye & False]))
    assert one_of_two["clip/text_to_image_r1"] == 0 and one_of_two["clip/text_to_image_r5"] == 100
    assert {*recall(torch.ones(20, 20), eye).values()} == {0}
    for answers in (eye.repeat(2, 1), eye.repeat(1, 5)):
        assert {*recall(answers.float(), answers).values()} == {100}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on wide photos of three kinds, those to measure with two captions, and its last metrics."""
    root = tmp_path_factory.mktemp("trained")
    lines = {"train": ["image,caption"], "val": ["image,caption"]}
    for i in range(240):
        image, label = clip.demo_image(i)
        if label < 3:
            image.resize((54, 48)).save(root / f"{i}.png")
            rows = [f"{i}.png,a photo of a {clip.NAMES[label]}", f"{i}.png,{clip.demo_caption(i)}"]
            lines["val" if i % 3 == 0 else "train"] += rows[: 1 + (i % 3 == 0)]
    for name, rows in lines.items():
        (root / f"{name}.csv").write_text("\n".join(rows))
    flags = {"data": str(root / "train.csv"), "val_data": str(root / "val.csv"), "epochs": 12, "lr": 2e-3}
    metrics = clip.train(tiny_args("clip", **flags, run_dir=str(root / "run"), log_every=5))
    return root, metrics


@torch.no_grad()
def scores_of(run_dir, photos, texts):
    """Logits of the model of a run, with the official preparation: shorter side to size, centre crop."""
    args = {k: v for k, v in json.loads((run_dir / "args.json").read_text()).items() if hasattr(clip.Args, k)}
    model, features = clip.clip_of(clip.Args(**args)), []
    model.load_state_dict(load(run_dir / "checkpoint.pt")["model"])
    for photo in photos:
        pixels = v2.functional.pil_to_tensor(Image.open(photo))
        pixels = v2.functional.resize(pixels, 32, v2.InterpolationMode.BICUBIC)
        pixels = v2.functional.normalize(v2.functional.center_crop(pixels, 32) / 255, clip.MEAN, clip.STD)
        features.append(model.encode_image(pixels[None])[0])
    texts = [model.encode_text(tokenize([text]))[0] for text in texts]
    features, texts = (F.normalize(torch.stack(rows), dim=1) for rows in (features, texts))
    return model.logit_scale.exp() * features @ texts.T


def test_a_run_is_measured_by_its_val_data(trained):
    """Recall of images with several captions, and of captions of several images."""
    root, metrics = trained
    rows = {(row["image"], row["caption"]) for row in csv.DictReader((root / "val.csv").open())}
    images, texts = (sorted({*names}) for names in zip(*rows, strict=True))
    answers = torch.tensor([[(image, text) in rows for text in texts] for image in images])
    scores = scores_of(root / "run", [root / image for image in images], texts)
    expected = slow_recall(scores, answers)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    classes = [i for i, text in enumerate(texts) if "photo" in text]
    assert recall(scores[:, classes], answers[:, classes])["clip/image_to_text_r1"] > 50  # chance: 33
    assert ["clip/text_to_image_r1" in line for line in metrics_of(root / "run")[-2:]] == [False, True]
    captions = [row["caption"] for row in csv.DictReader((root / "train.csv").open())]
    order = torch.randperm(len(captions), generator=clip.seeded(2, 0, 0))[:8].tolist()
    assert (root / "run/views.txt").read_text().splitlines() == [captions[i] for i in order]
    assert Image.open(root / "run/views.png").width > 200


def test_photos_are_named(trained, capsys):
    root, _ = trained
    photos, prompts = (
        sorted(map(str, root.glob("*.png")))[:3],
        ("a photo of a house", "a photo of a tree", "x"),
    )
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    words = ["--classify", *photos, "--prompts", *prompts, "--run-dir", str(root / "run")]
    found = clip.train(tyro.cli(clip.Args, args=words))
    expected = scores_of(root / "run", photos, prompts).softmax(dim=1)
    assert (torch.tensor([found[photo] for photo in photos]) - expected).abs().max() < 0.02
    best_first = [sorted(zip(found[photo], prompts, strict=True), reverse=True) for photo in photos]
    lines = [f"{x}  {p:6.1%}  {text}" for x, own in zip(photos, best_first, strict=True) for p, text in own]
    assert capsys.readouterr().out.splitlines() == lines

    bad = functools.partial(clip.Args, classify=(str(root / "val.csv"),), prompts=("a", "b"))
    for args, said in (
        (bad(run_dir=str(root / "run")), "cannot identify image"),
        (bad(prompts=("a",)), "give photos, and 2 or more --prompts"),
        (bad(run_dir="none"), "in none a run of clip.py: .*No such"),
    ):
        stopped(functools.partial(clip.train, args), said)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_backbone_is_what_convert_makes_of_the_weights(trained, folder):
    """The same tensors under the same names, of the same network, which gives what training reads; and --init
    takes it."""
    run_dir = trained[0] / "run"
    state = load(run_dir / "checkpoint.pt")["model"]
    torch.save(state, "weights.pt")
    convert.convert(convert.Args("weights.pt", to="converted.pt", activation="quick_gelu"))
    ours, theirs = load(run_dir / "backbone.pt"), load("converted.pt")
    for facts in (ours, theirs):  # tensors as lists, which can be compared
        facts["state_dict"] = {name: tensor.tolist() for name, tensor in facts["state_dict"].items()}
    assert {fact: ours[fact] for fact in ("builder", "arch_args", "state_dict")}.items() <= theirs.items()

    flags = {"data": str(folder), "epochs": 0}
    clip.train(tiny_args("clip", **flags, seed=1, init="converted.pt", run_dir="again"))
    again, model = load("again/checkpoint.pt")["model"], clip.clip_of(tiny_args("clip"))
    same = {name for name in state if torch.equal(state[name], again[name])}
    assert {name for name in state if "visual." in name} - same == {"visual.proj"}
    assert "token_embedding.weight" not in same
    model.load_state_dict(again)
    images = 255 * torch.rand(3, 3, 32, 32)
    h = model(v2.functional.normalize(images / 255, clip.MEAN, clip.STD), tokenize("abc"))[2]
    torch.testing.assert_close(load_backbone("again/backbone.pt")(images), h, atol=1e-5, rtol=1e-5)
    clip.train(tiny_args("clip", **flags, quick_gelu=False, run_dir="gelu"))
    assert load("gelu/backbone.pt")["arch_args"]["act_layer"] == "gelu"


# Several processes and chunks: oracles 7, 8


@pytest.mark.parametrize(
    "dtype, epochs, tolerance", [(torch.float32, 1, 3e-6), (DOUBLE, 1, 1e-12), (DOUBLE, 5, 1e-9)]
)
def test_training_is_the_same_in_chunks_and_in_processes(folder, monkeypatch, dtype, epochs, tolerance):
    """Gradient, by its first moment, weights and metrics of a step each epoch, the first at the rate 0:
    1 process = chunks = 2 processes = 2 in chunks."""
    passes, build, forward = [], clip.clip_of, CLIP.forward
    spy = lambda self, images, ids: passes.append(len(images)) or forward(self, images.to(dtype), ids)  # noqa: E731
    monkeypatch.setattr(CLIP, "forward", spy)
    monkeypatch.setattr(clip, "clip_of", lambda args: build(args).to(dtype))
    flags = {"data": str(folder), "batch_size": 24, "epochs": epochs, "image_size": 16, "context_length": 24}
    for n, micro, sizes in ((1, 0, [24]), (1, 8, [8] * 6), (2, 0, [12]), (2, 4, [4] * 6)):
        args = tiny_args("clip", **flags, micro_batch_size=micro, run_dir=f"{n}-{micro}")
        ends = in_processes(lambda rank, args=args: clip.train(args) and passes, n)
        assert ends == [sizes * epochs] * n
        for line, first in zip(metrics_of(args.run_dir), metrics_of("1-0"), strict=True):
            assert line == pytest.approx(first, rel=1e-5, abs=1e-6)

        found, whole = (tensors_of(load(f"{name}/checkpoint.pt")) for name in (args.run_dir, "1-0"))
        moments = [tensor for key, tensor in whole.items() if key.endswith("exp_avg")]
        (of_scale,) = [moment for moment in moments if moment.ndim == 0]
        largest = max(moment.abs().max() for moment in moments)
        assert largest > 1e-5 and abs(of_scale) > 1e-3 * largest
        for key, tensor in whole.items():
            limit = tolerance * (largest if key.endswith("exp_avg") else 1)
            assert (found[key] - tensor).abs().max() <= limit, key
    assert epochs == 1 or first["train/loss"] < metrics_of("1-0")[0]["train/loss"] - 0.05


# A run


def test_schedule_decay_and_scale(folder, monkeypatch):
    """Oracle 10, warm-up from 0; and the scale held to [1, 100] after every step."""
    step, optimizers = torch.optim.AdamW.step, []

    @torch.no_grad()
    def shaken_step(self):
        step(self)
        optimizers.append(self)
        (scale,) = [p for p in self.param_groups[1]["params"] if p.ndim == 0]
        scale += 10 if len(optimizers) < 12 else -20

    monkeypatch.setattr(torch.optim.AdamW, "step", shaken_step)
    clip.train(tiny_args("clip", data=str(folder), lr=1e-4, run_dir="run"))
    rates = [1e-4 * s / 5 for s in range(5)]
    rates += [1e-4 * (1 + math.cos(math.pi * (s - 5) / 15)) / 2 for s in range(5, 20)]
    assert [line["train/lr"] for line in metrics_of("run")] == pytest.approx(rates)
    scales = [line["clip/logit_scale"] for line in metrics_of("run")]  # of the loss: after the step before
    assert [scales[i] for i in (0, 3, -1)] == pytest.approx([1 / 0.07, 100, 1])

    groups, shapes = optimizers[0].param_groups, [*clip.clip_of(tiny_args("clip")).parameters()]
    for group, decay in zip(groups, (0.2, 0.0), strict=True):
        assert (group["weight_decay"], group["betas"], group["eps"]) == (decay, (0.9, 0.98), 1e-6)
        own = [p.shape for p in shapes if (p.ndim > 1) == (decay > 0)]
        assert [p.shape for p in group["params"]] == own


def test_bad_flags(tmp_path, folder):
    for flags, words in (
        ({"image_size": 30}, "--image-size 30: give a multiple of --patch-size"),
        ({"text_width": 100}, "--text-width: give a multiple of 64"),
        ({"context_length": 2}, "--context-length: 3 or more"),
        ({"val_data": "nowhere"}, "--data nowhere: there is no such folder|no such folder"),
    ):
        refused("clip", words, data=str(folder), **flags)
    assert not list(tmp_path.iterdir())


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nnodes 32 .*HOST:29500 .\n +clip\.py(.*?)(?<!\\)\n", clip.__doc__, re.S)
    args = tyro.cli(clip.Args, args=command[1].replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.patch_size, args.embed_dim) == (224, "vit_base", 32, 512)
    assert (args.text_width, args.text_depth, args.context_length) == (512, 12, 77)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (32, 32768, 5e-4, 0.2)
    assert args.quick_gelu and not args.flip and args.min_scale == 0.9 and args.tokenizer == "bpe"
    steps = 400_000_000 // args.batch_size  # 400 million pairs
    assert args.warmup_epochs * steps == pytest.approx(2000, rel=0.03)


@pytest.mark.slow
def test_untrained_loss_is_that_of_chance(generator):
    torch.manual_seed(0)
    model = CLIP("vit_base", 224, 32, 512, (512, 12, 49408, 77))
    images, ids = (
        torch.randn(16, 3, 224, 224, generator=generator),
        tokenize(varied_strings()[:16], 77, "bpe"),
    )
    with torch.no_grad():
        loss = clip_loss(*model(images, ids)[:2], model.logit_scale.exp())
    assert loss.item() == pytest.approx(2.78, abs=0.07)  # the sheet: 0.05, of photos
