"""The tree means what it says: who may import whom, what the core may not touch, and where a state may change."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pd_fsm"
TRANSPORTS = ROOT / "transports"

LAYERS = {  # what each part of pd_fsm may import of pd_fsm; errors and the package's own version are everybody's
    "machines": {"machines"},
    "core": {"machines", "core"},
    "kv": {"core", "kv"},
    "runtime": {"machines", "core", "kv", "runtime"},
}
CORE_BANNED = {
    "asyncio",
    "concurrent",
    "ctypes",
    "multiprocessing",
    "numpy",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "torch",
    "zmq",
}
CORE_THIRD_PARTY = {"attrs", "transitions", "msgspec", "graphviz"}  # graphviz draws the diagrams, if it is installed
ONE_TRANSPORT = {
    "mooncake": {"mooncake", "mooncake_data", "mooncake_engine", "mooncake_peer", "mooncake_writer"},
    "zmq": {"zmq", "zmq_data"},
    "nixl": {"nixl", "nixl_agent", "nixl_data", "nixl_memory", "nixl_writer"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "transports":
        parts = ("pd_fsm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, at run time) of everything that `path` imports, wherever in the file; not at run time: for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who is meant"
            assert node.module is not None
            yield node.module, id(node) not in typing_only
            for alias in node.names:  # `from pd_fsm.core import events` imports pd_fsm.core.events
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{node.module}.{alias.name}", id(node) not in typing_only


def part_of(module: str) -> str:
    """`core` of `pd_fsm.core.events`; "" of the package itself and of its errors."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "errors" else ""


@pytest.mark.parametrize("part", sorted(LAYERS))
def test_imports_point_one_way(part: str) -> None:
    for path in modules(PACKAGE / part):
        for module, at_run_time in imports(path):
            if module.split(".")[0] == "pd_fsm" and at_run_time:
                assert module != "pd_fsm", f"{path.name} imports the package, which imports everything"
                assert part_of(module) in LAYERS[part] | {""}, f"{module_name(path)} imports {module}"


@pytest.mark.parametrize("part", ["machines", "core"])
def test_the_core_does_no_io_and_reads_no_clock(part: str) -> None:
    for path in modules(PACKAGE / part):
        for module, _ in imports(path):
            top = module.split(".")[0]
            assert top not in CORE_BANNED, f"{module_name(path)} imports {module}"
            known = top in sys.stdlib_module_names or top in CORE_THIRD_PARTY or top == "pd_fsm"
            assert known, f"{module_name(path)} imports the third party {module}"
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not calls & {"open", "input", "print", "__import__"}, f"{module_name(path)} calls {calls}"


def test_nothing_in_the_package_imports_a_concrete_transport() -> None:
    names = {path.stem for path in modules(TRANSPORTS)} - {"__init__"}
    assert names >= {"memory", "zmq", "zmq_data"}
    for path in modules(PACKAGE):
        for module, _ in imports(path):
            assert not module.startswith(("pd_fsm.transports", "transports")), f"{module_name(path)} imports {module}"


def test_no_transport_imports_another() -> None:
    for path in modules(TRANSPORTS):
        own = next((files for files in ONE_TRANSPORT.values() if path.stem in files), {path.stem})
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] == "pd_fsm" and len(parts) > 1:
                assert parts[1] in {"machines", "core", "kv", "runtime", "errors", "transports"}, f"{path.name} imports {module}"
                if parts[1] == "transports" and len(parts) > 2:
                    assert parts[2] in own, f"{path.name} imports {module}"


def test_a_state_is_assigned_in_exactly_one_function() -> None:
    """Every change of a room, a lease or a peer goes through `SessionCore.move`; that of the registry's tables is no machine's."""
    found = []
    for path in modules(PACKAGE) + modules(TRANSPORTS):
        tree = ast.parse(path.read_text())
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
            for node in ast.walk(function):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                for target in targets:
                    for each in ast.walk(target) if target is not None else ():
                        written = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and each.attr == "state"
                        if written and ast.unparse(each) != "self.state":
                            found.append((module_name(path), function.name))
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
                    assert "'state'" not in ast.unparse(node), f"{path}: {ast.unparse(node)}"
    assert found == [("pd_fsm.core.session", "move")]


def test_no_module_runs_what_it_is_given() -> None:
    banned_modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    banned_calls = {"eval", "exec", "compile", "np.load", "numpy.load", "torch.load"}
    for path in modules(PACKAGE) + modules(TRANSPORTS):
        assert not banned_modules & {module.split(".")[0] for module, _ in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in banned_calls, f"{path}:{node.lineno}"


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = ["torch", "aiohttp", "mooncake", "nixl", "mori", "rich", "redis", "pd_fsm.transports.zmq", "pd_fsm.transports.memory"]
    code = f"import sys, pd_fsm; print([name for name in {heavy!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_core_alone_imports_neither_numpy_nor_zmq() -> None:
    code = (
        "import sys, types, importlib.util\n"
        "spec = importlib.util.find_spec('pd_fsm')\n"
        "package = types.ModuleType('pd_fsm'); package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['pd_fsm'] = package\n"
        "import pd_fsm.core.session\n"
        "print([name for name in ('numpy', 'zmq', 'torch', 'asyncio') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


def test_these_checks_see_what_they_look_for(tmp_path: Path) -> None:
    """The scanner itself: imports inside functions and blocks are found, those for type checkers are told apart."""
    path = tmp_path / "sample.py"
    for_checkers = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    path.write_text(for_checkers + "def f():\n    import socket as s\n    from os import path\n")
    assert dict(imports(path)) == {"typing": True, "torch": False, "socket": True, "os": True}
