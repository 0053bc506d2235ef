"""The rules that keep the scripts alike (DESIGN section 2), over every script in the root folder."""

import ast
import builtins
import collections
import dis
import importlib
import re
import runpy
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tomllib
import tyro
from conftest import ROOT, SCRIPTS, TRAINING, Forked, run
from mutants import FAULTS

SECTIONS = ["Args", "Augmentation", "Model", "Loss", "Optimiser", "Monitor", "Training", "Plumbing"]
# Lines in all, before Plumbing, of train(). Above DESIGN's budgets: eval_linear (600) has any labels,
# backbones, heads; the others, by what Plumbing has above 225; beit, clip, dino, dinov2, pretext by more.
LINES = {
    "beit": (990, 555, 90),
    "byol": (809, 374, 110),
    "clip": (1040, 605, 135),
    "convert": (259, 259, 45),
    "dino": (974, 539, 121),
    "dinov2": (1078, 643, 137),
    "eval_linear": (1330, 1330, 45),
    "ijepa": (846, 411, 120),
    "mae": (804, 369, 110),
    "moco": (819, 384, 110),
    "moco_v3": (840, 405, 110),
    "pretext": (946, 511, 120),
    "simclr": (798, 363, 110),
}
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
    "dino": "VisionTransformer DINOHead DINO dino_loss update_center sinkhorn_center dino_schedule "
    "momentum_update random_crop multi_crop augment augment_crops target_moments monitor attention_page",
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
every_training_script = pytest.mark.parametrize("path", [ROOT / f"{name}.py" for name in TRAINING])


def definitions(path):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def defined(node):
    """Names that a line of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {name.id for t in targets if t for name in ast.walk(t) if isinstance(name, ast.Name)}


def read_names(*nodes):
    names = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def halves(path):
    """What stands before Plumbing; and Plumbing, without the main guard."""
    front, _, back = path.read_text().partition("# --- Plumbing")
    return front, "# --- Plumbing" + back.partition("\nif __name__")[0]


# One name, one body (DESIGN 2.1 to 2.3)


@every_script
def test_imports_no_other_script(path):
    others, tree = {other.stem for other in SCRIPTS}, ast.walk(ast.parse(path.read_text()))
    imports = [node for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert modules and not others & {module.split(".")[0] for module in modules}


def assert_same_bodies(paths):
    bodies = collections.defaultdict(dict)
    for path in paths:
        for name, node in definitions(path).items():
            if name not in ("Args", "train", "monitor"):  # which each method has
                bodies[name][path.name] = ast.unparse(node)
    for name, by_script in bodies.items():
        assert len(set(by_script.values())) == 1, f"{name} differs between {sorted(by_script)}"


def args_fields(path):
    """{name: (type, help)} of the fields of Args; the help is the comment at the end of the field's line. A
    closing "(paper: ...)" is left out: it differs between methods."""
    lines, fields = path.read_text().splitlines(), definitions(path)["Args"].body
    comments = [lines[field.end_lineno - 1].partition("  # ")[2] for field in fields]
    helps = [re.sub(r" \(paper: .*\)$", "", comment) for comment in comments]
    return {f.target.id: (ast.unparse(f.annotation), help) for f, help in zip(fields, helps, strict=True)}


def assert_same_fields(paths):
    fields = collections.defaultdict(dict)
    for path in paths:
        for name, field in args_fields(path).items():
            assert field[1], f"--{name} of {path.name} has no help"
            fields[name][path.name] = field
    for name, by_script in fields.items():
        if name == "data":
            by_script.pop("clip.py", None)  # which reads pairs
        assert name == "arch" or len(set(by_script.values())) == 1, f"--{name} differs: {by_script}"


def assert_plumbing(paths):
    """To the letter the same; no method hides there: two scripts use it in front, or use what uses it."""
    parts = {path.name: halves(path) for path in paths}
    assert len({back for _, back in parts.values()}) == 1, f"Plumbing differs between {sorted(parts)}"
    fronts, back = [ast.parse(front) for front, _ in parts.values()], ast.parse([*parts.values()][0][1])
    users = collections.Counter(name for front in fronts for name in read_names(front))
    needed = {name for name, count in users.items() if count >= 2}
    for _ in back.body:
        needed |= read_names(*(node for node in back.body if defined(node) & needed))
    unused = set().union(*map(defined, back.body)) - needed
    assert not unused, f"in Plumbing, and used by fewer than two: {sorted(unused)}"


def test_same_name_same_body_same_flag_same_help():
    assert_same_bodies(SCRIPTS)
    assert_same_fields(SCRIPTS)


def test_plumbing_is_the_same_everywhere():
    assert_plumbing([ROOT / f"{script}.py" for script in TRAINING])


def test_a_difference_is_noticed(tmp_path):
    text = (ROOT / "dinov2.py").read_text()
    (tmp_path / "a.py").write_text(text)
    for rule, old, new, words in (
        (assert_same_bodies, "1e-7", "1e-8", "collapse_metrics differs"),
        (assert_same_fields, "# width of the head's hidden layers", "# width", "--head_dim differs"),
        (assert_plumbing, "# --- Plumbing -", "# --- Plumbing ", "Plumbing differs between .'a.py', 'b.py'"),
        (assert_plumbing, "\n\nif __name__", "\n\ndef spare():\n    return 1\n\n\nif __name__", "spare"),
    ):
        both = "spare" in words
        (tmp_path / "a.py").write_text(text.replace(old, new) if both else text)
        (tmp_path / "b.py").write_text(text.replace(old, new))
        with pytest.raises(AssertionError, match=words):
            rule([tmp_path / "a.py", tmp_path / "b.py"])


# The method in front, written out; lengths (DESIGN 2.2, 2.4, 2.5)


def assert_front(path):
    """Sections in order; nothing in front subclasses what stands behind; Training holds train functions."""
    banners = re.findall(r"^# --- (\w+) -+$", path.read_text(), re.M)
    assert banners == [name for name in SECTIONS if name in banners], f"order of {banners}"
    assert set(SECTIONS) - set(banners) <= {"Optimiser"}, f"no section {set(SECTIONS) - set(banners)}"

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
        calls |= {call.split(".")[-1] for call in calls}
        missing = {"zero_grad", "backward", "scaler.step", *updates} - calls
        assert not missing, f"the loop of {function.name} does not call {sorted(missing)}"


def assert_lengths(path, name):
    total, before, train = LINES[name]
    tree, text = ast.parse(path.read_text()), path.read_text()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and name not in ("eval_linear", "convert"):
            length = node.end_lineno - node.lineno + 1
            most = train if node in tree.body and node.name.startswith("train") else FUNCTION
            assert length <= most, f"{node.name}() has {length} lines"
    front = halves(path)[0].splitlines()
    assert len(front) <= before, f"{len(front)} lines before Plumbing"
    assert len(text.splitlines()) <= total, f"{len(text.splitlines())} lines in all"


def assert_airy(path):
    """Lines are short, and in the loop a blank line stands between the parts."""
    widths = [len(line.strip()) for line in halves(path)[0].splitlines() if line.strip()]
    mean = sum(widths) / len(widths)
    assert mean <= CHARACTERS, f"{mean:.1f} characters in a non-blank line before Plumbing"
    for function, loop in train_loops(path):
        lines = path.read_text().splitlines()[loop.lineno - 1 : loop.end_lineno]
        longest = max(part.count("\n") + 1 for part in re.split(r"\n\s*\n", "\n".join(lines)))
        assert longest <= PARAGRAPH, f"{longest} lines without a blank one in the loop of {function.name}"


@every_training_script
def test_the_method_stands_in_front_and_airy(path):
    assert_front(path)
    assert_step(path)
    assert_airy(path)


@every_script
def test_budget(path):
    assert_lengths(path, path.stem)


BEFORE_TRAIN = "def train(args: Args) -> dict:\n"
SPOILT = [  # what is replaced by what in a copy of simclr.py; the rule; its words
    ("# --- Loss -", "# Loss -", assert_front, "no section"),
    ("# --- Loss -", "# --- Monitor -", assert_front, "order of"),
    ("# --- Model -", "class Mine(Images):\n    pass\n\n\n# --- Model -", assert_front, "Mine subclasses"),
    (BEFORE_TRAIN, f"def look(x):\n    return x\n\n\n{BEFORE_TRAIN}", assert_front, "def look"),
    ("scaler.step(optimizer)", "(lambda: scaler.step(optimizer))()", assert_step, "call .'scaler.step'"),
    (BEFORE_TRAIN, f"def enqueue():\n    pass\n\n\n{BEFORE_TRAIN}", assert_step, "call .'enqueue'"),
    ("in loader:", "in others:", assert_step, "0 loops over the loader"),
    ("\n\nif __name__", "\n#" * 700 + "\n\nif __name__", assert_lengths, "lines in all"),
    ("\n# --- Plumbing -", "#\n" * 30 + "\n# --- Plumbing -", assert_lengths, "before Plumbing"),
    (BEFORE_TRAIN, BEFORE_TRAIN + "    x = 1\n" * 120, assert_lengths, r"train\(\) has"),
    ("# --- Model -", f"# {'=' * 100}\n" * 900 + "# --- Model -", assert_airy, "characters in a non-blank"),
    ("\n\n            ", "\n            ", assert_airy, "without a blank one"),
]


def test_what_breaks_a_rule_is_noticed(tmp_path):
    text = (ROOT / "simclr.py").read_text()
    for old, new, rule, words in SPOILT:
        assert old in text
        (tmp_path / "a.py").write_text(text.replace(old, new))
        with pytest.raises(AssertionError, match=words):
            rule(tmp_path / "a.py", *(["simclr"] if rule is assert_lengths else []))


# A file alone: metadata, --help, pasting (DESIGN 2.6, 2.8)


@every_script
def test_inline_metadata_and_main_guard(path):
    text = path.read_text()
    metadata = tomllib.loads(
        re.sub(r"^# ?", "", re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)[1], flags=re.M)
    )
    assert metadata["requires-python"] == ">=3.10"
    named = {re.match(r"\w+", dependency)[0] for dependency in metadata["dependencies"]}
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    imported |= set(re.findall(r"^from torch.utils.(tensorboard)", text, re.M))
    assert named == imported & PACKAGES  # PIL comes with torchvision

    guard, call = text.splitlines()[-2:]
    assert guard == 'if __name__ == "__main__":' and "tyro.cli(Args" in call


@every_script
def test_a_copy_alone_shows_its_help_offline(path, tmp_path, monkeypatch):
    """It writes nothing, warns of nothing; commands and formulas stand there as in the docstring."""
    shutil.copy(path, tmp_path)
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != ROOT])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "200")

    def show(rank):
        warnings.simplefilter("error", UserWarning)
        runpy.run_path(path.name, run_name="__main__")

    (end,) = Forked(show).end()
    assert (
        end.returncode == 0
        and not end.stderr.strip()
        and "--data" in end.stdout + "--data" * (path.stem == "convert")
    )
    shown = {line.strip() for line in end.stdout.splitlines()}
    assert {line.strip() for line in ast.get_docstring(ast.parse(path.read_text())).splitlines()} <= shown
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_importing_does_nothing(tmp_path):
    for path in SCRIPTS:
        shutil.copy(path, tmp_path)
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import {names}, threading; assert threading.active_count() == 1"
    end = run([sys.executable, "-B", "-W", "error::UserWarning", "-c", code], cwd=tmp_path)
    assert (end.returncode, end.stdout, end.stderr) == (0, "", "")


def pasted(path, name):
    """`name` as someone pastes it: import lines, and the helpers named after 'Uses' in its docstring."""
    tree, nodes, wanted = ast.parse(path.read_text()), [], [name]
    for wish in wanted:
        for node in tree.body:
            if wish in defined(node) and node not in nodes:
                nodes.append(node)
                text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
                uses = re.search(r"Uses ([\w, \n]+)\.", text or "")
                wanted += re.findall(r"\w+", uses[1]) if uses else []
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in imports + nodes)


def unresolved(source):
    """Global names that the code reads and that neither it nor Python defines."""
    namespace, names = {}, set()

    def visit(code):
        names.update(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                visit(constant)

    code = compile(source, "pasted", "exec")
    exec(code, namespace)
    visit(code)
    known = {*namespace, *dir(builtins), "super"}
    return {name for name in names if name not in known and name[:2] != "__"}


@every_training_script
def test_public_names_survive_pasting(path):
    for name in f"{PUBLIC['all']} {PUBLIC[path.stem]}".split():
        missing = unresolved(pasted(path, name))
        assert not missing, f"{name} of {path.name} needs {missing}: name them in its docstring after 'Uses'"

    plumbing = f"{pasted(path, 'MEAN')}\n{halves(path)[1]}"
    assert not unresolved(plumbing)
    assert set(PUBLIC["plumbing"].split()) <= set().union(*map(defined, ast.parse(plumbing).body))


def test_pasting_notices_a_missing_helper():
    source = pasted(ROOT / "dinov2.py", "sinkhorn_knopp").replace("def gather(", "def other(")
    assert unresolved(source) == {"gather"}


@every_training_script
def test_docstring_commands_parse(path):
    """The docstring has three commands (DESIGN 3), and the parser takes each of them."""
    module = importlib.import_module(path.stem)
    commands = re.findall(
        rf"(?:python|torchrun [^\n]*?)(?: | \\\n +){path.name}(.*?)(?<!\\)\n", module.__doc__, re.S
    )
    assert len(commands) >= 3 and commands[0].strip() == ""
    for words in commands:
        assert tyro.cli(module.Args, args=words.replace("\\\n", " ").split())


def test_deprecated_calls_of_every_script_are_errors():
    """What pyproject.toml makes of warnings, for a call at the top of a module of that name."""
    for path in SCRIPTS:
        for category in (DeprecationWarning, FutureWarning):
            with pytest.raises(category):
                warnings.warn_explicit("old", category, f"{path.stem}.py", 1, module=path.stem)


def test_nothing_of_the_shared_data_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert files and not [name for name in files if Path(name).suffix in (".jpg", ".jpeg", ".pt")]


def test_the_lines_that_mutants_break_are_there():
    counts = {
        (script, line): (ROOT / f"{script}.py").read_text().count(line) for script, _, line, _ in FAULTS
    }
    assert len(counts) > 40 and set(counts.values()) == {1}, [key for key in counts if counts[key] != 1]
