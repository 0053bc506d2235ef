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
from conftest import REPRESENTATIVES, ROOT, SCRIPTS, TRAINING, run

SECTIONS = ["Args", "Augmentation", "Model", "Loss", "Optimiser", "Monitor", "Training", "Plumbing"]
# above DESIGN's budgets: eval_linear (600) has any labels, backbones and heads, see RESULTS.md; the others,
# by what Plumbing has above 225 lines; beit, clip, dino, dinov2, pretext by more
LINES = {"convert": 250, "eval_linear": 1287}
# of the training scripts, in all and before Plumbing; of functions (DESIGN 2.4)
LINES |= {
    "beit": 982,
    "byol": 799,
    "clip": 1027,
    "dino": 947,
    "dinov2": 1065,
    "ijepa": 831,
    "mae": 796,
    "moco": 811,
    "moco_v3": 831,
    "pretext": 940,
    "simclr": 789,
}
FRONT = {
    "beit": 555,
    "byol": 372,
    "clip": 600,
    "dino": 520,
    "dinov2": 638,
    "ijepa": 404,
    "mae": 369,
    "moco": 384,
    "moco_v3": 404,
    "pretext": 513,
    "simclr": 362,
}
TRAIN = {"ijepa": 120, "dino": 120, "pretext": 120, "beit": 90, "clip": 135, "dinov2": 135}
FUNCTION, CHARACTERS, PARAGRAPH = 45, 58, 12
PACKAGES = {"torch", "torchvision", "timm", "einops", "tyro", "tensorboard", "tqdm"}
PUBLIC = {  # DESIGN section 7
    "all": "collapse_metrics save_checkpoint cosine_schedule seeded gather read_image",
    "plumbing": "open_run log_metrics save_run demo_image Images",  # pasted with all of it
    "simclr": "SimCLR nt_xent LARS random_crop augment resnet monitor",
    "beit": "DVAE BEiT block_mask random_crop mask_view jitter_colors gumbel_noise dvae_loss beit_loss "
    "tokenizer_monitor monitor",
    "byol": "BYOL byol_loss momentum_update LARS random_crop augment resnet head monitor",
    "clip": "CLIP clip_loss tokenize zero_shot_classifier recall pair_statistics monitor read_table",
    "dino": "VisionTransformer DINOHead DINO dino_loss update_center dino_schedule momentum_update "
    "random_crop multi_crop augment augment_crops target_moments monitor attention_page",
    "dinov2": "DINOv2 DINOv2ViT dino_losses ibot_loss koleo_loss sinkhorn_knopp draw_masks momentum_update "
    "random_crop multi_crop augment augment_crops to_timm move_center parameter_groups target_moments "
    "monitor",
    "ijepa": "IJEPA multiblock_masks apply_masks target_features ijepa_loss momentum_update random_crop "
    "monitor masks_picture",
    "mae": "MAE patchify unpatchify random_masking pixel_targets mae_loss random_crop monitor reconstruction",
    "moco": "MoCo info_nce enqueue momentum_update random_crop augment resnet monitor",
    "moco_v3": "MoCoV3 MoCoViT mlp_head ctr momentum_update random_crop augment monitor",
    "pretext": "rotate_batch jigsaw_permutations jigsaw_tiles rgb_to_lab lab_to_rgb ab_gamut soft_bins "
    "colour_weights annealed_mean cross_entropy random_crop central_square normalize resnet monitor",
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
    """And one of them runs what is marked as shared."""
    assert len(TRAINING) == 11 and len(REPRESENTATIVES & set(TRAINING)) == 1


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
            if name not in ("Args", "train", "monitor"):  # which each method has
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
    text = (ROOT / "dinov2.py").read_text()
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "b.py").write_text(text.replace("1e-7", "1e-8").replace("    # why", ""))
    with pytest.raises(AssertionError, match="collapse_metrics differs"):
        assert_same_bodies(sorted(tmp_path.glob("*.py")))
    (tmp_path / "b.py").write_text(text.replace("# width of the head's hidden layers", "# width"))
    assert_same_bodies(sorted(tmp_path.glob("*.py")))
    with pytest.raises(AssertionError, match="--head_dim differs"):
        assert_same_fields(sorted(tmp_path.glob("*.py")))


@every_script
def test_every_flag_has_help(path):
    if "Args" in definitions(path):
        assert all(help for _, help in args_fields(path).values())


def assert_order(path):
    banners = re.findall(r"^# --- (\w+) -+$", path.read_text(), re.M)
    assert banners == [name for name in SECTIONS if name in banners], f"order of {banners}"
    missing = set(SECTIONS) - set(banners)
    assert missing <= {"Optimiser"}, f"no section {missing}"


@every_training_script
def test_sections_stand_in_order(script):
    assert_order(ROOT / f"{script}.py")


@every_script
def test_length(path):
    assert len(path.read_text().splitlines()) <= LINES.get(path.stem, 600)


# The method in front, Plumbing behind (DESIGN 2)


def halves(path):
    """What stands before Plumbing; and Plumbing, without the main guard."""
    front, back = re.split(r"^(?=# --- Plumbing)", path.read_text(), flags=re.M)
    return front, back.partition("\nif __name__")[0]


def defined(node):
    """Names that a line of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {name.id for t in targets if t for name in ast.walk(t) if isinstance(name, ast.Name)}


def read_names(*nodes):
    names = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def assert_plumbing(paths):
    """To the letter the same. Nothing is dead, and no method hides there: the front of two scripts uses it,
    of one while there is but one, or else what they use."""
    parts = {path.name: halves(path) for path in paths}
    assert len({back for _, back in parts.values()}) == 1, f"Plumbing differs between {sorted(parts)}"
    fronts, back = [ast.parse(front) for front, _ in parts.values()], ast.parse([*parts.values()][0][1])
    users = collections.Counter(name for front in fronts for name in read_names(front))
    needed = {name for name, count in users.items() if count >= min(2, len(fronts))}
    for _ in back.body:
        needed |= read_names(*(node for node in back.body if defined(node) & needed))
    unused = set().union(*map(defined, back.body)) - needed
    assert not unused, f"in Plumbing, and used by fewer than two: {sorted(unused)}"

    called = {n.attr for tree in (*fronts, back) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    methods = {n.name for n in ast.walk(back) if isinstance(n, ast.FunctionDef) and n not in back.body}
    unused = {name for name in methods - called - read_names(back) if not name.startswith("__")}
    assert not unused, f"in Plumbing, and called by none: {sorted(unused)}"


def assert_front(path):
    """Nothing in front subclasses what stands behind; in Training stand train functions alone."""
    front, back = halves(path)
    behind = set().union(*map(defined, ast.parse(back).body))
    for node in ast.walk(ast.parse(front)):
        bases = read_names(*node.bases) if isinstance(node, ast.ClassDef) else set()
        assert not bases & behind, f"{node.name} subclasses {bases & behind} of Plumbing"
    for node in ast.parse(front[front.index("# --- Training") :]).body:
        assert isinstance(node, ast.FunctionDef) and node.name.startswith("train"), ast.unparse(node)[:80]


def train_loops(path):
    """(train function, its loop over the loader) for each but one that calls the others, of its stages."""
    functions = {name: node for name, node in definitions(path).items() if name.startswith("train")}
    for function in functions.values():
        if len(read_names(function) & set(functions)) > 1:
            continue
        loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
        loops = [node for node in loops if "loader" in read_names(node.iter)]
        assert len(loops) == 1, f"{function.name} has {len(loops)} loops over the loader"
        yield function, loops[0]


def own_calls(node):
    """Names of what a loop calls in its own body, and not in functions that are defined there."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield ast.unparse(child.func)
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield from own_calls(child)


def assert_step(path):
    """The step is written out in the loop, with the update of moving average, queue or centre if there is."""
    updates = {"momentum_update", "enqueue", "update_center", "move_center"} & set(definitions(path))
    for function, loop in train_loops(path):
        calls = set(own_calls(loop))
        missing = (
            {"zero_grad", "backward", "scaler.step", *updates} - calls - {c.split(".")[-1] for c in calls}
        )
        assert not missing, f"the loop of {function.name} does not call {sorted(missing)}"


def assert_lines(path, script):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            train = node in tree.body and node.name.startswith("train")
            assert length <= (TRAIN.get(script, 110) if train else FUNCTION), (
                f"{node.name}() has {length} lines"
            )
    front = len(halves(path)[0].splitlines())
    assert front <= FRONT[script], f"{front} lines before Plumbing"
    lines = len(path.read_text().splitlines())
    assert lines <= LINES[script], f"{lines} lines in all"


def assert_airy(path):
    """Lines are short, and in the loop a blank line stands between the parts."""
    widths = [len(line.strip()) for line in halves(path)[0].splitlines() if line.strip()]
    mean = sum(widths) / len(widths)
    assert mean <= CHARACTERS, f"{mean:.1f} characters in a non-blank line before Plumbing"
    for function, loop in train_loops(path):
        lines = path.read_text().splitlines()[loop.lineno - 1 : loop.end_lineno]
        parts = re.split(r"\n\s*\n", "\n".join(lines))
        longest = max(len(part.splitlines()) for part in parts)
        assert longest <= PARAGRAPH, f"{longest} lines without a blank one in the loop of {function.name}"


def test_plumbing_is_the_same_everywhere():
    assert_plumbing([ROOT / f"{script}.py" for script in TRAINING])


@every_training_script
def test_the_method_stands_in_front(script):
    assert_front(ROOT / f"{script}.py")
    assert_step(ROOT / f"{script}.py")


@every_training_script
def test_budget(script):
    assert_lines(ROOT / f"{script}.py", script)
    assert_airy(ROOT / f"{script}.py")


def test_a_difference_in_plumbing_is_noticed(tmp_path):
    """A second file, made up of the first: with another front it passes, with another Plumbing not."""
    front, back = (ROOT / f"{TRAINING[0]}.py").read_text().split("# --- Plumbing", 1)
    back, paths = "# --- Plumbing" + back, [tmp_path / "a.py", tmp_path / "b.py"]

    def write(*texts):
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)

    write(front + back, front + "# another front\n" + back)
    assert_plumbing(paths)
    write(front + back, front + back.replace("1e-7", "1e-8"))
    with pytest.raises(AssertionError, match="Plumbing differs between .'a.py', 'b.py'"):
        assert_plumbing(paths)

    # of one script alone, or of none
    spare = "\n\ndef spare():\n    return seeded(spare_of_spare())\n\n\ndef spare_of_spare():\n    return 1\n"
    back = back.replace("\n\nif __name__", spare + "\n\nif __name__")
    for user in ("", "spare()\n"):
        write(front + user + back, front + back)
        with pytest.raises(AssertionError, match="fewer than two: .'spare', 'spare_of_spare'"):
            assert_plumbing(paths)
    write(front + "spare()\n" + back, front + "spare()\n" + back)
    assert_plumbing(paths)
    write(*[front + "spare()\n" + back.replace("def batches", "def shards")] * 2)
    with pytest.raises(AssertionError, match="called by none: .'shards'"):
        assert_plumbing(paths)


BEFORE_MODEL, BEFORE_TRAIN = "# --- Model -", "def train(args: Args) -> dict:\n"
SPOILT = [  # what is replaced by what, in a copy of a script; the rule; its words
    ("# --- Loss -", "# Loss -", assert_order, "no section"),
    ("# --- Loss -", "# --- Monitor -", assert_order, "order of"),
    (BEFORE_MODEL, f"class Mine(Images):\n    pass\n\n\n{BEFORE_MODEL}", assert_front, "Mine subclasses"),
    (BEFORE_TRAIN, f"def look(x):\n    return x\n\n\n{BEFORE_TRAIN}", assert_front, "def look"),
    ("scaler.step(optimizer)", "update(optimizer)", assert_step, "call .'scaler.step'"),
    ("scaler.step(optimizer)", "(lambda: scaler.step(optimizer))()", assert_step, "call .'scaler.step'"),
    ("optimizer.zero_grad()", "clear(optimizer)", assert_step, "call .'zero_grad'"),
    (".backward(", ".backwards(", assert_step, "call .'backward'"),
    (BEFORE_TRAIN, f"def enqueue():\n    pass\n\n\n{BEFORE_TRAIN}", assert_step, "call .'enqueue'"),
    ("in loader:", "in others:", assert_step, "0 loops over the loader"),
    ("\n\nif __name__", "\n#" * 700 + "\n\nif __name__", assert_lines, "lines in all"),
    ("\n# --- Plumbing -", "#\n" * 30 + "\n# --- Plumbing -", assert_lines, "before Plumbing"),
    (BEFORE_TRAIN, BEFORE_TRAIN + "    x = 1\n" * 120, assert_lines, r"train\(\) has"),
    ("def note(", "def note(" + "\n" * 40, assert_lines, r"guarded\(\) has"),
    (BEFORE_MODEL, f"# {'=' * 100}\n" * 900 + BEFORE_MODEL, assert_airy, "characters in a non-blank line"),
    ("\n\n            ", "\n            ", assert_airy, "without a blank one"),
]


@pytest.mark.parametrize("old, new, rule, words", SPOILT, ids=[words for *_, words in SPOILT])
def test_what_breaks_a_rule_is_noticed(tmp_path, old, new, rule, words):
    text = (ROOT / "simclr.py").read_text()
    assert old in text
    (tmp_path / "a.py").write_text(text.replace(old, new))
    more = ["simclr"] if rule is assert_lines else []
    with pytest.raises(AssertionError, match=words):
        rule(tmp_path / "a.py", *more)


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
    names = PUBLIC["all"]
    for name in f"{names} {PUBLIC[script]}".split():
        missing = unresolved(pasted(path, name)) - {"super"}
        assert not missing, f"{name} of {script}.py needs {missing}: name them in its docstring after 'Uses'"


def pasted_plumbing(path):
    """The whole section, as someone pastes it under the import lines and MEAN, STD."""
    return f"{pasted(path, 'MEAN')}\n{halves(path)[1]}"


@every_training_script
def test_plumbing_survives_pasting(script):
    source = pasted_plumbing(ROOT / f"{script}.py")
    assert not unresolved(source)
    assert set(PUBLIC["plumbing"].split()) <= set().union(*map(defined, ast.parse(source).body))


def test_pasting_notices_a_missing_helper():
    source = pasted(ROOT / "dinov2.py", "sinkhorn_knopp").replace("def gather(", "def other(")
    assert unresolved(source) == {"gather"}
    source = pasted_plumbing(ROOT / f"{TRAINING[0]}.py").replace("MEAN, STD =", "CENTER, SCALE =")
    assert unresolved(source) == {"MEAN", "STD"}


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
