"""Looking at runs: a self-contained HTML page, a comparison of two, a terminal view (`report.terminal`)."""

from tokenloom.report.page import compare_report, write_report
from tokenloom.report.read import RunData, read_run

__all__ = ["RunData", "compare_report", "read_run", "write_report"]
