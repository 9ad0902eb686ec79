"""The methods that are compared: each a way to make an Avalanche strategy.

To add one, write a function that makes its plugin and give it an entry in :data:`METHODS`.
Imports of Avalanche are inside the functions, because the command line reads the names here.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from benchmarks.configuration import Configuration

AUTO = "auto"  # the package finds the number
# λ and temperature where nobody says anything else.
DEFAULT_STRENGTH: float | str = "auto"
DEFAULT_TEMPERATURE: float | str = "auto"

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "sgd": "SGD"}
SGD_MOMENTUM = 0.9
# Adam's rates are those of steps that are divided by the size of the gradient; SGD's are longer.
SGD_FACTOR = 20.0


@dataclass(frozen=True)
class PluginSettings:
    """What a method's plugin is made from; all examples are used where ``samples`` is None."""

    strength: Any  # λ: a number, or :data:`AUTO`
    samples: int | None
    seed: int
    options: "Configuration"


MakePlugin = Callable[[PluginSettings], Any]


def _no_plugin(settings: PluginSettings) -> None:
    """Plain training."""


def _avalanche(plugin: str, strength: str, **others: Any) -> MakePlugin:
    """A plugin of Avalanche's, which has a name of its own for λ."""

    def make(settings: PluginSettings) -> Any:
        from benchmarks import avalanche_names

        return getattr(avalanche_names, plugin)(**{strength: settings.strength}, **others)

    return make


def _published(name: str) -> MakePlugin:
    """A method of :mod:`benchmarks.baselines`."""

    def make(settings: PluginSettings) -> Any:
        from benchmarks import baselines

        plugin = getattr(baselines, name)
        return plugin(settings.strength, samples=settings.samples, seed=settings.seed)

    return make


def _rotated_ewc(update: str, mode: str = "merged") -> MakePlugin:
    """Elastic weight consolidation in the rotated basis, in one of its updates and modes."""

    def make(settings: PluginSettings) -> Any:
        from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

        options = settings.options
        found: Any = {} if options.plasticity is None else {"plasticity": options.plasticity}
        return RotatedEWCPlugin(
            ewc_lambda=settings.strength,
            mode=mode,
            update=update,
            every=options.every if update == "tangent" else 1,
            temperature=options.temperature,
            fisher_type=options.fisher_type,
            num_samples=settings.samples,
            seed=settings.seed,
            **found,
        )

    return make


@dataclass(frozen=True)
class Method:
    """A way to learn one task after another, or all at once."""

    make_plugin: MakePlugin  # makes what sets the method apart, or None for plain training
    # λ by default: that of the plugin's own signature, else 1; None where there is no λ.
    default_strength: float | str | None = 1.0
    attached: bool = False  # whether the penalty takes part in steps, in which λ can be found
    centre: float = 1.0  # middle of the range of λ that is searched, a power of ten
    trained_jointly: bool = False  # whether all tasks are learned at once
    needs_sgd: bool = False  # whether it has SGD with momentum, whatever ``--optimizer`` says
    by_default: bool = False  # whether ``permuted-mnist`` runs it when no methods are named


METHODS: dict[str, Method] = {
    "naive": Method(_no_plugin, None, by_default=True),
    "ewc": Method(
        _avalanche("EWCPlugin", "ewc_lambda", mode="separate"), centre=100.0, by_default=True
    ),
    "ewc-online": Method(
        _avalanche("EWCPlugin", "ewc_lambda", mode="online", decay_factor=1.0), centre=100.0
    ),
    "si": Method(_published("SynapticIntelligence")),
    "mas": Method(_avalanche("MASPlugin", "lambda_reg"), centre=0.1),
    "lwf": Method(_avalanche("LwFPlugin", "alpha")),
    "r-ewc": Method(_published("PublishedRotatedEWC"), centre=100.0),
    "kronecker-laplace": Method(_published("KroneckerLaplace")),
    "diagonal-ewc": Method(_published("DiagonalFisherEWC"), centre=10.0),
    "ncl": Method(_published("NaturalContinualLearning"), needs_sgd=True),
    "rotated-ewc": Method(
        _rotated_ewc("rotated"), DEFAULT_STRENGTH, attached=True, by_default=True
    ),
    "rotated-ewc-tangent": Method(_rotated_ewc("tangent"), DEFAULT_STRENGTH, attached=True),
    "rotated-ewc-gradient": Method(_rotated_ewc("gradient"), DEFAULT_STRENGTH, attached=True),
    "rotated-ewc-loss": Method(_rotated_ewc("loss"), by_default=True),
    "rotated-ewc-separate": Method(_rotated_ewc("loss", "separate")),
    "joint": Method(_no_plugin, None, trained_jointly=True, by_default=True),
}
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.by_default)


def is_own(label: str) -> bool:
    """Whether the label of a method, whatever is added to it, is of one of this package's."""
    return label.startswith("rotated-")


@dataclass(frozen=True)
class Variant:
    """A method with its strength settled."""

    name: str  # key in :data:`METHODS`
    strength: float | str | None  # λ, or :data:`AUTO`; None where there is none
    note: str = ""  # what tables and plots add to the name

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        return self.name + self.note

    @property
    def method(self) -> Method:
        """The method itself."""
        return METHODS[self.name]


def make_plugin(
    variant: Variant, configuration: "Configuration", *, seed: int, examples: int
) -> Any | None:
    """Make the plugin that sets a method apart, None for plain training, for tasks of a size."""
    samples: int | None = configuration.fisher_samples
    if not samples or samples >= examples:
        samples = None
    settings = PluginSettings(variant.strength or 0.0, samples, seed, configuration)
    return variant.method.make_plugin(settings)


def make_optimizer(
    model: "nn.Module", configuration: "Configuration", method: Method
) -> "Optimizer":
    """Make the optimizer of a configuration, or SGD for a method that needs it.

    SGD in the place of another optimizer has :data:`SGD_FACTOR` times the learning rate.
    """
    from torch import optim

    name, rate = configuration.optimizer, configuration.learning_rate
    if method.needs_sgd and name != "sgd":
        name, rate = "sgd", SGD_FACTOR * rate
    options = {"momentum": SGD_MOMENTUM} if name == "sgd" else {}
    made: Optimizer = getattr(optim, OPTIMIZERS[name])(model.parameters(), lr=rate, **options)
    return made


def make_strategy(
    model: "nn.Module",
    configuration: "Configuration",
    optimizer: "Optimizer",
    plugins: Sequence[Any],
) -> Any:
    """Make a strategy that trains a model and neither evaluates nor logs.

    The optimizer, and with it its state, lives as long as the strategy: from task to task.
    """
    from torch import nn

    from benchmarks.avalanche_names import Naive

    with warnings.catch_warnings():
        # That there are no loggers is the point of evaluator=None.
        warnings.filterwarnings("ignore", message="No loggers specified", category=UserWarning)
        return Naive(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=configuration.batch_size,
            train_epochs=configuration.epochs,
            device=configuration.device,
            plugins=list(plugins),
            evaluator=None,
            eval_every=-1,
        )
