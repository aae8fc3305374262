"""Reports of causal language models: losses, and how much sooner each arm reaches the baseline's."""

from waveletgpt.report import Kind
from waveletgpt.report.page import write_report
from waveletgpt.report.summary import write_summary
from waveletgpt.report.wording import headline, summary_table

KIND = Kind(write_summary, write_report, summary_table, headline)
