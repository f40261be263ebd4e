"""The house rules as tests: each rule reads a file's path and syntax tree, and is proved red on a deliberate violation.

A rule is a function ``(path, tree, text) -> messages``; ``path`` is relative to the repository root.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
Rule = Callable[[PurePosixPath, ast.Module, str], Iterator[str]]

FLOOR_0 = {"_checks", "_files", "structures"}
SIBLINGS = {"blocks", "losses", "matchers", "metrics"}
BELOW: dict[str, set[str]] = {  # what a part of gresbox may import from gresbox, besides itself
    "_checks": {"structures"},
    "_files": set(),
    "structures": {"_checks"},
    "testing": FLOOR_0,
    "kernels": set(),
    "ops": FLOOR_0 | {"kernels"},
    **dict.fromkeys(SIBLINGS, FLOOR_0 | {"ops"}),
    "data": FLOOR_0,
    "models": FLOOR_0 | SIBLINGS | {"ops", "__version__"},
    "viz": FLOOR_0 | SIBLINGS | {"ops", "__version__"},
    "training": FLOOR_0 | SIBLINGS | {"ops", "__version__", "data", "models", "viz"},
}
EVERYTHING = {"__init__", "cli"}
SLOW = {"timm", "transformers", "scipy"}
EXTRAS = {
    "accelerate": "train",
    "tensorboard": "train",
    "tqdm": "train",
    "pycocotools": "coco",
    "matplotlib": "viz",
    "sentencepiece": "spm",
    "jsonargparse": "cli",
}
NO_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "misc"}
INHERITED = {"forward", "extra_repr"}  # of nn.Module: a class documents its forward in its own docstring
TWINNED = ("ops", "blocks", "losses", "matchers", "metrics")
MAX_FILE, MAX_FUNCTION = 500, 50
MAX_KERNEL = 90  # one launch: what it keeps in registers would have to be handed to every part
HOME_FOLDERS = "|".join(("work", "opt", "home", "root", "Users", "tmp", "mnt", "data"))
MACHINE_PATH = re.compile(rf"(?<![\w.\-/<>}}])(?:/(?:{HOME_FOLDERS})/\w|[A-Z]:\\\\\w)")


def imports(tree: ast.AST) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import with the dotted names it brings in; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, f"{node.module or ''}.{alias.name}"


def at_import_time(tree: ast.Module) -> set[ast.AST]:
    """Nodes that run when the module is imported: not those in functions, nor under ``if TYPE_CHECKING``."""
    found: set[ast.AST] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        found.add(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        stack += ast.iter_child_nodes(node)
    return found


def part_of(path: PurePosixPath) -> str | None:
    """``gresbox/ops/boxes.py`` -> ``ops``; ``gresbox/viz.py`` -> ``viz``; None outside the package."""
    if path.parts[0] != "gresbox":
        return None
    return path.stem if len(path.parts) == 2 else path.parts[1]


def public_names(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    return set()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def floors(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """A part imports only from the floors below it."""
    part = part_of(path)
    if part is None or part in EVERYTHING:
        return
    if part not in BELOW:
        yield f"{part} has no floor; give it one in BELOW"
        return
    eager = at_import_time(tree)
    for node, name in imports(tree):
        parts = name.split(".")
        if parts[0] != "gresbox" or len(parts) < 2 or parts[1] == part:
            continue
        if parts[1] not in BELOW[part]:
            yield f"line {node.lineno}: {part} must not import gresbox.{parts[1]}"
        elif parts[1] == "kernels" and node in eager:
            yield f"line {node.lineno}: kernels are imported inside functions"


def absolute_imports(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """No relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno}: relative import"


def triton_in_kernels(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """Triton is imported by kernels, and by the dispatch inside functions, only."""
    if path.parts[:2] == ("gresbox", "kernels"):
        return
    eager = at_import_time(tree)
    for node, name in imports(tree):
        asks = path == PurePosixPath("gresbox/ops/_backend.py") and node not in eager
        if name.split(".")[0] == "triton" and part_of(path) is not None and not asks:
            yield f"line {node.lineno}: triton is imported outside kernels"


def slow_imports(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """Slow and optional libraries are imported inside functions; optional ones come with the name of their extra."""
    if part_of(path) is None:
        return
    eager = at_import_time(tree)
    for node, name in imports(tree):
        library = name.split(".")[0]
        if name.startswith("torch.utils.tensorboard"):
            library = "tensorboard"
        if library in SLOW | set(EXTRAS) and node in eager:
            yield f"line {node.lineno}: {library} is imported at import time"
        if library in EXTRAS and not type_checking_only(tree, node) and f"gresbox[{EXTRAS[library]}]" not in text:
            yield f"line {node.lineno}: {library} is optional; its ImportError must say pip install 'gresbox[{EXTRAS[library]}]'"


def type_checking_only(tree: ast.Module, node: ast.AST) -> bool:
    blocks = [item for item in tree.body if isinstance(item, ast.If) and "TYPE_CHECKING" in ast.unparse(item.test)]
    return any(inner is node for block in blocks for inner in ast.walk(block))


def sizes(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """Files of 500 lines and function bodies of 50 lines (kernels 90), docstrings apart, at most."""
    lines = text.count("\n")
    if lines > MAX_FILE:
        yield f"{lines} lines, at most {MAX_FILE}"
    if path.parts[0] == "tests":
        return
    for node in functions(tree):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        jitted = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
        limit = MAX_KERNEL if jitted and path.parts[:2] == ("gresbox", "kernels") else MAX_FUNCTION
        if length > limit:
            yield f"line {node.lineno}: {node.name} has {length} lines, at most {limit}"


def names(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """No utils, common, core, helpers; one level of packages; no function with its module's name."""
    for name in (*path.parts[:-1], path.stem):
        if NO_NAMES & set(name.strip("_").split("_")):
            yield f"{name} says nothing; name the noun"
    if part_of(path) is None:
        return
    if len(path.parts) > 3:
        yield "packages are one level deep"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == path.stem:
            yield f"line {node.lineno}: {node.name} has its module's name"


def excepts(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """No handler swallows everything; one that cleans up and raises on may name BaseException."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = [] if node.type is None else [item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)]
            last = node.body[-1]
            raises_on = caught == ["BaseException"] and isinstance(last, ast.Raise) and last.exc is None
            if node.type is None or ({"Exception", "BaseException"} & set(caught) and not raises_on):
                yield f"line {node.lineno}: catches everything"


def devices(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """Devices come from the inputs."""
    if part_of(path) is None:
        return
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "device")]
        literal = any(isinstance(value, ast.Constant) and str(value.value).startswith("cuda") for value in values)
        moved = node.func.attr == "to" or any(keyword.arg == "device" for keyword in node.keywords)
        if node.func.attr == "cuda" or (literal and moved):
            yield f"line {node.lineno}: a device is named"


def docstrings(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """Modules, and public functions, classes and methods of the package, have docstrings."""
    if not text.strip():
        return
    if ast.get_docstring(tree) is None and path.parts[0] in ("gresbox", "benchmarks", "examples"):
        yield "the module has no docstring"
    if part_of(path) is None:
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public_names(tree):
            if ast.get_docstring(node) is None:
                yield f"line {node.lineno}: {node.name} has no docstring"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                documented = not isinstance(inner, ast.FunctionDef) or inner.name.startswith("_") or inner.name in INHERITED
                if not documented and ast.get_docstring(inner) is None:
                    yield f"line {inner.lineno}: {node.name}.{inner.name} has no docstring"


def outside(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """The package imports nothing of the repository around it, and nothing imports the tests."""
    forbidden = {"tests", "benchmarks", "examples"} if part_of(path) else {"tests"}
    for node, name in imports(tree):
        if name.split(".")[0] in forbidden:
            yield f"line {node.lineno}: imports {name.split('.')[0]}"


def padding_names(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """Padding is told by ``valid``, True on real tokens."""
    if part_of(path) is None:
        return
    for node in functions(tree):
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.arg in ("padding_mask", "key_padding_mask"):
                yield f"line {node.lineno}: {node.name} takes `{argument.arg}`; call it `valid`, True on real tokens"


def machine_paths(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """No absolute paths of one machine."""
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"line {number}: an absolute path of a machine"


def unanchored_todos(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[str]:
    """A TODO says where it is tracked."""
    word = "TO" + "DO"
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(rf"#.*\b{word}\b(?!\()", line):
            yield f"line {number}: {word} without an anchor"


RULES: list[Rule] = [
    floors,
    absolute_imports,
    triton_in_kernels,
    slow_imports,
    sizes,
    names,
    excepts,
    devices,
    docstrings,
    outside,
    padding_names,
    machine_paths,
    unanchored_todos,
]


def missing_twins(files: set[str]) -> list[str]:
    """What must stand beside the files that exist, but does not; paths relative to the root."""
    missing = []
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.stem.startswith("_") or path.suffix != ".py":
            continue
        folder = path.parts[:-1]
        twins = []
        if len(folder) == 2 and folder[0] == "gresbox" and folder[1] in TWINNED:
            twins = [f"tests/{folder[1]}/test_{path.stem}.py"]
        elif folder == ("gresbox", "kernels"):
            twins = [f"gresbox/ops/{path.stem}.py", f"tests/kernels/test_{path.stem}.py", f"benchmarks/ops/{path.stem}.py"]
        elif folder == ("benchmarks", "ops"):
            twins = [f"gresbox/ops/{path.stem}.py"]
        missing += [f"{name} needs {twin}" for twin in twins if twin not in files]
    return missing


def sources() -> list[PurePosixPath]:
    """The repository's own Python files."""
    found = [ROOT / "docs" / "conf.py"]
    for folder in ("gresbox", "tests", "benchmarks", "examples"):
        found += (ROOT / folder).rglob("*.py")
    return sorted(PurePosixPath(path.relative_to(ROOT).as_posix()) for path in found if path.is_file())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    broken = []
    for path in sources():
        text = (ROOT / path).read_text(encoding="utf-8")
        broken += [f"{path}: {message}" for message in rule(path, ast.parse(text), text)]
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


def test_twins():
    assert not missing_twins({path.as_posix() for path in sources()})


def undocumented(files: set[str], pages: str) -> list[str]:
    """Public modules of the package that no page of docs/api names."""
    public = [PurePosixPath(name) for name in sorted(files) if name.startswith("gresbox/")]
    modules = [".".join(path.with_suffix("").parts) for path in public if path.stem[0] != "_" and path.parts[1] != "kernels"]
    return [module for module in modules if f"automodule:: {module}\n" not in pages]


def test_the_api_pages_name_every_module():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert not undocumented({path.as_posix() for path in sources()}, pages)
    assert undocumented({"gresbox/ops/new.py", "gresbox/ops/boxes.py"}, ".. automodule:: gresbox.ops.boxes\n") == [
        "gresbox.ops.new"
    ]


def test_texts_hold_no_machine_paths():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".ci").glob("*")]
    broken = [(path.name, *machine_paths(None, None, path.read_text(encoding="utf-8"))) for path in texts if path.is_file()]
    assert not [item for item in broken if len(item) > 1]


def body_of(lines: int) -> str:
    return "def f():\n    '''Doc.'''\n" + "    x = 1\n" * lines


RED = [
    (floors, "gresbox/blocks/x.py", "from gresbox.losses import POALoss"),
    (floors, "gresbox/blocks/x.py", "from gresbox import losses"),
    (floors, "gresbox/losses/x.py", "def f():\n    import gresbox.matchers.hungarian"),
    (floors, "gresbox/ops/x.py", "from gresbox.kernels.x import kernel"),
    (floors, "gresbox/kernels/x.py", "from gresbox._checks import check_shape"),
    (floors, "gresbox/data/x.py", "from gresbox.ops import boxes"),
    (floors, "gresbox/models/x.py", "from gresbox.data import GRefCOCO"),
    (floors, "gresbox/viz.py", "from gresbox.data.grefcoco import GRefCOCO"),
    (floors, "gresbox/training/x.py", "from gresbox.cli import main"),
    (floors, "gresbox/novelty/x.py", "import torch"),
    (absolute_imports, "gresbox/ops/x.py", "from . import boxes"),
    (absolute_imports, "gresbox/ops/x.py", "from ..structures import GresTarget"),
    (triton_in_kernels, "gresbox/ops/x.py", "def f():\n    import triton.language as tl"),
    (triton_in_kernels, "gresbox/ops/_backend.py", "import triton"),
    (slow_imports, "gresbox/models/x.py", "import timm"),
    (slow_imports, "gresbox/ops/x.py", "from scipy.optimize import linear_sum_assignment"),
    (slow_imports, "gresbox/viz.py", "class A:\n    import matplotlib"),
    (slow_imports, "gresbox/viz.py", "def f():\n    import matplotlib"),
    (slow_imports, "gresbox/training/x.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
    (sizes, "gresbox/ops/x.py", "x = 1\n" * (MAX_FILE + 1)),
    (sizes, "gresbox/ops/x.py", body_of(MAX_FUNCTION + 1)),
    (names, "gresbox/utils.py", ""),
    (names, "gresbox/ops/_mask_utils.py", ""),
    (names, "benchmarks/helpers/x.py", ""),
    (names, "gresbox/ops/fast/x.py", ""),
    (names, "gresbox/ops/deformable.py", "def deformable(): pass"),
    (excepts, "gresbox/ops/x.py", "try:\n    f()\nexcept:\n    pass"),
    (excepts, "gresbox/ops/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (excepts, "tests/x.py", "try:\n    f()\nexcept (ValueError, BaseException) as error:\n    pass"),
    (devices, "gresbox/ops/x.py", "x.cuda()"),
    (devices, "gresbox/ops/x.py", "x.to('cuda:0')"),
    (devices, "gresbox/ops/x.py", "torch.zeros(3, device='cuda')"),
    (docstrings, "gresbox/ops/x.py", "import torch"),
    (docstrings, "gresbox/ops/x.py", "'''Doc.'''\n__all__ = ['f']\ndef f(): pass"),
    (docstrings, "gresbox/ops/x.py", "'''Doc.'''\n__all__ = ['A']\nclass A:\n    '''Doc.'''\n    def f(self): pass"),
    (outside, "benchmarks/x.py", "from tests.conftest import golden"),
    (outside, "gresbox/ops/x.py", "import benchmarks.harness"),
    (padding_names, "gresbox/blocks/x.py", "def f(x, *, key_padding_mask=None): pass"),
    (machine_paths, "gresbox/data/x.py", "ROOT = '" + "/ho" + "me/someone/coco'"),
    (machine_paths, "docs/x.md", "run `cd " + "/op" + "t/gresbox`"),
    (unanchored_todos, "gresbox/ops/x.py", "x = 1  # TO" + "DO make it fast"),
]

GREEN = [
    (floors, "gresbox/ops/x.py", "from gresbox._checks import check_shape\ndef f():\n    from gresbox.kernels.x import kernel"),
    (floors, "gresbox/cli.py", "from gresbox.training import train"),
    (floors, "gresbox/training/x.py", "from gresbox.data import GRefCOCO\nfrom gresbox.models import create_model"),
    (floors, "benchmarks/x.py", "from gresbox.ops import boxes"),
    (triton_in_kernels, "gresbox/ops/_backend.py", "def f():\n    import triton"),
    (slow_imports, "gresbox/ops/x.py", "def f():\n    from scipy.optimize import linear_sum_assignment"),
    (slow_imports, "gresbox/viz.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
    (sizes, "gresbox/ops/x.py", body_of(MAX_FUNCTION)),
    (excepts, "gresbox/ops/x.py", "try:\n    f()\nexcept ImportError as error:\n    raise"),
    (excepts, "gresbox/ops/x.py", "try:\n    f()\nexcept BaseException:\n    clean()\n    raise"),
    (devices, "gresbox/ops/x.py", "torch.zeros(3, device=x.device)\nx.to(y.device)\nx.is_cuda"),
    (machine_paths, "docs/x.md", "https://example.org/ho" + "me/page and ../data/coco and a/b and runs/ro" + "ot/x"),
]


@pytest.mark.parametrize(("rule", "path", "source"), RED, ids=lambda value: getattr(value, "__name__", None))
def test_rule_is_red_on_a_violation(rule, path, source):
    assert list(rule(PurePosixPath(path), ast.parse("") if path.endswith(".md") else ast.parse(source), source))


@pytest.mark.parametrize(("rule", "path", "source"), GREEN, ids=lambda value: getattr(value, "__name__", None))
def test_rule_is_green_on_what_is_allowed(rule, path, source):
    assert not list(rule(PurePosixPath(path), ast.parse("") if path.endswith(".md") else ast.parse(source), source))


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"gresbox/blocks/x.py"}, "tests/blocks/test_x.py"),
        ({"gresbox/kernels/x.py", "tests/kernels/test_x.py", "benchmarks/ops/x.py"}, "gresbox/ops/x.py"),
        ({"gresbox/kernels/x.py", "gresbox/ops/x.py", "tests/ops/test_x.py", "benchmarks/ops/x.py"}, "tests/kernels/test_x.py"),
        ({"gresbox/kernels/x.py", "gresbox/ops/x.py", "tests/ops/test_x.py", "tests/kernels/test_x.py"}, "benchmarks/ops/x.py"),
        ({"benchmarks/ops/x.py"}, "gresbox/ops/x.py"),
    ],
)
def test_twins_are_red_on_a_violation(files, missing):
    assert any(line.endswith(f"needs {missing}") for line in missing_twins(files))


def test_files_with_an_underscore_need_no_twins():
    assert not missing_twins({"gresbox/ops/_backend.py", "gresbox/ops/__init__.py"})


def test_import_gresbox_imports_torch_alone():
    heavy = ("timm", "transformers", "scipy", "torchmetrics", "PIL", "matplotlib", "torchvision", "einops", "safetensors")
    code = f"import sys, gresbox; print([name for name in {heavy!r} if name in sys.modules], dir(gresbox)[:1] != [])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True"


def test_structures_ops_and_blocks_stay_light():
    code = (
        "import sys, gresbox.structures, gresbox.ops, gresbox.blocks, gresbox.losses; print([n for n in {0} if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code.format("('timm', 'transformers', 'scipy', 'matplotlib')")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
