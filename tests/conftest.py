"""What all tests share: the path to the modules, and a fixture that runs their command lines."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process: main, *arguments -> exit code, output, errors."""
    from socialr1 import exit_on_error

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        code = 0
        try:
            exit_on_error(main)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(autouse=True)
def few_stories(monkeypatch):
    """Training in this process begins without the seconds that 4000 generated stories take."""
    if "grpo" in sys.modules:
        monkeypatch.setattr("grpo.GENERATED", 80)
