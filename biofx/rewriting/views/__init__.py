"""A report as text, table, picture and page."""
