"""Without transformers, or with one that is too old, the first import that needs it says what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_INS = {  # source of a package `transformers` that hides the real one -> what the error must name
    "missing": ("raise ModuleNotFoundError('transformers')", "not installed"),
    "too old": ("__version__ = '5.16.1'", "5.16.1 is older than 5.17"),
}


@pytest.mark.parametrize("case", STAND_INS)
def test_import_says_what_to_do(case: str, tmp_path: Path) -> None:
    source, expected = STAND_INS[case]
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(source)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import graphs; graphs.from_pretrained"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stdout + run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert "TransformersVersionError" in last and expected in last and "pip install 'transformers>=5.17'" in last, last
