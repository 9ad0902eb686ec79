"""The models that the library is checked on, kept as data.

Every case is tiny, seeded and in float64, so that its dense Fisher matrix is cheap. Together they
cover what layers and uses of layers may look like: shared positions, strides, dilation, groups,
padding of every kind, layers called twice, tied weights, in-place activations, attention, tables of
tokens, weights computed from other parameters, parameters beside data in one tensor, and parameters
that are left out.
"""

from tests.helpers.cases.attention import ATTENTION
from tests.helpers.cases.basic import BASIC
from tests.helpers.cases.case import Case, terms_of
from tests.helpers.cases.computed import COMPUTED
from tests.helpers.cases.copies import COPIES
from tests.helpers.cases.elementwise import ELEMENTWISE
from tests.helpers.cases.embeddings import EMBEDDINGS
from tests.helpers.cases.losses import LOSSES, PLAIN_LOSSES
from tests.helpers.cases.normalisation import NORMALISATION
from tests.helpers.cases.parametrized import PARAMETRIZED
from tests.helpers.cases.products import PRODUCTS
from tests.helpers.cases.transposed import TRANSPOSED_CONVOLUTIONS
from tests.helpers.cases.unsupported import WITHOUT_RULE

FURTHER: tuple[Case, ...] = (
    *TRANSPOSED_CONVOLUTIONS,
    *EMBEDDINGS,
    *NORMALISATION,
    *ELEMENTWISE,
    *ATTENTION,
    *PRODUCTS,
    *PARAMETRIZED,
    *COMPUTED,
    *COPIES,
    *WITHOUT_RULE,
)
CASES: tuple[Case, ...] = (*BASIC, *FURTHER)
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
UNSHARED: tuple[Case, ...] = tuple(case for case in CASES if not case.shared)

assert len(BY_NAME) == len(CASES), "names of cases must differ"

__all__ = [
    "BASIC",
    "BY_NAME",
    "CASES",
    "FURTHER",
    "LOSSES",
    "PLAIN_LOSSES",
    "UNSHARED",
    "WITHOUT_RULE",
    "Case",
    "terms_of",
]
