"""Which tests of this package guard a row, by the row's name.

A reference is a file under ``tests`` and a name in it. In ``cases`` that is the name of a model or
a loss, which the tests of exactness go through; elsewhere that of a test.
"""

BASIC = "cases/basic.py"
LOSSES = "cases/losses.py"


def _references(file: str, *names: str) -> tuple[str, ...]:
    """Several names in one file."""
    return tuple(f"{file}::{name}" for name in names)


TESTED_BY: dict[str, tuple[str, ...]] = {
    "linear": _references(BASIC, "tanh-mlp"),
    "linear-leading-axes": _references(BASIC, "pooled-tokens", "pooled-grid"),
    "linear-time-first": _references(BASIC, "time-first-mean", "time-first-leading-token"),
    "conv1d": _references(BASIC, "conv1d-stride-dilation"),
    "conv2d": _references(BASIC, "conv2d-stride-groups", "conv2d-zeros"),
    "conv3d": _references(BASIC, "conv3d"),
    "groups": _references(
        BASIC, "conv1d-groups-reflect", "conv2d-stride-groups", "conv2d-depthwise"
    ),
    "padding-mode": _references(BASIC, "conv2d-circular", "conv2d-reflect", "conv2d-replicate"),
    "padding-same": _references(
        BASIC, "conv2d-same-even-kernel", "conv2d-same-even-kernel-circular"
    ),
    "conv-transpose": _references(
        "cases/transposed.py",
        "conv-transpose1d-cropped",
        "conv-transpose2d-stride-groups",
        "conv-transpose3d",
    ),
    "embedding": _references("cases/embeddings.py", "embedding-pooled", "embedding-padding-pooled"),
    "embedding-tied": _references("cases/embeddings.py", "embedding-tied"),
    "embedding-positions": _references("cases/attention.py", "gpt-module-positions"),
    "layer-norm": _references(
        "cases/normalisation.py", "layer-norm", "layer-norm-token-outputs", "layer-norm-2d"
    ),
    "rms-norm": _references("cases/normalisation.py", "rms-norm", "rms-norm-2d"),
    "group-norm": _references("cases/normalisation.py", "group-norm"),
    "instance-norm": _references("cases/normalisation.py", "instance-norm1d", "instance-norm2d"),
    "batch-norm": _references("cases/normalisation.py", "batch-norm1d", "batch-norm2d"),
    "attention": _references(
        "cases/attention.py",
        "attention-batch-first",
        "attention-batch-second",
        "cross-attention-sizes",
    ),
    "transformer": _references(
        "cases/attention.py", "encoder-layer-norm-last", "decoder-layer-norm-last"
    ),
    "called-twice": _references(BASIC, "linear-twice", "conv-twice"),
    "tied": _references(BASIC, "tied-weights"),
    "in-place": _references(BASIC, "inplace-relu-mlp"),
    "parametrized": _references("cases/parametrized.py", "weight-norm", "weight-norm-conv"),
    "functional": _references("cases/products.py", "functional-linear", "matmul-rows"),
    "elementwise": _references("cases/elementwise.py", "layer-scale", "scale-twice"),
    "unknown": (
        *_references("cases/unsupported.py", "lstm", "prelu"),
        "test_unsupported.py::test_diagonal_is_exact_and_warns",
    ),
    "cross-entropy": _references(LOSSES, "ce"),
    "mse": _references(LOSSES, "mse"),
    "bce": _references(LOSSES, "bce"),
    "sum": ("test_exactness_data.py::test_sum_is_count_times_mean",),
    "class-weights": _references(LOSSES, "ce-weight"),
    "ignore-index": _references(LOSSES, "ce-ignore", "ce-ignore-class"),
    "label-smoothing": _references(LOSSES, "ce-smooth"),
    "soft-targets": _references(LOSSES, "ce-soft"),
    "options-together": _references(LOSSES, "ce-weight-smooth-ignore"),
    "pos-weight": _references(LOSSES, "bce-pos-weight"),
    "bce-weight": _references(LOSSES, "bce-weight"),
    "tokens": _references(BASIC, "sequence-outputs"),
    "tokens-flattened": _references(BASIC, "flattened-sequence-outputs"),
    "tokens-regression": _references(BASIC, "sequence-features"),
    "reduction-none": ("test_bad_input.py::test_unsupported_loss_or_reduction",),
    "uneven-batches": ("test_exactness_data.py::test_batches_and_order_do_not_matter",),
    "drop-last": ("test_exactness_data.py::test_data_loader_that_drops_the_last_batch",),
    "one-shot": ("test_bad_input.py::test_one_shot_iterator_keeps_its_batches",),
    "subset-layers": _references(BASIC, "subset-of-parameters"),
    "subset-weight": _references(BASIC, "subset-of-parameters"),
    "training-mode": ("test_untouched.py::test_estimation_in_evaluation_mode",),
    "as-found": ("test_untouched.py::test_estimation_leaves_everything_as_found",),
    "pickle": ("test_operator.py::test_file_round_trip",),
    "weights": ("test_untouched.py::test_operator_is_finished_when_made",),
}
