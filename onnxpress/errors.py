"""Every error that onnxpress raises on purpose, and the exit code each one gives on the command line.

OnnxpressError
├── UsageError               exit 2: wrong use or wrong input
│   ├── RecipeError          a recipe or an option: unknown key, wrong type, impossible combination
│   ├── SourceError          a model that cannot be found or read, a task that it has no head for
│   ├── ConversionError      a model that does not convert; says which part was met
│   ├── ArtifactError        an artifact that is missing, corrupt, edited, or of a newer schema
│   ├── InputError           text, arrays or token ids that the model cannot take
│   ├── ProviderError        an execution provider that did not load; names the missing library
│   ├── OutputError          an output folder that cannot be written
│   ├── DeployError          a device that cannot be reached, or did not take a bundle
│   └── MissingExtraError    a package of an extra that is not installed
└── QualityError             exit 1: the result is not good enough
    ├── ParityError          the exported graph does not answer like PyTorch
    ├── BudgetError          no plan keeps the quality budget
    ├── GoldenError          an artifact does not reproduce its golden outputs
    └── SelfTestError        a bundle is not good on its device

A message is one paragraph: what was given, what is allowed, what to do.
"""


class OnnxpressError(Exception):
    """Base of all errors that onnxpress raises on purpose."""

    exit_code = 2


class UsageError(OnnxpressError):
    """Wrong use or wrong input (exit code 2)."""


class RecipeError(UsageError):
    """A recipe or an option is not understood."""


class SourceError(UsageError):
    """A model cannot be found or read, or has no head for the task."""


class ConversionError(UsageError):
    """A model does not convert to ONNX."""


class ArtifactError(UsageError):
    """An artifact is missing, corrupt, edited by hand, or of a newer schema version."""


class InputError(UsageError):
    """Inputs that the model cannot take."""


class ProviderError(UsageError):
    """A requested execution provider did not load."""


class OutputError(UsageError):
    """The output folder cannot be written."""


class DeployError(UsageError):
    """A device cannot be reached, or did not take a bundle."""


class MissingExtraError(UsageError):
    """A package that belongs to an extra is not installed."""


class QualityError(OnnxpressError):
    """The result is not good enough (exit code 1)."""

    exit_code = 1


class ParityError(QualityError):
    """The exported graph does not answer like the PyTorch original."""


class BudgetError(QualityError):
    """No plan keeps the quality budget."""


class GoldenError(QualityError):
    """An artifact does not reproduce its golden outputs."""


class SelfTestError(QualityError):
    """A bundle is not good on its device."""
