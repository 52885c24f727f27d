"""The layers of the package, read from the imports of every file, and the shape of each file."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).parents[1] / "src" / "nnsight"

# Lowest first: a layer imports from the lines before its own (those of the first line, from each other too).
# `nnsight` is the package's own `__init__.py`.
LAYERS = (
    ("errors", "config", "_patches"),
    ("_core", "_capture", "_bundled"),
    ("source",),
    ("envoy",),
    ("trace",),
    ("names",),
    ("modeling",),
    ("protocol",),
    ("remote", "sandbox"),
    ("vllm",),
    ("server",),
    ("experiments", "plots"),
    ("nnsight",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Layers that see less than what lies below them.
ONLY = {
    "_core": {"errors", "config"},
    "_capture": {"errors"},
    "_bundled": set(),
}
# They see the package as a user does: `from nnsight import X`.
PUBLIC_ONLY = {"experiments", "plots"}

# Where each third-party library may be imported; one that is not listed may be imported nowhere.
# A home is a folder or a file, less the _ and the .py of its name.
HOMES = {
    "torch": tuple(RANK.keys() - {"errors", "config", "_capture", "_bundled", "nnsight"}),
    "greenlet": ("_core", "vllm"),
    "transformers": ("modeling", "vllm"),
    "accelerate": ("modeling",),
    "peft": ("modeling",),
    "tokenizers": ("modeling",),
    "huggingface_hub": ("modeling", "experiments"),
    "PIL": ("modeling",),
    "diffusers": ("modeling/diffusion",),
    "vllm": ("vllm",),
    "safetensors": ("modeling", "protocol", "experiments"),
    "msgspec": ("protocol", "remote", "sandbox", "server", "vllm"),
    "httpx": ("remote",),
    "fastapi": ("server",),
    "uvicorn": ("server",),
    "sqlalchemy": ("server",),
    "prometheus_client": ("server",),
    "pythonjsonlogger": ("server",),
    "jinja2": ("server",),
    "ray": ("server",),
    "fsspec": ("server",),
    "numpy": ("experiments", "plots"),
    "pandas": ("experiments",),
    "tqdm": ("experiments",),
    "matplotlib": ("plots",),
}
# What may be imported inside a function: a heavy or optional library, and our own folders that need one.
DEFERRED = {
    *("transformers", "accelerate", "peft", "diffusers", "vllm", "PIL", "pandas", "matplotlib", "uvicorn", "ray"),
    *("huggingface_hub", "torch.nn.attention.flex_attention"),  # the latter brings the compiler with it
    *("nnsight.plots", "nnsight.server", "nnsight.vllm"),
    "torch.nn.attention.flex_attention",  # it loads the compiler
}

FOLDERS = {
    *("_core", "_capture", "_bundled", "source", "envoy", "trace", "names", "modeling"),
    *("experiments", "plots", "protocol", "remote", "sandbox", "server", "vllm", "cli"),
}
PUBLIC_FILES = {"errors.py", "config.py", "modeling/vllm.py"}
# They hold no code, only a name by which something that lies above them is known.
SIGNPOSTS = {"modeling/vllm.py"}

LONGEST = 450
LONG_FILES: dict[str, str] = {}  # path -> why it is not split


class Import(NamedTuple):
    file: str
    line: int
    target: str  # a module: "torch.nn", "nnsight._core._site"
    names: tuple[str, ...]  # what follows `from target import`
    in_function: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


class Package:
    """The source files below a folder that stands for `nnsight`."""

    def __init__(self, root: Path) -> None:
        self.texts = {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in root.rglob("*.py")}
        self.trees = {name: ast.parse(text, name) for name, text in self.texts.items()}
        self.modules = {module_name(file): file for file in self.texts}
        self.imports = [found for file, tree in self.trees.items() for found in self._imports(file, tree)]

    def _imports(self, file: str, tree: ast.AST) -> Iterator[Import]:
        for node, in_function, typing_only in statements(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, node.lineno, alias.name, (), in_function, typing_only)
            elif isinstance(node, ast.ImportFrom):
                base = absolute(file, node)
                for alias in node.names:  # `from . import _site` imports a module where there is one
                    full = f"{base}.{alias.name}"
                    target, names = (full, ()) if full in self.modules else (base, (alias.name,))
                    yield Import(file, node.lineno, target, names, in_function, typing_only)


def module_name(file: str) -> str:
    return ".".join(("nnsight", *file.removesuffix(".py").removesuffix("__init__").strip("/").split("/"))).rstrip(".")


def absolute(file: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ("nnsight", *file.split("/")[:-1])
    return ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))


def statements(
    tree: ast.AST, in_function: bool = False, typing_only: bool = False
) -> Iterator[tuple[ast.AST, bool, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, in_function, typing_only
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        yield from statements(node, inside, typing)


def layer(module: str) -> str:
    """The name in `LAYERS` that a module of the package belongs to."""
    return "nnsight" if module == "nnsight" else module.split(".")[1]


def internal(package: Package) -> list[Import]:
    return [found for found in package.imports if found.target.split(".")[0] == "nnsight"]


def upward_imports(package: Package) -> list[str]:
    breaches = []
    for found in internal(package):
        source, target = layer(module_name(found.file)), layer(found.target)
        if source == target or source in PUBLIC_ONLY or found.file in SIGNPOSTS:
            continue
        if source not in RANK or target not in RANK:
            breaches.append(f"{found}: not a layer")
        elif source in ONLY:
            if target not in ONLY[source]:
                breaches.append(f"{found}: {source} sees only {sorted(ONLY[source])}")
        elif RANK[target] > RANK[source] or (RANK[target] == RANK[source] and RANK[source] > 0):
            breaches.append(f"{found}: {target} is not below {source}")
    return breaches


def private_imports(package: Package) -> list[str]:
    """Imports of `PUBLIC_ONLY` layers that are neither their own files nor names a user may import."""
    breaches = []
    for found in internal(package):
        source = layer(module_name(found.file))
        if source not in PUBLIC_ONLY or layer(found.target) == source:
            continue
        parts = (*found.target.split("."), *found.names)
        if len(parts) > 2 or any(part.startswith("_") for part in parts):
            breaches.append(f"{found}: {source} uses `from nnsight import X` with public names")
    return breaches


def foreign_imports(package: Package) -> list[str]:
    breaches = []
    for found in package.imports:
        library = found.target.split(".")[0]
        if library == "nnsight" or library in sys.stdlib_module_names:
            continue
        homes = HOMES.get(library, ())
        place = found.file.removesuffix(".py").replace("/_", "/")
        if not any(f"{place}/".startswith(f"{home}/") for home in homes):
            breaches.append(f"{found}: allowed in {sorted(homes) or 'no layer; add it to HOMES'}")
    return breaches


def deferred_imports(package: Package) -> list[str]:
    """Imports inside functions; `__init__.py` of the package loads its heavy names that way."""
    return [
        f"{found}: move it to the top of the file"
        for found in package.imports
        if found.in_function
        and found.file != "__init__.py"
        and not any(f"{found.target}.".startswith(f"{name}.") for name in DEFERRED)
    ]


def import_cycle(package: Package) -> list[str]:
    """One cycle among the imports that run when a module is loaded."""
    graph: dict[str, set[str]] = {}
    for found in internal(package):
        if not (found.in_function or found.typing_only):
            graph.setdefault(module_name(found.file), set()).add(found.target)
    for edges in graph.values():
        edges &= package.modules.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def misnamed_files(package: Package) -> list[str]:
    breaches = []
    for file in package.texts:
        *folders, name = file.split("/")
        paths = ["/".join(folders[: depth + 1]) for depth in range(len(folders))]
        breaches += [
            f"{path}/: not a folder of the layout, and does not start with _"
            for path in paths
            if path not in FOLDERS and not (path.count("/") and path.split("/")[-1].startswith("_"))
        ]
        if not name.startswith("_") and file not in PUBLIC_FILES:
            breaches.append(f"{file}: an implementation module starts with _")
    return sorted(set(breaches))


def long_files(package: Package) -> list[str]:
    lengths = {file: text.count("\n") for file, text in package.texts.items()}
    long = {file for file, length in lengths.items() if length > LONGEST}
    return [
        *(f"{file}: {lengths[file]} lines, at most {LONGEST}; split it" for file in sorted(long - LONG_FILES.keys())),
        *(f"{file}: in LONG_FILES without need" for file in sorted(LONG_FILES.keys() - long)),
    ]


def undescribed_files(package: Package) -> list[str]:
    return [f"{file}: no docstring" for file, tree in package.trees.items() if not ast.get_docstring(tree)]


CHECKS = (
    upward_imports,
    private_imports,
    foreign_imports,
    deferred_imports,
    import_cycle,
    misnamed_files,
    long_files,
    undescribed_files,
)


@pytest.fixture(scope="module")
def package() -> Package:
    found = Package(SRC)
    assert "__init__.py" in found.texts
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_keeps_the_layout(check, package):
    assert check(package) == []


def package_of(root: Path, files: dict[str, str]) -> Package:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Doc."""\n{text}', "utf-8")
    return Package(root)


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (upward_imports, "source/_a.py", "from nnsight.trace import Tracer"),
        (upward_imports, "source/_a.py", "from ..trace import Tracer"),
        (upward_imports, "source/_a.py", "import nnsight.trace"),
        (upward_imports, "source/_a.py", "def f():\n    from nnsight.trace import Tracer"),
        (upward_imports, "source/_a.py", "from nnsight import LanguageModel"),
        (upward_imports, "source/_a.py", "import nnsight.unheard_of"),
        (upward_imports, "errors.py", "from nnsight._core import Site"),
        (upward_imports, "remote/_a.py", "from nnsight.sandbox import Jail"),
        (upward_imports, "_core/_a.py", "from nnsight import _patches"),
        (upward_imports, "_capture/_a.py", "from nnsight.config import CONFIG"),
        (private_imports, "experiments/_a.py", "from nnsight.trace import Tracer"),
        (private_imports, "experiments/_a.py", "from nnsight import _core"),
        (private_imports, "plots/_a.py", "from ..experiments import Result"),
        (foreign_imports, "_core/_a.py", "import numpy"),
        (foreign_imports, "_capture/_a.py", "import torch"),
        (foreign_imports, "trace/_a.py", "from transformers.cache_utils import Cache"),
        (foreign_imports, "modeling/_text.py", "import vllm"),
        (foreign_imports, "modeling/_text.py", "import nobody_knows"),
        (foreign_imports, "__init__.py", "import torch"),
        (deferred_imports, "trace/_a.py", "def f():\n    import json"),
        (
            deferred_imports,
            "trace/_a.py",
            "class A:\n    async def f(self):\n        from nnsight._core import Site",
        ),
        (import_cycle, "trace/_b.py", "from nnsight.trace._a import x"),
        (import_cycle, "trace/_a.py", "from nnsight.trace import _a"),
        (misnamed_files, "trace/tracer.py", ""),
        (misnamed_files, "_helpers/_a.py", ""),
        (misnamed_files, "trace/parts/_a.py", ""),
        (long_files, "trace/_c.py", "\n" * LONGEST),
    ],
)
def test_breach_is_found(check, file, text, tmp_path):
    files = {"__init__.py": "", "_patches.py": "", "trace/__init__.py": "", "trace/_a.py": "from . import _b"}
    assert check(package_of(tmp_path, files)) == []
    assert check(package_of(tmp_path, files | {file: text})) != []


def test_file_without_docstring_is_found(tmp_path):
    (tmp_path / "_a.py").write_text("import json\n")
    assert undescribed_files(Package(tmp_path)) == ["_a.py: no docstring"]


def test_what_is_allowed_passes(tmp_path):
    files = {
        "__init__.py": "def __getattr__(name):\n    from nnsight.modeling import LanguageModel",
        "errors.py": "",
        "config.py": "from nnsight.errors import NNsightError",
        "_patches.py": "import torch",
        "_core/__init__.py": "from ._engine import Engine as Engine",
        "_core/_engine.py": "import greenlet, torch.nn\nfrom ..config import CONFIG\nfrom ._site import Site",
        "_core/_site.py": "if TYPE_CHECKING:\n    from ._engine import Engine",
        "trace/_tracer.py": "from nnsight import _patches, errors\nfrom nnsight.envoy import Envoy",
        "modeling/_text.py": "from transformers import AutoTokenizer\ndef f():\n    import PIL.Image",
        "modeling/_diffusion.py": "import diffusers",
        "vllm/_engine.py": "import vllm",
        "experiments/_patching.py": "import nnsight, torch\nfrom nnsight import LanguageModel, errors",
        "experiments/_lens.py": "from ._patching import sweep\ndef f():\n    from nnsight import plots",
        "plots/__init__.py": "import matplotlib.pyplot",
        "cli/_demo.py": "from nnsight import LanguageModel\ndef f():\n    from nnsight.server import serve",
    }
    package = package_of(tmp_path, files)
    assert {check.__name__: check(package) for check in CHECKS} == {check.__name__: [] for check in CHECKS}
