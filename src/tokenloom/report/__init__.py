"""Looking at runs: a self-contained HTML page, a comparison of two, a terminal view (`report.terminal`), token maps."""

from tokenloom.report.group import TokenGroup, token_group
from tokenloom.report.page import compare_report, write_report
from tokenloom.report.read import RunData, read_run

__all__ = ["RunData", "TokenGroup", "compare_report", "read_run", "token_group", "write_report"]
