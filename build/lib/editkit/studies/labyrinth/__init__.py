"""Experiments of the chapter on sequential editing: sequences, streams, health, revisions."""
