"""All methods on the same edits: one table, the same probes, seeds and scorers for everyone."""
