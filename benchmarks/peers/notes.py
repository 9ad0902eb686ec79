"""What has to be said of single cells, so that a number is not read for more than it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A footnote.

    Attributes:
        text: In Markdown.
        by_definition: Whether the deviation is what the package documents or means, so that the
            cell says "differs" and not "wrong".
    """

    text: str
    by_definition: bool = False


CURVLINOPS, NNGEOMETRY = "curvlinops-for-pytorch", "nngeometry"
KRONFLUENCE, LAPLACE = "kronfluence", "laplace-torch"

_GROUPS = Note(
    "averages the inputs over the groups, as the docstring of its `extract_patches` says",
    by_definition=True,
)
_LAPLACE_FACTORS = Note("its Kronecker factors are those of curvlinops")
_FIRST_AXIS = Note("takes the first axis for that of the examples")
_HOOKED = Note(
    "sees the input before the module pads it, and pads it with zeros whatever `padding_mode` says"
)
_ONE_USE = Note("keeps the input of the last call, and pairs it with the gradients of both")
_TWO_MODULES = Note(
    "sees two modules, each with a block of its own; the table adds both, which leaves out their "
    "cross-terms"
)
_LAST_USE = Note(
    "the product keeps the block of the last of the modules; the trace adds both, without their "
    "cross-terms"
)
_ONLY_LINEAR = Note("sees the use in the `Linear` only")
_MODE = Note(
    "takes the model in the mode that it is in, and so estimates another function",
    by_definition=True,
)
_NO_OPTIONS = Note(
    "its exact Fisher matrix has a closed form that does not look at the options of the loss; its "
    "empirical one uses the loss itself"
)
_KERNELS_ONLY = Note(
    "documents that it supports `Linear` and `Conv2d` called as modules, and passes over the rest"
)
_ATTENTION = Note(
    "with the names of the other modules given; by itself it fails on the output layer of attention"
)
_TOKENS = Note(
    "its source says that terms of the loss must not depend on each other, and it refuses outputs "
    "with more than two axes for that reason; the same outputs flattened go unnoticed"
)
_LIKELIHOODS = Note("is given the name of a likelihood, not a loss")

PASSED_OVER = (
    "conv1d",
    "conv3d",
    "conv-transpose",
    "embedding",
    "embedding-positions",
    "layer-norm",
    "rms-norm",
    "group-norm",
    "instance-norm",
    "batch-norm",
    "parametrized",
    "functional",
    "elementwise",
    "unknown",
)
NOTES: dict[tuple[str, str], Note] = {
    ("linear-time-first", CURVLINOPS): _FIRST_AXIS,
    ("linear-time-first", KRONFLUENCE): _FIRST_AXIS,
    ("linear-time-first", LAPLACE): _LAPLACE_FACTORS,
    ("groups", CURVLINOPS): _GROUPS,
    ("groups", KRONFLUENCE): _GROUPS,
    ("groups", LAPLACE): Note(
        "its Kronecker factors are those of curvlinops, which averages the inputs over the groups",
        by_definition=True,
    ),
    ("groups", NNGEOMETRY): Note(
        "estimates a matrix for a weight of full size, as if there were no groups"
    ),
    ("padding-mode", CURVLINOPS): _HOOKED,
    ("padding-mode", NNGEOMETRY): _HOOKED,
    ("padding-mode", KRONFLUENCE): _HOOKED,
    ("padding-mode", LAPLACE): _LAPLACE_FACTORS,
    ("embedding-tied", CURVLINOPS): _ONLY_LINEAR,
    ("embedding-tied", KRONFLUENCE): _ONLY_LINEAR,
    ("called-twice", CURVLINOPS): _ONE_USE,
    ("called-twice", NNGEOMETRY): _ONE_USE,
    ("called-twice", KRONFLUENCE): Note("with its option `has_shared_parameters`"),
    ("attention", KRONFLUENCE): _ATTENTION,
    ("transformer", KRONFLUENCE): _ATTENTION,
    ("tied", CURVLINOPS): _LAST_USE,
    ("tied", NNGEOMETRY): _TWO_MODULES,
    ("tied", KRONFLUENCE): _TWO_MODULES,
    **{(row, KRONFLUENCE): _KERNELS_ONLY for row in PASSED_OVER},
    ("class-weights", CURVLINOPS): _NO_OPTIONS,
    ("ignore-index", CURVLINOPS): _NO_OPTIONS,
    ("options-together", CURVLINOPS): _NO_OPTIONS,
    ("pos-weight", CURVLINOPS): _NO_OPTIONS,
    ("bce-weight", CURVLINOPS): _NO_OPTIONS,
    ("class-weights", LAPLACE): _LIKELIHOODS,
    ("tokens-flattened", CURVLINOPS): _TOKENS,
    ("drop-last", LAPLACE): Note(
        "takes the number of examples from `loader.dataset`, as its documentation says",
        by_definition=True,
    ),
    ("drop-last", NNGEOMETRY): Note("divides by the length of the loader's sampler"),
    ("training-mode", CURVLINOPS): _MODE,
    ("training-mode", NNGEOMETRY): _MODE,
    ("as-found", KRONFLUENCE): Note(
        "`prepare_model` replaces modules by wrappers, as its documentation says",
        by_definition=True,
    ),
    ("as-found", LAPLACE): Note(
        "`fit` puts the model into evaluation mode, resets `.grad` and sets `output_size`"
    ),
    ("weights", CURVLINOPS): Note("warns of it", by_definition=True),
}
