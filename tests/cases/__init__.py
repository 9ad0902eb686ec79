"""The models that the library is checked on, kept as data.

Every case is tiny, seeded and in float64, so that its dense Fisher matrix is cheap. Together they
cover what layers and uses of layers may look like: shared positions, strides, dilation, groups,
padding of every kind, layers called twice, tied weights, in-place activations, attention, tables of
tokens, weights computed from other parameters, and parameters that are left out.
"""

from tests.cases.attention import ATTENTION
from tests.cases.basic import BASIC
from tests.cases.case import Case, terms_of
from tests.cases.computed import COMPUTED
from tests.cases.elementwise import ELEMENTWISE
from tests.cases.embeddings import EMBEDDINGS
from tests.cases.losses import LOSSES, PLAIN_LOSSES
from tests.cases.normalisation import NORMALISATION
from tests.cases.parametrized import PARAMETRIZED
from tests.cases.products import PRODUCTS
from tests.cases.transposed import TRANSPOSED_CONVOLUTIONS
from tests.cases.unsupported import WITHOUT_RULE

FURTHER: tuple[Case, ...] = (
    *TRANSPOSED_CONVOLUTIONS,
    *EMBEDDINGS,
    *NORMALISATION,
    *ELEMENTWISE,
    *ATTENTION,
    *PRODUCTS,
    *PARAMETRIZED,
    *COMPUTED,
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
