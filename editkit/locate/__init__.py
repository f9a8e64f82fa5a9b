"""Locating knowledge in a model: keys, target values, contexts and causal tracing."""
