"""Experiments of the chapter on ripple effects: trials, preservation sets, costs, audits."""
