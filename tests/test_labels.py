"""eval_linear.py: labels as people have them, groups, splits, and results that are not lost."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load, stopped

import eval_linear
import simclr
from eval_linear import Args, evaluate, read_labels


def fill(*names):
    for i, name in enumerate(map(Path, names)):
        name.parent.mkdir(parents=True, exist_ok=True)
        simclr.demo_image(i)[0].resize((8, 8)).save(name, "PNG")


@pytest.fixture
def photos():
    fill(*(f"photos/{name}.jpg" for name in ("a", "b", "c", "d", "e", "f", "sub/g")))


def labelled(content, data="photos", encoding="utf-8"):
    """{path below photos/: class}, and numbers of groups, as read from a csv with this content."""
    Path("labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    found = read_labels(data, "labels.csv")
    paths = [os.path.relpath(item, "photos") for item in found.items]
    return {
        path: found.classes[i] for path, i in zip(paths, found.labels, strict=True)
    }, found.groups.tolist()


def refused(match, call, *given, **options):
    stopped(lambda: call(*given, **options), match)


# csv files


def variants(folder):
    """The same six rows as spreadsheets write them."""
    rows = [(f"{name}.jpg", "cat" if name in "ace" else "fox") for name in "abcdef"]
    lines = [",".join(row) for row in rows]
    semicolons = [";".join(row) for row in rows]
    yield from (lines, semicolons, ["\t".join(row) for row in rows])
    yield [f"{line},,," for line in lines]
    yield [f"{line},seen on {i}. May" for i, line in enumerate(lines)]
    yield ["Path,Label", *lines]
    yield ["filename,species", *lines]
    yield ["note,Class,IMAGE", *(f"x,{label},{path}" for path, label in rows)]
    yield ['"{}","{}"'.format(*row) for row in rows]
    yield [f" {path} , {label} " for path, label in rows]
    yield [f"photos\\{line}" for line in lines]
    yield [f"photos/{line}" for line in lines]
    yield [f"./sub/../{line}" for line in lines]
    yield [f"{folder}/photos/{line}" for line in lines]
    yield [*lines, *(f"./{line}" for line in lines), ""]
    yield "\n,\n".join(lines).split("\n")


def test_csv_as_spreadsheets_write_it(photos, tmp_path):
    """Any delimiter, header, order, quotes, slashes, ends of lines, encoding."""
    expected = {f"{name}.jpg": "cat" if name in "ace" else "fox" for name in "abcdef"}
    for lines in variants(tmp_path):
        for end, encoding in (("\n", "utf-8"), ("\r\n", "utf-8-sig"), ("\r", "utf-16")):
            for data in ("photos", "photos/", f"{tmp_path}/photos"):
                assert labelled(end.join(lines), data, encoding)[0] == expected, (lines, end)
    for mark in ",;\t":  # the delimiter is the one that finds files: labels may hold the others in each row
        for other in ",;\t".replace(mark, ""):
            names = {path: f"{label}{other} near{other} far" for path, label in expected.items()}
            rows = [f"{path}{mark}{label}" for path, label in names.items()]
            assert (
                labelled("\n".join(rows))[0] == labelled("\n".join([f"path{mark}label", *rows]))[0] == names
            )


CSV = "a.jpg,cat\nb.jpg,fox\nc.jpg,cat\nd.jpg,fox\ne.jpg,cat\nf.jpg,fox\n"


def test_rows_without_a_label_are_skipped_and_counted(photos, capsys):
    labelled(f"path,label\n{CSV}sub/g.jpg,\nnowhere.jpg,\n,fox")
    printed = capsys.readouterr().out
    assert "--labels-csv labels.csv: 3 rows without a label are skipped" in printed
    assert "6 images, 2 classes: cat 3, fox 3" in printed
    rows = CSV.replace("cat", "cat,mammal").replace("fox", "fox,mammal")
    assert {*labelled(f"path,species,class\n{rows}\n\n")[0].values()} == {"cat", "fox"}
    printed = capsys.readouterr().out
    assert "the label is species, not class; rename" in printed and "without a label" not in printed
    labelled(CSV.replace("e.jpg,cat", "e.jpg,Cat"))
    printed = capsys.readouterr().out
    assert "3 classes: Cat 1, cat 2, fox 3" in printed  # a slip is seen
    assert "never learnt where they are tested, so never right: Cat\n" in printed


def test_csv_files_that_are_refused(photos):
    for match, content in (
        ("labels.csv: is not in UTF-8; save it as CSV UTF-8", CSV.replace("fox", "Füchsin").encode("cp1252")),
        ("labels.csv: is a spreadsheet; save it as CSV UTF-8", b"PK\3\4\x14\0\6\0\x08"),
        ("labels.csv: is not in UTF-8", f"{CSV}Füchsin.jpg,fox".encode("cp1252")),
        ("names 1 missing files, first photos/z.jpg", f"{CSV}z.jpg,cat"),
        ("labels.csv: no row has a path and a label", ""),
        ("no row has a path and a label; its first row is .'path', 'animal'.", "path,animal\na.jpg,cat"),
        ("./a.jpg is .'cat', ''., and .'fox'", f"{CSV}./a.jpg,fox"),
        ("a.jpg is .'cat', '1'., and .'cat', '3'", "path,label,site\na.jpg,cat,1\nb.jpg,fox,2\na.jpg,cat,3"),
        (r"labels.csv: has one class \(a 2\), two or more are needed", "a.jpg,a\nb.jpg,a"),
        ("labels.csv: 3 images or groups are too few for 5 folds", "a.jpg,x\nb.jpg,y\nc.jpg,z"),
        ("3 images or groups are too few", "path,label,Camera\n" + "1\n".join(CSV.split("\n")[:3])),
        ("each class has one image or group: none can", "a.jpg,a\nb.jpg,b\nc.jpg,c\nd.jpg,d\ne.jpg,e"),
        ("1 of 3 labelled rows have no group", "path,label,site\na.jpg,cat,1\nb.jpg,fox,1\nc.jpg,fox,"),
        ("labels.csv: field larger than field limit", "a.jpg," + 2**18 * "a"),
    ):
        refused(match, labelled, content)
    refused("nowhere.csv: .*No such file", read_labels, "photos", "nowhere.csv")


def test_names_that_are_not_utf8(photos, capsys):
    """They are found by a csv with the same bytes, measured, and written as they are in predictions.csv."""
    os.rename(b"photos/f.jpg", b"photos/F\xfcchsin.jpg")
    assert len(labelled(CSV.encode().replace(b"f.jpg", b"F\xfcchsin.jpg"))[0]) == 6
    evaluate(Args("pixels", data="photos", labels_csv="labels.csv", side=2, epochs=1, workers=0))
    evaluate(Args("pixels", "predict", data="photos", workers=0))
    assert b"\nF\xfcchsin.jpg," in Path("runs/pixels/predictions-photos.csv").read_bytes()
    fill(*(f"classes/{os.fsdecode(name)}/{i}.png" for name in (b"F\xfcchsin", b"cat") for i in range(20)))
    evaluate(Args("pixels", "knn", data="classes", side=2, workers=0, k=(1,)))
    assert r"2 classes: F\udcfcchsin 20, cat 20" in capsys.readouterr().out


# Groups


def noise_videos(videos=30, frames=8, seed=0):
    """Features of frames that look like their video alone, whose labels cannot be learnt."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.arange(videos).repeat_interleave(frames)
    look = torch.randn(videos, 64, generator=generator)[video]
    features = look + 0.05 * torch.randn(len(video), 64, generator=generator)
    return features, torch.randint(0, 5, (videos,), generator=generator)[video], video


def whole(parts, groups):
    """Whether no group is in two parts."""
    return all(len(parts[groups == group].unique()) == 1 for group in groups.unique())


def test_groups_are_never_split():
    """Noise videos: 100 % by k-NN over frames, chance, 20 %, over whole videos; mean of 5 seeds."""
    right = {"frames": [], "videos": []}
    for seed in range(5):
        features, labels, video = noise_videos(seed=seed)
        data = eval_linear.Labelled(tuple(range(240)), labels, list("abcde"), video, None)
        for name, groups in (("frames", torch.arange(240)), ("videos", video)):
            for train, test in eval_linear.splits(data._replace(groups=groups), Args(), 0):
                assert not {*train.tolist()} & {*test.tolist()} and len(train) + len(test) == 240
                assert name == "frames" or not {*video[train].tolist()} & {*video[test].tolist()}
                scores = eval_linear.knn(features[train], labels[train], features[test], (5,), 5)[5]
                right[name] += (scores.argmax(dim=1) == labels[test]).tolist()
    top1 = {name: 100 * sum(answers) / len(answers) for name, answers in right.items()}
    assert top1["frames"] == 100 and top1["videos"] == pytest.approx(20, abs=5)


def test_folds_of_groups_are_even(generator):
    groups = torch.randint(0, 40, (2000,), generator=generator)
    labels = (groups % 4 + torch.randint(0, 2, (2000,), generator=generator)) % 5
    fold = eval_linear.stratified_folds(labels, groups, 5, 0)
    assert whole(fold, groups) and fold.bincount().min() > 300 and fold.bincount().max() < 500
    for label in range(5):
        shares = fold[labels == label].bincount(minlength=5) / (labels == label).sum()
        assert shares.min() > 0.1 and shares.max() < 0.3
    assert not torch.equal(fold, eval_linear.stratified_folds(labels, groups, 5, 1))
    five = eval_linear.stratified_folds(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([7, 7, 3, 2, 9]), 5, 0)
    assert five[0] == five[1] and len(five.unique()) == 4  # a group more than folds leaves none empty


def test_penalty_and_rate_are_chosen_on_whole_groups(monkeypatch):
    """...which they have not learnt from: nothing can be learnt of another video."""
    (features, labels, video), seen, folds = noise_videos(), [], eval_linear.stratified_folds
    monkeypatch.setattr(
        eval_linear, "stratified_folds", lambda *given: seen.append(folds(*given)) or seen[-1]
    )
    eval_linear.linear_probe(features, labels, video, 5, Args(epochs=1))
    *_, chosen = eval_linear.logreg(features, labels, video, 5)
    assert len(seen) == 2 and all(whole(fold, video) for fold in seen)
    *_, split = eval_linear.logreg(features, labels, torch.arange(240), 5)
    assert chosen["penalty"] > split["penalty"]


def test_what_is_held_out_is_a_tenth_in_whole_groups(generator):
    """...and never all groups of a class; one large camera is learnt from, not kept out."""
    groups = torch.cat([torch.zeros(900), 1 + torch.arange(600) // 20]).long()
    labels = torch.randint(0, 3, (1500,), generator=generator)
    held = eval_linear.held_out(labels, groups, 0)
    assert 20 <= held.sum() <= 300 and not held[:900].any() and whole(held, groups)
    labels[900:920] = 3  # a class of one camera
    assert not any(eval_linear.held_out(labels, groups, seed)[labels == 3].any() for seed in range(20))
    labels = torch.arange(1000) % 10
    assert (labels[eval_linear.held_out(labels, torch.arange(1000), 0)].bincount() == 10).all()
    assert not eval_linear.held_out(labels % 2, torch.zeros(1000).long(), 0).any()
    assert 9000 < eval_linear.held_out(torch.arange(200_000) % 2, torch.arange(200_000), 0).sum() <= 10_000
    for seed in range(40):  # cameras, most with a class that no other has: what is free is held
        groups = torch.randint(12, (3000,), generator=generator)
        labels = torch.where(torch.rand(3000, generator=generator) < 0.2, 2 + groups.clamp(max=8), groups % 2)
        held = eval_linear.held_out(labels, groups, seed)
        assert held.any() and set(labels[held].tolist()) <= set(labels[~held].tolist())


def test_a_name_on_two_lines_is_named_in_one():
    fill("photos/a.jpg", "photos/b.jpg")
    Path("labels.csv").write_text('a.jpg,x\n"b\n.jpg",y\n')
    refused(r"names 1 missing files, first photos/b \.jpg$", read_labels, "photos", "labels.csv")


@pytest.mark.parametrize("header", ["path,label,Camera ID\n", ""])
def test_a_column_that_is_not_read_is_said(capsys, header):
    """Or folds would tear the groups that it was meant to keep, and nobody would know."""
    fill(*(f"photos/{i}.jpg" for i in range(12)))
    rows = "\n".join(f"{i}.jpg,{'xy'[i % 2]},{i // 2}" for i in range(12))
    _, groups = labelled(header + rows)
    assert len(set(groups)) == 12
    said = capsys.readouterr().out
    assert "is headed group, camera, video, patient, site; without it or --group-pattern each" in said
    labelled("path,label,Camera\n" + rows)
    assert "is headed" not in capsys.readouterr().out


def test_a_group_column_and_a_group_pattern():
    fill(
        *(f"photos/{i}.jpg" for i in range(12)),
        *(f"classes/{'xy'[i % 2]}/cam{i % 6}_{i}.png" for i in range(24)),
    )
    _, groups = labelled(
        "path,label,site\n" + "\n".join(f"{i}.jpg,{'xy'[i % 2]},{i // 2}" for i in range(12))
    )
    assert len(set(groups)) == 6 and groups[::2] == groups[1::2]
    found = read_labels("photos", "labels.csv", r"/?(\d)")  # it wins over the column
    assert len(found.groups.unique()) == 10
    found = read_labels("classes", group_pattern=r"/(cam\d)_")
    assert found.is_test is None and len(found.groups.unique()) == 6
    assert all(f"cam{group}_" in item for group, item in zip(found.groups.tolist(), found.items, strict=True))
    for pattern in ("(site)", "(cam)?$"):
        refused(
            "--group-pattern .*: finds nothing in classes/x/cam0_0.png", read_labels, "classes", "", pattern
        )
    for data, wrong in (("classes", "cam"), ("classes", "("), ("demo", "(cam)")):
        refused("must be a regular expression with parenthes.*for folders", read_labels, data, "", wrong)
    fill(*(f"two/{split}/{'xy'[i % 2]}/cam{i}_{split}.png" for split in ("train", "val") for i in range(4)))
    refused("two: 4 groups have images to learn from and to test on", read_labels, "two", "", r"(cam\d)")
    assert read_labels("two", "", r"(cam\d_\w+)").is_test.sum() == 4


# Folders


@pytest.mark.parametrize("train, test", [("train", "val"), ("Training", "Testing"), ("TRAIN", "valid")])
def test_splits_by_any_of_their_names(train, test, capsys):
    names = [f"data/{split}/{c}/{i}.png" for split in (train, test) for c in "ab" for i in range(3)]
    fill(*names, "data/unlabeled/9.png", "data/unlabeled/x/9.png", f"data/{test}/C/0.png")
    found = read_labels("data")
    assert found.classes == ["C", "a", "b"] and len(found.items) == 13
    assert found.is_test.tolist() == [f"/{test}/" in item for item in found.items]
    printed = capsys.readouterr().out
    assert f"learns from data/{train}, tests on data/{test}" in printed
    assert "never learnt where they are tested, so never right: C\n" in printed


def test_class_folders_without_a_test_folder(capsys):
    """train/ alone is opened, beside other classes it is one; an image in five is for testing."""
    fill(*(f"one/train/{c}/{i}.png" for c in "ab" for i in range(30)))
    found = read_labels("one")
    assert found.classes == ["a", "b"] and 3 <= found.is_test.sum() <= 25
    assert torch.equal(read_labels("one").is_test, found.is_test)
    assert "has no train/ beside val/ or test/" in capsys.readouterr().out
    fill(*(f"rides/{c}/{i}.png" for c in ("bus", "car", "train") for i in range(8)))
    assert read_labels("rides").classes == ["bus", "car", "train"]
    fill(
        "a/val/x/0.png", "a/test/x/1.png", "b/train/x/0.png", "b/train/y/0.png", "b/test/1.png", "flat/0.png"
    )
    refused("its folders are no classes; images to learn from go to train/", read_labels, "a")
    refused("no class folder around b/test/1.png; give --data b/train, --labels-csv", read_labels, "b")
    refused("--data flat: no class folder around flat/0.png; give --labels-csv", read_labels, "flat")


def test_demo_images_for_learning_and_for_testing(monkeypatch):
    monkeypatch.setattr(eval_linear, "demo_image", lambda i: (None, i % 10))
    found = read_labels("demo")
    assert found.items == (*range(4096), *range(10**6, 10**6 + 2048)) and found.is_test.sum() == 2048
    assert [found.classes[i] for i in found.labels[:10]] == [*eval_linear.DEMO_CLASSES]


# Images that cannot be read, and results


@pytest.fixture
def broken(photos):
    """Flags of photos of which one is broken since a head was made; another has no label."""
    labelled(CSV)
    evaluate(Args("pixels", data="photos", labels_csv="labels.csv", side=2, epochs=1, workers=0))
    Path("photos/b.jpg").write_text("no image")
    Path("photos/sub/empty.png").touch()
    return Args("pixels", "predict", data="photos", workers=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_and_features_go_on_at_unreadable_files(broken, capsys, workers):
    assert evaluate(replace(broken, workers=workers)) == {"n": 8, "unreadable": 2}
    assert "8 images, 2 of them cannot be read" in capsys.readouterr().out
    with open("runs/pixels/predictions-photos.csv", newline="") as file:
        rows = {row["path"]: (row["class"], row["probability"]) for row in csv.DictReader(file)}
    assert [path for path in rows if rows[path] == ("", "")] == ["b.jpg", "sub/empty.png"]
    assert all(rows[path][0] in ("cat", "fox") for path in ("a.jpg", "sub/g.jpg"))
    assert evaluate(replace(broken, mode="features", side=2, workers=workers))["unreadable"] == 2
    written = load("runs/pixels/features-photos.pt")
    lost = written["features"].isnan().all(dim=1)
    assert [written["items"][i] for i in lost.nonzero()] == ["photos/b.jpg", "photos/sub/empty.png"]
    assert written["features"][~lost].isfinite().all()


def test_learning_and_testing_refuse_unreadable_files(broken):
    args = replace(broken, labels_csv="labels.csv", side=2, epochs=1)
    for mode in ("knn", "logreg", "linear", "finetune"):
        refused(
            r"1 of \d images cannot be read, first photos/b.jpg; mend", evaluate, replace(args, mode=mode)
        )
    fill(*(f"data/{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(4)))
    Path("data/val/a/0.png").write_text("no image")
    args = replace(args, mode="finetune", data="data", labels_csv="")
    refused("1 of 8 images cannot be read, first data/val/a/0.png", evaluate, args)


def test_results_of_other_data_have_their_own_names(photos):
    Path("first.csv").write_text(CSV)
    Path("second.csv").write_text(CSV.replace("a.jpg,cat", "a.jpg,fox"))
    fill(*(f"data/{c}/{i}.png" for c in "ab" for i in range(12)))
    base, folder = Args("pixels", data="photos", side=2, epochs=1, workers=0), Path("runs/pixels")
    for more in ({"labels_csv": "first.csv"}, {"labels_csv": "second.csv"}, {"data": "data"}):
        evaluate(replace(base, **more))
    ends = ("data", "photos-first", "photos-second")
    names = {f"{kind}-linear-{end}" for kind in ("eval", "head") for end in ends}
    assert {path.stem for path in folder.iterdir()} == names
    assert json.loads((folder / "eval-linear-photos-first.json").read_text())["labels_csv"] == "first.csv"

    head = folder / "head-linear-photos-first.pt"
    ask = replace(base, mode="predict", side=0)  # the head's
    evaluate(replace(ask, head=str(head), out="there"))
    evaluate(replace(base, mode="knn", labels_csv="first.csv", out="there"))
    written = {path.name for path in Path("there").iterdir()}
    assert written == {"pixels-predictions-photos.csv", "pixels-eval-knn-photos-first.json"}
    os.utime(head, (2e9, 2e9))  # the newest is taken
    evaluate(ask)
    evaluate(replace(ask, out="elsewhere"))  # by the head beside the backbone
    assert Path("elsewhere/pixels-predictions-photos.csv").exists()
    there = Path("there/pixels-predictions-photos.csv").read_text()
    assert (folder / "predictions-photos.csv").read_text() == there

    for name, stem in (("one.pt", "one-"), ("backbone.pt", "")):  # backbones side by side
        torch.save({}, name)
        path = eval_linear.result_path(replace(base, backbone=name, labels_csv="first.csv"), "head-linear.pt")
        assert str(path) == f"{stem}head-linear-photos-first.pt"
    assert str(eval_linear.result_path(replace(base, data="."), "x.csv")) == "runs/pixels/x-here.csv"
    long = "imagenet100_resnet50_epochs200_batch256/backbone.pt"
    backbones = ("timm:vit_base.dino", "timm:vit_base.mae", f"seed1/{long}", f"seed2/{long}")
    assert (
        len({eval_linear.result_path(replace(base, backbone=name, out="there"), "x") for name in backbones})
        == 4
    )


def test_a_folder_that_cannot_be_written_to_is_said_before_the_work(photos, monkeypatch):
    monkeypatch.setattr(eval_linear, "extract_features", lambda *a, **k: pytest.fail("this is the work"))
    Path("file").touch()
    Path("labels.csv").write_text(CSV)
    for mode in ("features", "knn"):
        args = Args("pixels", mode, data="photos", labels_csv="labels.csv", workers=0)
        for out, reason in (
            ("file/x", "Not a directory"),
            ("/proc/x", ""),
            ("x" * 256, "File name too long"),
        ):
            refused(f"cannot be written .*{reason}.*; --out names", evaluate, replace(args, out=out))
    refused("--backbone pixel: no such file, nor a network", evaluate, replace(args, backbone="pixel"))
    assert not Path("runs").exists()  # nothing is left of it


def test_a_kill_or_a_full_disk_while_writing_leaves_the_old_file(broken, monkeypatch):
    """torch.save hides a full disk behind a RuntimeError; one line, and no temporary file is left."""
    path = Path("runs/pixels/predictions-photos.csv")
    evaluate(broken)
    before = path.read_text()
    fill("photos/z.png")

    def killed(*_):
        raise KeyboardInterrupt

    def full(content, path):
        path.write_text("half of it")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        refused("interrupted", evaluate, broken)
    monkeypatch.setattr(torch, "save", full)
    words = "features-photos.pt: cannot be written .*No space left on device"
    refused(words, evaluate, replace(broken, mode="features", side=2))
    assert path.read_text() == before and not [*Path().rglob("*.tmp")]


def test_folds_of_unequal_size_are_counted_together(monkeypatch):
    """Four folds of 2 images that are right and one of 16 that is wrong: 8 of 24, not 80 %."""
    groups = torch.tensor([0] * 16 + [1, 1, 2, 2, 3, 3, 4, 4])
    data = eval_linear.Labelled(tuple(range(24)), torch.arange(24) % 3 // 2, ["a", "b"], groups, None)
    monkeypatch.setattr(eval_linear, "read_labels", lambda *_: data)

    def answer(args, data, backbone, features, train, test, *_):
        right = torch.eye(2)[data.labels[test]]
        return {"knn": right if len(test) == 2 else 1 - right}, {}, None, None

    monkeypatch.setattr(eval_linear, "answer", answer)
    result = evaluate(Args("pixels", "knn", side=2, workers=0))
    assert result["n"] == 24 and result["top1"] == pytest.approx(100 * 8 / 24)
