"""eval_linear.py: labels as people have them, groups, splits, and results that are not lost."""

import csv
import json
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

import eval_linear
import simclr
from eval_linear import Args, evaluate, read_labels


@pytest.fixture
def photos_folder(tmp_path, monkeypatch):
    """photos/ with a.jpg, ..., f.jpg and sub/g.jpg, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/sub").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "c", "d", "e", "f", "sub/g")):
        simclr.demo_image(i)[0].save(tmp_path / f"photos/{name}.jpg")
    return tmp_path / "photos"


def refused(match, call, *rest, **options):
    with pytest.raises(SystemExit, match=match) as stop:
        call(*rest, **options)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def labelled(content, data="photos", encoding="utf-8"):
    """{path below photos/: (class, number of the group)} as read from a csv with this content."""
    with open("labels.csv", "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode(encoding))
    found = read_labels(data, "labels.csv")
    names = [found.classes[label] for label in found.labels]
    pairs = zip(names, found.groups.tolist(), strict=True)
    return {os.path.relpath(item, "photos"): pair for item, pair in zip(found.items, pairs, strict=True)}


def classes_of(found):
    return {path: name for path, (name, _) in found.items()}


# csv files

EXPECTED = dict(zip("abcdef", ["cat", "fox"] * 3, strict=True))
LINES = [f"{name}.jpg,{label}" for name, label in EXPECTED.items()]
EXPECTED = {f"{name}.jpg": label for name, label in EXPECTED.items()}
SEMICOLONS = [line.replace(",", ";") for line in LINES]
VARIANTS = {
    "plain": "\n".join(LINES),
    "semicolons": "\n".join(SEMICOLONS),
    "tabs": "\n".join(LINES).replace(",", "\t"),
    "carriage returns": "\r\n".join(["path,label", *LINES, ""]),
    "byte-order mark": ("\ufeff" + "\r\n".join(["path;label", *SEMICOLONS])),
    "old Macintosh": "\r".join(LINES),
    "trailing commas": "\n".join(f"{line},,," for line in LINES),
    "third column": "\n".join(f"{line},seen on {i}. May" for i, line in enumerate(LINES)),
    "header of any case": "\n".join(["Path,Label", *LINES]),
    "other names": "\n".join(["filename,species", *LINES]),
    "other order": "\n".join(["note,Class,IMAGE", *(f"x,{b},{a}" for a, b in (s.split(",") for s in LINES))]),
    "quotes": "\n".join('"{}","{}"'.format(*line.split(",")) for line in LINES),
    "spaces": "\n".join(f" {line.replace(',', ' , ')} " for line in LINES),
    "backslashes": "\n".join(f"photos\\{line}" for line in LINES),
    "with the folder": "\n".join(f"photos/{line}" for line in LINES),
    "dots": "\n".join(f"./sub/../{line}" for line in LINES),
    "copies": "\n".join([*LINES, *(f"./{line}" for line in LINES), ""]),
    "empty lines": "\n\n,\n".join(LINES),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_csv_as_spreadsheets_write_it(photos_folder, name):
    for data in ("photos", "photos/", str(photos_folder)):
        assert classes_of(labelled(VARIANTS[name], data)) == EXPECTED
    if name != "byte-order mark":
        assert classes_of(labelled(VARIANTS[name], encoding="utf-16")) == EXPECTED
    absolute = "\n".join(f"{photos_folder}/{line}" for line in LINES)
    assert classes_of(labelled(absolute)) == EXPECTED


def test_rows_without_a_label_are_skipped_and_counted(photos_folder, capsys):
    text = "\n".join(["path,label", *LINES, "sub/g.jpg,", "nowhere.jpg,", ",fox"])
    assert classes_of(labelled(text)) == EXPECTED
    printed = capsys.readouterr().out
    assert "--labels-csv labels.csv: 3 rows without a label are skipped" in printed
    assert "6 images, 2 classes: cat 3, fox 3" in printed
    labelled("\n".join(LINES).replace("e.jpg,cat", "e.jpg,Cat"))
    printed = capsys.readouterr().out
    assert "3 classes: Cat 1, cat 2, fox 3" in printed  # a slip is seen
    assert "never learnt where they are tested, so never right: Cat\n" in printed


def test_csv_files_that_are_refused(photos_folder):
    def refuse(match, content, **options):
        return refused(match, labelled, content, **options)

    umlaut = "\n".join(LINES).replace("fox", "Füchsin")
    assert set(classes_of(labelled(umlaut)).values()) == {"cat", "Füchsin"}
    refuse("labels.csv: is not in UTF-8; save it as CSV UTF-8", umlaut, encoding="cp1252")
    refuse("labels.csv: is not in UTF-8", "\n".join([*LINES, "Füchsin.jpg,fox"]), encoding="cp1252")
    refuse("names 1 missing files, first photos/z.jpg", "\n".join([*LINES, "z.jpg,cat"]))
    refuse("labels.csv: no row has a path and a label", "")
    refuse(
        "labels.csv: no row has a path and a label; its first row is .'path', 'label'", "path,label\na.jpg,\n"
    )
    refuse("no row has a path and a label; its first row is .'path', 'animal'.", "path,animal\na.jpg,cat")
    refuse("./a.jpg is .'cat', ''., and .'fox'", "\n".join([*LINES, "./a.jpg,fox"]))
    refuse(
        "labels.csv: 3 images or groups are too few for 5 folds", "\n".join(["a.jpg,x", "b.jpg,y", "c.jpg,z"])
    )
    single = "\n".join(f"{name}.jpg,{name}" for name in "abcdef")
    refuse("each class has one image or group: none can be both learnt and tested", single)


def test_names_that_are_not_utf8(photos_folder, capsys):
    """They are found by a csv with the same bytes, measured, and written as they are in predictions.csv."""
    name = b"photos/F\xfcchsin.jpg"
    os.rename(b"photos/f.jpg", name)
    lines = [line.encode() for line in LINES[:5]] + [b"F\xfcchsin.jpg,fox"]
    assert len(labelled(b"\n".join(lines))) == 6
    evaluate(Args("pixels", "logreg", data="photos", labels_csv="labels.csv", side=8, workers=0))
    evaluate(Args("pixels", "predict", data="photos", workers=0))
    written = open("runs/pixels/predictions-photos.csv", "rb").read()
    assert b"\nF\xfcchsin.jpg,fox," in written.replace(b"\r", b"") or b"F\xfcchsin.jpg,cat," in written
    os.makedirs(b"classes/F\xfcchsin"), os.makedirs("classes/cat")
    for i in range(20):
        simclr.demo_image(i)[0].save(os.fsdecode(b"classes/F\xfcchsin/%d.jpg" % i))
        simclr.demo_image(i)[0].save(f"classes/cat/{i}.jpg")
    evaluate(Args("pixels", "knn", data="classes", side=8, workers=0, k=(1,)))
    assert r"2 classes: F\udcfcchsin 20, cat 20" in capsys.readouterr().out


# Groups


def noise_videos(videos=30, frames=8, seed=0):
    """Features of frames that look like their video alone, whose labels cannot be learnt."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.arange(videos).repeat_interleave(frames)
    look = torch.randn(videos, 64, generator=generator)[video]
    features = look + 0.05 * torch.randn(len(video), 64, generator=generator)
    return features, torch.randint(0, 5, (videos,), generator=generator)[video], video


def test_groups_are_never_split():
    """Noise videos: 100 % by k-NN over frames, chance, 20 %, over whole videos; mean of 5 seeds."""
    right = {"frames": [], "videos": []}
    for seed in range(5):
        features, labels, video = noise_videos(seed=seed)
        data = eval_linear.Labelled(tuple(range(240)), labels, list("abcde"), video, None)
        for name, groups in (("frames", torch.arange(240)), ("videos", video)):
            for train, test in eval_linear.splits(data._replace(groups=groups), Args(), 0):
                if name == "videos":
                    assert not set(video[train].tolist()) & set(video[test].tolist())
                scores = eval_linear.knn(features[train], labels[train], features[test], (5,), 5)[5]
                right[name] += (scores.argmax(dim=1) == labels[test]).tolist()
    top1 = {name: 100 * sum(answers) / len(answers) for name, answers in right.items()}
    assert top1["frames"] == 100 and top1["videos"] == pytest.approx(20, abs=5)


def test_folds_of_groups_are_even():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 40, (2000,), generator=generator)
    labels = (groups % 4 + torch.randint(0, 2, (2000,), generator=generator)) % 5
    fold = eval_linear.stratified_folds(labels, groups, 5, 0)
    assert all(len(fold[groups == g].unique()) == 1 for g in range(40))
    assert fold.bincount().min() > 300 and fold.bincount().max() < 500
    for label in range(5):
        shares = fold[labels == label].bincount(minlength=5) / (labels == label).sum()
        assert shares.min() > 0.1 and shares.max() < 0.3
    assert not torch.equal(fold, eval_linear.stratified_folds(labels, groups, 5, 1))
    five = eval_linear.stratified_folds(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([7, 7, 3, 2, 9]), 5, 0)
    assert five[0] == five[1] and len(five.unique()) == 4  # a group more than folds leaves none empty


@pytest.mark.parametrize("fit", ["logreg", "linear"])
def test_groups_are_whole_in_inner_folds(monkeypatch, fit):
    """The penalty and the rate are chosen on videos that they have not learnt from."""
    features, labels, video = noise_videos()
    seen, folds = [], eval_linear.stratified_folds

    def watched(labels, groups, *rest):
        fold = folds(labels, groups, *rest)
        seen.append(all(len(fold[groups == g].unique()) == 1 for g in groups.unique()))
        return fold

    monkeypatch.setattr(eval_linear, "stratified_folds", watched)
    if fit == "logreg":
        *_, chosen = eval_linear.logreg(features, labels, video, 5)
        *_, split = eval_linear.logreg(features, labels, torch.arange(240), 5)
        assert chosen["penalty"] > split["penalty"]  # nothing can be learnt of another video
    else:
        eval_linear.linear_probe(features, labels, video, 5, Args(epochs=1))
    assert seen[0]


def test_a_group_column_and_a_group_pattern(photos_folder):
    text = "\n".join(["image,species,Camera", *(f"{line},{i // 2}" for i, line in enumerate(LINES))])
    refused("3 images or groups are too few for 5 folds", labelled, text)
    twice = "path,label,site\na.jpg,cat,1\nb.jpg,fox,2\na.jpg,cat,3"
    refused("a.jpg is .'cat', '1'., and .'cat', '3'", labelled, twice)
    names = [f"{i}.jpg,{'xy'[i % 2]},cam{i // 2}" for i in range(12)]
    for i in range(12):
        simclr.demo_image(i)[0].save(photos_folder / f"{i}.jpg")
    found = labelled("\n".join(["path,label,site", *names]))
    groups = [group for _, group in found.values()]
    assert len(set(groups)) == 6 and all(groups[2 * i] == groups[2 * i + 1] for i in range(6))
    merged = "\n".join(["path,label,site", *names, "a.jpg,x,", "b.jpg,y,"])  # as of merged cells
    refused("2 of 14 labelled rows have no group; fill or drop the column", labelled, merged)

    for i in range(24):
        path = photos_folder.parent / "classes" / "xy"[i % 2] / f"cam{i % 6}_{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        simclr.demo_image(i)[0].save(path)
    found = read_labels("classes", group_pattern=r"/(cam\d)_")
    assert found.is_test is None and len(found.groups.unique()) == 6
    assert all(f"cam{group}_" in item for group, item in zip(found.groups.tolist(), found.items, strict=True))
    refused(
        "--group-pattern .site.: finds nothing in classes/x/cam0_0.png", read_labels, "classes", "", "(site)"
    )
    refused("--group-pattern .cam.*: finds nothing in", read_labels, "classes", "", "(cam)?$")
    for wrong in ("cam", "(", "(cam"):
        refused(
            "--group-pattern .* must be a regular expression with paren", read_labels, "classes", "", wrong
        )
    refused("must be a regular expression .* for folders", read_labels, "demo", "", "(cam)")
    labelled("\n".join(["path,label,site", *names]))
    found = read_labels("photos", "labels.csv", r"/?(\d)")  # of paths in a csv, too; it wins over the column
    assert len(found.groups.unique()) == 10
    for split in ("train", "val"):
        for i in range(4):
            path = photos_folder.parent / "two" / split / "xy"[i % 2] / f"cam{i}_{split}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            simclr.demo_image(i)[0].save(path)
    refused("two: 4 groups have images to learn from and to test on", read_labels, "two", "", r"(cam\d)")
    assert read_labels("two", "", r"(cam\d_\w+)").is_test.sum() == 4


# Folders


def fill(root, *names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        simclr.demo_image(i)[0].save(path, "PNG")


@pytest.mark.parametrize("train, test", [("train", "val"), ("Training", "Testing"), ("TRAIN", "valid")])
def test_splits_by_any_of_their_names(tmp_path, train, test, capsys):
    names = [f"{split}/{c}/{i}.png" for split in (train, test) for c in "ab" for i in range(3)]
    fill(tmp_path, *names, "unlabeled/9.png", "unlabeled/x/9.png")
    found = read_labels(str(tmp_path))
    assert found.classes == ["a", "b"] and len(found.items) == 12 and found.is_test.sum() == 6
    assert all(f"/{test}/" in item for item, t in zip(found.items, found.is_test, strict=True) if t)
    assert f"learns from {tmp_path}/{train}, tests on {tmp_path}/{test}" in capsys.readouterr().out


def test_without_a_test_folder(tmp_path, capsys):
    """train/ alone is opened, beside other classes it is one; an image in five is for testing."""
    fill(tmp_path / "one", *(f"train/{c}/{i}.png" for c in "ab" for i in range(30)))
    found = read_labels(str(tmp_path / "one"))
    assert found.classes == ["a", "b"] and 3 <= found.is_test.sum() <= 25
    assert torch.equal(read_labels(str(tmp_path / "one")).is_test, found.is_test)
    assert "has no train/ beside val/ or test/" in capsys.readouterr().out
    fill(tmp_path / "rides", *(f"{c}/{i}.png" for c in ("bus", "car", "train") for i in range(20)))
    assert read_labels(str(tmp_path / "rides")).classes == ["bus", "car", "train"]


def test_what_is_no_photo(tmp_path):
    """Hidden files and folders, those of servers, and folders that are reached twice."""
    real = [f"{c}/{i}.png" for c in "ab" for i in range(4)]
    hidden = ("a/.ipynb_checkpoints/0-checkpoint.png", "b/._1.png", ".thumbnails/0.png", "@eaDir/a/0.png")
    fill(tmp_path, *real, *hidden, "__MACOSX/a/0.png")
    (tmp_path / "a/notes.txt").write_text("no image")
    os.symlink("..", tmp_path / "a/back")
    os.symlink("../b", tmp_path / "a/again")
    found = read_labels(str(tmp_path))
    assert [os.path.relpath(item, tmp_path) for item in found.items] == real
    os.symlink(tmp_path, tmp_path.parent / "link")
    assert len(read_labels(str(tmp_path.parent / "link")).items) == 8
    fill(tmp_path.parent / "elsewhere", "c.png", "d.png")
    os.symlink("../../elsewhere", tmp_path / "b/more")
    os.symlink("../../elsewhere", tmp_path / "b/once more")
    assert len(read_labels(str(tmp_path)).items) == 10


# Images that cannot be read, and results


@pytest.fixture
def broken(photos_folder):
    labelled("\n".join(LINES))
    evaluate(Args("pixels", "logreg", data="photos", labels_csv="labels.csv", side=8, workers=0))
    (photos_folder / "b.jpg").write_text("no image")
    (photos_folder / "sub/empty.png").touch()
    return photos_folder


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_and_features_go_on_at_unreadable_files(broken, capsys, workers):
    result = evaluate(Args("pixels", "predict", data="photos", workers=workers))
    assert result == {"n": 8, "unreadable": 2}
    assert "8 images, 2 of them cannot be read" in capsys.readouterr().out
    with open("runs/pixels/predictions-photos.csv", newline="") as file:
        rows = {row["path"]: (row["class"], row["probability"]) for row in csv.DictReader(file)}
    assert [path for path in rows if rows[path] == ("", "")] == ["b.jpg", "sub/empty.png"]
    assert all(rows[path][0] in ("cat", "fox") for path in ("a.jpg", "sub/g.jpg"))
    assert evaluate(Args("pixels", "features", data="photos", side=8, workers=workers))["unreadable"] == 2
    written = torch.load("runs/pixels/features-photos.pt", weights_only=True)
    lost = written["features"].isnan().all(dim=1)
    assert [os.path.relpath(written["items"][i], "photos") for i in lost.nonzero()] == [
        "b.jpg",
        "sub/empty.png",
    ]
    assert written["features"][~lost].isfinite().all()


@pytest.mark.parametrize("mode", ["knn", "logreg", "linear", "finetune"])
def test_learning_refuses_unreadable_files(broken, mode):
    args = Args("pixels", mode, data="photos", labels_csv="labels.csv", side=8, workers=0, epochs=1)
    refused(r"1 of \d images cannot be read, first photos/b.jpg; mend them", evaluate, args)


def test_finetune_refuses_unreadable_test_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, *(f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(4)))
    (tmp_path / "val/a/0.png").write_text("no image")
    args = Args("pixels", "finetune", data=".", side=8, workers=0, epochs=1)
    refused("1 of 8 images cannot be read, first ./val/a/0.png", evaluate, args)


def test_results_of_other_data_have_their_own_names(photos_folder, tmp_path):
    labelled("\n".join(LINES))
    os.rename("labels.csv", "first.csv")
    labelled("\n".join(LINES).replace("a.jpg,cat", "a.jpg,fox"))
    base = Args("pixels", "logreg", data="photos", side=8, workers=0)
    for name in ("first.csv", "labels.csv"):
        evaluate(replace(base, labels_csv=name))
    evaluate(replace(base, data="demo", labels=20))
    folder = tmp_path / "runs/pixels"
    names = {
        f"{kind}-logreg-{of}" for kind in ("eval", "head") for of in ("demo", "photos-first", "photos-labels")
    }
    assert {path.stem for path in folder.iterdir()} == names
    assert json.loads((folder / "eval-logreg-photos-first.json").read_text())["labels_csv"] == "first.csv"
    evaluate(replace(base, mode="predict", head=str(folder / "head-logreg-photos-first.pt"), out="there"))
    evaluate(replace(base, mode="knn", labels_csv="first.csv", out="there"))
    assert {p.name for p in (tmp_path / "there").iterdir()} == {
        "pixels-predictions-photos.csv",
        "pixels-eval-knn-photos-first.json",
    }
    # the newest head is taken, and said
    os.utime(folder / "head-logreg-photos-first.pt", (2e9, 2e9))
    evaluate(replace(base, mode="predict"))
    assert (folder / "predictions-photos.csv").read_text() == open(
        "there/pixels-predictions-photos.csv"
    ).read()


def test_a_folder_that_cannot_be_written_to_is_said_before_the_work(photos_folder, monkeypatch):
    monkeypatch.setattr(eval_linear, "extract_features", lambda *a, **k: pytest.fail("this is the work"))
    (photos_folder.parent / "file").touch()
    labelled("\n".join(LINES))
    for mode in ("features", "knn"):
        args = Args("pixels", mode, data="photos", labels_csv="labels.csv", workers=0)
        refused(
            "file/x.* cannot be written .Not a directory.; --out names", evaluate, replace(args, out="file/x")
        )
        refused("/proc/x.* cannot be written", evaluate, replace(args, out="/proc/x"))
        refused("cannot be written .File name too long", evaluate, replace(args, out="x" * 300))
    refused(
        "--backbone pixel: no such file, nor a network of torchvision",
        evaluate,
        replace(args, backbone="pixel"),
    )
    assert not (photos_folder.parent / "runs").exists()  # nothing is left of it


def test_a_kill_while_writing_leaves_the_old_file(broken, monkeypatch):
    args = Args("pixels", "predict", data="photos", workers=0)
    evaluate(args)
    before = open("runs/pixels/predictions-photos.csv").read()
    Image.new("RGB", (9, 9)).save("photos/z.png")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    refused("interrupted", evaluate, args)
    assert open("runs/pixels/predictions-photos.csv").read() == before


def test_a_full_disk_while_writing(broken, monkeypatch):
    """torch.save hides it behind a RuntimeError; one line, and no temporary file is left."""
    base = Args("pixels", "features", data="photos", side=8, workers=0)

    def full(content, path):
        path.write_text("half of it")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    refused("features-photos.pt: cannot be written .*No space left on device", evaluate, base)
    assert not list(broken.parent.rglob("*.tmp"))


def test_folds_of_unequal_size_are_counted_together(tmp_path, monkeypatch):
    """Four folds of 2 images that are right and one of 16 that is wrong: 8 of 24, not 80 %."""
    data = eval_linear.Labelled(
        tuple(range(24)),
        torch.arange(24) % 2,
        ["a", "b"],
        torch.tensor([0] * 16 + [1, 1, 2, 2, 3, 3, 4, 4]),
        None,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_linear, "read_labels", lambda *_: data)

    def answer(args, data, backbone, features, train, test, *_):
        right = torch.eye(2)[data.labels[test]]
        return {"knn": right if len(test) == 2 else 1 - right}, {}, None, None

    monkeypatch.setattr(eval_linear, "answer", answer)
    result = evaluate(Args("pixels", "knn", side=8, workers=0))
    assert result["n"] == 24 and result["top1"] == pytest.approx(100 * 8 / 24)


def test_what_is_held_out_is_a_tenth_in_whole_groups():
    """...and never all groups of a class; one large camera is learnt from, not kept out."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.cat([torch.zeros(900), 1 + torch.arange(600) // 20]).long()
    labels = torch.randint(0, 3, (1500,), generator=generator)
    held = eval_linear.held_out(labels, groups, 0)
    assert 20 <= held.sum() <= 300 and not held[:900].any()
    for group in groups.unique():
        assert held[groups == group].all() or not held[groups == group].any()
    for seed in range(20):
        labels[900:920] = 3  # a class of one camera
        assert not eval_linear.held_out(labels, groups, seed)[labels == 3].any()
    alone = eval_linear.held_out(torch.arange(1000) % 10, torch.arange(1000), 0)
    assert alone.sum() == 100 and ((torch.arange(1000) % 10)[alone].bincount() == 10).all()
    assert not eval_linear.held_out(torch.arange(10) % 2, torch.zeros(10).long(), 0).any()


def test_classes_of_the_test_images_alone_are_said(tmp_path, capsys):
    fill(tmp_path, *(f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    fill(tmp_path, "val/Cat/0.png", "val/dog/0.png")
    read_labels(str(tmp_path))
    assert "never learnt where they are tested, so never right: Cat\n" in capsys.readouterr().out


def test_folders_that_are_no_classes(tmp_path):
    fill(tmp_path / "a", "val/x/0.png", "test/x/1.png")
    refused("its folders are no classes; images to learn from go to train/", read_labels, str(tmp_path / "a"))
    fill(tmp_path / "b", "train/x/0.png", "train/y/0.png", "test/1.png")
    refused(
        "no class folder around .*/test/1.png; give --data .*/b/train, --labels-csv",
        read_labels,
        str(tmp_path / "b"),
    )
    fill(tmp_path / "c", ".store/cat/0.png", "dog/0.png", "elk/0.png")
    os.symlink(".store/cat", tmp_path / "c/cat")  # of a hidden folder, that is not reached otherwise
    assert read_labels(str(tmp_path / "c")).classes == ["cat", "dog", "elk"]
    refused("--data .*/nowhere: there is no such folder", eval_linear.image_paths, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_delimiter_is_the_one_that_finds_files(photos_folder, mark):
    """Labels may hold the others, quoted or not, in each row."""
    for other in ",;\t".replace(mark, ""):
        rows = [
            f"{name}.jpg{mark}{'red' if name in 'ace' else 'old'} fox{other} near{other} far"
            for name in "abcdef"
        ]
        expected = {
            f"{name}.jpg": f"{'red' if name in 'ace' else 'old'} fox{other} near{other} far"
            for name in "abcdef"
        }
        assert classes_of(labelled("\n".join(rows))) == expected
        assert classes_of(labelled("\n".join([f"path{mark}label", *rows]))) == expected


def test_flags_of_other_modes_are_refused():
    for mode, flags in (
        ("linear", {"base_lr": 0.1}),
        ("linear", {"mixup": 0.8}),
        ("logreg", {"rates": (0.1,)}),
        ("finetune", {"augment": True}),
        ("knn", {"head": "x.pt"}),
    ):
        name = next(iter(flags)).replace("_", "-")
        refused(
            f"--{name}: is for --mode .*, not {mode}; leave it out", evaluate, Args("pixels", mode, **flags)
        )


def test_backbones_side_by_side_have_their_own_results(photos_folder):
    labelled("\n".join(LINES))
    for name in ("one.pt", "two.pt", "backbone.pt"):
        torch.save({}, name)
        args = Args(name, "logreg", data="photos", labels_csv="labels.csv")
        stem = "" if name == "backbone.pt" else f"{name[:3]}-"
        assert str(eval_linear.result_path(args, "head-logreg.pt")) == f"{stem}head-logreg-photos-labels.pt"
        assert str(eval_linear.result_path(replace(args, data="."), "x.csv")) == f"{stem}x-here-labels.csv"
