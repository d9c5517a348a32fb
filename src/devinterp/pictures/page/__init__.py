"""A report as one HTML file: charts, tables and text without a network."""
