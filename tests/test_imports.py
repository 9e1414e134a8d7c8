"""The rules of the house: imports run one way, and what a person waits for never loads torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "orion_unet"
ENTRIES = ("train_spatial_orion_unet.py", "monitor_training.py")

# From the top down; a name may import from its own line or from below.
LAYERS = (
    ("__main__", *(Path(entry).stem for entry in ENTRIES)),
    ("cli",),
    ("training", "evaluation", "quantification", "inspection", "preparation", "monitor", "demo"),
    ("inference",),
    ("segmentation",),
    ("data", "checkpoint", "metrics"),
    (
        *("slides", "registration", "models", "losses", "config", "command_options", "recipes"),
        *("distributed", "run_log"),
        *("correlation", "patch_sums", "cell_metrics", "intervals"),
        *("errors", "extras", "findings", "options", "text", "__init__"),
    ),
)
ROOMS_APART = {"training", "evaluation", "quantification", "inspection", "preparation", "monitor", "demo"}
TORCH_FREE = {"monitor", "run_log", "recipes", "config", "command_options", "findings", "options", "text"}


def sources():
    return sorted(PACKAGE.rglob("*.py")) + [ROOT / entry for entry in ENTRIES if (ROOT / entry).exists()]


def dotted(path):
    """orion_unet/data/pairs.py is orion_unet.data.pairs."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part(name):
    """The member of LAYERS a dotted name belongs to; the bare package is its __init__."""
    words = name.split(".")
    if words[0] != "orion_unet":
        return words[0]
    return words[1] if len(words) > 1 else "__init__"


def layer(name):
    for index, members in enumerate(LAYERS):
        if part(name) in members:
            return index
    raise AssertionError(f"{name}: has no layer; add it to the house or move it into a room")


def imported(path):
    """Every dotted name that a file imports, at its top or inside a function, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = dotted(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if is_module(inner) else source)
        elif isinstance(node, ast.Call) and names_a_module(node):
            found.add(literal_start(node.args[0]))
    return {name for name in found if name}


def is_module(name):
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def names_a_module(call):
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return called in ("import_module", "__import__") and bool(call.args)


def literal_start(node):
    """What is known of the name given to import_module: f"orion_unet.cli.{x}" starts with orion_unet.cli."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return str(node.value).rstrip(".") if isinstance(node, ast.Constant) else ""


def inside(names):
    """Those that are of this project."""
    own = {Path(entry).stem for entry in ENTRIES}
    return {name for name in names if name.split(".")[0] == "orion_unet" or name in own}


@pytest.mark.parametrize("path", sources(), ids=lambda path: dotted(path))
def test_a_module_imports_only_from_its_own_layer_or_below(path):
    here = dotted(path)
    above = [name for name in inside(imported(path)) if layer(name) < layer(here)]
    assert not above, f"{here} imports {above} from above itself"


@pytest.mark.parametrize("path", sources(), ids=lambda path: dotted(path))
def test_rooms_apart_do_not_import_each_other(path):
    room = part(dotted(path))
    others = {part(name) for name in inside(imported(path))} & ROOMS_APART - {room}
    assert not (room in ROOMS_APART and others), f"{dotted(path)} imports {others}"


def test_no_module_imports_itself_through_others():
    """Imports inside functions and under TYPE_CHECKING count."""
    names = {dotted(path).removesuffix(".__init__"): inside(imported(path)) for path in sources()}
    graph = {name: {found for found in targets if found in names} - {name} for name, targets in names.items()}
    assert len(graph) > 50
    assert circle_in(graph) is None


def circle_in(graph):
    """The names of one circle of a directed graph, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return None
        path.append(name)
        for target in sorted(graph[name]):
            if found := visit(target):
                return found
        done.add(path.pop())
        return None

    return next((found for name in sorted(graph) if (found := visit(name))), None)


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_folder_imports_another_that_imports_it():
    rooms = {}
    for path in sources():
        if path.is_relative_to(PACKAGE):
            rooms.setdefault(part(dotted(path)), set()).update(part(name) for name in inside(imported(path)))
    rooms = {room: targets - {room, "__init__", "__main__"} for room, targets in rooms.items()}
    assert circle_in({room: targets & rooms.keys() for room, targets in rooms.items()}) is None


def reached_from(name, seen):
    """All modules of the project that importing this one brings in, packages on the way included."""
    words = name.split(".")
    for depth in range(1, len(words) + 1):
        module = ".".join(words[:depth])
        base = ROOT / Path(*words[:depth])
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for inner in inside(imported(path)):
            reached_from(inner, seen)
    return seen


def test_monitor_and_run_log_import_torch_neither_at_the_top_nor_in_a_function():
    roots = [dotted(path) for path in sources() if part(dotted(path)) in TORCH_FREE]
    assert {part(name) for name in roots} >= {"monitor", "run_log"}
    seen = set()
    for name in roots:
        reached_from(name.removesuffix(".__init__"), seen)
    guilty = []
    for module in seen:
        base = ROOT / Path(*module.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        guilty += [f"{module}: {name}" for name in imported(path) if name.split(".")[0] == "torch"]
    assert not guilty


def test_no_module_is_a_drawer_for_everything():
    assert not [path for path in sources() if path.stem in ("utils", "util", "common", "helpers", "misc")]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_script_is_under_30_lines(entry):
    assert len((ROOT / entry).read_text(encoding="utf-8").splitlines()) < 30


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which importing torch fails."""
    folder = tmp_path_factory.mktemp("torchless")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PYTHON": sys.executable}


def output(words, env, cwd=ROOT):
    done = subprocess.run(
        [str(word) for word in words], env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_torchless_environment_really_refuses_torch(without_torch):
    words = [sys.executable, "-c", "import orion_unet.distributed"]
    done = subprocess.run(words, env=without_torch, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "torch was imported\n"


def test_importing_monitor_and_run_log_loads_no_torch(without_torch):
    modules = [dotted(p).removesuffix(".__init__") for p in sources() if part(dotted(p)) in TORCH_FREE]
    script = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; print('torch' in sys.modules)"
    assert output([sys.executable, "-c", script], without_torch).strip() == "False"


HELP = {
    "trainer": ([sys.executable, "train_spatial_orion_unet.py", "--help"], "--learning_rate"),
    "monitor": ([sys.executable, "monitor_training.py", "--help"], "--output_dir"),
    "launcher": (["./train_stable_learning.sh", "--help"], "--learning_rate"),
    "launcher, short": (["./train_stable_learning.sh", "--epochs", "3", "-h"], "--learning_rate"),
    "package": ([sys.executable, "-m", "orion_unet", "--help"], "make-demo"),
    "package, bare": ([sys.executable, "-m", "orion_unet"], "make-demo"),
}


@pytest.mark.parametrize(("words", "expected"), HELP.values(), ids=HELP)
def test_help_needs_no_torch(words, expected, without_torch):
    assert expected in output(words, without_torch)


def test_help_of_every_command_needs_no_torch(without_torch):
    from orion_unet.__main__ import COMMANDS

    assert set(COMMANDS) >= {"train", "monitor", "make-demo"}
    for command in COMMANDS:
        shown = output([sys.executable, "-m", "orion_unet", command, "--help"], without_torch)
        assert shown.startswith("usage:")
        assert "--help" in shown


def test_the_version_is_shown_without_torch(without_torch):
    import orion_unet

    assert output([sys.executable, "-m", "orion_unet", "--version"], without_torch).strip() == orion_unet.__version__
