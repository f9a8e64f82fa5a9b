"""Lifelong editing: streams of single edits, the protocols of the MEMOIR paper, its printed figures."""
