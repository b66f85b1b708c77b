"""A run in words, tables and pictures. `bmjax run` calls write_report and summary_table."""

from bmjax.report.page import write_report
from bmjax.report.tables import markdown_table, summary_table

__all__ = ["markdown_table", "summary_table", "write_report"]
