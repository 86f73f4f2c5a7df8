"""What a user installs, imports and pastes: the wheel, the cost of importing it, and the README's blocks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("moe_ops", "lowering", "graphs")
IMPORT_SECONDS = 0.3  # of `import moe_ops`, after `import torch`


def run_python(code: str, timeout: float = 120) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def test_import_is_quick_and_light():
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import moe_ops\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'triton', 'transformers', 'numpy', 'typer', 'rich', 'lowering', 'graphs'}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(seconds, *sorted(new & heavy))"
    )
    # The quickest of three: a busy machine may be slow, but slow code is never quick.
    runs = [run_python(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < IMPORT_SECONDS
    assert runs[0][1:] == []


def test_import_registers_the_five_ops_without_a_gpu():
    names = "metadata_update agv_dispatch align_block_size fused_moe rsv_combine"
    code = f"import torch, moe_ops; print(*[n for n in '{names}'.split() if hasattr(torch.ops.moe_ep, n)])"
    assert run_python("import torch; torch.cuda.is_available = lambda: False\n" + code).split() == names.split()


def test_console_command_is_installed():
    scripts = entry_points(group="console_scripts", name="moe-ep")
    assert [s.value for s in scripts] == ["graphs.cli:main"]
    assert callable(next(iter(scripts)).load())


def test_wheel_carries_the_packages_and_their_tables(tmp_path: Path):
    source = tmp_path / "source"  # a copy: what an earlier build left in the checkout must not count
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, timeout=200, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("moe_ep-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [p for package in PACKAGES for p in (ROOT / package).rglob("*")]
    wanted = {str(p.relative_to(ROOT)) for p in shipped if p.suffix in (".py", ".json")}
    assert not wanted - names
    assert not {n for n in names if n.split("/")[0] in ("tests", "benchmarks", "docs")}


def test_ci_runs_the_readmes_test_command():
    test_command = readme_blocks("sh")[1].strip()
    assert test_command.endswith("python -m pytest -n 2")
    assert (ROOT / ".ci/run").read_text().rstrip().endswith(test_command)


def test_readmes_first_command_runs_the_main_job():
    command = readme_blocks("sh")[0].strip()
    assert command.endswith(".venv/bin/moe-ep decode")
    out = run_python("from graphs.cli import main; import sys; sys.argv = ['moe-ep', 'decode', '--help']; main()")
    for option in ("--model", "--ranks", "--tokens", "--batch", "--device", "--dtype", "--json"):
        assert option in out


def test_readmes_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"-e '\.\[([a-z,]+)\]'", README):
        assert set(named.split(",")) <= set(extras)


def test_readme_example_works_when_pasted():
    (example,) = readme_blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    assert "tensor(" in run_python(example, timeout=280)


def test_every_page_is_in_the_index():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([a-z-]+\.md)\)", (ROOT / "docs/index.md").read_text()))


def test_every_error_is_in_troubleshooting():
    sources = [(ROOT / package / "errors.py").read_text() for package in PACKAGES]
    classes = {name for source in sources for name in re.findall(r"^class (\w+)", source, flags=re.M)}
    assert len(classes) > 10
    assert classes <= set(re.findall(r"`(?:moe_ops\.errors\.)?(\w+)`", (ROOT / "docs/troubleshooting.md").read_text()))


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to {missing}"
