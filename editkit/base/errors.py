"""Errors of editkit. Every message says what is wrong and names the fix."""


class EditkitError(ValueError):
    """Base of all errors raised on purpose by editkit."""


class RequestError(EditkitError):
    """An edit request (fact) cannot be used: subject, prompt or target is malformed."""


class ModelError(EditkitError):
    """The model, its architecture or a layer/module name does not fit the operation."""


class DataError(EditkitError):
    """A data file or record is missing, malformed or fails its hash check."""


class UnavailableError(DataError):
    """Data or a model that this machine cannot get now. A run that needs it is not available here, not failed."""


class ConfigError(EditkitError):
    """A configuration field is unknown, of the wrong type or out of range."""


class NumericsError(EditkitError):
    """A numerical input is not usable: NaN or Inf, wrong shape, singular system."""
