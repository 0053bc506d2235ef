"""README.md and RESULTS.md: their commands parse, their links lead somewhere, their counts are right."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, TRAINING

PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "RESULTS.md")}
every_page = pytest.mark.parametrize("page", PAGES)


def commands(text):
    """(script, words) of each `python X.py ...` and torchrun line in the blocks of code."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```$", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:python|torchrun .*?) ?([\w/]+)\.py(.*)", line)
            if found and not line.startswith("python -"):
                yield found[1], shlex.split(found[2], comments=True)


@every_page
def test_commands_parse(page):
    of_scripts = [(name, words) for name, words in commands(PAGES[page]) if "/" not in name]
    assert len(of_scripts) > 10
    for name, words in of_scripts:
        tyro.cli(importlib.import_module(name).Args, args=words)
    for words in re.findall(r"`(--mode .+?)`", PAGES[page].replace("\n", " ")):
        tyro.cli(importlib.import_module("eval_linear").Args, args=shlex.split(words))


def test_a_wrong_flag_is_noticed():
    text = "```\npython simclr.py --data photos/   # a comment\npython simclr.py --restart\n```\n"
    (_, right), (_, wrong) = commands(text)
    assert right == ["--data", "photos/"]
    with pytest.raises(SystemExit):
        tyro.cli(importlib.import_module("simclr").Args, args=wrong)


@every_page
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("http")]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = ROOT / (file or page)
        assert target.exists(), link
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        heads = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
        assert not anchor or anchor in heads, link


def test_readme_counts_the_lines_of_each_file():
    counted = dict(re.findall(r"\[(\w+)\.py\]\(\1\.py\) \| (\d+) \|", PAGES["README.md"]))
    assert counted.keys() == set(TRAINING)
    for name, lines in counted.items():
        assert len(Path(ROOT / f"{name}.py").read_text().splitlines()) == int(lines), name


def test_readme_is_one_page():
    assert len(PAGES["README.md"].splitlines()) <= 180
