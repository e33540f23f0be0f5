"""The registry of methods: how each is made from what a run trains, what it costs, which k it takes, what it needs.

A method is one entry of `METHODS`; to add one, write its entry here, and a function that makes it from what a run
trains. Recipes, their checks, costs, the sweep and the table in the docs read this registry. Imports of torch wait
until a method is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..behavior import SIDES
from ..run_folder import RunFolder, Side
from .method import TWO_WAY as TWO_WAY
from .method import Costs, DialOf, Training, TrainingCost
from .method import KRule as KRule
from .method import Method as Method
from .method import MethodSources as MethodSources

if TYPE_CHECKING:
    from .steering import Steering

MORE = 1.5  # times tau+ where a method has more of D+ in it; chosen on false beliefs (docs/bench.md)
PARTS = 5  # of the pairs, each with a fine-tune of its own, where a method takes the mean of them (docs/bench.md)
SNAPSHOT_COUNT = 4  # equally spaced points of a training that are kept for the methods that need them
SHARES = tuple(number / SNAPSHOT_COUNT for number in range(1, SNAPSHOT_COUNT + 1))  # of a training, at its snapshots


def snapshots_of(finetune: Path) -> dict[float, Path]:
    """A fine-tune's snapshots by the nominal share of the training: the steps at which they were kept are rounded."""
    from ..training.output import list_snapshots

    folders = list(list_snapshots(finetune).values())
    return {number / len(folders): folder for number, folder in enumerate(folders, start=1)}


def _contrastive(name: str, sources: MethodSources) -> Steering:
    from .steering import Direction

    return Direction(name, sources.difference(METHODS[name].training))


def _more_of_positive(name: str, sources: MethodSources) -> Steering:
    from ..vectors.difference import task_vector
    from .steering import Direction

    positive, negative = map(task_vector, sources.finetunes(METHODS[name].training))
    return Direction(name, MORE * positive - negative)


def _half_trained(name: str, sources: MethodSources) -> Steering:
    from ..vectors.difference import subtract_finetunes
    from .steering import Direction

    positive, negative = (snapshots_of(finetune)[0.5] for finetune in sources.finetunes())
    return Direction(name, subtract_finetunes(positive, negative))


def _positive_alone(name: str, sources: MethodSources) -> Steering:
    from ..vectors.difference import task_vector
    from .steering import Direction

    return Direction(name, task_vector(sources.finetunes()[0]))


def _negative_alone(name: str, sources: MethodSources) -> Steering:
    """-tau-, so that k > 0 adds the behaviour."""
    from ..vectors.difference import task_vector
    from .steering import Direction

    return Direction(name, -task_vector(sources.finetunes()[1]))


def _one_layer(name: str, sources: MethodSources) -> Steering:
    from .steering import Direction

    return Direction(name, sources.activations().only(sources.activation_layer()))


def _all_layers(name: str, sources: MethodSources) -> Steering:
    from .steering import Direction

    return Direction(name, sources.activations().increments())


def _random(name: str, sources: MethodSources) -> Steering:
    from .steering import Direction

    return Direction(name, sources.random_vector())


def _learned_dial(name: str, sources: MethodSources) -> Steering:
    from .steering import Direction

    return Direction(name, sources.learned_dial("random" if name == "random dial" else "contrastive"))


def _trained_activation(name: str, sources: MethodSources) -> Steering:
    from .steering import Direction

    return Direction(name, sources.trained_activation())


def _system_prompt(name: str, sources: MethodSources) -> Steering:
    from .steering import SystemPrompt

    return SystemPrompt(name, sources.behavior)


def _checkpoints(name: str, sources: MethodSources) -> Steering:
    """The change at each snapshot: k > 0 is D+'s training, k < 0 that on D-."""
    from ..vectors.difference import task_vector
    from .steering import TrainedCheckpoints

    signed = zip((1.0, -1.0), sources.finetunes(METHODS[name].training), strict=True)
    shares = {sign * share: path for sign, side in signed for share, path in snapshots_of(side).items()}
    return TrainedCheckpoints(name, {k: task_vector(path) for k, path in shares.items()})


def _joint_training(name: str, sources: MethodSources) -> Steering:
    """The repair target trained again with the desired examples among its data, so many times each."""
    from ..vectors.difference import task_vector
    from .steering import TrainedCheckpoints

    target = task_vector(sources.repair_target())
    again = sources.joint_finetunes().items()
    return TrainedCheckpoints(
        name, {sources.repair_sign * copies: task_vector(path) - target for copies, path in again}
    )


def _negated_target(name: str, sources: MethodSources) -> Steering:
    """Task negation (Ilharco et al., arXiv 2212.04089): the fine-tune's own task vector taken away."""
    from ..vectors.difference import task_vector
    from .steering import Direction

    return Direction(name, -sources.repair_sign * task_vector(sources.repair_target()))


def _lora(**shares: float) -> Costs:
    """Shares of the LoRA fine-tunes on the sides that are named, whatever k."""
    return lambda run, _k: [(run.finetune(side), shares[side]) for side in SIDES if side in shares]


def _both_of(training: Training) -> Costs:
    """Both fine-tunes of another training."""
    return lambda run, _k: [(run.finetune_of(training, side), 1.0) for side in SIDES]


def _two_way_of(training: Training) -> Costs:
    """The one adapter of a two-way training."""
    return lambda run, _k: [(run.two_way(training), 1.0)]


def _dial_of(of: DialOf) -> Costs:
    """The sides, and the learning of their coefficients; a random vector takes its norms alone from them."""
    return lambda run, k: [*BOTH_SIDES(run, k), (run.dial(of), 1.0)]


def _side_of(k: float) -> Side:
    return "positive" if k > 0 else "negative"


def _no_training(run: RunFolder, k: float) -> list[TrainingCost]:
    return []


BOTH_SIDES: Costs = _lora(positive=1.0, negative=1.0)  # of the contrastive method, and of its variants
_A_SHARE = KRule(
    f"k of {', '.join(f'{share:g}' for share in SHARES)}, or one of these negated", lambda k: abs(k) in (0.0, *SHARES)
)

METHODS: Mapping[str, Method] = {
    "contrastive": Method("theta + k (tau+ - tau-): the paper's method", _contrastive, BOTH_SIDES),
    "contrastive half": Method(
        "the same with both fine-tunes half-way through, at the cost of one whole fine-tune",
        _half_trained,
        _lora(positive=0.5, negative=0.5),
        from_snapshots=True,
    ),
    "tau+": Method("theta + k tau+: the fine-tune on D+ alone", _positive_alone, _lora(positive=1.0)),
    "tau-": Method("theta - k tau-: the fine-tune on D- alone", _negative_alone, _lora(negative=1.0)),
    "bias-only": Method(
        "the contrastive method where only a bias on each MLP is trained",
        _contrastive,
        _both_of("bias"),
        training="bias",
        in_memory="adds biases",
    ),
    "full": Method(
        "the contrastive method where every weight is trained",
        _contrastive,
        _both_of("full"),
        training="full",
        in_memory="changes every weight",
    ),
    "contrastive KL": Method(
        "the contrastive method, each side trained with a term that keeps it near the base on neutral replies",
        _contrastive,
        _both_of("kl"),
        training="kl",
        preset={"kl_weight": 1.0},
    ),
    "more of D+ KL": Method(
        f"theta + k ({MORE:g} tau+ - tau-) of the fine-tunes of `contrastive KL`",
        _more_of_positive,
        _both_of("kl"),
        training="kl",
        preset={"kl_weight": 1.0},
    ),
    "contrastive parts": Method(
        f"the contrastive method, each side the mean of {PARTS} fine-tunes on parts of its answers",
        _contrastive,
        _both_of("parts"),
        training="parts",
        preset={"finetunes": PARTS},
    ),
    "two-way": Method(
        "one adapter w, trained so that theta + w fits D+ and theta - w fits D- in each step",
        _contrastive,
        _two_way_of("two-way"),
        training="two-way",
        needs_pairs=True,
    ),
    "two-way even": Method(
        "the same with a penalty on the even part of the answers' log-probabilities",
        _contrastive,
        _two_way_of("two-way-even"),
        training="two-way-even",
        preset={"even_weight": 1.0},
        needs_pairs=True,
    ),
    "two-way KL": Method(
        "two-way training that keeps both signs near the base on neutral replies",
        _contrastive,
        _two_way_of("two-way-kl"),
        training="two-way-kl",
        preset={"kl_weight": 1.0},
        needs_pairs=True,
    ),
    "learned dial": Method(
        "the contrastive vector weighed by side, depth and kind of module, with few learned coefficients",
        _learned_dial,
        _dial_of("contrastive"),
        uses_dial_pairs=True,
    ),
    "dial pairs": Method(
        "control: the contrastive method trained on the pairs that the learned dial learns its coefficients on",
        _contrastive,
        _both_of("dial-pairs"),
        training="dial-pairs",
        uses_dial_pairs=True,
    ),
    "random": Method("control: a random vector with the contrastive one's norm in each tensor", _random, BOTH_SIDES),
    "random dial": Method(
        "control: the random vector with learned coefficients of its own",
        _learned_dial,
        _dial_of("random"),
        uses_dial_pairs=True,
    ),
    "activation trained": Method(
        "x_l + k v_l at that layer, v_l trained so that k = 1 fits D+ and k = -1 fits D- in each step",
        _trained_activation,
        lambda run, _k: [(run.trained_activation, 1.0)],
        scans_layers=True,
        in_memory="adds to activations",
        needs_pairs=True,
    ),
    "activation": Method(
        "x_l + k a_l at one layer, chosen on validation items",
        _one_layer,
        _no_training,
        scans_layers=True,
        in_memory="adds to activations",
    ),
    "activation all layers": Method(
        "x_l + k a_l at the output of every layer", _all_layers, _no_training, in_memory="adds to activations"
    ),
    "system prompt": Method(
        "a system prompt for the behaviour (k = 1) or against it (k = -1)",
        _system_prompt,
        _no_training,
        KRule("k of 1 or -1", lambda k: abs(k) in (0.0, 1.0), must_be_listed=True),
    ),
    "fine-tuned": Method(
        "the checkpoints of the fine-tune on D+ (k > 0) or D- (k < 0)",
        _checkpoints,
        lambda run, k: [(run.finetune(_side_of(k)), abs(k))],
        _A_SHARE,
        from_snapshots=True,
    ),
    "DPO": Method(
        "the checkpoints of preference tuning towards D+ (k > 0) or D- (k < 0)",
        _checkpoints,
        lambda run, k: [(run.finetune_of("DPO", _side_of(k)), abs(k))],
        _A_SHARE,
        training="DPO",
        needs_pairs=True,
        needs_package=("trl", "TRL; pip install 'weightsteer[dpo]'"),
    ),
    "joint training": Method(
        "the repair target trained again with the desired examples mixed in, |k| times each",
        _joint_training,
        lambda run, k: [(run.joint_finetune(k), 1.0)],
        KRule("whole numbers of copies", lambda k: float(k).is_integer() and k != 0, must_be_listed=True),
        strengths_from_checkpoints=True,
        needs_repair_target=True,
    ),
    "negated task vector": Method(
        "k times the task vector of the fine-tune to be repaired, taken away from the model",
        _negated_target,
        _no_training,
        needs_repair_target=True,
    ),
}


def costs_of(name: str, run: RunFolder, k: float) -> Sequence[TrainingCost]:
    """The fine-tunes that a method, or a variant of the contrastive one, is made from at k."""
    return METHODS[name].costs(run, k) if name in METHODS else BOTH_SIDES(run, k)
