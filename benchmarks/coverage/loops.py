"""Which transformers diffusers' pipelines call in their denoising loops, read off their sources."""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass
class Calls:
    """How pipelines call a class in their loops."""

    pipelines: set[str] = dataclasses.field(default_factory=set)
    guidance: set[str] = dataclasses.field(default_factory=set)
    """"concatenated", "separate calls" or "one call", by what the loops do."""


def transformer_classes() -> dict[str, str]:
    """Models of `diffusers.models.transformers` that hold a list of modules, and their files.

    Found in the text, as some need packages that are not there.
    """
    found = {}
    for path in sorted((_root() / "models" / "transformers").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.ClassDef)
                and any(_last_name(base).endswith("ModelMixin") for base in node.bases)
                and any(_last_name(n) == "ModuleList" for n in ast.walk(node))
            ):
                found[node.name] = path.name
    return found


def called_in_loops() -> dict[str, Calls]:
    """What pipelines call of each transformer class in a loop."""
    names = set(transformer_classes())
    found: dict[str, Calls] = collections.defaultdict(Calls)
    for path in sorted((_root() / "pipelines").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                _of_pipeline(node, names, found)
    for path in sorted((_root() / "modular_pipelines").rglob("*denoise*.py")):
        if not path.name.startswith("before"):
            _of_blocks(path, names, found)
    return dict(sorted(found.items()))


def _root() -> Path:
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _of_pipeline(pipeline: ast.ClassDef, names: set[str], found: dict[str, Calls]) -> None:
    """Components are annotated in `__init__` and called as ``self.<name>(...)``."""
    methods = {n.name: n for n in pipeline.body if isinstance(n, ast.FunctionDef)}
    if "__init__" not in methods:
        return
    components: dict[str, set[str]] = {}
    for argument in methods["__init__"].args.args:
        words = _words(argument.annotation) & names
        if words:
            components[argument.arg] = words
    looped = [
        n for m in methods.values() for n in ast.walk(m) if isinstance(n, ast.For | ast.While)
    ]
    within: list[ast.AST] = list(looped)
    for loop in looped:  # and the methods that loops call
        within += [methods[name] for name in _called_on_self(loop) if name in methods]
    aliases = {name: name for name in components}
    for node in (n for method in methods.values() for n in ast.walk(method)):
        if isinstance(node, ast.Assign) and _last_name(node.value) in components:
            aliases[_last_name(node.targets[0])] = _last_name(node.value)
    calls: collections.Counter[str] = collections.Counter()
    seen: set[ast.AST] = set()
    halved = False
    for node in (n for part in within for n in ast.walk(part)):
        if not isinstance(node, ast.Call) or node in seen:
            continue
        seen.add(node)
        name = _last_name(node.func)
        if name in aliases:
            calls[aliases[name]] += 1
        halved |= name == "chunk" and bool(node.args) and _is_two(node.args[0])
    for component, count in calls.items():
        for name in components[component]:
            found[name].pipelines.add(pipeline.name)
            how = "concatenated" if halved else "separate calls" if count > 1 else "one call"
            found[name].guidance.add(how)


def _of_blocks(path: Path, names: set[str], found: dict[str, Calls]) -> None:
    """Modular: ``ComponentSpec("transformer", Class)``, called as ``components.transformer``."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    called = {_last_name(c.func) for c in calls}
    for call in calls:
        if _last_name(call.func) != "ComponentSpec" or len(call.args) < 2:
            continue
        first, kind = call.args[0], _last_name(call.args[1])
        # One that is named elsewhere is the usual one.
        component = first.value if isinstance(first, ast.Constant) else "transformer"
        if component in called and kind in names:
            found[kind].pipelines.add(f"modular {path.parent.name}")
            found[kind].guidance.add("a guider")


def _words(annotation: ast.AST | None) -> set[str]:
    """All names in an annotation, also in one that is written as a string."""
    if annotation is None:
        return set()
    words = {_last_name(n) for n in ast.walk(annotation)}
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= _words(ast.parse(node.value, mode="eval"))
    return words


def _called_on_self(loop: ast.AST) -> Iterator[str]:
    for node in ast.walk(loop):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and _last_name(node.func.value) == "self"
        ):
            yield node.func.attr


def _is_two(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == 2
