"""A run in words, tables and pictures: report.html, and the tables for a terminal and a README.

`bmjax run` calls write_report and summary_table. Nothing here changes report.json.
"""

from bmjax.report.page import write_report
from bmjax.report.tables import markdown_table, summary_table

__all__ = ["markdown_table", "summary_table", "write_report"]
