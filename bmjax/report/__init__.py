"""A run in words, tables and pictures. `bmjax run` calls write_report and summary_table."""

from bmjax.report.columns import markdown_table, summary_table
from bmjax.report.page import write_report

__all__ = ["markdown_table", "summary_table", "write_report"]
