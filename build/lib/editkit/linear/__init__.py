"""Pure float64 linear algebra of model editing: no model, no tokenizer, no device choice.

Its theorems are property tests. May import `base`.
"""
