"""Test settings: one thread a process, and what runs where."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` name the machine that runs them; ``docs/gpu-runs.md`` says when they last did."""
    if torch.cuda.is_available():
        return
    for item in items:
        if (marker := item.get_closest_marker("gpu")) is not None:
            machine = marker.args[0] if marker.args else "1 GPU"
            item.add_marker(pytest.mark.skip(reason=f"needs {machine}; last passed: docs/gpu-runs.md"))
