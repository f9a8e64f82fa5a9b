"""Methods that change weights: one file a method on the shared steps of `accumulate` and `locate_then_edit`."""
