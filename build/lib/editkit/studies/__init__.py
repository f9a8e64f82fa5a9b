"""What the notebooks import: one package a chapter, with its streams of edits, its tables and the printed figures.

No method needs anything from here. May import every other room; nothing imports it but notebooks, benchmarks and
the book.
"""
