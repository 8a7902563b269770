"""`cera-report`: any number of runs side by side."""

from cera_train.report.disagree import disagree
from cera_train.report.page import Report, say_report, write_report

__all__ = ["Report", "disagree", "say_report", "write_report"]
