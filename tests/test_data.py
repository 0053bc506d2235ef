"""What is read, in which order, and what is refused (DESIGN 4 and 5): on simclr.py, of which the others have
Plumbing, and eval_linear.py the functions, to the letter (test_house.py)."""

import importlib
import io
import logging
import os
import pickle
import resource
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import TRAINING, Forked, metrics_of, stopped, tiny_args
from PIL import Image, TiffImagePlugin
from torch.utils.data import DataLoader, default_collate

import eval_linear
import simclr

SHAPE, CORNER = (48, 64), np.s_[:16, :20]  # a tenth of the pixels


def images_of(data, views=(), shortest=8, seed=0):
    return simclr.Images(simclr.Args(data=str(data), seed=seed), views, shortest)


def names_of(paths):
    assert isinstance(paths, np.ndarray) and paths.dtype.kind == "S" and [*paths] == sorted(paths)
    return [os.fsdecode(path) for path in paths]


def fill(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# Folders and data sets


def test_demo_images_are_a_small_balanced_world():
    data = images_of("demo").items
    images, labels = zip(*data, strict=True)
    assert all(image.size == (48, 48) and image.mode == "RGB" for image in images)
    assert {*labels} == {*range(10)} and max(Counter(labels).values()) < 500
    assert len(data) == len({image.tobytes() for image in images}) == 4096
    assert all(simclr.demo_image(index) == data[index] for index in range(9))
    for constant in ("THINGS", "IMAGE_ENDINGS", "TESTS"):
        assert getattr(eval_linear, constant) == getattr(simclr, constant)


def test_hidden_files_and_folders_are_no_photos():
    good = [f"photos/{name}" for name in "__z.bmp b.c/x.Jpeg train/IMG.JPG train/i.webp y@2.tif".split()]
    bad = "train/.ipynb_checkpoints/i0-checkpoint.png train/._IMG.jpg .thumbnails/x.jpg @eaDir/IMG/x.jpg"
    fill(*good, *(f"photos/{name}" for name in f"{bad} __MACOSX/train/x.jpg @x.jpg notes.txt".split()))
    os.mkdir("photos/folder.jpg")
    assert names_of(simclr.image_paths("photos")) == good
    fill(".cache/@old/photos/1.png", ".cache/@old/photos/.x/2.png")  # a root may be called anything
    for root in (".cache/@old/photos", os.path.abspath(".cache/@old/photos"), ".cache/@old/photos/.x"):
        assert len(simclr.image_paths(root)) == 1


def test_pictures_of_a_run_are_no_photos_and_a_folder_that_cannot_be_read_is_named(monkeypatch, capsys):
    """--data . with its own runs/ below; a disk has a lost+found of root's."""
    fill("a/0.png", "runs/simclr/views.png", "lost+found/1.png")
    Path("runs/simclr/metrics.jsonl").touch()
    assert names_of(simclr.image_paths(".")) == ["./a/0.png", "./lost+found/1.png"]
    Path("metrics.jsonl").touch()  # beside the photos it says nothing
    assert names_of(simclr.image_paths(".")) == ["./a/0.png", "./lost+found/1.png"]
    scandir = os.scandir

    def refuse(folder):
        if b"lost" in folder:
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names_of(simclr.image_paths(".")) == ["./a/0.png"]
    assert "Permission denied: b'./lost+found'" in capsys.readouterr().out


def test_links_are_followed_and_no_folder_counts_twice():
    plain = [f"photos/{name}.png" for name in ("a/0", "a/1", "a/2", "b/c/0", "b/c/1")]
    fill(*plain, "outside/0.png", "outside/d/1.png", "single.png", "photos/.store/0.png")
    os.symlink("../photos", "outside/back")
    for link, target in (("a/back", ".."), ("a/to", "../b"), ("b/to", "../a"), ("0", "b/c"), ("z", "b/c")):
        os.symlink(target, f"photos/{link}")
        assert names_of(simclr.image_paths("photos")) == plain
    for link in ("two", "one"):
        os.symlink("../outside", f"photos/{link}")
        paths = names_of(simclr.image_paths("photos"))
        assert paths == [*plain, f"photos/{link}/0.png", f"photos/{link}/d/1.png"]
    os.symlink("../single.png", "photos/file.png")
    os.symlink(".store", "photos/shown")  # not reached otherwise
    os.symlink("photos", "root")
    found = names_of(simclr.image_paths("root"))
    assert len(found) == 9 and {"root/file.png", "root/shown/0.png"} < {*found}


def test_images_to_test_on_are_left_out_and_that_is_said(capsys, monkeypatch):
    fill(*(f"vehicles/{name}/0.png" for name in ("bus", "car", "train")))  # a class of trains
    fill("albums/a/train/0.png", "albums/a/val/0.png", "albums/b/test/0.png", "albums/val/0.png")
    for data, count in (("vehicles", 3), ("albums", 4)):
        assert len(images_of(data).items) == count and not capsys.readouterr().out

    for train, test in (("train", "val"), ("Training", "Testing")):
        folders = (train, "unlabeled", f"{test} images")  # the last begins alike
        learnt = [f"{train}-set/{name}/{i}.png" for name in folders for i in range(2)]
        fill(*learnt, *(f"{train}-set/{test}/x/{i}.png" for i in range(5)))
        assert names_of(images_of(f"{train}-set").items) == sorted(learnt)
        assert capsys.readouterr().out == f"5 images in {train}-set/{test} are left out\n"
    monkeypatch.setattr(simclr.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(simclr.dist, "get_rank", lambda: 1)
    assert names_of(images_of("train-set").items) and not capsys.readouterr().out


def test_data_without_images_is_refused_in_a_line():
    fill("phone/1.heic", "phone/a/2.heic", os.fsdecode(b"phone/3.\xff"), "empty/.hidden/0.png")
    endings = r"\.jpg .*\.webp .*\.tiff, found \.heic"
    stopped(lambda: images_of("phone"), f"^--data phone: no images found; reads {endings}")
    stopped(lambda: images_of("empty"), "^--data empty: no images found.* found nothing")
    stopped(lambda: images_of("photo/"), "^--data photo/: no such folder, no download .*; give a folder, or")
    stopped(lambda: simclr.image_paths("photo"), "^--data photo: there is no such folder")


def test_data_sets_of_torchvision(monkeypatch, capsys):
    pictures = [(Image.new("L", (20, 20), 10 * i), 0) for i in range(5)]
    pictures[3] = ("broken", 0)
    download = mock.Mock(return_value=pictures)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    pixels, index = images_of("CIFAR10", (torch.clone,))[7]
    assert index == 2 and pixels.shape == (3, 20, 20) and (pixels == 20).all()
    assert images_of("CIFAR10")[3] == (4,)
    assert capsys.readouterr().err.startswith("CIFAR10[3] cannot be read, the next takes its place")
    download.assert_called_with("data", download=True)
    download.side_effect = OSError("<urlopen error [Errno -2]\nName or service not known>")
    stopped(lambda: images_of("CIFAR10"), "^--data CIFAR10: .* not known.*; give a folder, or demo$")


# Pictures


def read(source, shortest=8):
    """Pixels (H, W, 3) as signed integers; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = simclr.read_image(source, shortest)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def tiff(values, order="<", orientation=1, nodata=None):
    """An open uncompressed TIFF of any numbers (H, W) or (H, W, samples); Pillow writes few kinds."""
    height, width, samples = *values.shape[:2], values[0, 0].size
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    fields = TiffImagePlugin.ImageFileDirectory_v2(head)
    facts = {256: width, 257: height, 258: (8 * values.itemsize,) * samples, 259: 1, 262: 1 + (samples == 3)}
    facts |= {273: 0, 274: orientation, 277: samples, 278: height, 279: len(pixels)}
    facts |= {339: ("_uif".index(values.dtype.kind),) * samples} | ({42113: nodata} if nodata else {})
    fields.update(facts)
    return io.BytesIO(head + fields.tobytes(8) + pixels)


def check_deep(dtype, low, high, places=(), hole=None, becomes=None, top=None, nodata=None):
    """Columns from low to high, with `hole` in some places, become what is evenly between low and top."""
    line = np.linspace(low, high, SHAPE[1])
    values = np.tile((line if dtype == "f4" else line.round()).astype(dtype), (SHAPE[0], 1))
    expected = (values.astype(float) - low) / ((top or high) - low) * 255
    for place in places:
        values[place], expected[place] = hole, becomes
    files = [tiff(values, order, nodata=nodata) for order in "<>"]
    if dtype == "u2" and not nodata:
        Image.fromarray(values).save("sixteen.png")
        files.append("sixteen.png")
    for file in files:
        error = abs(read(file)[..., 0] - expected)
        assert error.max() <= 1 + bool(places), (dtype, low, high, hole, nodata)
        assert places or error.mean() < 0.3  # rounded
        assert becomes != 0 or not error[places[0]].any()  # quite black


def test_deep_pictures_are_stretched_to_their_range():
    """From end to end, and evenly between, in both byte orders."""
    cases = [("u2", 0, 65535), ("u2", 0, 4095), ("u2", 1000, 1100), ("f4", 0, 1), ("f4", -1e-4, 3e-4)]
    cases += [("i2", -1000, 2000), ("i4", -1000, 2000), ("i4", 0, 255), ("i4", 0, 10**6)]
    for dtype, low, high in cases:
        check_deep(dtype, low, high)


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4"])
def test_a_few_hot_pixels_do_not_darken_the_rest(dtype):
    few, some = [(7, 9), (9, 7)], [np.s_[8:12, 8:12]]
    check_deep(dtype, 200, 300, few, 65535, 255)
    check_deep(dtype, 200, 300, few, 0, 0)
    check_deep(dtype, 200, 300, some, 1000, 255, top=1000)  # .5 % are no error, they are in the range


def test_deep_pictures_without_contrast_are_gray():
    for dtype, value in (("u2", 0), ("u2", 1000), ("i4", -5), ("i4", 70000), ("f4", 0.5), ("f4", np.nan)):
        values = np.full(SHAPE, value, dtype)
        assert {*read(tiff(values)).flat} == {128}, (dtype, value)
        values[20, 30] += 100  # both percentiles are the same: from min to max
        pixels = read(tiff(values))[..., 0]
        assert np.isnan(value) or pixels[20, 30] == pixels.sum() == 255, (dtype, value)


def test_holes_are_black_and_leave_the_contrast_of_the_rest():
    holes = [(dtype, -9999, tag) for dtype in ("i2", "i4", "f4") for tag in (None, "-9999")]
    holes += [("u2", 65535, "65535"), ("u2", 250, "250")]  # not white; within the range of the rest
    holes += [("f4", -3.4028234663852886e38, "-3.40282346638529e+38"), ("f4", 1e20, "1e+20")]  # as float32
    holes += [("f4", hole, tag) for hole in (np.nan, np.inf, -np.inf) for tag in (None, "nan")]
    for dtype, hole, tag in holes:
        check_deep(dtype, 200, 300, [CORNER], hole, 0, nodata=tag)


def test_eight_bits_are_left_as_they_are():
    values = np.random.default_rng(0).integers(30, 90, (*SHAPE, 3), "u1")
    gray, palette = values[..., :1], Image.fromarray(values).quantize(40)
    for name in ("gray.png", "gray.bmp"):
        Image.fromarray(values[..., 0]).save(name)
    Image.fromarray(values[..., 0] > 60).save("bits.png")
    Image.fromarray(values).save("color.png")
    palette.save("palette.png")
    cases = [("palette.png", np.asarray(palette.convert("RGB"))), ("bits.png", 255 * (gray > 60))]
    cases += [(source, gray) for source in ("gray.png", "gray.bmp", tiff(gray))]
    with open("color.png", "rb") as file:
        cases += [(source, values) for source in (b"color.png", Path("color.png"), file, tiff(values))]
        for source, expected in cases:
            assert (read(source) == expected).all(), source


def test_what_is_transparent_is_white():
    """Columns: nothing is seen of the first, half of the second, all of the third; files that know one
    transparent colour have only the first."""
    colors, alpha = np.uint8([[[250, 10, 20], [40, 80, 160], [5, 6, 7]]] * 4), np.uint8([[0, 128, 255]] * 4)
    gray, color = Image.fromarray(colors[..., 1]), Image.fromarray(np.dstack([colors, alpha]))
    palette = Image.fromarray(np.uint8([[0, 1, 2]] * 4))
    palette.putpalette(colors[0].tobytes())
    color.save("half-color.png")
    color.save("half-color.webp", lossless=True, exact=True)
    Image.merge("LA", [gray, Image.fromarray(alpha)]).save("half-gray.png")
    palette.save("half-palette.png", transparency=bytes([0, 128, 255]))
    palette.save("one-palette.png", transparency=0)
    Image.fromarray(colors).save("one-color.png", transparency=(250, 10, 20))
    gray.save("one-gray.png", transparency=10)
    for path in sorted(Path().iterdir()):
        kept = colors[..., [1, 1, 1]] if "gray" in path.stem else colors
        share = alpha if "half" in path.stem else np.where(alpha, 255, 0)
        blend = 255 + (kept - 255.0) * share[..., None] / 255
        assert (abs(read(path) - blend).max(axis=(0, 2)) <= [0, 1, 0]).all(), path


def test_pictures_are_upright():
    """All that turn, of JPEG, PNG and raw TIFF, which Pillow would map into memory."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    upright, exif = np.uint8(np.dstack([4 * x, 5 * y, 99 + 0 * x])), Image.Exif()
    for orientation, method in enumerate((0, 3, 1, 5, 2, 6, 4), 2):  # of Image.Transpose, undone
        stored = Image.fromarray(upright).transpose(method)
        exif[0x0112] = orientation
        stored.save("photo.jpg", exif=exif, quality=100, subsampling=0)
        assert abs(read("photo.jpg", 48) - upright).max() <= 4, orientation
        assert read("photo.jpg", 12).shape == (12, 16, 3), orientation

        values, red = np.asarray(stored), upright[..., :1]
        deep = values[..., 0] * np.uint16(9)
        for raw, expected in ((values, upright), (values[..., 0], red), (deep, red * (255 / 252))):
            Path("raw.tif").write_bytes(tiff(raw, orientation=orientation).getvalue())
            Image.fromarray(raw).save("raw.png", exif=exif)
            for path in ("raw.tif", "raw.png"):
                assert abs(read(path) - expected).max() <= (raw is deep), (orientation, path)


def test_large_jpegs_are_decoded_smaller_but_not_too_small():
    photo = Image.new("RGB", (1600, 1200))
    photo.paste((255, 100, 0), (800, 0, 1600, 1200))
    photo.save("photo.jpg")
    photo.convert("CMYK").save("ink.jpg")
    photo.resize((2400, 320)).save("wide.jpg")
    photo.resize((320, 2400)).save("tall.jpg")
    for path in ("photo.jpg", "ink.jpg", "wide.jpg", "tall.jpg"):
        width, height = Image.open(path).size
        for shortest in (30, 100, 150, 150.5, 160, 320, 601, 5000):
            share = max([n for n in (1, 2, 4, 8) if min(width, height) / n >= shortest], default=1)
            pixels = read(path, shortest)
            assert pixels.shape == (height // share, width // share, 3), (path, shortest)
            left, right = np.split(pixels, 2, axis=1)  # not of inverted colours
            assert left[:, :-8].max() < 30 and abs(right[:, 8:] - [255, 100, 0]).max() < 30, (path, shortest)


# Files that cannot be read, in a line each


# 35 bytes: a screen of any size in two colours, with a picture of one pixel
GIF = b"GIF89a%b\x80" + bytes(8) + b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;"


@pytest.fixture
def bad():
    """photos: 0, black, and 6, white, with a file of each kind of bad ones; these."""
    Path("photos/z.jpg").mkdir(parents=True)  # no photo at all
    Image.new("RGB", (40, 30), "black").save("photos/0.png")
    Image.new("RGB", (40, 30), "white").save(os.fsdecode(b"photos/6\xff.png"))
    Image.effect_noise((400, 300), 50).save("photos/1.jpg")
    os.truncate("photos/1.jpg", os.path.getsize("photos/1.jpg") // 2)
    Path("photos/2.jpg").write_text("I am no image")
    Path("photos/4.tif").write_bytes(tiff(np.ones((*SHAPE, 13), "u1")).getvalue())
    Path("photos/5.png").write_bytes(GIF % struct.pack("<HH", 20000, 20000))
    fill("photos/3.png", os.fsdecode(b"photos/\xff.jpg"))
    return [f"photos/{name}" for name in ("1.jpg", "2.jpg", "3.png", "4.tif", "5.png", r"\xff.jpg")]


def assert_named_once(text, bad):
    lines = sorted(text.splitlines())
    assert len(lines) == len(bad) and " <" not in text, text
    for line, path in zip(lines, bad, strict=True):
        assert line.startswith(f"{path} cannot be read, the next takes its place: "), line


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_named_once_and_the_next_takes_their_place(bad, workers):
    """All that is written: no source line of Python, and none of Pillow's log."""
    images = images_of("photos", (torch.clone,))

    def draw(rank):
        logging.getLogger().handlers.clear()  # pytest would take it, and warnings
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        loader = DataLoader(images, None, sampler=[*range(8, 16), *range(8)], num_workers=workers)
        return [(index, pixels.unique().tolist()) for pixels, index in loader]

    (end,) = Forked(draw).end()
    black, white = (0, [0]), (6, [255])
    assert end.result == [black, *[white] * 6, black] * 2 and not end.stdout, end.stderr
    assert_named_once(end.stderr, bad)


def test_absurd_sizes_and_bad_files_raise_and_photos_of_phones_do_not(bad):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for path in bad[:5]:
        with pytest.raises(Exception, match=r"\w"):
            simclr.read_image(path, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert read(io.BytesIO(GIF % struct.pack("<HH", 20, 30))).shape == (30, 20, 3)
    Image.new("L", (16320, 12240), 99).save("phone.jpg")  # 200 megapixels; .1 s to read at 1/8
    assert read("phone.jpg").shape == (1530, 2040, 3)


def test_a_hundred_in_a_row_are_an_error(capfd):
    fill(*(f"photos/{i:03d}.jpg" for i in range(110)))
    with pytest.raises(OSError, match=r"100 files in a row cannot be read, the last is photos/104\.jpg"):
        images_of("photos")[5]
    assert len(capfd.readouterr().err.splitlines()) == 100


def test_an_error_of_a_view_is_not_one_of_the_file(capfd):
    """Whoever changes the augmentation sees a mistake of it as it is."""
    data = images_of("demo", views=(lambda pixels: pixels[7],))
    with pytest.raises(IndexError, match="out of bounds"):
        data[0]
    assert not data.broken and not capfd.readouterr().err


# Arrow


def test_arrow_files_give_what_a_folder_of_the_same_files_gives(capfd, monkeypatch):
    """Alone, or as train of a DatasetDict. Bad rows are named once."""
    import datasets

    def rows_of(images):
        rows = datasets.Dataset.from_dict({"image": images, "label": [*range(len(images))]})
        return rows.cast_column("image", datasets.Image())

    os.mkdir("photos")
    paths, exif = [f"photos/{i:02d}.jpg" for i in range(16)], Image.Exif()
    for i, path in enumerate(paths):
        exif[0x0112] = i % 8 + 1
        simclr.demo_image(i)[0].resize((160, 120)).save(path, exif=exif)
    rows = rows_of(paths)
    rows.save_to_disk("plain")
    datasets.DatasetDict(test=rows.take(7), train=rows).save_to_disk("split")
    capfd.readouterr()

    crops = [simclr.random_crop(16, 0.08)] * 2
    for name in ("plain", "split"):
        folder, arrow = images_of("photos", crops, 30), images_of(name, crops, 30)
        assert len(arrow.items) == len(folder.items) == 16
        for key in range(20):
            *expected, index = folder[key]
            *views, other = arrow[key]
            assert index == other == key % 16
            assert all(torch.equal(*pair) for pair in zip(views, expected, strict=True)), (name, key)
        assert images_of(name, (torch.Tensor.size,), 30)[5] == ((3, 40, 30), 5)  # upright, of a JPEG at 1/4
    assert not capfd.readouterr().err

    rows = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths[:5]]
    rows[1]["bytes"], rows[3]["bytes"] = b"rubbish", rows[3]["bytes"][:2000]
    rows_of(rows).save_to_disk("bad")
    capfd.readouterr()
    images = images_of("bad")
    assert [images[key] for key in [*range(5)] * 2] == [(0,), (2,), (2,), (4,), (4,)] * 2
    assert_named_once(capfd.readouterr().err, ["bad[1]", "bad[3]"])

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk("text")
    stopped(lambda: images_of("text"), "^--data text: .*a column image")
    monkeypatch.setitem(sys.modules, "datasets", None)
    stopped(lambda: images_of("plain"), "^--data plain: .*`pip install datasets`")


# What a training draws


def test_views_depend_on_seed_epoch_and_index_alone(folder):
    crop = simclr.random_crop(16, 0.08)
    images = images_of(folder, (crop, crop))
    first, second, index = images[3]
    torch.manual_seed(99)
    assert index == images[43][2] == 3 and not torch.equal(first, second)
    assert torch.equal(images[3][0], first) and torch.equal(images[3][1], second)
    for other in (images[43], images_of(folder, (crop,), seed=1)[3]):  # the next epoch, another seed
        assert not torch.equal(other[0], first)


def test_workers_change_nothing(bad):
    """Of a run with files that cannot be read, to the bit."""
    for i in range(8):
        simclr.demo_image(i)[0].save(f"photos/a{i}.png")
    flags = {"data": "photos", "batch_size": 8, "epochs": 2, "image_size": 16}
    for workers in (0, 2):
        torch.manual_seed(workers)  # whatever was drawn before
        simclr.train(tiny_args("simclr", workers=workers, run_dir=f"run{workers}", **flags))
    assert len(metrics_of("run0")) == 4 and metrics_of("run0") == metrics_of("run2")
    assert Path("run0/backbone.pt").read_bytes() == Path("run2/backbone.pt").read_bytes()


@pytest.mark.parametrize("script", TRAINING)
def test_workers_can_be_spawned_and_decode_as_large_as_crops_need(script, folder, monkeypatch):
    """Where they are spawned (macOS, Windows) they get a pickled copy of the data; it draws the same."""
    module = importlib.import_module(script)
    begin = mock.create_autospec(module.Images.__init__, side_effect=module.Images.__init__)
    loader = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(module.Images, "__init__", begin)
    monkeypatch.setattr(module, "DataLoader", loader)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        module.train(tiny_args(script, data=str(folder), min_scale=0.08, run_dir="run"))
    assert begin.call_args_list[0].args[3] == pytest.approx(32 / 0.06**0.5)

    data = loader.call_args.args[0]
    copy = pickle.loads(pickle.dumps(data))
    batches = [default_collate([images[3], images[41]]) for images in (data, copy)]
    ours, theirs = (torch.utils._pytree.tree_leaves(batch) for batch in batches)
    assert len(ours) > 1 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
