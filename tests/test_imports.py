"""The law of imports: downward only. What a room may know is written here; who breaks it finds the line that does."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(ROOT / "hyperlm").rglob("*.py")]
}

# From the bottom to the top: a module may import those of its own room and of rooms below. A package stands for all that is in it.
ROOMS = [
    "batch config declare env errors files geometry cuda_graph random startup tree",  # words that all others use
    "kernels precision stages state loss optim",  # operations, and what learns by them
    "mixers model",  # the decoder
    "runs tokenizer encoder data",  # text
    "memory residence step flops",  # a step, and where it happens
    "checkpoint trained sample",  # what is kept, and what it writes
    "evals log passkey health",  # what is told of a run
    "cli launch conversation terminal session finetune doctor forecast api hyperlm command __main__",  # what people use
    "bench",
]
SCRIPTS = ("train", "bench", "chat", "configs")
ALONE = {  # packages that one module (or one package of ours) alone imports: slow to import, or to be replaced in one place
    "orbax": "hyperlm.checkpoint.storage",
    "matplotlib": "hyperlm.bench.figures",
    "tensorboard": "hyperlm.log",
    "rensa": "hyperlm.data.duplicates",
    "fastokens": "hyperlm.encoder",
    "huggingface_hub": "hyperlm.data.hub",
    "prompt_toolkit": "hyperlm.terminal",
}


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and name of all that a module imports, wherever in it; of `from a import b` both a.b and a."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def own(path: Path) -> set[str]:
    """The modules of this repository that a module imports."""
    names = {name if name in MODULES else name.rpartition(".")[0] for _, name in imports(path)}
    return names & MODULES.keys()


def room(name: str) -> int:
    first = name.split(".")[1] if "." in name else name
    return next(level for level, names in enumerate(ROOMS) if first in names.split())


@pytest.mark.parametrize("name", [name for name in MODULES if name not in SCRIPTS])
def test_imports_go_downward(name):
    upward = {other for other in own(MODULES[name]) if other in SCRIPTS or room(other) > room(name)}
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, of a room above its own"


def test_imports_never_run_in_circles():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in own(MODULES[name]) - {name}:
                visit(other, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize(("package", "module"), ALONE.items())
def test_a_package_is_imported_by_one_module_alone(package, module):
    importers = {name for name, path in MODULES.items() if any(package in part.split(".") for _, part in imports(path))}
    assert importers and {name for name in importers if name != module and not name.startswith(f"{module}.")} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "hyperlm/residence").rglob("*.py")), ids=lambda path: path.stem)
def test_where_memory_and_order_are_decided_every_file_and_function_can_be_read_at_once(path):
    text = path.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert len(text.splitlines()) <= 250
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Nonlocal)]


def test_nothing_outside_knows_which_residence_runs():
    outside = [path for name, path in MODULES.items() if not name.startswith(("hyperlm.residence", "hyperlm.config", "configs"))]
    assert not [path.name for path in outside if '"host"' in path.read_text()]
