"""The parts of a recipe: what each field means, its default, and which values it takes (no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..checkpoints.load_options import Attention, Batching, LoadOptions, Quantize
from ..data_building.sampling_settings import SamplingRecipe
from ..engines.kinds import Kind
from ..errors import SteerError
from ..evaluation.task_spec import MOST_TOKENS
from ..run_folder import Side
from ..schema import LARGEST_FLOAT, suggestion
from ..steering.methods import METHODS


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"expected one of {', '.join(map(repr, METHODS))}{suggestion(name, METHODS)}")
    return name


def _trained_alone(name: str) -> str:
    known = [method for method, entry in METHODS.items() if entry.has_own_training]
    if name not in known:
        raise ValueError(f"expected a method with a training of its own, {', '.join(map(repr, known))}")
    return name


VARIANT_VECTORS = ("w", "positive", "negative")  # what a variant's expression may name: w, tau+ and tau-

MethodName = Annotated[str, AfterValidator(_known_method)]
TrainedAlone = Annotated[str, AfterValidator(_trained_alone)]
NotNegative = Annotated[float, Field(ge=0)]


MOST_EXAMPLES = 10_000_000  # that are made for a run
Strength = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]  # a k
Fraction = Annotated[float, Field(gt=0)]  # of a k that was found


class Strict(BaseModel):
    """A part of a recipe; an unknown key is an error, not a silent nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def fields_of(part: type[BaseModel]) -> frozenset[str]:
    """The names of all fields in a part of a recipe and the parts inside it."""
    schema = part.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return frozenset(name for one in parts for name in one.get("properties", {}))


class DataRecipe(Strict):
    """Where D+ and D- come from: pairs (shipped or a file), one file a side, or the model's own answers."""

    pairs: str | None = None  # a shipped behaviour, or a file of prompts with both answers
    positive: str | None = None  # a file of D+: answers that show the behaviour
    negative: str | None = None  # a file of D-: answers that show its opposite
    sampling: SamplingRecipe | None = None  # the model's own answers, instead of files
    limit: int | None = Field(default=None, ge=2)  # use so many pairs

    @model_validator(mode="after")
    def _one_source(self) -> DataRecipe:
        sides = bool(self.positive and self.negative)
        halves = bool(self.positive or self.negative)
        if sum((bool(self.pairs), sides, self.sampling is not None)) != 1 or halves != sides:
            raise ValueError(
                "expected 'pairs', or both 'positive' (D+) and 'negative' (D-), or 'sampling' (the model's own answers)"
            )
        return self


class GenerateRecipe(Strict):
    """Arithmetic examples, made for the run: a family, and kinds in equal shares."""

    family: str  # gcd, addition or larger
    kinds: list[str] = ["query", "correct"]  # query, correct, incorrect
    count: int = Field(default=400, ge=2, le=MOST_EXAMPLES)  # examples in all


class FinetuneRecipe(Strict):
    """A fine-tune that is merged into the model: on files of examples, or on generated arithmetic."""

    data: list[str] = []  # files of examples, or one side of a shipped behaviour, such as gloomy:negative
    limit: int | None = Field(default=None, ge=2)  # so many examples of each file
    generate: GenerateRecipe | None = None  # arithmetic examples instead of files
    train: dict[str, Any] = {}  # training settings over the library's own

    @model_validator(mode="after")
    def _some_source(self) -> FinetuneRecipe:
        if bool(self.data) == (self.generate is not None):
            raise ValueError("expected 'data' (a list of files) or 'generate'")
        return self


class RepairRecipe(FinetuneRecipe):
    """The fine-tune to be repaired: every method steers it; `joint training` makes it again with desired examples."""

    desired_side: Side = "positive"  # which side holds the desired examples
    desired_examples: int | None = Field(default=None, ge=1)  # how many of them; default: all


class LoadRecipe(Strict):
    """How the model's weights are put into memory (docs/one-gpu.md)."""

    # nf4 packs the linear layers' weights into 4 bits, int8 into 8, by bitsandbytes: sides are trained by QLoRA
    quantize: Quantize | None = None
    attention: Attention | None = None  # sdpa, flash_attention_2 or eager; without it, transformers' own choice
    # the most that weights take on a device, GPUs by number in quotes: {"0": 20GiB, cpu: 60GiB}
    max_memory: dict[str, int | str] | None = None
    # auto, balanced, balanced_low_0 or sequential, by which a large model is spread, or module -> device
    device_map: str | dict[str, int | str] | None = None
    batching: Batching | None = None  # continuous: a reply that ends makes room for the next; without it, padded

    @model_validator(mode="after")
    def _known(self) -> LoadRecipe:
        try:
            _ = self.options
        except SteerError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def options(self) -> LoadOptions:
        """The options as `LM.load` takes them."""
        memory = dict(self.max_memory or {}) or None
        return LoadOptions(self.quantize, self.attention, memory, self.device_map, self.batching)


class JudgeRecipe(Strict):
    """Who judges: a model behind an OpenAI-compatible url, or without url a local model."""

    model: str  # the judge's name at the server, or a local model
    url: str | None = None  # an OpenAI-compatible server; without it, the judge is a local model
    key_env: str = "OPENAI_API_KEY"  # environment variable with the key that the server may get
    concurrency: int = Field(default=8, ge=1, le=10_000)  # requests at once


class EngineRecipe(Strict):
    """A server on which the sweep measures what it can: replies, and log-probabilities of given texts."""

    kind: Kind  # vllm, llama.cpp, or weightsteer for `weightsteer serve`
    url: str  # the server's address, such as http://localhost:8000
    vectors: str  # the folder into which the run writes its vectors, and in which the server finds them
    concurrency: int = Field(default=64, ge=1, le=10_000)  # requests at once
    key_env: str | None = None  # environment variable with the server's key; without it, the one that its kind reads
    # nats per token by which the served base may differ; without it, 0.01 to 0.05 by the model's dtype
    tolerance: float | None = Field(default=None, gt=0)


class DialRecipe(Strict):
    """How the learned dial learns its coefficients: on pairs that no side is trained on, under a budget of KL."""

    # a file of pairs, or a shipped behaviour; without it, those of `data.pairs` that `data.limit` leaves out
    pairs: str | None = None
    count: int = Field(default=40, ge=2)  # at most so many of them
    kl: float = Field(default=0.05, gt=0)  # budget: mean token KL to the base on neutral replies, in nats
    steps: int = Field(default=40, ge=1)  # of Adam, on the coefficients
    learning_rate: float = Field(default=0.05, gt=0)  # falls to 0 in a straight line
    batch_size: int = Field(default=4, ge=1)  # pairs in a step
    knots: int = Field(default=4, ge=1, le=32)  # numbers of the curve over depth
    # a file of pairs whose margins are to stay as they are, such as refusing or helping with what is harmless
    unmoved: str | None = None
    unmoved_margin: float = Field(default=0.1, gt=0)  # budget: mean size of their change, nats per token


class SweepRecipe(Strict):
    """Which methods, at which strengths.

    A method's strengths are a list of k, or None: the k at which the loss on ordinary text has
    risen by `loss_increase` nats is found on each side, and `fractions` of it are swept, so that all
    methods cover the same range of loss increase. With `kl`, the k is found by the token KL instead.
    """

    # method -> its strengths k, or null to search for them
    methods: dict[MethodName, list[Strength] | None] = {
        "contrastive": None,
        "tau+": None,
        "tau-": None,
        "activation": None,
        "system prompt": [-1.0, 1.0],
    }
    variants: dict[str, str] = {}  # name -> expression of w, positive (tau+) and negative (tau-), swept like a method
    loss_increase: float = Field(default=0.2, gt=0)  # nats per token over the base, on ordinary text
    # in place of `loss_increase`: the 95th percentile of the token KL to the base, in nats; takes a task `token_kl`
    kl: float | None = Field(default=None, gt=0)
    fractions: list[Fraction] = [0.25, 0.5, 0.75, 1.0]  # of the k that was found, which are swept
    fractions_of: dict[str, list[Fraction]] = {}  # a method's own fractions
    sides: list[Literal[-1, 1]] = [-1, 1]  # which way k goes
    items_of: dict[str, int] = {}  # methods that are measured on the first so many items of each split
    behavior: str = "preference/margin"  # task/metric by which k and the layer are chosen
    activation_pairs: int | None = Field(default=None, ge=2)  # default: all that are trained on
    layer_step: int = Field(default=1, ge=1)  # scan one layer in so many
    search_items: int = Field(default=8, ge=1)  # validation items of the layer scan and of the search for k


class SampleRecipe(Strict):
    """Replies at every swept k: prompts (default: the behaviour's last questions). Where they loop, k is not chosen."""

    # what is asked; without it, the behaviour's last questions
    prompts: list[Annotated[str, Field(pattern=r"\S")]] | None = None
    count: int = Field(default=6, ge=0, le=1000)  # how many of the prompts
    max_new_tokens: int = Field(default=48, ge=1, le=MOST_TOKENS)  # longest reply, in tokens
