"""Measurements of Millrace beside other tools. See bench/README.md."""
