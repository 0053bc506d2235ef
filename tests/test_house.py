"""The rules that keep the scripts alike (DESIGN section 2), over every script in the root folder."""

import ast
import builtins
import collections
import importlib
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, TRAINING, run

SECTIONS = ["Args", "Augmentation", "Model", "Loss", "Optimiser", "Monitor", "Plumbing", "Training"]
LINES = {"convert": 250, "beit": 969, "clip": 1134, "dinov2": 1041}
# above DESIGN's budgets: eval_linear (600) has any labels, backbones and heads, see RESULTS.md; the rest is
# of the first edition: Plumbing of 230 lines (--init, clear words for a damaged run folder, not-finite.txt),
# each of three tasks 60, a second stage 150, clip's text, pairs, zero-shot and --classify 340
LINES |= {
    "pretext": 825,
    "simclr": 680,
    "mae": 674,
    "byol": 669,
    "moco": 699,
    "moco_v3": 800,
    "dino": 840,
    "eval_linear": 1258,
    "ijepa": 757,
}
PACKAGES = {"torch", "torchvision", "timm", "einops", "tyro", "tensorboard", "tqdm"}
PUBLIC = {  # DESIGN section 7
    "all": "collapse_metrics save_checkpoint load_checkpoint export_backbone cosine_schedule",
    "simclr": "SimCLR nt_xent LARS",
    "beit": "DVAE BEiT block_mask",
    "byol": "BYOL byol_loss momentum_update LARS",
    "clip": "CLIP clip_loss tokenize zero_shot_classifier",
    "dino": "VisionTransformer DINOHead dino_loss update_center dino_schedule momentum_update",
    "dinov2": "DINOv2 DINOv2ViT dino_losses ibot_loss koleo_loss sinkhorn_knopp draw_masks momentum_update",
    "ijepa": "IJEPA multiblock_masks apply_masks target_features ijepa_loss ijepa_schedule momentum_update",
    "mae": "MAE patchify unpatchify random_masking mae_loss",
    "moco": "MoCo info_nce enqueue momentum_update",
    "moco_v3": "MoCoV3 MoCoViT ctr momentum_update LARS",
    "pretext": "rotate_batch jigsaw_permutations jigsaw_tiles rgb_to_lab lab_to_rgb ab_gamut",
}
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
every_training_script = pytest.mark.parametrize("script", TRAINING)


def definitions(path):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def args_fields(path):
    """{name: (type, help)} of the fields of Args; the help is the comment at the end of the field's line.

    A closing "(paper: ...)" is left out: it differs between methods (DESIGN 3), the rest may not (DESIGN 2).
    """
    lines = path.read_text().splitlines()
    fields = [node for node in definitions(path)["Args"].body if isinstance(node, ast.AnnAssign)]
    comments = [lines[field.end_lineno - 1].partition("  # ")[2] for field in fields]
    helps = [re.sub(r" \(paper: .*\)$", "", comment) for comment in comments]
    return {f.target.id: (ast.unparse(f.annotation), help) for f, help in zip(fields, helps, strict=True)}


def test_there_are_scripts():
    assert "simclr" in TRAINING


@every_script
def test_imports_no_other_script(path):
    names = {other.stem for other in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in names


def assert_same_bodies(paths):
    bodies = collections.defaultdict(dict)
    for path in paths:
        for name, node in definitions(path).items():
            if name not in ("Args", "train"):
                bodies[name][path.name] = ast.unparse(node)
    for name, by_script in bodies.items():
        assert len(set(by_script.values())) == 1, f"{name} differs between {sorted(by_script)}"


def assert_same_fields(paths):
    fields = collections.defaultdict(dict)
    for path in paths:
        if "Args" in definitions(path):
            for name, field in args_fields(path).items():
                fields[name][path.name] = field
    for name, by_script in fields.items():
        assert name == "arch" or len(set(by_script.values())) == 1, f"--{name} differs: {by_script}"


def test_same_name_same_body():
    assert_same_bodies(SCRIPTS)


def test_same_flag_same_type_and_help():
    assert_same_fields(SCRIPTS)


def test_the_rules_notice_a_difference(tmp_path):
    text = (ROOT / "simclr.py").read_text()
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "b.py").write_text(text.replace("1e-7", "1e-8").replace("    # why", ""))
    with pytest.raises(AssertionError, match="collapse_metrics differs"):
        assert_same_bodies(sorted(tmp_path.glob("*.py")))
    (tmp_path / "b.py").write_text(text.replace("# width of z", "# width"))
    assert_same_bodies(sorted(tmp_path.glob("*.py")))
    with pytest.raises(AssertionError, match="--proj_dim differs"):
        assert_same_fields(sorted(tmp_path.glob("*.py")))


@every_script
def test_every_flag_has_help(path):
    if "Args" in definitions(path):
        assert all(help for _, help in args_fields(path).values())


@every_training_script
def test_plumbing_is_the_same_everywhere(script):
    def plumbing(name):
        return re.search(r"# --- Plumbing.*?(?=# --- Training)", (ROOT / f"{name}.py").read_text(), re.S)[0]

    assert plumbing(script) == plumbing("simclr")


@every_training_script
def test_sections_stand_in_order(script):
    banners = re.findall(r"^# --- (\w+) -+$", (ROOT / f"{script}.py").read_text(), re.M)
    assert banners == [name for name in SECTIONS if name in banners]
    assert set(SECTIONS) - set(banners) <= {"Optimiser"}


@every_script
def test_length(path):
    assert len(path.read_text().splitlines()) <= LINES.get(path.stem, 600)


def test_ruff():
    for words in (["format", "--check"], ["check"]):
        result = run([sys.executable, "-m", "ruff", *words, ROOT])
        assert result.returncode == 0, result.stdout


@every_script
def test_inline_metadata(path):
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    metadata = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.M))
    assert metadata["requires-python"] == ">=3.10"
    named = {re.match(r"\w+", dependency)[0] for dependency in metadata["dependencies"]}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
            if node.module == "torch.utils.tensorboard":
                imported.add("tensorboard")
    assert named == imported & PACKAGES  # PIL comes with torchvision


@every_script
def test_last_lines_are_the_main_guard(path):
    guard, call = path.read_text().splitlines()[-2:]
    assert guard == 'if __name__ == "__main__":' and "tyro.cli(Args" in call


@every_script
def test_a_copy_alone_imports_silently(path, tmp_path):
    shutil.copy(path, tmp_path)
    code = (
        f"import {path.stem} as m, threading; assert threading.active_count() == 1; assert callable(m.Args)"
    )
    result = run([sys.executable, "-B", "-W", "error::UserWarning", "-c", code], cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@every_script
def test_help_opens_offline(path, tmp_path):
    code = (
        "import socket, sys, runpy\n"
        "def refuse(*_, **__): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import os; os.environ['COLUMNS'] = '200'\n"
        f"sys.argv = [{path.name!r}, '--help']\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')\n"
    )
    result = run([sys.executable, "-c", code], cwd=tmp_path)
    assert result.returncode == 0 and "--data" in result.stdout and not list(tmp_path.iterdir())
    text = ast.get_docstring(ast.parse(path.read_text()))
    shown = [line.strip() for line in result.stdout.splitlines()]
    assert all(line.strip() in shown for line in text.splitlines())  # commands and formulas as they stand


def pasted(path, name):
    """`name` as someone pastes it: import lines, and the helpers named after 'Uses' in its docstring."""
    tree, found, wanted = ast.parse(path.read_text()), {}, [name]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in ast.walk(node.targets[0]):
                if isinstance(target, ast.Name):
                    found[target.id] = node
    nodes = []
    for wish in wanted:
        node = found[wish]
        if node not in nodes:
            nodes.append(node)
        if not isinstance(node, ast.Assign):
            named = re.search(r"Uses ([\w, \n]+)\.", ast.get_docstring(node) or "")
            wanted += (
                [other for other in re.findall(r"\w+", named[1]) if other not in wanted] if named else []
            )
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in imports + nodes)


def unresolved(source):
    """Global names that the code reads and that neither it nor Python defines."""
    namespace, names = {}, set()

    def visit(code):
        import dis

        names.update(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                visit(constant)

    code = compile(source, "pasted", "exec")
    exec(code, namespace)
    visit(code)
    return {
        name for name in names if name not in namespace and not hasattr(builtins, name) and name[:2] != "__"
    }


@every_training_script
def test_public_names_survive_pasting(script):
    path = ROOT / f"{script}.py"
    for name in f"{PUBLIC['all']} {PUBLIC.get(script, '')}".split():
        missing = unresolved(pasted(path, name)) - {"super"}
        assert not missing, f"{name} of {script}.py needs {missing}: name them in its docstring after 'Uses'"


def test_pasting_notices_a_missing_helper():
    source = pasted(ROOT / "simclr.py", "nt_xent").replace("def gather(", "def other(")
    assert unresolved(source) == {"gather"}


@every_training_script
def test_docstring_commands_parse(script):
    """The docstring has three commands (DESIGN 3), and the parser takes each of them."""
    import tyro

    module = importlib.import_module(script)
    commands = re.findall(rf"(?:python|torchrun [^\n]*?) ?{script}\.py(.*?)(?<!\\)\n", module.__doc__, re.S)
    assert len(commands) >= 3
    for words in commands:
        assert tyro.cli(module.Args, args=words.replace("\\\n", " ").split())
    assert commands[0].strip() == ""


def test_readme_shows_the_two_commands_first():
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("pip install")


def test_deprecated_calls_of_every_script_are_errors():
    """What pyproject.toml makes of warnings, for a call at the top of a module of that name."""
    for path in SCRIPTS:
        for category in (DeprecationWarning, FutureWarning):
            with pytest.raises(category):
                warnings.warn_explicit("old", category, f"{path.stem}.py", 1, module=path.stem)


def test_nothing_of_the_shared_data_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in files if Path(name).suffix in (".jpg", ".jpeg", ".pt")]
