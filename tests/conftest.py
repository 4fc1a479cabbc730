"""What holds for every test: few threads, numbers of its own, and no silent skips.

All share one cache of compiled operators.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before anything loads torch, which reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / ".cache" / "torch_extensions")
)

SKIPPED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="fail when a test was skipped for any reason but a missing GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = []
    config.pluginmanager.register(_Skips(config), "skips")


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """Let no test's random numbers depend on which tests this process ran before."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for_gpu = [item for item in items if "gpu" in item.keywords]
    if not for_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class _Skips:
    """Collects what was skipped; under xdist the controller gets every worker's reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure is reported as skipped, too; a whole file has no keywords.
        allowed = hasattr(report, "wasxfail") or "gpu" in getattr(report, "keywords", ())
        if report.skipped and not allowed:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.config.stash[SKIPPED].append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.config.option.no_skips and self.config.stash[SKIPPED]:
            session.exitstatus = max(int(session.exitstatus), int(pytest.ExitCode.TESTS_FAILED))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        skipped = self.config.stash[SKIPPED]
        if self.config.option.no_skips and skipped:
            terminalreporter.section("skipped, which --no-skips takes for failed", red=True)
            for line in skipped:
                terminalreporter.line(line)
