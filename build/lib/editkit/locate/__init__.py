"""Locating knowledge in a model: keys, target values, second moments, contexts and causal tracing.

May import `base` and `models`.
"""
